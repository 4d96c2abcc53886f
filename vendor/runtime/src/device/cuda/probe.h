// One small computation on a GPU that passes through everything a model needs; and how fast its
// memory is.
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

// Bytes read and written per second by copies of n_bytes within the GPU's memory, the median of
// several. Throws QI_DEVICE or QI_MEMORY.
double measure_copy_bandwidth(const std::shared_ptr<Gpu>& gpu, size_t n_bytes);

}  // namespace qi::cuda
