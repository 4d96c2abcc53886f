// Block tiles for any processor: one row, unpacked by plain loops.
#pragma once

#include "kernels/matmul_layout.h"
#include "kernels/simd_portable.h"

namespace qi::kernels::portable {

inline Vec load_bf16(const uint16_t* p) {
    return Vec(Bits{p[0], p[1], p[2], p[3]} << 16);
}

inline constexpr int tile_rows = 1;
inline constexpr int sum_tiles = 1;
inline constexpr int sum_rows = sum_tiles * tile_rows;
inline constexpr int dot_tokens = 1;
inline constexpr int tile_tokens = 4;

// A float for each chain of each row of a tile; an integer likewise; a step's four codes likewise.
struct Lanes {
    Vec v[2];
};
struct Ints {
    int32_t v[n_chains];
};
using Codes = uint8_t[n_chains][4];

// One group of each row: codes with an offset, then a scale per part, then a minimum per part if
// there are minima.
template <Type type>
struct Tile {
    Codes codes[n_steps];
    Lanes factors[format_of<type>.parts * (format_of<type>.minimum ? 2 : 1)];
};

// What dot() does not subtract from codes by itself.
template <Type type>
inline constexpr int dot_offset = format_of<type>.offset;

inline Lanes load_lanes(const float (&p)[n_chains]) {
    return {load(p), load(p + width)};
}
inline Lanes operator*(Lanes a, Lanes b) {
    return {a.v[0] * b.v[0], a.v[1] * b.v[1]};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {fma(a.v[0], b.v[0], c.v[0]), fma(a.v[1], b.v[1], c.v[1])};
}

inline Ints zero_ints() {
    return {};
}
// first · p[chain][0] + second · p[chain][1]
inline Ints weigh_pairs(const int16_t (&p)[n_chains][2], int first, int second) {
    Ints sums;
    for (int c = 0; c < n_chains; ++c)
        sums.v[c] = first * p[c][0] + second * p[c][1];
    return sums;
}
// sums[t] += Σ w · x over `steps` steps of n tokens, from step `first` of x on.
template <Type type, int steps, int n>
inline void dot(Ints (&sums)[n], const Codes* w, const Q8Group* x, int first) {
    for (int t = 0; t < n; ++t)
        for (int s = 0; s < steps; ++s)
            for (int c = 0; c < n_chains; ++c)
                for (int i = 0; i < 4; ++i)
                    sums[t].v[c] += w[s][c][i] * x[t].codes[first + s][c][i];
}
inline Lanes to_float(Ints sums) {
    Lanes lanes;
    for (int c = 0; c < n_chains; ++c)
        lanes.v[c / width][c % width] = float(sums.v[c]);
    return lanes;
}
inline void add_chains(const Lanes (&chains)[sum_tiles], float (&totals)[sum_rows]) {
    totals[0] = sum(chains[0].v[0] + chains[0].v[1]);
}

template <class Block>
inline Block block_at(const uint8_t* p) {
    Block block;
    __builtin_memcpy(&block, p, sizeof block);
    return block;
}

template <class Lane>
inline void set_lane(Lane& lanes, int chain, float value) {
    lanes.v[chain / width][chain % width] = value;
}

// Codes of one chain in the order of the row.
inline void put_codes(const uint8_t (&codes)[chain_size], int chain, Codes (&out)[n_steps]) {
    for (int s = 0; s < n_steps; ++s)
        __builtin_memcpy(out[s][chain], codes + 4 * s, 4);
}

// Unpacks blocks of 32; codes(block, out) gives the codes of one.
template <class Block, class Take>
inline void unpack_blocks(const uint8_t* p, Codes (&out)[n_steps], Lanes* factors, Take take) {
    for (int c = 0; c < n_chains; ++c) {
        const auto block = block_at<Block>(p + c * sizeof(Block));
        uint8_t codes[chain_size];
        take(block, codes);
        put_codes(codes, c, out);
        set_lane(factors[0], c, f16_to_f32(block.d));
        if constexpr (requires { block.m; }) set_lane(factors[1], c, f16_to_f32(block.m));
    }
}

inline void take_nibbles(const uint8_t (&qs)[16], uint8_t (&codes)[chain_size]) {
    for (int i = 0; i < 16; ++i) {
        codes[i] = qs[i] & 15;
        codes[i + 16] = qs[i] >> 4;
    }
}

inline void add_fifth_bits(const uint8_t (&qh)[4], uint8_t (&codes)[chain_size]) {
    for (int i = 0; i < chain_size; ++i)
        codes[i] |= uint8_t((qh[i / 8] >> (i % 8) & 1) << 4);
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_0>& tile) {
    unpack_blocks<BlockQ4_0>(rows[0], tile.codes, tile.factors,
                             [](const auto& block, auto& codes) { take_nibbles(block.qs, codes); });
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_1>& tile) {
    unpack_blocks<BlockQ4_1>(rows[0], tile.codes, tile.factors,
                             [](const auto& block, auto& codes) { take_nibbles(block.qs, codes); });
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_0>& tile) {
    unpack_blocks<BlockQ5_0>(rows[0], tile.codes, tile.factors, [](const auto& block, auto& codes) {
        take_nibbles(block.qs, codes);
        add_fifth_bits(block.qh, codes);
    });
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_1>& tile) {
    unpack_blocks<BlockQ5_1>(rows[0], tile.codes, tile.factors, [](const auto& block, auto& codes) {
        take_nibbles(block.qs, codes);
        add_fifth_bits(block.qh, codes);
    });
}
inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q8_0>& tile) {
    unpack_blocks<BlockQ8_0>(rows[0], tile.codes, tile.factors, [](const auto& block, auto& codes) {
        for (int i = 0; i < chain_size; ++i)
            codes[i] = uint8_t(block.qs[i] + 128);
    });
}

