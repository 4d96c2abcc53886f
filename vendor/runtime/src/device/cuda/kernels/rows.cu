// Rows of a weight as numbers, pieces of a matrix for cuBLAS; QI_WEIGHT names the weights' type.
//
// Bytes: the rows once, and 2 or 4 bytes per value written, which is what dominates (a Q4_0 matrix
// grows from 0.56 to 2 bytes per weight). Shape: a thread per eight values, blocks of 256 threads
// along a row, grid.y over rows.
#include "weights.cuh"

template <class Store>
QI_DEVICE void widen(const u8* row, int n_cols, Store store) {
    using Type = QI_WEIGHT;
    const int chunk = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (8 * chunk >= n_cols) return;
    f32 values[8];
    Type(n_cols).decode8(row, chunk, values);
    const int at = Type::first_column(chunk);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int column = at + (i < 4 ? i : Type::second_part + i - 4);
        if (column < n_cols) store(column, values[i]);
    }
}

// out[i] = rows first + i, as f16 or with `bf16` as bfloat16. grid (n_cols / 2048, n).
QI_KERNEL qi_widen_to_half(const u8* rows, i64 row_stride, int n_cols, int first, int bf16,
                           u16* out) {
    const i64 row = blockIdx.y;
    widen(rows + (first + row) * row_stride, n_cols, [&](int column, f32 value) {
        out[row * n_cols + column] = bf16 ? f32_to_bf16(value) : f32_to_f16(value);
    });
}

// The same as floats.
QI_KERNEL qi_widen(const u8* rows, i64 row_stride, int n_cols, int first, f32* out) {
    const i64 row = blockIdx.y;
    widen(rows + (first + row) * row_stride, n_cols,
          [&](int column, f32 value) { out[row * n_cols + column] = value; });
}
