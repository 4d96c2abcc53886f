// Which neurons a step computes: masks, and the list of those that are on the GPU; for prompts,
// what is counted of them and the sum of parts.
//
// Bytes: predictions [n_tokens][n_ff] once (44 KB per token at n_ff = 11008), masks of 1.4 KB.
// Shape: masks a thread per neuron, the list by the block that comes last. All of it is latency,
// and one launch.
#include "prelude.cuh"

constexpr int n_bounds = 16 * 8;  // partitions and runs in each, as in down.cu
constexpr int max_threads = 1024;

// Where a list of chosen neurons goes: ascending ids, their slots, how many, and bounds[r], the
// place of the first one in run r of the fixed runs of neuron numbers (bounds[n_bounds] is their
// number).
struct List {
    i32* ids;
    i32* slots;
    i32* n;
    i32* bounds;
};

// *total (unless it is null) grows by what all threads of the block have.
QI_DEVICE void add_to_total(u32 mine, u64* total) {
    __shared__ u32 of_warp[warp_size];
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2)
        mine += __shfl_xor_sync(QI_WARP_MASK, mine, step);
    if (lane_id() == 0) of_warp[warp_id()] = mine;
    __syncthreads();
    u64 sum = 0;
    for (int w = 0; threadIdx.x == 0 && w < int(blockDim.x) / warp_size; ++w)
        sum += of_warp[w];
    if (sum && total) atomicAdd(total, sum);
    __syncthreads();
}

// Inclusive, over the lanes of a warp.
QI_DEVICE int warp_prefix_sum(int value) {
#pragma unroll
    for (int step = 1; step < warp_size; step *= 2) {
        const int other = __shfl_up_sync(QI_WARP_MASK, value, step);
        if (lane_id() >= step) value += other;
    }
    return value;
}

