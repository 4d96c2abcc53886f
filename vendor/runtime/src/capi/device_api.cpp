// qi_cuda_*: what there is of CUDA on this machine, and whether it works.
#include <chrono>
#include <memory>
#include <string>

#include "base/error.h"
#include "capi/guard.h"

#ifdef QINFER_CUDA
#include "device/cuda/cublas.h"
#include "device/cuda/driver.h"
#include "device/cuda/embedded.h"
#include "device/cuda/gpu.h"
#include "device/cuda/libraries.h"
#include "device/cuda/nvrtc.h"
#include "device/cuda/probe.h"
#include "device/cuda/self_test.h"
#endif

using namespace qi;

#ifdef QINFER_CUDA

static_assert(QI_KERNEL_EMBEDDED == int(cuda::Cubin::Origin::embedded) &&
              QI_KERNEL_CACHED == int(cuda::Cubin::Origin::cached) &&
              QI_KERNEL_COMPILED == int(cuda::Cubin::Origin::compiled));

int32_t qi_cuda_configure(const char* folders, const uint64_t* offsets, uint64_t n_folders,
                          const char* cache_folder, uint64_t cache_folder_length, qi_error* error) {
    return guard(error, [&] {
        if (n_folders > 0) {
            require_pointer(folders, "folders");
            require_pointer(offsets, "offsets");
        }
        cuda::Configuration configuration;
        for (uint64_t i = 0; i < n_folders; i++) {
            if (offsets[i] > offsets[i + 1])
                fail(QI_ARGUMENT, "offsets[%llu] is past the one after it",
                     static_cast<unsigned long long>(i));
            configuration.folders.push_back(
                checked_path(folders + offsets[i], offsets[i + 1] - offsets[i]));
        }
        if (cache_folder_length > 0)
            configuration.cache_folder = checked_path(cache_folder, cache_folder_length);
        cuda::configure(std::move(configuration));
    });
}

namespace {

template <size_t capacity>
void describe(char (&problem)[capacity], const Error& error) {
    copy_text(problem, capacity, error.what());
}

}  // namespace

int32_t qi_cuda_get_info(qi_cuda_info* out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        qi_cuda_info info = {};
        info.built = 1;
        info.n_embedded_cubins = int32_t(cuda::embedded_cubins().size());
        try {
            info.n_devices = cuda::Gpu::count();
            info.driver_version = cuda::driver().version;
        } catch (const Error& problem) {
            describe(info.driver_problem, problem);
        }
        try {
            const cuda::NvrtcInfo& nvrtc = cuda::nvrtc_info();
            info.nvrtc_version = 1000 * nvrtc.major + 10 * nvrtc.minor;
            copy_text(info.nvrtc_path, sizeof info.nvrtc_path, nvrtc.path);
        } catch (const Error& problem) {
            describe(info.nvrtc_problem, problem);
        }
        try {
            const cuda::CublasInfo cublas = cuda::cublas_info();
            info.cublas_version = 1000 * cublas.major + 10 * cublas.minor;
            copy_text(info.cublas_path, sizeof info.cublas_path, cublas.path);
        } catch (const Error& problem) {
            describe(info.cublas_problem, problem);
        }
        *out = info;
    });
}

int32_t qi_cuda_get_device_info(int32_t device, qi_cuda_device_info* out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        const cuda::Gpu::Attributes attributes = cuda::Gpu::describe(device);
        qi_cuda_device_info info = {};
        copy_text(info.name, sizeof info.name, attributes.name);
        copy_text(info.uuid, sizeof info.uuid, attributes.uuid);
        info.compute_major = attributes.architecture / 10;
        info.compute_minor = attributes.architecture % 10;
        info.n_sm = attributes.n_sm;
        info.memory_bytes = uint64_t(attributes.memory_bytes);
        info.l2_bytes = uint64_t(attributes.l2_bytes);
        info.memory_bandwidth = attributes.memory_bandwidth;
        *out = info;
    });
}

int32_t qi_cuda_run_probe(int32_t device, uint64_t n_bytes, uint64_t budget_bytes,
                          qi_cuda_probe* out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        const cuda::ProbeReport report =
            cuda::probe(device, n_bytes, budget_bytes ? budget_bytes : cuda::Budget::unlimited);
        *out = {report.free_bytes, int32_t(report.origin), 0, report.compile_seconds,
                report.seconds};
    });
}

