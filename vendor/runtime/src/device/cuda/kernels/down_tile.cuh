// y[t] += Σ h[t][k] · W[k] for many tokens: the down projection of weights that are stored by
// neuron, whose rows lie along K.
//
// Bytes: weights once per 64 tokens, h once per tile of columns; 2 · n_neurons · n_cols operations
// per token are the limit from about 64 tokens on. Shape: 256 threads, 64 tokens; 128 columns by
// tensor cores, or 64 by plain multiply-adds. Weights are decoded once per tile, 32 rows at a time,
// and the next 32 are on their way while these are multiplied. K is split over grid.z, by a factor
// that the launch fixes, where tiles alone do not fill the card.
//
// Tensor cores: h enters as two halves (22 bits), brought to a common size by powers of two, per
// token and 32 neurons, so that no magnitude overflows. Weights are one half where they are F16,
// and two where they are blocks: nothing is lost that sums of floats would keep, and a product
// costs two or three on halves. F32 and BF16 do not fit halves: they are multiplied as floats.
//
// Order: one chain by ascending slot within a part of K, 32 neurons at a time; parts are added in
// order by whoever reads them.
#pragma once

#include "mma.cuh"
#include "weights.cuh"

constexpr int down_threads = 256;
constexpr int down_tokens = 64;
constexpr int down_step = 32;  // neurons

struct DownTile {
    const u8* rows;
    i64 row_stride;
    int n_rows, n_cols;
    const f32* h;  // [n_tokens][h_stride]
    i64 h_stride;
    int n_tokens;
    const f32* bias;  // or null
    f32* y;           // [n_tokens][n_cols]; with parts [grid.z][n_tokens][n_cols], written

    QI_DEVICE int first_row() const {
        const i64 n_steps = ceil_div(n_rows, down_step);
        return int(n_steps * blockIdx.z / gridDim.z) * down_step;
    }
    QI_DEVICE int end_row() const {
        const i64 n_steps = ceil_div(n_rows, down_step);
        return min_of(int(n_steps * (blockIdx.z + 1) / gridDim.z) * down_step, n_rows);
    }
    // Eight of this thread's token, from column 8 · (threadIdx.x % 4) of a step on; zeros beyond.
    QI_DEVICE void load_h(int first, int end, f32 (&values)[8]) const {
        const int token = int(blockIdx.y) * down_tokens + int(threadIdx.x) / 4;
        const int column = first + 8 * (int(threadIdx.x) % 4);
        const f32* from = h + token * h_stride + column;
        const bool aligned = h_stride % 4 == 0;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            if (aligned && token < n_tokens && column + i + 4 <= end) {
                const Float4 four = *reinterpret_cast<const Float4*>(from + i);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    values[i + j] = four.v[j];
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    values[i + j] = token < n_tokens && column + i + j < end ? from[i + j] : 0.0f;
            }
        }
    }
    // Where a token's sums go, or null.
    QI_DEVICE f32* row_of(int token) const {
        if (token >= n_tokens) return nullptr;
        const i64 part = gridDim.z > 1 ? i64(blockIdx.z) * n_tokens : 0;
        return y + (part + token) * n_cols;
    }
    QI_DEVICE void put(f32* row, int column, f32 sum) const {
        if (!row || column >= n_cols) return;
        if (gridDim.z == 1) {
            if (bias) sum += bias[column];
            sum += row[column];
        }
        row[column] = sum;
    }
};

// ---- by tensor cores ----

// w_halves: how many a weight is.
template <int w_halves>
struct DownHalves {
    static constexpr int tile_cols = 128;
    static constexpr int w_stride = tile_cols + 8;     // halves; rows begin in different banks
    static constexpr int h_words = down_step / 2 + 4;  // likewise
    u16 w[w_halves][down_step][w_stride];
    u32 high[down_tokens][h_words];
    u32 low[down_tokens][h_words];
    f32 back[down_tokens];  // undoes each token's power of two
};

