// How many neurons of each network a device takes so that it and the host need the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace qi {

// Q-Infer's greedy placement, with one ratio because neurons are whole: round by round each network
// is offered its next most active `block` neurons, and takes those that fit as long as what is
// active on the device, divided by what is left to the host, is below the ratio of their speeds;
// with nothing left to the host that quotient is infinite. Unlike there, room that is left is used
// up by neurons that make no network slower.
//
// counts [networks][n_ff]; cost(network, n): of n of its neurons in all, in the unit of capacity;
// ratio: speed of the device divided by the host's. Returns the neurons of each, ascending.
std::vector<std::vector<int32_t>> balanced_split(
    std::span<const std::vector<float>> counts, size_t capacity,
    const std::function<size_t(size_t network, int64_t n)>& cost, double ratio, int64_t block);

}  // namespace qi
