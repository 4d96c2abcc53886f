// Row sums over a Vec; each instruction set's row_sums.cpp includes this after its simd_*.h.
//
// A tile of a few rows by 256 columns is decoded to floats in L1, then every token passes over it.
#pragma once

#include "kernels/prefetch_impl.h"
#include "kernels/row_sums_layout.h"
#include "kernels/row_sums_table.h"
#include "kernels/widen_impl.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// sums[c] += Σ_i factors[i] · rows[i][c] for n_rows rows of a tile.
template <int n_rows>
inline void add_rows(const float* const (&rows)[n_rows], const float (&factors)[n_rows],
                     int64_t n_cols, float* sums) {
    Vec scale[n_rows];
    for (int i = 0; i < n_rows; ++i)
        scale[i] = broadcast(factors[i]);
    int64_t c = 0;
    for (; c + width <= n_cols; c += width) {
        Vec sum = load(sums + c);
#pragma GCC unroll 8
        for (int i = 0; i < n_rows; ++i)
            sum = fma(scale[i], load(rows[i] + c), sum);
        store(sums + c, sum);
    }
    if (c == n_cols) return;
    Vec sum = load_partial(sums + c, n_cols - c);
    for (int i = 0; i < n_rows; ++i)
        sum = fma(scale[i], load_partial(rows[i] + c, n_cols - c), sum);
    store_partial(sums + c, sum, n_cols - c);
}

template <Type type>
struct Sums {
    static int64_t offset(int64_t col) { return col / Unit<type>::n * Unit<type>::n_bytes; }

    static const uint8_t* row(const RowSums& args, int64_t i) {
        const int64_t inside = i < args.n_rows ? i : args.n_rows - 1;
        return reinterpret_cast<const uint8_t*>(args.w.data) +
               size_t(args.list[inside]) * args.w.row_bytes;
    }

    // Rows [first, first + n) of the list, columns [col, col + n_cols), for all tokens.
    static void add_tile(const RowSums& args, int64_t first, int n, int64_t col, int64_t n_cols,
                         RowTile& tile) {
        for (int i = 0; i < n; ++i) {
            // The same columns of the next tile's rows.
            prefetch_lines(row(args, first + i + tile_list_rows) + offset(col), offset(n_cols));
            widen<type>(row(args, first + i) + offset(col), n_cols, tile.weights[i]);
        }
        for (int64_t t = 0; t < args.n_tokens; ++t) {
            const float* factors = args.factors + t * args.factor_stride;
            const float* rows[tile_list_rows];
            float kept[tile_list_rows];
            int n_kept = 0;
            for (int i = 0; i < n; ++i) {
                const float factor = factors[args.by_neuron ? args.list[first + i] : first + i];
                rows[n_kept] = tile.weights[i];
                kept[n_kept] = factor;
                n_kept += factor != 0.0f;
            }
            float* sums = args.sums + t * args.sum_stride + (col - args.col_begin);
            add_kept<tile_list_rows>(rows, kept, n_kept, n_cols, sums);
        }
    }

    // In ever smaller groups of rows, so that sums are read and written seldom.
    template <int n>
    static void add_kept(const float* const* rows, const float* factors, int n_kept, int64_t n_cols,
                         float* sums) {
        if (n_kept >= n) {
            const float* some_rows[n];
            float some_factors[n];
            for (int i = 0; i < n; ++i) {
                some_rows[i] = rows[i];
                some_factors[i] = factors[i];
            }
            add_rows<n>(some_rows, some_factors, n_cols, sums);
            rows += n;
            factors += n;
            n_kept -= n;
        }
        if constexpr (n > 1) add_kept<n / 2>(rows, factors, n_kept, n_cols, sums);
    }

    static void run(const RowSums& args, RowTile& tile) {
        for (int64_t first = 0; first < args.n_rows; first += tile_list_rows) {
            const int64_t rest = args.n_rows - first;
            const int n = int(rest < tile_list_rows ? rest : tile_list_rows);
            for (int64_t col = args.col_begin; col < args.col_end; col += row_sum_cols) {
                const int64_t n_cols = args.col_end - col;
                add_tile(args, first, n, col, n_cols < row_sum_cols ? n_cols : row_sum_cols, tile);
            }
        }
    }
};

}  // namespace

void add_row_sums(const RowSums& args, std::byte* scratch) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(scratch);
    RowTile& tile = *reinterpret_cast<RowTile*>((address + 63) / 64 * 64);
    switch (args.w.type) {
        case Type::f32:
            return Sums<Type::f32>::run(args, tile);
        case Type::f16:
            return Sums<Type::f16>::run(args, tile);
        case Type::bf16:
            return Sums<Type::bf16>::run(args, tile);
        case Type::q4_0:
            return Sums<Type::q4_0>::run(args, tile);
        case Type::q4_1:
            return Sums<Type::q4_1>::run(args, tile);
        case Type::q5_0:
            return Sums<Type::q5_0>::run(args, tile);
        case Type::q5_1:
            return Sums<Type::q5_1>::run(args, tile);
        case Type::q8_0:
            return Sums<Type::q8_0>::run(args, tile);
        case Type::q2_k:
            return Sums<Type::q2_k>::run(args, tile);
        case Type::q3_k:
            return Sums<Type::q3_k>::run(args, tile);
        case Type::q4_k:
            return Sums<Type::q4_k>::run(args, tile);
        case Type::q5_k:
            return Sums<Type::q5_k>::run(args, tile);
        case Type::q6_k:
            return Sums<Type::q6_k>::run(args, tile);
    }
}

}  // namespace qi::kernels::QI_SIMD_LEVEL
