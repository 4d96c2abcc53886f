// Attention of a few tokens, split over the context; QI_KV names the pages' type.
//
// Bytes: keys and values that a token sees, once per KV head: the query heads that share it are
// computed together, four by a block, and other blocks of a larger group find them in L2. (With
// eight heads a block has 232 registers per thread: two fit a multiprocessor, and 8 KB of loads are
// on the way where an H100 needs 23.) Shape: a block of 128 threads per token, four heads or less
// and run of pages, so that 8 KV heads and 2048 positions make 256 blocks or more; a thread has
// four 16-byte loads of keys or values on the way. The number of pages per run follows from what
// the token sees and from nothing else: 1 up to 2048 positions, 4 up to 8192, then 16.
//
// Order: page after page inside a run, the runs added in order by the block that comes last; so a
// result depends on its query, position, window and on the keys and values it sees.
#include "kv.cuh"
#include "q8.cuh"

constexpr int n_threads = 128;
constexpr int n_warps = n_threads / warp_size;
constexpr int n_ahead = 4;  // loads of keys or values that a thread has on the way

QI_DEVICE int pages_per_run(int n_visible) {
    return n_visible <= 2048 ? 1 : n_visible <= 8192 ? 4 : 16;
}

struct Attention {
    const f32* q;  // [n_tokens][q_stride], rotated
    i64 q_stride;
    f32* out;  // [n_tokens][n_head · head_dim]
    int n_head, n_head_kv, head_dim;
    f32 scale;
    int window;  // 0: none
    int max_runs;
    f32* partial;  // [n_tokens][n_head][max_runs][head_dim + 2], sums, maximum and total
    u32* tickets;  // [n_tokens][grid.y], zeros
    Q8Rows q8;     // of out; where head_dim is a multiple of 32
    // Not null: a part of an attention. out is left unnormalised, and these are the greatest score
    // and the sum of exp(score - greatest), [n_tokens][n_head][2].
    f32* terms;
};

// The block's shared memory, for `heads` query heads; the last block has another use for it.
struct Room {
    f32* q;        // [heads][head_dim]
    f32* parts;    // [n_warps][heads][page_size]
    f32* weights;  // [heads][page_size], scores and then their exponentials
    f32* maximum;  // [heads], of all pages so far
    f32* total;    // [heads]
    f32* keep;     // [heads], what becomes of sums so far
    f32* sums;     // [n_threads][8]
};

