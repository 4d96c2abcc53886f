// What a context does for neurons that move: steps in which they stay where they are, and counts of
// those that are active.
#include <algorithm>

#include "device/cuda/cuda_device.h"

namespace qi::cuda {

namespace {

// Long prompts use nearly all neurons, and their time is better spent on computing.
constexpr int64_t most_tokens_to_move_for = 512;
// Counts of activity are fetched once for so many tokens: megabytes, for which a stream has to come
// to rest.
constexpr int64_t tokens_to_collect = 16;

}  // namespace

void CudaDevice::repeat(std::span<const int64_t> key, const std::function<void()>& steps) {
    if (!member_) return replay_or_run(key, steps);
    const Current current = enter();
    {
        // Where a neuron is computed shows in the last bit.
        const bool may_place = batch_.n_tokens <= most_tokens_to_move_for && !needs_.deterministic;
        const NeuronMover::Step step(*member_, stream_, may_place);
        replay_or_run(key, steps);
        if (n_uncollected_ >= tokens_to_collect) collect_activations();
    }
    if (member_->is_over()) stop_counting();
}

// Once no neuron will move any more. Recorded steps count, too.
void CudaDevice::stop_counting() {
    collect_activations();
    stream_.synchronize();
    recordings_.clear();
    member_.reset();
}

// Where those who move neurons count which are active, unless predictors name them; or null.
uint64_t* CudaDevice::counts_of_mover(const DeviceFfn& kept) const {
    const bool counts = member_ && std::ranges::count(batch_.rules, NeuronRule::exact) > 0;
    return counts ? member_->counts_of(kept) : nullptr;
}

}  // namespace qi::cuda
