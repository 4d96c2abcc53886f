#include "engine/forward.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace qi {

ForwardPass::ForwardPass(const Model& model, Device& device, Type kv_type)
    : model_(model),
      hp_(model.hyper_params()),
      device_(device),
      kv_type_(kv_type),
      residual_(device),
      normed_(device),
      qkv_(device),
      attended_(device),
      input_(device) {}

KvLayout ForwardPass::kv_layout() const {
    return {kv_type_, hp_.n_layer, hp_.n_head_kv, hp_.head_dim};
}

size_t ForwardPass::scratch_bytes() const {
    return residual_.capacity_bytes() + normed_.capacity_bytes() + qkv_.capacity_bytes() +
           attended_.capacity_bytes() + cos_sin_.capacity_bytes() + shifted_.capacity_bytes() +
           input_.capacity_bytes();
}

void ForwardPass::run(const Batch& batch, FfnMonitor& monitor, std::atomic<int64_t>* layers_done) {
    const auto n = int64_t(batch.tokens.size());
    float* x = residual_.reserve(size_t(n * hp_.n_embd));
    float* normed = normed_.reserve(size_t(n * hp_.n_embd));

    const float* cos_sin = nullptr;
    if (hp_.arch->rope != RopeKind::none) {
        float* angles = cos_sin_.reserve(size_t(n * hp_.n_rot));
        for (int64_t i = 0; i < n; ++i)
            model_.rope().angles(batch.positions[size_t(i)], angles + i * hp_.n_rot);
        cos_sin = angles;
    }
    device_.begin({n, batch.segments, batch.rules, cos_sin});

    std::array<Lookup, 2> lookups{Lookup{&model_.token_embedding(), batch.tokens}};
    size_t n_lookups = 1;
    if (const Weight* table = model_.position_embedding()) {
        int32_t* rows = shifted_.reserve(size_t(n));
        for (int64_t i = 0; i < n; ++i)
            rows[i] = batch.positions[size_t(i)] + hp_.arch->position_offset;
        lookups[n_lookups++] = {table, {rows, size_t(n)}};
    }
    device_.embed({lookups.data(), n_lookups}, x);

    int64_t index = 0;
    for (const Layer& layer : model_.layers()) {
        device_.norm(layer.attn_norm, x, n, normed);
        // Predictors look at what attention leaves, or with a parallel residual at what it is
        // given.
        const float* predicted_from = x;
        if (hp_.arch->parallel_residual && layer.ffn.predictor) {
            float* input = input_.reserve(size_t(n * hp_.n_embd));
            device_.copy(x, size_t(n * hp_.n_embd), input);
            predicted_from = input;
        }
        if (!hp_.arch->parallel_residual) {
            attention(layer, index, n, normed, x);
            device_.norm(layer.ffn_norm, x, n, normed);
        } else if (!layer.attn_norm_2) {
            attention(layer, index, n, normed, x);
        } else {
            // Both branches read the layer's input, so the second norm is taken before attention is
            // added to it.
            float* attn_input =
                attended_.reserve(size_t(n * std::max(hp_.n_embd, hp_.n_head * hp_.head_dim)));
            device_.norm(*layer.attn_norm_2, x, n, attn_input);
            attention(layer, index, n, attn_input, x);
        }
        uint64_t* activations =
            monitor.activations.empty() ? nullptr : monitor.activations.data() + index * hp_.n_ff;
        device_.feed_forward(layer.ffn,
                             {normed, predicted_from, monitor.threshold, monitor.check,
                              &monitor.counters[size_t(index)], activations},
                             x);
        layers_done->store(++index, std::memory_order_relaxed);
    }
}

// y += output · attend(q, k, v) with q, k, v from x.
void ForwardPass::attention(const Layer& layer, int64_t index, int64_t n, const float* x,
                            float* y) {
    const int64_t q_width = hp_.n_head * hp_.head_dim, kv_width = hp_.n_head_kv * hp_.head_dim;
    float* q = qkv_.reserve(size_t(n * (q_width + 2 * kv_width)));
    float *k, *v;
    int64_t q_stride, kv_stride;
    if (hp_.arch->fused_qkv) {
        q_stride = kv_stride = q_width + 2 * kv_width;
        k = q + q_width;
        v = k + kv_width;
        const Projection qkv{&layer.qkv, q};
        device_.project(x, n, {&qkv, 1});
    } else {
        q_stride = q_width;
        kv_stride = kv_width;
        k = q + n * q_width;
        v = k + n * kv_width;
        const std::array projections{Projection{&layer.q, q}, Projection{&layer.k, k},
                                     Projection{&layer.v, v}};
        device_.project(x, n, projections);
    }
    device_.append_kv(index, {q, k, v, q_stride, kv_stride, hp_.n_head,
                              hp_.arch->rope == RopeKind::none ? 0 : hp_.n_rot,
                              hp_.arch->rope == RopeKind::neox});

    float* attended = attended_.reserve(size_t(n * q_width));
    const AttentionShape shape{hp_.n_head, hp_.sliding_window,
                               1.0f / std::sqrt(float(hp_.head_dim))};
    device_.attend(index, shape, q, q_stride, attended);
    const Projection output{&layer.attn_output, y, true};
    device_.project(attended, n, {&output, 1});
}

const float* ForwardPass::final_norm(std::span<const int64_t> rows) {
    // Both are free after the last layer.
    const size_t n = rows.size() * size_t(hp_.n_embd);
    float *gathered = normed_.reserve(n), *normed = attended_.reserve(n);
    device_.gather(residual_.data(), rows, hp_.n_embd, gathered);
    device_.norm(model_.output_norm(), gathered, int64_t(rows.size()), normed);
    return normed;
}

void ForwardPass::head(const float* normed, int64_t n, float* out) {
    const Projection logits{&model_.head(), out};
    device_.project(normed, n, {&logits, 1});
}

}  // namespace qi
