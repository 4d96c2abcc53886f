// Drawing a token from logits.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

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
    int mirostat = 0;         // 0, 1, 2
    float mirostat_tau = 5.0f;
    float mirostat_eta = 0.1f;
    int min_keep = 1;
    uint64_t seed = 0;
    std::vector<std::pair<int32_t, float>> bias;
};

class Sampler {
  public:
    // Throws QI_ARGUMENT naming the parameter, its value and its legal range.
    Sampler(SamplingParams params, int32_t n_vocab);
    void accept(int32_t token);  // QI_ARGUMENT when out of range
    int32_t sample(std::span<const float> logits);

  private:
    SamplingParams params_;
    int32_t n_vocab_;
};

}  // namespace qi
