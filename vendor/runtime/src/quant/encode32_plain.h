// Floats to blocks of 32, Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, plain and exact: the reference that
// encode32_impl.h is compared with. For the portable level, whose level_portable.h was included
// before.
#pragma once

#include <algorithm>
#include <cmath>

#include "quant/blocks.h"

namespace qi::codecs::QI_CODEC_LEVEL {

namespace {

inline void pack_nibbles(const uint8_t (&codes)[32], uint8_t (&qs)[16]) {
    for (int i = 0; i < 16; i++)
        qs[i] = uint8_t((codes[i] & 15) | (codes[i + 16] & 15) << 4);
}

inline void pack_high_bits(const uint8_t (&codes)[32], uint8_t (&qh)[4]) {
    for (int byte = 0; byte < 4; byte++) {
        qh[byte] = 0;
        for (int bit = 0; bit < 8; bit++)
            qh[byte] = uint8_t(qh[byte] | (codes[8 * byte + bit] >> 4) << bit);
    }
}

// The signed value of largest magnitude, the first one on ties.
inline float extreme(const float* x) {
    float found = x[0];
    for (int i = 1; i < 32; i++) {
        if (std::fabs(x[i]) > std::fabs(found)) found = x[i];
    }
    return found;
}

// Truncates into [0, max_code]. A value that is not finite comes from a scale whose inverse
// overflows, or a range that does: f16 holds neither scale, so the code carries nothing and is 0.
inline uint8_t to_code(float value, int max_code) {
    return std::isfinite(value) ? uint8_t(std::min(int(value), max_code)) : uint8_t(0);
}

inline float inverse(float d) {
    return d == 0.0f ? 0.0f : 1.0f / d;
}

// Q4_0 and Q5_0: the extreme value takes the code 0, zero takes `zero_code`. Returns the scale.
inline float encode_symmetric(const float* x, int zero_code, uint8_t (&codes)[32]) {
    const float d = extreme(x) / float(-zero_code);
    const float scale = inverse(d);
    for (int i = 0; i < 32; i++)
        codes[i] = to_code(x[i] * scale + (float(zero_code) + 0.5f), 2 * zero_code - 1);
    return d;
}

struct Range {
    float d;
    float min;
};

// Q4_1 and Q5_1: the minimum takes the code 0, the maximum `max_code`.
inline Range encode_range(const float* x, int max_code, uint8_t (&codes)[32]) {
    const auto [min, max] = std::minmax_element(x, x + 32);
    const float d = (*max - *min) / float(max_code);
    const float scale = inverse(d);
    for (int i = 0; i < 32; i++)
        codes[i] = to_code((x[i] - *min) * scale + 0.5f, max_code);
    return {d, *min};
}

inline void encode_block(const float* x, BlockQ4_0& block) {
    uint8_t codes[32];
    block.d = f32_to_f16(encode_symmetric(x, 8, codes));
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ4_1& block) {
    uint8_t codes[32];
    const Range range = encode_range(x, 15, codes);
    block.d = f32_to_f16(range.d);
    block.m = f32_to_f16(range.min);
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ5_0& block) {
    uint8_t codes[32];
    block.d = f32_to_f16(encode_symmetric(x, 16, codes));
    pack_high_bits(codes, block.qh);
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ5_1& block) {
    uint8_t codes[32];
    const Range range = encode_range(x, 31, codes);
    block.d = f32_to_f16(range.d);
    block.m = f32_to_f16(range.min);
    pack_high_bits(codes, block.qh);
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ8_0& block) {
    const float d = std::fabs(extreme(x)) / 127.0f;
    const float scale = inverse(d);
    block.d = f32_to_f16(d);
    for (int i = 0; i < 32; i++) {
        const float rounded = std::round(x[i] * scale);  // halves away from zero
        block.qs[i] = std::isfinite(rounded) ? int8_t(rounded) : int8_t(0);
    }
}

}  // namespace

}  // namespace qi::codecs::QI_CODEC_LEVEL
