// The sampler against a slow reference: each stage, the whole pipeline, the statistics of draws.
#include "sampling/sampler.h"

#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"
#include "kernel_checks.h"
#include "sampler_reference.h"
#include "sampling/filters.h"

using namespace qi;
using namespace qi::test;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Normal logits with a few likely ones; grid > 0 rounds them so that many are equal.
std::vector<float> random_logits(std::mt19937_64& random, size_t n, float grid = 0.0f) {
    std::normal_distribution<float> normal(0.0f, 2.0f);
    std::vector<float> logits(n);
    for (float& logit : logits) {
        logit = normal(random) + (random() % 50 == 0 ? 6.0f : 0.0f);
        if (grid > 0.0f) logit = std::round(logit / grid) * grid;
    }
    return logits;
}

float uniform(std::mt19937_64& random, float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random);
}

void test_random(Checks& checks) {
    // As published with the generator's other implementations, seeded with 0 through SplitMix64.
    Random random(0);
    for (uint64_t expected : {5987356902031041503u, 7051070477665621255u, 6633766593972829180u,
                              211316841551650330u, 9136120204379184874u}) {
        const uint64_t found = random.next();
        checks.expect(found == expected, "xoshiro256++ gives %llu, not %llu",
                      (unsigned long long)found, (unsigned long long)expected);
    }
    for (int i = 0; i < 1000; ++i) {
        const double u = random.uniform();
        checks.expect(u >= 0.0 && u < 1.0, "uniform() gives %g", u);
    }
}

void expect_same(Checks& checks, std::span<const Candidate> found, const Choices& expected,
                 const std::string& what) {
    checks.expect(found.size() == expected.size(), "%s: %zu candidates, not %zu", what.c_str(),
                  found.size(), expected.size());
    for (size_t i = 0; i < std::min(found.size(), expected.size()); ++i)
        checks.expect(found[i].token == expected[i].token, "%s: rank %zu is token %d, not %d",
                      what.c_str(), i, found[i].token, expected[i].token);
}

// Sizes around every step of selection and every block of the passes.
constexpr size_t sizes[] = {1, 2, 15, 16, 17, 63, 64, 65, 100, 1023, 1024, 1025, 6000};

void test_ranking(Checks& checks) {
    std::mt19937_64 random(1);
    for (size_t n : sizes)
        for (int kind = 0; kind < 5; ++kind) {
            auto logits = random_logits(random, n, kind == 1 ? 0.5f : 0.0f);
            if (kind == 2)
                for (size_t i = 0; i + 1 < n; ++i)
                    if (random() % 3) logits[i] = -infinity;
            if (kind == 3) std::sort(logits.begin(), logits.end());  // worst for selection
            if (kind == 4)
                for (float& logit : logits)
                    logit = random() % 2 ? 0.0f : -0.0f;
            const Choices expected = all_choices({logits.begin(), logits.end()});
            const LogitSummary summary = summarize(logits);
            checks.expect(summary.n_possible == expected.size() && !summary.has_nan &&
                              double(summary.best) == expected[0].logit,
                          "summary of %zu logits: best %g, %zu possible", n, summary.best,
                          summary.n_possible);
            for (size_t wanted : {size_t(1), size_t(40), size_t(64), size_t(65), size_t(1025), n}) {
                Ranking ranking;
                ranking.reset(logits, summary);
                Choices prefix = expected;
                cut(prefix, wanted);
                expect_same(checks, ranking.first(prefix.size()), prefix,
                            format("first %zu of %zu, kind %d", wanted, n, kind));
            }
        }
    std::vector<float> with_nan(37, 1.0f);
    for (float& logit : with_nan) {
        logit = std::nanf("");
        checks.expect(summarize(with_nan).has_nan, "a NaN among 37 logits is not seen");
        logit = 1.0f;
    }
}

