// A GPU as a device: the steps of a forward pass as launches on one stream.
//
// Weights are those that a Weights keeps; neurons that it leaves to the host are computed there.
// Everything a step needs to know of the batch lies in device memory at fixed addresses.
#pragma once

#include <memory>
#include <vector>

#include "device/accelerator.h"
#include "device/cuda/gpu.h"
#include "device/cuda/launch.h"
#include "device/cuda/weights.h"
#include "device/device.h"

namespace qi::cuda {

// What a GPU brings to all contexts of a model.
struct GpuShare {
    std::shared_ptr<Gpu> gpu;
    std::shared_ptr<Budget> budget;
    std::shared_ptr<Kernels> kernels;
    std::shared_ptr<Weights> weights;
};

// Device memory that a context of those needs takes of the budget.
size_t working_bytes(const GpuShare& share, const DeviceNeeds& needs);

std::unique_ptr<Device> make_cuda_device(const GpuShare& share, const DeviceNeeds& needs,
                                         Device& host);

}  // namespace qi::cuda
