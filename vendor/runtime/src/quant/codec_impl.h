// Runs of blocks to floats and back, by type, for the level whose level_*.h and encoder of blocks
// of 32 were included before.
#pragma once

#include "quant/codec_table.h"
#include "quant/decode_blocks.h"
#include "quant/encode256_impl.h"

namespace qi::codecs::QI_CODEC_LEVEL {

namespace {

// Blocks are copied out first: callers' bytes need not be aligned.
template <class Block>
void decode_blocks(const std::byte* blocks, int64_t n, int block_size, float* out) {
    for (int64_t i = 0; i < n; i += block_size, blocks += sizeof(Block)) {
        Block block;
        __builtin_memcpy(&block, blocks, sizeof block);
        decode_block(block, out + i);
    }
}

template <class Block>
void encode_blocks(const float* values, int64_t n, std::byte* blocks) {
    for (int64_t i = 0; i < n; i += 32, blocks += sizeof(Block)) {
        Block block;
        encode_block(values + i, block);
        __builtin_memcpy(blocks, &block, sizeof block);
    }
}

template <class Block>
void encode_k_blocks(const float* values, int64_t n, const float* importance, std::byte* blocks) {
    for (int64_t i = 0; i < n; i += 256, blocks += sizeof(Block)) {
        Block block;
        encode_block(values + i, importance ? importance + i : nullptr, block);
        __builtin_memcpy(blocks, &block, sizeof block);
    }
}

void decode_f16(const std::byte* halves, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + width <= n; i += width)
        widen_f16(halves + 2 * i, out + i);
    for (; i < n; i++) {
        f16_bits bits;
        __builtin_memcpy(&bits, halves + 2 * i, 2);
        out[i] = f16_to_f32(bits);
    }
}

void encode_f16(const float* values, int64_t n, std::byte* halves) {
    int64_t i = 0;
    for (; i + width <= n; i += width)
        narrow_f16(values + i, halves + 2 * i);
    for (; i < n; i++) {
        const f16_bits bits = f32_to_f16(values[i]);
        __builtin_memcpy(halves + 2 * i, &bits, 2);
    }
}

void decode_bf16(const std::byte* halves, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) {
        bf16_bits bits;
        __builtin_memcpy(&bits, halves + 2 * i, 2);
        out[i] = bf16_to_f32(bits);
    }
}

void encode_bf16(const float* values, int64_t n, std::byte* halves) {
    for (int64_t i = 0; i < n; i++) {
        const bf16_bits bits = f32_to_bf16(values[i]);
        __builtin_memcpy(halves + 2 * i, &bits, 2);
    }
}

void decode(Type type, const std::byte* blocks, int64_t n, float* out) {
    switch (type) {
        case Type::f32:
            __builtin_memcpy(out, blocks, size_t(n) * sizeof(float));
            return;
        case Type::f16:
            decode_f16(blocks, n, out);
            return;
        case Type::bf16:
            decode_bf16(blocks, n, out);
            return;
        case Type::q4_0:
            decode_blocks<BlockQ4_0>(blocks, n, 32, out);
            return;
        case Type::q4_1:
            decode_blocks<BlockQ4_1>(blocks, n, 32, out);
            return;
        case Type::q5_0:
            decode_blocks<BlockQ5_0>(blocks, n, 32, out);
            return;
        case Type::q5_1:
            decode_blocks<BlockQ5_1>(blocks, n, 32, out);
            return;
        case Type::q8_0:
            decode_blocks<BlockQ8_0>(blocks, n, 32, out);
            return;
        case Type::q2_k:
            decode_blocks<BlockQ2_K>(blocks, n, 256, out);
            return;
        case Type::q3_k:
            decode_blocks<BlockQ3_K>(blocks, n, 256, out);
            return;
        case Type::q4_k:
            decode_blocks<BlockQ4_K>(blocks, n, 256, out);
            return;
        case Type::q5_k:
            decode_blocks<BlockQ5_K>(blocks, n, 256, out);
            return;
        case Type::q6_k:
            decode_blocks<BlockQ6_K>(blocks, n, 256, out);
            return;
    }
}

void encode(Type type, const float* values, int64_t n, const float* importance, std::byte* blocks) {
    switch (type) {
        case Type::f32:
            __builtin_memcpy(blocks, values, size_t(n) * sizeof(float));
            return;
        case Type::f16:
            encode_f16(values, n, blocks);
            return;
        case Type::bf16:
            encode_bf16(values, n, blocks);
            return;
        case Type::q4_0:
            encode_blocks<BlockQ4_0>(values, n, blocks);
            return;
        case Type::q4_1:
            encode_blocks<BlockQ4_1>(values, n, blocks);
            return;
        case Type::q5_0:
            encode_blocks<BlockQ5_0>(values, n, blocks);
            return;
        case Type::q5_1:
            encode_blocks<BlockQ5_1>(values, n, blocks);
            return;
        case Type::q8_0:
            encode_blocks<BlockQ8_0>(values, n, blocks);
            return;
        case Type::q2_k:
            encode_k_blocks<BlockQ2_K>(values, n, importance, blocks);
            return;
        case Type::q3_k:
            encode_k_blocks<BlockQ3_K>(values, n, importance, blocks);
            return;
        case Type::q4_k:
            encode_k_blocks<BlockQ4_K>(values, n, importance, blocks);
            return;
        case Type::q5_k:
            encode_k_blocks<BlockQ5_K>(values, n, importance, blocks);
            return;
        case Type::q6_k:
            encode_k_blocks<BlockQ6_K>(values, n, importance, blocks);
            return;
    }
}

bool all_within(const float* values, int64_t n, float limit) {
    uint32_t beyond = 0;
    for (int64_t i = 0; i < n; i++)
        beyond |= uint32_t(!(__builtin_fabsf(values[i]) <= limit));
    return beyond == 0;
}

}  // namespace

constinit const Codec codec = {decode, encode, all_within};

}  // namespace qi::codecs::QI_CODEC_LEVEL
