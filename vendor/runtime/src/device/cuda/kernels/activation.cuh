// Activation functions, as kernels/vector_ops.h defines them.
#pragma once

#include "prelude.cuh"

// The numbers that launch.cpp passes.
enum Activation { act_silu, act_relu, act_gelu_erf, act_gelu_tanh, act_fatrelu, act_relu_relu };

QI_DEVICE f32 sigmoid(f32 x) {
    return 1.0f / (1.0f + expf(-x));
}

// The normal distribution function, without cancellation for negative x: the polynomial of
// kernels/simd_math.h.
QI_DEVICE f32 normal_cdf(f32 x) {
    const f32 a = fminf(15.0f, fabsf(x));
    const f32 r = 1.0f / (a + 3.0f), u = mul(a - 3.0f, r);
    constexpr f32 factors[] = {-0x1.a22752p-13f, -0x1.f09e10p-11f, 0x1.09af82p-10f,
                               0x1.c69d1ep-8f,   -0x1.56cd94p-7f,  -0x1.832340p-5f,
                               0x1.d7137cp-3f,   -0x1.04c730p-1f,  0x1.754a76p-1f};
    f32 p = 0x1.c949c2p-15f;
#pragma unroll
    for (int i = 0; i < 9; ++i)
        p = fmaf(p, u, factors[i]);
    // The square's rounding error would be magnified by the exponential.
    const f32 square = mul(a, a), error = fmaf(a, a, -square);
    f32 e = expf(square * -0.5f);
    e = fmaf(e, error * -0.5f, e);
    const f32 tail = mul(e, mul(p, r));
    // NaN is lost in fminf, and comes back in the product with x.
    return x <= 0.0f ? tail : 1.0f - tail;
}

// 0 at or below the threshold; NaN stays NaN.
QI_DEVICE f32 fatrelu(f32 x, f32 threshold) {
    return x <= threshold ? 0.0f : x;
}

QI_DEVICE f32 activate(int act, f32 threshold, f32 x) {
    switch (act) {
        case act_silu:
            return x * sigmoid(x);
        case act_gelu_erf:
            return x * normal_cdf(x);
        case act_gelu_tanh:
            // x/2 · (1 + tanh(u)) = x · sigmoid(2u)
            return x * sigmoid(x * fmaf(x * x, 0.0713548163f, 1.5957691216f));
        case act_fatrelu:
            return fatrelu(x, threshold);
        default:
            return fatrelu(x, 0.0f);
    }
}

QI_DEVICE f32 activate_mul(int act, f32 threshold, f32 gate, f32 up) {
    return activate(act, threshold, gate) * (act == act_relu_relu ? fatrelu(up, 0.0f) : up);
}
