// Block tiles for AVX2: one row, a block of 32 in each lane.
#pragma once

#include <cstddef>
#include <utility>

#include "kernels/matmul_layout.h"
#include "kernels/simd_avx2.h"

namespace qi::kernels::avx2 {

inline Vec load_bf16(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline constexpr int tile_rows = 1;
inline constexpr int sum_tiles = width;  // whose chains are added together
inline constexpr int sum_rows = sum_tiles * tile_rows;
// A token's products do not wait for each other, so tokens need not overlap; with one at a time the
// codes stay in eight of the sixteen registers.
inline constexpr int dot_tokens = 1;
// Enough for the loads of codes to cost little, and their activations still fit L1.
inline constexpr int tile_tokens = 8;

using Lanes = Vec;
using Ints = __m256i;
using Codes = __m256i;

template <Type type>
struct Tile {
    Codes codes[n_steps];
    Lanes factors[format_of<type>.parts * (format_of<type>.minimum ? 2 : 1)];
};

// Q8_0's codes stay signed: 255 · 127 · 2 would not fit the 16 bits that products are added in.
template <Type type>
inline constexpr int dot_offset = type == Type::q8_0 ? 0 : format_of<type>.offset;

inline __m128i load_128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
inline __m256i load_256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline Lanes load_lanes(const float (&p)[n_chains]) {
    return load(p);
}
inline Ints zero_ints() {
    return _mm256_setzero_si256();
}
inline Ints weigh_pairs(const int16_t (&p)[n_chains][2], int first, int second) {
    const int pair = (first & 0xffff) | int(unsigned(second) << 16);
    return _mm256_madd_epi16(load_256(p), _mm256_set1_epi32(pair));
}

// 16-bit sums of pairs, added in twos.
inline Ints add_pairs(Ints sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Q8_0 as |w| · (x with w's sign): x is never -128, which has no negative.
template <int n>
inline void dot_signed(Ints (&sums)[n], const Codes* w, const Q8Group* x) {
#pragma GCC unroll 8
    for (int s = 0; s < n_steps; ++s) {
        const __m256i magnitudes = _mm256_abs_epi8(w[s]);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
            const __m256i signed_x = _mm256_sign_epi8(load_256(x[t].codes[s]), w[s]);
            sums[t] = add_pairs(sums[t], _mm256_maddubs_epi16(magnitudes, signed_x));
        }
    }
}
// sums[t] += Σ w · x over `steps` steps of n tokens, from step `first` of x on.
template <Type type, int steps, int n>
inline void dot(Ints (&sums)[n], const Codes* w, const Q8Group* x, int first) {
    if constexpr (type == Type::q8_0) {
        dot_signed(sums, w, x);
    } else {
        // Steps whose sums of pairs fit 16 bits together; more than four only cost registers.
        constexpr int fitting = 32767 / (2 * 127 * format_of<type>.max_code);
        constexpr int together = fitting < 4 ? fitting : 4;
        static_assert(steps % together == 0);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
#pragma GCC unroll 8
            for (int s = 0; s < steps; s += together) {
                __m256i pairs = _mm256_maddubs_epi16(w[s], load_256(x[t].codes[first + s]));
#pragma GCC unroll 8
                for (int i = s + 1; i < s + together; ++i)
                    pairs = _mm256_add_epi16(
                        pairs, _mm256_maddubs_epi16(w[i], load_256(x[t].codes[first + i])));
                sums[t] = add_pairs(sums[t], pairs);
            }
        }
    }
}

inline Lanes to_float(Ints sums) {
    return _mm256_cvtepi32_ps(sums);
}
inline void add_chains(const Lanes (&chains)[sum_tiles], float (&totals)[sum_rows]) {
    store(totals, sums(chains));
}

// Calls body.operator()<i>() for i = 0, ..., n - 1: shuffles want constants.
template <int n, class Body>
inline void for_constants(Body body) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        (body.template operator()<i>(), ...);
    }
    (std::make_integer_sequence<int, n>{});
}

