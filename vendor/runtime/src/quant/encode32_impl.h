// Floats to blocks of 32 in vectors, for the level whose level_*.h was included before; gives the
// bytes of encode32_plain.h.
#pragma once

#include "quant/blocks.h"

namespace qi::codecs::QI_CODEC_LEVEL {

namespace {

// A block's values; the vectors hold `width` of them each.
struct Values32 {
    static constexpr int n = 32 / width;
    const float* x;
    Vec parts[n];
    float least, greatest;

    explicit Values32(const float* values) : x(values) {
        for (int k = 0; k < n; k++)
            parts[k] = load(values + width * k);
        Vec low = parts[0], high = parts[0];
        for (int k = 1; k < n; k++) {
            low = min(low, parts[k]);
            high = max(high, parts[k]);
        }
        least = min_lane(low);
        greatest = max_lane(high);
    }

    // The signed value of largest magnitude, the first one on ties.
    float extreme() const {
        if (greatest != -least) return greatest > -least ? greatest : least;
        for (int i = 0; i < 32; i++) {
            if (x[i] == least || x[i] == greatest) return x[i];
        }
        return least;  // not reached: both are among the values
    }

    float magnitude() const { return __builtin_fabsf(greatest > -least ? greatest : least); }

    // Which zero it is decides the sign bits in a file: the first of the least, the last of the
    // greatest, as in the plain encoder.
    void settle_zeros() {
        if (least == 0.0f) {
            int i = 0;
            while (x[i] != 0.0f)
                i++;
            least = x[i];
        }
        if (greatest == 0.0f) {
            int i = 31;
            while (x[i] != 0.0f)
                i--;
            greatest = x[i];
        }
    }
};

inline float inverse(float d) {
    return d == 0.0f ? 0.0f : 1.0f / d;
}

inline bool is_finite(float value) {
    return __builtin_fabsf(value) <= __FLT_MAX__;
}

// Codes at most max_code; all 0 where f16 cannot hold the scale, or the scale has no inverse.
inline void limit(Codes& codes, int max_code, bool sound) {
    const Bytes most = Bytes{} + uint8_t(max_code);
    codes.low = codes.low < most ? codes.low : most;
    codes.high = codes.high < most ? codes.high : most;
    if (!sound) codes = Codes{};
}

// Q4_0 and Q5_0: the extreme value takes the code 0, zero takes `zero_code`. Returns the scale.
inline float encode_symmetric(const float* x, int zero_code, Codes& codes) {
    const Values32 values(x);
    const float d = values.extreme() / float(-zero_code), scale = inverse(d);
    Vec steps[Values32::n];
    for (int k = 0; k < Values32::n; k++)
        steps[k] = values.parts[k] * broadcast(scale) + broadcast(float(zero_code) + 0.5f);
    codes = truncate(steps);
    limit(codes, 2 * zero_code - 1, is_finite(scale));
    return d;
}

struct Range {
    float d;
    float min;
};

// Q4_1 and Q5_1: the minimum takes the code 0, the maximum `max_code`.
inline Range encode_range(const float* x, int max_code, Codes& codes) {
    Values32 values(x);
    values.settle_zeros();
    const float d = (values.greatest - values.least) / float(max_code), scale = inverse(d);
    Vec steps[Values32::n];
    for (int k = 0; k < Values32::n; k++) {
        const Vec above = values.parts[k] - broadcast(values.least);
        steps[k] = above * broadcast(scale) + broadcast(0.5f);
    }
    codes = truncate(steps);
    limit(codes, max_code, is_finite(scale) && is_finite(d));
    return {d, values.least};
}

inline void pack_nibbles(const Codes& codes, uint8_t (&qs)[16]) {
    const Bytes packed = (codes.low & 15) | codes.high << 4;
    __builtin_memcpy(qs, &packed, 16);
}

inline void pack_high_bits(const Codes& codes, uint8_t (&qh)[4]) {
    const uint32_t bits = fifth_bits(codes);
    __builtin_memcpy(qh, &bits, 4);
}

inline void encode_block(const float* x, BlockQ4_0& block) {
    Codes codes;
    block.d = narrow_f16(encode_symmetric(x, 8, codes));
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ4_1& block) {
    Codes codes;
    const Range range = encode_range(x, 15, codes);
    block.d = narrow_f16(range.d);
    block.m = narrow_f16(range.min);
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ5_0& block) {
    Codes codes;
    block.d = narrow_f16(encode_symmetric(x, 16, codes));
    pack_high_bits(codes, block.qh);
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ5_1& block) {
    Codes codes;
    const Range range = encode_range(x, 31, codes);
    block.d = narrow_f16(range.d);
    block.m = narrow_f16(range.min);
    pack_high_bits(codes, block.qh);
    pack_nibbles(codes, block.qs);
}

inline void encode_block(const float* x, BlockQ8_0& block) {
    const Values32 values(x);
    const float d = values.magnitude() / 127.0f, scale = inverse(d);
    // The float below 1/2: with it halves go away from zero, and nothing less than a half does.
    const Vec half = broadcast(0x1.fffffep-2f);
    Vec steps[Values32::n];
    for (int k = 0; k < Values32::n; k++) {
        const Vec scaled = values.parts[k] * broadcast(scale);
        steps[k] = scaled + copysign(half, scaled);
    }
    Codes codes = truncate(steps);
    if (!is_finite(scale)) codes = Codes{};
    block.d = narrow_f16(d);
    __builtin_memcpy(block.qs, &codes.low, 16);
    __builtin_memcpy(block.qs + 16, &codes.high, 16);
}

}  // namespace

}  // namespace qi::codecs::QI_CODEC_LEVEL
