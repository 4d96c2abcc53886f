// Attention of many tokens of one sequence; QI_KV names the pages' type.
//
// Bytes: keys and values once per tile of 32 (head_dim above 128: 16) query rows, a row being a
// token and one of the query heads that share a KV head. Shape: a block of 256 threads per tile and
// KV head; a page of keys, then of values, is copied to shared memory as it is stored, 8 or 16
// threads share a query row. Order: page after page with a running maximum, positions ascending
// inside; a row's result does not depend on the other rows of its tile.
#include "kv.cuh"

constexpr int n_threads = 256;

struct TileAttention {
    const f32* q;  // [n_tokens][q_stride], rotated
    i64 q_stride;
    f32* out;  // [n_tokens][n_head · head_dim]
    int n_head, n_head_kv, head_dim;
    f32 scale;
    int window;
    const i32* tiles;  // [grid.x][2]: first token and number of tokens, all of one sequence
    f32* terms;        // [n_tokens][n_head][2], or null: see attend.cu
};

QI_DEVICE void copy_bytes(u8* to, const u8* from, i64 n) {
    for (i64 i = 16 * i64(threadIdx.x); i < n; i += 16 * n_threads)
        *reinterpret_cast<Quad*>(to + i) = *reinterpret_cast<const Quad*>(from + i);
}

