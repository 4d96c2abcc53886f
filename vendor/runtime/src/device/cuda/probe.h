// One small computation on a GPU that passes through everything a model needs; how fast its memory
// is, and what a launch costs.
#pragma once

#include <cstddef>
#include <memory>

#include "device/cuda/gpu.h"
#include "device/cuda/nvrtc.h"

namespace qi::cuda {

struct ProbeReport {
    size_t free_bytes = 0;  // of the card, once its context was there
    Cubin::Origin origin = Cubin::Origin::compiled;
    double compile_seconds = 0;
    double seconds = 0;  // all of it
};

// Takes n_bytes of device memory within a budget, copies through pinned memory, runs a kernel alone
// and replayed from a graph, and checks what it wrote. Holds nothing afterwards. Throws QI_DEVICE
// or QI_MEMORY.
ProbeReport probe(int ordinal, size_t n_bytes, size_t budget_bytes);

// Bytes per second at which a kernel reads n_bytes of the GPU's memory, the median of several; of
// less than some 64 MiB it is that of a cache. Throws QI_DEVICE or QI_MEMORY.
double measure_read_bandwidth(const std::shared_ptr<Gpu>& gpu, size_t n_bytes);

// Seconds from the launch of a kernel that does nothing to the next one's, in a graph of many.
double measure_launch_seconds(const std::shared_ptr<Gpu>& gpu);

}  // namespace qi::cuda
