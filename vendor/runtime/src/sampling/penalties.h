// Penalties on tokens that were seen lately.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <unordered_map>

namespace qi {

struct SamplingParams;

// Remembers the last penalty_window tokens and how often each occurs among them.
class Penalties {
  public:
    explicit Penalties(const SamplingParams& params);
    bool active() const { return active_; }  // whether any penalty can change a logit
    void accept(int32_t token);
    void apply(std::span<float> logits) const;

  private:
    float repeat_;
    float presence_;
    float frequency_;
    int window_;
    bool active_;
    std::deque<int32_t> recent_;  // oldest first; unused when the window is everything
    std::unordered_map<int32_t, int32_t> counts_;
};

}  // namespace qi
