// Filters that drop unlikely or untypical candidates, at temperature 1.
#pragma once

#include <cstddef>

#include "sampling/ranking.h"

namespace qi {

// Each leaves at least min_keep candidates, or all if there are fewer.

// Nucleus sampling (Holtzman et al., 2019): the most likely ones, until they reach p together.
void keep_top_p(Ranking& ranking, double p, size_t min_keep);

// Min-p sampling (Nguyen et al., 2024): those at least p times as likely as the most likely one.
void keep_min_p(Ranking& ranking, double p, size_t min_keep);

// Locally typical sampling (Meister et al., 2022): those whose surprise is nearest to the entropy,
// until they reach p together.
void keep_typical(Ranking& ranking, double p, size_t min_keep);

}  // namespace qi
