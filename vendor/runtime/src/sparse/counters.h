// What the feed-forward network of one layer did: cheap, always kept.
#pragma once

#include <cstdint>

namespace qi {

struct FfnCounters {
    uint64_t n_tokens = 0;     // computed under a rule other than `all`
    uint64_t n_active = 0;     // neurons that contributed to them, summed over tokens
    uint64_t n_predicted = 0;  // neurons that a predictor named, summed over tokens
    uint64_t n_checked = 0;    // tokens whose predictions were held against all gates
    uint64_t n_due = 0;        // neurons that should have contributed to those
    uint64_t n_missed = 0;     // of which the predictor did not name so many
    uint64_t n_bytes = 0;      // weight bytes read, for tokens under any rule
    double predict_seconds = 0;
    double seconds = 0;  // all of it, prediction included
};

}  // namespace qi
