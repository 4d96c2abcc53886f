// The vector operators of every instruction set, for dispatch and for tests.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "kernels/vector_ops.h"

namespace qi::kernels {

// One function per function of vector_ops.h.
struct VectorOps {
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* out);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon,
                       int64_t n, float* out);
    void (*activate)(Activation act, float threshold, float* h, int64_t n);
    void (*activate_mul)(Activation act, float threshold, float* gate, const float* up, int64_t n);
    void (*relu_relu_mul)(float* gate, const float* up, int64_t n);
    void (*add)(const float* a, const float* b, int64_t n, float* out);
    void (*rope)(float* head, const float* cos_sin, int64_t n_rot, bool neox);
    void (*max_and_sum_exp)(const float* x, int64_t n, float* max, double* sum_exp);
};

// nullptr when this build has no kernels of that level.
const VectorOps* vector_ops_for(Isa isa);

namespace portable {
extern const VectorOps vector_ops;
}
namespace avx2 {
extern const VectorOps vector_ops;
}
namespace avx512 {
extern const VectorOps vector_ops;
}
namespace neon {
extern const VectorOps vector_ops;
}

}  // namespace qi::kernels