template <class Kv, int n_rows>
QI_DEVICE void attend_tile(const TileAttention& a, const KvPages& kv, const Tokens& tokens) {
    extern __shared__ char shared_bytes[];
    constexpr int per_row = n_threads / n_rows;    // threads that share a query row
    constexpr int n_scores = page_size / per_row;  // of a thread, 8 or 4
    constexpr int n_chunks = 2;                    // of eight dimensions, of a thread
    const int head_dim = a.head_dim, group = a.n_head / a.n_head_kv;
    const int tile_heads = min_of(group, n_rows), n_parts = ceil_div(group, tile_heads);
    const int kv_head = int(blockIdx.y) / n_parts;
    const int first_of_group = int(blockIdx.y) % n_parts * tile_heads;
    const int n_heads = min_of(tile_heads, group - first_of_group);
    const int first_token = a.tiles[2 * blockIdx.x], n_tokens = a.tiles[2 * blockIdx.x + 1];
    if (n_tokens <= 0) return;

    f32* q = reinterpret_cast<f32*>(shared_bytes);  // [n_rows][head_dim]
    f32* weights = q + n_rows * head_dim;           // [n_rows][page_size]
    u8* page_copy = reinterpret_cast<u8*>(weights + n_rows * page_size);

    // Row r is token r / n_heads of the tile and head r % n_heads of the group.
    const int row = int(threadIdx.x) / per_row, part = int(threadIdx.x) % per_row;
    const bool real = row < n_tokens * n_heads;
    const int token = first_token + (real ? row / n_heads : 0);
    const int head = kv_head * group + first_of_group + row % n_heads;
    const int position = real ? tokens.positions[token] : -1;
    const int first = position < 0 ? 0 : first_visible(position, a.window);
    const int last = last_visible(tokens, first_token, position);
    for (int d = part; d < head_dim; d += per_row)
        q[row * head_dim + d] = real ? a.q[token * a.q_stride + i64(head) * head_dim + d] : 0.0f;

    // The pages that any row sees.
    __shared__ int first_seen, last_seen;
    if (threadIdx.x == 0) {
        first_seen = 0x7fffffff;
        last_seen = -1;
    }
    __syncthreads();
    if (part == 0 && position >= 0 && last >= first) {
        atomicMin(&first_seen, first);
        atomicMax(&last_seen, last);
    }
    __syncthreads();
    const int first_page = first_seen / page_size;
    const int last_page = last_seen < 0 ? -1 : last_seen / page_size;

    f32 maximum = -largest_float, total = 0.0f;
    f32 acc[n_chunks][8];
#pragma unroll
    for (int c = 0; c < n_chunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            acc[c][i] = 0.0f;
    for (int page = first_page; page <= last_page; ++page) {
        const u8* keys = kv.head(tokens.tables[first_token] + page, kv_head);
        const int begin = max_of(first - page * page_size, 0);
        const int end = min_of(last - page * page_size + 1, page_size);

        copy_bytes(page_copy, keys, Kv::keys_bytes(head_dim));
        __syncthreads();
        f32 scores[n_scores];
#pragma unroll
        for (int i = 0; i < n_scores; ++i)
            scores[i] = 0.0f;
        for (int d = 0; d < head_dim; ++d) {
            f32 k[8];
            // Two threads share eight positions where a thread has four.
            Kv::keys8(page_copy, head_dim, d, part * n_scores / 8, k);
            const f32 factor = q[row * head_dim + d];
            const bool upper = n_scores == 4 && part % 2 == 1;
#pragma unroll
            for (int i = 0; i < n_scores; ++i) {
                f32 key = k[i];
                if constexpr (n_scores == 4) key = upper ? k[4 + i] : k[i];
                scores[i] = fmaf(factor, key, scores[i]);
            }
        }
        f32 page_max = maximum;
#pragma unroll
        for (int i = 0; i < n_scores; ++i) {
            const int at = part * n_scores + i;
            const bool visible = at >= begin && at < end;
            scores[i] = visible ? mul(scores[i], a.scale) : -infinity();
            page_max = fmaxf(page_max, scores[i]);
        }
#pragma unroll
        for (int step = 1; step < per_row; step *= 2)
            page_max = fmaxf(page_max, __shfl_xor_sync(QI_WARP_MASK, page_max, step));
        f32 page_total = 0.0f;
#pragma unroll
        for (int i = 0; i < n_scores; ++i) {
            const f32 e = expf(scores[i] - page_max);
            weights[row * page_size + part * n_scores + i] = e;
            page_total += e;
        }
#pragma unroll
        for (int step = 1; step < per_row; step *= 2)
            page_total += __shfl_xor_sync(QI_WARP_MASK, page_total, step);
        const f32 keep = expf(maximum - page_max);
        maximum = page_max;
        total = fmaf(total, keep, page_total);
        __syncthreads();

        copy_bytes(page_copy, keys + Kv::keys_bytes(head_dim), Kv::values_bytes(head_dim));
        __syncthreads();
#pragma unroll
        for (int c = 0; c < n_chunks; ++c) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                acc[c][i] *= keep;
            const int chunk = part + c * per_row;
            if (8 * chunk >= head_dim) continue;
            // What a row does not see is left out: it may be garbage.
            for (int i = begin; i < end; ++i) {
                f32 v[8];
                Kv::widen(Kv::template load_values8<false>(page_copy, head_dim, i, chunk), v);
                const f32 weight = weights[row * page_size + i];
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    acc[c][j] = fmaf(weight, v[j], acc[c][j]);
            }
        }
        __syncthreads();
    }
    if (position < 0) return;
    f32* out = a.out + (i64(token) * a.n_head + head) * head_dim;
#pragma unroll
    for (int c = 0; c < n_chunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int d = 8 * (part + c * per_row) + i;
            if (d < head_dim) out[d] = a.terms ? acc[c][i] : acc[c][i] / total;
        }
    if (a.terms && part == 0) {
        a.terms[2 * (i64(token) * a.n_head + head)] = maximum;
        a.terms[2 * (i64(token) * a.n_head + head) + 1] = total;
    }
}

// grid (tiles, n_head_kv · parts of a group), 256 threads. Room for n_rows · (head_dim + 64) floats
// and the keys or values of a page.
#define QI_ATTEND_TILE(name, n_rows)                                                               \
    QI_KERNEL name(const f32* q, i64 q_stride, f32* out, int n_head, int n_head_kv, int head_dim,  \
                   f32 scale, int window, const i32* tiles, const i32* positions,                  \
                   const i32* tables, u8* pool, i64 page_stride, i64 layer_offset, i64 head_bytes, \
                   const i32* pages, const i32* bounds, f32* terms) {                              \
        attend_tile<QI_KV, n_rows>(                                                                \
            {q, q_stride, out, n_head, n_head_kv, head_dim, scale, window, tiles, terms},          \
            {pool, page_stride, layer_offset, head_bytes, pages}, {positions, tables, bounds});    \
    }

QI_ATTEND_TILE(qi_attend_tile_32, 32)
QI_ATTEND_TILE(qi_attend_tile_16, 16)
