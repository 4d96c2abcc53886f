// Products of weight rows with activations, for one thread: Y[t][r] = Σ_k W[r][k] · X[t][k].
//
// One K order. The value of Y[t][r] depends on W's row r, on X's row t, on K, on the type and on
// the instruction set, and on nothing else: not on the number of tokens, the range of rows asked
// for, or which kernel (row or panel) is chosen inside. Threads, prompt chunks and batches are
// therefore free to cut the work as they like.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/types.h"

namespace qi::kernels {

// A weight matrix as it lies in the file.
struct Weight {
    Type type;
    const std::byte* data;  // [n_rows][row_bytes]
    int64_t n_rows;
    int64_t n_cols;  // K, a multiple of the type's block size
    size_t row_bytes;
};

// Activations are first put into the form the weight type wants (float rows, or int8 blocks with
// scales and sums). A form is prepared once per distinct input and shared by all weights with the
// same form.
enum class ActivationForm : int { f32, q8_block32, q8_block256 };
ActivationForm activation_form(Type weight_type);

// Room for the prepared rows of n_tokens activations of n_cols floats.
size_t activation_bytes(ActivationForm form, int64_t n_cols, int64_t n_tokens);

// Prepares rows [begin, end) of x [n_tokens][x_stride]; different row ranges may be prepared by
// different threads.
void prepare_activations(ActivationForm form, const float* x, int64_t x_stride, int64_t n_cols,
                         int64_t n_tokens, int64_t begin, int64_t end, std::byte* prepared);

// Scratch one thread needs for matmul_rows with this weight and batch; 0 is possible.
size_t matmul_scratch_bytes(const Weight& w, int64_t n_tokens);

// Row ranges given to matmul_rows start at multiples of this, so that panels are whole.
inline constexpr int64_t row_granularity = 16;

// y[t * y_stride + r] for rows r in [row_begin, row_end) and all n_tokens rows of prepared
// activations.
void matmul_rows(const Weight& w, int64_t row_begin, int64_t row_end, const std::byte* prepared,
                 int64_t n_tokens, float* y, int64_t y_stride, std::byte* scratch);

// Columns of a weight that are left out together: a multiple of the type's block size, as many as
// the kernels of this machine take at a step.
int64_t column_group(Type weight_type);

// The numbers of the column groups of x [n_tokens][n_cols] in which a token has a value other than
// zero, ascending; returns how many. list: [ceil(n_cols / group)].
int64_t nonzero_groups(const float* x, int64_t n_cols, int64_t n_tokens, int64_t group,
                       int32_t* list);

// matmul_rows where only the listed column groups have activations other than zero: the same bits,
// and the weights of the other groups are not read. For few tokens, and where at most half of the
// groups are listed: then it takes 0.55 (Q8_0) to 1.0 (Q4_K) of the time of all, because pieces of
// rows come from memory at half the rate of whole ones.
void matmul_groups(const Weight& w, int64_t row_begin, int64_t row_end, const int32_t* groups,
                   int64_t n_groups, const std::byte* prepared, int64_t n_tokens, float* y,
                   int64_t y_stride);

// The same for rows chosen by number: y[t * y_stride + i] is row list[i]'s. Rows that follow in the
// list are fetched ahead, so a list in ascending order comes fastest.
void matmul_listed(const Weight& w, const int32_t* list, int64_t n_rows, const std::byte* prepared,
                   int64_t n_tokens, float* y, int64_t y_stride);

// Starts fetching the first rows of a list, which matmul_listed or add_row_sums will want soon;
// they fetch only what comes after those themselves.
void fetch_listed(const Weight& w, const int32_t* list, int64_t n_rows);

// One row of a weight as floats: embedding look-up.
void decode_row(const Weight& w, int64_t row, float* out);

}  // namespace qi::kernels