// The four bytes at p and at the same place of the seven blocks that follow, a block per lane; then
// the two bytes. Each load puts its block's field in its lane already, and none leaves the group.
template <class Block>
inline __m256i take_dwords(const uint8_t* p) {
    __m256i taken = load_256(p);
    for_constants<n_chains>([&]<int c>() {
        taken = _mm256_blend_epi32(taken, load_256(p + c * (sizeof(Block) - 4)), 1 << c);
    });
    return taken;
}
template <class Block>
inline __m128i take_words(const uint8_t* p) {
    __m128i taken = load_128(p);
    for_constants<n_chains>([&]<int c>() {
        taken = _mm_blend_epi16(taken, load_128(p + c * (sizeof(Block) - 2)), 1 << c);
    });
    return taken;
}

template <class Block, class Tile>
inline void unpack_factors(const uint8_t* p, Tile& tile) {
    static_assert(offsetof(Block, d) == 0);
    if constexpr (requires(Block b) { b.m; }) {
        static_assert(offsetof(Block, m) == 2);
        const __m256i apart = _mm256_broadcastsi128_si256(
            _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0));
        const __m256i halves = _mm256_permute4x64_epi64(
            _mm256_shuffle_epi8(take_dwords<Block>(p), apart), _MM_SHUFFLE(3, 1, 2, 0));
        tile.factors[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        tile.factors[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    } else {
        tile.factors[0] = _mm256_cvtph_ps(take_words<Block>(p));
    }
}

// 16 bytes for each half of a register.
inline __m256i load_two(const uint8_t* low, const uint8_t* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(low)), load_128(high), 1);
}

