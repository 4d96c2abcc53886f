// Drawing a token from logits.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sampling/penalties.h"
#include "sampling/random.h"
#include "sampling/ranking.h"

namespace qi {

struct SamplingParams {
    float temperature = 0.0f;  // 0: exact argmax, lowest id on ties
    float dynatemp_range = 0.0f;
    float dynatemp_exponent = 1.0f;
    int top_k = 0;  // 0: all
    float top_p = 1.0f;
    float min_p = 0.0f;
    float typical_p = 1.0f;
    float repeat_penalty = 1.0f;
    float presence_penalty = 0.0f;
    float frequency_penalty = 0.0f;
    int penalty_window = 64;  // last tokens looked at; -1: all
    int mirostat = 0;         // 0, 1, 2; instead of the filters
    float mirostat_tau = 5.0f;
    float mirostat_eta = 0.1f;
    int min_keep = 1;  // what top-p, min-p and typical leave at least
    uint64_t seed = 0;
    std::vector<std::pair<int32_t, float>> bias;
};

// One sequence's way from logits to tokens. In order: bias, penalties; then argmax if the
// temperature is 0, else mirostat, or top-k, typical, top-p and min-p at temperature 1; then
// temperature and the draw. Every draw takes one number from the generator and walks the candidates
// by falling logit, so the same seed gives the same tokens.
class Sampler {
  public:
    // Throws QI_ARGUMENT naming the parameter, its value and its legal range.
    Sampler(SamplingParams params, int32_t n_vocab);

    // Puts tokens into the penalty window, undrawn; QI_ARGUMENT when one is out of range.
    void accept(std::span<const int32_t> tokens);

    // Draws from n_vocab logits and accepts the token drawn. QI_ARGUMENT, and nothing has changed,
    // when a logit is NaN or all are -infinity. A logit of +infinity wins, the lowest id first.
    int32_t sample(std::span<const float> logits);

    // How many of the best logits, in order, draw the same token as all of them; 0: all are needed.
    size_t n_deciding() const;
    // Draws from the n_deciding() best, in order of rank but that a NaN comes before all others.
    // As sample(), but that no token is drawn, and nothing has changed, where so few are possible
    // that all logits are needed after all.
    std::optional<int32_t> sample_best(std::span<const Candidate> best);

  private:
    std::span<const float> adjust(std::span<const float> logits);
    void refuse_nan(int32_t token) const;
    void refuse_none() const;
    int32_t draw_filtered();
    void filter();
    float dynamic_temperature();
    Candidate draw(float temperature);
    int32_t draw_mirostat();
    size_t mirostat_1_size();

    SamplingParams params_;
    int32_t n_vocab_;
    Penalties penalties_;
    Random random_;
    double mirostat_mu_;           // bits of surprise allowed next
    std::vector<float> adjusted_;  // the logits after bias and penalties, if there are any
    Ranking ranking_;
};

}  // namespace qi
