// Elementwise and row-wise float operators, for one thread. Each row's result depends on that row
// alone.
#pragma once

#include <cstdint>

namespace qi::kernels {

// out[i] = x[i] / sqrt(mean(x²) + epsilon) · weight[i]
void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* out);
// out[i] = (x[i] - mean) / sqrt(variance + epsilon) · weight[i] + bias[i]; bias may be nullptr.
void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t n,
                float* out);

enum class Activation : int { silu, relu, gelu_erf, gelu_tanh, fatrelu };

// h[i] = act(h[i]); threshold is fatrelu's (values at or below it become 0).
void activate(Activation act, float threshold, float* h, int64_t n);
// gate[i] = act(gate[i]) · up[i]
void activate_mul(Activation act, float threshold, float* gate, const float* up, int64_t n);
// gate[i] = relu(gate[i]) · relu(up[i])
void relu_relu_mul(float* gate, const float* up, int64_t n);

void add(const float* a, const float* b, int64_t n, float* out);  // out may be a or b

// Rotates the first n_rot values of a head in place. cos_sin: [n_rot/2][2], cosine and sine already
// scaled by the attention factor. neox false rotates pairs (2i, 2i+1), true pairs (i, i + n_rot/2).
void rope(float* head, const float* cos_sin, int64_t n_rot, bool neox);

// Largest value, and Σ exp(x - max): what a log-softmax needs. n >= 1.
void max_and_sum_exp(const float* x, int64_t n, float* max, double* sum_exp);

}  // namespace qi::kernels
