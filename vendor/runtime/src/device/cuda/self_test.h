// Every CUDA kernel against the CPU's, on random data of odd shapes: run on the card at hand.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "device/cuda/gpu.h"

namespace qi::cuda {

struct SelfTestResult {
    std::string name;
    // The largest difference from the CPU's result over what rounding of the same quantities in
    // another order explains: at most 1 in a pass. Infinite where values should be equal and are
    // not, or one of them is NaN.
    double error = 0;
    size_t n_values = 0;  // compared
    static constexpr double tolerance = 1.0;
    bool passed() const { return n_values > 0 && error <= tolerance; }
};

size_t n_self_tests();
std::string self_test_name(size_t index);
// Throws what the device throws; a difference is a result.
SelfTestResult run_self_test(const std::shared_ptr<Gpu>& gpu, size_t index);

}  // namespace qi::cuda
