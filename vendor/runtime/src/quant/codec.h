// Blocks to floats and floats to blocks, plain and exact: the reference every kernel is compared
// with.
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

}  // namespace qi