// Codes of n bits each at a shift that depends on the chain: code of element i = bytes[i] >> shift
// & mask.
inline void take_bits(const uint8_t* bytes, int shift, int mask, uint8_t (&codes)[chain_size]) {
    for (int i = 0; i < chain_size; ++i)
        codes[i] = uint8_t(bytes[i] >> shift & mask);
}
// codes |= (bytes >> shift & mask) << left
inline void add_bits(const uint8_t* bytes, int shift, int mask, int left,
                     uint8_t (&codes)[chain_size]) {
    for (int i = 0; i < chain_size; ++i)
        codes[i] |= uint8_t((bytes[i] >> shift & mask) << left);
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q2_k>& tile) {
    const auto block = block_at<BlockQ2_K>(rows[0]);
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    for (int c = 0; c < n_chains; ++c) {
        uint8_t codes[chain_size];
        take_bits(block.qs + c / 4 * 32, c % 4 * 2, 3, codes);
        put_codes(codes, c, tile.codes);
        for (int part = 0; part < 2; ++part) {
            const uint8_t packed = block.scales[2 * c + part];
            set_lane(tile.factors[part], c, d * float(packed & 15));
            set_lane(tile.factors[2 + part], c, -dmin * float(packed >> 4));
        }
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q3_k>& tile) {
    const auto block = block_at<BlockQ3_K>(rows[0]);
    const float d = f16_to_f32(block.d);
    for (int c = 0; c < n_chains; ++c) {
        uint8_t codes[chain_size];
        take_bits(block.qs + c / 4 * 32, c % 4 * 2, 3, codes);
        add_bits(block.hmask, c, 1, 2, codes);
        put_codes(codes, c, tile.codes);
        for (int part = 0; part < 2; ++part) {
            const int i = 2 * c + part;
            const int low = i < 8 ? block.scales[i] & 15 : block.scales[i - 8] >> 4;
            const int high = block.scales[8 + i % 4] >> (i / 4 * 2) & 3;
            set_lane(tile.factors[part], c, d * float((low | high << 4) - 32));
        }
    }
}

// The scales and minima that Q4_K and Q5_K share.
template <class Block>
inline void unpack_scales(const Block& block, Lanes (&factors)[2]) {
    const float d = f16_to_f32(block.d), dmin = f16_to_f32(block.dmin);
    const uint8_t* s = block.scales;
    for (int c = 0; c < n_chains; ++c) {
        const int scale = c < 4 ? s[c] & 63 : (s[c + 4] & 15) | (s[c - 4] >> 6) << 4;
        const int minimum = c < 4 ? s[c + 4] & 63 : s[c + 4] >> 4 | (s[c] >> 6) << 4;
        set_lane(factors[0], c, d * float(scale));
        set_lane(factors[1], c, -dmin * float(minimum));
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q4_k>& tile) {
    const auto block = block_at<BlockQ4_K>(rows[0]);
    unpack_scales(block, tile.factors);
    for (int c = 0; c < n_chains; ++c) {
        uint8_t codes[chain_size];
        take_bits(block.qs + c / 2 * 32, c % 2 * 4, 15, codes);
        put_codes(codes, c, tile.codes);
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q5_k>& tile) {
    const auto block = block_at<BlockQ5_K>(rows[0]);
    unpack_scales(block, tile.factors);
    for (int c = 0; c < n_chains; ++c) {
        uint8_t codes[chain_size];
        take_bits(block.qs + c / 2 * 32, c % 2 * 4, 15, codes);
        add_bits(block.qh, c, 1, 4, codes);
        put_codes(codes, c, tile.codes);
    }
}

inline void unpack(const uint8_t* const (&rows)[tile_rows], Tile<Type::q6_k>& tile) {
    const auto block = block_at<BlockQ6_K>(rows[0]);
    const float d = f16_to_f32(block.d);
    for (int c = 0; c < n_chains; ++c) {
        uint8_t codes[chain_size];
        take_bits(block.ql + c / 4 * 64 + c % 2 * 32, c % 4 / 2 * 4, 15, codes);
        add_bits(block.qh + c / 4 * 32, c % 4 * 2, 3, 4, codes);
        put_codes(codes, c, tile.codes);
        for (int part = 0; part < 2; ++part)
            set_lane(tile.factors[part], c, d * float(block.scales[2 * c + part]));
    }
}

}  // namespace qi::kernels::portable
