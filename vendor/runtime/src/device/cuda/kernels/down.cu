// y[t] += Σ h[t][i] · down_i over the listed neurons, the down projection of weights that are
// stored by neuron; QI_WEIGHT names their type.
//
// Bytes: one row per neuron that any token gives a value other than 0. Shape: a thread has 8
// columns in registers and four rows on the way; a warp has 256 columns and one of the 8 runs of
// one of the 16 partitions, so rows are read in pieces of 128 to 1024 contiguous bytes, and
// n_embd = 4096 makes 2048 warps. A lane looks at one neuron's values, and the warp walks those
// that are not 0. Order: a run is one chain of fused multiply-adds by ascending neuron, the 8 runs
// are added in order, and the block of a tile of columns that comes last adds the 16 partitions in
// order. Runs are cut by neuron number, so a sum does not depend on which neurons are listed beside
// the active ones.
#include "down_tile.cuh"
#include "weights.cuh"

constexpr int n_partitions = 16;
constexpr int n_runs = 8;  // of a partition, a warp each
constexpr int tile_cols = 256;
constexpr int rows_ahead = 4;

// Where a sum goes, and where its partitions stand until then.
struct Sum {
    f32* partial;     // [n_partitions][n_tokens][n_cols]
    u32* tickets;     // [tokens / n_columns][tiles of columns], zeros, left at zero
    const f32* bias;  // [n_cols], or null
    f32* y;           // [n_tokens][n_cols]
};

template <int n_columns>
QI_DEVICE void down_rows(const u8* rows, i64 row_stride, int n_cols, const i32* slots,
                         const i32* bounds, int n_neurons, const f32* h, i64 h_stride,
                         const i32* ids, int by_id, int n_tokens, const Sum& result) {
    using Type = QI_WEIGHT;
    extern __shared__ char shared_bytes[];
    auto* const runs = reinterpret_cast<f32(*)[tile_cols]>(shared_bytes);  // [n_runs]
    const Type type(n_cols);
    const int partition = int(blockIdx.y), first_token = int(blockIdx.z) * n_columns;
    const int chunk = int(blockIdx.x) * warp_size + lane_id();
    const int n_chunks = ceil_div(n_cols, 8);
    const int safe_chunk = min_of(chunk, n_chunks - 1);

    // Run r of partition p: places [bounds[8·p + r], bounds[8·p + r + 1]) of the list.
    const int run = partition * n_runs + warp_id();
    constexpr int all_runs = n_partitions * n_runs;
    const int begin = bounds ? bounds[run] : int(i64(n_neurons) * run / all_runs);
    const int end = bounds ? bounds[run + 1] : int(i64(n_neurons) * (run + 1) / all_runs);

    f32 acc[n_columns][8];
#pragma unroll
    for (int c = 0; c < n_columns; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            acc[c][i] = 0.0f;
    for (int first = begin; first < end; first += warp_size) {
        // Of this lane's neuron.
        const int place = min_of(first + lane_id(), end - 1);
        const int slot = slots ? slots[place] : place;
        const int h_at = by_id && ids ? ids[place] : place;
        f32 values[n_columns];
        bool any = false;
#pragma unroll
        for (int c = 0; c < n_columns; ++c) {
            const int token = first_token + c;
            const bool inside = first + lane_id() < end && token < n_tokens;
            values[c] = inside ? h[token * h_stride + h_at] : 0.0f;
            any = any || values[c] != 0.0f;
        }
        for (u32 left = __ballot_sync(QI_WARP_MASK, any); left;) {
            f32 factors[rows_ahead][n_columns];
            const u8* row[rows_ahead];
            bool present[rows_ahead];
            typename Type::Raw8 raw[rows_ahead];
            int lane = 0;
#pragma unroll
            for (int u = 0; u < rows_ahead; ++u) {
                // Where none is left the last one stands in, with factors of 0.
                present[u] = left != 0;
                if (present[u]) lane = __ffs(int(left)) - 1;
                left &= left - 1;
                row[u] = rows + i64(__shfl_sync(QI_WARP_MASK, slot, lane)) * row_stride;
#pragma unroll
                for (int c = 0; c < n_columns; ++c) {
                    const f32 value = __shfl_sync(QI_WARP_MASK, values[c], lane);
                    factors[u][c] = present[u] ? value : 0.0f;
                }
            }
            // All loads before the first use.
#pragma unroll
            for (int u = 0; u < rows_ahead; ++u)
                raw[u] = type.load8(row[u], safe_chunk);
#pragma unroll
            for (int u = 0; u < rows_ahead; ++u) {
                // A branch before each use keeps its arithmetic behind all loads.
                if (!present[u]) break;
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
            result.partial[(i64(partition) * n_tokens + token) * n_cols + out] = sum;
        __syncthreads();
    }

    u32* const ticket = result.tickets + blockIdx.z * gridDim.x + blockIdx.x;
    if (!last_block(ticket, n_partitions)) return;
    const int out = int(blockIdx.x) * tile_cols + column;
    if (out >= n_cols) return;
    for (int c = 0; c < n_columns && first_token + c < n_tokens; ++c) {
        const i64 at = i64(first_token + c) * n_cols + out;
        f32 sum = 0.0f;
#pragma unroll
        for (int p = 0; p < n_partitions; ++p)
            sum += result.partial[i64(p) * n_tokens * n_cols + at];
        if (result.bias) sum += result.bias[out];
        result.y[at] += sum;
    }
}

// rows points at the first record's down row. grid (n_cols / 256, 16 partitions, tokens /
// n_columns), 256 threads, 8 KB of shared memory.
#define QI_DOWN(name, n_columns)                                                                   \
    QI_KERNEL name(const u8* rows, i64 row_stride, int n_cols, const i32* slots,                   \
                   const i32* bounds, int n_neurons, const f32* h, i64 h_stride, const i32* ids,   \
                   int by_id, int n_tokens, f32* partial, u32* tickets, const f32* bias, f32* y) { \
        down_rows<n_columns>(rows, row_stride, n_cols, slots, bounds, n_neurons, h, h_stride, ids, \
                             by_id, n_tokens, {partial, tickets, bias, y});                        \
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