void test_mass(Checks& checks) {
    std::mt19937_64 random(2);
    for (size_t n : sizes)
        for (float temperature : {0.05f, 0.7f, 1.0f, 3.0f}) {
            const auto logits = random_logits(random, n);
            const Choices choices = all_choices({logits.begin(), logits.end()});
            Ranking whole, part;
            whole.reset(logits, summarize(logits));
            part.reset(logits, summarize(logits));
            part.truncate((n + 1) / 2);
            for (Ranking* ranking : {&whole, &part}) {
                Choices expected = choices;
                cut(expected, ranking->size());
                const auto p = probabilities(expected, double(temperature));
                const Mass mass = ranking->mass(temperature);
                checks.expect(std::abs(mass.weight * p[0] - 1.0) < 1e-6,
                              "total weight of %zu at T=%g: %.9g, not %.9g", n, temperature,
                              mass.weight, 1.0 / p[0]);
                checks.expect(std::abs(mass.entropy() - entropy(p)) < 2e-6,
                              "entropy of %zu at T=%g: %.9g, not %.9g", n, temperature,
                              mass.entropy(), entropy(p));
                for (size_t i = 0; i < expected.size(); i += 1 + i / 8) {
                    const double w = ranking->weight(float(expected[i].logit), temperature);
                    checks.expect(std::abs(w - p[i] / p[0]) < 1e-6,
                                  "weight of rank %zu at T=%g: %.9g, not %.9g", i, temperature, w,
                                  p[i] / p[0]);
                }
            }
        }
}

// Where the exponent is exact, only the exponential itself can be off.
void test_weight_precision(Checks& checks) {
    std::vector<float> logits;
    for (int i = 0; i <= 87 * 256; ++i)
        logits.push_back(float(-i) / 256.0f);
    Ranking ranking;
    ranking.reset(logits, summarize(logits));
    for (float logit : logits) {
        const double expected = std::exp(double(logit));
        const double error = std::abs(ranking.weight(logit, 1.0f) / expected - 1.0);
        checks.expect(error < 2e-7, "e^%g is off by %g of itself", logit, error);
    }
}

void test_filters(Checks& checks) {
    std::mt19937_64 random(3);
    using Filter = void (*)(Ranking&, double, size_t);
    using Reference = void (*)(Choices&, double, size_t);
    const struct {
        const char* name;
        Filter filter;
        Reference reference;
    } filters[] = {{"top-p", keep_top_p, top_p},
                   {"min-p", keep_min_p, min_p},
                   {"typical", keep_typical, typical}};
    for (const auto& [name, filter, reference] : filters)
        for (size_t n : sizes)
            for (int round = 0; round < 12; ++round) {
                const bool ties = round % 3 == 0 && filter != keep_typical;
                const auto logits = random_logits(random, n, ties ? 0.5f : 0.0f);
                const double p = round == 0   ? 0.0
                                 : round == 1 ? 1e-3
                                              : double(uniform(random, 0, 1));
                const size_t min_keep = round % 4 == 3 ? 1 + random() % 8 : 1;
                Choices expected = all_choices({logits.begin(), logits.end()});
                Ranking ranking;
                ranking.reset(logits, summarize(logits));
                if (round % 2 == 1) {
                    cut(expected, n / 2 + 1);
                    ranking.truncate(n / 2 + 1);
                }
                filter(ranking, p, min_keep);
                reference(expected, p, min_keep);
                expect_same(
                    checks, ranking.first(ranking.size()), expected,
                    format("%s %.6f of %zu, at least %zu, round %d", name, p, n, min_keep, round));
            }
}

// The token whose stretch of the cumulative distribution holds the generator's number.
void expect_drawn(Checks& checks, int32_t token, const Distribution& from, double u,
                  const std::string& what) {
    double below = 0.0;
    for (size_t i = 0; i < from.choices.size(); ++i) {
        if (from.choices[i].token == token) {
            checks.expect(u >= below - 1e-6 && u <= below + from.p[i] + 1e-6,
                          "%s: token %d covers %.9f to %.9f, the number was %.9f", what.c_str(),
                          token, below, below + from.p[i], u);
            return;
        }
        below += from.p[i];
    }
    checks.expect(false, "%s: token %d is no candidate", what.c_str(), token);
}

