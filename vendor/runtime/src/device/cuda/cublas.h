// cuBLAS, when it is there: matrix–matrix products for prompts. Nothing depends on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "device/cuda/gpu.h"

namespace qi::cuda {

// Where cuBLAS was found. Throws QI_DEVICE when it is not there.
struct CublasInfo {
    int major = 0;
    int minor = 0;
    std::string path;
};
CublasInfo cublas_info();

// A cuBLAS handle on one stream, with a workspace of its own that is counted like everything else.
class Cublas {
  public:
    // Device memory that a handle takes of the budget: the workspace that cuBLAS recommends for an
    // architecture, and what the library takes by itself.
    static size_t n_bytes(int architecture);

    // The stream must outlive it. Throws QI_DEVICE, or QI_MEMORY for the workspace.
    Cublas(const Stream& stream, std::shared_ptr<Budget> budget);
    ~Cublas();
    Cublas(const Cublas&) = delete;
    Cublas& operator=(const Cublas&) = delete;

    enum class Input { f16, bf16 };

    // y [n_tokens][n_rows] = x [n_tokens][n_cols] · wᵀ [n_cols][n_rows], or y += with `accumulate`.
    // Weights w [n_rows][n_cols], with `by_column` [n_cols][n_rows], and activations x are of one
    // 16-bit type, y is float, sums are float. Strides count elements from one row to the next.
    struct Product {
        Input input = Input::f16;
        int64_t n_rows = 0, n_cols = 0, n_tokens = 0;
        CUdeviceptr w = 0, x = 0, y = 0;
        int64_t w_stride = 0, x_stride = 0, y_stride = 0;
        bool by_column = false;
        bool accumulate = false;
    };
    void multiply(const Product& product) const;

  private:
    std::shared_ptr<Budget> budget_;
    DeviceMemory workspace_;
    struct cublasContext* handle_ = nullptr;
};

}  // namespace qi::cuda
