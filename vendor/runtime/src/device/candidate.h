// A token that may come next.
#pragma once

#include <cstdint>

namespace qi {

struct Candidate {
    float logit;
    int32_t token;
};

// By falling logit, equal ones by rising id.
inline bool ranks_before(const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

}  // namespace qi
