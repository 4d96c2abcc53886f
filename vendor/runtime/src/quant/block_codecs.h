// Floats to one block, one overload per block format.
#pragma once

#include "quant/blocks.h"

namespace qi {

// x: 32 finite values.
void encode_block(const float* x, BlockQ4_0& block);
void encode_block(const float* x, BlockQ4_1& block);
void encode_block(const float* x, BlockQ5_0& block);
void encode_block(const float* x, BlockQ5_1& block);
void encode_block(const float* x, BlockQ8_0& block);

}  // namespace qi