template <class Type, int w_halves>
QI_DEVICE void down_by_halves(const DownTile& d) {
    using Shared = DownHalves<w_halves>;
    extern __shared__ char shared_bytes[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
    constexpr int n_chunks = Shared::tile_cols / 8, rows_apart = down_threads / n_chunks;
    constexpr int n_loads = down_step / rows_apart, n_tiles = 8;
    const Type type(d.n_cols);
    const int chunk = int(threadIdx.x) % n_chunks, row = int(threadIdx.x) / n_chunks;
    const int global_chunk = min_of(int(blockIdx.x) * n_chunks + chunk, ceil_div(d.n_cols, 8) - 1);
    const int begin = d.first_row(), end = d.end_row();
    const int token_warp = warp_id() % 4, column_warp = warp_id() / 4;
    const int g = lane_id() / 4, i = lane_id() % 4;

    typename Type::Raw8 w[n_loads];
    const auto load = [&](int first) {
#pragma unroll
        for (int n = 0; n < n_loads; ++n) {
            const int k = first + row + n * rows_apart;
            // Rows beyond the end meet zeros of h, which infinite weights would make NaN.
            w[n] = {};
            if (k < end) w[n] = type.load8(d.rows + k * d.row_stride, global_chunk);
        }
    };
    const auto store = [&](int first) {
        f32 h[8];  // from L2: not worth the registers that having it on its way takes
        d.load_h(first, end, h);
        const int column = Type::first_column(chunk);
#pragma unroll
        for (int n = 0; n < n_loads; ++n) {
            f32 values[8];
            Type::values8(w[n], global_chunk, values);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const SplitPair left(values[4 * part], values[4 * part + 1]);
                const SplitPair right(values[4 * part + 2], values[4 * part + 3]);
                const int at = column + part * Type::second_part;
                *reinterpret_cast<Pair*>(&shared.w[0][row + n * rows_apart][at]) = {
                    {left.high, right.high}};
                if constexpr (w_halves == 2)
                    *reinterpret_cast<Pair*>(&shared.w[1][row + n * rows_apart][at]) = {
                        {left.low, right.low}};
            }
        }
        f32 largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            largest = fmaxf(largest, fabsf(h[j]));
        largest = fmaxf(largest, __shfl_xor_sync(QI_WARP_MASK, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(QI_WARP_MASK, largest, 2));
        const f32 power = power_for(largest);
        const int token = int(threadIdx.x) / 4, quarter = int(threadIdx.x) % 4;
        if (quarter == 0) shared.back[token] = 1.0f / power;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const SplitPair pair(h[2 * j] * power, h[2 * j + 1] * power);
            shared.high[token][4 * quarter + j] = pair.high;
            shared.low[token][4 * quarter + j] = pair.low;
        }
    };

    f32 acc[n_tiles][4];
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            acc[n][j] = 0.0f;
    if (begin < end) load(begin);
    for (int first = begin; first < end; first += down_step) {
        store(first);
        __syncthreads();
        if (first + down_step < end) load(first + down_step);

        const f32 back[2] = {shared.back[16 * token_warp + g],
                             shared.back[16 * token_warp + g + 8]};
        // 32 columns at a time, so that registers are left for what is on its way.
#pragma unroll
        for (int n = 0; n < n_tiles; n += 4) {
            f32 sums[4][4];
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    sums[m][j] = 0.0f;
#pragma unroll
            for (int k = 0; k < down_step / 16; ++k) {
                u32 high[4], low[4];
                load_f16_rows(high, &shared.high[16 * token_warp][8 * k], Shared::h_words);
                load_f16_rows(low, &shared.low[16 * token_warp][8 * k], Shared::h_words);
#pragma unroll
                for (int m = 0; m < 4; m += 2) {
                    u32 b[4];
                    const int column = 64 * column_warp + 8 * (n + m);
                    if constexpr (w_halves == 2) {
                        load_f16_k16(b, &shared.w[1][16 * k][column], Shared::w_stride);
                        mma_f16_k16(sums[m], high, b[0], b[1]);
                        mma_f16_k16(sums[m + 1], high, b[2], b[3]);
                    }
                    load_f16_k16(b, &shared.w[0][16 * k][column], Shared::w_stride);
                    mma_f16_k16(sums[m], low, b[0], b[1]);
                    mma_f16_k16(sums[m + 1], low, b[2], b[3]);
                    mma_f16_k16(sums[m], high, b[0], b[1]);
                    mma_f16_k16(sums[m + 1], high, b[2], b[3]);
                }
            }
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    acc[n + m][j] = fmaf(sums[m][j], back[j / 2], acc[n + m][j]);
        }
        __syncthreads();
    }
    const int token = int(blockIdx.y) * down_tokens + 16 * token_warp + g;
    const int column = int(blockIdx.x) * Shared::tile_cols + 64 * column_warp + 2 * i;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        f32* const to = d.row_of(token + 8 * r);
#pragma unroll
        for (int n = 0; n < n_tiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j)
                d.put(to, column + 8 * n + j, acc[n][2 * r + j]);
    }
}

