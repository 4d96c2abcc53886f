// Checks the parameters and leads logits through the stages.
#include "sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>

#include "base/error.h"
#include "sampling/filters.h"

namespace qi {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// What a dynamic temperature may come to: division by it must not make a NaN.
constexpr double lowest_temperature = std::numeric_limits<float>::min();
constexpr double highest_temperature = std::numeric_limits<float>::max();

// NaN is in no range.
void check_range(const char* name, float value, float low, float high) {
    if (value >= low && value <= high) return;
    fail(QI_ARGUMENT, "%s is %g; it must be from %g to %g", name, value, low, high);
}

void check_finite(const char* name, float value) {
    if (!std::isfinite(value)) fail(QI_ARGUMENT, "%s is %g; it must be finite", name, value);
}

void check_at_least(const char* name, float value, float low) {
    if (!(value >= low && value < infinity))
        fail(QI_ARGUMENT, "%s is %g; it must be finite and at least %g", name, value, low);
}

void check_positive(const char* name, float value) {
    if (!(value > 0.0f && value < infinity))
        fail(QI_ARGUMENT, "%s is %g; it must be finite and above 0", name, value);
}

void check_at_least(const char* name, int value, int low) {
    if (value < low) fail(QI_ARGUMENT, "%s is %d; it must be at least %d", name, value, low);
}

void check_token(const char* what, int32_t token, int32_t n_vocab) {
    if (token < 0 || token >= n_vocab)
        fail(QI_ARGUMENT, "%s is %d; the vocabulary's are 0 to %d", what, token, n_vocab - 1);
}

SamplingParams checked(SamplingParams p, int32_t n_vocab) {
    check_at_least("n_vocab", n_vocab, 1);
    check_at_least("temperature", p.temperature, 0.0f);
    check_at_least("dynatemp_range", p.dynatemp_range, 0.0f);
    check_positive("dynatemp_exponent", p.dynatemp_exponent);
    check_at_least("top_k", p.top_k, 0);
    check_range("top_p", p.top_p, 0.0f, 1.0f);
    check_range("min_p", p.min_p, 0.0f, 1.0f);
    check_range("typical_p", p.typical_p, 0.0f, 1.0f);
    check_positive("repeat_penalty", p.repeat_penalty);
    check_finite("presence_penalty", p.presence_penalty);
    check_finite("frequency_penalty", p.frequency_penalty);
    check_at_least("penalty_window", p.penalty_window, -1);
    if (p.mirostat < 0 || p.mirostat > 2)
        fail(QI_ARGUMENT, "mirostat is %d; it must be 0 (off), 1 or 2", p.mirostat);
    check_at_least("mirostat_tau", p.mirostat_tau, 0.0f);
    check_at_least("mirostat_eta", p.mirostat_eta, 0.0f);
    check_at_least("min_keep", p.min_keep, 1);
    for (const auto& [token, value] : p.bias) {
        check_token("a biased token", token, n_vocab);
        if (!(value < infinity))
            fail(QI_ARGUMENT, "the bias of token %d is %g; it must be a number or -inf", token,
                 value);
    }
    return p;
}

}  // namespace

Sampler::Sampler(SamplingParams params, int32_t n_vocab)
    : params_(checked(std::move(params), n_vocab)),
      n_vocab_(n_vocab),
      penalties_(params_),
      random_(params_.seed),
      mirostat_mu_(2.0 * params_.mirostat_tau) {}

void Sampler::accept(std::span<const int32_t> tokens) {
    for (int32_t token : tokens)
        check_token("a token to accept", token, n_vocab_);
    for (int32_t token : tokens)
        penalties_.accept(token);
}

int32_t Sampler::sample(std::span<const float> logits) {
    if (logits.size() != size_t(n_vocab_))
        fail(QI_ARGUMENT, "%zu logits for a vocabulary of %d", logits.size(), n_vocab_);
    const auto adjusted = adjust(logits);
    const LogitSummary summary = summarize(adjusted);
    if (summary.has_nan) {
        const auto nan =
            std::find_if(adjusted.begin(), adjusted.end(), [](float x) { return x != x; });
        refuse_nan(int32_t(nan - adjusted.begin()));
    }
    if (summary.n_possible == 0) refuse_none();
    int32_t token;
    if (params_.temperature == 0.0f || summary.best == infinity) {
        token =
            int32_t(std::find(adjusted.begin(), adjusted.end(), summary.best) - adjusted.begin());
    } else {
        ranking_.reset(adjusted, summary);
        token = params_.mirostat != 0 ? draw_mirostat() : draw_filtered();
    }
    penalties_.accept(token);
    return token;
}

void Sampler::refuse_nan(int32_t token) const {
    fail(QI_ARGUMENT, "the logit of token %d is NaN", token);
}

void Sampler::refuse_none() const {
    fail(QI_ARGUMENT, "no token is possible: all %d logits are -inf%s", n_vocab_,
         params_.bias.empty() ? "" : " after the bias");
}

