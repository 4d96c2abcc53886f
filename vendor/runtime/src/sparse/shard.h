// The neurons of one feed-forward network that one device computes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "sparse/partition.h"

namespace qi {

class NeuronShard {
  public:
    NeuronShard() = default;
    // neurons: ascending, below n_ff.
    NeuronShard(std::vector<int32_t> neurons, int64_t n_ff);

    bool operator==(const NeuronShard&) const = default;

    std::span<const int32_t> neurons() const { return neurons_; }
    // Those of one partition of all n_ff neurons.
    std::span<const int32_t> partition(int64_t p) const {
        return std::span(neurons_).subspan(begins_[size_t(p)],
                                           begins_[size_t(p) + 1] - begins_[size_t(p)]);
    }

  private:
    std::vector<int32_t> neurons_;
    std::array<size_t, n_partitions + 1> begins_{};
};

// Neurons named for a token, by bit: neuron j is bit j % 32 of word j / 32.
inline int64_t name_words(int64_t n_ff) {
    return (n_ff + 31) / 32;
}
inline bool is_named(const uint32_t* names, int64_t j) {
    return names[j / 32] >> (j % 32) & 1;
}

}  // namespace qi
