// partial[p][t] = Σ h[t][i] · down_i over the listed neurons of partition p, the down projection of
// weights that are stored by neuron; QI_WEIGHT names their type.
//
// Bytes: one row per neuron that any token gives a value other than 0. Shape: a thread has 8
// columns in registers and four rows on the way; a warp has 256 columns and one of the 8 runs of a
// partition, so rows are read in pieces of 128 to 1024 contiguous bytes, and n_embd = 4096 makes
// 2048 warps. Order: a run is one chain of fused multiply-adds by ascending neuron, the 8 runs are
// added in order, and the next kernel adds the 16 partitions in order. Runs are cut by neuron
// number, so a sum does not depend on which neurons are listed beside the active ones.
#include "down_tile.cuh"
#include "weights.cuh"

constexpr int n_runs = 8;  // of a partition, a warp each
constexpr int tile_cols = 256;
constexpr int rows_ahead = 4;

template <int n_columns>
QI_DEVICE void down_rows(const u8* rows, i64 row_stride, int n_cols, const i32* slots,
                         const i32* bounds, int n_neurons, const f32* h, i64 h_stride,
                         const i32* ids, int by_id, int n_tokens, f32* partial) {
    using Type = QI_WEIGHT;
    extern __shared__ char shared_bytes[];
    auto* const runs = reinterpret_cast<f32(*)[tile_cols]>(shared_bytes);  // [n_runs]
    const Type type(n_cols);
    const int partition = int(blockIdx.y), first_token = int(blockIdx.z) * n_columns;
    const int chunk = int(blockIdx.x) * warp_size + lane_id();
    const int n_chunks = ceil_div(n_cols, 8);
    const int safe_chunk = min_of(chunk, n_chunks - 1);

    // Run r of partition p: places [bounds[8·p + r], bounds[8·p + r + 1]) of the list.
    const int run = partition * n_runs + warp_id(), last_run = int(gridDim.y) * n_runs;
    const int begin = bounds ? bounds[run] : int(i64(n_neurons) * run / last_run);
    const int end = bounds ? bounds[run + 1] : int(i64(n_neurons) * (run + 1) / last_run);

    const u8* first_row = rows + i64(begin < end && slots ? slots[begin] : 0) * row_stride;
    f32 acc[n_columns][8];
#pragma unroll
    for (int c = 0; c < n_columns; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            acc[c][i] = 0.0f;
    for (int place = begin; place < end; place += rows_ahead) {
        f32 factors[rows_ahead][n_columns];
        const u8* row[rows_ahead];
        bool wanted[rows_ahead];
        typename Type::Raw8 raw[rows_ahead];
#pragma unroll
        for (int u = 0; u < rows_ahead; ++u) {
            const int at = min_of(place + u, end - 1);
            const int h_at = by_id && ids ? ids[at] : at;
#pragma unroll
            for (int c = 0; c < n_columns; ++c) {
                const int token = first_token + c;
                const bool inside = place + u < end && token < n_tokens;
                factors[u][c] = inside ? h[token * h_stride + h_at] : 0.0f;
            }
            row[u] = rows + i64(slots ? slots[at] : at) * row_stride;
        }
        // All loads before the first use. The run's first row stands in for one that no token
        // wants: it comes from L2, and its products are left out.
#pragma unroll
        for (int u = 0; u < rows_ahead; ++u) {
            wanted[u] = false;
#pragma unroll
            for (int c = 0; c < n_columns; ++c)
                wanted[u] = wanted[u] || factors[u][c] != 0.0f;
            raw[u] = type.load8(wanted[u] ? row[u] : first_row, safe_chunk);
        }
#pragma unroll
        for (int u = 0; u < rows_ahead; ++u) {
            if (!wanted[u]) continue;
            f32 w[8];
            Type::values8(raw[u], safe_chunk, w);
#pragma unroll
            for (int c = 0; c < n_columns; ++c) {
                const f32 factor = factors[u][c];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (factor != 0.0f) acc[c][i] = fmaf(factor, w[i], acc[c][i]);
            }
        }
    }

    const int column = int(threadIdx.x);  // of the tile: this thread adds its runs
#pragma unroll
    for (int c = 0; c < n_columns; ++c) {
        const int at = Type::first_column(lane_id());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            runs[warp_id()][at + i] = acc[c][i];
            runs[warp_id()][at + Type::second_part + i] = acc[c][4 + i];
        }
        __syncthreads();
        f32 sum = runs[0][column];
#pragma unroll
        for (int r = 1; r < n_runs; ++r)
            sum += runs[r][column];
        const int token = first_token + c, out = int(blockIdx.x) * tile_cols + column;
        if (token < n_tokens && out < n_cols)
            partial[(i64(partition) * n_tokens + token) * n_cols + out] = sum;
        __syncthreads();
    }
}

// rows points at the first record's down row. grid (n_cols / 256, 16 partitions, tokens /
// n_columns), 256 threads, 8 KB of shared memory.
#define QI_DOWN(name, n_columns)                                                                   \
    QI_KERNEL name(const u8* rows, i64 row_stride, int n_cols, const i32* slots,                   \
                   const i32* bounds, int n_neurons, const f32* h, i64 h_stride, const i32* ids,   \
                   int by_id, int n_tokens, f32* partial) {                                        \
        down_rows<n_columns>(rows, row_stride, n_cols, slots, bounds, n_neurons, h, h_stride, ids, \
                             by_id, n_tokens, partial);                                            \
    }

QI_DOWN(qi_down_1, 1)
QI_DOWN(qi_down_2, 2)
QI_DOWN(qi_down_4, 4)
QI_DOWN(qi_down_8, 8)

// For many tokens, rows of all slots; with grid.z of 1 adds to y, else writes grid.z parts there.
// See down_tile.cuh. grid (n_cols / 128, for F32 and BF16 n_cols / 64; n_tokens / 64; parts), 256
// threads. Shared memory: launch.cpp's down_tile_shared.
QI_KERNEL qi_down_tile(const u8* rows, i64 row_stride, int n_rows, int n_cols, const f32* h,
                       i64 h_stride, int n_tokens, const f32* bias, f32* y) {
    down_tile<QI_WEIGHT>({rows, row_stride, n_rows, n_cols, h, h_stride, n_tokens, bias, y});
}
