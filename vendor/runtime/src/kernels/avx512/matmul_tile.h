// Block tiles for AVX-512 with VNNI and VBMI: one row, two units of 256 weights at once, one in
// each half of a register.
#pragma once

#include "kernels/matmul_layout.h"
#include "kernels/simd_avx512.h"

namespace qi::kernels::avx512 {

inline Vec load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline constexpr int tile_rows = 1;
inline constexpr int sum_tiles = width;  // whose chains are added together
inline constexpr int sum_rows = sum_tiles * tile_rows;
inline constexpr int n_chains = 16;
using Q8Group = ActivationGroup<n_chains>;

// 12 sums beside 8 registers of codes leave 12 for factors and what is in flight.
// Tokens whose dot products overlap: 6 chains of 4 cycles, 2 started per cycle.
inline constexpr int dot_tokens = 6;
inline constexpr int tile_tokens = 12;

using Lanes = Vec;
using Ints = __m512i;
using Codes = __m512i;

template <Type type>
struct Tile {
    Codes codes[n_steps];
    Lanes factors[format_of<type>.parts * (format_of<type>.minimum ? 2 : 1)];
};

template <Type type>
inline constexpr int dot_offset = format_of<type>.offset;

inline Lanes load_lanes(const float (&p)[n_chains]) {
    return load(p);
}
inline Ints zero_ints() {
    return _mm512_setzero_si512();
}
inline Ints weigh_pairs(const int16_t (&p)[n_chains][2], int first, int second) {
    const int pair = (first & 0xffff) | int(unsigned(second) << 16);
    return _mm512_madd_epi16(_mm512_loadu_si512(p), _mm512_set1_epi32(pair));
}
template <Type type, int steps, int n>
inline void dot(Ints (&sums)[n], const Codes* w, const Q8Group* x, int first) {
#pragma GCC unroll 8
    for (int s = 0; s < steps; ++s)
#pragma GCC unroll 16
        for (int t = 0; t < n; ++t)
            sums[t] = _mm512_dpbusd_epi32(sums[t], w[s], _mm512_loadu_si512(x[t].codes[first + s]));
}
inline Lanes to_float(Ints sums) {
    return _mm512_cvtepi32_ps(sums);
}
inline void add_chains(const Lanes (&chains)[sum_tiles], float (&totals)[sum_rows]) {
    store(totals, sums(chains));
}

// For each byte of a register a number: where the byte comes from, or at which bit.
struct ByteMap {
    uint8_t at[64];
};
struct OffsetMap {
    uint16_t at[64];
};

template <ByteMap map>
inline __m512i constant() {
    alignas(64) static constexpr ByteMap stored = map;
    return _mm512_load_si512(&stored);
}

// n_bytes in as few registers as hold them, each byte loaded once: loads that overlap or reach
// further would wait for memory lines of their own.
template <int n_bytes>
struct Raw {
    static constexpr int n_whole = n_bytes / 64, rest = n_bytes % 64;
    __m512i v[n_whole + (rest ? 1 : 0)];

    explicit Raw(const uint8_t* p) {
        for (int i = 0; i < n_whole; ++i)
            v[i] = _mm512_loadu_si512(p + 64 * i);
        const uint8_t* last = p + 64 * n_whole;
        if constexpr (rest == 16)
            v[n_whole] =
                _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(last)));
        else if constexpr (rest == 32)
            v[n_whole] =
                _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(last)));
        else if constexpr (rest != 0)
            v[n_whole] = _mm512_maskz_loadu_epi8((uint64_t(1) << rest) - 1, last);
    }
};

// The indices of one source register, or of two, out of an OffsetMap.
constexpr ByteMap indices(const OffsetMap& map, int second) {
    ByteMap result = {};
    for (int i = 0; i < 64; ++i)
        result.at[i] = uint8_t(map.at[i] % 64 + (map.at[i] / 64 == second ? 64 : 0));
    return result;
}
constexpr uint64_t bytes_from(const OffsetMap& map, int source) {
    uint64_t mask = 0;
    for (int i = 0; i < 64; ++i)
        if (map.at[i] / 64 == source) mask |= uint64_t(1) << i;
    return mask;
}
constexpr int next_source(const OffsetMap& map, int from) {
    while (from < 16 && bytes_from(map, from) == 0)
        ++from;
    return from;
}