SamplingParams random_params(std::mt19937_64& random, size_t n) {
    const auto sometimes = [&] { return random() % 3 == 0; };
    SamplingParams params;
    params.temperature = uniform(random, 0.1f, 2.0f);
    params.seed = random();
    if (sometimes()) params.top_k = int(1 + random() % 60);
    if (sometimes()) params.top_p = uniform(random, 0.0f, 1.0f);
    if (sometimes()) params.min_p = uniform(random, 0.0f, 0.3f);
    if (sometimes()) params.typical_p = uniform(random, 0.0f, 1.0f);
    if (sometimes()) params.min_keep = int(1 + random() % 5);
    if (sometimes()) params.dynatemp_range = uniform(random, 0.0f, 1.5f);
    if (sometimes()) params.dynatemp_exponent = uniform(random, 0.5f, 2.0f);
    if (sometimes()) params.repeat_penalty = uniform(random, 0.5f, 2.0f);
    if (sometimes()) params.presence_penalty = uniform(random, -1.0f, 1.0f);
    if (sometimes()) params.frequency_penalty = uniform(random, -1.0f, 1.0f);
    params.penalty_window = random() % 3 == 0 ? -1 : int(random() % 20);
    for (uint64_t i = 0; i < random() % 4; ++i)
        params.bias.emplace_back(int32_t(random() % n),
                                 sometimes() ? -infinity : uniform(random, -3, 3));
    return params;
}

void test_pipeline(Checks& checks) {
    std::mt19937_64 random(4);
    for (int round = 0; round < 1500; ++round) {
        const size_t n = round % 20 == 0 ? 5000 : 8 + random() % 200;
        const SamplingParams params = random_params(random, n);
        Sampler sampler(params, int32_t(n));
        Random numbers(params.seed);
        std::vector<int32_t> history;
        for (size_t i = 0; i < random() % 40; ++i)
            history.push_back(int32_t(random() % 12));
        if (n < 12) history.clear();
        sampler.accept(history);
        for (int step = 0; step < 3; ++step) {
            const auto logits = random_logits(random, n);
            const auto before = logits;
            const int32_t token = sampler.sample(logits);
            expect_drawn(checks, token, distribution(logits, params, history), numbers.uniform(),
                         format("round %d, step %d", round, step));
            checks.expect(logits == before, "round %d: the logits were changed", round);
            history.push_back(token);
        }
    }
}

void test_mirostat(Checks& checks) {
    std::mt19937_64 random(5);
    for (int version : {1, 2})
        for (size_t n : {2u, 90u, 3000u})
            for (float temperature : {0.6f, 1.0f, 1.7f}) {
                SamplingParams params;
                params.mirostat = version;
                params.mirostat_tau = n == 2 ? 0.5f : 3.0f;
                params.temperature = temperature;
                params.seed = random();
                params.top_k = 1;  // mirostat takes the filters' place
                Sampler sampler(params, int32_t(n));
                Random numbers(params.seed);
                Mirostat state{2.0 * double(params.mirostat_tau)};
                for (int step = 0; step < 60; ++step) {
                    const auto logits = random_logits(random, n);
                    const int32_t token = sampler.sample(logits);
                    expect_drawn(checks, token, state.step(logits, params), numbers.uniform(),
                                 format("mirostat %d, %zu tokens, step %d", version, n, step));
                    state.learn(token, logits, params);
                }
            }
    // Nothing to fit a law to.
    SamplingParams params;
    params.mirostat = 1;
    params.temperature = 1.0f;
    Sampler single(params, 3);
    const std::vector<float> one_possible = {-infinity, 1.0f, -infinity};
    checks.expect(single.sample(one_possible) == 1, "mirostat misses the only candidate");
    Sampler flat(params, 50);
    const int32_t token = flat.sample(std::vector<float>(50, 1.0f));
    checks.expect(token >= 0 && token < 50, "mirostat on equal logits gives %d", token);
}