size_t Sampler::n_deciding() const {
    if (!params_.bias.empty() || penalties_.active()) return 0;
    if (params_.temperature == 0.0f) return 1;
    if (params_.mirostat != 0 || params_.top_k == 0 || params_.top_k >= n_vocab_) return 0;
    // One more shows that top-k leaves something out: sums over all logits are rounded otherwise.
    return size_t(params_.top_k) + 1;
}

std::optional<int32_t> Sampler::sample_best(std::span<const Candidate> best) {
    const Candidate& first = best.front();
    if (first.logit != first.logit) refuse_nan(first.token);
    if (first.logit == -infinity) refuse_none();
    // Penalties are off, so that nothing has to be accepted.
    if (params_.temperature == 0.0f || first.logit == infinity) return first.token;
    if (best.back().logit == -infinity) return std::nullopt;
    ranking_.reset(best, size_t(params_.top_k));
    return draw_filtered();
}

// The logits after bias and penalties.
std::span<const float> Sampler::adjust(std::span<const float> logits) {
    if (params_.bias.empty() && !penalties_.active()) return logits;
    adjusted_.assign(logits.begin(), logits.end());
    for (const auto& [token, value] : params_.bias) {
        float& logit = adjusted_[size_t(token)];
        logit = logit == infinity && value == -infinity ? value : logit + value;
    }
    penalties_.apply(adjusted_);
    return adjusted_;
}

int32_t Sampler::draw_filtered() {
    filter();
    return draw(dynamic_temperature()).token;
}

void Sampler::filter() {
    const auto min_keep = size_t(params_.min_keep);
    if (params_.top_k > 0) ranking_.truncate(size_t(params_.top_k));
    if (params_.typical_p < 1.0f) keep_typical(ranking_, params_.typical_p, min_keep);
    if (params_.top_p < 1.0f) keep_top_p(ranking_, params_.top_p, min_keep);
    if (params_.min_p > 0.0f) keep_min_p(ranking_, params_.min_p, min_keep);
}

// From temperature - range to + range, by the candidates' entropy as a share of the largest.
float Sampler::dynamic_temperature() {
    if (params_.dynatemp_range == 0.0f || ranking_.size() == 1) return params_.temperature;
    const double range = params_.dynatemp_range;
    const double low = std::max(params_.temperature - range, lowest_temperature);
    const double high = params_.temperature + range;
    const double share = ranking_.mass(1.0f).entropy() / std::log(double(ranking_.size()));
    const double bent = std::pow(std::clamp(share, 0.0, 1.0), double(params_.dynatemp_exponent));
    return float(std::min(low + (high - low) * bent, highest_temperature));
}

Candidate Sampler::draw(float temperature) {
    const double target = random_.uniform() * ranking_.mass(temperature).weight;
    double cumulative = 0.0;
    size_t rank = 0;
    for (; rank + 1 < ranking_.size(); ++rank) {
        cumulative += ranking_.weight(ranking_[rank].logit, temperature);
        if (cumulative > target) break;
    }
    return ranking_[rank];
}

// Mirostat (Basu et al., 2020) keeps what surprises by no more than mu bits, and moves mu so that
// the surprise of the tokens drawn, under the whole distribution, approaches tau. Version 1
// estimates how many those are, 2 looks.
int32_t Sampler::draw_mirostat() {
    const float temperature = params_.temperature;
    const double total = ranking_.mass(temperature).weight;
    if (params_.mirostat == 1) {
        ranking_.truncate(mirostat_1_size());
    } else {
        const double lowest =
            ranking_[0].logit + temperature * (std::log(total) - mirostat_mu_ * std::numbers::ln2);
        ranking_.truncate(std::max<size_t>(ranking_.count_from(float(lowest)), 1));
    }
    const Candidate drawn = draw(temperature);
    const double surprise = std::log2(total / ranking_.weight(drawn.logit, temperature));
    mirostat_mu_ -= params_.mirostat_eta * (surprise - params_.mirostat_tau);
    return drawn.token;
}

// Fits Zipf's law, p ~ rank^-s, to the most likely; from s follows how many stay below mu bits.
size_t Sampler::mirostat_1_size() {
    const size_t n_fitted = std::min<size_t>(ranking_.size(), 100);
    const auto fitted = ranking_.first(n_fitted);
    double products = 0.0, squares = 0.0;
    for (size_t i = 0; i + 1 < n_fitted; ++i) {
        const double log_ranks = std::log(double(i + 2) / double(i + 1));
        const double log_ratio =
            double(fitted[i].logit - fitted[i + 1].logit) / params_.temperature;
        products += log_ranks * log_ratio;
        squares += log_ranks * log_ranks;
    }
    if (squares == 0.0) return 1;  // a single candidate
    const double s = products / squares;
    // The sum of the law over the vocabulary is about (1 - n^(1 - s)) / (s - 1), ln n where s is 1.
    const double excess = s - 1.0;
    const double sum = std::abs(excess) < 1e-9
                           ? std::log(double(n_vocab_))
                           : (1.0 - std::pow(double(n_vocab_), -excess)) / excess;
    const double n = std::pow(std::exp2(mirostat_mu_) / sum, 1.0 / s);
    if (n >= double(ranking_.size())) return ranking_.size();
    return std::max(size_t(n), size_t(1));
}

}  // namespace qi