// ---- by plain multiply-adds ----

struct DownFloats {
    static constexpr int tile_cols = 64;
    f32 w[down_step][tile_cols + 4];
    f32 h[down_step][down_tokens + 4];  // transposed: a neuron's tokens side by side
};

template <class Type>
QI_DEVICE void down_by_floats(const DownTile& d) {
    extern __shared__ char shared_bytes[];
    DownFloats& shared = *reinterpret_cast<DownFloats*>(shared_bytes);
    constexpr int n_chunks = DownFloats::tile_cols / 8;
    const Type type(d.n_cols);
    const int chunk = int(threadIdx.x) % n_chunks, row = int(threadIdx.x) / n_chunks;
    const int global_chunk = min_of(int(blockIdx.x) * n_chunks + chunk, ceil_div(d.n_cols, 8) - 1);
    const int begin = d.first_row(), end = d.end_row();
    const int out_column = int(threadIdx.x) % 16 * 4, out_token = int(threadIdx.x) / 16 * 4;

    f32 w[8] = {}, h[8] = {};
    const auto load = [&](int first) {
        if (first + row < end) type.decode8(d.rows + (first + row) * d.row_stride, global_chunk, w);
        d.load_h(first, end, h);
    };
    f32 acc[4][4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int c = 0; c < 4; ++c)
            acc[t][c] = 0.0f;
    if (begin < end) load(begin);
    for (int first = begin; first < end; first += down_step) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            shared.w[row][8 * chunk + j] = w[j];
            shared.h[8 * (threadIdx.x % 4) + j][threadIdx.x / 4] = h[j];
        }
        __syncthreads();
        if (first + down_step < end) load(first + down_step);
        const int n = min_of(down_step, end - first);
#pragma unroll 4
        for (int k = 0; k < n; ++k) {
            const Float4 of_columns = *reinterpret_cast<const Float4*>(&shared.w[k][out_column]);
            const Float4 of_tokens = *reinterpret_cast<const Float4*>(&shared.h[k][out_token]);
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    acc[t][c] = fmaf(of_tokens.v[t], of_columns.v[c], acc[t][c]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        f32* const to = d.row_of(int(blockIdx.y) * down_tokens + out_token + t);
#pragma unroll
        for (int c = 0; c < 4; ++c)
            d.put(to, int(blockIdx.x) * DownFloats::tile_cols + out_column + c, acc[t][c]);
    }
}

// ---- which ----

// How many halves a weight is; 0: it does not fit halves.
template <class Type>
struct DownForm {
    static constexpr int w_halves = Type::is_float ? 0 : 2;
};
template <>
struct DownForm<F16> {
    static constexpr int w_halves = 1;
};

template <class Type>
QI_DEVICE void down_tile(const DownTile& d) {
    if constexpr (DownForm<Type>::w_halves > 0)
        down_by_halves<Type, DownForm<Type>::w_halves>(d);
    else
        down_by_floats<Type>(d);
}
