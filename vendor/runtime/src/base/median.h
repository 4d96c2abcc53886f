// The middle of repeated measurements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace qi {

// Of at least one value; of an even number, the upper of the two in the middle.
inline double median(std::vector<double> values) {
    const auto middle = values.begin() + int64_t(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

}  // namespace qi
