// What tests do to the stand-in (standin_*), errors' names, and entry points by name.
#include "control.h"

#include <dlfcn.h>
#include <cstring>

namespace standin {
namespace {

std::atomic<uint64_t> calls{0};
std::atomic<int64_t> fail_in{0};  // calls until the one that fails; 0: none does
std::atomic<int> fail_code{0};

struct ErrorName {
    CUresult code;
    const char* name;
    const char* text;
};

#define QI_ERROR(name, text) \
    { CUDA_##name, "CUDA_" #name, text }
constexpr ErrorName error_names[] = {
    QI_ERROR(SUCCESS, "no error"),
    QI_ERROR(ERROR_INVALID_VALUE, "invalid argument"),
    QI_ERROR(ERROR_OUT_OF_MEMORY, "out of memory"),
    QI_ERROR(ERROR_NOT_INITIALIZED, "initialization error"),
    QI_ERROR(ERROR_DEINITIALIZED, "driver shutting down"),
    QI_ERROR(ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    QI_ERROR(ERROR_INVALID_DEVICE, "invalid device ordinal"),
    QI_ERROR(ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    QI_ERROR(ERROR_INVALID_CONTEXT, "invalid device context"),
    QI_ERROR(ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    QI_ERROR(ERROR_UNSUPPORTED_PTX_VERSION,
             "the provided PTX was compiled with an unsupported toolchain."),
    QI_ERROR(ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
    QI_ERROR(ERROR_INVALID_HANDLE, "invalid resource handle"),
    QI_ERROR(ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    QI_ERROR(ERROR_NOT_FOUND, "named symbol not found"),
    QI_ERROR(ERROR_NOT_READY, "device not ready"),
    QI_ERROR(ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    QI_ERROR(ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    QI_ERROR(ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    QI_ERROR(ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    QI_ERROR(ERROR_HOST_MEMORY_ALREADY_REGISTERED,
             "part or all of the requested memory range is already mapped"),
    QI_ERROR(ERROR_HOST_MEMORY_NOT_REGISTERED,
             "pointer does not correspond to a registered memory region"),
    QI_ERROR(ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    QI_ERROR(ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    QI_ERROR(ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    QI_ERROR(ERROR_NOT_PERMITTED, "operation not permitted"),
    QI_ERROR(ERROR_NOT_SUPPORTED, "operation not supported"),
    QI_ERROR(ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    QI_ERROR(ERROR_STREAM_CAPTURE_INVALIDATED,
             "operation failed due to a previous error during capture"),
    QI_ERROR(ERROR_STREAM_CAPTURE_MERGE,
             "operation would result in a merge of separate capture sequences"),
    QI_ERROR(ERROR_STREAM_CAPTURE_UNMATCHED,
             "capture was not ended in the same stream as it began"),
    QI_ERROR(ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    QI_ERROR(ERROR_STREAM_CAPTURE_ISOLATION,
             "dependency created on uncaptured work in another stream"),
    QI_ERROR(ERROR_STREAM_CAPTURE_IMPLICIT,
             "operation would make the legacy stream depend on a capturing blocking stream"),
    QI_ERROR(ERROR_CAPTURED_EVENT,
             "operation not permitted on an event last recorded in a capturing stream"),
    QI_ERROR(ERROR_STREAM_CAPTURE_WRONG_THREAD,
             "attempt to terminate a thread-local capture sequence from another thread"),
    QI_ERROR(ERROR_UNKNOWN, "unknown error"),
};
#undef QI_ERROR

const ErrorName* find_error(CUresult code) {
    for (const ErrorName& error : error_names) {
        if (error.code == code) return &error;
    }
    return nullptr;
}

// Errors that a context keeps for good.
bool sticky(int code) {
    return code == CUDA_ERROR_ILLEGAL_ADDRESS || code == CUDA_ERROR_LAUNCH_TIMEOUT ||
           (code >= 710 && code <= 711) || (code >= 714 && code <= 719);
}

}  // namespace

CUresult enter(const char*) {
    calls++;
    if (fail_in.load() == 0 || fail_in.fetch_sub(1) != 1) return CUDA_SUCCESS;
    const int code = fail_code.load();
    if (sticky(code)) {
        std::lock_guard lock(driver().mutex);
        driver().injected = static_cast<CUresult>(code);
    }
    return static_cast<CUresult>(code);
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuGetErrorName(CUresult code, const char** name) {
    const ErrorName* error = find_error(code);
    if (!name) return CUDA_ERROR_INVALID_VALUE;
    *name = error ? error->name : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

STANDIN_API CUresult cuGetErrorString(CUresult code, const char** text) {
    const ErrorName* error = find_error(code);
    if (!text) return CUDA_ERROR_INVALID_VALUE;
    *text = error ? error->text : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// By base name: the newest variant there is, as the real one gives for a current version.
STANDIN_API CUresult cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                         uint64_t flags, int* status) {
    return api("cuGetProcAddress_v2", 0, [&](Driver&, auto&) {
        require(symbol && *symbol && function && version >= 4000 && flags < 8,
                CUDA_ERROR_INVALID_VALUE);
        *function = nullptr;
        if (status) *status = 1;  // CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND
        const std::string name = symbol;
        require(name.rfind("cu", 0) == 0 && name.find("_v") == std::string::npos,
                CUDA_ERROR_NOT_FOUND);
        Dl_info self;
        dladdr(reinterpret_cast<const void*>(&enter), &self);
        void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
        require(library, CUDA_ERROR_NOT_FOUND);
        for (const char* suffix : {"_v3", "_v2", ""}) {
            if (!*function) *function = dlsym(library, (name + suffix).c_str());
        }
        dlclose(library);
        require(*function, CUDA_ERROR_NOT_FOUND);
        if (status) *status = 0;
        return CUDA_SUCCESS;
    });
}

// There is no table behind it, but a real NVRTC asks, and follows a null pointer where this is
// missing.
STANDIN_API CUresult cuGetExportTable(const void**, const CUuuid*) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

// Counts a call of another of the stand-in's libraries; the CUresult it is to fail with.
STANDIN_API int standin_enter(const char* name) {
    return enter(name);
}

STANDIN_API uint64_t standin_calls() {
    return calls.load();
}

STANDIN_API void standin_fail_at(int64_t n, int code) {
    fail_code = code;
    fail_in = n;
}

STANDIN_API uint64_t standin_allocated() {
    std::lock_guard lock(driver().mutex);
    return driver().allocated;
}

STANDIN_API uint64_t standin_copied_to_host() {
    std::lock_guard lock(driver().mutex);
    return driver().copied_to_host;
}

STANDIN_API uint64_t standin_copies_to_device() {
    std::lock_guard lock(driver().mutex);
    return driver().copies_to_device;
}

STANDIN_API uint64_t standin_launches() {
    std::lock_guard lock(driver().mutex);
    return driver().launches;
}

STANDIN_API uint64_t standin_lone_launches() {
    std::lock_guard lock(driver().mutex);
    return driver().lone_launches;
}

STANDIN_API uint64_t standin_graph_launches() {
    std::lock_guard lock(driver().mutex);
    return driver().graph_launches;
}

STANDIN_API uint64_t standin_live_objects(uint64_t* counts) {
    Driver& d = driver();
    std::lock_guard lock(d.mutex);
    uint64_t contexts = 0;
    for (const auto& context : d.contexts)
        contexts += context->references > 0;
    const uint64_t all[] = {d.streams.size(), d.events.size(),      d.modules.size(),
                            d.graphs.size(),  d.executables.size(), contexts,
                            d.pinned_bytes};
    uint64_t sum = 0;
    for (size_t i = 0; i < std::size(all); i++) {
        if (counts) counts[i] = all[i];
        sum += all[i];
    }
    return sum;
}

STANDIN_API void standin_kill() {
    std::lock_guard lock(driver().mutex);
    driver().gpu.kill();
}

STANDIN_API int standin_process() {
    std::lock_guard lock(driver().mutex);
    return driver().gpu.process();
}

STANDIN_API const char* standin_report() {
    thread_local std::string text;
    std::lock_guard lock(driver().mutex);
    text = driver().gpu.report();
    if (text.empty()) text = driver().complaint;
    return text.c_str();
}

STANDIN_API bool standin_set(const char* name, uint64_t value) {
    Driver& d = driver();
    std::lock_guard lock(d.mutex);
    if (std::strcmp(name, "delay_us") == 0) {
        d.settings.delay_us = value;
    } else if (std::strcmp(name, "seed") == 0) {
        d.settings.seed = value;
    } else if (std::strcmp(name, "clock_rate") == 0) {
        d.settings.clock_rate = value;
    } else {
        return false;
    }
    try {
        d.configure_gpu();
    } catch (const Failure&) {
        return false;
    }
    return true;
}
