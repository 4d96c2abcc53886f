// What only batches of more than a few tokens do: whole matrices, multiplied by tiles or by cuBLAS.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>

#include "base/error.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"

namespace qi::cuda {

using What = ProductChoice::What;

void CudaDevice::multiply(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols,
                          std::span<const cuda::Product> products, bool accumulate) {
    if (known_cublas(type, What::rows, n_rows))
        return halves_->multiply(x, n_rows, products, accumulate);
    share_.kernels->multiply(stream_, prepared(type, x, n_rows, n_cols), products, accumulate,
                             needs_.deterministic ? ProductKernel::rows : ProductKernel::automatic);
}

void CudaDevice::multiply_by_neuron(const DownTileArgs& args) {
    if (known_cublas(args.w.type, What::neurons, args.n_tokens))
        return halves_->multiply_by_neuron(args);
    share_.kernels->down_tiles(stream_, args);
}

bool CudaDevice::known_cublas(Type type, What what, int64_t n_tokens) const {
    return halves_ && n_tokens > few_tokens &&
           HalfProducts::takes(type, share_.gpu->attributes().architecture) &&
           share_.choice->known(type, what, n_tokens).value_or(false);
}

namespace {

// The shortest time of a few runs of what `enqueue` puts on the stream, after one that loads
// kernels.
template <typename Enqueue>
double seconds_of(const Stream& stream, const std::shared_ptr<Gpu>& gpu, const Enqueue& enqueue) {
    constexpr int n_runs = 3;
    enqueue();
    double shortest = HUGE_VAL;
    const Event begin(gpu, true), end(gpu, true);
    for (int run = 0; run < n_runs; ++run) {
        begin.record(stream);
        enqueue();
        end.record(stream);
        end.synchronize();
        shortest = std::min(shortest, Event::seconds_between(begin, end));
    }
    return shortest;
}

}  // namespace

bool CudaDevice::choose_cublas(const DeviceWeight& w, What what, CUdeviceptr x, int64_t n_tokens) {
    if (!halves_ || !HalfProducts::takes(w.type, share_.gpu->attributes().architecture))
        return false;
    if (const auto known = share_.choice->known(w.type, what, n_tokens)) return *known;
    // Results go to room that is free now, as much of the matrix as has room there.
    const int64_t room = needs_.n_batch * needs_.n_ff;
    DeviceWeight part = w;
    if (what == What::rows) part.n_rows = std::min(w.n_rows, room / n_tokens);
    if (part.n_rows == 0 || (what == What::neurons && n_tokens * w.n_cols > room)) return false;
    double tiles = 0, halves = 0;
    if (what == What::rows) {
        const cuda::Product product{part, 0, lifted_, part.n_rows};
        tiles = seconds_of(stream_, share_.gpu, [&] {
            prepared_from_ = 0;
            share_.kernels->multiply(stream_, prepared(w.type, x, n_tokens, w.n_cols),
                                     {&product, 1}, false);
        });
        halves = seconds_of(stream_, share_.gpu, [&] {
            halves_->multiply(x, n_tokens, {&product, 1}, false);
        });
    } else {
        DownTileArgs args;
        args.w = w;
        args.h = x;
        args.h_stride = w.n_rows;
        args.n_tokens = n_tokens;
        args.y = lifted_;
        tiles = seconds_of(stream_, share_.gpu, [&] { share_.kernels->down_tiles(stream_, args); });
        halves = seconds_of(stream_, share_.gpu, [&] { halves_->multiply_by_neuron(args); });
    }
    // Tiles lose less to rounding, so a tie is theirs.
    const bool cublas = halves < 0.95 * tiles;
    share_.choice->set(w.type, what, n_tokens, cublas);
    log(LogLevel::debug,
        format("products of %s with up to %lld tokens: %s (%.3g ms by tiles, %.3g ms by cuBLAS)",
               traits(w.type).name, (long long)n_tokens, cublas ? "cuBLAS" : "tiles", 1e3 * tiles,
               1e3 * halves));
    return cublas;
}

// Before anything is computed: what is measured writes where results will stand.
void CudaDevice::choose_for(const FeedForward& ffn, const DeviceFfn& kept, CUdeviceptr x) {
    const int64_t n = batch_.n_tokens;
    if (ffn.gated) choose_cublas(kept.gate(), What::rows, x, n);
    choose_cublas(kept.up(), What::rows, x, n);
    // Any numbers do for neurons' values; not a number would do as well.
    if (ffn.down_by_neuron)
        choose_cublas(kept.by_neuron(), What::neurons, hidden_, n);
    else
        choose_cublas(kept.down, What::rows, hidden_, n);
    prepared_from_ = 0;
}

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
    const NeuronList by_slot = kept.list_by_slot();
    count_active(kept, kept.whole() ? nullptr : &by_slot, hidden_, n_slots, 0, n);
    prepared_from_ = quantised ? hidden_ : 0;
    prepared_rows_ = n;
    prepared_cols_ = n_slots;
    if (!by_neuron) {
        const cuda::Product down{kept.down, kept.down_bias, address(y), n_embd};
        multiply(kept.down.type, hidden_, n, n_slots, {&down, 1}, true);
        prepared_from_ = 0;
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
    const bool predicted = std::any_of(batch_.rules.begin(), batch_.rules.end(),
                                       [](NeuronRule r) { return r == NeuronRule::predict; });
    if (!panels_ || n <= few_tokens || predicted || kept.whole()) return false;
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
