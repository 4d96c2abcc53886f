// Block tiles for NEON with dot products: two rows, each in two registers of four chains.
#pragma once

#include <atomic>
#include <cstddef>

#include "kernels/matmul_layout.h"
#include "kernels/simd_neon.h"

namespace qi::kernels::neon {

inline Vec load_bf16(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

inline constexpr int tile_rows = 2;
inline constexpr int sum_tiles = 1;
inline constexpr int sum_rows = sum_tiles * tile_rows;
// 16 registers of chains and 8 of sums leave 8 for codes and activations, at one load for each dot
// instruction.
inline constexpr int tile_tokens = 4;
inline constexpr int dot_tokens = 2;

// Registers of a row and of a tile: quad 2·r + h has chains 4·h to 4·h + 3 of row r.
inline constexpr int row_quads = n_chains / width;
inline constexpr int n_quads = tile_rows * row_quads;
static_assert(n_quads == 4);

struct Lanes {
    Vec v[n_quads];
};
struct Ints {
    int32x4_t v[n_quads];
};
struct Codes {
    uint8x16_t v[n_quads];
};

template <Type type>
struct Tile {
    Codes codes[n_steps];
    Lanes factors[format_of<type>.parts * (format_of<type>.minimum ? 2 : 1)];
};

// Codes are multiplied as signed bytes: Q8_0's are so in the file, the others stay below 128.
template <Type type>
inline constexpr int dot_offset = type == Type::q8_0 ? 0 : format_of<type>.offset;

inline Lanes load_lanes(const float (&p)[n_chains]) {
    const Vec first = load(p), second = load(p + width);
    return {first, second, first, second};
}
inline Lanes operator*(Lanes a, Lanes b) {
    return {a.v[0] * b.v[0], a.v[1] * b.v[1], a.v[2] * b.v[2], a.v[3] * b.v[3]};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {fma(a.v[0], b.v[0], c.v[0]), fma(a.v[1], b.v[1], c.v[1]), fma(a.v[2], b.v[2], c.v[2]),
            fma(a.v[3], b.v[3], c.v[3])};
}

inline Ints zero_ints() {
    const int32x4_t zero = vdupq_n_s32(0);
    return {zero, zero, zero, zero};
}
inline int32x4_t weigh_quad(const int16_t (*p)[2], int16x8_t weights) {
    const int16x8_t pairs = vld1q_s16(p[0]);
    return vpaddq_s32(vmull_s16(vget_low_s16(pairs), vget_low_s16(weights)),
                      vmull_high_s16(pairs, weights));
}
inline Ints weigh_pairs(const int16_t (&p)[n_chains][2], int first, int second) {
    const auto low = int16_t(first), high = int16_t(second);
    const int16x8_t weights = {low, high, low, high, low, high, low, high};
    const int32x4_t quads[row_quads] = {weigh_quad(p, weights), weigh_quad(p + width, weights)};
    return {quads[0], quads[1], quads[0], quads[1]};
}
inline int32x4_t dot_quad(int32x4_t sum, uint8x16_t codes, int8x16_t x) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(codes), x);
}
template <Type type, int steps, int n>
inline void dot(Ints (&sums)[n], const Codes* w, const Q8Group* x, int first) {
#pragma GCC unroll 8
    for (int s = 0; s < steps; ++s) {
        // Keeps the compiler from loading the codes of all steps at once, only to spill them.
        std::atomic_signal_fence(std::memory_order_seq_cst);
        const Codes codes = w[s];
#pragma GCC unroll 4
        for (int t = 0; t < n; ++t) {
            const int8_t(&step)[n_chains][4] = x[t].codes[first + s];
            const int8x16_t low = vld1q_s8(step[0]), high = vld1q_s8(step[width]);
            Ints& sum = sums[t];
            sum = {dot_quad(sum.v[0], codes.v[0], low), dot_quad(sum.v[1], codes.v[1], high),
                   dot_quad(sum.v[2], codes.v[2], low), dot_quad(sum.v[3], codes.v[3], high)};
        }
    }
}
inline Lanes to_float(Ints sums) {
    return {vcvtq_f32_s32(sums.v[0]), vcvtq_f32_s32(sums.v[1]), vcvtq_f32_s32(sums.v[2]),
            vcvtq_f32_s32(sums.v[3])};
}
inline void add_chains(const Lanes (&chains)[sum_tiles], float (&totals)[sum_rows]) {
    totals[0] = sum(chains[0].v[0] + chains[0].v[1]);
    totals[1] = sum(chains[0].v[2] + chains[0].v[3]);
}

