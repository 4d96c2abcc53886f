// Columns of a weight row as floats, the bits that decode() gives, over a Vec.
//
// Codes are spread to a lane each first: what the formats do with their bits is then the same on
// every instruction set.
#pragma once

#include <cstddef>

#include "kernels/row_sums_layout.h"
#include "quant/blocks.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// Lane i has i + first.
inline IntLanes counted(int first) {
    IntLanes lanes;
    for (int i = 0; i < width; ++i)
        lanes[i] = first + i;
    return lanes;
}
inline Vec to_floats(IntLanes lanes) {
    return Vec(__builtin_convertvector(lanes, Vec));
}
inline Vec times(Vec d, int factor) {
    return d * broadcast(float(factor));
}

// Calls put(column, values) for n columns from `first` on, `width` at a time, of which value(i) has
// those from the i-th on: scale · value, and + minimum.
template <int n, class Value, class Put>
inline void put_scaled(int first, Value value, Vec scale, Put put) {
#pragma GCC unroll 8
    for (int i = 0; i < n; i += width)
        put(first + i, scale * value(i));
}
template <int n, class Value, class Put>
inline void put_scaled(int first, Value value, Vec scale, Vec minimum, Put put) {
#pragma GCC unroll 8
    for (int i = 0; i < n; i += width)
        put(first + i, scale * value(i) + minimum);
}

// ---- blocks of 32 ----

// Columns 0-15 are the low nibbles, 16-31 the high ones, which lie above zeros or above the low
// ones: only four bits count.
inline IntLanes nibbles(const uint8_t (&qs)[16], int column) {
    return column < 16 ? load_u8(qs + column) : load_u8(qs + (column - 16)) >> 4;
}
// 16 where the column's bit of qh is set.
inline IntLanes fifth_bits(const uint8_t (&qh)[4], int column) {
    int32_t bits;
    __builtin_memcpy(&bits, qh, sizeof bits);
    return ((IntLanes{} + bits) >> counted(column) & 1) << 4;
}
template <class Block>
inline IntLanes five_bits(const Block& block, int column) {
    return (nibbles(block.qs, column) & 15) | fifth_bits(block.qh, column);
}

template <class Put>
inline void widen_block(const BlockQ4_0& block, Put put) {
    put_scaled<32>(
        0, [&](int i) { return low_nibbles(nibbles(block.qs, i), 8); }, broadcast_f16(block.d),
        put);
}
template <class Put>
inline void widen_block(const BlockQ4_1& block, Put put) {
    put_scaled<32>(
        0, [&](int i) { return low_nibbles(nibbles(block.qs, i), 0); }, broadcast_f16(block.d),
        broadcast_f16(block.m), put);
}
template <class Put>
inline void widen_block(const BlockQ5_0& block, Put put) {
    put_scaled<32>(
        0, [&](int i) { return to_floats(five_bits(block, i) - 16); }, broadcast_f16(block.d), put);
}
template <class Put>
inline void widen_block(const BlockQ5_1& block, Put put) {
    put_scaled<32>(
        0, [&](int i) { return to_floats(five_bits(block, i)); }, broadcast_f16(block.d),
        broadcast_f16(block.m), put);
}
template <class Put>
inline void widen_block(const BlockQ8_0& block, Put put) {
    put_scaled<32>(
        0, [&](int i) { return load_i8(block.qs + i); }, broadcast_f16(block.d), put);
}

// ---- blocks of 256 ----

template <class Put>
inline void widen_block(const BlockQ2_K& block, Put put) {
    const Vec d = broadcast_f16(block.d), dmin = broadcast_f16(block.dmin);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
        const uint8_t* qs = block.qs + g / 8 * 32 + g % 2 * 16;
        const int shift = g / 2 % 4 * 2;
        put_scaled<16>(
            16 * g, [&](int i) { return to_floats(load_u8(qs + i) >> shift & 3); },
            times(d, block.scales[g] & 15), -times(dmin, block.scales[g] >> 4), put);
    }
}

template <class Put>
inline void widen_block(const BlockQ3_K& block, Put put) {
    const Vec d = broadcast_f16(block.d);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
        const uint8_t* qs = block.qs + g / 8 * 32 + g % 2 * 16;
        const uint8_t* hmask = block.hmask + g % 2 * 16;
        const int shift = g / 2 % 4 * 2, bit = g / 2;
        const int low = g < 8 ? block.scales[g] & 15 : block.scales[g - 8] >> 4;
        const int high = block.scales[8 + g % 4] >> (2 * (g / 4)) & 3;
        put_scaled<16>(
            16 * g,
            [&](int i) {
                const IntLanes third = load_u8(hmask + i) >> bit & 1;
                return to_floats(((load_u8(qs + i) >> shift & 3) | third << 2) - 4);
            },
            times(d, (low | high << 4) - 32), put);
    }
}

