// What only batches of more than a few tokens do: whole matrices, multiplied by tiles or by cuBLAS.
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"

namespace qi::cuda {

using Inner = ProductChoice::Inner;

void CudaDevice::multiply(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols,
                          std::span<const cuda::Product> products, bool accumulate) {
    if (known_cublas(type, Inner::rows, n_rows))
        return halves_->multiply(x, n_rows, products, accumulate);
    share_.kernels->multiply(stream_, prepared(type, x, n_rows, n_cols), products, accumulate,
                             needs_.deterministic ? ProductKernel::rows : ProductKernel::automatic);
}

void CudaDevice::multiply_by_neuron(const DownTileArgs& args) {
    if (known_cublas(args.w.type, Inner::neurons, args.n_tokens))
        return halves_->multiply_by_neuron(args);
    share_.kernels->down_tiles(stream_, args);
}

bool CudaDevice::known_cublas(Type type, Inner inner, int64_t n_tokens) const {
    return halves_ && n_tokens > few_tokens &&
           HalfProducts::takes(type, share_.gpu->attributes().architecture) &&
           share_.choice->cublas(type, inner, n_tokens).value_or(false);
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

bool CudaDevice::choose_cublas(const DeviceWeight& w, Inner inner, CUdeviceptr x,
                               int64_t n_tokens) {
    if (!halves_ || !HalfProducts::takes(w.type, share_.gpu->attributes().architecture))
        return false;
    if (const auto known = share_.choice->cublas(w.type, inner, n_tokens)) return *known;
    // Results go to room that is free now, as much of the matrix as has room there.
    const int64_t room = needs_.n_batch * needs_.n_ff;
    DeviceWeight part = w;
    if (inner == Inner::rows) part.n_rows = std::min(w.n_rows, room / n_tokens);
    if (part.n_rows == 0 || (inner == Inner::neurons && n_tokens * w.n_cols > room)) return false;
    double tiles = 0, halves = 0;
    if (inner == Inner::rows) {
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
    share_.choice->set(w.type, inner, n_tokens, cublas);
    log(LogLevel::debug,
        format("products of %s with up to %lld tokens: %s (%.3g ms by tiles, %.3g ms by cuBLAS)",
               traits(w.type).name, (long long)n_tokens, cublas ? "cuBLAS" : "tiles", 1e3 * tiles,
               1e3 * halves));
    return cublas;
}

// Before anything is computed: what is measured writes where results will stand.
void CudaDevice::choose_for(const FeedForward& ffn, const DeviceFfn& kept, CUdeviceptr x) {
    const int64_t n = batch_.n_tokens;
    if (ffn.gated) choose_cublas(kept.gate(), Inner::rows, x, n);
    choose_cublas(kept.up(), Inner::rows, x, n);
    // Any numbers do for neurons' values; not a number would do as well.
    if (ffn.down_by_neuron)
        choose_cublas(kept.by_neuron(), Inner::neurons, hidden_, n);
    else
        choose_cublas(kept.down, Inner::rows, hidden_, n);
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
        !by_neuron && wants_q8(kept.down.type) && !known_cublas(kept.down.type, Inner::rows, n);
    if (quantised) act.q8 = Q8::at(q8_, n, n_slots);
    kernels.act_mul(stream_, act);
    count_active(kept, kept.whole() ? nullptr : &kept.list, hidden_, n_slots, 0, n);
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

}  // namespace qi::cuda