template <class T>
inline T load_as(const uint8_t* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}
inline float load_half(const uint8_t* p) {
    return load_as<float16_t>(p);
}
inline uint8x16_t repeat_dword(const uint8_t* p) {
    return vreinterpretq_u8_u32(vdupq_n_u32(load_as<uint32_t>(p)));
}

// For each byte of a register a number: where the byte comes from, or by how much it is shifted.
struct ByteMap {
    int8_t at[16];
};
template <ByteMap map>
inline int8x16_t constant() {
    alignas(16) static constexpr ByteMap stored = map;
    return vld1q_s8(stored.at);
}

// Left shifts: `first` for the first of four chains, `less` less for each one after it.
constexpr ByteMap shifts_by_chain(int first, int less) {
    ByteMap map = {};
    for (int i = 0; i < 16; ++i)
        map.at[i] = int8_t(first - less * (i / 4));
    return map;
}
// The same for the four bytes of each chain.
constexpr ByteMap shifts_by_byte(int first, int less) {
    ByteMap map = {};
    for (int i = 0; i < 16; ++i)
        map.at[i] = int8_t(first - less * (i % 4));
    return map;
}
// The byte at `byte` of each chain's four, for all of them.
constexpr ByteMap repeated_byte(int byte) {
    ByteMap map = {};
    for (int i = 0; i < 16; ++i)
        map.at[i] = int8_t(i / 4 * 4 + byte);
    return map;
}

inline uint8x16_t low_nibbles(uint8x16_t v) {
    return vandq_u8(v, vdupq_n_u8(15));
}
inline uint8x16_t high_nibbles(uint8x16_t v) {
    return vshrq_n_u8(v, 4);
}
template <ByteMap shifts>
inline uint8x16_t shifted(uint8x16_t v) {
    return vshlq_u8(v, constant<shifts>());
}
// The bits of `mask` from `from`, the others from v.
inline uint8x16_t merge_bits(uint8x16_t v, uint8x16_t from, int mask) {
    return vbslq_u8(vdupq_n_u8(uint8_t(mask)), from, v);
}

inline uint8x16_t pair_dwords(uint8x16_t a, uint8x16_t b, bool odd) {
    const uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    return vreinterpretq_u8_u32(odd ? vtrn2q_u32(x, y) : vtrn1q_u32(x, y));
}
inline uint8x16_t pair_quadwords(uint8x16_t a, uint8x16_t b, bool second) {
    const uint64x2_t x = vreinterpretq_u64_u8(a), y = vreinterpretq_u64_u8(b);
    return vreinterpretq_u8_u64(second ? vzip2q_u64(x, y) : vzip1q_u64(x, y));
}
inline uint8x16_t zip_dwords(uint8x16_t a, uint8x16_t b, bool second) {
    const uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    return vreinterpretq_u8_u32(second ? vzip2q_u32(x, y) : vzip1q_u32(x, y));
}

// Sixteen bytes of each of four blocks, as four steps.
struct Steps {
    uint8x16_t v[4];
};
template <class Block>
inline Steps load_steps(const uint8_t* p) {
    const uint8x16_t a = vld1q_u8(p), b = vld1q_u8(p + sizeof(Block)),
                     c = vld1q_u8(p + 2 * sizeof(Block)), d = vld1q_u8(p + 3 * sizeof(Block));
    const uint8x16_t ab[2] = {pair_dwords(a, b, false), pair_dwords(a, b, true)};
    const uint8x16_t cd[2] = {pair_dwords(c, d, false), pair_dwords(c, d, true)};
    return {pair_quadwords(ab[0], cd[0], false), pair_quadwords(ab[1], cd[1], false),
            pair_quadwords(ab[0], cd[0], true), pair_quadwords(ab[1], cd[1], true)};
}

