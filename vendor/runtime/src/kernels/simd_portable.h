// Four floats in a compiler vector, for any processor; and what every simd_*.h offers.
//
// A level has Vec (`width` floats with the operators + - * /), Mask, `n_registers`, and the
// functions below. A kernel written over them includes one simd_*.h and puts itself into namespace
// QI_SIMD_LEVEL, so that no function compiled for one level can be linked in place of another's;
// hence also no std:: templates and no shared inline functions there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/half.h"

#define QI_SIMD_LEVEL portable

namespace qi::kernels::portable {

using Vec [[gnu::vector_size(16)]] = float;
using Mask [[gnu::vector_size(16)]] = int32_t;
using Bits [[gnu::vector_size(16)]] = uint32_t;
inline constexpr int width = 4;
using IntLanes = Mask;  // integers, with the operators of the compiler's vectors
inline constexpr int n_registers = 16;

inline Vec broadcast(float x) {
    return Vec{x, x, x, x};
}
// Lanes 0 to n-1; 0 <= n <= width here and below.
inline Mask first_lanes(int64_t n) {
    const int32_t count = int32_t(n);
    return Mask{0, 1, 2, 3} < Mask{count, count, count, count};
}

inline Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
// The first n lanes from memory, the others zero; touches n elements only.
inline Vec load_partial(const float* p, int64_t n) {
    Vec v = {};
    __builtin_memcpy(&v, p, size_t(n) * sizeof(float));
    return v;
}
inline void store(float* p, Vec v) {
    __builtin_memcpy(p, &v, sizeof v);
}
inline void store_partial(float* p, Vec v, int64_t n) {
    __builtin_memcpy(p, &v, size_t(n) * sizeof(float));
}

// IEEE halves; exact.
inline Vec load_f16(const uint16_t* p) {
    const Bits half = {p[0], p[1], p[2], p[3]};
    const Bits magnitude = half & 0x7fffu;
    const Bits shifted = magnitude << 13;
    const Vec subnormal = __builtin_convertvector(Mask(magnitude), Vec) * 0x1p-24f;
    const Bits normal = shifted + (112u << 23);  // the exponent's bias goes from 15 to 127
    Bits bits = Bits(magnitude < 0x0400u) ? Bits(subnormal) : normal;
    bits = Bits(magnitude < 0x7c00u) ? bits : shifted | 0x7f800000u;
    return Vec(bits | (half & 0x8000u) << 16);
}
inline Vec load_f16_partial(const uint16_t* p, int64_t n) {
    uint16_t lanes[width] = {};
    __builtin_memcpy(lanes, p, size_t(n) * sizeof(uint16_t));
    return load_f16(lanes);
}
inline Vec broadcast_f16(uint16_t bits) {
    return broadcast(f16_to_f32(bits));
}
// Rounds to nearest even.
inline void store_f16(uint16_t* p, Vec v) {
    for (int i = 0; i < width; ++i)
        p[i] = f32_to_f16(v[i]);
}
inline Vec load_i8(const int8_t* p) {
    return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
inline IntLanes load_u8(const uint8_t* p) {
    return IntLanes{p[0], p[1], p[2], p[3]};
}
// The lowest four bits, less an offset.
inline Vec low_nibbles(IntLanes codes, int offset) {
    return __builtin_convertvector((codes & 15) - offset, Vec);
}

// a * b + c; rounded once where the processor can.
inline Vec fma(Vec a, Vec b, Vec c) {
    return a * b + c;
}
// A NaN in b is kept; whether one in a is depends on the level.
inline Vec max(Vec a, Vec b) {
    return a > b ? a : b;
}
inline Vec min(Vec a, Vec b) {
    return a < b ? a : b;
}
inline Vec abs(Vec v) {
    return Vec(Bits(v) & 0x7fffffffu);
}
inline Mask less_equal(Vec a, Vec b) {
    return a <= b;
}
// a where m is set, else b.
inline Vec select(Mask m, Vec a, Vec b) {
    return m ? a : b;
}
// To the nearest integer, ties to even, for |v| < 2^22.
inline Vec round(Vec v) {
    const Vec shift = broadcast(0x1.8p23f);  // lines the units up with float's last bit
    return v + shift - shift;
}
inline Vec power_of_two(Bits n) {
    return Vec((n + 127u) << 23);
}
// v * 2^n for whole n in [-252, 254], rounded once; v's magnitude is in [0.5, 2] or it is NaN.
inline Vec scale_by_power(Vec v, Vec n) {
    // In two steps, so that results may be subnormal or infinite.
    const Mask whole = __builtin_convertvector(n, Mask);
    const Mask half = whole >> 1;
    return v * power_of_two(Bits(half)) * power_of_two(Bits(whole) - Bits(half));
}

// Over all lanes, in a fixed order.
inline float sum(Vec v) {
    return (v[0] + v[2]) + (v[1] + v[3]);
}
// Lane i has sum(v[i]).
inline Vec sums(const Vec (&v)[width]) {
    return Vec{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
}
inline float max_lane(Vec v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}

// Pairs to and from their first and second members: low, high = e0 o0 e1 o1 ...
inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
    even = Vec{low[0], low[2], high[0], high[2]};
    odd = Vec{low[1], low[3], high[1], high[3]};
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
    low = Vec{even[0], odd[0], even[1], odd[1]};
    high = Vec{even[2], odd[2], even[3], odd[3]};
}

}  // namespace qi::kernels::portable
