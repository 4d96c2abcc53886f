// Loading cuBLAS and calling its one function that we need.
#include "device/cuda/cublas.h"

#include <dlfcn.h>

#include <climits>
#include <mutex>

#include "base/error.h"
#include "device/cuda/libraries.h"

namespace qi::cuda {

namespace {

using cublasStatus = int;
using cublasHandle = cublasContext*;

constexpr int CUBLAS_OP_N = 0;
constexpr int CUBLAS_OP_T = 1;
constexpr int CUDA_R_32F = 0;
constexpr int CUDA_R_16F = 2;
constexpr int CUDA_R_16BF = 14;
constexpr int CUBLAS_COMPUTE_32F = 68;
constexpr int CUBLAS_GEMM_DEFAULT = -1;
// Sums of partial products stay float where an algorithm splits the inner dimension.
constexpr int CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16;
constexpr int MAJOR_VERSION = 0;
constexpr int MINOR_VERSION = 1;

#define QI_CUBLAS_ENTRIES(X)                                                                    \
    X(cublasCreate, "cublasCreate_v2", (cublasHandle*))                                         \
    X(cublasDestroy, "cublasDestroy_v2", (cublasHandle))                                        \
    X(cublasGetProperty, "cublasGetProperty", (int which, int* value))                          \
    X(cublasSetStream, "cublasSetStream_v2", (cublasHandle, CUstream))                          \
    X(cublasSetWorkspace, "cublasSetWorkspace_v2", (cublasHandle, void*, size_t))               \
    X(cublasSetMathMode, "cublasSetMathMode", (cublasHandle, int mode))                         \
    X(cublasGemmEx, "cublasGemmEx",                                                             \
      (cublasHandle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, \
       int type_a, int lda, const void* b, int type_b, int ldb, const void* beta, void* c,      \
       int type_c, int ldc, int compute, int algorithm))

struct Library {
    CublasInfo info;
    const char* (*cublasGetStatusString)(cublasStatus) = nullptr;
#define QI_CUBLAS_MEMBER(name, symbol, parameters) cublasStatus(*name) parameters = nullptr;
    QI_CUBLAS_ENTRIES(QI_CUBLAS_MEMBER)
#undef QI_CUBLAS_MEMBER
};

Library load() {
    const ToolkitLibrary found =
        load_toolkit_library("cublas", {"libcublasLt.so.*"}, "multiplies the matrices of prompts");
    Library library;
    library.info.path = found.path;
    const char* missing = nullptr;
#define QI_CUBLAS_FIND(name, symbol, parameters)                                          \
    library.name = reinterpret_cast<decltype(library.name)>(dlsym(found.handle, symbol)); \
    if (library.name == nullptr && missing == nullptr) missing = symbol;
    QI_CUBLAS_ENTRIES(QI_CUBLAS_FIND)
#undef QI_CUBLAS_FIND
    library.cublasGetStatusString = reinterpret_cast<decltype(library.cublasGetStatusString)>(
        dlsym(found.handle, "cublasGetStatusString"));
    if (library.cublasGetStatusString == nullptr) missing = "cublasGetStatusString";
    if (missing != nullptr)
        fail(QI_DEVICE, "%s has no %s, so it is no cuBLAS that qinfer can use: %s",
             found.path.c_str(), missing, install_line(driver().version));
    if (library.cublasGetProperty(MAJOR_VERSION, &library.info.major) != 0 ||
        library.cublasGetProperty(MINOR_VERSION, &library.info.minor) != 0)
        fail(QI_DEVICE, "%s does not tell its version", found.path.c_str());
    return library;
}

// Kept once found; a search that failed is made again, for it may have been configured since.
const Library& library() {
    static std::mutex& mutex = *new std::mutex;
    static const Library* found = nullptr;
    driver();  // refuses a fork before the mutex is touched
    std::lock_guard lock(mutex);
    if (found == nullptr) found = new Library(load());
    return *found;
}

void check_cublas(cublasStatus status, const char* doing) {
    constexpr cublasStatus allocation_failed = 3;
    if (status != 0)
        fail(status == allocation_failed ? QI_MEMORY : QI_DEVICE, "cuBLAS failed while %s: %s (%d)",
             doing, library().cublasGetStatusString(status), status);
}

void* pointer(CUdeviceptr address) {
    return reinterpret_cast<void*>(uintptr_t(address));
}

int checked_int(int64_t value, const char* what) {
    if (value < 0 || value > INT_MAX)
        fail(QI_UNSUPPORTED, "cuBLAS takes %s up to %d, not %lld", what, INT_MAX,
             static_cast<long long>(value));
    return int(value);
}

}  // namespace

CublasInfo cublas_info() {
    return library().info;
}

namespace {

size_t workspace_bytes(int architecture) {
    return size_t(architecture >= 90 ? 32 : 4) << 20;
}
// What cublasCreate may take beside the workspace it is given afterwards.
constexpr size_t handle_bytes = size_t(8) << 20;

}  // namespace

size_t Cublas::n_bytes(int architecture) {
    return DeviceMemory::counted_bytes(workspace_bytes(architecture)) + handle_bytes;
}

Cublas::Cublas(const Stream& stream, std::shared_ptr<Budget> budget) {
    const Library& l = library();
    const size_t n_bytes = workspace_bytes(stream.gpu()->attributes().architecture);
    workspace_ = DeviceMemory(stream.gpu(), budget, n_bytes, "cuBLAS's workspace");
    if (!budget->take(handle_bytes))
        fail(QI_MEMORY, "cuBLAS takes %zu bytes of device memory, more than the budget has left",
             handle_bytes);
    budget_ = std::move(budget);
    Current current(*stream.gpu());
    const std::unique_lock lock(stream.gpu()->recording());
    try {
        check_cublas(l.cublasCreate(&handle_), "starting");
        check_cublas(l.cublasSetStream(handle_, stream.handle()), "taking a stream");
        check_cublas(l.cublasSetWorkspace(handle_, pointer(workspace_.address()), n_bytes),
                     "taking a workspace");
        check_cublas(l.cublasSetMathMode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION),
                     "being told to sum in float");
    } catch (...) {
        if (handle_) l.cublasDestroy(handle_);
        budget_->give_back(handle_bytes);
        throw;
    }
}

Cublas::~Cublas() {
    Current current(*workspace_.gpu(), std::nothrow);
    if (current.ok()) {
        const std::unique_lock lock(workspace_.gpu()->recording());
        library().cublasDestroy(handle_);
    }
    budget_->give_back(handle_bytes);
}

void Cublas::multiply(const Product& p) const {
    if (p.n_tokens == 0) return;
    const int type = p.input == Input::f16 ? CUDA_R_16F : CUDA_R_16BF;
    const float alpha = 1.0f;
    const float beta = p.accumulate ? 1.0f : 0.0f;
    // cuBLAS counts columns first, so a row-major matrix is its transpose there.
    check_cublas(library().cublasGemmEx(
                     handle_, p.by_column ? CUBLAS_OP_N : CUBLAS_OP_T, CUBLAS_OP_N,
                     checked_int(p.n_rows, "rows"), checked_int(p.n_tokens, "tokens"),
                     checked_int(p.n_cols, "columns"), &alpha, pointer(p.w), type,
                     checked_int(p.w_stride, "strides"), pointer(p.x), type,
                     checked_int(p.x_stride, "strides"), &beta, pointer(p.y), CUDA_R_32F,
                     checked_int(p.y_stride, "strides"), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                 "multiplying");
}

}  // namespace qi::cuda
