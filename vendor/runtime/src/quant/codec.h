// Blocks to floats, floats to blocks and blocks to other blocks: the same bytes on every processor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/types.h"

namespace qi {

// n elements, a multiple of the block size.
void decode(Type type, const std::byte* blocks, int64_t n, float* out);

// Same bytes as gguf.quants where that has an encoder; the least squared error otherwise. n is a
// multiple of n_per_row, n_per_row of the block size. importance: what the squared error in each of
// n_per_row columns counts, or nullptr; types that cannot use it ignore it. Throws QI_ARGUMENT for
// values that are not finite and importance that is not a number from 0.
void encode(Type type, const float* values, int64_t n, int64_t n_per_row, const float* importance,
            std::byte* blocks);

// decode and encode in one go, a cache's worth at a time; n_per_row is a multiple of both block
// sizes. Refuses also values beyond greatest(to). The same type's blocks are copied. out: nullptr
// only looks at the values.
void convert(Type from, const std::byte* blocks, int64_t n, int64_t n_per_row,
             const float* importance, Type to, std::byte* out);

// The largest magnitude that convert() puts into a type. Blocks keep their scales as F16: values
// that F16 holds leave them finite.
float greatest(Type type);

}  // namespace qi
