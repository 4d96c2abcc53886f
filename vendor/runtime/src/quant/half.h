// IEEE half and bfloat16 as raw bits, converted in software. Without linkage: kernels for different
// instruction sets include this, and must not be linked with each other's copies.
#pragma once

#include <cstdint>

namespace qi {

using f16_bits = uint16_t;
using bf16_bits = uint16_t;

static inline float f16_to_f32(f16_bits h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u)  // infinity, NaN
        return __builtin_bit_cast(float, sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x0400u)  // normal: rebias the exponent by 127 - 15
        return __builtin_bit_cast(float, sign | ((magnitude << 13) + (112u << 23)));
    // Subnormal: magnitude * 2^-24, exact in float.
    return __builtin_bit_cast(float,
                              sign | __builtin_bit_cast(uint32_t, float(magnitude) * 0x1p-24f));
}

// Rounds to nearest even; overflow gives infinity, NaN stays NaN.
static inline f16_bits f32_to_f16(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 2^16 or more
    if (magnitude < 0x38800000u) {
        // Subnormal half: adding 0.5 lines its last bit up with float's, so the hardware rounds for
        // us.
        const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
        return uint16_t(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
}

static inline float bf16_to_f32(bf16_bits b) {
    return __builtin_bit_cast(float, uint32_t(b) << 16);
}

// Rounds to nearest even; NaN stays NaN (quiet).
static inline bf16_bits f32_to_bf16(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace qi