// 16 bytes at p and at the same place of the blocks that follow: out[i] has bytes 4·i to 4·i + 3 of
// each.
template <class Block>
inline void take_sixteen(const uint8_t* p, __m256i* out) {
    __m256i blocks[4];
    for (int c = 0; c < 4; ++c)
        blocks[c] = load_two(p + c * sizeof(Block), p + (c + 4) * sizeof(Block));
    const __m256i low01 = _mm256_unpacklo_epi32(blocks[0], blocks[1]);
    const __m256i high01 = _mm256_unpackhi_epi32(blocks[0], blocks[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(blocks[2], blocks[3]);
    const __m256i high23 = _mm256_unpackhi_epi32(blocks[2], blocks[3]);
    out[0] = _mm256_unpacklo_epi64(low01, low23);
    out[1] = _mm256_unpackhi_epi64(low01, low23);
    out[2] = _mm256_unpacklo_epi64(high01, high23);
    out[3] = _mm256_unpackhi_epi64(high01, high23);
}

inline __m256i keep_bits(__m256i v, int mask) {
    return _mm256_and_si256(v, _mm256_set1_epi8(char(mask)));
}

template <class Block, class Tile>
inline void unpack_nibbles(const uint8_t* p, Tile& tile) {
    __m256i bytes[4];
    take_sixteen<Block>(p + offsetof(Block, qs), bytes);
    for (int i = 0; i < 4; ++i) {
        tile.codes[i] = keep_bits(bytes[i], 15);
        tile.codes[i + 4] = keep_bits(_mm256_srli_epi16(bytes[i], 4), 15);
    }
}

// Fifth bits: bit i of a block's qh belongs to its element i.
template <class Block, class Tile>
inline void add_fifth_bits(const uint8_t* p, Tile& tile) {
    const __m256i qh = take_dwords<Block>(p + offsetof(Block, qh));
    const __m256i first_byte = _mm256_broadcastsi128_si256(
        _mm_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0));
    const __m256i own_bits = _mm256_set1_epi32(int(0x80402010));
    for (int i = 0; i < 4; ++i) {
        const __m256i index = _mm256_add_epi8(first_byte, _mm256_set1_epi8(char(i)));
        const __m256i upper = _mm256_shuffle_epi8(qh, index);  // element i's bit is bit 4 + i % 4
        const __m256i lower = _mm256_slli_epi16(upper, 4);
        // What is left of any of these bits becomes 16.
        const __m256i sixteen = _mm256_set1_epi8(16);
        const __m256i even = _mm256_min_epu8(_mm256_and_si256(lower, own_bits), sixteen);
        const __m256i odd = _mm256_min_epu8(_mm256_and_si256(upper, own_bits), sixteen);
        tile.codes[2 * i] = _mm256_or_si256(tile.codes[2 * i], even);
        tile.codes[2 * i + 1] = _mm256_or_si256(tile.codes[2 * i + 1], odd);
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_0>& tile) {
    unpack_factors<BlockQ4_0>(rows[0], tile);
    unpack_nibbles<BlockQ4_0>(rows[0], tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_1>& tile) {
    unpack_factors<BlockQ4_1>(rows[0], tile);
    unpack_nibbles<BlockQ4_1>(rows[0], tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_0>& tile) {
    unpack_factors<BlockQ5_0>(rows[0], tile);
    unpack_nibbles<BlockQ5_0>(rows[0], tile);
    add_fifth_bits<BlockQ5_0>(rows[0], tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_1>& tile) {
    unpack_factors<BlockQ5_1>(rows[0], tile);
    unpack_nibbles<BlockQ5_1>(rows[0], tile);
    add_fifth_bits<BlockQ5_1>(rows[0], tile);
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q8_0>& tile) {
    unpack_factors<BlockQ8_0>(rows[0], tile);
    take_sixteen<BlockQ8_0>(rows[0] + offsetof(BlockQ8_0, qs), tile.codes);
    take_sixteen<BlockQ8_0>(rows[0] + offsetof(BlockQ8_0, qs) + 16, tile.codes + 4);
}

// A number for each of four chains, the same in both halves.
inline __m256i per_chain(int a, int b, int c, int d) {
    return _mm256_setr_epi32(a, b, c, d, a, b, c, d);
}

// A K type's scales: eight small integers times a float.
inline Lanes scale_factors(__m256i integers, Lanes unit) {
    return _mm256_cvtepi32_ps(integers) * unit;
}
inline Lanes load_half(const uint8_t* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return broadcast(_cvtsh_ss(bits));
}

// Sixteen bytes, of which number 2·c + part belongs to chain c: the eight of each part together.
inline __m128i split_parts(__m128i bytes) {
    return _mm_shuffle_epi8(bytes,
                            _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
}
inline __m128i second_part(__m128i parts) {
    return _mm_unpackhi_epi64(parts, parts);
}

// 16 bytes of which chains 0-3 take bits at the shifts 0, 2, 4, 6, and 16 others for chains 4-7.
template <class Use>
inline void spread_two_bits(const uint8_t* low, const uint8_t* high, Use use) {
    const __m256i runs = load_two(low, high);
    for_constants<4>([&]<int i>() {
        const __m256i own = _mm256_shuffle_epi32(runs, i * 0x55);
        use(i, _mm256_srlv_epi32(own, per_chain(0, 2, 4, 6)));
    });
}

// 16 bytes of which chain c takes bit c: use(i, bits) has that bit of bytes 4·i to 4·i + 3 at
// 4 - down.
template <int down, class Use>
inline void spread_one_bit(const uint8_t* p, Use use) {
    // First where chain c finds its bit at 4 + c % 4.
    const __m256i shared = _mm256_sllv_epi32(_mm256_broadcastsi128_si256(load_128(p)),
                                             _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0));
    for_constants<4>([&]<int i>() {
        const __m256i own = _mm256_shuffle_epi32(shared, i * 0x55);
        use(i, _mm256_srlv_epi32(own, per_chain(down, down + 1, down + 2, down + 3)));
    });
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q2_k>& tile) {
    const uint8_t* qs = rows[0] + offsetof(BlockQ2_K, qs);
    for (int half = 0; half < 2; ++half)
        spread_two_bits(qs + 16 * half, qs + 32 + 16 * half, [&](int i, __m256i bits) {
            tile.codes[4 * half + i] = keep_bits(bits, 3);
        });
    const Lanes d = load_half(rows[0] + offsetof(BlockQ2_K, d));
    const Lanes dmin = load_half(rows[0] + offsetof(BlockQ2_K, dmin));
    const __m128i parts = split_parts(load_128(rows[0] + offsetof(BlockQ2_K, scales)));
    const __m256i packed[2] = {_mm256_cvtepu8_epi32(parts),
                               _mm256_cvtepu8_epi32(second_part(parts))};
    for (int p = 0; p < 2; ++p) {
        tile.factors[p] = scale_factors(_mm256_and_si256(packed[p], _mm256_set1_epi32(15)), d);
        tile.factors[2 + p] =
            scale_factors(_mm256_srli_epi32(packed[p], 4), _mm256_setzero_ps() - dmin);
    }
}

// Scales that are signed bytes, number 2·c + part for chain c.
inline void unpack_byte_factors(__m128i scales, Lanes d, Lanes (&factors)[2]) {
    const __m128i parts = split_parts(scales);
    factors[0] = scale_factors(_mm256_cvtepi8_epi32(parts), d);
    factors[1] = scale_factors(_mm256_cvtepi8_epi32(second_part(parts)), d);
}

// Q3_K's sixteen scales of 6 bits, as BlockQ3_K describes them, without their offset of 32.
inline __m128i unpack_q3_k_scales(const uint8_t* block) {
    static_assert(offsetof(BlockQ3_K, scales) == 96 && sizeof(BlockQ3_K) == 110);
    const __m128i packed = load_128(block + 94);  // the last 16 bytes
    const __m128i lows =
        _mm_shuffle_epi8(packed, _mm_set_epi8(9, 8, 7, 6, 5, 4, 3, 2, 9, 8, 7, 6, 5, 4, 3, 2));
    const __m128i highs = _mm_shuffle_epi8(
        packed, _mm_set_epi8(13, 12, 11, 10, 13, 12, 11, 10, 13, 12, 11, 10, 13, 12, 11, 10));
    const __m128i low =
        _mm_and_si128(_mm_srlv_epi32(lows, _mm_setr_epi32(0, 0, 4, 4)), _mm_set1_epi8(15));
    const __m128i high =
        _mm_and_si128(_mm_srlv_epi32(highs, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
    return _mm_sub_epi8(_mm_or_si128(low, _mm_slli_epi16(high, 4)), _mm_set1_epi8(32));
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q3_k>& tile) {
    const uint8_t* qs = rows[0] + offsetof(BlockQ3_K, qs);
    const uint8_t* hmask = rows[0] + offsetof(BlockQ3_K, hmask);
    for (int half = 0; half < 2; ++half) {
        Codes* codes = tile.codes + 4 * half;
        spread_two_bits(qs + 16 * half, qs + 32 + 16 * half,
                        [&](int i, __m256i bits) { codes[i] = keep_bits(bits, 3); });
        spread_one_bit<2>(hmask + 16 * half, [&](int i, __m256i bits) {
            codes[i] = _mm256_or_si256(codes[i], keep_bits(bits, 4));
        });
    }
    unpack_byte_factors(unpack_q3_k_scales(rows[0]), load_half(rows[0] + offsetof(BlockQ3_K, d)),
                        tile.factors);
}

// Q4_K's and Q5_K's eight scales and eight minima of 6 bits, as BlockQ4_K describes them.
template <class Block>
inline void unpack_six_bit_factors(const uint8_t* block, Lanes (&factors)[2]) {
    static_assert(offsetof(Block, scales) == 4 && offsetof(Block, dmin) == 2);
    const __m128i head = load_128(block);  // lane 0 has d and dmin
    const __m128i low =
        _mm_and_si128(_mm_srlv_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1)),
                                     _mm_setr_epi32(0, 0, 0, 4)),
                      _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    const __m128i high =
        _mm_and_si128(_mm_srli_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(2, 2, 1, 1)), 2),
                      _mm_setr_epi32(0, 0x30303030, 0, 0x30303030));
    const __m128i integers = _mm_or_si128(low, high);
    const __m128 units = _mm_cvtph_ps(head);
    factors[0] = scale_factors(_mm256_cvtepu8_epi32(integers), _mm256_broadcastss_ps(units));
    factors[1] = scale_factors(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(integers, integers)),
                               _mm256_setzero_ps() - _mm256_broadcastss_ps(_mm_movehdup_ps(units)));
}

// Four runs of 32 bytes, each the low and the high nibbles of two chains.
template <class Tile>
inline void unpack_nibble_runs(const uint8_t* qs, Tile& tile) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t* p = qs + 16 * half;
        const Vec even = _mm256_castsi256_ps(load_two(p, p + 64));
        const Vec odd = _mm256_castsi256_ps(load_two(p + 32, p + 96));
        for_constants<4>([&]<int i>() {
            const __m256i own = _mm256_castps_si256(_mm256_shuffle_ps(even, odd, i * 0x55));
            tile.codes[4 * half + i] = keep_bits(_mm256_srlv_epi32(own, per_chain(0, 4, 0, 4)), 15);
        });
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_k>& tile) {
    unpack_six_bit_factors<BlockQ4_K>(rows[0], tile.factors);
    unpack_nibble_runs(rows[0] + offsetof(BlockQ4_K, qs), tile);
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_k>& tile) {
    unpack_six_bit_factors<BlockQ5_K>(rows[0], tile.factors);
    unpack_nibble_runs(rows[0] + offsetof(BlockQ5_K, qs), tile);
    for (int half = 0; half < 2; ++half) {
        Codes* codes = tile.codes + 4 * half;
        spread_one_bit<0>(rows[0] + offsetof(BlockQ5_K, qh) + 16 * half, [&](int i, __m256i bits) {
            codes[i] = _mm256_or_si256(codes[i], keep_bits(bits, 16));
        });
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q6_k>& tile) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t* ql = rows[0] + offsetof(BlockQ6_K, ql) + 16 * half;
        const uint8_t* qh = rows[0] + offsetof(BlockQ6_K, qh) + 16 * half;
        // Nibbles of the chains 0 and 2 come from one run, those of 1 and 3 from the next.
        const __m256i even = load_two(ql, ql + 64), odd = load_two(ql + 32, ql + 96);
        const __m256i first = _mm256_unpacklo_epi32(even, odd);
        const __m256i last = _mm256_unpackhi_epi32(even, odd);
        const __m256i quads[4] = {
            _mm256_unpacklo_epi64(first, first), _mm256_unpackhi_epi64(first, first),
            _mm256_unpacklo_epi64(last, last), _mm256_unpackhi_epi64(last, last)};
        // The pairs of bits of chains 0 and 1 are moved up to where those of 2 and 3 are.
        const __m256i pairs = load_two(qh, qh + 32);
        const Vec up = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 4));
        for_constants<4>([&]<int i>() {
            const __m256i low = _mm256_srlv_epi32(quads[i], per_chain(0, 0, 4, 4));
            const __m256i own =
                _mm256_castps_si256(_mm256_shuffle_ps(up, _mm256_castsi256_ps(pairs), i * 0x55));
            const __m256i high = _mm256_srlv_epi32(own, per_chain(0, 2, 0, 2));
            tile.codes[4 * half + i] = _mm256_or_si256(keep_bits(low, 15), keep_bits(high, 0x30));
        });
    }
    unpack_byte_factors(load_128(rows[0] + offsetof(BlockQ6_K, scales)),
                        load_half(rows[0] + offsetof(BlockQ6_K, d)), tile.factors);
}

}  // namespace qi::kernels::avx2
