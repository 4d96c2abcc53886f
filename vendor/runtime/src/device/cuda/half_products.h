// Matrix products of prompts through cuBLAS: weights and activations as 16-bit numbers, sums as
// floats.
//
// Bytes: a block type's weights are read once, written as halves and read again by cuBLAS, which is
// little beside the arithmetic of a hundred tokens; F16 and BF16 are multiplied where they are.
// Rounding weights and activations to halves (2^-11 each; BF16 2^-8) is the price: our tiles keep
// what the weights' own steps leave.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "device/cuda/cublas.h"
#include "device/cuda/launch.h"

namespace qi::cuda {

class HalfProducts {
  public:
    // Device memory for activations as halves, with their powers of two, and for weights.
    struct Room {
        CUdeviceptr narrowed = 0;
        CUdeviceptr widened = 0;
        size_t widened_bytes = 0;  // a row at least
    };
    static size_t narrowed_bytes(int64_t n_tokens, int64_t n_cols);
    // F32 does not fit halves, nor does BF16 where there is no such arithmetic.
    static bool takes(Type type, int architecture);

    // Throws as Cublas does. The stream, kernels and memory must outlive it.
    HalfProducts(const Stream& stream, std::shared_ptr<Budget> budget, Kernels& kernels,
                 const Room& room);

    // x float [n_tokens][n_cols of the products], which are of one type.
    void multiply(CUdeviceptr x, int64_t n_tokens, std::span<const Product> products,
                  bool accumulate);
    // The room in args is not used.
    void multiply_by_neuron(const DownTileArgs& args);

  private:
    struct Narrowed {
        Cublas::Input input;
        int64_t stride;
        CUdeviceptr powers, backs;  // float [n_tokens]
    };
    Narrowed narrow(CUdeviceptr x, int64_t n_tokens, int64_t n_cols, Type weight_type);
    // Rows [first, first + n) of a weight as 16-bit numbers, and how far apart they are.
    struct Rows {
        CUdeviceptr at;
        int64_t stride;
    };
    Rows rows_of(const DeviceWeight& w, int64_t first, int64_t n);
    int64_t rows_together(const DeviceWeight& w) const;

    const Stream& stream_;
    Kernels& kernels_;
    Room room_;
    Cublas cublas_;
};

}  // namespace qi::cuda
