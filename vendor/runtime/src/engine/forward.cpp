#include "engine/forward.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace qi {

ForwardPass::ForwardPass(const Model& model, std::span<const Stage> stages,
                         int64_t cross_layer_from)
    : model_(model), hp_(model.hyper_params()), cross_layer_from_(cross_layer_from) {
    for (const Stage& stage : stages)
        parts_.emplace_back(stage);
}

// Predictors look at what attention leaves, which lasts until the layer's end, or with a parallel
// residual at what the layer is given.
size_t ForwardPass::n_predictor_inputs(const HyperParams& hp, int64_t cross_layer_from) {
    return cross_layer_from > 0 ? 2 : hp.arch->parallel_residual ? 1 : 0;
}

std::vector<size_t> ForwardPass::array_sizes(const HyperParams& hp, int64_t n,
                                             int64_t cross_layer_from) {
    const int64_t q_width = hp.n_head * hp.head_dim, kv_width = hp.n_head_kv * hp.head_dim;
    return {size_t(n * hp.n_embd), size_t(n * hp.n_embd), size_t(n * (q_width + 2 * kv_width)),
            size_t(n * std::max(q_width, hp.n_embd)),
            size_t(n * hp.n_embd) * n_predictor_inputs(hp, cross_layer_from)};
}

void ForwardPass::reserve(int64_t n) {
    const std::vector<size_t> sizes = array_sizes(hp_, n, cross_layer_from_);
    for (Part& part : parts_) {
        DeviceArray* const arrays[] = {&part.residual, &part.normed, &part.qkv, &part.attended,
                                       &part.inputs};
        for (size_t i = 0; i < sizes.size(); ++i)
            arrays[i]->reserve(sizes[i]);
    }
}

size_t ForwardPass::scratch_bytes() const {
    size_t bytes =
        cos_sin_.capacity_bytes() + shifted_.capacity_bytes() + crossing_.capacity_bytes();
    for (const Part& part : parts_)
        bytes += part.residual.capacity_bytes() + part.normed.capacity_bytes() +
                 part.qkv.capacity_bytes() + part.attended.capacity_bytes() +
                 part.inputs.capacity_bytes();
    return bytes;
}

void ForwardPass::run(const Batch& batch, const HeadRequest& request, FfnMonitor& monitor,
                      std::atomic<int64_t>* layers_done) {
    const auto n = int64_t(batch.tokens.size());
    const float* cos_sin = nullptr;
    if (hp_.arch->rope != RopeKind::none) {
        float* angles = cos_sin_.reserve(size_t(n * hp_.n_rot));
        for (int64_t i = 0; i < n; ++i)
            model_.rope().angles(batch.positions[size_t(i)], angles + i * hp_.n_rot);
        cos_sin = angles;
    }
    const size_t n_values = size_t(n * hp_.n_embd);
    Part* before = nullptr;
    for (Part& part : parts_) {
        Device& device = *part.stage.device;
        device.begin({n, batch.segments, batch.rules, cos_sin, hp_.n_rot});
        float* x = part.residual.reserve(n_values);
        if (!before)
            embed(part, batch, x);
        else
            cross(*before, part, n);
        const bool is_last = &part == &parts_.back();
        // Counting asks for other steps than computing alone, and so do other rows of logits.
        std::vector<int64_t> key{monitor.check, !monitor.activations.empty()};
        if (is_last && !request.rows.empty()) {
            key.push_back(request.n_best);
            key.push_back(reinterpret_cast<intptr_t>(request.logits));
            key.insert(key.end(), request.rows.begin(), request.rows.end());
        }
        device.repeat(key, [&] {
            for (int64_t i = part.stage.first_layer; i < part.stage.end_layer; ++i) {
                run_layer(part, i, n, monitor, x);
                layers_done->store(i + 1, std::memory_order_relaxed);
            }
            if (is_last) head(request);
        });
        layers_done->store(part.stage.end_layer, std::memory_order_relaxed);
        before = &part;
    }
}

// What the layers of the next stage go on from.
void ForwardPass::cross(Part& from, Part& to, int64_t n) {
    const auto n_values = size_t(n * hp_.n_embd);
    const auto bring = [&](const float* x, float* there) {
        to.stage.device->write(from.stage.device->host_view(x, n_values, crossing_), n_values,
                               there);
    };
    bring(from.residual.data(), to.residual.data());
    const int64_t next = to.stage.first_layer;
    if (predicts_from_before(next))
        bring(predictor_input(from, next - 1, n), predictor_input(to, next - 1, n));
}

float* ForwardPass::predictor_input(Part& part, int64_t index, int64_t n) {
    const auto n_values = size_t(n * hp_.n_embd);
    float* inputs = part.inputs.reserve(n_values * n_predictor_inputs(hp_, cross_layer_from_));
    return inputs + (cross_layer_from_ > 0 ? size_t(index % 2) * n_values : 0);
}

void ForwardPass::embed(Part& part, const Batch& batch, float* x) {
    std::array<Lookup, 2> lookups{Lookup{&model_.token_embedding(), batch.tokens}};
    size_t n_lookups = 1;
    if (const Weight* table = model_.position_embedding()) {
        const size_t n = batch.positions.size();
        int32_t* rows = shifted_.reserve(n);
        for (size_t i = 0; i < n; ++i)
            rows[i] = batch.positions[i] + hp_.arch->position_offset;
        lookups[n_lookups++] = {table, {rows, n}};
    }
    part.stage.device->embed({lookups.data(), n_lookups}, x);
}