// The list of the neurons whose bits are set, by one block of 1024 threads: a thread counts the
// bits of a word, then a warp at a time writes what a word names, a lane each.
QI_DEVICE void compact(const u32* words, const i32* slot_of_neuron, int n_ff, const List& list) {
    __shared__ u32 bits_of[max_threads];
    __shared__ int place_of[max_threads];  // of the first neuron of each word
    __shared__ int of_warp[warp_size];
    const int n_words = ceil_div(n_ff, 32), n_warps = int(blockDim.x) / warp_size;
    int done = 0;  // listed by turns before
    for (int first = 0; first < n_words; first += int(blockDim.x)) {
        const int word = first + int(threadIdx.x);
        const u32 bits = word < n_words ? words[word] : 0;
        const int to_here = warp_prefix_sum(__popc(bits));
        if (lane_id() == warp_size - 1) of_warp[warp_id()] = to_here;
        __syncthreads();
        const int of_warps = warp_prefix_sum(lane_id() < n_warps ? of_warp[lane_id()] : 0);
        const int total = __shfl_sync(QI_WARP_MASK, of_warps, warp_size - 1);
        const int warps_before = __shfl_sync(QI_WARP_MASK, of_warps, max_of(warp_id() - 1, 0));
        bits_of[threadIdx.x] = bits;
        place_of[threadIdx.x] = done + (warp_id() > 0 ? warps_before : 0) + to_here - __popc(bits);
        __syncthreads();
        const int n_here = min_of(n_words - first, int(blockDim.x));
        for (int w = warp_id(); w < n_here; w += n_warps) {
            const u32 named = bits_of[w];
            if (!(named >> lane_id() & 1u)) continue;
            const int id = 32 * (first + w) + lane_id();
            const int place = place_of[w] + __popc(named & ((1u << lane_id()) - 1u));
            list.ids[place] = id;
            list.slots[place] = slot_of_neuron[id];
        }
        for (int run = int(threadIdx.x); run < n_bounds; run += int(blockDim.x)) {
            const int begin = int(i64(n_ff) * run / n_bounds), w = begin / 32 - first;
            if (w >= 0 && w < n_here)
                list.bounds[run] = place_of[w] + __popc(bits_of[w] & ((1u << begin % 32) - 1u));
        }
        done += total;
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    *list.n = done;
    list.bounds[n_bounds] = done;
}

// masks[t] gets a bit per neuron that token t may use: a token of rule `predict` those whose
// prediction is not below the threshold, every other token all. total grows by the bits of tokens
// of rule `predict`. With a list, its block that comes last lists the neurons that any token may
// use and that have a slot; listed [n_words] is room, ticket is zero and left at zero. grid
// n_ff / 1024, 1024 threads.
QI_KERNEL qi_select(const f32* predictions, f32 threshold, const u8* rules, int n_tokens, int n_ff,
                    u32* masks, u64* total, const i32* slot_of_neuron, u32* listed, i32* ids,
                    i32* slots, i32* n_listed, i32* bounds, u32* ticket) {
    const int neuron = int(blockIdx.x * blockDim.x + threadIdx.x);
    const int n_words = ceil_div(n_ff, 32), word = neuron / 32;
    const bool writes = lane_id() == 0 && word < n_words;
    u32 any = 0, n_predicted = 0;
    for (int t = 0; t < n_tokens; ++t) {
        const bool predicts = rules[t] == rule_predict;
        bool wanted = neuron < n_ff;
        if (wanted && predicts) wanted = !(predictions[i64(t) * n_ff + neuron] < threshold);
        const u32 bits = __ballot_sync(QI_WARP_MASK, wanted);
        if (writes) masks[t * n_words + word] = bits;
        if (writes && predicts) n_predicted += u32(__popc(bits));
        any |= bits;
    }
    add_to_total(n_predicted, total);
    if (!ids) return;
    const u32 here =
        __ballot_sync(QI_WARP_MASK, neuron < n_ff && slot_of_neuron[min_of(neuron, n_ff - 1)] >= 0);
    if (writes) listed[word] = any & here;
    if (last_block(ticket, gridDim.x))
        compact(listed, slot_of_neuron, n_ff, {ids, slots, n_listed, bounds});
}

// What the listed neurons (all n_ff without a list) did: active[j] grows by the tokens for which
// h is not 0, total by their sum; each of them may be null. One block of 1024 threads.
QI_KERNEL qi_count_active(const f32* h, i64 h_stride, const i32* ids, const i32* n_listed, int n_ff,
                          int n_tokens, u64* active, u64* total) {
    const int n = ids ? *n_listed : n_ff;
    u32 mine = 0;
    for (int place = int(threadIdx.x); place < n; place += int(blockDim.x)) {
        const int id = ids ? ids[place] : place;
        u32 count = 0;
        for (int t = 0; t < n_tokens; ++t)
            count += h[t * h_stride + place] != 0.0f;
        if (active) active[id] += count;
        mine += count;
    }
    add_to_total(mine, total);
}

// What predictions are worth, by gates that are known: totals[0] grows by the neurons whose gate
// passes the threshold, totals[1] by those of them that the masks leave out, for tokens of rule
// `predict`. Neurons that slot_of_neuron leaves out (below 0) have no gate; it may be null. One
// block of 1024 threads.
QI_KERNEL qi_count_missed(const f32* gates, f32 threshold, const i32* slot_of_neuron,
                          const u32* masks, const u8* rules, int n_tokens, int n_ff, u64* totals) {
    const int n_words = ceil_div(n_ff, 32);
    u32 due = 0, missed = 0;
    for (int t = 0; t < n_tokens; ++t) {
        if (rules[t] != rule_predict) continue;
        for (int neuron = int(threadIdx.x); neuron < n_ff; neuron += int(blockDim.x)) {
            if (slot_of_neuron && slot_of_neuron[neuron] < 0) continue;
            if (!(gates[i64(t) * n_ff + neuron] > threshold)) continue;
            ++due;
            missed += ~(masks[t * n_words + neuron / 32] >> neuron % 32) & 1u;
        }
    }
    add_to_total(due, totals);
    add_to_total(missed, totals + 1);
}

// Record i of `from` goes to slot slots[i] of the records; of n_quads · 16 bytes each. grid
// (n_quads / 256, records).
QI_KERNEL qi_place_records(const Quad* from, const i32* slots, i64 n_quads, Quad* records) {
    const i64 quad = i64(blockIdx.x) * blockDim.x + threadIdx.x, record = blockIdx.y;
    if (quad < n_quads) records[slots[record] * n_quads + quad] = from[record * n_quads + quad];
}

// y[t] += Σ_p partial[p][t] + bias; bias may be null. grid (n_embd / 256, n_tokens).
QI_KERNEL qi_add_partials(const f32* partial, int n_partitions, const f32* bias, int n_tokens,
                          int n_embd, f32* y) {
    const int column = int(blockIdx.x * blockDim.x + threadIdx.x);
    const i64 token = blockIdx.y;
    if (column >= n_embd) return;
    const i64 at = token * n_embd + column;
    f32 sum = 0.0f;
    for (int p = 0; p < n_partitions; ++p)
        sum += partial[i64(p) * n_tokens * n_embd + at];
    if (bias) sum += bias[column];
    y[at] += sum;
}
