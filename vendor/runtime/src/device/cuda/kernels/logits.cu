// What becomes of logits: the best one, the k best, the log-probability of a target.
//
// Bytes: a row of n_vocab floats (0.5 MB at 128k) from L2, twice for a log-probability, else once.
// Shape: argmax a block of 256 threads per 8192 values and row, the last of which picks the winner;
// the k best a block of 1024 threads per 2048 values and row, the last of which merges what the
// others found; a log-probability one block of 1024 threads per row. Steps that wait for each other
// are what limits the k best: at 128k and k up to 64 there are 21 of sorting and 15 of merging, at
// k = 1024 there are 55 and 63. Their bytes are few, 8 · k per part beside the row.
#include "prelude.cuh"

constexpr int argmax_cols = 8192;
constexpr int top_threads = 1024;
constexpr int top_cols = 2 * top_threads;  // a comparison per thread for each step of sorting

struct Candidate {
    f32 logit;
    i32 token;
};

// Ascending with the value, and for equal values with falling id; 0 and -0 are equal, NaN is above
// everything, so that nobody overlooks it.
QI_DEVICE u64 rank_key(f32 value, int id) {
    const u32 bits = __float_as_uint(value + 0.0f);
    const u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return u64(value == value ? ordered : 0xffffffffu) << 32 | (0xffffffffu - u32(id));
}
QI_DEVICE int id_of(u64 key) {
    return int(0xffffffffu - u32(key));
}

QI_DEVICE u64 warp_best(u64 key) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(QI_WARP_MASK, key, step);
        key = other > key ? other : key;
    }
    return key;
}
QI_DEVICE u64 block_best(u64 key, u64* room) {
    key = warp_best(key);
    if (lane_id() == 0) room[warp_id()] = key;
    __syncthreads();
    for (int i = 0; i < int(blockDim.x) / warp_size; ++i)
        key = room[i] > key ? room[i] : key;
    __syncthreads();
    return key;
}

// best[row] = the largest logit, that of the lowest number among equals. partial:
// [n_rows][gridDim.x]; tickets: [n_rows], zeros. grid (n_vocab / 8192, n_rows), 256 threads.
QI_KERNEL qi_argmax(const f32* logits, int n_vocab, u64* partial, u32* tickets, Candidate* best) {
    __shared__ u64 room[warp_size];
    const f32* row = logits + i64(blockIdx.y) * n_vocab;
    const int begin = int(blockIdx.x) * argmax_cols, end = min_of(begin + argmax_cols, n_vocab);
    u64 found = 0;
    for (int i = begin + int(threadIdx.x); i < end; i += int(blockDim.x)) {
        const u64 key = rank_key(row[i], i);
        found = key > found ? key : found;
    }
    found = block_best(found, room);
    u64* of_row = partial + i64(blockIdx.y) * gridDim.x;
    if (threadIdx.x == 0) of_row[blockIdx.x] = found;
    if (!last_block(tickets + blockIdx.y, gridDim.x)) return;
    found = 0;
    for (int i = int(threadIdx.x); i < int(gridDim.x); i += int(blockDim.x))
        found = of_row[i] > found ? of_row[i] : found;
    found = block_best(found, room);
    if (threadIdx.x == 0) best[blockIdx.y] = {row[id_of(found)], id_of(found)};
}

// Sorts the keys, falling, in lists of `length`, a power of two and at least 64: bitonic, so that
// equal or sorted logits take no longer than others.
QI_DEVICE void sort_lists(u64* keys, int length) {
    const int thread = int(threadIdx.x);
#pragma unroll 1
    for (int size = 2; size <= length; size *= 2)
#pragma unroll 1
        for (int step = size / 2; step > 0; step /= 2) {
            const int low = 2 * thread - (thread & (step - 1)), high = low + step;
            const u64 a = keys[low], b = keys[high];
            const bool falling = size == length || (low & size) == 0;
            if ((a < b) == falling) {
                keys[low] = b;
                keys[high] = a;
            }
            // Up to step 32 a warp has the same 64 keys.
            if (step > warp_size || (step == 1 && size >= 2 * warp_size))
                __syncthreads();
            else
                __syncwarp();
        }
}

// Keys of a falling list that come before `key`: larger ones, and equal ones if they go first.
QI_DEVICE int n_before(const u64* list, int length, u64 key, bool equal_first) {
    int n = 0;
#pragma unroll 1
    for (int step = length; step > 0; step /= 2) {
        if (n + step > length) continue;
        const u64 other = list[n + step - 1];
        if (other > key || (equal_first && other == key)) n += step;
    }
    return n;
}

