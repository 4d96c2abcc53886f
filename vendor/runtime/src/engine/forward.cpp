#include "engine/forward.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace qi {

ForwardPass::ForwardPass(const Model& model, Device& device, Type kv_type)
    : model_(model), hp_(model.hyper_params()), device_(device), kv_type_(kv_type) {}

KvLayout ForwardPass::kv_layout() const {
    return {kv_type_, hp_.n_layer, hp_.n_head_kv, hp_.head_dim};
}

size_t ForwardPass::scratch_bytes() const {
    return residual_.capacity_bytes() + normed_.capacity_bytes() + qkv_.capacity_bytes() +
           attended_.capacity_bytes() + cos_sin_.capacity_bytes() + shifted_.capacity_bytes() +
           input_.capacity_bytes();
}

const float* ForwardPass::run(const Batch& batch, FfnMonitor& monitor,
                              std::atomic<int64_t>* layers_done) {
    const auto n = int64_t(batch.tokens.size());
    float* x = residual_.reserve(size_t(n * hp_.n_embd));
    float* normed = normed_.reserve(size_t(n * hp_.n_embd));

    device_.embed(model_.token_embedding(), batch.tokens, x, false);
    if (const Weight* table = model_.position_embedding()) {
        int32_t* rows = shifted_.reserve(size_t(n));
        for (int64_t i = 0; i < n; ++i)
            rows[i] = batch.positions[size_t(i)] + hp_.arch->position_offset;
        device_.embed(*table, {rows, size_t(n)}, x, true);
    }
    if (hp_.arch->rope != RopeKind::none) {
        float* cos_sin = cos_sin_.reserve(size_t(n * hp_.n_rot));
        for (int64_t i = 0; i < n; ++i)
            model_.rope().angles(batch.positions[size_t(i)], cos_sin + i * hp_.n_rot);
    }

    int64_t index = 0;
    for (const Layer& layer : model_.layers()) {
        device_.norm(layer.attn_norm, x, n, normed);
        // Predictors look at what attention leaves, or with a parallel residual at what it is
        // given.
        const float* predicted_from = x;
        if (hp_.arch->parallel_residual && layer.ffn.predictor) {
            float* input = input_.reserve(size_t(n * hp_.n_embd));
            std::memcpy(input, x, size_t(n * hp_.n_embd) * sizeof(float));
            predicted_from = input;
        }
        if (!hp_.arch->parallel_residual) {
            attention(layer, index, batch, normed, x);
            device_.norm(layer.ffn_norm, x, n, normed);
        } else if (!layer.attn_norm_2) {
            attention(layer, index, batch, normed, x);
        } else {
            // Both branches read the layer's input, so the second norm is taken before attention is
            // added to it.
            float* attn_input =
                attended_.reserve(size_t(n * std::max(hp_.n_embd, hp_.n_head * hp_.head_dim)));
            device_.norm(*layer.attn_norm_2, x, n, attn_input);
            attention(layer, index, batch, attn_input, x);
        }
        uint64_t* activations =
            monitor.activations.empty() ? nullptr : monitor.activations.data() + index * hp_.n_ff;
        device_.feed_forward(layer.ffn,
                             {normed, predicted_from, n, batch.rules, monitor.threshold,
                              monitor.check, &monitor.counters[size_t(index)], activations},
                             x);
        layers_done->store(++index, std::memory_order_relaxed);
    }
    return x;
}

// y += output · attend(q, k, v) with q, k, v from x.
void ForwardPass::attention(const Layer& layer, int64_t index, const Batch& batch, const float* x,
                            float* y) {
    const auto n = int64_t(batch.tokens.size());
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
    if (hp_.arch->rope != RopeKind::none) {
        const bool neox = hp_.arch->rope == RopeKind::neox;
        device_.rope(q, n, q_stride, hp_.n_head, hp_.head_dim, cos_sin_.data(), hp_.n_rot, neox);
        device_.rope(k, n, kv_stride, hp_.n_head_kv, hp_.head_dim, cos_sin_.data(), hp_.n_rot,
                     neox);
    }
    device_.append_kv(index, batch.segments, k, v, kv_stride);

    float* attended = attended_.reserve(size_t(n * q_width));
    const AttentionShape shape{hp_.n_head, hp_.sliding_window,
                               1.0f / std::sqrt(float(hp_.head_dim))};
    device_.attend(index, shape, batch.segments, q, q_stride, attended);
    const Projection output{&layer.attn_output, y, true};
    device_.project(attended, n, {&output, 1});
}

void ForwardPass::final_norm(std::span<const int64_t> rows, float* out) {
    // The normed buffer is free after the last layer: gather the rows there, norm them together.
    float* gathered = normed_.reserve(rows.size() * size_t(hp_.n_embd));
    for (size_t i = 0; i < rows.size(); ++i)
        std::memcpy(gathered + i * size_t(hp_.n_embd), residual_.data() + rows[i] * hp_.n_embd,
                    size_t(hp_.n_embd) * sizeof(float));
    device_.norm(model_.output_norm(), gathered, int64_t(rows.size()), out);
}

void ForwardPass::head(const float* normed, int64_t n, float* out) {
    const Projection logits{&model_.head(), out};
    device_.project(normed, n, {&logits, 1});
}

}  // namespace qi