void test_frequencies(Checks& checks) {
    std::mt19937_64 random(6);
    for (int round = 0; round < 12; ++round) {
        const size_t n = 30;
        const auto logits = random_logits(random, n);
        SamplingParams params;
        params.seed = uint64_t(round);
        params.temperature = uniform(random, 0.5f, 2.0f);
        if (round % 2) params.top_p = 0.9f;
        if (round % 3 == 0) params.typical_p = 0.8f;
        Sampler sampler(params, n);
        const Distribution expected = distribution(logits, params, {});
        std::vector<double> counts(n, 0.0);
        const int n_draws = 20000;
        for (int i = 0; i < n_draws; ++i)
            ++counts[size_t(sampler.sample(logits))];
        // Pearson's statistic over tokens expected at least 5 times, the rest pooled.
        double statistic = 0.0, rest = n_draws, rest_expected = n_draws;
        int degrees = 0;
        for (size_t i = 0; i < expected.choices.size(); ++i) {
            const double mean = expected.p[i] * n_draws;
            if (mean < 5.0) continue;
            const double count = counts[size_t(expected.choices[i].token)];
            statistic += (count - mean) * (count - mean) / mean;
            rest -= count;
            rest_expected -= mean;
            ++degrees;
        }
        if (rest_expected > 5.0) {
            statistic += (rest - rest_expected) * (rest - rest_expected) / rest_expected;
            ++degrees;
        }
        // Mean d, variance 2d: four deviations above is beyond one in a thousand.
        const double d = degrees - 1;
        checks.expect(statistic <= d + 4.0 * std::sqrt(2.0 * d), "chi-square %.1f with %g degrees",
                      statistic, d);
    }
}

void test_argmax(Checks& checks) {
    SamplingParams params;
    Sampler greedy(params, 6);
    const auto expect = [&](Sampler& sampler, std::vector<float> logits, int32_t expected) {
        const int32_t token = sampler.sample(logits);
        checks.expect(token == expected, "argmax gives %d, not %d", token, expected);
    };
    expect(greedy, {1, 3, 2, 3, 0, 3}, 1);
    expect(greedy, {-0.0f, 0.0f, -1, 0, -1, -1}, 0);
    expect(greedy, {-5, -infinity, -4, -4, -6, -7}, 2);
    expect(greedy, {1, infinity, 2, infinity, 0, 0}, 1);
    params.temperature = 1.5f;
    params.top_p = 0.5f;
    Sampler warm(params, 6);
    expect(warm, {1, 2, infinity, 2, infinity, 0}, 2);
    params.bias = {{2, -infinity}};
    Sampler banned(params, 6);
    expect(banned, {1, 2, infinity, 2, infinity, 0}, 4);
    // Penalties count for argmax too: the winner's lead of 0.5 is lost once it has been drawn.
    params = {};
    params.presence_penalty = 0.75f;
    params.penalty_window = 1;
    Sampler alternating(params, 6);
    for (int32_t expected : {2, 4, 2, 4})
        expect(alternating, {0, 0, 3, 0, 2.5f, 0}, expected);
}

// The best logits in the order that a device gives: NaN first, -infinity last.
std::vector<Candidate> best_of(const std::vector<float>& logits, size_t n) {
    std::vector<Candidate> best;
    for (size_t i = 0; i < logits.size(); ++i)
        best.push_back({logits[i], int32_t(i)});
    std::stable_sort(best.begin(), best.end(), [](const Candidate& a, const Candidate& b) {
        const bool a_is_nan = std::isnan(a.logit), b_is_nan = std::isnan(b.logit);
        return a_is_nan || b_is_nan ? a_is_nan && !b_is_nan : a.logit > b.logit;
    });
    best.resize(std::min(n, best.size()));
    return best;
}

