// What of a model an accelerator keeps, under a budget of its memory.
//
// In PowerInfer's order: the attention of each layer with its norms, keys and values; predictors;
// the head; then neurons, those first that are active most often for their bytes. Unlike there, a
// head that does not fit leaves its room to neurons. Neurons go only where all attention and all
// predictors are.
//
// Keys and values that do not all fit beside the attention, the predictors and the head, or that
// would take more room than they leave for neurons, are shared with the host, and come after these:
// copies of pages get as much of the room that is left as neurons do, unless a share was asked for,
// and what neurons do not need.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "device/accelerator.h"
#include "engine/kv_placement.h"
#include "model/model.h"
#include "sparse/shard.h"

namespace qi {

// How neurons are chosen: by given lists, by how often they are active, or, with neither, layer by
// layer.
struct SplitChoice {
    std::vector<std::vector<int32_t>> neurons;  // [n_layer], ascending
    std::vector<std::vector<float>> counts;     // [n_layer][n_ff]
    // By counts, but of a layer only so many that both sides need the same time for it, at this
    // ratio of the accelerator's speed to the host's; 0: as many as fit.
    double speed_ratio = 0;
    // How they will move. With neither lists nor counts all layers then get equally many.
    NeuronCache cache = NeuronCache::fixed;
};

struct Placement {
    int64_t n_layers = 0;      // the first so many have attention, norms, keys and values there
    int64_t n_predictors = 0;  // the first so many have their predictors there, if they have any
    bool head = false;
    std::vector<NeuronShard> resident, rest;  // [n_layers] there, and with the host

    // Bytes of the accelerator's memory.
    size_t attention_bytes = 0, predictor_bytes = 0, head_bytes = 0, neuron_bytes = 0;
    size_t device_bytes = 0;  // keys, values and working space of the first context
    KvShare kv_share;         // of the first context
    size_t moving_bytes = 0;  // where neurons arrive that move; 0: none does
};

// For an accelerator that holds nothing yet, or gives up what it holds. QI_MEMORY when not even the
// first layer fits, and when given lists do not.
Placement place(const Model& model, const Accelerator& accelerator, const DeviceNeeds& needs,
                const KvWish& kv, const SplitChoice& split);

// Makes the copies.
void keep(const Model& model, const Placement& placement, Accelerator& accelerator);

// "512.0 MiB", "3.90 GiB"
std::string size_text(size_t n_bytes);

// "32 of 32 layers, predictors, head, 41 % of the neurons; 3.9 of 4.0 GiB"
std::string describe(const Placement& placement, const Model& model,
                     const Accelerator& accelerator);

}  // namespace qi