// Q4_K's and Q5_K's eight scales and minima out of 12 bytes.
inline void split_six_bits(const uint8_t (&packed)[12], int (&scales)[8], int (&minima)[8]) {
    for (int g = 0; g < 4; ++g) {
        scales[g] = packed[g] & 63;
        minima[g] = packed[g + 4] & 63;
        scales[g + 4] = (packed[g + 8] & 15) | (packed[g] >> 6) << 4;
        minima[g + 4] = (packed[g + 8] >> 4) | (packed[g + 4] >> 6) << 4;
    }
}

// value(g, i): columns from the i-th on of the g-th 32.
template <class Block, class Value, class Put>
inline void put_groups_of_32(const Block& block, Value value, Put put) {
    const Vec d = broadcast_f16(block.d), dmin = broadcast_f16(block.dmin);
    int scales[8], minima[8];
    split_six_bits(block.scales, scales, minima);
#pragma GCC unroll 8
    for (int g = 0; g < 8; ++g)
        put_scaled<32>(
            32 * g, [&](int i) { return value(g, i); }, times(d, scales[g]),
            -times(dmin, minima[g]), put);
}
inline IntLanes nibbles_of_group(const uint8_t (&qs)[128], int g, int i) {
    return load_u8(qs + g / 2 * 32 + i) >> g % 2 * 4;
}

template <class Put>
inline void widen_block(const BlockQ4_K& block, Put put) {
    put_groups_of_32(
        block, [&](int g, int i) { return low_nibbles(nibbles_of_group(block.qs, g, i), 0); }, put);
}
template <class Put>
inline void widen_block(const BlockQ5_K& block, Put put) {
    put_groups_of_32(
        block,
        [&](int g, int i) {
            const IntLanes fifth = (load_u8(block.qh + i) >> g & 1) << 4;
            return to_floats((nibbles_of_group(block.qs, g, i) & 15) | fifth);
        },
        put);
}

template <class Put>
inline void widen_block(const BlockQ6_K& block, Put put) {
    const Vec d = broadcast_f16(block.d);
#pragma GCC unroll 16
    for (int g = 0; g < 16; ++g) {
        const int half = g / 8, quarter = g / 2 % 4, first = g % 2 * 16;
        const uint8_t* ql = block.ql + 64 * half + quarter % 2 * 32 + first;
        const uint8_t* qh = block.qh + 32 * half + first;
        put_scaled<16>(
            16 * g,
            [&](int i) {
                const IntLanes low = load_u8(ql + i) >> quarter / 2 * 4 & 15;
                return to_floats((low | (load_u8(qh + i) >> quarter * 2 & 3) << 4) - 32);
            },
            times(d, block.scales[g]), put);
    }
}

// ---- rows ----

template <class B, int size>
struct BlockUnit {
    using Block = B;
    static constexpr int n = size, n_bytes = sizeof(B);
};
// The smallest run of columns that can be widened alone.
template <Type type>
struct Unit {
    static constexpr int n = 1, n_bytes = type == Type::f32 ? 4 : 2;
};
// clang-format off
template <> struct Unit<Type::q4_0> : BlockUnit<BlockQ4_0, 32> {};
template <> struct Unit<Type::q4_1> : BlockUnit<BlockQ4_1, 32> {};
template <> struct Unit<Type::q5_0> : BlockUnit<BlockQ5_0, 32> {};
template <> struct Unit<Type::q5_1> : BlockUnit<BlockQ5_1, 32> {};
template <> struct Unit<Type::q8_0> : BlockUnit<BlockQ8_0, 32> {};
template <> struct Unit<Type::q2_k> : BlockUnit<BlockQ2_K, 256> {};
template <> struct Unit<Type::q3_k> : BlockUnit<BlockQ3_K, 256> {};
template <> struct Unit<Type::q4_k> : BlockUnit<BlockQ4_K, 256> {};
template <> struct Unit<Type::q5_k> : BlockUnit<BlockQ5_K, 256> {};
template <> struct Unit<Type::q6_k> : BlockUnit<BlockQ6_K, 256> {};
// clang-format on

// n columns at p; `out` has room for whole vectors.
template <Type type>
inline void widen(const uint8_t* p, int64_t n, float* out) {
    if constexpr (type == Type::f32) {
        __builtin_memcpy(out, p, size_t(n) * sizeof(float));
    } else if constexpr (type == Type::f16) {
        const auto* halves = reinterpret_cast<const uint16_t*>(p);
        int64_t i = 0;
        for (; i + width <= n; i += width)
            store(out + i, load_f16(halves + i));
        if (i < n) store(out + i, load_f16_partial(halves + i, n - i));
    } else if constexpr (type == Type::bf16) {
        for (int64_t i = 0; i < n; ++i) {
            uint16_t bits;
            __builtin_memcpy(&bits, p + 2 * i, sizeof bits);
            out[i] = __builtin_bit_cast(float, uint32_t(bits) << 16);
        }
    } else {
        using Block = typename Unit<type>::Block;
        for (int64_t i = 0; i < n; i += Unit<type>::n, p += sizeof(Block))
            widen_block(*reinterpret_cast<const Block*>(p),
                        [&](int column, Vec values) { store(out + i + column, values); });
    }
}

}  // namespace

}  // namespace qi::kernels::QI_SIMD_LEVEL