struct qi_cuda_gpu {
    std::shared_ptr<cuda::Gpu> gpu;
};

int32_t qi_cuda_open(int32_t device, qi_cuda_gpu** out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        *out = new qi_cuda_gpu{cuda::Gpu::open(device)};
    });
}

void qi_cuda_close(qi_cuda_gpu* gpu) {
    delete gpu;
}

int32_t qi_cuda_measure_read_bandwidth(qi_cuda_gpu* gpu, uint64_t n_bytes, double* bytes_per_second,
                                       qi_error* error) {
    return guard(error, [&] {
        require_pointer(gpu, "gpu");
        require_pointer(bytes_per_second, "bytes_per_second");
        if (n_bytes == 0) fail(QI_ARGUMENT, "n_bytes is 0");
        *bytes_per_second = cuda::measure_read_bandwidth(gpu->gpu, n_bytes);
    });
}

int32_t qi_cuda_measure_launch_seconds(qi_cuda_gpu* gpu, double* seconds, qi_error* error) {
    return guard(error, [&] {
        require_pointer(gpu, "gpu");
        require_pointer(seconds, "seconds");
        *seconds = cuda::measure_launch_seconds(gpu->gpu);
    });
}

namespace {

size_t checked_self_test(int32_t number) {
    const size_t n = cuda::n_self_tests();
    if (number < 0 || size_t(number) >= n)
        fail(QI_ARGUMENT, "there is no self-test %d: they are 0 to %zu", int(number), n - 1);
    return size_t(number);
}

}  // namespace

int32_t qi_cuda_n_self_tests(void) {
    return int32_t(cuda::n_self_tests());
}

int32_t qi_cuda_get_self_test_name(int32_t number, char* name, uint64_t capacity, qi_error* error) {
    return guard(error, [&] {
        require_pointer(name, "name");
        if (capacity == 0) fail(QI_ARGUMENT, "capacity is 0");
        copy_text(name, capacity, cuda::self_test_name(checked_self_test(number)));
    });
}

int32_t qi_cuda_run_self_test(qi_cuda_gpu* gpu, int32_t number, qi_cuda_self_test* out,
                              qi_error* error) {
    return guard(error, [&] {
        require_pointer(gpu, "gpu");
        require_pointer(out, "out");
        const auto begin = std::chrono::steady_clock::now();
        const cuda::SelfTestResult result =
            cuda::run_self_test(gpu->gpu, checked_self_test(number));
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        qi_cuda_self_test filled = {};
        copy_text(filled.name, result.name);
        filled.error = result.error;
        filled.tolerance = cuda::SelfTestResult::tolerance;
        filled.seconds = seconds.count();
        filled.n_values = result.n_values;
        filled.passed = result.passed();
        *out = filled;
    });
}

#else

namespace {

constexpr char not_built[] =
    "this qinfer was built without CUDA (-Ccuda=off): build it again with `pip install .`";

}  // namespace

int32_t qi_cuda_configure(const char*, const uint64_t*, uint64_t, const char*, uint64_t,
                          qi_error*) {
    return QI_OK;
}

int32_t qi_cuda_get_info(qi_cuda_info* out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        *out = {};
        copy_text(out->driver_problem, sizeof out->driver_problem, not_built);
    });
}

int32_t qi_cuda_get_device_info(int32_t, qi_cuda_device_info*, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

int32_t qi_cuda_run_probe(int32_t, uint64_t, uint64_t, qi_cuda_probe*, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

int32_t qi_cuda_open(int32_t, qi_cuda_gpu**, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

void qi_cuda_close(qi_cuda_gpu*) {}

int32_t qi_cuda_measure_read_bandwidth(qi_cuda_gpu*, uint64_t, double*, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

int32_t qi_cuda_measure_launch_seconds(qi_cuda_gpu*, double*, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

int32_t qi_cuda_n_self_tests(void) {
    return 0;
}

int32_t qi_cuda_get_self_test_name(int32_t, char*, uint64_t, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

int32_t qi_cuda_run_self_test(qi_cuda_gpu*, int32_t, qi_cuda_self_test*, qi_error* error) {
    return report(error, QI_DEVICE, not_built);
}

#endif
