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
    // What cuBLAS recommends for the largest cards; it asks the driver for nothing more.
    static constexpr size_t workspace_bytes = size_t(32) << 20;

    // The stream must outlive it. Throws QI_DEVICE, or QI_MEMORY for the workspace.
    Cublas(const Stream& stream, std::shared_ptr<Budget> budget);
    ~Cublas();
    Cublas(const Cublas&) = delete;
    Cublas& operator=(const Cublas&) = delete;

    enum class Input { f16, bf16 };

    // y [n_tokens][n_rows] = x [n_tokens][n_cols] · wᵀ [n_cols][n_rows], or y += with `accumulate`.
    // Weights w [n_rows][n_cols] and activations x are of one 16-bit type, y is float, sums are
    // float. Strides count elements from one row to the next.
    struct Product {
        Input input = Input::f16;
        int64_t n_rows = 0, n_cols = 0, n_tokens = 0;
        CUdeviceptr w = 0, x = 0, y = 0;
        int64_t w_stride = 0, x_stride = 0, y_stride = 0;
        bool accumulate = false;
    };
    void multiply(const Product& product) const;

  private:
    DeviceMemory workspace_;
    struct cublasContext* handle_ = nullptr;
};

}  // namespace qi::cuda
