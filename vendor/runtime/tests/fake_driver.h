// A driver for tests of what lies above it, in place of device/cuda/driver.cpp and nvrtc.cpp:
// device memory is the host's, a stream does its work when it is told, and the one kernel there is
// copies records. An event is done when it is asked for the second time.
//
// For the thread sanitizer, which so sees what both sides touch. What kernels compute is tested on
// tests/standin/cuda.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/cuda/driver.h"
#include "device/cuda/nvrtc.h"

namespace qi::cuda {

namespace fake {

inline void* pointer(CUdeviceptr at) {
    return reinterpret_cast<void*>(at);
}

// Handles of objects that nobody looks into.
template <typename Handle>
Handle any() {
    static char object;
    return reinterpret_cast<Handle>(&object);
}

struct Event {
    std::atomic<bool> is_new{false};
};
inline Event* event(CUevent handle) {
    return reinterpret_cast<Event*>(handle);
}

// The literal that a Function keeps is its handle.
inline CUresult find_function(CUfunction* function, CUmodule, const char* name) {
    *function = reinterpret_cast<CUfunction>(const_cast<char*>(name));
    return CUDA_SUCCESS;
}

inline CUresult launch(CUfunction function, unsigned, unsigned n_records, unsigned, unsigned,
                       unsigned, unsigned, unsigned, CUstream, void** parameters, void**) {
    if (std::strcmp(reinterpret_cast<const char*>(function), "qi_place_records") != 0) return 1;
    const auto argument = [&](int i) { return *static_cast<CUdeviceptr*>(parameters[i]); };
    const auto* from = static_cast<const std::byte*>(pointer(argument(0)));
    const auto* slots = static_cast<const int32_t*>(pointer(argument(1)));
    const size_t n_bytes = 16 * size_t(argument(2));
    auto* records = static_cast<std::byte*>(pointer(argument(3)));
    for (unsigned i = 0; i < n_records; ++i)
        std::memcpy(records + size_t(slots[i]) * n_bytes, from + i * n_bytes, n_bytes);
    return CUDA_SUCCESS;
}

inline Driver make_driver() {
    constexpr size_t gib = size_t(1) << 30;
    Driver d;
    d.version = 13000;
    d.cuDeviceGetCount = [](int* n) { return *n = 1, CUDA_SUCCESS; };
    d.cuDeviceGet = [](CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; };
    d.cuDeviceGetName = [](char* name, int, CUdevice) {
        return std::strcpy(name, "fake"), CUDA_SUCCESS;
    };
    d.cuDeviceGetUuid = [](CUuuid*, CUdevice) { return CUDA_SUCCESS; };
    d.cuDeviceGetAttribute = [](int* value, int which, CUdevice) {
        *value = which == CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT ? 0 : 9;
        return CUDA_SUCCESS;
    };
    d.cuDeviceTotalMem = [](size_t* n, CUdevice) { return *n = gib, CUDA_SUCCESS; };
    d.cuDevicePrimaryCtxRetain = [](CUcontext* context, CUdevice) {
        return *context = any<CUcontext>(), CUDA_SUCCESS;
    };
    d.cuDevicePrimaryCtxRelease = [](CUdevice) { return CUDA_SUCCESS; };
    d.cuCtxPushCurrent = [](CUcontext) { return CUDA_SUCCESS; };
    d.cuCtxPopCurrent = [](CUcontext*) { return CUDA_SUCCESS; };
    d.cuCtxSynchronize = [] { return CUDA_SUCCESS; };
    d.cuMemGetInfo = [](size_t* left, size_t* n) { return *left = *n = gib, CUDA_SUCCESS; };
    d.cuMemAlloc = [](CUdeviceptr* at, size_t n) {
        *at = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (n + 255) / 256 * 256));
        return CUDA_SUCCESS;
    };
    d.cuMemFree = [](CUdeviceptr at) { return std::free(pointer(at)), CUDA_SUCCESS; };
    d.cuMemHostAlloc = [](void** at, size_t n, unsigned) {
        return *at = std::malloc(n), CUDA_SUCCESS;
    };
    d.cuMemFreeHost = [](void* at) { return std::free(at), CUDA_SUCCESS; };
    d.cuMemHostGetDevicePointer = [](CUdeviceptr* at, void* host, unsigned) {
        return *at = reinterpret_cast<CUdeviceptr>(host), CUDA_SUCCESS;
    };
    d.cuMemcpyHtoDAsync = [](CUdeviceptr to, const void* from, size_t n, CUstream) {
        return std::memcpy(pointer(to), from, n), CUDA_SUCCESS;
    };
    d.cuStreamCreateWithPriority = [](CUstream* stream, unsigned, int) {
        return *stream = any<CUstream>(), CUDA_SUCCESS;
    };
    d.cuMemsetD8Async = [](CUdeviceptr at, unsigned char value, size_t n, CUstream) {
        return std::memset(pointer(at), value, n), CUDA_SUCCESS;
    };
    d.cuStreamQuery = [](CUstream) { return CUDA_SUCCESS; };
    d.cuStreamDestroy = [](CUstream) { return CUDA_SUCCESS; };
    d.cuStreamSynchronize = [](CUstream) { return CUDA_SUCCESS; };
    d.cuStreamWaitEvent = [](CUstream, CUevent, unsigned) { return CUDA_SUCCESS; };
    d.cuEventCreate = [](CUevent* handle, unsigned) {
        return *handle = reinterpret_cast<CUevent>(new Event), CUDA_SUCCESS;
    };
    d.cuEventDestroy = [](CUevent handle) { return delete event(handle), CUDA_SUCCESS; };
    d.cuEventRecord = [](CUevent handle, CUstream) {
        return event(handle)->is_new = true, CUDA_SUCCESS;
    };
    d.cuEventQuery = [](CUevent handle) {
        return event(handle)->is_new.exchange(false) ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
    };
    d.cuEventSynchronize = [](CUevent) { return CUDA_SUCCESS; };
    d.cuModuleLoadDataEx = [](CUmodule* module, const void*, unsigned, int*, void**) {
        return *module = any<CUmodule>(), CUDA_SUCCESS;
    };
    d.cuModuleUnload = [](CUmodule) { return CUDA_SUCCESS; };
    d.cuModuleGetFunction = find_function;
    d.cuLaunchKernel = launch;
    return d;
}

// For tests that have an entry of their own.
inline Driver& made() {
    static Driver driver = make_driver();
    return driver;
}

}  // namespace fake

const Driver& driver() {
    return fake::made();
}

const Driver* driver_if_usable() noexcept {
    return &driver();
}

std::string version_text(int version) {
    return format("%d", version);
}

std::string result_text(const Driver&, CUresult result) {
    return format("error %d", result);
}

void fail_cuda(CUresult result, const char* doing) {
    fail(QI_DEVICE, "the GPU failed while %s: error %d", doing, result);
}

Cubin make_cubin(std::string_view, int, Cubin::Origin) {
    return {};
}

}  // namespace qi::cuda
