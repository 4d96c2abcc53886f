// Functions of a Vec, for the level whose simd_*.h was included before.
#pragma once

namespace qi::kernels::QI_SIMD_LEVEL {

// e^x within 2 ulp; 0 below -103.97, infinity above 88.72, NaN stays NaN.
inline Vec exp(Vec x) {
    // Beyond these bounds the result no longer changes, and the power of two stays in range.
    x = min(broadcast(89.0f), max(broadcast(-104.0f), x));
    const Vec n = round(x * broadcast(0x1.715476p+0f));
    // ln 2 in two parts; the first has trailing zeros, so that its product with n is exact.
    Vec r = fma(n, broadcast(-0x1.62e4p-1f), x);
    r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
    // Minimax polynomial for (e^r - 1 - r) / r² on [-ln2/2, ln2/2], 3e-9 of e^r.
    Vec p = broadcast(0x1.6a2352p-10f);
    p = fma(p, r, broadcast(0x1.123a6cp-7f));
    p = fma(p, r, broadcast(0x1.5558f4p-5f));
    p = fma(p, r, broadcast(0x1.555490p-3f));
    p = fma(p, r, broadcast(0x1.fffffcp-2f));
    p = fma(r * r, p, r) + broadcast(1.0f);
    return scale_by_power(p, n);
}

// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) {
    const Vec one = broadcast(1.0f);
    return one / (one + exp(-x));
}

// The normal distribution function, (1 + erf(x/√2)) / 2, without cancellation for negative x.
inline Vec normal_cdf(Vec x) {
    // The lower tail is e^(-a²/2) · P(u) / (a + 3), a = |x|, with a smooth P; beyond 15 it is 0.
    const Vec a = min(broadcast(15.0f), abs(x));
    const Vec r = broadcast(1.0f) / (a + broadcast(3.0f));
    const Vec u = (a - broadcast(3.0f)) * r;
    // Minimax polynomial in relative error, 2e-8.
    Vec p = broadcast(0x1.c949c2p-15f);
    p = fma(p, u, broadcast(-0x1.a22752p-13f));
    p = fma(p, u, broadcast(-0x1.f09e10p-11f));
    p = fma(p, u, broadcast(0x1.09af82p-10f));
    p = fma(p, u, broadcast(0x1.c69d1ep-8f));
    p = fma(p, u, broadcast(-0x1.56cd94p-7f));
    p = fma(p, u, broadcast(-0x1.832340p-5f));
    p = fma(p, u, broadcast(0x1.d7137cp-3f));
    p = fma(p, u, broadcast(-0x1.04c730p-1f));
    p = fma(p, u, broadcast(0x1.754a76p-1f));
    // The square's rounding error would be magnified by the exponential; FMA recovers it.
    const Vec square = a * a;
    const Vec error = fma(a, a, -square);
    Vec e = exp(square * broadcast(-0.5f));
    e = fma(e, error * broadcast(-0.5f), e);
    const Vec tail = e * (p * r);
    return select(less_equal(x, broadcast(0.0f)), tail, broadcast(1.0f) - tail);
}

}  // namespace qi::kernels::QI_SIMD_LEVEL
