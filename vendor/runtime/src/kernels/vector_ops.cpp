// Vector operators: picks the instruction set once and forwards.
#include "kernels/vector_ops.h"

#include "kernels/vector_ops_table.h"

namespace qi::kernels {

const VectorOps* vector_ops_for(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return &portable::vector_ops;
#if defined(__x86_64__)
        case Isa::avx2:
            return &avx2::vector_ops;
        case Isa::avx512:
            return &avx512::vector_ops;
#elif defined(__aarch64__)
        case Isa::neon:
            return &neon::vector_ops;
#endif
        default:
            return nullptr;
    }
}

namespace {

const VectorOps& active() {
    static const VectorOps& table = *vector_ops_for(active_isa());
    return table;
}

}  // namespace

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
    active().rms_norm(x, weight, epsilon, n, out);
}

void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t n,
                float* out) {
    active().layer_norm(x, weight, bias, epsilon, n, out);
}

void activate(Activation act, float threshold, float* h, int64_t n) {
    active().activate(act, threshold, h, n);
}

void activate_mul(Activation act, float threshold, float* gate, const float* up, int64_t n) {
    active().activate_mul(act, threshold, gate, up, n);
}

void relu_relu_mul(float* gate, const float* up, int64_t n) {
    active().relu_relu_mul(gate, up, n);
}

void add(const float* a, const float* b, int64_t n, float* out) {
    active().add(a, b, n, out);
}

void rope(float* head, const float* cos_sin, int64_t n_rot, bool neox) {
    active().rope(head, cos_sin, n_rot, neox);
}

void max_and_sum_exp(const float* x, int64_t n, float* max, double* sum_exp) {
    active().max_and_sum_exp(x, n, max, sum_exp);
}

}  // namespace qi::kernels
