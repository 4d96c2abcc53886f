// cuBLAS's entry points: checks, and one operation queued on the driver's stream. A handle takes
// device memory for its workspace, as the real one does, so that a budget has to count it.
#include <dlfcn.h>
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "protocol.h"
#include "version.h"

#define CUBLAS_API extern "C" __attribute__((visibility("default")))

enum cublasStatus_t : int {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14,
    CUBLAS_STATUS_NOT_SUPPORTED = 15,
};
enum : int { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum : int { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69 };
enum : int { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 };
enum : int { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_ALGO23 = 23 };
enum : int { CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99, CUBLAS_GEMM_ALGO15_TENSOR_OP = 115 };
using cublasHandle_t = struct cublasContext*;
using CUstream = struct CUstream_st*;

namespace standin {
namespace {

constexpr size_t workspace_bytes = 8 << 20;

// The driver's functions, found as the real library finds them.
struct DriverTable {
    int (*enter)(const char*);
    int (*capability)();
    int (*has_stream)(CUstream);
    int (*gemm)(CUstream, const Gemm*);
    int (*allocate)(unsigned long long*, size_t);
    int (*release)(unsigned long long);
};

template <class F>
bool find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
}

const DriverTable* driver() {
    static const DriverTable* table = []() -> const DriverTable* {
        static DriverTable t;
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        return library && find(library, "standin_enter", t.enter) &&
                       find(library, "standin_capability", t.capability) &&
                       find(library, "standin_has_stream", t.has_stream) &&
                       find(library, "standin_gemm", t.gemm) &&
                       find(library, "standin_allocate", t.allocate) &&
                       find(library, "standin_release", t.release)
                   ? &t
                   : nullptr;
    }();
    return table;
}

struct Handle {
    CUstream stream = nullptr;
    unsigned long long workspace = 0;
};

std::mutex mutex;
std::map<cublasHandle_t, Handle> handles;

cublasStatus_t enter(const char* name) {
    if (!driver()) return CUBLAS_STATUS_NOT_INITIALIZED;
    const int code = driver()->enter(name);
    if (code == 0) return CUBLAS_STATUS_SUCCESS;
    return code == 2 ? CUBLAS_STATUS_ALLOC_FAILED : CUBLAS_STATUS_EXECUTION_FAILED;
}

// Runs body with the handle, or says what is wrong.
template <class Body>
cublasStatus_t with_handle(const char* name, cublasHandle_t handle, Body&& body) {
    if (const cublasStatus_t injected = enter(name)) return injected;
    std::lock_guard lock(mutex);
    auto found = handles.find(handle);
    if (found == handles.end()) return CUBLAS_STATUS_NOT_INITIALIZED;
    return body(found->second);
}

bool number_of(int type, Number& number) {
    switch (type) {
        case CUDA_R_32F:
            number = Number::f32;
            return true;
        case CUDA_R_16F:
            number = Number::f16;
            return true;
        case CUDA_R_16BF:
            number = Number::bf16;
            return true;
        default:
            return false;
    }
}

}  // namespace
}  // namespace standin

using namespace standin;

CUBLAS_API cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    if (const cublasStatus_t injected = enter("cublasCreate_v2")) return injected;
    if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
    if (driver()->capability() == 0) return CUBLAS_STATUS_NOT_INITIALIZED;
    Handle made;
    const int code = driver()->allocate(&made.workspace, workspace_bytes);
    if (code != 0) return code == 2 ? CUBLAS_STATUS_ALLOC_FAILED : CUBLAS_STATUS_NOT_INITIALIZED;
    static std::atomic<uintptr_t> next{0x100};
    *handle = reinterpret_cast<cublasHandle_t>(next.fetch_add(0x10));
    std::lock_guard lock(mutex);
    handles[*handle] = made;
    return CUBLAS_STATUS_SUCCESS;
}

CUBLAS_API cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    const cublasStatus_t injected = enter("cublasDestroy_v2");  // it is destroyed all the same
    std::lock_guard lock(mutex);
    auto found = handles.find(handle);
    if (found == handles.end()) return CUBLAS_STATUS_NOT_INITIALIZED;
    driver()->release(found->second.workspace);
    handles.erase(found);
    return injected;
}

CUBLAS_API cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int* version) {
    if (!version) return CUBLAS_STATUS_INVALID_VALUE;
    *version = cuda_major * 10000 + (cuda_major >= 13 ? 0 : 900);
    if (!handle) return CUBLAS_STATUS_SUCCESS;  // as the real one, which needs none for this
    return with_handle("cublasGetVersion_v2", handle,
                       [](Handle&) { return CUBLAS_STATUS_SUCCESS; });
}

