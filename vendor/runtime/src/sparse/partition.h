// The fixed partitions that a sum over neurons is cut into.
//
// Partition p holds the neurons [partition_begin(n_ff, p), partition_begin(n_ff, p + 1)). Inside
// one, neurons are added in ascending order; the partial sums are added in order of p. Who computes
// a partition is free, the result is not.
#pragma once

#include <cstdint>

namespace qi {

// Enough for sixteen threads, few enough for a layer's partial sums to stay in L2.
inline constexpr int n_partitions = 16;

inline int64_t partition_begin(int64_t n_ff, int64_t p) {
    return n_ff * p / n_partitions;
}

}  // namespace qi
