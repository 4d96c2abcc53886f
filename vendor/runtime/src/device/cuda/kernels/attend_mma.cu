// Attention of many tokens of one sequence by tensor cores, heads of up to 128 dimensions in
// multiples of 16; QI_KV names the pages' type.
//
// Bytes: keys and values once per tile of 64 query rows, a row being a token and one of the query
// heads that share a KV head; 4 · head_dim operations per row and position are the limit. Shape: a
// block of 4 warps per tile and KV head, a warp having 16 rows with their queries and sums in
// registers; a page of keys and values (36 KB at 128) is in shared memory, its rows padded by 16
// bytes so that eight of them lie in different banks.
//
// Queries and weights are float and enter as two halves each (22 bits), so that nothing is lost
// beside what keys and values have lost in the cache. Q8_0 enters as its codes, which halves hold
// exactly; scales of keys meet the sums of 32 dimensions, scales of values the weights.
//
// Order: page after page with a running maximum; a row's result does not depend on the other rows
// of its tile, but a value that is not finite reaches all of them.
#include "kv.cuh"
#include "mma.cuh"

constexpr int n_threads = 128;
constexpr int tile_rows = 64;
constexpr int key_stride = page_size + 8;  // halves

template <int max_dim>
struct Shared {
    static constexpr int value_stride = max_dim + 8;  // halves
    u16 keys[max_dim][key_stride];
    u16 values[page_size][value_stride];
    // Of Q8_0.
    f32 key_scales[max_dim / kv_block][page_size];
    f32 value_scales[max_dim / kv_block][page_size];
};

// Eight codes as halves.
QI_DEVICE Quad widen_codes(const Pair& codes) {
    Quad halves;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 word = codes.v[i / 2] >> 16 * (i % 2);
        halves.v[i] = u32(f32_to_f16(f32(i8(word)))) | u32(f32_to_f16(f32(i8(word >> 8)))) << 16;
    }
    return halves;
}

// Values beyond `end` or before `begin` are seen by no row and may be garbage: zeros stand for
// them.
template <int max_dim>
QI_DEVICE void copy_page(KvF16, const u8* page, int head_dim, int begin, int end,
                         Shared<max_dim>& to) {
    const Quad* keys = reinterpret_cast<const Quad*>(page);
    for (int at = int(threadIdx.x); at < head_dim * 8; at += n_threads)
        *reinterpret_cast<Quad*>(&to.keys[at / 8][at % 8 * 8]) = keys[at];
    const Quad* values = reinterpret_cast<const Quad*>(page + KvF16::keys_bytes(head_dim));
    const int chunks = head_dim / 8;
    for (int at = int(threadIdx.x); at < page_size * chunks; at += n_threads) {
        const int position = at / chunks;
        const bool seen = position >= begin && position < end;
        *reinterpret_cast<Quad*>(&to.values[position][at % chunks * 8]) =
            seen ? values[at] : Quad{};
    }
}
template <int max_dim>
QI_DEVICE void copy_page(KvQ8_0, const u8* page, int head_dim, int begin, int end,
                         Shared<max_dim>& to) {
    const int n_blocks = head_dim / kv_block, n_codes = head_dim * page_size;
    const Pair* keys = reinterpret_cast<const Pair*>(page);
    const u16* key_scales = reinterpret_cast<const u16*>(page + n_codes);
    const u8* values_at = page + KvQ8_0::keys_bytes(head_dim);
    const Pair* values = reinterpret_cast<const Pair*>(values_at);
    const u16* value_scales = reinterpret_cast<const u16*>(values_at + n_codes);
    for (int at = int(threadIdx.x); at < head_dim * 8; at += n_threads)
        *reinterpret_cast<Quad*>(&to.keys[at / 8][at % 8 * 8]) = widen_codes(keys[at]);
    const int chunks = head_dim / 8;
    for (int at = int(threadIdx.x); at < page_size * chunks; at += n_threads)
        *reinterpret_cast<Quad*>(&to.values[at / chunks][at % chunks * 8]) =
            widen_codes(values[at]);
    for (int at = int(threadIdx.x); at < n_blocks * page_size; at += n_threads) {
        to.key_scales[at / page_size][at % page_size] = f16_to_f32(key_scales[at]);
        const int position = at / n_blocks;
        const bool seen = position >= begin && position < end;
        to.value_scales[at % n_blocks][position] = seen ? f16_to_f32(value_scales[at]) : 0.0f;
    }
}

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