void ForwardPass::run_layer(Part& part, int64_t index, int64_t n, FfnMonitor& monitor, float* x) {
    const Layer& layer = model_.layers()[size_t(index)];
    Device& device = *part.stage.device;
    const auto n_values = size_t(n * hp_.n_embd);
    float* normed = part.normed.reserve(n_values);
    device.norm(layer.attn_norm, x, n, normed);
    // The layer's sum will overwrite what predictors look at, attention's already with a parallel
    // residual.
    const bool asked_later = index + 1 < hp_.n_layer && predicts_from_before(index + 1);
    const auto keep_predictor_input = [&] {
        float* kept = predictor_input(part, index, n);
        device.copy(x, n_values, kept);
        return kept;
    };
    const float* predicted_from = x;
    if (hp_.arch->parallel_residual && (layer.ffn.predictor || asked_later))
        predicted_from = keep_predictor_input();
    if (!hp_.arch->parallel_residual) {
        attention(part, index, n, normed, x);
        device.norm(layer.ffn_norm, x, n, normed);
        if (asked_later) keep_predictor_input();
    } else if (!layer.attn_norm_2) {
        attention(part, index, n, normed, x);
    } else {
        // Both branches read the layer's input, so the second norm is taken before attention is
        // added to it.
        float* attn_input =
            part.attended.reserve(size_t(n * std::max(hp_.n_embd, hp_.n_head * hp_.head_dim)));
        device.norm(*layer.attn_norm_2, x, n, attn_input);
        attention(part, index, n, attn_input, x);
    }
    if (predicts_from_before(index)) predicted_from = predictor_input(part, index - 1, n);
    uint64_t* activations =
        monitor.activations.empty() ? nullptr : monitor.activations.data() + index * hp_.n_ff;
    device.feed_forward(layer.ffn,
                        {normed, predicted_from, monitor.threshold, monitor.check,
                         &monitor.counters[size_t(index)], activations},
                        x);
}

// y += output · attend(q, k, v) with q, k, v from x.
void ForwardPass::attention(Part& part, int64_t index, int64_t n, const float* x, float* y) {
    const Layer& layer = model_.layers()[size_t(index)];
    Device& device = *part.stage.device;
    const int64_t q_width = hp_.n_head * hp_.head_dim, kv_width = hp_.n_head_kv * hp_.head_dim;
    float* q = part.qkv.reserve(size_t(n * (q_width + 2 * kv_width)));
    float *k, *v;
    int64_t q_stride, kv_stride;
    if (hp_.arch->fused_qkv) {
        q_stride = kv_stride = q_width + 2 * kv_width;
        k = q + q_width;
        v = k + kv_width;
        const Projection qkv{&layer.qkv, q};
        device.project(x, n, {&qkv, 1});
    } else {
        q_stride = q_width;
        kv_stride = kv_width;
        k = q + n * q_width;
        v = k + n * kv_width;
        const std::array projections{Projection{&layer.q, q}, Projection{&layer.k, k},
                                     Projection{&layer.v, v}};
        device.project(x, n, projections);
    }
    const int64_t of_stage = index - part.stage.first_layer;
    device.append_kv(of_stage, {q, k, v, q_stride, kv_stride, hp_.n_head,
                                hp_.arch->rope == RopeKind::none ? 0 : hp_.n_rot,
                                hp_.arch->rope == RopeKind::neox});

    float* attended = part.attended.reserve(size_t(n * q_width));
    const AttentionShape shape{hp_.n_head, hp_.sliding_window,
                               1.0f / std::sqrt(float(hp_.head_dim))};
    device.attend(of_stage, shape, q, q_stride, attended);
    const Projection output{&layer.attn_output, y, true};
    device.project(attended, n, {&output, 1});
}

const float* ForwardPass::final_norm(std::span<const int64_t> rows) {
    // Both are free after the last layer.
    Part& part = parts_.back();
    Device& device = *part.stage.device;
    const auto n_rows = int64_t(rows.size());
    const size_t n_values = rows.size() * size_t(hp_.n_embd);
    float *gathered = part.normed.reserve(n_values), *normed = part.attended.reserve(n_values);
    const float* x = part.residual.data();
    bool in_place = true;  // the first rows, in order
    for (int64_t i = 0; i < n_rows; ++i)
        in_place &= rows[size_t(i)] == i;
    if (!in_place) {
        device.gather(x, rows, hp_.n_embd, gathered);
        x = gathered;
    }
    device.norm(model_.output_norm(), x, n_rows, normed);
    return normed;
}

void ForwardPass::head(const HeadRequest& request) {
    if (request.rows.empty()) return;
    Device& device = *parts_.back().stage.device;
    const auto n_rows = int64_t(request.rows.size());
    const Projection logits{&model_.head(), request.logits};
    device.project(final_norm(request.rows), n_rows, {&logits, 1});
    if (request.n_best > 0) device.find_best(request.logits, n_rows, hp_.n_vocab, request.n_best);
}

}  // namespace qi