// The same draws, bit by bit, from the best logits as from all of them.
void test_best_alone(Checks& checks) {
    std::mt19937_64 random(8);
    int n_drawn = 0, n_left = 0;
    for (int round = 0; round < 400; ++round) {
        const size_t n = sizes[random() % std::size(sizes)];
        SamplingParams params;
        params.seed = random();
        params.temperature = round % 5 == 0 ? 0.0f : uniform(random, 0.3f, 2.0f);
        params.top_k = int(1 + random() % 100);
        if (random() % 2) params.top_p = uniform(random, 0.1f, 1.0f);
        if (random() % 3 == 0) params.typical_p = uniform(random, 0.1f, 1.0f);
        if (random() % 3 == 0) params.min_p = uniform(random, 0.0f, 0.3f);
        if (random() % 3 == 0) params.dynatemp_range = 0.25f;
        params.min_keep = int(1 + random() % 3);
        Sampler of_all(params, int32_t(n)), of_best(params, int32_t(n));
        const size_t n_deciding = of_best.n_deciding();
        checks.expect((n_deciding == 0) == (params.temperature > 0 && size_t(params.top_k) >= n),
                      "top-k %d of %zu needs the %zu best", params.top_k, n, n_deciding);
        for (int step = 0; step < 4; ++step) {
            auto logits = random_logits(random, n, round % 3 ? 0.0f : 0.5f);
            for (float& logit : logits)
                if (round % 7 == 0 && random() % 8) logit = -infinity;
            if (round % 11 == 0) logits[random() % n] = infinity;
            if (round % 7 == 0) logits[random() % n] = 1.0f;
            std::optional<int32_t> token;
            if (n_deciding > 0) token = of_best.sample_best(best_of(logits, n_deciding));
            token ? ++n_drawn : ++n_left;
            const int32_t found = token ? *token : of_best.sample(logits);
            const int32_t expected = of_all.sample(logits);
            checks.expect(found == expected, "round %d, step %d: token %d of the best, %d of all",
                          round, step, found, expected);
        }
    }
    checks.expect(n_drawn > 800 && n_left > 100, "%d drawn, %d left", n_drawn, n_left);
    SamplingParams needs_all;
    needs_all.repeat_penalty = 1.1f;
    checks.expect(Sampler(needs_all, 10).n_deciding() == 0, "penalties look at all logits");
    needs_all = {};
    needs_all.bias = {{1, 0.5f}};
    checks.expect(Sampler(needs_all, 10).n_deciding() == 0, "a bias looks at all logits");
    needs_all = {};
    needs_all.temperature = 1.0f;
    needs_all.top_k = 4;
    needs_all.mirostat = 2;
    checks.expect(Sampler(needs_all, 10).n_deciding() == 0, "mirostat looks at all logits");
}

template <typename Body>
void expect_error(Checks& checks, const std::vector<std::string>& words, Body body) {
    try {
        body();
        checks.expect(false, "nothing was thrown where '%s' was expected", words[0].c_str());
    } catch (const Error& error) {
        checks.expect(error.status() == QI_ARGUMENT, "status %d", int(error.status()));
        for (const std::string& word : words)
            checks.expect(std::string(error.what()).find(word) != std::string::npos,
                          "'%s' does not say '%s'", error.what(), word.c_str());
    }
}

