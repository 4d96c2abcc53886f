// One block to floats, one overload per block format: plain and exact.
#pragma once

#include "quant/blocks.h"

namespace qi {

namespace {

inline uint32_t load_bits(const uint8_t (&qh)[4]) {
    return uint32_t(qh[0]) | uint32_t(qh[1]) << 8 | uint32_t(qh[2]) << 16 | uint32_t(qh[3]) << 24;
}

// Codes of elements 0-31 out of nibbles and, for 5-bit formats, a word of fifth bits.
inline void unpack(const uint8_t (&qs)[16], uint32_t high_bits, int (&codes)[32]) {
    for (int i = 0; i < 16; i++) {
        codes[i] = (qs[i] & 15) | int(high_bits >> i & 1) << 4;
        codes[i + 16] = (qs[i] >> 4) | int(high_bits >> (i + 16) & 1) << 4;
    }
}

inline void decode_block(const BlockQ4_0& block, float* out) {
    const float d = f16_to_f32(block.d);
    int codes[32];
    unpack(block.qs, 0, codes);
    for (int i = 0; i < 32; i++)
        out[i] = d * float(codes[i] - 8);
}

inline void decode_block(const BlockQ4_1& block, float* out) {
    const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
    int codes[32];
    unpack(block.qs, 0, codes);
    for (int i = 0; i < 32; i++)
        out[i] = d * float(codes[i]) + m;
}

inline void decode_block(const BlockQ5_0& block, float* out) {
    const float d = f16_to_f32(block.d);
    int codes[32];
    unpack(block.qs, load_bits(block.qh), codes);
    for (int i = 0; i < 32; i++)
        out[i] = d * float(codes[i] - 16);
}

inline void decode_block(const BlockQ5_1& block, float* out) {
    const float d = f16_to_f32(block.d), m = f16_to_f32(block.m);
    int codes[32];
    unpack(block.qs, load_bits(block.qh), codes);
    for (int i = 0; i < 32; i++)
        out[i] = d * float(codes[i]) + m;
}

inline void decode_block(const BlockQ8_0& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int i = 0; i < 32; i++)
        out[i] = d * float(block.qs[i]);
}

struct ScaleMin {
    int scale;
    int min;
};

// Scale and minimum of group g in [0, 8) out of the 12 bytes that Q4_K and Q5_K share.
inline ScaleMin unpack_scale_min(const uint8_t (&scales)[12], int g) {
    if (g < 4) return {scales[g] & 63, scales[g + 4] & 63};
    const int low = scales[g + 4];
    return {(low & 15) | (scales[g - 4] >> 6) << 4, (low >> 4) | (scales[g] >> 6) << 4};
}

// Scale of group g in [0, 16) out of the 12 bytes of Q3_K, offset removed.
inline int unpack_q3_k_scale(const uint8_t (&scales)[12], int g) {
    const int low = g < 8 ? scales[g] & 15 : scales[g - 8] >> 4;
    const int high = scales[8 + g % 4] >> (2 * (g / 4)) & 3;
    return (low | high << 4) - 32;
}

// Two bits of element i in the order that Q2_K and Q3_K share.
inline int two_bits(const uint8_t (&qs)[64], int i) {
    return qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
}

inline void decode_block(const BlockQ2_K& block, float* out) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int g = 0; g < 16; g++) {
        const float scale = d * float(block.scales[g] & 15);
        const float min = dmin * float(block.scales[g] >> 4);
        for (int i = 16 * g; i < 16 * g + 16; i++)
            out[i] = scale * float(two_bits(block.qs, i)) - min;
    }
}

inline void decode_block(const BlockQ3_K& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int g = 0; g < 16; g++) {
        const float scale = d * float(unpack_q3_k_scale(block.scales, g));
        for (int i = 16 * g; i < 16 * g + 16; i++) {
            const int high = block.hmask[i % 32] >> (i / 32) & 1;
            out[i] = scale * float((two_bits(block.qs, i) | high << 2) - 4);
        }
    }
}

inline void decode_block(const BlockQ4_K& block, float* out) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int g = 0; g < 8; g++) {
        const ScaleMin packed = unpack_scale_min(block.scales, g);
        const float scale = d * float(packed.scale), min = dmin * float(packed.min);
        const uint8_t* qs = block.qs + g / 2 * 32;
        for (int i = 0; i < 32; i++)
            out[32 * g + i] = scale * float(qs[i] >> (g % 2 * 4) & 15) - min;
    }
}

inline void decode_block(const BlockQ5_K& block, float* out) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int g = 0; g < 8; g++) {
        const ScaleMin packed = unpack_scale_min(block.scales, g);
        const float scale = d * float(packed.scale), min = dmin * float(packed.min);
        const uint8_t* qs = block.qs + g / 2 * 32;
        for (int i = 0; i < 32; i++) {
            const int code = (qs[i] >> (g % 2 * 4) & 15) | (block.qh[i] >> g & 1) << 4;
            out[32 * g + i] = scale * float(code) - min;
        }
    }
}

inline void decode_block(const BlockQ6_K& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int half = 0; half < 2; half++) {
        const uint8_t* ql = block.ql + 64 * half;
        const uint8_t* qh = block.qh + 32 * half;
        const int8_t* scales = block.scales + 8 * half;
        for (int quarter = 0; quarter < 4; quarter++) {
            for (int l = 0; l < 32; l++) {
                const int low = ql[l + quarter % 2 * 32] >> (quarter / 2 * 4) & 15;
                const int code = low | (qh[l] >> (2 * quarter) & 3) << 4;
                const float scale = d * float(scales[2 * quarter + l / 16]);
                out[128 * half + 32 * quarter + l] = scale * float(code - 32);
            }
        }
    }
}

}  // namespace

}  // namespace qi
