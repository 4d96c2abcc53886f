#include "sparse/shard.h"

#include <algorithm>

namespace qi {

NeuronShard::NeuronShard(std::vector<int32_t> neurons, int64_t n_ff)
    : neurons_(std::move(neurons)) {
    for (int64_t p = 0; p <= n_partitions; ++p)
        begins_[size_t(p)] =
            size_t(std::lower_bound(neurons_.begin(), neurons_.end(), partition_begin(n_ff, p)) -
                   neurons_.begin());
}

}  // namespace qi
