#include "sparse/neuron_cache.h"

#include <algorithm>
#include <cmath>
#include <deque>

namespace qi {

namespace {

// The first `n` of the ids by `before`, in that order.
template <typename Before>
void keep_first(std::vector<int32_t>& ids, size_t n, Before before) {
    n = std::min(n, ids.size());
    std::partial_sort(ids.begin(), ids.begin() + int64_t(n), ids.end(), before);
    ids.resize(n);
}

// A cached neuron is told from others by its slot.
std::vector<int32_t> not_cached(std::span<const int32_t> cached, size_t n_ff) {
    std::vector<bool> is_cached(n_ff, false);
    for (const int32_t j : cached)
        is_cached[size_t(j)] = true;
    std::vector<int32_t> others;
    for (size_t j = 0; j < n_ff; ++j)
        if (!is_cached[j]) others.push_back(int32_t(j));
    return others;
}

std::vector<int32_t> slots_of(std::span<const int32_t> cached) {
    std::vector<int32_t> slots(cached.size());
    for (size_t s = 0; s < slots.size(); ++s)
        slots[s] = int32_t(s);
    return slots;
}

// Pairs of the best neurons that are not cached and the worst slots, as long as the first is worth
// more. Among equals lower numbers go first.
template <typename Worth>
std::vector<Swap> best_for_worst(std::span<const int32_t> cached, size_t n_ff, size_t budget,
                                 Worth worth) {
    std::vector<int32_t> coming = not_cached(cached, n_ff), leaving = slots_of(cached);
    keep_first(coming, budget, [&](int32_t a, int32_t b) {
        return worth(a) != worth(b) ? worth(a) > worth(b) : a < b;
    });
    keep_first(leaving, budget, [&](int32_t a, int32_t b) {
        const auto x = worth(cached[size_t(a)]), y = worth(cached[size_t(b)]);
        return x != y ? x < y : a < b;
    });
    std::vector<Swap> swaps;
    for (size_t i = 0; i < std::min(coming.size(), leaving.size()); ++i) {
        if (!(worth(coming[i]) > worth(cached[size_t(leaving[i])]))) break;
        swaps.push_back({leaving[i], coming[i]});
    }
    return swaps;
}

// The first counts of a network decide, whatever comes later.
class Counted final : public CachePolicy {
  public:
    std::vector<Swap> plan(size_t network, std::span<const uint32_t> counts,
                           std::span<const int32_t> cached, const Speeds&, size_t budget) override {
        if (first_.size() <= network) first_.resize(network + 1);
        std::vector<uint32_t>& first = first_[network];
        if (first.empty()) first.assign(counts.begin(), counts.end());
        return best_for_worst(cached, counts.size(), budget,
                              [&](int32_t j) { return first[size_t(j)]; });
    }
    bool plans_once() const override { return true; }
    // All of it is one change of mind, to be over soon.
    size_t swaps_at_once() const override { return SIZE_MAX; }

