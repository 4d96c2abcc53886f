// Products with float formats, weights widened to float.
//
// The order of float operations, per row and token: `width` chains, chain c taking columns c, c +
// width, ... in turn by fma; the chains are then added by sum(). The last columns are padded with
// zeros on both sides.
//
// Few tokens: weights are converted in registers. Many tokens: a panel of rows is converted to
// scratch that stays in L2, and tiles of tokens pass over it.
#pragma once

#include "kernels/matmul_layout.h"
#include "kernels/matmul_loops_impl.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// 4 rows by 6 tokens are 24 sums, which leaves 8 registers for operands; with 16 registers 4 by 3.
inline constexpr int float_rows = 4;
inline constexpr int float_tokens = n_registers == 32 ? 6 : 3;
inline constexpr size_t float_panel_bytes = 512 * 1024;

template <Type type>
inline constexpr int64_t element_bytes = type == Type::f32 ? 4 : 2;

template <Type type>
inline Vec load_weights(const uint8_t* p) {
    if constexpr (type == Type::f32) return load(reinterpret_cast<const float*>(p));
    if constexpr (type == Type::f16) return load_f16(reinterpret_cast<const uint16_t*>(p));
    if constexpr (type == Type::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p));
}

template <Type type>
inline Vec load_weights_partial(const uint8_t* p, int64_t n) {
    if constexpr (type == Type::f32) return load_partial(reinterpret_cast<const float*>(p), n);
    if constexpr (type == Type::f16)
        return load_f16_partial(reinterpret_cast<const uint16_t*>(p), n);
    if constexpr (type == Type::bf16) {
        uint16_t padded[width] = {};
        __builtin_memcpy(padded, p, size_t(n) * sizeof(uint16_t));
        return load_bf16(padded);
    }
}

template <Type type>
struct FloatKernels {
    static constexpr int64_t column_group = 256;  // of a chunk

    static void rows(const Product& product, int64_t row_begin, std::byte* scratch) {
        if (product.n_tokens > float_tokens && !product.picks()) {
            const int64_t step = panel_rows(product.w.n_cols);
            for (int64_t row = row_begin; row < product.row_end; row += step) {
                const int64_t end = row + step < product.row_end ? row + step : product.row_end;
                multiply_panel(product, row, end, scratch);
            }
            return;
        }
        for (int64_t row = row_begin; row < product.row_end; row += width) {
            const int64_t end = row + width < product.row_end ? row + width : product.row_end;
            for_token_tiles<float_tokens>(0, product.n_tokens, [&]<int n>(int64_t token) {
                Vec chains[width][n] = {};
                for (int64_t r = row; r < end; r += rows_together(n))
                    multiply_rows<n>(product, r, token, chains + (r - row));
                put<n>(product, row, end - row, token, [&](int i, int t) { return chains[i][t]; });
            });
        }
    }

    static size_t scratch_bytes(const Weight& w, int64_t n_tokens) {
        if (n_tokens <= float_tokens) return 0;
        const int64_t n_rows = panel_rows(w.n_cols);
        return size_t(n_rows * (padded(w.n_cols) + float_tokens * width)) * sizeof(float) +
               size_t(cache_line);
    }

  private:
    // Weights to the end of a cache line.
    static constexpr int64_t line_cols = cache_line / element_bytes<type>;

    static int64_t padded(int64_t n) { return ceil_div(n, col_padding) * col_padding; }

    static int64_t chunk_size(const Product& product, int64_t first) {
        const int64_t rest = product.w.n_cols - first;
        return rest < chunk_cols ? rest : chunk_cols;
    }

    static int64_t panel_rows(int64_t n_cols) {
        const auto fitting = int64_t(float_panel_bytes / (size_t(padded(n_cols)) * sizeof(float)));
        return fitting < row_granularity ? row_granularity : fitting / float_rows * float_rows;
    }

