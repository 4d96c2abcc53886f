// The matrix kernels of every instruction set, for dispatch and for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu.h"
#include "kernels/matmul.h"

namespace qi::kernels {

// One function per function of matmul.h that depends on the instruction set; `quantize` and
// `quantized_bytes` are the parts of prepare_activations and activation_bytes for block formats.
struct MatmulOps {
    size_t (*quantized_bytes)(int64_t n_cols, int64_t n_tokens);
    void (*quantize)(const float* x, int64_t x_stride, int64_t n_cols, int64_t n_tokens,
                     int64_t begin, int64_t end, std::byte* prepared);
    size_t (*scratch_bytes)(const Weight& w, int64_t n_tokens);
    void (*rows)(const Weight& w, int64_t row_begin, int64_t row_end, const std::byte* prepared,
                 int64_t n_tokens, float* y, int64_t y_stride, std::byte* scratch);
    void (*listed)(const Weight& w, const int32_t* list, int64_t n_rows, const std::byte* prepared,
                   int64_t n_tokens, float* y, int64_t y_stride);
    int64_t (*column_group)(Type weight_type);
    void (*groups)(const Weight& w, int64_t row_begin, int64_t row_end, const int32_t* groups,
                   int64_t n_groups, const std::byte* prepared, int64_t n_tokens, float* y,
                   int64_t y_stride);
};

// nullptr when this build has no kernels of that level.
const MatmulOps* matmul_ops_for(Isa isa);

namespace portable {
extern const MatmulOps matmul_ops;
}
namespace avx2 {
extern const MatmulOps matmul_ops;
}
namespace avx512 {
extern const MatmulOps matmul_ops;
}
namespace neon {
extern const MatmulOps matmul_ops;
}

}  // namespace qi::kernels
