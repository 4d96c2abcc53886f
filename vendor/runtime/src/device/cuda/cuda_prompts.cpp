// Feed-forward networks of more than a few tokens: whole matrices, and neurons of the host brought
// over.
#include <algorithm>
#include <bit>
#include <chrono>

#include "base/error.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"

namespace qi::cuda {

using What = ProductChoice::What;

// All neurons kept, for all tokens.
void CudaDevice::compute_many(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                              float* y) {
    Kernels& kernels = *share_.kernels;
    const NeuronWeights& w = kept.weights;
    const int64_t n = batch_.n_tokens, n_embd = needs_.n_embd, n_slots = kept.n_slots();
    const CUdeviceptr x = address(batch.x);
    choose_for(ffn, kept, x);
    const cuda::Product first[2] = {{kept.gate(), w.gate_bias, hidden_, n_slots},
                                    {kept.up(), w.up_bias, ffn.gated ? lifted_ : hidden_, n_slots}};
    if (ffn.gated && w.gate_type == w.up_type) {
        multiply(w.up_type, x, n, n_embd, first, false);
    } else {
        if (ffn.gated) multiply(w.gate_type, x, n, n_embd, {&first[0], 1}, false);
        multiply(w.up_type, x, n, n_embd, {&first[1], 1}, false);
    }
    const bool by_neuron = ffn.down_by_neuron;
    ActMulArgs act;
    act.act = device_act(ffn.act.kind);
    act.threshold = ffn.act.threshold;
    act.gate = act.h = hidden_;
    act.up = ffn.gated ? lifted_ : 0;
    act.n_tokens = n;
    act.n = n_slots;
    const bool quantised =
        !by_neuron && wants_q8(kept.down.type) && !known_cublas(kept.down.type, What::rows, n);
    if (quantised) act.q8 = Q8::at(q8_, n, n_slots);
    kernels.act_mul(stream_, act);
    count_active(kept, hidden_, n_slots, n);
    prepared_ = {quantised ? hidden_ : 0, n, n_slots};
    if (!by_neuron) {
        const cuda::Product down{kept.down, kept.down_bias, address(y), n_embd};
        multiply(kept.down.type, hidden_, n, n_slots, {&down, 1}, true);
        prepared_ = {};
        return;
    }
    DownTileArgs down;
    down.w = kept.by_neuron();
    down.h = hidden_;
    down.h_stride = n_slots;
    down.n_tokens = n;
    down.bias = kept.down_bias;
    down.y = address(y);
    down.room = lifted_;
    down.room_bytes = size_t(needs_.n_batch * needs_.n_ff) * sizeof(float);
    multiply_by_neuron(down);
}

// ---- neurons that the host keeps ----

bool CudaDevice::streams(const FeedForward& ffn, const DeviceFfn& kept) {
    const int64_t n = batch_.n_tokens;
    if (!panels_ || n <= few_tokens || predicts() || kept.whole()) return false;
    if (panels_->neurons_together(ffn) == 0) return false;
    const Type type = ffn.up.weight.type;
    if (const auto known = share_.choice->known(type, What::streamed, n)) return *known;
    const Trial& trial = trials_[{type, int64_t(std::bit_ceil(uint64_t(n)))}];
    return trial.host > 0;
}

void CudaDevice::add_trial(const FeedForward& ffn, const DeviceFfn& kept, bool streamed,
                           double seconds) {
    const int64_t n = batch_.n_tokens;
    const Type type = ffn.up.weight.type;
    if (!panels_ || share_.choice->known(type, What::streamed, n)) return;
    Trial& trial = trials_[{type, int64_t(std::bit_ceil(uint64_t(n)))}];
    // The first time kernels are loaded and chosen.
    if (streamed && !std::exchange(trial.is_warm, true)) return;
    (streamed ? trial.streamed : trial.host) = seconds / double(kept.rest.neurons().size());
    if (trial.streamed == 0 || trial.host == 0) return;
    share_.choice->set(type, What::streamed, n, trial.streamed < trial.host);
    log(LogLevel::debug,
        format("neurons of %s that the host keeps, up to %lld tokens: %s (%.3g us each brought to "
               "the GPU, %.3g us with the host)",
               traits(type).name, (long long)n, trial.streamed < trial.host ? "brought" : "host",
               1e6 * trial.streamed, 1e6 * trial.host));
}

void CudaDevice::compute_streamed(const FeedForward& ffn, const DeviceFfn& kept,
                                  const FfnBatch& batch, float* y) {
    using Clock = std::chrono::steady_clock;
    const bool trial =
        !share_.choice->known(ffn.up.weight.type, What::streamed, batch_.n_tokens).has_value();
    if (trial) stream_.synchronize();
    const auto start = Clock::now();
    const std::span<const int32_t> rest = kept.rest.neurons();
    const auto together = size_t(panels_->neurons_together(ffn));
    for (size_t first = 0; first < rest.size(); first += together) {
        if (cancel_ && cancel_->load(std::memory_order_relaxed)) fail(QI_CANCELLED, "cancelled");
        const auto some = rest.subspan(first, std::min(together, rest.size() - first));
        // With some neurons here, their sum has the bias.
        DeviceFfn panel = panels_->bring(ffn, some, first == 0 && kept.n_slots() == 0, stream_);
        panel.index = kept.index;
        compute_many(ffn, panel, batch, y);
        panels_->done(stream_);
    }
    if (!trial) return;
    stream_.synchronize();
    add_trial(ffn, kept, true, std::chrono::duration<double>(Clock::now() - start).count());
}

}  // namespace qi::cuda
