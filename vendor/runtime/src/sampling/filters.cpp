// Nucleus, min-p and locally typical filters.
#include "sampling/filters.h"

#include <algorithm>
#include <cmath>

namespace qi {

void keep_top_p(Ranking& ranking, double p, size_t min_keep) {
    const double wanted = p * ranking.mass(1.0f).weight;
    double weight = 0.0;
    size_t n = 0;
    while (n < ranking.size() && (n < min_keep || weight < wanted))
        weight += ranking.weight(ranking[n++].logit, 1.0f);
    ranking.truncate(n);
}

void keep_min_p(Ranking& ranking, double p, size_t min_keep) {
    const double lowest = ranking[0].logit + std::log(p);
    ranking.truncate(std::max(ranking.count_from(float(lowest)), min_keep));
}

void keep_typical(Ranking& ranking, double p, size_t min_keep) {
    const Mass mass = ranking.mass(1.0f);
    // Where surprise equals the entropy: ln(total) - x = entropy, x counted from the best logit.
    const double typical = ranking[0].logit + std::log(mass.weight) - mass.entropy();
    const auto distance = [&](size_t rank) { return std::abs(ranking[rank].logit - typical); };
    // What is nearest in surprise is nearest in rank: those kept grow from there to both sides.
    size_t begin = ranking.count_from(float(typical)), end = begin;
    double weight = 0.0;
    while (end - begin < ranking.size() && (end - begin < min_keep || weight < p * mass.weight)) {
        const bool up =
            end == ranking.size() || (begin > 0 && distance(begin - 1) <= distance(end));
        const size_t nearest = up ? --begin : end++;
        weight += ranking.weight(ranking[nearest].logit, 1.0f);
    }
    ranking.slice(begin, end);
}

}  // namespace qi
