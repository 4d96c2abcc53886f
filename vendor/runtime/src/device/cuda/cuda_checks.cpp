// Predictions held against the gates of all neurons that a GPU keeps.
#include "device/cuda/cuda_device.h"

namespace qi::cuda {

// Of tokens [first, first + n), whose inputs begin at x and whose masks are known; n at most
// few_tokens. The gates stand by neuron, as biases and masks do.
void CudaDevice::check_predictions(const FeedForward& ffn, const DeviceFfn& kept, CUdeviceptr x,
                                   int64_t first, int64_t n) {
    const NeuronWeights& w = kept.weights;
    const int64_t n_ff = needs_.n_ff;
    const Product gates{ffn.gated ? kept.gate() : kept.up(), ffn.gated ? w.gate_bias : w.up_bias,
                        lifted_, n_ff};
    const Input in = prepared(gates.w.type, x, n, needs_.n_embd);
    if (kept.whole())
        share_.kernels->multiply(stream_, in, {&gates, 1}, false);
    else
        share_.kernels->multiply_listed(stream_, in, gates, kept.list, true);
    share_.kernels->count_missed(stream_, lifted_, ffn.act.threshold, kept.slot_of_neuron,
                                 masks_ + size_t(first * name_words(n_ff)) * sizeof(uint32_t),
                                 input(layout_.rules) + size_t(first), n, n_ff, total(kept, 2));
}

}  // namespace qi::cuda
