// Policies for moving neurons, on random counts: what holds for every plan, and where plans lead.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "kernel_checks.h"
#include "sparse/balanced_split.h"
#include "sparse/neuron_cache.h"

using namespace qi;
using namespace qi::test;

namespace {

Checks checks;

struct Case {
    std::vector<uint32_t> counts;  // [n_ff]
    std::vector<int32_t> cached;   // [n_slots]
};

// Counts fall off as those of neurons do, over three orders of magnitude.
Case random_case(std::mt19937& rng) {
    const size_t n_ff = 20 + rng() % 300, n_slots = 1 + rng() % (n_ff - 1);
    Case made;
    for (size_t j = 0; j < n_ff; ++j)
        made.counts.push_back(uint32_t(std::pow(10.0, double(rng() % 300) / 100.0)) - 1);
    std::vector<int32_t> ids(n_ff);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), rng);
    made.cached.assign(ids.begin(), ids.begin() + int64_t(n_slots));
    return made;
}

bool apply(Case& c, const std::vector<Swap>& swaps) {
    std::set<int32_t> slots, neurons(c.cached.begin(), c.cached.end());
    for (const Swap& swap : swaps) {
        const bool known = swap.slot >= 0 && size_t(swap.slot) < c.cached.size() &&
                           swap.neuron >= 0 && size_t(swap.neuron) < c.counts.size();
        if (!known || !slots.insert(swap.slot).second || !neurons.insert(swap.neuron).second)
            return false;
        c.cached[size_t(swap.slot)] = swap.neuron;
    }
    return std::set<int32_t>(c.cached.begin(), c.cached.end()).size() == c.cached.size();
}

double on_device(const Case& c) {
    double sum = 0;
    for (const int32_t j : c.cached)
        sum += c.counts[size_t(j)];
    return sum;
}

double gap(const Case& c, const Speeds& speeds) {
    const double all = std::accumulate(c.counts.begin(), c.counts.end(), 0.0);
    return (all - on_device(c)) / speeds.host - on_device(c) / speeds.device;
}

void check_plans_are_whole(std::mt19937& rng) {
    for (const NeuronCache kind :
         {NeuronCache::counted, NeuronCache::balance, NeuronCache::frequency}) {
        for (int i = 0; i < 200; ++i) {
            const auto policy = make_cache_policy(kind);
            Case c = random_case(rng);
            for (int round = 0; round < 12; ++round) {
                const size_t budget = rng() % 9;
                const Speeds speeds{double(1 + rng() % 50), double(1 + rng() % 50)};
                const auto swaps = policy->plan(3, c.counts, c.cached, speeds, budget);
                checks.expect(swaps.size() <= budget, "policy %d keeps its budget", int(kind));
                checks.expect(apply(c, swaps),
                              "policy %d: a slot and a neuron at most once, none twice on the "
                              "device",
                              int(kind));
                std::shuffle(c.counts.begin(), c.counts.end(), rng);
            }
        }
    }
    checks.expect(make_cache_policy(NeuronCache::fixed) == nullptr, "nothing moves when fixed");
}

void check_counted_is_the_best_set(std::mt19937& rng) {
    for (int i = 0; i < 100; ++i) {
        const auto policy = make_cache_policy(NeuronCache::counted);
        Case c = random_case(rng);
        const Case first = c;
        while (true) {
            const auto swaps = policy->plan(0, c.counts, c.cached, {}, 5);
            if (swaps.empty()) break;
            apply(c, swaps);
            c.counts.assign(c.counts.size(), 7);  // later counts change nothing
        }
        c.counts = first.counts;
        std::vector<uint32_t> sorted = c.counts;
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        const double best =
            std::accumulate(sorted.begin(), sorted.begin() + int64_t(c.cached.size()), 0.0);
        checks.expect(on_device(c) == best, "the neurons active most often are kept");
    }
}

void check_balance_is_approached(std::mt19937& rng) {
    int moved = 0;
    for (int i = 0; i < 300; ++i) {
        const auto policy = make_cache_policy(NeuronCache::balance);
        Case c = random_case(rng);
        const Speeds speeds{double(1 + rng() % 100), double(1 + rng() % 20)};
        for (int round = 0; round < 400; ++round) {
            const double before = gap(c, speeds);
            const auto swaps = policy->plan(0, c.counts, c.cached, speeds, 4);
            if (swaps.empty()) break;
            ++moved;
            apply(c, swaps);
            checks.expect(std::fabs(gap(c, speeds)) < std::fabs(before),
                          "from %g the times came to %g apart", before, gap(c, speeds));
        }
        checks.expect(policy->plan(0, c.counts, c.cached, speeds, 4).empty(), "it comes to rest");
    }
    checks.expect(moved > 300, "%d plans moved something", moved);
}

