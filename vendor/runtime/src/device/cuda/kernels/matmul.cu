// y[t][r] = W[r] · x[t] for many tokens; QI_WEIGHT names the weights' type.
//
// Bytes: weights once per tile of tokens (16, 32 or 64), activations once per tile of rows, so from
// about 64 tokens on arithmetic is the limit. Block types: weights are unpacked to int8 in shared
// memory, once for all tokens of a tile, and multiplied by tensor cores, K = 32 (a block) or 16
// (half a block) at a time; the integer sums then meet their scales. Shape: 256 threads; 128 rows
// by 64 tokens, a warp per 16 rows, where that makes enough blocks; for fewer tokens or rows 32
// rows by 16 or 32 tokens, four warps sharing the blocks of a row. The next step's weights are
// loaded while a step is multiplied. Float types: f32 tiles of 64 by 64 by plain multiply-adds, 16
// results a thread, since rounding activations to f16 would cost accuracy that no other path gives
// away.
//
// Order: a warp adds its blocks (1 in `k_warps`) in one chain, then the warps that share a row are
// added in order.
#include "mma.cuh"
#include "weights.cuh"

constexpr int n_threads = 256;
constexpr int n_warps = n_threads / warp_size;

struct Matmul {
    const u8* w;
    i64 row_stride;
    int n_rows;
    const f32* x;  // float types
    const i8* codes;
    const f32* scales;
    const f32* sums;
    int n_cols, n_tokens;
    const f32* bias;  // or null
    f32* y;           // [n_tokens][y_stride]
    i64 y_stride;
    int accumulate;

    QI_DEVICE void put(int token, int row, f32 value) const {
        if (token >= n_tokens || row >= n_rows) return;
        if (bias) value += bias[row];
        f32* at = y + token * y_stride + row;
        *at = accumulate ? *at + value : value;
    }
};

// ---- block types ----

template <class Type, int tile_rows, int tile_tokens>
struct BlockTile {
    static constexpr int row_warps = tile_rows / 16;
    static constexpr int k_warps = n_warps / row_warps;
    static constexpr int step_blocks = tile_rows == 128 ? 4 : 8;  // of K, per step
    static constexpr int n_tiles = tile_tokens / 8;               // of tokens, per warp
    // Words of a row of codes; 4 more than a multiple of 8, so that the 8 rows of a fragment lie in
    // different banks.
    static constexpr int row_words = 8 * step_blocks + 4;
    static constexpr int raws = tile_rows * step_blocks / n_threads;  // blocks a thread loads
    static constexpr int x_quads = tile_tokens * step_blocks * 2;     // of 16 bytes
    static constexpr int x_loads = (x_quads + n_threads - 1) / n_threads;

    struct Shared {
        u32 w[tile_rows][row_words];
        Factors<Type::parts> factors[step_blocks][tile_rows];
        u32 x[tile_tokens][row_words];
        f32 scales[step_blocks][tile_tokens];
        f32 sums[step_blocks][tile_tokens][2];
    };
};