template <OffsetMap map, int source, int n>
inline __m512i pick_more(__m512i picked, const __m512i (&raw)[n]) {
    if constexpr (source < n) {
        picked = _mm512_mask_permutexvar_epi8(picked, bytes_from(map, source),
                                              constant<indices(map, -1)>(), raw[source]);
        return pick_more<map, next_source(map, source + 1)>(picked, raw);
    } else {
        return picked;
    }
}

// The bytes of a group that the map names.
template <OffsetMap map, int n_bytes>
inline __m512i pick(const Raw<n_bytes>& raw) {
    constexpr int first = next_source(map, 0), second = next_source(map, first + 1);
    if constexpr (second == 16) {
        return _mm512_permutexvar_epi8(constant<indices(map, -1)>(), raw.v[first]);
    } else {
        const __m512i picked =
            _mm512_permutex2var_epi8(raw.v[first], constant<indices(map, second)>(), raw.v[second]);
        return pick_more<map, next_source(map, second + 1)>(picked, raw.v);
    }
}

// Four of eight blocks: lane i has the four bytes at `offset` + 4·i of each block.
template <class Block>
constexpr OffsetMap quad_map(int offset, int quad) {
    OffsetMap map = {};
    for (int i = 0; i < 64; ++i)
        map.at[i] =
            uint16_t((4 * quad + i % 16 / 4) * int(sizeof(Block)) + offset + i / 16 * 4 + i % 4);
    return map;
}
// A field of two or four bytes of all eight blocks, in both units' places. Lanes 2 and 3 take the
// field at `upper`.
template <class Block>
constexpr OffsetMap field_map(int n_bytes, int lower, int upper) {
    OffsetMap map = {};
    for (int i = 0; i < 64; ++i)
        map.at[i] =
            uint16_t(i / n_bytes % 8 * int(sizeof(Block)) + i % n_bytes + (i < 32 ? lower : upper));
    return map;
}

// out[i]: lane i of each of the four.
inline void transpose_lanes(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
    const __m512i ab_low = _mm512_shuffle_i32x4(a, b, _MM_SHUFFLE(1, 0, 1, 0));
    const __m512i ab_high = _mm512_shuffle_i32x4(a, b, _MM_SHUFFLE(3, 2, 3, 2));
    const __m512i cd_low = _mm512_shuffle_i32x4(c, d, _MM_SHUFFLE(1, 0, 1, 0));
    const __m512i cd_high = _mm512_shuffle_i32x4(c, d, _MM_SHUFFLE(3, 2, 3, 2));
    out[0] = _mm512_shuffle_i32x4(ab_low, cd_low, _MM_SHUFFLE(2, 0, 2, 0));
    out[1] = _mm512_shuffle_i32x4(ab_low, cd_low, _MM_SHUFFLE(3, 1, 3, 1));
    out[2] = _mm512_shuffle_i32x4(ab_high, cd_high, _MM_SHUFFLE(2, 0, 2, 0));
    out[3] = _mm512_shuffle_i32x4(ab_high, cd_high, _MM_SHUFFLE(3, 1, 3, 1));
}

// The bits of `low` where `mask` is set, else those of `high`; `all` clears the rest.
inline __m512i merge_bits(__m512i low, __m512i high, int8_t mask, int8_t all) {
    const __m512i merged = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(mask), 0xe4);
    return _mm512_and_si512(merged, _mm512_set1_epi8(all));
}

