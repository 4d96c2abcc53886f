#include "device/cuda/shared_kv.h"

#include <algorithm>
#include <chrono>

#include "kernels/attention.h"

namespace qi::cuda {

namespace {

int64_t heads_floats(const DeviceNeeds& needs) {
    return (needs.n_head + 2 * needs.kv.n_head_kv) * needs.kv.head_dim;
}

}  // namespace

SharedKv::SharedKv(const GpuShare& share, const DeviceNeeds& needs)
    : needs_(needs),
      slots_(needs.n_pages, needs.kv_share.n_pages),
      boundaries_(needs.kv.n_layer, needs.kv_share.host_share, needs.kv_share.step),
      device_seconds_(size_t(needs.kv.n_layer)),
      host_seconds_(size_t(needs.kv.n_layer)) {
    // The device does not wait for the host to have stored a layer's before it sends the next.
    const int64_t rows =
        std::max(needs.n_batch, needs.kv.n_layer * std::min(needs.n_batch, few_tokens));
    const char* const what = "keys and values on their way";
    sent_ = PinnedMemory(share.gpu, size_t(rows * heads_floats(needs)) * sizeof(float), what);
    answer_ =
        PinnedMemory(share.gpu, size_t(part_floats(needs, needs.n_batch)) * sizeof(float), what);
}

void SharedKv::begin(const BatchInputs& batch, std::span<const int64_t> n_on_device) {
    batch_ = batch;
    boundaries_.begin(batch.segments, n_on_device);
    // Boundaries that move are timed in every pass.
    bool host = boundaries_.adapts(), device = host && slots_.n_slots() > 0;
    for (int64_t layer = 0; layer < needs_.kv.n_layer; ++layer) {
        host |= boundaries_.host_attends(layer);
        device |= boundaries_.device_attends(layer);
    }
    form_ = !device ? Form::host_alone : host ? Form::both : Form::device_alone;
}

void SharedKv::write_bounds(int32_t* bounds) const {
    for (int64_t layer = 0; layer < needs_.kv.n_layer; ++layer) {
        const std::span<const int64_t> pages = boundaries_.pages_of_device(layer);
        for (size_t i = 0; i < batch_.segments.size(); ++i) {
            const Segment& segment = batch_.segments[i];
            std::fill_n(bounds + layer * batch_.n_tokens + segment.row, segment.n,
                        int32_t(pages[i]));
        }
    }
}

Exchange::Rows SharedKv::sending(int64_t layer, const Heads& heads) {
    const int64_t n = batch_.n_tokens;
    const size_t offset =
        n > few_tokens
            ? 0
            : size_t(layer * std::min(needs_.n_batch, few_tokens) * heads_floats(needs_));
    auto* const q = reinterpret_cast<float*>(sent_.data()) + offset;
    heads_ = heads;
    heads_.q = q;
    heads_.k = q + (heads.k - heads.q);
    heads_.v = q + (heads.v - heads.q);
    const int64_t n_words =
        heads.v - heads.q + (n - 1) * heads.kv_stride + needs_.kv.n_head_kv * needs_.kv.head_dim;
    return {reinterpret_cast<CUdeviceptr>(heads.q), sent_.device_address() + offset * sizeof(float),
            n_words};
}

void SharedKv::answer(int64_t layer, const AttentionShape& shape, Heads heads) {
    const auto start = std::chrono::steady_clock::now();
    if (form_ == Form::device_alone) heads.n_head = 0;
    host_.append(batch_, layer, heads);
    auto* const out = reinterpret_cast<float*>(answer_.data());
    if (form_ == Form::host_alone) {
        host_.attend(batch_, layer, shape, heads.q, heads.q_stride, out);
    } else if (form_ == Form::both) {
        const std::span<const int64_t> pages = boundaries_.pages_of_device(layer);
        first_.clear();
        for (const int64_t n_pages : pages)
            first_.push_back(n_pages * kernels::page_size);
        const CpuAttention::Part part{first_.data(),
                                      out + batch_.n_tokens * shape.n_head * needs_.kv.head_dim};
        host_.attend(batch_, layer, shape, heads.q, heads.q_stride, out, &part);
    }
    host_seconds_[size_t(layer)] +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void SharedKv::adapt(bool apart) {
    for (int64_t layer = 0; layer < needs_.kv.n_layer && apart; ++layer)
        boundaries_.adapt(layer, device_seconds_[size_t(layer)], host_seconds_[size_t(layer)]);
    std::fill(device_seconds_.begin(), device_seconds_.end(), 0.0);
    std::fill(host_seconds_.begin(), host_seconds_.end(), 0.0);
}

}  // namespace qi::cuda
