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

    // The rows of a tile that count for a token, with their factors.
    struct Kept {
        int rows[tile_list_rows];  // of the tile
        float factors[tile_list_rows];
        int n = 0;

        Kept(const RowSums& args, int64_t first, int n_rows, int64_t token) {
            const float* of_token = args.factors + token * args.factor_stride;
            for (int i = 0; i < n_rows; ++i) {
                const float factor = of_token[args.by_neuron ? args.list[first + i] : first + i];
                rows[n] = i;
                factors[n] = factor;
                n += factor != 0.0f;
            }
        }
    };

    // Rows [first, first + n) of the list, columns [col, col + n_cols), for all tokens.
    static void add_tile(const RowSums& args, int64_t first, int n, int64_t col, int64_t n_cols,
                         RowTile& tile) {
        // The same columns of the next tile's rows.
        for (int i = 0; i < n; ++i)
            prefetch_lines(row(args, first + i + tile_list_rows) + offset(col), offset(n_cols));
        float* sums = args.sums + (col - args.col_begin);
        if constexpr (Unit<type>::n > 1) {
            if (args.n_tokens == 1) return add_blocks(args, first, n, col, n_cols, sums);
        }
        for (int i = 0; i < n; ++i)
            widen<type>(row(args, first + i) + offset(col), n_cols, tile.weights[i]);
        for (int64_t t = 0; t < args.n_tokens; ++t) {
            const Kept kept(args, first, n, t);
            const float* rows[tile_list_rows];
            for (int i = 0; i < kept.n; ++i)
                rows[i] = tile.weights[kept.rows[i]];
            add_kept<tile_list_rows>(rows, kept.factors, kept.n, n_cols,
                                     sums + t * args.sum_stride);
        }
    }

    // For one token: a block's sums stay in registers while it is widened in all rows.
    static void add_blocks(const RowSums& args, int64_t first, int n, int64_t col, int64_t n_cols,
                           float* sums) {
        using Block = typename Unit<type>::Block;
        const Kept kept(args, first, n, 0);
        const uint8_t* rows[tile_list_rows];
        for (int i = 0; i < kept.n; ++i)
            rows[i] = row(args, first + kept.rows[i]) + offset(col);
        for (int64_t c = 0; c < n_cols; c += Unit<type>::n) {
            Vec block_sums[Unit<type>::n / width];
#pragma GCC unroll 16
            for (int i = 0; i < Unit<type>::n / width; ++i)
                block_sums[i] = load(sums + c + i * width);
            for (int i = 0; i < kept.n; ++i) {
                const Vec factor = broadcast(kept.factors[i]);
                widen_block(*reinterpret_cast<const Block*>(rows[i] + offset(c)),
                            [&](int column, Vec values) {
                                Vec& sum = block_sums[column / width];
                                sum = fma(factor, values, sum);
                            });
            }
#pragma GCC unroll 16
            for (int i = 0; i < Unit<type>::n / width; ++i)
                store(sums + c + i * width, block_sums[i]);
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
