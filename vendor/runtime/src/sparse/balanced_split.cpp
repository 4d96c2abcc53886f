#include "sparse/balanced_split.h"

#include <algorithm>
#include <numeric>

namespace qi {

namespace {

struct Network {
    size_t number;
    std::vector<int32_t> order;  // blocks' neurons together, the most active blocks first
    std::vector<double> gains;   // [blocks], activity
    int64_t block = 1;
    size_t n_taken = 0;  // blocks
    double on_device = 0, on_host = 0;

    Network(size_t which, const std::vector<float>& counts, int64_t block_size)
        : number(which), block(block_size) {
        const auto n_ff = int64_t(counts.size());
        std::vector<int64_t> firsts;
        for (int64_t first = 0; first < n_ff; first += block)
            firsts.push_back(first);
        const auto sum = [&](int64_t first) {
            return std::accumulate(counts.begin() + first,
                                   counts.begin() + std::min(n_ff, first + block), 0.0);
        };
        std::vector<double> sums;
        for (const int64_t first : firsts)
            sums.push_back(sum(first));
        std::stable_sort(firsts.begin(), firsts.end(), [&](int64_t a, int64_t b) {
            return sums[size_t(a / block)] > sums[size_t(b / block)];
        });
        for (const int64_t first : firsts) {
            gains.push_back(sums[size_t(first / block)]);
            on_host += gains.back();
            for (int64_t j = first; j < std::min(n_ff, first + block); ++j)
                order.push_back(int32_t(j));
        }
    }

    bool all_taken() const { return n_taken == gains.size(); }
    int64_t n_neurons(size_t n_blocks) const {
        return std::min(int64_t(n_blocks) * block, int64_t(order.size()));
    }
    double next() const { return gains[n_taken]; }
    void take() {
        on_device += next();
        on_host -= next();
        ++n_taken;
    }
};

}  // namespace

std::vector<std::vector<int32_t>> balanced_split(
    std::span<const std::vector<float>> counts, size_t capacity,
    const std::function<size_t(size_t network, int64_t n)>& cost, double ratio, int64_t block) {
    std::vector<Network> networks;
    for (size_t i = 0; i < counts.size(); ++i)
        networks.emplace_back(i, counts[i], block);
    const auto fits = [&](const Network& network, size_t& price) {
        price = cost(network.number, network.n_neurons(network.n_taken + 1)) -
                (network.n_taken ? cost(network.number, network.n_neurons(network.n_taken)) : 0);
        return price <= capacity;
    };
    // Rounds of offers to those who want; until nobody takes any.
    const auto offer = [&](const auto& wants) {
        for (bool any = true; any;) {
            any = false;
            for (Network& network : networks) {
                size_t price;
                if (network.all_taken() || !wants(network) || !fits(network, price)) continue;
                capacity -= price;
                network.take();
                any = true;
            }
        }
    };
    offer([&](const Network& n) { return n.on_device < ratio * n.on_host; });
    // The time of both is the slower side's.
    offer([&](const Network& n) {
        const double now = std::max(n.on_device / ratio, n.on_host);
        return std::max((n.on_device + n.next()) / ratio, n.on_host - n.next()) <= now;
    });
    std::vector<std::vector<int32_t>> chosen;
    for (const Network& network : networks) {
        chosen.emplace_back(network.order.begin(),
                            network.order.begin() + network.n_neurons(network.n_taken));
        std::sort(chosen.back().begin(), chosen.back().end());
    }
    return chosen;
}

}  // namespace qi
