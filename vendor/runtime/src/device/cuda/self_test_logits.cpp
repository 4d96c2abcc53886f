// Self-tests of what becomes of logits.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "device/candidate.h"
#include "device/cuda/self_test_bench.h"
#include "kernels/vector_ops.h"

namespace qi::cuda {

namespace {

// Few different values, so that there are ties; -0 beside 0. Odd: in one row also NaN and
// infinities, the next ones all infinite, all NaN of both signs, all different and the best last.
std::vector<float> test_logits(Bench& bench, int64_t n, int64_t n_vocab, bool odd) {
    std::vector<float> logits(size_t(n * n_vocab));
    for (float& value : logits)
        value = float(bench.below(400) - 300) * 0.05f;
    for (size_t i = 0; i < logits.size(); i += 5)
        logits[i] = i % 2 == 0 ? 0.0f : -0.0f;
    if (odd && n_vocab > 10) {
        logits[3] = std::nanf("");
        logits[7] = -HUGE_VALF;
        logits[9] = logits[4] = HUGE_VALF;
    }
    for (int64_t i = 0; odd && n > 3 && i < n_vocab; ++i) {
        logits[size_t(n_vocab + i)] = -HUGE_VALF;
        logits[size_t(2 * n_vocab + i)] = std::copysign(std::nanf(""), i % 3 ? 1.0f : -1.0f);
        logits[size_t(3 * n_vocab + i)] = float(i) - 1000.5f;
    }
    return logits;
}

// Ids by falling logit, lower ids first among equals, NaN before everything.
std::vector<int32_t> ranking(const float* row, int64_t n_vocab) {
    std::vector<int32_t> ids(static_cast<size_t>(n_vocab));
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int32_t a, int32_t b) {
        if (std::isnan(row[a]) || std::isnan(row[b]))
            return std::isnan(row[a]) && !std::isnan(row[b]);
        return row[a] > row[b];
    });
    return ids;
}

bool same(const Candidate& found, const float* row, int32_t id) {
    return found.token == id && std::memcmp(&found.logit, row + id, sizeof(float)) == 0;
}

void test_best(Bench& bench, int64_t n, int64_t n_vocab) {
    const std::vector<float> logits = test_logits(bench, n, n_vocab, true);
    const CUdeviceptr at = bench.upload(logits);
    const size_t partial_bytes = std::max(Kernels::argmax_partial_bytes(n, n_vocab),
                                          Kernels::top_k_partial_bytes(n, n_vocab));
    const CUdeviceptr partial = bench.room(partial_bytes);
    const CUdeviceptr tickets = bench.room(size_t(n) * sizeof(uint32_t));
    bench.stream.fill(tickets, 0, size_t(n) * sizeof(uint32_t));
    const CUdeviceptr best_at = bench.room(size_t(n) * sizeof(Candidate));
    bench.kernels.argmax(bench.stream, at, n, n_vocab, tickets, partial, best_at);
    bench.stream.fill(best_at, 0xff, size_t(n) * sizeof(Candidate));
    bench.kernels.argmax(bench.stream, at, n, n_vocab, tickets, partial,
                         best_at);  // tickets are as they were
    const auto best = bench.download<Candidate>(best_at, size_t(n));
    std::vector<std::vector<int32_t>> ranked;
    for (int64_t i = 0; i < n; ++i) {
        const float* row = &logits[size_t(i * n_vocab)];
        ranked.push_back(ranking(row, n_vocab));
        bench.expect(same(best[size_t(i)], row, ranked.back()[0]));
    }
    for (int64_t k : {int64_t(1), int64_t(40), int64_t(64), int64_t(65), Kernels::top_k_max}) {
        k = std::min(k, n_vocab);
        const CUdeviceptr top = bench.room(size_t(n * k) * sizeof(Candidate));
        bench.stream.fill(partial, 0xff, partial_bytes);  // better than any key
        bench.kernels.top_k(bench.stream, at, n, n_vocab, k, tickets, partial, top);
        const auto got = bench.download<Candidate>(top, size_t(n * k));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < k; ++j)
                bench.expect(same(got[size_t(i * k + j)], &logits[size_t(i * n_vocab)],
                                  ranked[size_t(i)][size_t(j)]));
    }
}

void test_log_terms(Bench& bench, int64_t n, int64_t n_vocab) {
    std::vector<float> logits = test_logits(bench, n, n_vocab, false);
    // A row whose small terms vanish in a plain float sum beside a large one.
    for (int64_t i = 0; i < n_vocab; ++i)
        logits[size_t(i)] = i < 1024 ? 0.0f : -17.5f;
    std::vector<int32_t> targets;
    for (int64_t i = 0; i < n; ++i)
        targets.push_back(bench.below(int(n_vocab)));
    const CUdeviceptr terms_at = bench.room(size_t(n) * sizeof(Kernels::LogTerms));
    bench.kernels.log_terms(bench.stream, bench.upload(logits), n, n_vocab, bench.upload(targets),
                            terms_at);
    const auto terms = bench.download<Kernels::LogTerms>(terms_at, size_t(n));
    for (int64_t i = 0; i < n; ++i) {
        const float* row = &logits[size_t(i * n_vocab)];
        float maximum = 0;
        double sum = 0;
        kernels::max_and_sum_exp(row, n_vocab, &maximum, &sum);
        bench.expect(terms[size_t(i)].maximum == maximum);
        bench.expect(terms[size_t(i)].target == row[targets[size_t(i)]]);
        // Exponentials of both sides are off by 2 ulp and the rounding of their argument; adding
        // them costs nothing beside that.
        double tolerance = 0;
        for (int64_t j = 0; j < n_vocab; ++j) {
            const double x = double(row[j]) - double(maximum);
            tolerance += std::exp(x) * (2 * 2 - 2 * x) * float_rounding;
        }
        bench.compare(terms[size_t(i)].sum, sum, tolerance);
        bench.compare(terms[size_t(i)].log_probability(),
                      double(row[targets[size_t(i)]]) - double(maximum) - std::log(sum),
                      1.01 * tolerance / sum);
    }
}

}  // namespace

void add_logit_tests(std::vector<SelfTest>& tests) {
    // The last has more parts than are merged at once; four rows of 32003 fill the partials.
    for (const int64_t n_vocab : {1, 11, 1000, 2048, 2049, 8193, 32003, 70001})
        tests.push_back({format("best of %lld", (long long)n_vocab), [=](Bench& bench) {
                             test_best(bench, n_vocab > 70000 ? 1 : 5, n_vocab);
                         }});
    for (const int64_t n_vocab : {1, 11, 1000, 8193, 32003})
        tests.push_back({format("log-probabilities of %lld", (long long)n_vocab),
                         [=](Bench& bench) { test_log_terms(bench, 3, n_vocab); }});
}

}  // namespace qi::cuda
