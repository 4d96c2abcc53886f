// Which neurons a step computes: masks, the list of those that are on the GPU, and the sum of what
// they give.
//
// Bytes: predictions or gates [n_tokens][n_ff] once (44 KB per token at n_ff = 11008), masks of
// 1.4 KB, the partial sums (16 · n_embd floats per token, from L2). Shape: masks a thread per
// neuron; the list one block of 1024 threads with a word of 32 neurons each, in turns; the sum a
// thread per output value. All of it is latency: three launches of a few microseconds.
#include "prelude.cuh"

enum Rule { rule_all, rule_exact, rule_predict };  // NeuronRule's numbers
constexpr int n_bounds = 16 * 8;                   // partitions and runs in each, as in down.cu

// masks[t] gets a bit per neuron that token t may use, named those that any token may: a token of
// rule `predict` those whose value is not below the threshold, every other token all. grid
// (n_ff / 256, 1).
QI_KERNEL qi_predicted_masks(const f32* values, f32 threshold, const u8* rules, int n_tokens,
                             int n_ff, u32* masks, u32* named) {
    const int neuron = int(blockIdx.x * blockDim.x + threadIdx.x);
    const int n_words = ceil_div(n_ff, 32), word = neuron / 32;
    u32 any = 0;
    for (int t = 0; t < n_tokens; ++t) {
        bool wanted = neuron < n_ff;
        if (wanted && rules[t] == rule_predict)
            wanted = !(values[i64(t) * n_ff + neuron] < threshold);
        const u32 bits = __ballot_sync(QI_WARP_MASK, wanted);
        if (lane_id() == 0 && word < n_words) masks[t * n_words + word] = bits;
        any |= bits;
    }
    if (lane_id() == 0 && word < n_words) named[word] = any;
}

// The same by gates that are known: those that pass the activation (gate > threshold, or NaN) and,
// with `within`, are in the masks already. Gates of neurons that slot_of_neuron leaves out (below
// 0) are not known: their bits are 0. slot_of_neuron may be null. grid (n_ff / 256, 1).
QI_KERNEL qi_gate_masks(const f32* gates, f32 threshold, const i32* slot_of_neuron, int within,
                        int n_tokens, int n_ff, u32* masks, u32* named) {
    const int neuron = int(blockIdx.x * blockDim.x + threadIdx.x);
    const int n_words = ceil_div(n_ff, 32), word = neuron / 32;
    const bool known = neuron < n_ff && (!slot_of_neuron || slot_of_neuron[neuron] >= 0);
    u32 any = 0;
    for (int t = 0; t < n_tokens; ++t) {
        const bool wanted = known && !(gates[i64(t) * n_ff + neuron] <= threshold);
        u32 bits = __ballot_sync(QI_WARP_MASK, wanted);
        if (word >= n_words) continue;
        if (within) bits &= masks[t * n_words + word];
        __syncwarp();
        if (lane_id() == 0) masks[t * n_words + word] = bits;
        any |= bits;
    }
    if (lane_id() == 0 && word < n_words) named[word] = any;
}

// The named neurons that have a slot, ascending: ids, slots, how many, and bounds[r], the place of
// the first one in run r of the fixed runs of neuron numbers (bounds[n_bounds] is their number).
// One block of 1024 threads.
QI_KERNEL qi_compact(const u32* named, const i32* slot_of_neuron, int n_ff, i32* ids, i32* slots,
                     i32* n_listed, i32* bounds) {
    __shared__ int of_warp[warp_size];
    const int n_words = ceil_div(n_ff, 32), n_warps = int(blockDim.x) / warp_size;
    int done = 0;  // listed by turns before
    for (int first = 0; first < n_words; first += int(blockDim.x)) {
        const int word = first + int(threadIdx.x);
        u32 bits = 0;
        for (u32 left = word < n_words ? named[word] : 0; left; left &= left - 1) {
            const int bit = __ffs(int(left)) - 1;
            if (slot_of_neuron[32 * word + bit] >= 0) bits |= 1u << bit;
        }
        int before = __popc(bits);  // inclusive, first
#pragma unroll
        for (int step = 1; step < warp_size; step *= 2) {
            const int other = __shfl_up_sync(QI_WARP_MASK, before, step);
            if (lane_id() >= step) before += other;
        }
        if (lane_id() == warp_size - 1) of_warp[warp_id()] = before;
        before -= __popc(bits);
        __syncthreads();
        int total = 0;
        for (int w = 0; w < n_warps; ++w) {
            if (w == warp_id()) before += done + total;
            total += of_warp[w];
        }
        __syncthreads();
        done += total;
        int place = before;
        for (u32 left = bits; left; left &= left - 1) {
            const int id = 32 * word + __ffs(int(left)) - 1;
            ids[place] = id;
            slots[place] = slot_of_neuron[id];
            ++place;
        }
        // Runs that begin inside this word.
        if (word < n_words) {
            int run = int((i64(32) * word * n_bounds + n_ff - 1) / n_ff);
            for (;; ++run) {
                const int begin = int(i64(n_ff) * run / n_bounds);
                if (run >= n_bounds || begin >= min_of(32 * word + 32, n_ff)) break;
                if (begin < 32 * word) continue;
                bounds[run] = before + __popc(bits & ((1u << begin % 32) - 1u));
            }
        }
    }
    if (threadIdx.x == 0) {
        *n_listed = done;
        bounds[n_bounds] = done;
    }
}

