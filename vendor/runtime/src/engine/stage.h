// Which device computes which layers.
#pragma once

#include <cstdint>

#include "device/device.h"

namespace qi {

// Consecutive layers whose residual stream, keys and values live on one device. The stages of a
// context cover all layers in order; the last one also computes what follows the layers.
struct Stage {
    Device* device;
    int64_t first_layer, end_layer;
};

}  // namespace qi
