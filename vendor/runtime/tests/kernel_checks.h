// What the kernel tests share: counted checks, random data, the instruction sets of this machine.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "base/cpu.h"

namespace qi::test {

// Counts failures and describes the first ones on stderr; the program's exit status is `status()`.
class Checks {
  public:
    [[gnu::format(printf, 3, 4)]] void expect(bool ok, const char* pattern, ...) {
        ++n_checks_;
        if (ok) return;
        if (++n_failures_ > 20) return;
        va_list arguments;
        va_start(arguments, pattern);
        std::vfprintf(stderr, pattern, arguments);
        va_end(arguments);
        std::fputc('\n', stderr);
    }
    bool passed() const { return n_failures_ == 0 && n_checks_ > 0; }
    int status() const {
        std::fprintf(stderr, "%lld checks, %lld failures\n", n_checks_, n_failures_);
        return passed() ? 0 : 1;
    }

  private:
    long long n_checks_ = 0, n_failures_ = 0;
};

inline std::vector<Isa> supported_levels() {
    std::vector<Isa> levels;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon})
        if (isa_supported(isa)) levels.push_back(isa);
    return levels;
}

inline std::vector<float> random_normal(std::mt19937& random, int64_t n, float deviation = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, deviation);
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values)
        value = distribution(random);
    return values;
}

// The distance of `got` from `exact` in units of float's last place at `exact`.
inline double ulp_error(float got, double exact) {
    if (std::isnan(exact)) return std::isnan(got) ? 0.0 : HUGE_VAL;
    if (double(got) == exact) return 0.0;
    int exponent;
    std::frexp(exact, &exponent);
    return std::fabs(double(got) - exact) / std::ldexp(1.0, std::max(exponent - 24, -149));
}

inline bool same_bits(const float* a, const float* b, int64_t n) {
    return std::memcmp(a, b, size_t(n) * sizeof(float)) == 0;
}

}  // namespace qi::test
