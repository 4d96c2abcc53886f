// Four floats in one NEON register; simd_portable.h says what each operation promises.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#define QI_SIMD_LEVEL neon

namespace qi::kernels::neon {

using Vec = float32x4_t;
using Mask = uint32x4_t;
inline constexpr int width = 4;
using IntLanes [[gnu::vector_size(4 * width)]] = int32_t;
inline constexpr int n_registers = 32;

inline Vec broadcast(float x) {
    return vdupq_n_f32(x);
}
inline Mask first_lanes(int64_t n) {
    const uint32x4_t lane = {0, 1, 2, 3};
    return vcgtq_u32(vdupq_n_u32(uint32_t(n)), lane);
}

inline Vec load(const float* p) {
    return vld1q_f32(p);
}
inline Vec load_partial(const float* p, int64_t n) {
    float lanes[width] = {};
    __builtin_memcpy(lanes, p, size_t(n) * sizeof(float));
    return load(lanes);
}
inline void store(float* p, Vec v) {
    vst1q_f32(p, v);
}
inline void store_partial(float* p, Vec v, int64_t n) {
    float lanes[width];
    store(lanes, v);
    __builtin_memcpy(p, lanes, size_t(n) * sizeof(float));
}

inline Vec load_f16(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline Vec load_f16_partial(const uint16_t* p, int64_t n) {
    uint16_t lanes[width] = {};
    __builtin_memcpy(lanes, p, size_t(n) * sizeof(uint16_t));
    return load_f16(lanes);
}
inline Vec broadcast_f16(uint16_t bits) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)));
}
inline void store_f16(uint16_t* p, Vec v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
inline Vec load_i8(const int8_t* p) {
    uint32_t codes;
    __builtin_memcpy(&codes, p, sizeof codes);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(codes)))));
}
inline IntLanes load_u8(const uint8_t* p) {
    uint32_t codes;
    __builtin_memcpy(&codes, p, sizeof codes);
    return IntLanes(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(codes)))));
}
inline Vec low_nibbles(IntLanes codes, int offset) {
    return vcvtq_f32_s32(int32x4_t((codes & 15) - offset));
}

inline Vec fma(Vec a, Vec b, Vec c) {
    return vfmaq_f32(c, a, b);
}
inline Vec max(Vec a, Vec b) {
    return vmaxq_f32(a, b);
}
inline Vec min(Vec a, Vec b) {
    return vminq_f32(a, b);
}
inline Vec abs(Vec v) {
    return vabsq_f32(v);
}
inline Mask less_equal(Vec a, Vec b) {
    return vcleq_f32(a, b);
}
inline Vec select(Mask m, Vec a, Vec b) {
    return vbslq_f32(m, a, b);
}
inline Vec round(Vec v) {
    return vrndnq_f32(v);
}
inline Vec power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline Vec scale_by_power(Vec v, Vec n) {
    // In two steps, so that results may be subnormal or infinite.
    const int32x4_t whole = vcvtq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(whole, 1);
    return v * power_of_two(half) * power_of_two(vsubq_s32(whole, half));
}

inline float sum(Vec v) {
    const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline Vec sums(const Vec (&v)[width]) {
    return Vec{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
}
inline float max_lane(Vec v) {
    return vmaxvq_f32(v);
}

inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
    even = vuzp1q_f32(low, high);
    odd = vuzp2q_f32(low, high);
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
    low = vzip1q_f32(even, odd);
    high = vzip2q_f32(even, odd);
}

}  // namespace qi::kernels::neon
