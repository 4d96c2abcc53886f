// Selecting, sorting and weighing candidates in a few passes over the logits.
#include "sampling/ranking.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

namespace qi {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Sums are kept in this many lanes: vector code then changes no result.
constexpr size_t n_lanes = 16;

// How far candidates are put in order at a time; who looks further gets all of them.
constexpr size_t order_steps[] = {64, 1024};

constexpr float lowest_exponent = -87.0f;  // e to it is the smallest normal float's neighbour

// e^x for x in [lowest_exponent, 0], within 2e-7 of itself, in operations that vectors have.
inline float exp_nonpositive(float x) {
    const int32_t n = int32_t(x * 1.44269504f - 0.5f);
    // ln 2 in two parts, the first short enough that its product with n is exact.
    const float r = (x - float(n) * 0x1.62e4p-1f) - float(n) * 0x1.7f7d1cp-20f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * std::bit_cast<float>((n + 127) << 23);
}

// Integers that rise as floats fall; both zeros become one.
inline uint32_t falling_key(float logit) {
    const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

// Into the order of rank, given the order of id: 11 bits at a time from the lowest, stably.
void radix_sort(std::vector<Candidate>& candidates, std::vector<Candidate>& scratch) {
    constexpr int n_bits = 11;
    constexpr uint32_t n_digits = 1u << n_bits;
    const auto digit = [](const Candidate& candidate, size_t pass) {
        return falling_key(candidate.logit) >> (pass * n_bits) & (n_digits - 1);
    };
    std::array<std::array<uint32_t, n_digits>, 3> starts{};
    for (const Candidate& candidate : candidates)
        for (size_t pass = 0; pass < starts.size(); ++pass)
            ++starts[pass][digit(candidate, pass)];
    scratch.resize(candidates.size());
    for (size_t pass = 0; pass < starts.size(); ++pass) {
        uint32_t n_before = 0;
        for (uint32_t& start : starts[pass])
            n_before += std::exchange(start, n_before);
        for (const Candidate& candidate : candidates)
            scratch[starts[pass][digit(candidate, pass)]++] = candidate;
        candidates.swap(scratch);
    }
}

}  // namespace

LogitSummary summarize(std::span<const float> logits) {
    std::array<float, n_lanes> best;
    best.fill(-infinity);
    std::array<int32_t, n_lanes> n_possible{}, n_nan{};
    const auto note = [&](size_t lane, float logit) {
        best[lane] = logit > best[lane] ? logit : best[lane];
        n_possible[lane] += logit > -infinity;
        n_nan[lane] += logit != logit;
    };
    const size_t n_whole = logits.size() / n_lanes * n_lanes;
    for (size_t i = 0; i < n_whole; i += n_lanes)
        for (size_t lane = 0; lane < n_lanes; ++lane)
            note(lane, logits[i + lane]);
    for (size_t i = n_whole; i < logits.size(); ++i)
        note(0, logits[i]);
    LogitSummary summary{-infinity, 0, false};
    for (size_t lane = 0; lane < n_lanes; ++lane) {
        summary.best = std::max(summary.best, best[lane]);
        summary.n_possible += size_t(n_possible[lane]);
        summary.has_nan |= n_nan[lane] > 0;
    }
    return summary;
}

double Mass::entropy() const {
    return std::log(weight) - weighted / weight;
}

void Ranking::reset(std::span<const float> logits, const LogitSummary& summary) {
    logits_ = logits;
    ordered_.clear();
    size_ = n_possible_ = summary.n_possible;
    best_ = summary.best;
}

void Ranking::reset(std::span<const Candidate> best, size_t n) {
    logits_ = {};
    ordered_.assign(best.begin(), best.end());
    size_ = n;
    n_possible_ = 0;
    best_ = best.front().logit;
}

void Ranking::slice(size_t begin, size_t end) {
    first(end);
    ordered_.resize(end);
    ordered_.erase(ordered_.begin(), ordered_.begin() + ptrdiff_t(begin));
    size_ = end - begin;
    n_possible_ = 0;
    best_ = ordered_.front().logit;
}

std::span<const Candidate> Ranking::first(size_t n) {
    if (n > ordered_.size()) {
        const auto step = std::lower_bound(std::begin(order_steps), std::end(order_steps), n);
        if (step != std::end(order_steps) && *step < n_possible_)
            select_best(*step);
        else
            sort_all();
    }
    return std::span(ordered_).first(n);
}

// Collects what beats the n-th best so far, and thins out at twice n. For n << all, hardly anything
// gets past the first comparison.
void Ranking::select_best(size_t n) {
    ordered_.clear();
    float to_beat = -infinity;  // a later token of equal logit ranks lower
    const auto thin_out = [&] {
        std::nth_element(ordered_.begin(), ordered_.begin() + ptrdiff_t(n - 1), ordered_.end(),
                         ranks_before);
        ordered_.resize(n);
        to_beat = ordered_.back().logit;
    };
    for (size_t start = 0; start < logits_.size(); start += n_lanes) {
        const size_t end = std::min(start + n_lanes, logits_.size());
        int32_t n_better = 0;
        for (size_t i = start; i < end; ++i)
            n_better += logits_[i] > to_beat;
        if (n_better == 0) continue;
        for (size_t i = start; i < end; ++i)
            if (logits_[i] > to_beat) ordered_.push_back({logits_[i], int32_t(i)});
        if (ordered_.size() >= 2 * n) thin_out();
    }
    if (ordered_.size() > n) thin_out();
    std::sort(ordered_.begin(), ordered_.end(), ranks_before);
}

void Ranking::sort_all() {
    ordered_.clear();
    for (size_t i = 0; i < logits_.size(); ++i)
        if (logits_[i] > -infinity) ordered_.push_back({logits_[i], int32_t(i)});
    if (ordered_.size() < 4096)  // about where the radix sort's tables are paid for
        std::sort(ordered_.begin(), ordered_.end(), ranks_before);
    else
        radix_sort(ordered_, scratch_);
}

inline float Ranking::exponent(float logit, float temperature) const {
    const float x = (logit - best_) / temperature;
    return x < lowest_exponent ? lowest_exponent : x;
}

double Ranking::weight(float logit, float temperature) const {
    return exp_nonpositive(exponent(logit, temperature));
}

Mass Ranking::mass(float temperature) {
    Mass mass;
    if (!is_whole()) {
        for (const Candidate& candidate : first(size_)) {
            const float x = exponent(candidate.logit, temperature);
            const float w = exp_nonpositive(x);
            mass.weight += w;
            mass.weighted += w * x;
        }
        return mass;
    }
    std::array<double, n_lanes> weight{}, weighted{};
    for (size_t start = 0; start < logits_.size(); start += n_lanes) {
        // Past the end and at -infinity stands e^-87, which vanishes beside the best one's e^0.
        std::array<float, n_lanes> x;
        x.fill(lowest_exponent);
        const size_t n = std::min(n_lanes, logits_.size() - start);
        for (size_t lane = 0; lane < n; ++lane)
            x[lane] = exponent(logits_[start + lane], temperature);
        for (size_t lane = 0; lane < n_lanes; ++lane) {
            const float w = exp_nonpositive(x[lane]);
            weight[lane] += w;
            weighted[lane] += w * x[lane];
        }
    }
    for (size_t lane = 0; lane < n_lanes; ++lane) {
        mass.weight += weight[lane];
        mass.weighted += weighted[lane];
    }
    return mass;
}

size_t Ranking::count_from(float logit) {
    if (is_whole()) {
        int32_t n = 0;
        for (float other : logits_)
            n += other >= logit;
        return size_t(n);
    }
    const auto candidates = first(size_);
    const auto end = std::partition_point(candidates.begin(), candidates.end(),
                                          [&](const Candidate& c) { return c.logit >= logit; });
    return size_t(end - candidates.begin());
}

}  // namespace qi