void test_bad_parameters(Checks& checks) {
    const float nan = std::nanf("");
    const auto refuse = [&](std::vector<std::string> words, auto change) {
        SamplingParams params;
        change(params);
        expect_error(checks, words, [&] { Sampler(params, 10); });
    };
    using P = SamplingParams;
    refuse({"temperature", "-1", "at least 0"}, [](P& p) { p.temperature = -1; });
    refuse({"temperature", "nan"}, [=](P& p) { p.temperature = nan; });
    refuse({"temperature", "inf"}, [](P& p) { p.temperature = infinity; });
    refuse({"dynatemp_range", "-0.5"}, [](P& p) { p.dynatemp_range = -0.5f; });
    refuse({"dynatemp_exponent", "above 0"}, [](P& p) { p.dynatemp_exponent = 0; });
    refuse({"top_k", "-1", "at least 0"}, [](P& p) { p.top_k = -1; });
    refuse({"top_p", "1.5", "from 0 to 1"}, [](P& p) { p.top_p = 1.5f; });
    refuse({"top_p", "nan"}, [=](P& p) { p.top_p = nan; });
    refuse({"min_p", "-0.1", "from 0 to 1"}, [](P& p) { p.min_p = -0.1f; });
    refuse({"typical_p", "2", "from 0 to 1"}, [](P& p) { p.typical_p = 2; });
    refuse({"repeat_penalty", "above 0"}, [](P& p) { p.repeat_penalty = 0; });
    refuse({"presence_penalty", "finite"}, [](P& p) { p.presence_penalty = infinity; });
    refuse({"frequency_penalty", "finite"}, [=](P& p) { p.frequency_penalty = nan; });
    refuse({"penalty_window", "-2", "at least -1"}, [](P& p) { p.penalty_window = -2; });
    refuse({"mirostat", "3"}, [](P& p) { p.mirostat = 3; });
    refuse({"mirostat_tau", "-1"}, [](P& p) { p.mirostat_tau = -1; });
    refuse({"mirostat_eta", "nan"}, [=](P& p) { p.mirostat_eta = nan; });
    refuse({"min_keep", "0", "at least 1"}, [](P& p) { p.min_keep = 0; });
    refuse({"biased token", "10", "0 to 9"}, [](P& p) { p.bias = {{10, 1.0f}}; });
    refuse({"biased token", "-1"}, [](P& p) { p.bias = {{-1, 1.0f}}; });
    refuse({"token 3", "inf"}, [](P& p) { p.bias = {{3, infinity}}; });
    refuse({"token 3", "nan"}, [=](P& p) { p.bias = {{3, nan}}; });
    expect_error(checks, {"n_vocab", "0"}, [] { Sampler({}, 0); });
}

void test_bad_logits(Checks& checks) {
    SamplingParams params;
    params.temperature = 1.0f;
    params.repeat_penalty = 1.3f;
    params.seed = 9;
    std::mt19937_64 random(7);
    const auto logits = random_logits(random, 40);
    Sampler disturbed(params, 40), undisturbed(params, 40);
    for (int step = 0; step < 20; ++step) {
        auto with_nan = logits;
        with_nan[size_t(step)] = std::nanf("");
        expect_error(checks, {"token " + std::to_string(step) + " ", "NaN"},
                     [&] { disturbed.sample(with_nan); });
        expect_error(checks, {"all 40 logits are -inf"},
                     [&] { disturbed.sample(std::vector<float>(40, -infinity)); });
        expect_error(checks, {"39 logits", "40"},
                     [&] { disturbed.sample(std::vector<float>(39)); });
        const int32_t tokens[] = {1, 40};
        expect_error(checks, {"40", "0 to 39"}, [&] { disturbed.accept(tokens); });
        const int32_t a = disturbed.sample(logits), b = undisturbed.sample(logits);
        checks.expect(a == b, "step %d: errors changed the draw from %d to %d", step, b, a);
    }
    params = {};
    params.temperature = 1.0f;
    params.top_k = 3;
    Sampler few(params, 40);
    auto with_nan = logits;
    with_nan[31] = with_nan[7] = std::nanf("");
    expect_error(checks, {"token 7 ", "NaN"}, [&] { few.sample_best(best_of(with_nan, 4)); });
    expect_error(checks, {"all 40 logits are -inf"},
                 [&] { few.sample_best(best_of(std::vector<float>(40, -infinity), 4)); });
    params.bias = {{0, -infinity}, {1, -infinity}};
    Sampler banned(params, 2);
    expect_error(checks, {"after the bias"}, [&] { banned.sample(std::vector<float>(2)); });
}

}  // namespace

int main() {
    Checks checks;
    test_random(checks);
    test_ranking(checks);
    test_mass(checks);
    test_weight_precision(checks);
    test_filters(checks);
    test_pipeline(checks);
    test_mirostat(checks);
    test_frequencies(checks);
    test_argmax(checks);
    test_best_alone(checks);
    test_bad_parameters(checks);
    test_bad_logits(checks);
    return checks.status();
}
