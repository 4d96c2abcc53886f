// What the codecs need of NEON; level_avx2.h says what each function does.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "quant/half.h"

#define QI_CODEC_LEVEL neon

namespace qi::codecs::neon {

inline constexpr int width = 4;
using Vec = float32x4_t;
using Bytes = uint8x16_t;

struct Codes {
    Bytes low, high;
};

inline void widen_f16(const std::byte* halves, float* out) {
    const uint8x8_t bytes = vld1_u8(reinterpret_cast<const uint8_t*>(halves));
    vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u8(bytes)));
}

inline void narrow_f16(const float* values, std::byte* halves) {
    const float16x4_t narrow = vcvt_f16_f32(vld1q_f32(values));
    vst1_u8(reinterpret_cast<uint8_t*>(halves), vreinterpret_u8_f16(narrow));
}
inline f16_bits narrow_f16(float value) {
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0);
}

inline Vec load(const float* p) {
    return vld1q_f32(p);
}
inline Vec broadcast(float x) {
    return vdupq_n_f32(x);
}
inline Vec max(Vec a, Vec b) {
    return vmaxq_f32(a, b);
}
inline Vec min(Vec a, Vec b) {
    return vminq_f32(a, b);
}
inline Vec copysign(Vec a, Vec b) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), b, a);
}
inline float max_lane(Vec v) {
    return vmaxvq_f32(v);
}
inline float min_lane(Vec v) {
    return vminvq_f32(v);
}

inline Bytes truncate_16(const Vec* v) {
    const int16x8_t a =
        vcombine_s16(vmovn_s32(vcvtq_s32_f32(v[0])), vmovn_s32(vcvtq_s32_f32(v[1])));
    const int16x8_t b =
        vcombine_s16(vmovn_s32(vcvtq_s32_f32(v[2])), vmovn_s32(vcvtq_s32_f32(v[3])));
    return vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
}
inline Codes truncate(const Vec (&v)[8]) {
    return {truncate_16(v), truncate_16(v + 4)};
}

inline uint32_t fifth_bits(const Codes& codes) {
    constexpr uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t place = vld1q_u8(places), fifth = vdupq_n_u8(16);
    const uint8x16_t low = vandq_u8(vtstq_u8(codes.low, fifth), place);
    const uint8x16_t high = vandq_u8(vtstq_u8(codes.high, fifth), place);
    return uint32_t(vaddv_u8(vget_low_u8(low))) | uint32_t(vaddv_u8(vget_high_u8(low))) << 8 |
           uint32_t(vaddv_u8(vget_low_u8(high))) << 16 |
           uint32_t(vaddv_u8(vget_high_u8(high))) << 24;
}

}  // namespace qi::codecs::neon
