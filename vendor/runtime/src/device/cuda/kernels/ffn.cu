// h[t][i] = act(gate_i · x[t]) · (up_i · x[t]) for chosen neurons; QI_WEIGHT names the type of gate
// and up (of up alone where the gates are given).
//
// Bytes: the gate rows of all listed neurons, and the up rows of those whose gate a token wants,
// one after the other also where all are wanted: as many loads are on the way. Shape: a warp per
// neuron with four 16-byte loads per lane on the way, blocks of 4 warps, neurons dealt out by their
// rank in the list, as many blocks as the list can have entries / 4: blocks beyond its length leave
// at once. With eight tokens L1 is the limit, as in matvec.cu: rows one at a time reach as little
// as there.
#include "activation.cuh"
#include "dot.cuh"

constexpr int n_warps = 4;

struct Neurons {
    const u8* records;  // of neurons; gate and up rows at their offsets
    i64 record_stride, gate_offset, up_offset;
    int gated;
    const i32* slots;  // null: all neurons, in order
    const i32* ids;
    const i32* n_listed;
    int n_neurons;  // where all are computed
    const f32* gate_bias;
    const f32* up_bias;
};

struct Choice {
    int act;
    f32 threshold;     // of the activation
    const f32* gates;  // [n_tokens][gate_stride] by neuron, or null: compute them
    i64 gate_stride;
    const u32* masks;  // [n_tokens][n_words], neurons that a token may use; or null: all
    int n_words;
    f32* h;  // [n_tokens][h_stride], by place in the list or by neuron
    i64 h_stride;
    int by_id;
};

// What is counted of values that are not 0: active[id] grows by their number, total by that of
// tokens of a rule other than `all`. Each may be null.
struct Counts {
    const u8* rules;  // [n_tokens]
    u64* active;      // [n_ff]
    u64* total;
};

QI_DEVICE bool may_be_zero(int act) {
    return act == act_relu || act == act_fatrelu || act == act_relu_relu;
}

template <int n_columns>
QI_DEVICE void sum_lanes(f32 (&acc)[n_columns][1], const f32* bias, int id) {
#pragma unroll
    for (int c = 0; c < n_columns; ++c) {
        acc[c][0] = warp_sum(acc[c][0]);
        if (bias) acc[c][0] += bias[id];
    }
}

template <int n_columns>
QI_DEVICE void ffn_rows(const Neurons& neurons, const Choice& choice, const Counts& counts,
                        const Activations& in) {
    using Type = QI_WEIGHT;
    const Type type(in.n_cols);
    const int total = neurons.slots ? *neurons.n_listed : neurons.n_neurons;
    const int place = int(blockIdx.x) * n_warps + warp_id();
    if (place >= total) return;
    const int id = neurons.ids ? neurons.ids[place] : place;
    const u8* record =
        neurons.records + i64(neurons.slots ? neurons.slots[place] : place) * neurons.record_stride;
    const u8* const gate_row = record + neurons.gate_offset;
    const u8* const up_row = record + neurons.up_offset;
    const bool refine = may_be_zero(choice.act);
    const f32 threshold = choice.act == act_fatrelu ? choice.threshold : 0.0f;

    // What decides first: the gate, or without one up itself.
    f32 first[n_columns][1], up[n_columns][1];
    if (choice.gates) {
#pragma unroll
        for (int c = 0; c < n_columns; ++c)
            first[c][0] = choice.gates[i64(in.token(c)) * choice.gate_stride + id];
    } else {
        const u8* const row[1] = {neurons.gated ? gate_row : up_row};
        dot_rows<Type, n_columns, 1>(type, row, in, lane_id(), warp_size, first);
        sum_lanes(first, neurons.gated ? neurons.gate_bias : neurons.up_bias, id);
    }

    bool wanted[n_columns];
    bool any = false;
#pragma unroll
    for (int c = 0; c < n_columns; ++c) {
        const u32* mask = choice.masks + in.token(c) * choice.n_words;
        wanted[c] = !choice.masks || (mask[id / 32] >> id % 32 & 1u);
        if (refine && first[c][0] <= threshold) wanted[c] = false;
        any = any || wanted[c];
    }
    if (any && neurons.gated) {
        const u8* const row[1] = {up_row};
        dot_rows<Type, n_columns, 1>(type, row, in, lane_id(), warp_size, up);
        sum_lanes(up, neurons.up_bias, id);
    }
    f32 mine = 0.0f;  // of lane c: token c's
#pragma unroll
    for (int c = 0; c < n_columns; ++c) {
        if (lane_id() != c || c >= in.n_tokens) continue;
        if (wanted[c])
            mine = neurons.gated ? activate_mul(choice.act, choice.threshold, first[c][0], up[c][0])
                                 : activate(choice.act, choice.threshold, first[c][0]);
        choice.h[c * choice.h_stride + (choice.by_id ? id : place)] = mine;
    }
    if (!counts.active && !counts.total) return;
    const u32 active = __ballot_sync(QI_WARP_MASK, mine != 0.0f);
    if (lane_id() != 0 || !active) return;
    if (counts.active) counts.active[id] += u64(__popc(active));
    if (!counts.total) return;
    u64 n = 0;
#pragma unroll
    for (int c = 0; c < n_columns; ++c)
        n += (active >> c & 1u) && counts.rules[c] != rule_all;
    if (n) atomicAdd(counts.total, n);
}

#define QI_FFN(name, n_columns)                                                                   \
    QI_KERNEL name(const u8* records, i64 record_stride, i64 gate_offset, i64 up_offset,          \
                   int gated, const i32* slots, const i32* ids, const i32* n_listed,              \
                   int n_neurons, const f32* gate_bias, const f32* up_bias, int act,              \
                   f32 threshold, const f32* gates, i64 gate_stride, const u32* masks,            \
                   int n_words, f32* h, i64 h_stride, int by_id, const u8* rules, u64* active,    \
                   u64* total, const f32* x, const i8* codes, const f32* scales, const f32* sums, \
                   int n_cols, int n_tokens) {                                                    \
        ffn_rows<n_columns>(                                                                      \
            {records, record_stride, gate_offset, up_offset, gated, slots, ids, n_listed,         \
             n_neurons, gate_bias, up_bias},                                                      \
            {act, threshold, gates, gate_stride, masks, n_words, h, h_stride, by_id},             \
            {rules, active, total}, {x, codes, scales, sums, n_cols, n_tokens});                  \
    }

QI_FFN(qi_ffn_1, 1)
QI_FFN(qi_ffn_2, 2)
QI_FFN(qi_ffn_4, 4)
QI_FFN(qi_ffn_8, 8)
