// Repetition penalty (Keskar et al., "CTRL", 2019), presence and frequency penalties.
#include "sampling/penalties.h"

#include "sampling/sampler.h"

namespace qi {

Penalties::Penalties(const SamplingParams& params)
    : repeat_(params.repeat_penalty),
      presence_(params.presence_penalty),
      frequency_(params.frequency_penalty),
      window_(params.penalty_window),
      active_(window_ != 0 && (repeat_ != 1.0f || presence_ != 0.0f || frequency_ != 0.0f)) {}

void Penalties::accept(int32_t token) {
    if (!active_) return;
    ++counts_[token];
    if (window_ < 0) return;
    recent_.push_back(token);
    if (recent_.size() <= size_t(window_)) return;
    const auto oldest = counts_.find(recent_.front());
    if (--oldest->second == 0) counts_.erase(oldest);
    recent_.pop_front();
}

void Penalties::apply(std::span<float> logits) const {
    for (const auto& [token, count] : counts_) {
        float& logit = logits[size_t(token)];
        logit = logit > 0.0f ? logit / repeat_ : logit * repeat_;
        logit -= presence_ + frequency_ * float(count);
    }
}

}  // namespace qi
