// Fetching weights ahead of their use.
#pragma once

#include <cstdint>

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// Starts fetching n bytes at p into L2. There the processor waits for many more lines at once than
// in L1: whole Q8_0 matrices came at 41 instead of 30 GB/s (two threads on Zen 4), a tenth of the
// rows of an F16 matrix at 19 instead of 11 (one thread, of whose plain reads there are 22).
inline void prefetch_lines(const uint8_t* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64)
        __builtin_prefetch(p + i, 0, 2);
}

// Starts fetching n bytes that lie `ahead` bytes after p; a hint, which may point anywhere.
inline void prefetch_from(const uint8_t* p, int64_t ahead, int64_t n) {
    prefetch_lines(
        reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(ahead)), n);
}

}  // namespace

}  // namespace qi::kernels::QI_SIMD_LEVEL
