// qi_abi_version to qi_measure_read_bandwidth: what the library says of itself and of the machine.
#include <string>
#include <string_view>

#include "base/cpu.h"
#include "base/log.h"
#include "capi/guard.h"

#ifndef QINFER_VERSION
#define QINFER_VERSION "0.1.0+unknown"
#endif

using namespace qi;

int32_t qi_abi_version(void) {
    return QI_ABI_VERSION;
}

const char* qi_version(void) {
    return QINFER_VERSION;
}

uint64_t qi_struct_size(const char* name) {
    static constexpr struct {
        std::string_view name;
        uint64_t n_bytes;
    } structs[] = {
        {"qi_error", sizeof(qi_error)},
        {"qi_cpu_info", sizeof(qi_cpu_info)},
        {"qi_cuda_info", sizeof(qi_cuda_info)},
        {"qi_cuda_device_info", sizeof(qi_cuda_device_info)},
        {"qi_cuda_probe", sizeof(qi_cuda_probe)},
        {"qi_cuda_self_test", sizeof(qi_cuda_self_test)},
        {"qi_type_info", sizeof(qi_type_info)},
        {"qi_read_progress", sizeof(qi_read_progress)},
        {"qi_gguf_info", sizeof(qi_gguf_info)},
        {"qi_gguf_kv", sizeof(qi_gguf_kv)},
        {"qi_gguf_tensor", sizeof(qi_gguf_tensor)},
        {"qi_model_params", sizeof(qi_model_params)},
        {"qi_model_info", sizeof(qi_model_info)},
        {"qi_offload_info", sizeof(qi_offload_info)},
        {"qi_sampling_params", sizeof(qi_sampling_params)},
        {"qi_context_params", sizeof(qi_context_params)},
        {"qi_context_info", sizeof(qi_context_info)},
        {"qi_stats", sizeof(qi_stats)},
        {"qi_layer_stats", sizeof(qi_layer_stats)},
    };
    if (!name) return 0;
    for (const auto& known : structs)
        if (known.name == name) return known.n_bytes;
    return 0;
}

int32_t qi_log_next(char* text, uint64_t capacity) {
    LogLevel level = LogLevel::debug;
    std::string line;
    // Without room for a character the line stays in the ring.
    if (!text || capacity == 0 || !next_log_line(level, line)) return 0;
    copy_text(text, capacity, line);
    return int32_t(level);
}

int32_t qi_get_cpu_info(qi_cpu_info* out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        const CpuInfo& info = cpu_info();
        qi_cpu_info filled = {};
        copy_text(filled.isa, isa_name(active_isa()));
        copy_text(filled.best_isa, isa_name(best_isa()));
        copy_text(filled.brand, info.brand);
        copy_text(filled.features, info.features);
        filled.n_physical_cores = info.n_physical_cores;
        filled.n_usable_cores = info.n_usable_cores;
        *out = filled;
    });
}

int32_t qi_measure_read_bandwidth(int32_t n_threads, uint64_t n_bytes, double* bytes_per_second,
                                  qi_error* error) {
    return guard(error, [&] {
        require_pointer(bytes_per_second, "bytes_per_second");
        *bytes_per_second = measure_read_bandwidth(n_threads, n_bytes);
    });
}
