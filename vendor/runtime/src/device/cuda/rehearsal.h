// What the driver and cuBLAS take of a GPU's memory by themselves, once contexts compute: made to
// be taken before it is measured what is free.
#pragma once

#include <span>
#include <vector>

#include "device/accelerator.h"
#include "device/cuda/gpu.h"
#include "device/cuda/working_space.h"

namespace qi::cuda {

// Graphs like those of a context's single tokens, one for each length that they are recorded for;
// they go with the object.
class RecordedSteps {
  public:
    RecordedSteps(const GpuShare& share, const DeviceNeeds& needs);

  private:
    Stream stream_;
    std::vector<Graph> graphs_;
};

// Loads cuBLAS's code for products of the model's widths, which stays.
void load_products(const GpuShare& share, std::span<const Type> weight_types,
                   const DeviceNeeds& needs);

}  // namespace qi::cuda