// Needs no handle: 0, 1 and 2 ask for the major version, the minor version and the patch level.
CUBLAS_API cublasStatus_t cublasGetProperty(int which, int* value) {
    if (which < 0 || which > 2 || !value) return CUBLAS_STATUS_INVALID_VALUE;
    const int version[] = {cuda_major, cuda_major >= 13 ? 0 : 9, 0};
    *value = version[which];
    return CUBLAS_STATUS_SUCCESS;
}

CUBLAS_API const char* cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "success";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "the library was not initialized";
        case CUBLAS_STATUS_ALLOC_FAILED:
            return "the resource allocation failed";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "an invalid value was used as an argument";
        case CUBLAS_STATUS_ARCH_MISMATCH:
            return "an absent device architectural feature is required";
        case CUBLAS_STATUS_MAPPING_ERROR:
            return "an access to GPU memory space failed";
        case CUBLAS_STATUS_EXECUTION_FAILED:
            return "the function failed to launch on the GPU";
        case CUBLAS_STATUS_INTERNAL_ERROR:
            return "an internal operation failed";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "the functionality is not supported";
    }
    return "unknown status";
}

CUBLAS_API cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, CUstream stream) {
    return with_handle("cublasSetStream_v2", handle, [&](Handle& h) {
        if (driver()->has_stream(stream) != 0) return CUBLAS_STATUS_INVALID_VALUE;
        h.stream = stream;
        return CUBLAS_STATUS_SUCCESS;
    });
}

CUBLAS_API cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t) {
    return with_handle("cublasSetWorkspace_v2", handle, [&](Handle&) {
        return reinterpret_cast<uintptr_t>(workspace) % 256 == 0 ? CUBLAS_STATUS_SUCCESS
                                                                 : CUBLAS_STATUS_INVALID_VALUE;
    });
}

CUBLAS_API cublasStatus_t cublasSetMathMode(cublasHandle_t handle, int mode) {
    return with_handle("cublasSetMathMode", handle, [&](Handle&) {
        // Default, (deprecated) tensor op, pedantic, TF32; and a flag for reductions.
        return mode >= 0 && (mode & ~16) <= 3 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
    });
}

CUBLAS_API cublasStatus_t cublasGemmEx(cublasHandle_t handle, int op_a, int op_b, int m, int n,
                                       int k, const void* alpha, const void* a, int type_a, int lda,
                                       const void* b, int type_b, int ldb, const void* beta,
                                       void* c, int type_c, int ldc, int compute, int algorithm) {
    return with_handle("cublasGemmEx", handle, [&](Handle& h) {
        auto is_op = [](int op) { return op >= CUBLAS_OP_N && op <= CUBLAS_OP_C; };
        const bool known_algorithm =
            (algorithm >= CUBLAS_GEMM_DEFAULT && algorithm <= CUBLAS_GEMM_ALGO23) ||
            (algorithm >= CUBLAS_GEMM_DEFAULT_TENSOR_OP &&
             algorithm <= CUBLAS_GEMM_ALGO15_TENSOR_OP);
        if (!is_op(op_a) || !is_op(op_b) || m < 0 || n < 0 || k < 0 || !alpha || !beta ||
            !known_algorithm || lda < std::max(1, op_a == CUBLAS_OP_N ? m : k) ||
            ldb < std::max(1, op_b == CUBLAS_OP_N ? k : n) || ldc < std::max(1, m))
            return CUBLAS_STATUS_INVALID_VALUE;
        Gemm g{};
        const bool known = number_of(type_a, g.type_ab) && number_of(type_c, g.type_c);
        if (!known || type_a != type_b || (type_c != CUDA_R_32F && type_c != type_a) ||
            (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_PEDANTIC))
            return CUBLAS_STATUS_NOT_SUPPORTED;
        const int capability = driver()->capability();
        if (capability == 0) return CUBLAS_STATUS_EXECUTION_FAILED;
        if (type_a == CUDA_R_16BF && capability < 80) return CUBLAS_STATUS_ARCH_MISMATCH;
        if (m == 0 || n == 0) return CUBLAS_STATUS_SUCCESS;
        g.a = reinterpret_cast<uint64_t>(a);
        g.b = reinterpret_cast<uint64_t>(b);
        g.c = reinterpret_cast<uint64_t>(c);
        g.m = m;
        g.n = n;
        g.k = k;
        g.lda = lda;
        g.ldb = ldb;
        g.ldc = ldc;
        g.transpose_a = op_a != CUBLAS_OP_N;
        g.transpose_b = op_b != CUBLAS_OP_N;
        g.alpha = *static_cast<const float*>(alpha);
        g.beta = *static_cast<const float*>(beta);
        const int code = driver()->gemm(h.stream, &g);
        if (code == 2) return CUBLAS_STATUS_ALLOC_FAILED;
        return code == 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
    });
}
