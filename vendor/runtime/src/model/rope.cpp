#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace qi {

namespace {

// Dimension at which a wave turns `turns` times within the original context (YaRN, arXiv
// 2309.00071, equation 17).
double turning_dimension(const HyperParams& hp, double turns) {
    return double(hp.n_rot) *
           std::log(hp.rope_scaling.original_context / (turns * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(hp.rope_base));
}

}  // namespace

Rope::Rope(const HyperParams& hp, std::span<const float> divisors) {
    const RopeScaling& scaling = hp.rope_scaling;
    const int64_t n_pairs = hp.n_rot / 2;
    const double stretch = scaling.kind == RopeScaling::Kind::none ? 1.0 : 1.0 / scaling.factor;
    const bool yarn = scaling.kind == RopeScaling::Kind::yarn;
    const double low = std::max(0.0, std::floor(turning_dimension(hp, scaling.beta_fast)));
    const double high =
        std::min(double(hp.n_rot - 1), std::ceil(turning_dimension(hp, scaling.beta_slow)));

    for (int64_t i = 0; i < n_pairs; ++i) {
        double original = std::pow(hp.rope_base, -2.0 * double(i) / double(hp.n_rot));
        if (!divisors.empty()) original /= double(divisors[size_t(i)]);
        const double interpolated = original * stretch;
        // Fast waves keep their frequency, slow ones are stretched, those between are mixed.
        const double keep =
            yarn ? 1.0 - std::clamp((double(i) - low) / std::max(0.001, high - low), 0.0, 1.0)
                 : 0.0;
        frequencies_.push_back(interpolated * (1.0 - keep) + original * keep);
    }
    magnitude_ = scaling.attn_factor;
    if (yarn) magnitude_ *= 1.0 + 0.1 * std::log(1.0 / stretch);
}

void Rope::angles(int64_t position, float* cos_sin) const {
    for (size_t i = 0; i < frequencies_.size(); ++i) {
        const double angle = double(position) * frequencies_[i];
        cos_sin[2 * i] = float(std::cos(angle) * magnitude_);
        cos_sin[2 * i + 1] = float(std::sin(angle) * magnitude_);
    }
}

}  // namespace qi
