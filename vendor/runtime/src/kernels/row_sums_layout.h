// What all row-sum kernels share. Constants only: files for different instruction sets include
// this.
#pragma once

#include "kernels/row_sums.h"

namespace qi::kernels {

// Rows decoded together: few enough for the tile to stay in L1, enough to read and write the sums
// once for several rows.
inline constexpr int tile_list_rows = 8;

struct RowTile {
    float weights[tile_list_rows][row_sum_cols];
};

}  // namespace qi::kernels
