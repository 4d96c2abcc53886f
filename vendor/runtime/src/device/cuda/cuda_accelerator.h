// A GPU as an accelerator: a budget of its memory, the weights kept there, the devices that use
// them.
#pragma once

#include <memory>
#include <optional>

#include "device/accelerator.h"

namespace qi::cuda {

std::unique_ptr<Accelerator> make_cuda_accelerator(int ordinal, std::optional<size_t> budget);

}  // namespace qi::cuda
