// Rotary position angles: one frequency per pair of dimensions, after scaling.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/architecture.h"

namespace qi {

class Rope {
  public:
    Rope() = default;
    // divisors: n_rot/2 numbers each frequency is divided by (llama 3's rope_freqs), or empty.
    Rope(const HyperParams& hp, std::span<const float> divisors);

    // cos_sin: [n_rot/2][2], scaled by the attention factor.
    void angles(int64_t position, float* cos_sin) const;

  private:
    std::vector<double> frequencies_;  // [n_rot/2], radians per position
    double magnitude_ = 1.0;
};

}  // namespace qi