template <class Kv>
constexpr bool is_q8() {
    return false;
}
template <>
constexpr bool is_q8<KvQ8_0>() {
    return true;
}

// Sixteen weights per row as A fragments, which is how they lie: columns of positions become
// columns of K. With scales, each weight times that of its position.
struct WeightFragments {
    u32 high[4], low[4];

    QI_DEVICE WeightFragments(const f32 (&first)[4], const f32 (&second)[4], const f32* scales,
                              f32 power) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            f32 x = j < 2 ? first[j % 2 * 2] : second[j % 2 * 2];
            f32 y = j < 2 ? first[j % 2 * 2 + 1] : second[j % 2 * 2 + 1];
            if (scales) {
                const f32* at = scales + j / 2 * 8 + 2 * (lane_id() % 4);
                x *= at[0] * power;
                y *= at[1] * power;
            }
            const SplitPair pair(x, y);
            high[j] = pair.high;
            low[j] = pair.low;
        }
    }
};

// Sixteen positions' values of sixteen dimensions, times their weights.
QI_DEVICE void add_products(const WeightFragments& weights, const u16* values, int stride,
                            f32 (&first)[4], f32 (&second)[4]) {
    u32 b[4];
    load_f16_k16(b, values, stride);
    mma_f16_k16(first, weights.low, b[0], b[1]);
    mma_f16_k16(first, weights.high, b[0], b[1]);
    mma_f16_k16(second, weights.low, b[2], b[3]);
    mma_f16_k16(second, weights.high, b[2], b[3]);
}

// acc += weights · values of a page.
template <int max_dim>
QI_DEVICE void add_values(const f32 (&weights)[page_size / 8][4], const Shared<max_dim>& shared,
                          int head_dim, f32 (&acc)[max_dim / 8][4]) {
#pragma unroll
    for (int k = 0; k < page_size / 16; ++k) {
        const WeightFragments fragments(weights[2 * k], weights[2 * k + 1], nullptr, 1.0f);
#pragma unroll
        for (int n = 0; n < max_dim / 8; n += 2) {
            if (8 * n >= head_dim) break;
            add_products(fragments, &shared.values[16 * k][8 * n], Shared<max_dim>::value_stride,
                         acc[n], acc[n + 1]);
        }
    }
}

