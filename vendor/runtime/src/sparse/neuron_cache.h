// Which neurons a device keeps while a model runs, and which take their places.
//
// A device keeps as many neurons of a network as it has slots for; each neuron is on exactly one
// side, there or with the host. A policy looks at how often neurons were active and says which
// slots another neuron should take over. It knows neither devices nor layers' weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace qi {

enum class NeuronCache : uint8_t {
    fixed,      // what was chosen at the beginning stays
    counted,    // chosen once, by the first counts
    balance,    // so that device and host need the same time for what was active
    frequency,  // those that were active most often, of late above all
};

// Active neurons, each for one token, that a side computes per second.
struct Speeds {
    double device = 0, host = 0;
};

// The neuron takes the slot over from the one that is there.
struct Swap {
    int32_t slot;
    int32_t neuron;
};

class CachePolicy {
  public:
    virtual ~CachePolicy() = default;

    // counts [n_ff]: for how many tokens each neuron of the network was active since the last call
    // for it. cached: the neuron in each slot. At most `budget` swaps, none of a slot or a neuron
    // twice, and of no neuron that has a slot. Networks are told apart by their number.
    virtual std::vector<Swap> plan(size_t network, std::span<const uint32_t> counts,
                                   std::span<const int32_t> cached, const Speeds& speeds,
                                   size_t budget) = 0;

    // Whether it plans nothing any more once it has planned nothing.
    virtual bool plans_once() const { return false; }
    // Swaps for a network and look at it, apart from the budget; moving costs what it may save.
    virtual size_t swaps_at_once() const { return 32; }
};

// Null: nothing moves.
std::unique_ptr<CachePolicy> make_cache_policy(NeuronCache kind);

}  // namespace qi
