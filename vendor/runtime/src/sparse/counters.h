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
    // Where a device shares a layer with the processor: until the device had its own part, what the
    // processor took for its part meanwhile, and how long the device then waited for it.
    double device_seconds = 0, host_seconds = 0, wait_seconds = 0;

    FfnCounters& operator+=(const FfnCounters& more) {
        n_tokens += more.n_tokens;
        n_active += more.n_active;
        n_predicted += more.n_predicted;
        n_checked += more.n_checked;
        n_due += more.n_due;
        n_missed += more.n_missed;
        n_bytes += more.n_bytes;
        predict_seconds += more.predict_seconds;
        seconds += more.seconds;
        device_seconds += more.device_seconds;
        host_seconds += more.host_seconds;
        wait_seconds += more.wait_seconds;
        return *this;
    }
};

}  // namespace qi
