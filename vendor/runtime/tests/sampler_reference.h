// Sampling as its definitions read: full sorts, double precision, no shortcuts.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <vector>

#include "sampling/sampler.h"

namespace qi::test {

struct Choice {
    double logit;
    int32_t token;
};
using Choices = std::vector<Choice>;

// All tokens above -infinity by falling logit, equal ones by rising id.
inline Choices all_choices(const std::vector<double>& logits) {
    Choices choices;
    for (size_t i = 0; i < logits.size(); ++i)
        if (logits[i] > -INFINITY) choices.push_back({logits[i], int32_t(i)});
    std::stable_sort(choices.begin(), choices.end(),
                     [](const Choice& a, const Choice& b) { return a.logit > b.logit; });
    return choices;
}

inline std::vector<double> probabilities(const Choices& choices, double temperature) {
    std::vector<double> p;
    double best = -INFINITY, total = 0.0;
    for (const Choice& choice : choices)
        best = std::max(best, choice.logit);
    for (const Choice& choice : choices)
        total += p.emplace_back(std::exp((choice.logit - best) / temperature));
    for (double& value : p)
        value /= total;
    return p;
}

inline double entropy(const std::vector<double>& p) {
    double sum = 0.0;
    for (double value : p)
        if (value > 0.0) sum -= value * std::log(value);
    return sum;
}

inline void cut(Choices& choices, size_t n) {
    choices.resize(std::min(n, choices.size()));
}

inline void top_p(Choices& choices, double p, size_t min_keep) {
    const auto probability = probabilities(choices, 1.0);
    double cumulative = 0.0;
    size_t n = 0;
    while (n < choices.size() && (cumulative < p || n < min_keep))
        cumulative += probability[n++];
    cut(choices, n);
}

inline void min_p(Choices& choices, double p, size_t min_keep) {
    const auto probability = probabilities(choices, 1.0);
    size_t n = 0;
    while (n < choices.size() && (probability[n] >= p * probability[0] || n < min_keep))
        ++n;
    cut(choices, n);
}

inline void typical(Choices& choices, double p, size_t min_keep) {
    const auto probability = probabilities(choices, 1.0);
    const double expected = entropy(probability);
    std::vector<size_t> order(choices.size());
    for (size_t i = 0; i < order.size(); ++i)
        order[i] = i;
    const auto distance = [&](size_t i) { return std::abs(-std::log(probability[i]) - expected); };
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return distance(a) < distance(b); });
    double cumulative = 0.0;
    size_t n = 0;
    while (n < order.size() && (cumulative < p || n < min_keep))
        cumulative += probability[order[n++]];
    order.resize(n);
    std::sort(order.begin(), order.end());
    Choices kept;
    for (size_t i : order)
        kept.push_back(choices[i]);
    choices = kept;
}

inline std::vector<double> adjusted(const std::vector<float>& logits, const SamplingParams& params,
                                    const std::vector<int32_t>& history) {
    std::vector<double> out(logits.begin(), logits.end());
    for (const auto& [token, bias] : params.bias)
        out[size_t(token)] += double(bias);
    const size_t window =
        params.penalty_window < 0 ? history.size() : size_t(params.penalty_window);
    std::map<int32_t, int> counts;
    for (size_t i = history.size() - std::min(window, history.size()); i < history.size(); ++i)
        ++counts[history[i]];
    for (const auto& [token, count] : counts) {
        double& logit = out[size_t(token)];
        const double repeat = params.repeat_penalty;
        logit = logit > 0.0 ? logit / repeat : logit * repeat;
        logit -= double(params.presence_penalty) + double(params.frequency_penalty) * count;
    }
    return out;
}

// What a draw chooses from, with its probabilities.
struct Distribution {
    Choices choices;
    std::vector<double> p;
};

// temperature > 0, no mirostat
inline Distribution distribution(const std::vector<float>& logits, const SamplingParams& params,
                                 const std::vector<int32_t>& history) {
    Choices choices = all_choices(adjusted(logits, params, history));
    const auto min_keep = size_t(params.min_keep);
    if (params.top_k > 0) cut(choices, size_t(params.top_k));
    if (params.typical_p < 1.0f) typical(choices, double(params.typical_p), min_keep);
    if (params.top_p < 1.0f) top_p(choices, double(params.top_p), min_keep);
    if (params.min_p > 0.0f) min_p(choices, double(params.min_p), min_keep);
    double temperature = double(params.temperature);
    if (params.dynatemp_range > 0.0f && choices.size() > 1) {
        const double range = double(params.dynatemp_range);
        const double low = std::max(temperature - range, 1e-37), high = temperature + range;
        const double share =
            entropy(probabilities(choices, 1.0)) / std::log(double(choices.size()));
        temperature = low + (high - low) * std::pow(share, double(params.dynatemp_exponent));
    }
    return {choices, probabilities(choices, temperature)};
}

// Mirostat's state, and what it chooses from in one step.
struct Mirostat {
    double mu;

    Distribution step(const std::vector<float>& logits, const SamplingParams& params) const {
        const double temperature = double(params.temperature);
        Choices choices = all_choices({logits.begin(), logits.end()});
        const auto p = probabilities(choices, temperature);
        size_t n = 0;
        if (params.mirostat == 2) {
            while (n < p.size() && -std::log2(p[n]) <= mu)
                ++n;
        } else {
            double products = 0.0, squares = 0.0;
            for (size_t i = 0; i + 1 < std::min<size_t>(p.size(), 100); ++i) {
                const double t = std::log(double(i + 2) / double(i + 1));
                products += t * std::log(p[i] / p[i + 1]);
                squares += t * t;
            }
            const double s = products / squares, epsilon = s - 1.0;
            const double k = std::pow(
                epsilon * std::exp2(mu) / (1.0 - std::pow(double(logits.size()), -epsilon)),
                1.0 / s);
            n = size_t(std::min(k, double(p.size())));
        }
        cut(choices, std::max<size_t>(n, 1));
        return {choices, probabilities(choices, temperature)};
    }
    void learn(int32_t token, const std::vector<float>& logits, const SamplingParams& params) {
        const Choices choices = all_choices({logits.begin(), logits.end()});
        const auto p = probabilities(choices, double(params.temperature));
        for (size_t i = 0; i < choices.size(); ++i)
            if (choices[i].token == token)
                mu -=
                    double(params.mirostat_eta) * (-std::log2(p[i]) - double(params.mirostat_tau));
    }
};

}  // namespace qi::test