  private:
    std::vector<std::vector<uint32_t>> first_;
};

// Q-Infer's rule: where the host is behind, neurons active often move to the device, where the
// device is behind, those active rarely; until the two need the same time. Unlike there, a swap
// that would leave them further apart is not made, nor any while they differ by less than is
// measured.
class Balance final : public CachePolicy {
  public:
    std::vector<Swap> plan(size_t, std::span<const uint32_t> counts,
                           std::span<const int32_t> cached, const Speeds& speeds,
                           size_t budget) override {
        constexpr double as_good_as_equal = 0.025;  // of both times, as of Q-Infer's attention
        double of_device = 0, of_host = 0;
        for (const uint32_t c : counts)
            of_host += c;
        for (const int32_t j : cached)
            of_device += counts[size_t(j)];
        of_host -= of_device;
        const auto gap = [&] { return of_host / speeds.host - of_device / speeds.device; };
        const double both = of_host / speeds.host + of_device / speeds.device;
        if (!(std::fabs(gap()) > as_good_as_equal * both)) return {};
        const bool to_device = gap() > 0;
        std::vector<Swap> swaps = best_for_worst(cached, counts.size(), budget, [&](int32_t j) {
            return to_device ? int64_t(counts[size_t(j)]) : -int64_t(counts[size_t(j)]);
        });
        for (size_t i = 0; i < swaps.size(); ++i) {
            const double before = gap();
            const double more = double(counts[size_t(swaps[i].neuron)]) -
                                double(counts[size_t(cached[size_t(swaps[i].slot)])]);
            of_device += more;
            of_host -= more;
            const bool turned = (gap() > 0) != to_device;
            if (!turned) continue;
            swaps.resize(std::fabs(gap()) < std::fabs(before) ? i + 1 : i);
            break;
        }
        return swaps;
    }
};

// Q-Infer's simulated policy: 0.1 · all hits + 0.9 · those of the last ten looks. Neurons that are
// active now come in, those that are not go first.
class Frequency final : public CachePolicy {
  public:
    std::vector<Swap> plan(size_t network, std::span<const uint32_t> counts,
                           std::span<const int32_t> cached, const Speeds&, size_t budget) override {
        if (seen_.size() <= network) seen_.resize(network + 1);
        Seen& seen = seen_[network];
        seen.add(counts);
        const size_t half = std::max<size_t>(cached.size() / 2, 1);
        std::vector<int32_t> coming, leaving = slots_of(cached);
        for (const int32_t j : not_cached(cached, counts.size()))
            if (counts[size_t(j)] > 0) coming.push_back(j);
        keep_first(coming, std::min(budget, half), [&](int32_t a, int32_t b) {
            return seen.score(a) != seen.score(b) ? seen.score(a) > seen.score(b) : a < b;
        });
        keep_first(leaving, coming.size(), [&](int32_t a, int32_t b) {
            const int32_t x = cached[size_t(a)], y = cached[size_t(b)];
            const bool x_now = counts[size_t(x)] > 0, y_now = counts[size_t(y)] > 0;
            if (x_now != y_now) return y_now;
            return seen.score(x) != seen.score(y) ? seen.score(x) < seen.score(y) : a < b;
        });
        std::vector<Swap> swaps;
        for (size_t i = 0; i < leaving.size(); ++i)
            if (seen.score(coming[i]) > seen.score(cached[size_t(leaving[i])]))
                swaps.push_back({leaving[i], coming[i]});
        return swaps;
    }

  private:
    struct Seen {
        static constexpr size_t n_recent = 10;
        std::vector<uint64_t> all;     // [n_ff]
        std::vector<uint32_t> recent;  // [n_ff], the sum of `looks`
        std::deque<std::vector<uint32_t>> looks;

        void add(std::span<const uint32_t> counts) {
            all.resize(counts.size());
            recent.resize(counts.size());
            looks.emplace_back(counts.begin(), counts.end());
            for (size_t j = 0; j < counts.size(); ++j) {
                all[j] += counts[j];
                recent[j] += counts[j];
            }
            if (looks.size() <= n_recent) return;
            for (size_t j = 0; j < counts.size(); ++j)
                recent[j] -= looks.front()[j];
            looks.pop_front();
        }
        double score(int32_t j) const {
            return 0.1 * double(all[size_t(j)]) + 0.9 * double(recent[size_t(j)]);
        }
    };
    std::vector<Seen> seen_;
};

}  // namespace

std::unique_ptr<CachePolicy> make_cache_policy(NeuronCache kind) {
    switch (kind) {
        case NeuronCache::counted:
            return std::make_unique<Counted>();
        case NeuronCache::balance:
            return std::make_unique<Balance>();
        case NeuronCache::frequency:
            return std::make_unique<Frequency>();
        case NeuronCache::fixed:
            break;
    }
    return nullptr;
}

}  // namespace qi
