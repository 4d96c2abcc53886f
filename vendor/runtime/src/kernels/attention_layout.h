// Where things lie in a page of keys and values and in the scratch of an attention call. Constants
// only: this header is compiled for every instruction set.
#pragma once

#include "kernels/attention.h"

namespace qi::kernels {

// Queries computed together: 6 x 4 accumulators, 4 vectors of keys and a broadcast fit 32
// registers.
inline constexpr int query_block = 6;

// Dimensions that share a scale in Q8_0.
inline constexpr int q8_block = 32;

// Rows of floats in scratch are padded to whole vectors of any instruction set.
inline constexpr int row_padding = 16;

}  // namespace qi::kernels
