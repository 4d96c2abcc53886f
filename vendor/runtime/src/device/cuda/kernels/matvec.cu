// y[t][r] = W[r] · x[t] for one to eight tokens; QI_WEIGHT names the weights' type.
//
// Bytes: every weight once (n_rows · row stride), which is all that counts up to four tokens; x (44
// bytes per 32 values as q8, 128 as f32) is read by every warp and comes from L1, since weights
// pass by it. From five tokens on a warp has one row, and L1 is the limit: eight tokens take 16
// bytes of x per byte of F16, 20 of Q4_0 and 10 of Q8_0, while L1 gives about 8.5 in the time of
// one byte of memory (H100: 128 of L1 and 15 of memory per clock and SM). That leaves 0.5, 0.4 and
// 0.8 of memory speed at most, by calculation. Shape: a warp takes one or two rows whole and has
// four 16-byte loads per lane and their scales on the way, more than 2 KB per warp; blocks of 4
// warps, of which 54 to 76 registers let 6 to 9 onto an SM, so that 50 to 80 KB are on the way.
// Where a matrix has too few rows for that, 2 or 4 warps share a row. Two rows per warp halve what
// is read of x; weights are unpacked once for all tokens.
#include "dot.cuh"

constexpr int n_warps = 4;
constexpr int n_outputs = 3;

// One of up to three matrices that share x, as q, k and v do.
struct Output {
    const u8* w;
    const f32* bias;  // or null
    f32* y;
    i64 y_stride;
    int n_rows;
};

// Which rows: all, or those of a list that is in device memory.
struct RowList {
    const i32* slots;  // rows; null: all rows in order
    const i32* ids;    // of which number each is: its bias, and with by_id its place in y
    const i32* n;
    int by_id;
};

template <int n_columns, int n_rows>
QI_DEVICE void matvec(const Output (&outputs)[n_outputs], i64 row_stride, const RowList& list,
                      const Activations& in, int accumulate, int relu, int warps_per_row) {
    using Type = QI_WEIGHT;
    constexpr int n_results = n_columns * n_rows;
    __shared__ f32 parts[n_warps][n_results];
    const Type type(in.n_cols);
    const int total =
        list.slots ? *list.n : outputs[0].n_rows + outputs[1].n_rows + outputs[2].n_rows;
    const int warp = warp_id(), part = warp % warps_per_row;
    const int rows_per_block = n_warps / warps_per_row * n_rows;

    for (int base = int(blockIdx.x) * rows_per_block; base < total;
         base += int(gridDim.x) * rows_per_block) {
        const int first = base + warp / warps_per_row * n_rows;
        const u8* rows[n_rows];
        int row_of[n_rows], output_of[n_rows];
#pragma unroll
        for (int r = 0; r < n_rows; ++r) {
            int row = min_of(first + r, total - 1), output = 0;
            if (!list.slots) {
                while (output < n_outputs - 1 && row >= outputs[output].n_rows)
                    row -= outputs[output++].n_rows;
            }
            row_of[r] = row;
            output_of[r] = output;
            rows[r] = (output == 0   ? outputs[0].w
                       : output == 1 ? outputs[1].w
                                     : outputs[2].w) +
                      i64(list.slots ? list.slots[row] : row) * row_stride;
        }
        f32 acc[n_columns][n_rows];
        dot_rows<Type, n_columns, n_rows>(type, rows, in, part * warp_size + lane_id(),
                                          warps_per_row * warp_size, acc);
        f32 mine = 0.0f;  // lane c · n_rows + r gets the result of row r and token c
#pragma unroll
        for (int c = 0; c < n_columns; ++c)
#pragma unroll
            for (int r = 0; r < n_rows; ++r) {
                const f32 sum = warp_sum(acc[c][r]);
                if (lane_id() == c * n_rows + r) mine = sum;
            }
        if (warps_per_row > 1) {
            if (lane_id() < n_results) parts[warp][lane_id()] = mine;
            __syncthreads();
            if (part == 0 && lane_id() < n_results)
                for (int i = 1; i < warps_per_row; ++i)
                    mine += parts[warp + i][lane_id()];
            __syncthreads();
        }
        if (part != 0 || lane_id() >= n_results) continue;
        const int c = lane_id() / n_rows, r = lane_id() % n_rows;
        if (c >= in.n_tokens || first + r >= total) continue;
        int row = row_of[0], index = output_of[0];
#pragma unroll
        for (int i = 1; i < n_rows; ++i)
            if (i == r) {
                row = row_of[i];
                index = output_of[i];
            }
        const Output output = index == 0 ? outputs[0] : index == 1 ? outputs[1] : outputs[2];
        const int id = list.ids ? list.ids[row] : row;
        if (output.bias) mine += output.bias[id];
        if (relu && mine <= 0.0f) mine = 0.0f;  // not a number stays what it is
        f32* at = output.y + c * output.y_stride + (list.by_id ? id : row);
        *at = accumulate ? *at + mine : mine;
    }
}

// n_columns is at least n_tokens; y += … with accumulate, y = max(…, 0) with relu. grid: rows /
// rows per block.
#define QI_MATVEC(name, n_columns, n_rows)                                                         \
    QI_KERNEL name(const u8* w0, const u8* w1, const u8* w2, const f32* bias0, const f32* bias1,   \
                   const f32* bias2, f32* y0, f32* y1, f32* y2, i64 y_stride0, i64 y_stride1,      \
                   i64 y_stride2, int n_rows0, int n_rows1, int n_rows2, i64 row_stride,           \
                   const i32* slots, const i32* ids, const i32* n_listed, int by_id, const f32* x, \
                   const i8* codes, const f32* scales, const f32* sums, int n_cols, int n_tokens,  \
                   int accumulate, int relu, int warps_per_row) {                                  \
        const Output outputs[n_outputs] = {{w0, bias0, y0, y_stride0, n_rows0},                    \
                                           {w1, bias1, y1, y_stride1, n_rows1},                    \
                                           {w2, bias2, y2, y_stride2, n_rows2}};                   \
        matvec<n_columns, n_rows>(outputs, row_stride, {slots, ids, n_listed, by_id},              \
                                  {x, codes, scales, sums, n_cols, n_tokens}, accumulate, relu,    \
                                  warps_per_row);                                                  \
    }

QI_MATVEC(qi_matvec_1, 1, 1)
QI_MATVEC(qi_matvec_1x2, 1, 2)
QI_MATVEC(qi_matvec_2, 2, 2)
QI_MATVEC(qi_matvec_3, 3, 2)
QI_MATVEC(qi_matvec_4, 4, 2)
QI_MATVEC(qi_matvec_6, 6, 1)
QI_MATVEC(qi_matvec_8, 8, 1)
