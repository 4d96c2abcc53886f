// The block formats as they lie in a file: integer codes that share a scale.
#pragma once

#include <cstdint>

#include "quant/half.h"

namespace qi {

// Blocks of 32. In the 4- and 5-bit formats byte i of qs holds element i (low nibble) and element i
// + 16 (high nibble); bit i of qh is the fifth bit of element i.

struct BlockQ4_0 {  // d · (q - 8)
    f16_bits d;
    uint8_t qs[16];
};

struct BlockQ4_1 {  // d · q + m
    f16_bits d;
    f16_bits m;
    uint8_t qs[16];
};

struct BlockQ5_0 {  // d · (q - 16)
    f16_bits d;
    uint8_t qh[4];
    uint8_t qs[16];
};

struct BlockQ5_1 {  // d · q + m
    f16_bits d;
    f16_bits m;
    uint8_t qh[4];
    uint8_t qs[16];
};

struct BlockQ8_0 {  // d · q
    f16_bits d;
    int8_t qs[32];
};

// Blocks of 256, cut into groups of 16 or 32 whose small integer scales are multiplied by the
// block's d and dmin.

// Groups of 16: d · (scales[g] & 15) · q - dmin · (scales[g] >> 4). Each run of 32 bytes of qs
// holds 128 elements, 32 at each of the shifts 0, 2, 4, 6.
struct BlockQ2_K {
    uint8_t scales[16];
    uint8_t qs[64];
    f16_bits d;
    f16_bits dmin;
};

// Groups of 16: d · (scale[g] - 32) · (q - 4), q of 3 bits: two in qs as in Q2_K, the high one in
// hmask, whose bit k of byte l belongs to element 32·k + l. scales packs sixteen 6-bit scales: low
// nibbles in bytes 0-7 (groups 0-7 low half, 8-15 high half), high pairs in bytes 8-11 at shift
// 2·(g / 4).
struct BlockQ3_K {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    f16_bits d;
};

// Groups of 32: d · scale[g] · q - dmin · min[g]. Each run of 32 bytes of qs holds two groups: low
// nibbles, then high nibbles. scales packs eight 6-bit scales and eight 6-bit minima: groups 0-3 in
// the low 6 bits of bytes 0-3 and 4-7, groups 4-7 as nibbles of bytes 8-11 (scale low, minimum
// high) with two high bits atop bytes 0-3 and 4-7.
struct BlockQ4_K {
    f16_bits d;
    f16_bits dmin;
    uint8_t scales[12];
    uint8_t qs[128];
};

// As Q4_K with a fifth bit: bit g of qh[l] belongs to element l of group g.
struct BlockQ5_K {
    f16_bits d;
    f16_bits dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};

// Groups of 16: d · scales[g] · (q - 32), q of 6 bits. Each half of 128 elements has 64 bytes of ql
// and 32 of qh; for l in 0..31 the elements l, l + 32, l + 64, l + 96 take the low nibbles of ql[l]
// and ql[l + 32], then their high nibbles, and two high bits from qh[l] at the shifts 0, 2, 4, 6.
struct BlockQ6_K {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    f16_bits d;
};

static_assert(sizeof(BlockQ4_0) == 18 && alignof(BlockQ4_0) == 2);
static_assert(sizeof(BlockQ4_1) == 20 && alignof(BlockQ4_1) == 2);
static_assert(sizeof(BlockQ5_0) == 22 && alignof(BlockQ5_0) == 2);
static_assert(sizeof(BlockQ5_1) == 24 && alignof(BlockQ5_1) == 2);
static_assert(sizeof(BlockQ8_0) == 34 && alignof(BlockQ8_0) == 2);
static_assert(sizeof(BlockQ2_K) == 84 && alignof(BlockQ2_K) == 2);
static_assert(sizeof(BlockQ3_K) == 110 && alignof(BlockQ3_K) == 2);
static_assert(sizeof(BlockQ4_K) == 144 && alignof(BlockQ4_K) == 2);
static_assert(sizeof(BlockQ5_K) == 176 && alignof(BlockQ5_K) == 2);
static_assert(sizeof(BlockQ6_K) == 210 && alignof(BlockQ6_K) == 2);

}  // namespace qi