// *total (unless it is null) grows by what all threads of the block have.
QI_DEVICE void add_to_total(u32 mine, u32* of_warp, u64* total) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2)
        mine += __shfl_xor_sync(QI_WARP_MASK, mine, step);
    if (lane_id() == 0) of_warp[warp_id()] = mine;
    __syncthreads();
    if (threadIdx.x != 0 || !total) return;
    u64 sum = 0;
    for (int w = 0; w < int(blockDim.x) / warp_size; ++w)
        sum += of_warp[w];
    *total += sum;
}

// What the listed neurons (all n_ff without a list) did: active[j] grows by the tokens for which
// h is not 0, total by their sum; each of them may be null. One block of 1024 threads.
QI_KERNEL qi_count_active(const f32* h, i64 h_stride, int by_id, const i32* ids,
                          const i32* n_listed, int n_ff, int n_tokens, u64* active, u64* total) {
    __shared__ u32 of_warp[warp_size];
    const int n = ids ? *n_listed : n_ff;
    u32 mine = 0;
    for (int place = int(threadIdx.x); place < n; place += int(blockDim.x)) {
        const int id = ids ? ids[place] : place;
        u32 count = 0;
        for (int t = 0; t < n_tokens; ++t)
            count += h[t * h_stride + (by_id ? id : place)] != 0.0f;
        if (active) active[id] += count;
        mine += count;
    }
    add_to_total(mine, of_warp, total);
}

// total grows by the bits set in n words. One block of 1024 threads.
QI_KERNEL qi_count_bits(const u32* words, int n, u64* total) {
    __shared__ u32 of_warp[warp_size];
    u32 mine = 0;
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x))
        mine += u32(__popc(words[i]));
    add_to_total(mine, of_warp, total);
}

// What predictions are worth, by gates that are known (see qi_gate_masks): totals[0] grows by the
// neurons whose gate passes the threshold, totals[1] by those of them that the masks leave out, for
// tokens of rule `predict`. One block of 1024 threads.
QI_KERNEL qi_count_missed(const f32* gates, f32 threshold, const i32* slot_of_neuron,
                          const u32* masks, const u8* rules, int n_tokens, int n_ff, u64* totals) {
    __shared__ u32 of_warp[warp_size];
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
    add_to_total(due, of_warp, totals);
    __syncthreads();
    add_to_total(missed, of_warp, totals + 1);
}

// Record i of `from` goes to slot slots[i] of the records; of n_quads · 16 bytes each. grid
// (n_quads / 256, records).
QI_KERNEL qi_place_records(const Quad* from, const i32* slots, i64 n_quads, Quad* records) {
    const i64 quad = i64(blockIdx.x) * blockDim.x + threadIdx.x, record = blockIdx.y;
    if (quad < n_quads) records[slots[record] * n_quads + quad] = from[record * n_quads + quad];
}

// y[t] += Σ_p partial[p][t] + bias + other[t]; bias and other may be null. grid (n_embd / 256,
// n_tokens).
QI_KERNEL qi_add_partials(const f32* partial, int n_partitions, const f32* bias, const f32* other,
                          int n_tokens, int n_embd, f32* y) {
    const int column = int(blockIdx.x * blockDim.x + threadIdx.x);
    const i64 token = blockIdx.y;
    if (column >= n_embd) return;
    const i64 at = token * n_embd + column;
    f32 sum = 0.0f;
    for (int p = 0; p < n_partitions; ++p)
        sum += partial[i64(p) * n_tokens * n_embd + at];
    if (bias) sum += bias[column];
    if (other) sum += other[at];
    y[at] += sum;
}
