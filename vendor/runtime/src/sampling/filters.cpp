// Nucleus, min-p and locally typical filters.
#include "sampling/filters.h"

#include <algorithm>
#include <cmath>
#include <vector>

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
    // Where surprise equals the entropy: ln(total) - x = entropy, counted from the best logit.
    const double typical = ranking[0].logit + std::log(mass.weight) - mass.entropy();
    const auto candidates = ranking.any_order();
    std::vector<float> nearness(candidates.size());
    for (size_t i = 0; i < candidates.size(); ++i)
        nearness[i] = -std::abs(candidates[i].logit - float(typical));
    Ranking by_nearness;
    by_nearness.reset(nearness, summarize(nearness));

    std::vector<Candidate> kept;
    for (double weight = 0.0;
         kept.size() < candidates.size() && (kept.size() < min_keep || weight < p * mass.weight);) {
        kept.push_back(candidates[size_t(by_nearness[kept.size()].token)]);
        weight += ranking.weight(kept.back().logit, 1.0f);
    }
    std::sort(kept.begin(), kept.end(), ranks_before);
    ranking.replace(std::move(kept));
}

}  // namespace qi
