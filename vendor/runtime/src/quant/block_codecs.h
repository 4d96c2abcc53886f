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

// x: 256 finite values. importance: how much the squared error of each counts, or nullptr when all
// count alike.
void encode_block(const float* x, const float* importance, BlockQ2_K& block);
void encode_block(const float* x, const float* importance, BlockQ3_K& block);
void encode_block(const float* x, const float* importance, BlockQ4_K& block);
void encode_block(const float* x, const float* importance, BlockQ5_K& block);
void encode_block(const float* x, const float* importance, BlockQ6_K& block);

}  // namespace qi
