// What a context has beside its device's own where the host holds its keys and values: all pages in
// host memory, the way across and back, and which pages the device has copies of.
#pragma once

#include <cstdint>
#include <vector>

#include "device/cpu/cpu_attention.h"
#include "device/cuda/exchange.h"
#include "device/cuda/working_space.h"
#include "device/kv_split.h"

namespace qi::cuda {

class SharedKv {
  public:
    // Rows [n_tokens][n_head · head_dim] of an attention, and of a part its terms
    // [n_tokens][n_head][2] behind them.
    static int64_t part_floats(const DeviceNeeds& needs, int64_t n_tokens) {
        return n_tokens * needs.n_head * (needs.kv.head_dim + 2);
    }

    SharedKv(const GpuShare& share, const DeviceNeeds& needs);

    // ---- pages ----
    CpuAttention& host() { return host_; }
    const CpuAttention& host() const { return host_; }
    CpuProducts& products() { return products_; }
    PageSlots& slots() { return slots_; }

    // ---- a batch ----

    // Who attends in a pass over the layers: the same in all of them, so that passes are recorded
    // in few forms. Where both do, either may have nothing to do for some tokens.
    enum class Form { host_alone, device_alone, both };
    Form form() const { return form_; }
    // n_on_device: of each segment's first pages.
    void begin(const BatchInputs& batch, std::span<const int64_t> n_on_device);
    const KvBoundaries& boundaries() const { return boundaries_; }
    // bounds [n_layer][n_tokens]: the pages of each token's sequence that the device attends to.
    void write_bounds(int32_t* bounds) const;

    // Queries, keys and values of a layer cross here; `heads` are the device's.
    Exchange::Rows sending(int64_t layer, const Heads& heads);
    // What the host does with them: it stores keys and values, and unless the device is alone it
    // attends to its part.
    // `heads` are those of sent_heads(), taken when they were sent: a replay sends what it
    // recorded.
    void answer(int64_t layer, const AttentionShape& shape, Heads heads);
    const Heads& sent_heads() const { return heads_; }
    CUdeviceptr answered() const { return answer_.device_address(); }

    // ---- times ----
    void add_device_seconds(int64_t layer, double seconds) {
        device_seconds_[size_t(layer)] += seconds;
    }
    // Moves the boundaries by the times since the last call, or with `apart` false, where one side
    // waited for the other, forgets these.
    void adapt(bool apart);

  private:
    DeviceNeeds needs_;
    CpuProducts products_{1};
    CpuAttention host_{products_};
    PageSlots slots_;
    KvBoundaries boundaries_;
    PinnedMemory sent_;    // by layer [few_tokens] rows of queries, keys and values, or [n_batch]
    PinnedMemory answer_;  // part_floats
    Heads heads_{};        // last sent, in sent_
    Form form_ = Form::both;
    BatchInputs batch_{};
    std::vector<int64_t> first_;  // [n_segments] position that is the host's, of a layer
    std::vector<double> device_seconds_, host_seconds_;  // [n_layer]
};

}  // namespace qi::cuda