template <class Block, class Tile>
inline void unpack_factors(const Raw<unit_chains * sizeof(Block)> (&raw)[2], Tile& tile) {
    constexpr int d = offsetof(Block, d);
    constexpr bool minimum = requires(Block b) {
        b.m;
    };
    constexpr OffsetMap map = field_map<Block>(2, d, minimum ? d + 2 : d);
    const __m512i halves =
        _mm512_mask_blend_epi64(0b11001100, pick<map>(raw[0]), pick<map>(raw[1]));
    tile.factors[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    if constexpr (minimum) tile.factors[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}

// The bytes at `offset` of blocks of 32: out[i] has bytes 4·i to 4·i + 3 of each block.
template <class Block, int offset>
inline void take_sixteen(const Raw<unit_chains * sizeof(Block)> (&raw)[2], __m512i* out) {
    constexpr OffsetMap first = quad_map<Block>(offset, 0), second = quad_map<Block>(offset, 1);
    transpose_lanes(pick<first>(raw[0]), pick<second>(raw[0]), pick<first>(raw[1]),
                    pick<second>(raw[1]), out);
}

template <class Block, class Tile>
inline void unpack_nibbles(const Raw<unit_chains * sizeof(Block)> (&raw)[2], Tile& tile) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i pairs[4];
    take_sixteen<Block, offsetof(Block, qs)>(raw, pairs);
    for (int i = 0; i < 4; ++i) {
        tile.codes[i] = _mm512_and_si512(pairs[i], mask);
        tile.codes[4 + i] = _mm512_and_si512(_mm512_srli_epi16(pairs[i], 4), mask);
    }
}

// For vpmultishiftqb: byte j of the four of chain c begins at bit shift(c) + 8·j of dword `odd` of
// its quadword, where `spread` gives the distance between bytes.
template <class Shift>
constexpr ByteMap bit_map(int odd, int spread, Shift shift) {
    ByteMap map = {};
    for (int i = 0; i < 64; ++i)
        map.at[i] = uint8_t((32 * odd + spread * (i % 4) + shift(i / 4 % unit_chains) + 64) % 64);
    return map;
}

// Fifth bits: bit i of a block's qh belongs to its element i.
template <int step>
constexpr ByteMap fifth_bit_map() {
    ByteMap map = {};
    for (int i = 0; i < 64; ++i)
        map.at[i] = uint8_t((i / 4 % 2 * 32 + 4 * step + i % 4 - 4 + 64) % 64);
    return map;
}

template <class Tile, int step = 0>
inline void add_fifth_bits(__m512i qh, Tile& tile) {
    if constexpr (step < n_steps) {
        const __m512i bits = _mm512_multishift_epi64_epi8(constant<fifth_bit_map<step>()>(), qh);
        tile.codes[step] = merge_bits(tile.codes[step], bits, 15, 31);
        add_fifth_bits<Tile, step + 1>(qh, tile);
    }
}

template <class Block, class Tile>
inline void unpack_five_bits(const uint8_t* const (&units)[2], Tile& tile) {
    const Raw<unit_chains * sizeof(Block)> raw[2] = {Raw<unit_chains * sizeof(Block)>(units[0]),
                                                     Raw<unit_chains * sizeof(Block)>(units[1])};
    unpack_factors<Block>(raw, tile);
    unpack_nibbles<Block>(raw, tile);
    constexpr OffsetMap map = field_map<Block>(4, offsetof(Block, qh), offsetof(Block, qh));
    add_fifth_bits(_mm512_mask_blend_epi64(0xf0, pick<map>(raw[0]), pick<map>(raw[1])), tile);
}

template <class Block, class Tile>
inline void unpack_four_bits(const uint8_t* const (&units)[2], Tile& tile) {
    const Raw<unit_chains * sizeof(Block)> raw[2] = {Raw<unit_chains * sizeof(Block)>(units[0]),
                                                     Raw<unit_chains * sizeof(Block)>(units[1])};
    unpack_factors<Block>(raw, tile);
    unpack_nibbles<Block>(raw, tile);
}

inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q4_0>& tile) {
    unpack_four_bits<BlockQ4_0>(units, tile);
}
inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q4_1>& tile) {
    unpack_four_bits<BlockQ4_1>(units, tile);
}
inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q5_0>& tile) {
    unpack_five_bits<BlockQ5_0>(units, tile);
}
inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q5_1>& tile) {
    unpack_five_bits<BlockQ5_1>(units, tile);
}
inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q8_0>& tile) {
    using Bytes = Raw<unit_chains * sizeof(BlockQ8_0)>;
    const Bytes raw[2] = {Bytes(units[0]), Bytes(units[1])};
    unpack_factors<BlockQ8_0>(raw, tile);
    take_sixteen<BlockQ8_0, offsetof(BlockQ8_0, qs)>(raw, tile.codes);
    take_sixteen<BlockQ8_0, offsetof(BlockQ8_0, qs) + 16>(raw, tile.codes + 4);
    for (auto& codes : tile.codes)
        codes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));  // the offset is 128
}