// The same of codes: 32 dimensions at a time, whose scales meet the weights, brought to a size that
// halves hold well.
template <int max_dim>
QI_DEVICE void add_coded_values(const f32 (&weights)[page_size / 8][4],
                                const Shared<max_dim>& shared, int head_dim,
                                f32 (&acc)[max_dim / 8][4]) {
#pragma unroll
    for (int block = 0; block < max_dim / kv_block; ++block) {
        if (block * kv_block >= head_dim) break;
        const f32* scales = shared.value_scales[block];
        const f32 power = power_for(
            warp_max(fmaxf(fabsf(scales[lane_id()]), fabsf(scales[warp_size + lane_id()]))));
        f32 sums[4][4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sums[n][j] = 0.0f;
#pragma unroll
        for (int k = 0; k < page_size / 16; ++k) {
            const WeightFragments fragments(weights[2 * k], weights[2 * k + 1], scales + 16 * k,
                                            power);
#pragma unroll
            for (int n = 0; n < 4; n += 2)
                add_products(fragments, &shared.values[16 * k][kv_block * block + 8 * n],
                             Shared<max_dim>::value_stride, sums[n], sums[n + 1]);
        }
        const f32 back = 1.0f / power;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                acc[4 * block + n][j] = fmaf(sums[n][j], back, acc[4 * block + n][j]);
    }
}

template <class Kv, int max_dim>
QI_DEVICE void attend_mma(const TileAttention& a, const KvPages& kv, const Tokens& tokens) {
    extern __shared__ char shared_bytes[];
    constexpr int k_steps = max_dim / 16, n_dims = max_dim / 8, n_keys = page_size / 8;
    Shared<max_dim>& shared = *reinterpret_cast<Shared<max_dim>*>(shared_bytes);
    const int head_dim = a.head_dim, group = a.n_head / a.n_head_kv;
    const int tile_heads = min_of(group, tile_rows), n_parts = ceil_div(group, tile_heads);
    const int kv_head = int(blockIdx.y) / n_parts;
    const int first_of_group = int(blockIdx.y) % n_parts * tile_heads;
    const int n_heads = min_of(tile_heads, group - first_of_group);
    const int first_token = a.tiles[2 * blockIdx.x], n_tokens = a.tiles[2 * blockIdx.x + 1];
    if (n_tokens <= 0) return;
    const int g = lane_id() / 4, i = lane_id() % 4;

    // This lane has parts of two rows: token row / n_heads of the tile, head row % n_heads.
    int first[2], last[2];  // positions it sees
    const f32* q[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = 16 * warp_id() + g + 8 * r;
        const bool real = row < n_tokens * n_heads;
        const i64 token = first_token + (real ? row / n_heads : 0);
        const int head = kv_head * group + first_of_group + row % n_heads;
        const int position = real ? tokens.positions[token] : -1;
        first[r] = position < 0 ? 0 : first_visible(position, a.window);
        last[r] = last_visible(tokens, first_token, position);
        q[r] = position < 0 ? nullptr : a.q + token * a.q_stride + i64(head) * head_dim;
    }
    __shared__ int first_seen, last_seen;
    if (threadIdx.x == 0) {
        first_seen = 0x7fffffff;
        last_seen = -1;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (i == 0 && last[r] >= first[r]) {
            atomicMin(&first_seen, first[r]);
            atomicMax(&last_seen, last[r]);
        }
    __syncthreads();
    const int last_page = last_seen < 0 ? -1 : last_seen / page_size;

    // Queries as A fragments, brought to a common size row by row.
    u32 q_high[k_steps][4], q_low[k_steps][4];
    f32 back[2];  // undoes that, and scales
    f32 power[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        f32 largest = 0.0f;
        for (int d = i; q[r] && d < head_dim; d += 4)
            largest = fmaxf(largest, fabsf(q[r][d]));
        largest = fmaxf(largest, __shfl_xor_sync(QI_WARP_MASK, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(QI_WARP_MASK, largest, 2));
        power[r] = power_for(largest);
        back[r] = a.scale / power[r];
    }
#pragma unroll
    for (int k = 0; k < k_steps; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = j % 2, d = 16 * k + j / 2 * 8 + 2 * i;
            const bool inside = q[r] && d < head_dim;
            const SplitPair pair(inside ? q[r][d] * power[r] : 0.0f,
                                 inside ? q[r][d + 1] * power[r] : 0.0f);
            q_high[k][j] = pair.high;
            q_low[k][j] = pair.low;
        }

    f32 maximum[2] = {-largest_float, -largest_float}, total[2] = {0.0f, 0.0f};
    f32 acc[n_dims][4];
#pragma unroll
    for (int n = 0; n < n_dims; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            acc[n][j] = 0.0f;

    for (int page = first_seen / page_size; page <= last_page; ++page) {
        const int start = page * page_size;
        copy_page(Kv{}, kv.head(tokens.tables[first_token] + page, kv_head), head_dim,
                  first_seen - start, last_seen - start + 1, shared);
        __syncthreads();

        // Scores: rows of queries by columns of positions.
        f32 s[n_keys][4];
#pragma unroll
        for (int n = 0; n < n_keys; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                s[n][j] = 0.0f;
#pragma unroll
        for (int n = 0; n < n_keys; n += 2) {
            // Of Q8_0 the 32 dimensions that share scales, two steps of K.
            f32 part[2][4];
#pragma unroll
            for (int k = 0; k < k_steps; ++k) {
                if (16 * k >= head_dim) break;
                u32 b[4];
                load_f16_k16(b, &shared.keys[16 * k][8 * n], key_stride);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if constexpr (is_q8<Kv>()) {
#pragma unroll
                        for (int j = 0; j < 4 && k % 2 == 0; ++j)
                            part[half][j] = 0.0f;
                    }
                    f32(&sum)[4] = is_q8<Kv>() ? part[half] : s[n + half];
                    mma_f16_k16(sum, q_low[k], b[2 * half], b[2 * half + 1]);
                    mma_f16_k16(sum, q_high[k], b[2 * half], b[2 * half + 1]);
                    if constexpr (is_q8<Kv>()) {
                        const f32* scales = &shared.key_scales[k / 2][8 * (n + half) + 2 * i];
#pragma unroll
                        for (int j = 0; j < 4 && k % 2 == 1; ++j)
                            s[n + half][j] = fmaf(part[half][j], scales[j % 2], s[n + half][j]);
                    }
                }
            }
        }

        f32 largest[2] = {maximum[0], maximum[1]};
#pragma unroll
        for (int n = 0; n < n_keys; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int r = j / 2, at = start + 8 * n + 2 * i + j % 2;
                const bool visible = at >= first[r] && at <= last[r];
                s[n][j] = visible ? mul(s[n][j], back[r]) : -infinity();
                largest[r] = fmaxf(largest[r], s[n][j]);
            }
        f32 keep[2], added[2] = {0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(QI_WARP_MASK, largest[r], 1));
            largest[r] = fmaxf(largest[r], __shfl_xor_sync(QI_WARP_MASK, largest[r], 2));
            keep[r] = expf(maximum[r] - largest[r]);
            maximum[r] = largest[r];
        }
#pragma unroll
        for (int n = 0; n < n_keys; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                s[n][j] = expf(s[n][j] - maximum[j / 2]);
                added[j / 2] += s[n][j];
            }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            added[r] += __shfl_xor_sync(QI_WARP_MASK, added[r], 1);
            added[r] += __shfl_xor_sync(QI_WARP_MASK, added[r], 2);
            total[r] = fmaf(total[r], keep[r], added[r]);
        }
#pragma unroll
        for (int n = 0; n < n_dims; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                acc[n][j] *= keep[j / 2];

        if constexpr (is_q8<Kv>())
            add_coded_values(s, shared, head_dim, acc);
        else
            add_values(s, shared, head_dim, acc);
        __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Looked up again: registers are short.
        const int row = 16 * warp_id() + g + 8 * r, token = first_token + row / n_heads;
        if (row >= n_tokens * n_heads || tokens.positions[token] < 0) continue;
        const int head = kv_head * group + first_of_group + row % n_heads;
        f32* out = a.out + (i64(token) * a.n_head + head) * head_dim;
        const f32 divisor = a.terms ? 1.0f : total[r];
#pragma unroll
        for (int n = 0; n < n_dims; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int d = 8 * n + 2 * i + j;
                if (d < head_dim) out[d] = acc[n][2 * r + j] / divisor;
            }
        if (!a.terms || i != 0) continue;
        f32* terms = a.terms + 2 * (i64(token) * a.n_head + head);
        terms[0] = maximum[r];
        terms[1] = total[r];
    }
}

// grid (tiles, n_head_kv · parts of a group), 128 threads, room for Shared.
#define QI_ATTEND_MMA(name, max_dim)                                                               \
    QI_KERNEL name(const f32* q, i64 q_stride, f32* out, int n_head, int n_head_kv, int head_dim,  \
                   f32 scale, int window, const i32* tiles, const i32* positions,                  \
                   const i32* tables, u8* pool, i64 page_stride, i64 layer_offset, i64 head_bytes, \
                   const i32* pages, const i32* bounds, f32* terms) {                              \
        attend_mma<QI_KV, max_dim>(                                                                \
            {q, q_stride, out, n_head, n_head_kv, head_dim, scale, window, tiles, terms},          \
            {pool, page_stride, layer_offset, head_bytes, pages}, {positions, tables, bounds});    \
    }

QI_ATTEND_MMA(qi_attend_mma_64, 64)
QI_ATTEND_MMA(qi_attend_mma_128, 128)
