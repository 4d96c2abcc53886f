// Sums of weight rows, for one thread: A[t] += Σ_i H[t][i] · W[list[i]], the down projection of
// weights that are stored by neuron.
//
// One order. Every output is one chain of fused multiply-adds over the list, in its order, from the
// value found in A; weights enter as the floats that decode() gives. Terms with H[t][i] = 0 are
// left out, which changes nothing. So a token's sums do not depend on the tokens beside it, on how
// columns are shared out, nor on rows listed in vain.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/matmul.h"

namespace qi::kernels {

struct RowSums {
    const Weight& w;      // [n_neurons][n_cols]
    const int32_t* list;  // [n_rows], neurons in ascending order
    int64_t n_rows;
    const float* factors;  // H [n_tokens][factor_stride]
    int64_t factor_stride;
    bool by_neuron;  // a token's factors stand at the neuron's number, not at its place in the list
    int64_t n_tokens;
    int64_t col_begin, col_end;  // begins at a multiple of row_sum_cols
    float* sums;                 // A [n_tokens][sum_stride], from col_begin on
    int64_t sum_stride;
};

// Columns are shared out in multiples of this, a whole block of every type.
inline constexpr int64_t row_sum_cols = 256;

// Scratch one thread needs.
size_t row_sums_scratch_bytes();
void add_row_sums(const RowSums& args, std::byte* scratch);

}  // namespace qi::kernels
