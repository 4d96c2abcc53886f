// One block to floats, one overload per block format, plain and exact; for the level whose
// level_*.h was included before. kernels/widen_impl.h has the formats again, in registers, and
// changes with this.
#pragma once

#include "quant/blocks.h"

namespace qi::codecs::QI_CODEC_LEVEL {

namespace {

inline uint32_t load_bits(const uint8_t (&qh)[4]) {
    return uint32_t(qh[0]) | uint32_t(qh[1]) << 8 | uint32_t(qh[2]) << 16 | uint32_t(qh[3]) << 24;
}

// The loops below run over one half or one group at a time, with one shift, so that compilers turn
// them into vectors.

// out[i] = d · (code + offset) + m, the codes out of nibbles.
inline void decode_nibbles(const uint8_t (&qs)[16], float d, int offset, float m, float* out) {
    for (int i = 0; i < 16; i++)
        out[i] = d * float((qs[i] & 15) + offset) + m;
    for (int i = 0; i < 16; i++)
        out[16 + i] = d * float((qs[i] >> 4) + offset) + m;
}

// The same with fifth bits.
inline void decode_five_bits(const uint8_t (&qs)[16], const uint8_t (&qh)[4], float d, int offset,
                             float m, float* out) {
    const uint32_t high = load_bits(qh);
    for (int i = 0; i < 16; i++)
        out[i] = d * float(((qs[i] & 15) | int(high >> i & 1) << 4) + offset) + m;
    for (int i = 0; i < 16; i++)
        out[16 + i] = d * float(((qs[i] >> 4) | int(high >> (16 + i) & 1) << 4) + offset) + m;
}

inline void decode_block(const BlockQ4_0& block, float* out) {
    decode_nibbles(block.qs, f16_to_f32(block.d), -8, -0.0f, out);
}

inline void decode_block(const BlockQ4_1& block, float* out) {
    decode_nibbles(block.qs, f16_to_f32(block.d), 0, f16_to_f32(block.m), out);
}

inline void decode_block(const BlockQ5_0& block, float* out) {
    decode_five_bits(block.qs, block.qh, f16_to_f32(block.d), -16, -0.0f, out);
}

inline void decode_block(const BlockQ5_1& block, float* out) {
    decode_five_bits(block.qs, block.qh, f16_to_f32(block.d), 0, f16_to_f32(block.m), out);
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

inline void decode_block(const BlockQ2_K& block, float* out) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int g = 0; g < 16; g++) {
        const float scale = d * float(block.scales[g] & 15);
        const float min = dmin * float(block.scales[g] >> 4);
        const uint8_t* qs = block.qs + g / 8 * 32 + g % 2 * 16;
        const int shift = g / 2 % 4 * 2;
        for (int i = 0; i < 16; i++)
            out[16 * g + i] = scale * float(qs[i] >> shift & 3) - min;
    }
}

inline void decode_block(const BlockQ3_K& block, float* out) {
    const float d = f16_to_f32(block.d);
    for (int g = 0; g < 16; g++) {
        const float scale = d * float(unpack_q3_k_scale(block.scales, g));
        const uint8_t* qs = block.qs + g / 8 * 32 + g % 2 * 16;
        const uint8_t* hmask = block.hmask + g % 2 * 16;
        const int shift = g / 2 % 4 * 2, bit = g / 2;
        for (int i = 0; i < 16; i++) {
            const int code = (qs[i] >> shift & 3) | (hmask[i] >> bit & 1) << 2;
            out[16 * g + i] = scale * float(code - 4);
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
    for (int g = 0; g < 16; g++) {
        const int quarter = g / 2 % 4;
        const float scale = d * float(block.scales[g]);
        const uint8_t* ql = block.ql + g / 8 * 64 + quarter % 2 * 32 + g % 2 * 16;
        const uint8_t* qh = block.qh + g / 8 * 32 + g % 2 * 16;
        const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
        for (int i = 0; i < 16; i++) {
            const int code = (ql[i] >> low_shift & 15) | (qh[i] >> high_shift & 3) << 4;
            out[16 * g + i] = scale * float(code - 32);
        }
    }
}

}  // namespace

}  // namespace qi::codecs::QI_CODEC_LEVEL
