// What becomes of logits: the best one, the k best, the log-probability of a target.
//
// Bytes: a row of n_vocab floats (0.5 MB at 128k), once for argmax, twice for a log-probability, 3
// to 9 times for the k best, from L2. Shape: argmax a block of 256 threads per 8192 values and row,
// the last of which picks the winner; the others one block of 1024 threads per row.
#include "prelude.cuh"

constexpr int argmax_cols = 8192;
constexpr int top_threads = 1024;

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

// best[row]: the k largest logits in falling order, lower numbers first among equals.
// 1 <= k <= 1024, k <= n_vocab. grid n_rows, 1024 threads.
//
// The k-th largest key is found byte by byte: keys are counted by the next byte among those that
// share the bytes found so far. Counting is by integer atomics, so its order does not matter, and
// neither does the order in which the chosen are collected, since they are sorted afterwards.
QI_KERNEL qi_top_k(const f32* logits, int n_vocab, int k, Candidate* best) {
    __shared__ u32 counts[256];
    __shared__ u64 chosen[top_threads];
    __shared__ u64 prefix;
    __shared__ u32 wanted, n_chosen;
    __shared__ int found;
    const f32* row = logits + i64(blockIdx.x) * n_vocab;
    if (threadIdx.x == 0) {
        prefix = 0;
        wanted = u32(k);
        n_chosen = 0;
        found = 0;
    }
    int shift = 64;
    do {
        shift -= 8;
        if (threadIdx.x < 256) counts[threadIdx.x] = 0;
        __syncthreads();
        const u64 above = prefix;
        for (int i = int(threadIdx.x); i < n_vocab; i += top_threads) {
            const u64 key = rank_key(row[i], i);
            if (shift == 56 || key >> (shift + 8) == above >> (shift + 8))
                atomicAdd(&counts[u32(key >> shift) & 255u], 1u);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 larger = 0;
            int byte = 255;
            while (larger + counts[byte] < wanted)
                larger += counts[byte--];
            wanted -= larger;
            prefix |= u64(byte) << shift;
            // All keys of this byte are among the best: no need to look further.
            found = counts[byte] == wanted;
        }
        __syncthreads();
    } while (!found && shift > 0);
    const u64 lowest = prefix;
    for (int i = int(threadIdx.x); i < n_vocab; i += top_threads) {
        const u64 key = rank_key(row[i], i);
        if (key >= lowest) chosen[atomicAdd(&n_chosen, 1u)] = key;
    }
    __syncthreads();
    if (int(threadIdx.x) >= k) chosen[threadIdx.x] = 0;
    __syncthreads();
    // Bitonic sort, falling.
    for (int size = 2; size <= top_threads; size *= 2)
        for (int step = size / 2; step > 0; step /= 2) {
            const int at = int(threadIdx.x), other = at ^ step;
            const u64 mine = chosen[at], theirs = chosen[other];
            const bool larger = (at & size) == 0 ? at < other : at > other;
            __syncthreads();
            chosen[at] = (mine > theirs) == larger ? mine : theirs;
            __syncthreads();
        }
    if (int(threadIdx.x) >= k) return;
    const int id = id_of(chosen[threadIdx.x]);
    best[i64(blockIdx.x) * k + threadIdx.x] = {row[id], id};
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