// A K type's scales: small integers, eight of each unit, times a float of each unit.
inline Lanes scale_factors(__m128i integers, Lanes unit) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(integers)) * unit;
}
template <class T>
inline T load_as(const uint8_t* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}
// One half of each unit as a float in that unit's lanes; and two neighbouring ones.
inline Lanes load_half(const uint8_t* const (&units)[2], int offset) {
    const __m128 values =
        _mm_cvtph_ps(_mm_set_epi16(0, 0, 0, 0, 0, 0, load_as<int16_t>(units[1] + offset),
                                   load_as<int16_t>(units[0] + offset)));
    const __m512i index = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(values));
}
inline void load_two_halves(const uint8_t* const (&units)[2], int offset, Lanes& first,
                            Lanes& second) {
    const __m128 values = _mm_cvtph_ps(
        _mm_set_epi32(0, 0, load_as<int>(units[1] + offset), load_as<int>(units[0] + offset)));
    const __m512i index = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    first = _mm512_permutexvar_ps(index, _mm512_castps128_ps512(values));
    second = _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(1)),
                                   _mm512_castps128_ps512(values));
}

// Sixteen bytes of each unit, of which number 2·c + part belongs to chain c: parts[part] has those
// of both units.
inline void split_parts(__m128i first, __m128i second, __m128i (&parts)[2]) {
    const __m128i evens_odds = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    first = _mm_shuffle_epi8(first, evens_odds);
    second = _mm_shuffle_epi8(second, evens_odds);
    parts[0] = _mm_unpacklo_epi64(first, second);
    parts[1] = _mm_unpackhi_epi64(first, second);
}
inline __m128i load_128(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Q4_K's and Q5_K's eight scales and eight minima of 6 bits, as BlockQ4_K describes them.
struct SixBits {
    uint64_t scales, minima;

    explicit SixBits(const uint8_t* p) {
        const auto a = load_as<uint32_t>(p), b = load_as<uint32_t>(p + 4),
                   c = load_as<uint32_t>(p + 8);
        const uint32_t scales_high = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
        const uint32_t minima_high = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
        scales = (a & 0x3f3f3f3f) | uint64_t(scales_high) << 32;
        minima = (b & 0x3f3f3f3f) | uint64_t(minima_high) << 32;
    }
};

template <class Block, class Tile>
inline void unpack_six_bit_factors(const uint8_t* const (&units)[2], Tile& tile) {
    const SixBits first(units[0] + offsetof(Block, scales)),
        second(units[1] + offsetof(Block, scales));
    Lanes d, dmin;
    load_two_halves(units, offsetof(Block, d), d, dmin);
    tile.factors[0] =
        scale_factors(_mm_set_epi64x(int64_t(second.scales), int64_t(first.scales)), d);
    tile.factors[1] = scale_factors(_mm_set_epi64x(int64_t(second.minima), int64_t(first.minima)),
                                    _mm512_setzero_ps() - dmin);
}

// Four runs of 32 bytes, each the low and the high nibbles of two chains.
template <class Tile>
inline void unpack_nibble_runs(const uint8_t* first, const uint8_t* second, Tile& tile) {
    // Quadwords i and i + 1 of all runs.
    constexpr auto map = [](int first) {
        OffsetMap result = {};
        for (int i = 0; i < 64; ++i)
            result.at[i] = uint16_t(i / 8 % 4 * 32 + (first + i / 32) * 8 + i % 8);
        return result;
    };
    constexpr auto nibble = [](int chain) { return chain % 2 * 4; };
    const Raw<128> raw0(first), raw1(second);
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i early[2] = {pick<map(0)>(raw0), pick<map(0)>(raw1)};
    const __m512i late[2] = {pick<map(2)>(raw0), pick<map(2)>(raw1)};
    const __m512i quads[4] = {
        _mm512_shuffle_i64x2(early[0], early[1], _MM_SHUFFLE(1, 0, 1, 0)),
        _mm512_shuffle_i64x2(early[0], early[1], _MM_SHUFFLE(3, 2, 3, 2)),
        _mm512_shuffle_i64x2(late[0], late[1], _MM_SHUFFLE(1, 0, 1, 0)),
        _mm512_shuffle_i64x2(late[0], late[1], _MM_SHUFFLE(3, 2, 3, 2)),
    };
    for (int i = 0; i < 4; ++i) {
        const __m512i even =
            _mm512_multishift_epi64_epi8(constant<bit_map(0, 8, nibble)>(), quads[i]);
        const __m512i odd =
            _mm512_multishift_epi64_epi8(constant<bit_map(1, 8, nibble)>(), quads[i]);
        tile.codes[2 * i] = _mm512_and_si512(even, mask);
        tile.codes[2 * i + 1] = _mm512_and_si512(odd, mask);
    }
}

// 32 bytes that several chains take different bits of; calls use(step, bits) with four bytes of
// each chain's own 32, where quarters[0] has the first 16 bytes for each lane and quarters[1] the
// last, and chain c's bits begin at shift(c).
template <class Shift, class Use>
inline void spread_bits(const __m512i (&quarters)[2], Shift shift, Use use) {
    constexpr ByteMap even = bit_map(0, 8, Shift{}), odd = bit_map(1, 8, Shift{});
    (void)shift;
    for (int i = 0; i < 2; ++i) {
        const __m512i low = _mm512_unpacklo_epi64(quarters[i], quarters[i]);
        const __m512i high = _mm512_unpackhi_epi64(quarters[i], quarters[i]);
        use(4 * i, _mm512_multishift_epi64_epi8(constant<even>(), low));
        use(4 * i + 1, _mm512_multishift_epi64_epi8(constant<odd>(), low));
        use(4 * i + 2, _mm512_multishift_epi64_epi8(constant<even>(), high));
        use(4 * i + 3, _mm512_multishift_epi64_epi8(constant<odd>(), high));
    }
}

// 32 bytes of each unit, for all its chains.
inline void share_run(const uint8_t* first, const uint8_t* second, __m512i (&quarters)[2]) {
    const __m512i both = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first))),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)), 1);
    quarters[0] = _mm512_shuffle_i64x2(both, both, _MM_SHUFFLE(2, 2, 0, 0));
    quarters[1] = _mm512_shuffle_i64x2(both, both, _MM_SHUFFLE(3, 3, 1, 1));
}
// 64 bytes of each unit: 32 for chains 0-3, 32 for chains 4-7.
inline void share_two_runs(const uint8_t* first, const uint8_t* second, __m512i (&quarters)[2]) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    quarters[0] = _mm512_shuffle_i64x2(a, b, _MM_SHUFFLE(2, 0, 2, 0));
    quarters[1] = _mm512_shuffle_i64x2(a, b, _MM_SHUFFLE(3, 1, 3, 1));
}

inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q2_k>& tile) {
    __m512i quarters[2];
    share_two_runs(units[0] + offsetof(BlockQ2_K, qs), units[1] + offsetof(BlockQ2_K, qs),
                   quarters);
    spread_bits(
        quarters, [](int chain) { return chain % 4 * 2; },
        [&](int step, __m512i bits) {
            tile.codes[step] = _mm512_and_si512(bits, _mm512_set1_epi8(3));
        });
    Lanes d, dmin;
    load_two_halves(units, offsetof(BlockQ2_K, d), d, dmin);
    __m128i parts[2];
    split_parts(load_128(units[0] + offsetof(BlockQ2_K, scales)),
                load_128(units[1] + offsetof(BlockQ2_K, scales)), parts);
    const __m128i mask = _mm_set1_epi8(15);
    for (int p = 0; p < 2; ++p) {
        tile.factors[p] = scale_factors(_mm_and_si128(parts[p], mask), d);
        tile.factors[2 + p] = scale_factors(_mm_and_si128(_mm_srli_epi16(parts[p], 4), mask),
                                            _mm512_setzero_ps() - dmin);
    }
}

// Q3_K's sixteen scales of 6 bits, as BlockQ3_K describes them, without their offset of 32.
inline __m128i unpack_q3_k_scales(const uint8_t* p) {
    constexpr uint64_t nibbles = 0x0f0f0f0f0f0f0f0f;
    constexpr uint32_t pairs = 0x03030303;
    const auto low = load_as<uint64_t>(p);
    const auto high = load_as<uint32_t>(p + 8);
    const uint64_t first = (high & pairs) | uint64_t(high >> 2 & pairs) << 32;
    const uint64_t second = (high >> 4 & pairs) | uint64_t(high >> 6 & pairs) << 32;
    const __m128i packed = _mm_set_epi64x(int64_t((low >> 4 & nibbles) | second << 4),
                                          int64_t((low & nibbles) | first << 4));
    return _mm_sub_epi8(packed, _mm_set1_epi8(32));
}

inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q3_k>& tile) {
    __m512i quarters[2];
    share_two_runs(units[0] + offsetof(BlockQ3_K, qs), units[1] + offsetof(BlockQ3_K, qs),
                   quarters);
    spread_bits(
        quarters, [](int chain) { return chain % 4 * 2; },
        [&](int step, __m512i bits) { tile.codes[step] = bits; });
    share_run(units[0] + offsetof(BlockQ3_K, hmask), units[1] + offsetof(BlockQ3_K, hmask),
              quarters);
    spread_bits(
        quarters, [](int chain) { return chain - 2; },
        [&](int step, __m512i bits) {
            tile.codes[step] = merge_bits(tile.codes[step], bits, 3, 7);
        });
    const Lanes d = load_half(units, offsetof(BlockQ3_K, d));
    __m128i parts[2];
    split_parts(unpack_q3_k_scales(units[0] + offsetof(BlockQ3_K, scales)),
                unpack_q3_k_scales(units[1] + offsetof(BlockQ3_K, scales)), parts);
    for (int p = 0; p < 2; ++p)
        tile.factors[p] = scale_factors(parts[p], d);
}

inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q4_k>& tile) {
    unpack_six_bit_factors<BlockQ4_K>(units, tile);
    unpack_nibble_runs(units[0] + offsetof(BlockQ4_K, qs), units[1] + offsetof(BlockQ4_K, qs),
                       tile);
}

inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q5_k>& tile) {
    unpack_six_bit_factors<BlockQ5_K>(units, tile);
    unpack_nibble_runs(units[0] + offsetof(BlockQ5_K, qs), units[1] + offsetof(BlockQ5_K, qs),
                       tile);
    __m512i quarters[2];
    share_run(units[0] + offsetof(BlockQ5_K, qh), units[1] + offsetof(BlockQ5_K, qh), quarters);
    spread_bits(
        quarters, [](int chain) { return chain - 4; },
        [&](int step, __m512i bits) {
            tile.codes[step] = merge_bits(tile.codes[step], bits, 15, 31);
        });
}

inline void unpack(const uint8_t* const (&units)[2], Tile<Type::q6_k>& tile) {
    // Four of the eight steps: lane by half of the unit (of chains 0-3 and 4-7), in it one quadword
    // per step, of which the dwords come from the runs of even and of odd chains.
    constexpr auto map = [](int first) {
        OffsetMap result = {};
        for (int i = 0; i < 64; ++i) {
            const int step = first + i / 32 * 2 + i / 8 % 2;
            result.at[i] = uint16_t(i / 16 % 2 * 64 + i / 4 % 2 * 32 + step * 4 + i % 4);
        }
        return result;
    };
    const Raw<128> raw0(units[0] + offsetof(BlockQ6_K, ql)),
        raw1(units[1] + offsetof(BlockQ6_K, ql));
    const __m512i early[2] = {pick<map(0)>(raw0), pick<map(0)>(raw1)};
    const __m512i late[2] = {pick<map(4)>(raw0), pick<map(4)>(raw1)};
    const __m512i steps[4] = {
        _mm512_shuffle_i64x2(early[0], early[1], _MM_SHUFFLE(1, 0, 1, 0)),
        _mm512_shuffle_i64x2(early[0], early[1], _MM_SHUFFLE(3, 2, 3, 2)),
        _mm512_shuffle_i64x2(late[0], late[1], _MM_SHUFFLE(1, 0, 1, 0)),
        _mm512_shuffle_i64x2(late[0], late[1], _MM_SHUFFLE(3, 2, 3, 2)),
    };
    const __m512i nibble = _mm512_set_epi32(4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0, 0, 4, 4, 0, 0);
    for (int i = 0; i < 4; ++i) {
        tile.codes[2 * i] = _mm512_srlv_epi32(_mm512_unpacklo_epi64(steps[i], steps[i]), nibble);
        tile.codes[2 * i + 1] =
            _mm512_srlv_epi32(_mm512_unpackhi_epi64(steps[i], steps[i]), nibble);
    }
    __m512i quarters[2];
    share_two_runs(units[0] + offsetof(BlockQ6_K, qh), units[1] + offsetof(BlockQ6_K, qh),
                   quarters);
    spread_bits(
        quarters, [](int chain) { return chain % 4 * 2 - 4; },
        [&](int step, __m512i bits) {
            tile.codes[step] = merge_bits(tile.codes[step], bits, 15, 63);
        });
    const Lanes d = load_half(units, offsetof(BlockQ6_K, d));
    __m128i parts[2];
    split_parts(load_128(units[0] + offsetof(BlockQ6_K, scales)),
                load_128(units[1] + offsetof(BlockQ6_K, scales)), parts);
    for (int p = 0; p < 2; ++p)
        tile.factors[p] = scale_factors(parts[p], d);
}

}  // namespace qi::kernels::avx512
