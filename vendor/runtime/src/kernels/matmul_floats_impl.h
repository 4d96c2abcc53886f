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
inline constexpr size_t float_panel_bytes = 256 * 1024;

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
    static void rows(const Product& product, int64_t row_begin, std::byte* scratch) {
        if (product.n_tokens > float_tokens) {
            const int64_t step = panel_rows(product.w.n_cols);
            for (int64_t row = row_begin; row < product.row_end; row += step) {
                const int64_t end = row + step < product.row_end ? row + step : product.row_end;
                multiply_panel(product, row, end, scratch);
            }
            return;
        }
        for (int64_t row = row_begin; row < product.row_end; row += float_rows)
            for_token_tiles<float_tokens>(0, product.n_tokens, [&]<int n>(int64_t token) {
                multiply_rows<n>(product, row, token);
            });
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

    template <int n>
    static void add_column(const Vec (&weights)[float_rows], const float* x, int64_t x_stride,
                           Vec (&sums)[float_rows][n]) {
        for (int t = 0; t < n; ++t) {
            const Vec column = load(x + t * x_stride);
            for (int r = 0; r < float_rows; ++r)
                sums[r][t] = fma(weights[r], column, sums[r][t]);
        }
    }

    template <int n>
    static void put(const Product& product, int64_t row, int64_t token,
                    const Vec (&sums)[float_rows][n]) {
        for (int r = 0; r < float_rows; ++r)
            for (int t = 0; t < n; ++t)
                product.put(row + r, token + t, sum(sums[r][t]));
    }

    template <int n>
    static void multiply_rows(const Product& product, int64_t row, int64_t token) {
        const uint8_t* at[float_rows];
        for (int r = 0; r < float_rows; ++r)
            at[r] = product.row(row + r);
        Vec weights[float_rows], sums[float_rows][n] = {};
        for (int64_t first = 0; first < product.w.n_cols; first += chunk_cols) {
            const int64_t size = chunk_size(product, first), stride = padded(size);
            const float* x = activations(product, first, size, token);
            int64_t k = 0;
            for (; k + line_cols <= size; k += line_cols) {
                for (int r = 0; r < float_rows; ++r)
                    prefetch_ahead(at[r], cache_line);
                for (int64_t i = 0; i < line_cols; i += width) {
                    for (int r = 0; r < float_rows; ++r)
                        weights[r] = load_weights<type>(at[r] + i * element_bytes<type>);
                    add_column(weights, x + k + i, stride, sums);
                }
                for (int r = 0; r < float_rows; ++r)
                    at[r] += cache_line;
            }
            for (; k < size; k += width) {
                const int64_t rest = size - k < width ? size - k : width;
                for (int r = 0; r < float_rows; ++r) {
                    weights[r] = load_weights_partial<type>(at[r], rest);
                    at[r] += rest * element_bytes<type>;
                }
                add_column(weights, x + k, stride, sums);
            }
        }
        put(product, row, token, sums);
    }

    // Rows as floats, chunk after chunk: [n_chunks][n_rows][padded chunk].
    static void widen_panel(const Product& product, int64_t row_begin, int64_t n_rows,
                            float* panel) {
        for (int64_t first = 0; first < product.w.n_cols; first += chunk_cols) {
            const int64_t size = chunk_size(product, first), stride = padded(size);
            for (int64_t r = 0; r < n_rows; ++r) {
                const uint8_t* at = product.row(row_begin + r) + first * element_bytes<type>;
                float* out = panel + first * n_rows + r * stride;
                int64_t k = 0;
                for (; k + width <= size; k += width)
                    store(out + k, load_weights<type>(at + k * element_bytes<type>));
                if (k < size)
                    store(out + k,
                          load_weights_partial<type>(at + k * element_bytes<type>, size - k));
            }
        }
    }

    static void multiply_panel(const Product& product, int64_t row_begin, int64_t row_end,
                               std::byte* scratch) {
        const int64_t n_tiles = ceil_div(row_end - row_begin, float_rows);
        const int64_t n_rows = n_tiles * float_rows, n_cols = product.w.n_cols;
        auto* panel = align_up<float>(scratch);
        float* kept =
            panel + n_rows * padded(n_cols);  // [n_tiles][float_rows][float_tokens][width]
        widen_panel(product, row_begin, n_rows, panel);
        for_token_tiles<float_tokens>(0, product.n_tokens, [&]<int n>(int64_t token) {
            for (int64_t first = 0; first < n_cols; first += chunk_cols) {
                const int64_t size = chunk_size(product, first), stride = padded(size);
                const float* x = activations(product, first, size, token);
                for (int64_t i = 0; i < n_tiles; ++i) {
                    float* tile_sums = kept + i * float_rows * float_tokens * width;
                    Vec weights[float_rows], sums[float_rows][n] = {};
                    for (int j = 0; first > 0 && j < float_rows * n; ++j)
                        sums[j / n][j % n] = load(tile_sums + j * width);
                    const float* w = panel + first * n_rows + i * float_rows * stride;
                    for (int64_t k = 0; k < size; k += width) {
                        for (int r = 0; r < float_rows; ++r)
                            weights[r] = load(w + r * stride + k);
                        add_column(weights, x + k, stride, sums);
                    }
                    if (first + size == n_cols)
                        put(product, row_begin + i * float_rows, token, sums);
                    else
                        for (int j = 0; j < float_rows * n; ++j)
                            store(tile_sums + j * width, sums[j / n][j % n]);
                }
            }
        });
    }
};

}  // namespace

}  // namespace qi::kernels::QI_SIMD_LEVEL