template <class Kv, int heads>
QI_DEVICE void score_page(const u8* keys, const Room& room, const Attention& a, int begin,
                          int end) {
    const int head_dim = a.head_dim, p8 = lane_id() % 8;
    f32 acc[heads][8];
#pragma unroll
    for (int h = 0; h < heads; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            acc[h][i] = 0.0f;
            // Eight lanes take a row of 64 keys, the block 16 rows.
#pragma unroll n_ahead
    for (int d = int(threadIdx.x) / 8; d < head_dim; d += n_threads / 8) {
        f32 k[8];
        Kv::keys8(keys, head_dim, d, p8, k);
#pragma unroll
        for (int h = 0; h < heads; ++h) {
            const f32 q = room.q[h * head_dim + d];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                acc[h][i] = fmaf(q, k[i], acc[h][i]);
        }
    }
#pragma unroll
    for (int h = 0; h < heads; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            acc[h][i] += __shfl_xor_sync(QI_WARP_MASK, acc[h][i], 8);
            acc[h][i] += __shfl_xor_sync(QI_WARP_MASK, acc[h][i], 16);
            if (lane_id() < 8)
                room.parts[(warp_id() * heads + h) * page_size + 8 * p8 + i] = acc[h][i];
        }
    __syncthreads();
    for (int at = int(threadIdx.x); at < heads * page_size; at += n_threads) {
        f32 score = room.parts[at];
#pragma unroll
        for (int w = 1; w < n_warps; ++w)
            score += room.parts[w * heads * page_size + at];
        const int position = at % page_size;
        const bool visible = position >= begin && position < end;
        room.weights[at] = visible ? mul(score, a.scale) : -infinity();
    }
    __syncthreads();
    // A warp per head: the new maximum, exponentials, and what they add to.
    for (int h = warp_id(); h < heads; h += n_warps) {
        f32* weights = room.weights + h * page_size;
        const f32 low = weights[lane_id()], high = weights[warp_size + lane_id()];
        const f32 before = room.maximum[h];
        const f32 maximum = fmaxf(before, warp_max(fmaxf(low, high)));
        const f32 e_low = expf(low - maximum), e_high = expf(high - maximum);
        weights[lane_id()] = e_low;
        weights[warp_size + lane_id()] = e_high;
        const f32 total = warp_sum(e_low + e_high), keep = expf(before - maximum);
        __syncwarp();
        if (lane_id() == 0) {
            room.maximum[h] = maximum;
            room.keep[h] = keep;
            room.total[h] = fmaf(room.total[h], keep, total);
        }
    }
    __syncthreads();
}

// Dimension d of a head's sum and what it is to be divided by; all lanes of a warp call together.
QI_DEVICE void put(const Attention& a, i64 token, int head, int d, f32 sum, f32 total) {
    const int column = head * a.head_dim + d;
    const f32 value = a.terms ? sum : sum / total;
    a.out[token * a.n_head * a.head_dim + column] = value;
    if (a.q8.codes) store_q8_lane(a.q8, token, column, value);
}
QI_DEVICE void put_terms(const Attention& a, i64 token, int head, f32 maximum, f32 total) {
    if (!a.terms) return;
    a.terms[2 * (token * a.n_head + head)] = maximum;
    a.terms[2 * (token * a.n_head + head) + 1] = total;
}

// The part of a token that sees nothing here.
QI_DEVICE void put_nothing(const Attention& a, i64 token, int first_head, int n_heads) {
    f32* out = a.out + (token * a.n_head + first_head) * a.head_dim;
    for (int i = int(threadIdx.x); i < n_heads * a.head_dim; i += n_threads)
        out[i] = 0.0f;
    const int h = int(threadIdx.x);
    if (h < n_heads) put_terms(a, token, first_head + h, -largest_float, 0.0f);
}

// The terms of one head's runs and their factors exp(maximum - greatest): a warp, a lane per run.
// of_runs: maximum and total of the first run, the next ones `stride` apart.
QI_DEVICE void weigh_runs(const f32* of_runs, int stride, int n_runs, f32* terms, f32* factors) {
    f32 maximum = -largest_float, total = 0.0f;
#pragma unroll 1
    for (int run = lane_id(); run < n_runs; run += warp_size)
        maximum = fmaxf(maximum, of_runs[run * stride]);
    maximum = warp_max(maximum);
#pragma unroll 1
    for (int first = 0; first < n_runs; first += warp_size) {
        const int run = min_of(first + lane_id(), n_runs - 1);
        const f32 factor = expf(of_runs[run * stride] - maximum);
        const f32 of_run = of_runs[run * stride + 1];
        if (first + lane_id() < n_runs) factors[run] = factor;
        const int n = min_of(n_runs - first, warp_size);
#pragma unroll 4
        for (int i = 0; i < n; ++i)
            total = fmaf(__shfl_sync(QI_WARP_MASK, of_run, i), __shfl_sync(QI_WARP_MASK, factor, i),
                         total);
    }
    if (lane_id() != 0) return;
    terms[0] = maximum;
    terms[1] = total;
}

// Adds the runs of all heads in order, a thread per dimension of a head: few blocks are left to do
// this, so that latency is what counts. shared: two floats per head and one per head and run.
QI_DEVICE void combine_runs(const Attention& a, const f32* partial, int n_runs, i64 token,
                            int first_head, int n_heads, f32* shared) {
    constexpr int runs_ahead = 16;  // two rounds for 2048 positions
    const int head_dim = a.head_dim;
    const int stride = head_dim + 2, last = (n_runs - 1) * stride;
    const i64 head_stride = i64(a.max_runs) * stride;
    f32 *terms = shared, *factors = shared + 2 * n_heads;
    for (int h = warp_id(); h < n_heads; h += n_warps)
        weigh_runs(partial + h * head_stride + head_dim, stride, n_runs, terms + 2 * h,
                   factors + h * n_runs);
    __syncthreads();
    const int h = int(threadIdx.x);
    if (h < n_heads) put_terms(a, token, first_head + h, terms[2 * h], terms[2 * h + 1]);
#pragma unroll 1
    for (int i = int(threadIdx.x); i < n_heads * head_dim; i += n_threads) {
        const int head = i / head_dim, d = i % head_dim;
        const f32* of_runs = partial + head * head_stride + d;
        const f32* of_factors = factors + head * n_runs;
        f32 sum = 0.0f;
#pragma unroll 1
        for (int first = 0; first < n_runs; first += runs_ahead) {
            // No branch, behind which ptxas would move the loads.
            f32 loaded[runs_ahead];
#pragma unroll
            for (int u = 0; u < runs_ahead; ++u)
                loaded[u] = of_runs[min_of((first + u) * stride, last)];
#pragma unroll
            for (int u = 0; u < runs_ahead; ++u)
                sum = first + u < n_runs ? fmaf(loaded[u], of_factors[first + u], sum) : sum;
        }
        put(a, token, first_head + head, d, sum, terms[2 * head + 1]);
    }
}

template <class Kv, int heads>
QI_DEVICE void attend(const Attention& a, const KvPages& kv, const Tokens& tokens) {
    extern __shared__ char shared_bytes[];
    const int token = int(blockIdx.z), position = tokens.positions[token];
    if (position < 0) return;
    const int head_dim = a.head_dim, group = a.n_head / a.n_head_kv;
    const int n_parts = ceil_div(group, heads);  // of a group too large for one block
    const int kv_head = int(blockIdx.y) / n_parts,
              first_of_group = int(blockIdx.y) % n_parts * heads;
    const int first_head = kv_head * group + first_of_group;
    const int n_heads = min_of(heads, group - first_of_group);

    const int first = first_visible(position, a.window);
    const int last = last_visible(tokens, token, position);
    if (last < first) {
        if (blockIdx.x == 0) put_nothing(a, token, first_head, n_heads);
        return;
    }
    const int run_pages = pages_per_run(last - first + 1);
    const int first_run = first / page_size / run_pages, last_run = last / page_size / run_pages;
    const int n_runs = last_run - first_run + 1, run = first_run + int(blockIdx.x);
    if (run > last_run) return;

    Room room;
    room.q = reinterpret_cast<f32*>(shared_bytes);
    room.parts = room.q + heads * head_dim;
    room.weights = room.parts + n_warps * heads * page_size;
    room.maximum = room.weights + heads * page_size;
    room.total = room.maximum + heads;
    room.keep = room.total + heads;
    room.sums = room.keep + heads;

    const f32* q = a.q + token * a.q_stride + i64(first_head) * head_dim;
    for (int i = int(threadIdx.x); i < heads * head_dim; i += n_threads)
        room.q[i] = i < n_heads * head_dim ? q[i] : 0.0f;
    if (int(threadIdx.x) < heads) {
        room.maximum[threadIdx.x] = -largest_float;
        room.total[threadIdx.x] = 0.0f;
    }
    __syncthreads();

    // Values: a thread has 8 dimensions, and every n_rows-th position of a page.
    const int n_chunks = ceil_div(head_dim, 8), n_rows = n_threads / n_chunks;
    const int chunk = int(threadIdx.x) % n_chunks, row = int(threadIdx.x) / n_chunks;
    f32 acc[heads][8];
#pragma unroll
    for (int h = 0; h < heads; ++h)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            acc[h][i] = 0.0f;

    const int first_page = max_of(run * run_pages, first / page_size);
    const int last_page = min_of((run + 1) * run_pages - 1, last / page_size);
    for (int page = first_page; page <= last_page; ++page) {
        const u8* keys = kv.head(tokens.tables[token] + page, kv_head);
        const u8* values = keys + Kv::keys_bytes(head_dim);
        const int begin = max_of(first - page * page_size, 0);
        const int end = min_of(last - page * page_size + 1, page_size);
        score_page<Kv, heads>(keys, room, a, begin, end);
#pragma unroll
        for (int h = 0; h < heads; ++h) {
            const f32 keep = room.keep[h];
#pragma unroll
            for (int i = 0; i < 8; ++i)
                acc[h][i] *= keep;
        }
        // Values that are not seen are not read: they may be garbage.
        if (row < n_rows) {
            for (int i = begin + row; i < end; i += n_ahead * n_rows) {
                typename Kv::RawValues raw[n_ahead];
#pragma unroll
                for (int u = 0; u < n_ahead; ++u)
                    raw[u] = Kv::template load_values8<true>(
                        values, head_dim, min_of(i + u * n_rows, end - 1), chunk);
#pragma unroll
                for (int u = 0; u < n_ahead; ++u) {
                    const int at = i + u * n_rows;
                    if (at >= end) break;
                    f32 v[8];
                    Kv::widen(raw[u], v);
#pragma unroll
                    for (int h = 0; h < heads; ++h) {
                        const f32 weight = room.weights[h * page_size + at];
#pragma unroll
                        for (int j = 0; j < 8; ++j)
                            acc[h][j] = fmaf(weight, v[j], acc[h][j]);
                    }
                }
            }
        }
        __syncthreads();
    }

    // The rows of threads are added in order, head by head.
    const i64 stride = head_dim + 2;
    f32* partial = a.partial + (i64(token) * a.n_head + first_head) * a.max_runs * stride;
    for (int h = 0; h < n_heads; ++h) {
        // Registers have no index: all heads are looked through for this one.
#pragma unroll
        for (int known = 0; known < heads; ++known) {
            if (known != h) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                room.sums[threadIdx.x * 8 + i] = acc[known][i];
        }
        __syncthreads();
        f32* part = partial + (i64(h) * a.max_runs + int(blockIdx.x)) * stride;
        for (int d = int(threadIdx.x); d < head_dim; d += n_threads) {
            f32 sum = 0.0f;
            for (int r = 0; r < n_rows; ++r)
                sum += room.sums[(r * n_chunks + d / 8) * 8 + d % 8];
            if (n_runs == 1)
                put(a, token, first_head + h, d, sum, room.total[h]);
            else
                part[d] = sum;
        }
        if (threadIdx.x == 0 && n_runs == 1)
            put_terms(a, token, first_head + h, room.maximum[h], room.total[h]);
        if (threadIdx.x == 0 && n_runs > 1) {
            part[head_dim] = room.maximum[h];
            part[head_dim + 1] = room.total[h];
        }
        __syncthreads();
    }
    if (n_runs == 1) return;
    if (!last_block(a.tickets + i64(token) * gridDim.y + blockIdx.y, u32(n_runs))) return;
    combine_runs(a, partial, n_runs, token, first_head, n_heads, room.q);
}

// grid (max_runs, n_head_kv · parts of a group, n_tokens), 128 threads.
#define QI_ATTEND(name, heads)                                                                    \
    QI_KERNEL name(const f32* q, i64 q_stride, f32* out, int n_head, int n_head_kv, int head_dim, \
                   f32 scale, int window, int max_runs, f32* partial, u32* tickets,               \
                   const i32* positions, const i32* tables, u8* pool, i64 page_stride,            \
                   i64 layer_offset, i64 head_bytes, const i32* pages, i8* codes, f32* scales,    \
                   f32* sums, const i32* bounds, f32* terms) {                                    \
        attend<QI_KV, heads>({q,                                                                  \
                              q_stride,                                                           \
                              out,                                                                \
                              n_head,                                                             \
                              n_head_kv,                                                          \
                              head_dim,                                                           \
                              scale,                                                              \
                              window,                                                             \
                              max_runs,                                                           \
                              partial,                                                            \
                              tickets,                                                            \
                              {codes, scales, sums, n_head * head_dim},                           \
                              terms},                                                             \
                             {pool, page_stride, layer_offset, head_bytes, pages},                \
                             {positions, tables, bounds});                                        \
    }

QI_ATTEND(qi_attend_1, 1)
QI_ATTEND(qi_attend_2, 2)
QI_ATTEND(qi_attend_4, 4)

// grid (n_head, n_tokens), 128 threads. The device's part, in out and terms, and the host's, with
// the same shapes, become the attention of all positions. A part that sees nothing has a sum of
// zero and changes nothing.
QI_KERNEL qi_attend_merge(f32* out, const f32* terms, const f32* other, const f32* other_terms,
                          int head_dim) {
    const i64 head = i64(blockIdx.y) * gridDim.x + blockIdx.x;
    const f32 maximum = fmaxf(terms[2 * head], other_terms[2 * head]);
    const f32 here = expf(terms[2 * head] - maximum), there = expf(other_terms[2 * head] - maximum);
    const f32 total = fmaf(here, terms[2 * head + 1], mul(there, other_terms[2 * head + 1]));
    for (int d = int(threadIdx.x); d < head_dim; d += n_threads) {
        const i64 at = head * head_dim + d;
        out[at] = fmaf(here, out[at], mul(there, other[at])) / total;
    }
}
