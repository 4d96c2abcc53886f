// Products of one to a few weight rows with one to eight activation rows, by one warp or several.
//
// One order: a lane adds the blocks (float types: chunks of 16 bytes) first, first + step, … in one
// chain of fused multiply-adds per row and token; then the lanes are added by warp_sum. So a result
// depends on its row, its token and `step`, not on how many rows and tokens are computed together.
#pragma once

#include "weights.cuh"

// The input of a product: f32 rows for float types, q8 rows for block types.
struct Activations {
    const f32* x;  // [n_tokens][n_cols]
    const i8* codes;
    const f32* scales;
    const f32* sums;
    int n_cols;
    int n_tokens;

    // Columns beyond the last token repeat it; their results are not written.
    QI_DEVICE int token(int column) const { return min_of(column, n_tokens - 1); }
};

// ---- block types ----

// So many rows and blocks are loaded before the first is used: 64 to 128 bytes per lane on the way.
// With more tokens arithmetic hides the latency, and registers are short.
constexpr int loads_ahead(int n_columns) {
    return n_columns <= 2 ? 4 : n_columns <= 4 ? 2 : 1;
}

template <class Type, int n_columns, int n_rows, int n_ahead>
QI_DEVICE void add_blocks(const typename Type::Raw (&raw)[n_ahead][n_rows],
                          const int (&block)[n_ahead], const Activations& in,
                          f32 (&acc)[n_columns][n_rows]) {
    const int n_blocks = in.n_cols / 32;
#pragma unroll
    for (int u = 0; u < n_ahead; ++u) {
        if (block[u] >= n_blocks) break;
        u32 codes[n_rows][8];
        Factors<Type::parts> factors[n_rows];
#pragma unroll
        for (int r = 0; r < n_rows; ++r) {
            Type::codes(raw[u][r], codes[r]);
            factors[r] = Type::factors(raw[u][r], block[u]);
        }
#pragma unroll
        for (int c = 0; c < n_columns; ++c) {
            const int at = in.token(c) * n_blocks + block[u];
            const Quad* x = reinterpret_cast<const Quad*>(in.codes) + 2 * at;
            const Quad low = x[0], high = x[1];
            const f32 scale = in.scales[at];
            const Pair sums = reinterpret_cast<const Pair*>(in.sums)[at];
            const f32 first_sum = __uint_as_float(sums.v[0]);
            const f32 second_sum = __uint_as_float(sums.v[1]);
#pragma unroll
            for (int r = 0; r < n_rows; ++r) {
                i32 dot[2] = {0, 0};
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    dot[0] = __dp4a(i32(codes[r][q]), i32(low.v[q]), dot[0]);
                    dot[1] = __dp4a(i32(codes[r][4 + q]), i32(high.v[q]), dot[1]);
                }
                f32 sum = acc[c][r];
                if constexpr (Type::parts == 1) {
                    sum = fmaf(f32(dot[0] + dot[1]), mul(factors[r].scale[0], scale), sum);
                    if constexpr (Type::has_shift)
                        sum = fmaf(factors[r].shift[0], first_sum + second_sum, sum);
                } else {
                    sum = fmaf(f32(dot[0]), mul(factors[r].scale[0], scale), sum);
                    sum = fmaf(f32(dot[1]), mul(factors[r].scale[1], scale), sum);
                    sum = fmaf(factors[r].shift[0], first_sum, sum);
                    sum = fmaf(factors[r].shift[1], second_sum, sum);
                }
                acc[c][r] = sum;
            }
        }
    }
}

// ---- float types ----

template <int n>
QI_DEVICE void load_columns(const f32* row, int first, int n_cols, bool aligned, f32 (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
        if (aligned && first + i + 4 <= n_cols) {
            const Float4 four = *reinterpret_cast<const Float4*>(row + first + i);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                x[i + j] = four.v[j];
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                x[i + j] = first + i + j < n_cols ? row[first + i + j] : 0.0f;
        }
    }
}

template <class Type, int n_columns, int n_rows, int n_ahead>
QI_DEVICE void add_chunks(const typename Type::Raw (&raw)[n_ahead][n_rows],
                          const int (&chunk)[n_ahead], const Activations& in,
                          f32 (&acc)[n_columns][n_rows]) {
    constexpr int n = Type::chunk_cols;
    const bool aligned = in.n_cols % 4 == 0;
#pragma unroll
    for (int u = 0; u < n_ahead; ++u) {
        if (chunk[u] * n >= in.n_cols) break;
        f32 w[n_rows][n];
#pragma unroll
        for (int r = 0; r < n_rows; ++r)
            Type::values(raw[u][r], w[r]);
#pragma unroll
        for (int c = 0; c < n_columns; ++c) {
            f32 x[n];
            load_columns(in.x + i64(in.token(c)) * in.n_cols, chunk[u] * n, in.n_cols, aligned, x);
#pragma unroll
            for (int r = 0; r < n_rows; ++r)
#pragma unroll
                for (int i = 0; i < n; ++i)
                    acc[c][r] = fmaf(w[r][i], x[i], acc[c][r]);
        }
    }
}

// ---- both ----

// acc[c][r] = this lane's part of row r times token c; the whole is the sum over the lanes of
// `step` / 32 warps, whose first lanes begin at multiples of 32.
template <class Type, int n_columns, int n_rows>
QI_DEVICE void dot_rows(const Type& type, const u8* const (&rows)[n_rows], const Activations& in,
                        int first, int step, f32 (&acc)[n_columns][n_rows]) {
    constexpr int loads = loads_ahead(n_columns);
    constexpr int n_ahead = loads > n_rows ? loads / n_rows : 1;
#pragma unroll
    for (int c = 0; c < n_columns; ++c)
#pragma unroll
        for (int r = 0; r < n_rows; ++r)
            acc[c][r] = 0.0f;
    int unit_cols = 32;
    if constexpr (Type::is_float) unit_cols = Type::chunk_cols;
    const int n_units = ceil_div(in.n_cols, unit_cols);
    for (int unit = first; unit < n_units; unit += n_ahead * step) {
        typename Type::Raw raw[n_ahead][n_rows];
        int at[n_ahead];
#pragma unroll
        for (int u = 0; u < n_ahead; ++u) {
            at[u] = unit + u * step;
#pragma unroll
            for (int r = 0; r < n_rows; ++r)
                raw[u][r] = type.load(rows[r], min_of(at[u], n_units - 1));
        }
        if constexpr (Type::is_float)
            add_chunks<Type, n_columns, n_rows, n_ahead>(raw, at, in, acc);
        else
            add_blocks<Type, n_columns, n_rows, n_ahead>(raw, at, in, acc);
    }
}
