// How fast a GPU and its host compute neurons, measured on weights of the model itself.
#pragma once

#include "device/cuda/working_space.h"
#include "device/device.h"
#include "sparse/neuron_cache.h"

namespace qi::cuda {

// Of a tenth of a network's neurons, as a token may name them: gate, up and down together, what a
// launch or a parallel loop costs included. Takes memory for as many of its neurons as the budget
// has room for and gives it back.
Speeds measure_speeds(const GpuShare& share, const FeedForward& ffn, Device& host);

}  // namespace qi::cuda