// Makes the first list the best `length` keys of all lists: of two lists at a time each key counts
// those of the other that come before it, which gives its place. Only keys of 0 are equal; the
// first list's go first.
QI_DEVICE void merge_lists(u64* keys, int length) {
#pragma unroll 1
    for (int n = top_cols; n > length; n /= 2) {
        u64 mine[2];
        int places[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = int(threadIdx.x) + i * top_threads;
            mine[i] = 0;
            places[i] = -1;
            if (at >= n) continue;
            mine[i] = keys[at];
            const u64* other = keys + ((at ^ length) & ~(length - 1));
            const bool second = (at & length) != 0;
            const int rank = (at & (length - 1)) + n_before(other, length, mine[i], second);
            if (rank < length) places[i] = (at & ~(2 * length - 1)) / 2 + rank;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (places[i] >= 0) keys[places[i]] = mine[i];
        __syncthreads();
    }
}

// best[row]: the k largest logits in falling order, lower numbers first among equals.
// 1 <= k <= 1024, k <= n_vocab. partial: [n_rows][gridDim.x][k], or null where gridDim.x is 1;
// tickets: [n_rows], zeros. grid (n_vocab / 2048, n_rows), 1024 threads.
QI_KERNEL qi_top_k(const f32* logits, int n_vocab, int k, u64* partial, u32* tickets,
                   Candidate* best) {
    __shared__ u64 keys[top_cols];  // 0 where there is no logit
    const f32* row = logits + i64(blockIdx.y) * n_vocab;
    const int thread = int(threadIdx.x), part = int(blockIdx.x), n_parts = int(gridDim.x);
    int length = 2 * warp_size;
    while (length < k)
        length *= 2;
#pragma unroll
    for (int at = thread; at < top_cols; at += top_threads) {
        const int id = part * top_cols + at;
        keys[at] = id < n_vocab ? rank_key(row[id], id) : 0;
    }
    __syncthreads();
    sort_lists(keys, length);
    merge_lists(keys, length);
    if (n_parts > 1) {
        u64* of_row = partial + i64(blockIdx.y) * n_parts * k;
        if (thread < k) of_row[part * k + thread] = keys[thread];
        if (!last_block(tickets + blockIdx.y, u32(n_parts))) return;
        const int n_others = top_cols / length - 1;  // lists that are merged with the first at once
#pragma unroll 1
        for (int first = 0; first < n_parts - 1; first += n_others) {
            for (int at = length + thread; at < top_cols; at += top_threads) {
                const int place = at & (length - 1);
                int other = first + at / length - 1;
                other += other >= part;  // this block's own is the first
                keys[at] = other < n_parts && place < k ? of_row[other * k + place] : 0;
            }
            __syncthreads();
            merge_lists(keys, length);
        }
    }
    if (thread >= k) return;
    const int id = id_of(keys[thread]);
    best[i64(blockIdx.y) * k + thread] = {row[id], id};
}

// What a log-probability is made of.
struct LogTerms {
    f32 target, maximum;
    double sum;  // Σ exp(x - maximum)
};

// terms[row] of the row's logits and targets[row]. A thread adds its exponentials with the rounding
// errors kept, the threads are added in double. grid n_rows, 1024 threads.
QI_KERNEL qi_log_terms(const f32* logits, int n_vocab, const i32* targets, LogTerms* terms) {
    __shared__ f32 room[warp_size];
    __shared__ double sums[warp_size];
    const f32* row = logits + i64(blockIdx.x) * n_vocab;
    f32 maximum = -infinity();
    for (int i = int(threadIdx.x); i < n_vocab; i += int(blockDim.x))
        maximum = fmaxf(maximum, row[i]);
    maximum = block_max(maximum, room);
    f32 sum = 0.0f, error = 0.0f;
    for (int i = int(threadIdx.x); i < n_vocab; i += int(blockDim.x)) {
        const f32 term = expf(row[i] - maximum), grown = sum + term;
        const f32 added = grown - sum;
        error += (sum - (grown - added)) + (term - added);
        sum = grown;
    }
    double total = double(sum) + double(error);
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2)
        total += __shfl_xor_sync(QI_WARP_MASK, total, step);
    if (lane_id() == 0) sums[warp_id()] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    total = 0.0;
    for (int i = 0; i < int(blockDim.x) / warp_size; ++i)
        total += sums[i];
    terms[blockIdx.x] = {row[targets[blockIdx.x]], maximum, total};
}
