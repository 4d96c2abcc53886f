// The codecs of every instruction set, for dispatch and for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu.h"
#include "quant/types.h"

namespace qi::codecs {

// All levels give the same bytes; only the bits of a NaN that is decoded may differ.
struct Codec {
    // n elements, a multiple of the block size; pointers to bytes need no alignment.
    void (*decode)(Type type, const std::byte* blocks, int64_t n, float* out);
    // Finite values. importance: n weights, or nullptr.
    void (*encode)(Type type, const float* values, int64_t n, const float* importance,
                   std::byte* blocks);
    // Whether |value| <= limit for all; NaN is not.
    bool (*all_within)(const float* values, int64_t n, float limit);
};

// nullptr when this build has no codecs of that level.
const Codec* codec_for(Isa isa);

namespace portable {
extern const Codec codec;
}
namespace avx2 {
extern const Codec codec;
}
namespace avx512 {
extern const Codec codec;
}
namespace neon {
extern const Codec codec;
}

}  // namespace qi::codecs