// A half of each of four blocks, as floats.
template <class Block>
inline Vec load_halves(const uint8_t* p) {
    uint16x4_t bits = vdup_n_u16(load_as<uint16_t>(p));
    bits = vset_lane_u16(load_as<uint16_t>(p + sizeof(Block)), bits, 1);
    bits = vset_lane_u16(load_as<uint16_t>(p + 2 * sizeof(Block)), bits, 2);
    bits = vset_lane_u16(load_as<uint16_t>(p + 3 * sizeof(Block)), bits, 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
}

template <class Block>
inline uint8x16_t load_dwords(const uint8_t* p) {
    uint32x4_t dwords = vdupq_n_u32(load_as<uint32_t>(p));
    dwords = vsetq_lane_u32(load_as<uint32_t>(p + sizeof(Block)), dwords, 1);
    dwords = vsetq_lane_u32(load_as<uint32_t>(p + 2 * sizeof(Block)), dwords, 2);
    dwords = vsetq_lane_u32(load_as<uint32_t>(p + 3 * sizeof(Block)), dwords, 3);
    return vreinterpretq_u8_u32(dwords);
}

template <class Block>
inline void unpack_nibbles(const uint8_t* p, int quad, Codes (&codes)[n_steps]) {
    const Steps steps = load_steps<Block>(p + offsetof(Block, qs));
    for (int i = 0; i < 4; ++i) {
        codes[i].v[quad] = low_nibbles(steps.v[i]);
        codes[4 + i].v[quad] = high_nibbles(steps.v[i]);
    }
}

// Bits 4·s to 4·s + 3 of a block's qh are the fifth ones of step s.
template <int step = 0>
inline void add_fifth_bits(uint8x16_t qh, int quad, Codes (&codes)[n_steps]) {
    if constexpr (step < n_steps) {
        constexpr ByteMap source = repeated_byte(step / 2);
        constexpr ByteMap shifts = shifts_by_byte(4 - step % 2 * 4, 1);
        const uint8x16_t bytes = vqtbl1q_u8(qh, vreinterpretq_u8_s8(constant<source>()));
        codes[step].v[quad] = merge_bits(codes[step].v[quad], shifted<shifts>(bytes), 16);
        add_fifth_bits<step + 1>(qh, quad, codes);
    }
}

template <class Block>
inline void unpack_codes(const uint8_t* p, int quad, Codes (&codes)[n_steps]) {
    unpack_nibbles<Block>(p, quad, codes);
    if constexpr (requires(Block block) { block.qh; })
        add_fifth_bits(load_dwords<Block>(p + offsetof(Block, qh)), quad, codes);
}
template <>
inline void unpack_codes<BlockQ8_0>(const uint8_t* p, int quad, Codes (&codes)[n_steps]) {
    const Steps early = load_steps<BlockQ8_0>(p + offsetof(BlockQ8_0, qs));
    const Steps late = load_steps<BlockQ8_0>(p + offsetof(BlockQ8_0, qs) + 16);
    for (int i = 0; i < 4; ++i) {
        codes[i].v[quad] = early.v[i];
        codes[4 + i].v[quad] = late.v[i];
    }
}

template <class Block, class Tile>
inline void unpack_blocks(const uint8_t* const (&rows)[tile_rows], Tile& tile) {
    for (int quad = 0; quad < n_quads; ++quad) {
        const uint8_t* p = rows[quad / row_quads] + quad % row_quads * width * int(sizeof(Block));
        unpack_codes<Block>(p, quad, tile.codes);
        tile.factors[0].v[quad] = load_halves<Block>(p + offsetof(Block, d));
        if constexpr (requires(Block block) { block.m; })
            tile.factors[1].v[quad] = load_halves<Block>(p + offsetof(Block, m));
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_0>& tile) {
    unpack_blocks<BlockQ4_0>(rows, tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_1>& tile) {
    unpack_blocks<BlockQ4_1>(rows, tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_0>& tile) {
    unpack_blocks<BlockQ5_0>(rows, tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_1>& tile) {
    unpack_blocks<BlockQ5_1>(rows, tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q8_0>& tile) {
    unpack_blocks<BlockQ8_0>(rows, tile);
}

// A row's eight small integers times a float.
inline void put_factors(int8x8_t integers, float unit, int row, Lanes& factors) {
    const int16x8_t wide = vmovl_s8(integers);
    const int32x4_t low = vmovl_s16(vget_low_s16(wide)), high = vmovl_high_s16(wide);
    factors.v[row * row_quads] = vmulq_n_f32(vcvtq_f32_s32(low), unit);
    factors.v[row * row_quads + 1] = vmulq_n_f32(vcvtq_f32_s32(high), unit);
}
// The same where number 2·c + part of sixteen belongs to chain c.
inline void put_part_factors(int8x16_t integers, float unit, int row, Lanes* factors) {
    const int8x8_t low = vget_low_s8(integers), high = vget_high_s8(integers);
    put_factors(vuzp1_s8(low, high), unit, row, factors[0]);
    put_factors(vuzp2_s8(low, high), unit, row, factors[1]);
}

// 32 bytes that four chains take different bits of; calls use(step, bits) with a step's four bytes
// for each chain, shifted for it.
template <ByteMap shifts, class Use>
inline void spread_bits(const uint8_t* p, Use use) {
    for (int step = 0; step < n_steps; ++step)
        use(step, shifted<shifts>(repeat_dword(p + 4 * step)));
}
// Both quads of row `row` of the codes: in each, chain c takes bit c of 32 bytes as its bit `to`.
template <int to, int half = 0>
inline void add_bit(const uint8_t* p, int row, Codes (&codes)[n_steps]) {
    if constexpr (half < row_quads) {
        spread_bits<shifts_by_chain(to - half * width, 1)>(p, [&](int step, uint8x16_t bits) {
            uint8x16_t& code = codes[step].v[row * row_quads + half];
            code = merge_bits(code, bits, 1 << to);
        });
        add_bit<to, half + 1>(p, row, codes);
    }
}
// Codes of two bits: 32 bytes for each four chains.
inline void unpack_two_bits(const uint8_t* p, int row, Codes (&codes)[n_steps]) {
    for (int half = 0; half < row_quads; ++half)
        spread_bits<shifts_by_chain(0, 2)>(p + 32 * half, [&](int step, uint8x16_t bits) {
            codes[step].v[row * row_quads + half] = vandq_u8(bits, vdupq_n_u8(3));
        });
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q2_k>& tile) {
    for (int row = 0; row < tile_rows; ++row) {
        const uint8_t* p = rows[row];
        unpack_two_bits(p + offsetof(BlockQ2_K, qs), row, tile.codes);
        const uint8x16_t scales = vld1q_u8(p + offsetof(BlockQ2_K, scales));
        put_part_factors(vreinterpretq_s8_u8(low_nibbles(scales)),
                         load_half(p + offsetof(BlockQ2_K, d)), row, tile.factors);
        put_part_factors(vreinterpretq_s8_u8(high_nibbles(scales)),
                         -load_half(p + offsetof(BlockQ2_K, dmin)), row, tile.factors + 2);
    }
}

// Q3_K's sixteen scales of 6 bits, as BlockQ3_K describes them, without their offset of 32.
inline int8x16_t unpack_q3_k_scales(const uint8_t* p) {
    const uint8x8_t low = vld1_u8(p);
    const uint8x16_t nibbles = vcombine_u8(vand_u8(low, vdup_n_u8(15)), vshr_n_u8(low, 4));
    const uint8x16_t pairs = shifted<shifts_by_chain(4, 2)>(repeat_dword(p + 8));
    return vsubq_s8(vreinterpretq_s8_u8(merge_bits(nibbles, pairs, 0x30)), vdupq_n_s8(32));
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q3_k>& tile) {
    for (int row = 0; row < tile_rows; ++row) {
        const uint8_t* p = rows[row];
        unpack_two_bits(p + offsetof(BlockQ3_K, qs), row, tile.codes);
        add_bit<2>(p + offsetof(BlockQ3_K, hmask), row, tile.codes);
        put_part_factors(unpack_q3_k_scales(p + offsetof(BlockQ3_K, scales)),
                         load_half(p + offsetof(BlockQ3_K, d)), row, tile.factors);
    }
}

// Q4_K's and Q5_K's eight scales and eight minima of 6 bits, as BlockQ4_K describes them.
template <class Block>
inline void unpack_six_bit_factors(const uint8_t* p, int row, Lanes (&factors)[2]) {
    constexpr ByteMap nibbles = {0, 0, 0, 0, -4, -4, -4, -4};
    const uint8_t* scales = p + offsetof(Block, scales);
    const uint8x8_t first = vld1_u8(scales);
    const uint8x8_t fourth = vget_low_u8(low_nibbles(shifted<nibbles>(repeat_dword(scales + 8))));
    // Four scales, then four minima: of chains 0-3, and of chains 4-7.
    const uint32x2_t early = vreinterpret_u32_u8(vand_u8(first, vdup_n_u8(63)));
    const uint32x2_t late =
        vreinterpret_u32_u8(vorr_u8(fourth, vand_u8(vshr_n_u8(first, 2), vdup_n_u8(0x30))));
    put_factors(vreinterpret_s8_u32(vzip1_u32(early, late)), load_half(p + offsetof(Block, d)), row,
                factors[0]);
    put_factors(vreinterpret_s8_u32(vzip2_u32(early, late)), -load_half(p + offsetof(Block, dmin)),
                row, factors[1]);
}

// Four runs of 32 bytes, each the low and the high nibbles of two chains.
inline void unpack_nibble_runs(const uint8_t* p, int row, Codes (&codes)[n_steps]) {
    for (int half = 0; half < row_quads; ++half) {
        const int quad = row * row_quads + half;
        for (int step = 0; step < n_steps; step += 4) {
            const uint8_t* at = p + 64 * half + 4 * step;
            const uint8x16_t a = vld1q_u8(at), b = vld1q_u8(at + 32);
            for (int i = 0; i < 2; ++i) {
                const uint8x16_t both = pair_quadwords(a, b, i == 1);
                const uint8x16_t low = low_nibbles(both), high = high_nibbles(both);
                codes[step + 2 * i].v[quad] = pair_dwords(low, high, false);
                codes[step + 2 * i + 1].v[quad] = pair_dwords(low, high, true);
            }
        }
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_k>& tile) {
    for (int row = 0; row < tile_rows; ++row) {
        unpack_six_bit_factors<BlockQ4_K>(rows[row], row, tile.factors);
        unpack_nibble_runs(rows[row] + offsetof(BlockQ4_K, qs), row, tile.codes);
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_k>& tile) {
    for (int row = 0; row < tile_rows; ++row) {
        unpack_six_bit_factors<BlockQ5_K>(rows[row], row, tile.factors);
        unpack_nibble_runs(rows[row] + offsetof(BlockQ5_K, qs), row, tile.codes);
        add_bit<4>(rows[row] + offsetof(BlockQ5_K, qh), row, tile.codes);
    }
}

// The nibbles of a half of Q6_K's group: 32 bytes for chains 0 and 2, low and high, then 32 for
// chains 1 and 3.
inline void unpack_q6_k_nibbles(const uint8_t* p, int quad, Codes (&codes)[n_steps]) {
    for (int step = 0; step < n_steps; step += 4) {
        const uint8x16_t even = vld1q_u8(p + 4 * step), odd = vld1q_u8(p + 32 + 4 * step);
        for (int i = 0; i < 2; ++i) {
            const uint8x16_t both = zip_dwords(even, odd, i == 1);
            const uint8x16_t low = low_nibbles(both), high = high_nibbles(both);
            codes[step + 2 * i].v[quad] = pair_quadwords(low, high, false);
            codes[step + 2 * i + 1].v[quad] = pair_quadwords(low, high, true);
        }
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q6_k>& tile) {
    for (int quad = 0; quad < n_quads; ++quad) {
        const uint8_t* p = rows[quad / row_quads];
        const int half = quad % row_quads;
        unpack_q6_k_nibbles(p + offsetof(BlockQ6_K, ql) + 64 * half, quad, tile.codes);
        spread_bits<shifts_by_chain(4, 2)>(
            p + offsetof(BlockQ6_K, qh) + 32 * half, [&](int step, uint8x16_t bits) {
                tile.codes[step].v[quad] = merge_bits(tile.codes[step].v[quad], bits, 0x30);
            });
    }
    for (int row = 0; row < tile_rows; ++row)
        put_part_factors(vreinterpretq_s8_u8(vld1q_u8(rows[row] + offsetof(BlockQ6_K, scales))),
                         load_half(rows[row] + offsetof(BlockQ6_K, d)), row, tile.factors);
}

}  // namespace qi::kernels::neon
