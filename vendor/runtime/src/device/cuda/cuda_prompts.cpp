// What only batches of more than a few tokens do: whole matrices, multiplied by tiles.
#include <algorithm>

#include "device/cuda/cuda_device.h"

namespace qi::cuda {

void CudaDevice::multiply(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols,
                          std::span<const cuda::Product> products, bool accumulate) {
    share_.kernels->multiply(stream_, prepared(type, x, n_rows, n_cols), products, accumulate,
                             needs_.deterministic ? ProductKernel::rows : ProductKernel::automatic);
}

// All neurons kept, for all tokens.
void CudaDevice::compute_many(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                              float* y) {
    Kernels& kernels = *share_.kernels;
    const NeuronWeights& w = kept.weights;
    const int64_t n = batch_.n_tokens, n_embd = needs_.n_embd, n_slots = kept.n_slots();
    const CUdeviceptr x = address(batch.x);
    const cuda::Product gate{kept.gate(), w.gate_bias, hidden_, n_slots};
    const cuda::Product up{kept.up(), w.up_bias, ffn.gated ? lifted_ : hidden_, n_slots};
    if (ffn.gated) multiply(w.gate_type, x, n, n_embd, {&gate, 1}, false);
    multiply(w.up_type, x, n, n_embd, {&up, 1}, false);
    const bool by_neuron = ffn.down_by_neuron;
    ActMulArgs act;
    act.act = device_act(ffn.act.kind);
    act.threshold = ffn.act.threshold;
    act.gate = act.h = hidden_;
    act.up = ffn.gated ? lifted_ : 0;
    act.n_tokens = n;
    act.n = n_slots;
    if (!by_neuron && wants_q8(kept.down.type)) act.q8 = Q8::at(q8_, n, n_slots);
    kernels.act_mul(stream_, act);
    count_active(kept, kept.whole() ? nullptr : &kept.list, hidden_, n_slots, 0, n);
    prepared_from_ = 0;
    if (!by_neuron) {
        const cuda::Product down{kept.down, kept.down_bias, address(y), n_embd};
        kernels.multiply(stream_, {hidden_, act.q8, n}, {&down, 1}, true);
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
    kernels.down_tiles(stream_, down);
}

}  // namespace qi::cuda