    // Activations [n_tokens][padded(n)] of the chunk of n columns that begins at `first`.
    static const float* activations(const Product& product, int64_t first, int64_t n,
                                    int64_t token) {
        const auto* x = reinterpret_cast<const float*>(product.prepared);
        return x + first * product.n_tokens + token * padded(n);
    }

    // Calls body(row, token) for all sums of a tile, unrolled: the sums must not leave their
    // registers.
    template <int n, class Body>
    static void for_sums(Body body) {
#pragma GCC unroll 8
        for (int r = 0; r < float_rows; ++r)
#pragma GCC unroll 8
            for (int t = 0; t < n; ++t)
                body(r, t);
    }

    template <int n_rows, int n>
    static void add_column(const Vec (&weights)[n_rows], const float* x, int64_t x_stride,
                           Vec (&sums)[n_rows][n]) {
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
            const Vec column = load(x + t * x_stride);
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; ++r)
                sums[r][t] = fma(weights[r], column, sums[r][t]);
        }
    }

    // Adds the chains of the first of n_rows rows from `row` on with n tokens: chain(row's number,
    // token's).
    template <int n, class Chain>
    static void put(const Product& product, int64_t row, int64_t n_rows, int64_t token,
                    Chain chain) {
        const int64_t n_summed = n_rows < width ? n_rows : width;
        for (int t = 0; t < n; ++t) {
            Vec of_token[width] = {};
            for (int i = 0; i < n_summed; ++i)
                of_token[i] = chain(i, t);
            float totals[width];
            store(totals, sums(of_token));
            product.put(row, token + t, totals, n_summed);
        }
    }

    // Rows read side by side: one stream comes fastest from memory, more share the loads of several
    // tokens. Wide elements leave the processor's own prefetching enough time: asking for lines
    // ahead cost 15 % here, while block formats gain by it.
    static constexpr int rows_together(int n_tokens) {
        return n_tokens > 2 ? float_rows : 1;
    }

    template <int n>
    [[gnu::flatten]] static void multiply_rows(const Product& product, int64_t row, int64_t token,
                                               Vec (*chains)[n]) {
        constexpr int n_rows = rows_together(n);
        const uint8_t *rows[n_rows], *ahead[n_rows] = {};
        for (int r = 0; r < n_rows; ++r) {
            rows[r] = product.row(row + r);
            if (product.picks()) ahead[r] = product.row(row + r + product.places_ahead);
        }
        Vec weights[n_rows], sums[n_rows][n] = {};
        // All chunks, or the picked groups of them.
        const int64_t run = product.groups ? column_group : chunk_cols;
        const int64_t n_runs =
            product.groups ? product.n_groups : ceil_div(product.w.n_cols, chunk_cols);
        for (int64_t i = 0; i < n_runs; ++i) {
            const int64_t begin = (product.groups ? product.groups[i] : i) * run;
            const int64_t first = begin / chunk_cols * chunk_cols;
            const int64_t chunk = chunk_size(product, first), stride = padded(chunk);
            const int64_t rest_of_chunk = first + chunk - begin;
            const int64_t size = rest_of_chunk < run ? rest_of_chunk : run;
            const float* x = activations(product, first, chunk, token) + (begin - first);
            const uint8_t* at[n_rows];
            for (int r = 0; r < n_rows; ++r)
                at[r] = rows[r] + begin * element_bytes<type>;
            int64_t k = 0;
            for (; k + line_cols <= size; k += line_cols) {
                if (product.picks())
                    for (int r = 0; r < n_rows; ++r)
                        prefetch_lines(ahead[r] + (begin + k) * element_bytes<type>, cache_line);
                for (int64_t c = 0; c < line_cols; c += width) {
                    for (int r = 0; r < n_rows; ++r)
                        weights[r] = load_weights<type>(at[r] + c * element_bytes<type>);
                    add_column(weights, x + k + c, stride, sums);
                }
                for (int r = 0; r < n_rows; ++r)
                    at[r] += cache_line;
            }
            for (; k < size; k += width) {
                const int64_t rest = size - k < width ? size - k : width;
                for (int r = 0; r < n_rows; ++r) {
                    weights[r] = load_weights_partial<type>(at[r], rest);
                    at[r] += rest * element_bytes<type>;
                }
                add_column(weights, x + k, stride, sums);
            }
        }
        for (int r = 0; r < n_rows; ++r)
            for (int t = 0; t < n; ++t)
                chains[r][t] = sums[r][t];
    }

    // Rows as floats, in the order sweeps take them, so that they are one stream:
    // [n_chunks][n_tiles][padded chunk / width][float_rows][width].
    static void widen_panel(const Product& product, int64_t row_begin, int64_t n_tiles,
                            float* out) {
        for (int64_t first = 0; first < product.w.n_cols; first += chunk_cols) {
            const int64_t size = chunk_size(product, first);
            for (int64_t i = 0; i < n_tiles; ++i, out += float_rows * padded(size)) {
                for (int r = 0; r < float_rows; ++r) {
                    const uint8_t* at =
                        product.row(row_begin + i * float_rows + r) + first * element_bytes<type>;
                    // The same columns of the next tile.
                    prefetch_from(at, float_rows * int64_t(product.w.row_bytes),
                                  size * element_bytes<type>);
                    for (int64_t k = 0; k < size; k += width, at += width * element_bytes<type>)
                        store(out + k * float_rows + r * width,
                              size - k >= width ? load_weights<type>(at)
                                                : load_weights_partial<type>(at, size - k));
                }
            }
        }
    }

    // The tiles of a panel, and where sums wait between chunks
    // [n_tiles][float_rows][float_tokens][width].
    struct Panel {
        int64_t row, n_tiles;
        float *weights, *kept;
    };
    static constexpr int64_t kept_size = float_rows * float_tokens * width;

    // A panel's products with n tokens over one chunk of columns.
    template <int n>
    [[gnu::flatten]] static void sweep(const Product& product, const Panel& panel, int64_t token,
                                       int64_t first) {
        const int64_t size = chunk_size(product, first), stride = padded(size);
        const float* x = activations(product, first, size, token);
        for (int64_t i = 0; i < panel.n_tiles; ++i) {
            const float* w = panel.weights + (first * panel.n_tiles + i * stride) * float_rows;
            float* kept = panel.kept + i * kept_size;
            Vec weights[float_rows], sums[float_rows][n] = {};
            if (first > 0)
                for_sums<n>([&](int r, int t) { sums[r][t] = load(kept + (r * n + t) * width); });
            for (int64_t k = 0; k < size; k += width, w += float_rows * width) {
                for (int r = 0; r < float_rows; ++r)
                    weights[r] = load(w + r * width);
                add_column(weights, x + k, stride, sums);
            }
            for_sums<n>([&](int r, int t) { store(kept + (r * n + t) * width, sums[r][t]); });
        }
    }

    static void multiply_panel(const Product& product, int64_t row_begin, int64_t row_end,
                               std::byte* scratch) {
        const int64_t n_cols = product.w.n_cols;
        Panel panel = {row_begin, ceil_div(row_end - row_begin, float_rows),
                       align_up<float>(scratch), nullptr};
        panel.kept = panel.weights + panel.n_tiles * float_rows * padded(n_cols);
        widen_panel(product, row_begin, panel.n_tiles, panel.weights);
        for_token_tiles<float_tokens>(0, product.n_tokens, [&]<int n>(int64_t token) {
            for (int64_t first = 0; first < n_cols; first += chunk_cols)
                sweep<n>(product, panel, token, first);
            constexpr int step = width / float_rows;
            for (int64_t i = 0; i < panel.n_tiles; i += step)
                put<n>(product, row_begin + i * float_rows, (panel.n_tiles - i) * float_rows, token,
                       [&](int row, int t) {
                           const float* kept = panel.kept + (i + row / float_rows) * kept_size;
                           return load(kept + (row % float_rows * n + t) * width);
                       });
        });
    }
};

}  // namespace

}  // namespace qi::kernels::QI_SIMD_LEVEL
