// Which neurons of a feed-forward network a token computes.
#pragma once

#include <cstdint>

namespace qi {

enum class NeuronRule : uint8_t {
    all,
    exact,    // those whose gate is not zero: the same sum as all of them
    predict,  // of those a predictor names, the ones whose gate is not zero
};

// A rule belongs to a token's role and not to the batch it is computed in, so that computing it
// again gives the same keys and values.
struct NeuronPolicy {
    NeuronRule prompt = NeuronRule::all;
    NeuronRule generated = NeuronRule::all;
    float threshold = 0.0f;  // a neuron is left out when its prediction is below
    // Layers from this one on predict from what the predictor of the layer before looked at, so
    // that their neurons are known one layer early; 0: none does.
    int64_t cross_layer_from = 0;

    NeuronRule rule(bool is_generated) const { return is_generated ? generated : prompt; }
};

}  // namespace qi