template <class Type, int tile_rows, int tile_tokens>
QI_DEVICE void multiply_blocks(const Matmul& m) {
    using Tile = BlockTile<Type, tile_rows, tile_tokens>;
    constexpr int step_blocks = Tile::step_blocks, n_tiles = Tile::n_tiles;
    extern __shared__ char shared_bytes[];
    typename Tile::Shared& shared = *reinterpret_cast<typename Tile::Shared*>(shared_bytes);
    const Type type(m.n_cols);
    const int n_blocks = m.n_cols / 32;
    const int first_row = int(blockIdx.x) * tile_rows, first_token = int(blockIdx.y) * tile_tokens;
    const int row_warp = warp_id() % Tile::row_warps, k_warp = warp_id() / Tile::row_warps;
    const int g = lane_id() / 4, i = lane_id() % 4;

    f32 acc[n_tiles][4];
#pragma unroll
    for (int n = 0; n < n_tiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            acc[n][j] = 0.0f;

    // What this thread brings to shared memory: block `raw_block` of rows raw_row + n · raw_rows.
    const int raw_block = int(threadIdx.x) % step_blocks, raw_row = int(threadIdx.x) / step_blocks;
    constexpr int raw_rows = n_threads / step_blocks;
    typename Type::Raw raw[Tile::raws];
    const auto load = [&](int first_block) {
#pragma unroll
        for (int n = 0; n < Tile::raws; ++n) {
            const int row = min_of(first_row + raw_row + n * raw_rows, m.n_rows - 1);
            raw[n] =
                type.load(m.w + row * m.row_stride, min_of(first_block + raw_block, n_blocks - 1));
        }
    };
    load(0);
    for (int first = 0; first < n_blocks; first += step_blocks) {
#pragma unroll
        for (int n = 0; n < Tile::raws; ++n) {
            const int row = raw_row + n * raw_rows;
            u32 codes[8];
            Type::codes(raw[n], codes);
#pragma unroll
            for (int q = 0; q < 8; ++q)
                shared.w[row][8 * raw_block + q] = codes[q];
            shared.factors[raw_block][row] = Type::factors(raw[n], first + raw_block);
        }
#pragma unroll
        for (int n = 0; n < Tile::x_loads; ++n) {
            const int at = int(threadIdx.x) + n * n_threads;
            if (at >= Tile::x_quads) break;
            const int token = at / (2 * step_blocks), quad = at % (2 * step_blocks);
            const int from = min_of(first_token + token, m.n_tokens - 1);
            Quad codes = {};
            if (first + quad / 2 < n_blocks)
                codes = reinterpret_cast<const Quad*>(
                    m.codes)[i64(from) * 2 * n_blocks + 2 * first + quad];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                shared.x[token][4 * quad + j] = codes.v[j];
        }
        for (int at = int(threadIdx.x); at < tile_tokens * step_blocks; at += n_threads) {
            const int token = at / step_blocks, block = at % step_blocks;
            const int from = min_of(first_token + token, m.n_tokens - 1);
            const bool inside = first + block < n_blocks;
            const i64 of_block = i64(from) * n_blocks + first + block;
            shared.scales[block][token] = inside ? m.scales[of_block] : 0.0f;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                shared.sums[block][token][half] = inside ? m.sums[2 * of_block + half] : 0.0f;
        }
        __syncthreads();
        if (first + step_blocks < n_blocks) load(first + step_blocks);

#pragma unroll 2
        for (int block = k_warp; block < step_blocks; block += Tile::k_warps) {
            // Blocks beyond the row have activations of zero but may have any factors.
            if (first + block >= n_blocks) break;
            u32 a[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                a[j] = shared.w[16 * row_warp + g + j % 2 * 8][8 * block + i + j / 2 * 4];
            const Factors<Type::parts> factors[2] = {shared.factors[block][16 * row_warp + g],
                                                     shared.factors[block][16 * row_warp + g + 8]};
#pragma unroll
            for (int n = 0; n < n_tiles; ++n) {
                const u32* x = shared.x[8 * n + g] + 8 * block + i;
                const u32 b0 = x[0], b1 = x[4];
                i32 dot[Type::parts][4];
#pragma unroll
                for (int p = 0; p < Type::parts; ++p)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        dot[p][j] = 0;
                if constexpr (Type::parts == 1) {
                    mma_s8_k32(dot[0], a, b0, b1);
                } else {
                    mma_s8_k16(dot[0], a[0], a[1], b0);
                    mma_s8_k16(dot[1], a[2], a[3], b1);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int token = 8 * n + 2 * i + j % 2;
                    const f32 scale = shared.scales[block][token];
                    const f32* sums = shared.sums[block][token];
                    const Factors<Type::parts>& f = factors[j / 2];
                    f32 sum = acc[n][j];
#pragma unroll
                    for (int p = 0; p < Type::parts; ++p)
                        sum = fmaf(f32(dot[p][j]), mul(f.scale[p], scale), sum);
                    if constexpr (Type::has_shift) {
                        if constexpr (Type::parts == 1) {
                            sum = fmaf(f.shift[0], sums[0] + sums[1], sum);
                        } else {
                            sum = fmaf(f.shift[0], sums[0], sum);
                            sum = fmaf(f.shift[1], sums[1], sum);
                        }
                    }
                    acc[n][j] = sum;
                }
            }
        }
        __syncthreads();
    }

    if constexpr (Tile::k_warps > 1) {
        // [k_warps][tile_rows][tile_tokens], in the room of the codes.
        f32* parts = reinterpret_cast<f32*>(shared_bytes);
#pragma unroll
        for (int n = 0; n < n_tiles; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = 16 * row_warp + g + j / 2 * 8, token = 8 * n + 2 * i + j % 2;
                parts[(k_warp * tile_rows + row) * tile_tokens + token] = acc[n][j];
            }
        __syncthreads();
        for (int at = int(threadIdx.x); at < tile_rows * tile_tokens; at += n_threads) {
            const int row = at % tile_rows, token = at / tile_rows;
            f32 sum = parts[row * tile_tokens + token];
#pragma unroll
            for (int k = 1; k < Tile::k_warps; ++k)
                sum += parts[(k * tile_rows + row) * tile_tokens + token];
            m.put(first_token + token, first_row + row, sum);
        }
    } else {
#pragma unroll
        for (int n = 0; n < n_tiles; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                m.put(first_token + 8 * n + 2 * i + j % 2,
                      first_row + 16 * row_warp + g + j / 2 * 8, acc[n][j]);
    }
}

// ---- float types ----

constexpr int float_tile = 64;
constexpr int float_cols = 32;  // of K, per step

struct FloatShared {
    // Transposed, a column's rows side by side; 4 more than a multiple of 32, so that columns begin
    // in different banks.
    f32 w[float_cols][float_tile + 4];
    f32 x[float_cols][float_tile + 4];
};

template <class Type>
QI_DEVICE void multiply_floats(const Matmul& m) {
    extern __shared__ char shared_bytes[];
    FloatShared& shared = *reinterpret_cast<FloatShared*>(shared_bytes);
    const Type type(m.n_cols);
    const int first_row = int(blockIdx.x) * float_tile, first_token = int(blockIdx.y) * float_tile;
    // A thread brings eight columns of one row and of one token, and computes 4 by 4 results.
    const int row = int(threadIdx.x) / 4, chunk = int(threadIdx.x) % 4;
    const int out_row = int(threadIdx.x) % 16 * 4, out_token = int(threadIdx.x) / 16 * 4;
    const u8* w = m.w + min_of(first_row + row, m.n_rows - 1) * m.row_stride;
    const f32* x = m.x + i64(min_of(first_token + row, m.n_tokens - 1)) * m.n_cols;

    f32 acc[4][4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            acc[t][r] = 0.0f;
    for (int first = 0; first < m.n_cols; first += float_cols) {
        const int column = first + 8 * chunk;
        f32 values[8] = {};
        if (column < m.n_cols) type.decode8(w, column / 8, values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const bool inside = column + j < m.n_cols;
            shared.w[8 * chunk + j][row] = inside ? values[j] : 0.0f;
            shared.x[8 * chunk + j][row] = inside ? x[column + j] : 0.0f;
        }
        __syncthreads();
        const int n = min_of(float_cols, m.n_cols - first);
#pragma unroll 4
        for (int k = 0; k < n; ++k) {
            const Float4 of_rows = *reinterpret_cast<const Float4*>(&shared.w[k][out_row]);
            const Float4 of_tokens = *reinterpret_cast<const Float4*>(&shared.x[k][out_token]);
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    acc[t][r] = fmaf(of_rows.v[r], of_tokens.v[t], acc[t][r]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            m.put(first_token + out_token + t, first_row + out_row + r, acc[t][r]);
}

// grid (n_rows / tile_rows, n_tokens / tile_tokens), 256 threads; float types have tiles of 64 by
// 64. Shared memory: launch.cpp's matmul_shared.
#define QI_MATMUL(name, tile_rows, tile_tokens)                                                   \
    QI_KERNEL name(const u8* w, i64 row_stride, int n_rows, const f32* x, const i8* codes,        \
                   const f32* scales, const f32* sums, int n_cols, int n_tokens, const f32* bias, \
                   f32* y, i64 y_stride, int accumulate) {                                        \
        const Matmul m = {w,      row_stride, n_rows, x, codes,    scales,    sums,               \
                          n_cols, n_tokens,   bias,   y, y_stride, accumulate};                   \
        multiply<QI_WEIGHT, tile_rows, tile_tokens>(m);                                           \
    }

template <class Type, int tile_rows, int tile_tokens>
QI_DEVICE void multiply(const Matmul& m) {
    if constexpr (Type::is_float)
        multiply_floats<Type>(m);
    else
        multiply_blocks<Type, tile_rows, tile_tokens>(m);
}

QI_MATMUL(qi_matmul_128x64, 128, 64)
QI_MATMUL(qi_matmul_32x32, 32, 32)
QI_MATMUL(qi_matmul_32x16, 32, 16)
