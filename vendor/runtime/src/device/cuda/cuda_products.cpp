// Products of a GPU's matrices: by rows for few tokens, for many by tiles or through cuBLAS,
// whichever was measured to be faster.
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/log.h"
#include "device/cuda/cuda_device.h"

namespace qi::cuda {

using What = ProductChoice::What;

Input CudaDevice::prepared(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols) {
    Input in{x, {}, n_rows};
    if (!wants_q8(type)) return in;
    in.q8 = Q8::at(q8_, n_rows, n_cols);
    const Prepared wanted{x, n_rows, n_cols};
    if (prepared_ != wanted) share_.kernels->quantise(stream_, x, n_rows, n_cols, in.q8);
    prepared_ = wanted;
    return in;
}

Input CudaDevice::prepared_for_predictor(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols) {
    Input in{x, {}, n_rows};
    if (!wants_q8(type)) return in;
    in.q8 = Q8::at(predictor_q8_, n_rows, n_cols);
    const Prepared wanted{x, n_rows, n_cols};
    if (for_predictor_ != wanted) share_.kernels->quantise(stream_, x, n_rows, n_cols, in.q8);
    for_predictor_ = wanted;
    return in;
}

void CudaDevice::project(const float* x, int64_t n_rows, std::span<const Projection> outputs) {
    const Current current = enter();
    const int64_t n_cols = outputs[0].linear->weight.n_cols;
    for (size_t first = 0; first < outputs.size();) {
        // Neighbours of one type go together.
        std::vector<Product> products;
        const Type type = outputs[first].linear->weight.type;
        const bool accumulate = outputs[first].accumulate;
        size_t end = first;
        for (; end < outputs.size() && outputs[end].linear->weight.type == type &&
               outputs[end].accumulate == accumulate;
             ++end) {
            const DeviceLinear& kept = share_.weights->find(*outputs[end].linear);
            products.push_back(
                {kept.weight, kept.bias, address(outputs[end].y), kept.weight.n_rows});
        }
        if (n_rows > few_tokens) choose_cublas(products[0].w, What::rows, address(x), n_rows);
        multiply(type, address(x), n_rows, n_cols, products, accumulate);
        first = end;
    }
    for (const Projection& output : outputs)
        forget_prepared(output.y);
}

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
    double tiles = 0, halves = HUGE_VAL;
    // Other shapes are other code to cuBLAS, for which there may be no memory.
    const auto time_halves = [&](const auto& enqueue) {
        try {
            halves = seconds_of(stream_, share_.gpu, enqueue);
        } catch (const Error& error) {
            log(LogLevel::info,
                format("products of %s are computed without cuBLAS, which may be slower: %s",
                       traits(w.type).name, error.what()));
        }
    };
    if (what == What::rows) {
        const cuda::Product product{part, 0, lifted_, part.n_rows};
        tiles = seconds_of(stream_, share_.gpu, [&] {
            prepared_ = {};
            share_.kernels->multiply(stream_, prepared(w.type, x, n_tokens, w.n_cols),
                                     {&product, 1}, false);
        });
        time_halves([&] { halves_->multiply(x, n_tokens, {&product, 1}, false); });
    } else {
        DownTileArgs args;
        args.w = w;
        args.h = x;
        args.h_stride = w.n_rows;
        args.n_tokens = n_tokens;
        args.y = lifted_;
        tiles = seconds_of(stream_, share_.gpu, [&] { share_.kernels->down_tiles(stream_, args); });
        time_halves([&] { halves_->multiply_by_neuron(args); });
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
    prepared_ = {};
}

}  // namespace qi::cuda
