// What all matrix kernels share: how prepared activations lie in memory, and the facts of the block
// formats. Constants only: files for different instruction sets include this.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/blocks.h"
#include "quant/types.h"

namespace qi::kernels {

// Block formats are computed by units of 256 weights of a row: 8 blocks of 32, each of which feeds
// its own float chain. Kernels whose registers have room for more chains take several units at once
// and declare their own n_chains and Q8Group.
inline constexpr int unit_size = 256;
inline constexpr int chain_size = 32;
inline constexpr int unit_chains = unit_size / chain_size;
inline constexpr int n_steps =
    chain_size / 4;  // of four products each, what a dot instruction sums
inline constexpr int n_chains = unit_chains;

// The activations of one group of blocks, quantised by 32s to x ≈ scale · code with codes in
// [-127, 127]. Prepared activations are [n_groups][n_tokens] of these, so that the tokens of a tile
// lie side by side; a last group that is not whole is padded with zeros.
template <int chains>
struct ActivationGroup {
    int8_t codes[n_steps][chains][4];  // step-major: one load feeds all chains
    float scales[chains];
    int16_t sums[chains][2];       // of the codes 0-15 and 16-31 of a block
    float scaled_sums[2][chains];  // scale · sum, by half
};
using Q8Group = ActivationGroup<n_chains>;
static_assert(sizeof(Q8Group) == 384);

// Float activations are [n_chunks][n_tokens][chunk]: 1024 columns (the last chunk fewer, padded
// with zeros to a multiple of 16), so that a tile's tokens are contiguous and stay in L1.
inline constexpr int64_t chunk_cols = 1024;
inline constexpr int64_t col_padding = 16;

// Weight bytes between the row of a list that is computed and the one fetched: DRAM's latency.
inline constexpr int64_t list_distance = 10 * 1024;

// What kernels need to know of a block format: weight = scale · (code - offset) + minimum.
struct Format {
    int unit_bytes;
    int parts;     // scales per block of 32: 1, or 2 where 16 weights share one
    int offset;    // 0 where there is a minimum
    bool minimum;  // a float per part beside the scale
    int max_code;
};

template <Type type>
inline constexpr Format format_of = {};
template <>
inline constexpr Format format_of<Type::q4_0> = {unit_chains * sizeof(BlockQ4_0), 1, 8, false, 15};
template <>
inline constexpr Format format_of<Type::q4_1> = {unit_chains * sizeof(BlockQ4_1), 1, 0, true, 15};
template <>
inline constexpr Format format_of<Type::q5_0> = {unit_chains * sizeof(BlockQ5_0), 1, 16, false, 31};
template <>
inline constexpr Format format_of<Type::q5_1> = {unit_chains * sizeof(BlockQ5_1), 1, 0, true, 31};
template <>
inline constexpr Format format_of<Type::q8_0> = {unit_chains * sizeof(BlockQ8_0), 1, 128, false,
                                                 255};
template <>
inline constexpr Format format_of<Type::q2_k> = {sizeof(BlockQ2_K), 2, 0, true, 3};
template <>
inline constexpr Format format_of<Type::q3_k> = {sizeof(BlockQ3_K), 2, 4, false, 7};
template <>
inline constexpr Format format_of<Type::q4_k> = {sizeof(BlockQ4_K), 1, 0, true, 15};
template <>
inline constexpr Format format_of<Type::q5_k> = {sizeof(BlockQ5_K), 1, 0, true, 31};
template <>
inline constexpr Format format_of<Type::q6_k> = {sizeof(BlockQ6_K), 2, 32, false, 63};

}  // namespace qi::kernels