// Neuron 0 was active often and long ago, neuron 2 now and then, neuron 1 never.
void check_frequency_forgets_slowly() {
    const auto policy = make_cache_policy(NeuronCache::frequency);
    std::vector<int32_t> cached{1};
    std::vector<Swap> swaps = policy->plan(0, std::vector<uint32_t>{5, 0, 0, 0}, cached, {}, 9);
    checks.expect(swaps.size() == 1 && swaps[0].slot == 0 && swaps[0].neuron == 0,
                  "an active neuron takes the place of one that never was");
    cached = {0};
    const std::vector<uint32_t> later{0, 0, 1, 0};
    int round = 0;
    for (; round < 20; ++round)
        if (!policy->plan(0, later, cached, {}, 9).empty()) break;
    // 0.1 · 5 + 0.9 · 5 against 0.1 n + 0.9 n.
    checks.expect(round == 5, "its place was taken after %d looks", round);
    checks.expect(policy->plan(0, std::vector<uint32_t>{0, 0, 0, 0}, cached, {}, 9).empty(),
                  "neurons that are not active stay out");
}

void check_split(const std::vector<std::vector<float>>& counts, size_t capacity, double ratio,
                 int64_t block) {
    // Tables of a network cost 7 once it has any neuron.
    const auto cost = [](size_t network, int64_t n) {
        return n ? 7 + size_t(n) * (2 + network) : 0;
    };
    const auto split = balanced_split(counts, capacity, cost, ratio, block);
    size_t spent = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
        const std::vector<int32_t>& ids = split[i];
        spent += cost(i, int64_t(ids.size()));
        checks.expect(std::is_sorted(ids.begin(), ids.end()), "neurons ascend");
        double taken = 0, all = std::accumulate(counts[i].begin(), counts[i].end(), 0.0);
        float least = HUGE_VALF, least_active = 0, most_left = 0;
        for (const int32_t j : ids) {
            const float count = counts[i][size_t(j)];
            taken += count;
            least = std::min(least, count);
            if (count > 0) least_active = least_active ? std::min(least_active, count) : count;
        }
        for (size_t j = 0; j < counts[i].size(); ++j)
            if (!std::binary_search(ids.begin(), ids.end(), int32_t(j)))
                most_left = std::max(most_left, counts[i][j]);
        if (block == 1) {
            checks.expect(least >= most_left, "the most active are taken");
            // Without the last one that is ever active it was the host that was behind.
            const double before = taken - least_active;
            checks.expect(taken == 0 || before <= ratio * (all - before) + 1e-6,
                          "network %zu took %g of %g at a ratio of %g", i, taken, all, ratio);
        }
    }
    checks.expect(spent <= capacity, "%zu spent of %zu", spent, capacity);
    const bool enough = capacity > 100000;
    for (size_t i = 0; i < counts.size() && enough && block == 1; ++i) {
        double taken = 0, all = std::accumulate(counts[i].begin(), counts[i].end(), 0.0);
        for (const int32_t j : split[i])
            taken += counts[i][size_t(j)];
        checks.expect(taken >= ratio * (all - taken), "with room enough balance is reached");
    }
}

void check_splits(std::mt19937& rng) {
    for (int i = 0; i < 100; ++i) {
        std::vector<std::vector<float>> counts;
        const size_t n_ff = 32 + rng() % 200;
        for (size_t network = 0; network < 1 + rng() % 5; ++network) {
            counts.emplace_back();
            for (size_t j = 0; j < n_ff; ++j)
                counts.back().push_back(float(rng() % 1000) * float(rng() % 2));
        }
        for (const size_t capacity : {size_t(0), size_t(200 + rng() % 1000), size_t(1000000)})
            for (const double ratio : {0.0, 0.5, 9.0, 1e9})
                for (const int64_t block : {1, 32})
                    check_split(counts, capacity, ratio, block);
    }
    // Neurons that were never active use up the room.
    const std::vector<std::vector<float>> one{{4, 0, 3, 1, 0}};
    const auto free = [](size_t, int64_t n) { return size_t(n); };
    checks.expect(balanced_split(one, 9, free, 1.0, 1)[0] == std::vector<int32_t>{0},
                  "half of what is active");
    checks.expect(balanced_split(one, 9, free, 1e9, 1)[0] == std::vector<int32_t>{0, 1, 2, 3, 4},
                  "a fast device takes all, and those never active");
    checks.expect(balanced_split(one, 2, free, 1e9, 1)[0] == std::vector<int32_t>{0, 2},
                  "the most active first");
}

}  // namespace

int main() {
    std::mt19937 rng(11);
    check_plans_are_whole(rng);
    check_counted_is_the_best_set(rng);
    check_balance_is_approached(rng);
    check_frequency_forgets_slowly();
    check_splits(rng);
    return checks.status();
}
