// Runs of blocks to floats and back, by type.
#include "quant/codec.h"

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "quant/block_codecs.h"
#include "quant/decode_blocks.h"
#include "quant/half.h"

namespace qi {

namespace {

// Blocks are copied out first: callers' bytes need not be aligned.
template <typename Block>
void decode_blocks(const std::byte* blocks, int64_t n, int block_size, float* out) {
    for (int64_t i = 0; i < n; i += block_size, blocks += sizeof(Block)) {
        Block block;
        std::memcpy(&block, blocks, sizeof block);
        decode_block(block, out + i);
    }
}

template <typename Block>
void encode_blocks(const float* values, int64_t n, int block_size, std::byte* blocks) {
    for (int64_t i = 0; i < n; i += block_size, blocks += sizeof(Block)) {
        Block block;
        encode_block(values + i, block);
        std::memcpy(blocks, &block, sizeof block);
    }
}

template <typename Block>
void encode_k_blocks(const float* values, int64_t n, int64_t n_per_row, const float* importance,
                     std::byte* blocks) {
    for (int64_t i = 0; i < n; i += 256, blocks += sizeof(Block)) {
        Block block;
        encode_block(values + i, importance ? importance + i % n_per_row : nullptr, block);
        std::memcpy(blocks, &block, sizeof block);
    }
}

template <float (*to_float)(uint16_t)>
void decode_halves(const std::byte* halves, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits;
        std::memcpy(&bits, halves + 2 * i, 2);
        out[i] = to_float(bits);
    }
}

template <uint16_t (*from_float)(float)>
void encode_halves(const float* values, int64_t n, std::byte* halves) {
    for (int64_t i = 0; i < n; i++) {
        const uint16_t bits = from_float(values[i]);
        std::memcpy(halves + 2 * i, &bits, 2);
    }
}

void require_finite(Type type, const float* values, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!std::isfinite(values[i]))
            fail(QI_ARGUMENT, "cannot encode %s: value %lld is %s, and only finite values can be",
                 traits(type).name, static_cast<long long>(i),
                 std::isnan(values[i]) ? "NaN" : "infinite");
    }
}

void require_weights(const float* importance, int64_t n_per_row) {
    for (int64_t i = 0; i < n_per_row; i++) {
        if (!(importance[i] >= 0.0f && std::isfinite(importance[i])))
            fail(QI_ARGUMENT,
                 "the importance of column %lld is %g; it must be 0 or more and finite",
                 static_cast<long long>(i), double(importance[i]));
    }
}

}  // namespace

void decode(Type type, const std::byte* blocks, int64_t n, float* out) {
    switch (type) {
        case Type::f32:
            std::memcpy(out, blocks, size_t(n) * sizeof(float));
            return;
        case Type::f16:
            decode_halves<f16_to_f32>(blocks, n, out);
            return;
        case Type::bf16:
            decode_halves<bf16_to_f32>(blocks, n, out);
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

void encode(Type type, const float* values, int64_t n, int64_t n_per_row, const float* importance,
            std::byte* blocks) {
    require_finite(type, values, n);
    if (importance) require_weights(importance, n_per_row);
    switch (type) {
        case Type::f32:
            std::memcpy(blocks, values, size_t(n) * sizeof(float));
            return;
        case Type::f16:
            encode_halves<f32_to_f16>(values, n, blocks);
            return;
        case Type::bf16:
            encode_halves<f32_to_bf16>(values, n, blocks);
            return;
        case Type::q4_0:
            encode_blocks<BlockQ4_0>(values, n, 32, blocks);
            return;
        case Type::q4_1:
            encode_blocks<BlockQ4_1>(values, n, 32, blocks);
            return;
        case Type::q5_0:
            encode_blocks<BlockQ5_0>(values, n, 32, blocks);
            return;
        case Type::q5_1:
            encode_blocks<BlockQ5_1>(values, n, 32, blocks);
            return;
        case Type::q8_0:
            encode_blocks<BlockQ8_0>(values, n, 32, blocks);
            return;
        case Type::q2_k:
            encode_k_blocks<BlockQ2_K>(values, n, n_per_row, importance, blocks);
            return;
        case Type::q3_k:
            encode_k_blocks<BlockQ3_K>(values, n, n_per_row, importance, blocks);
            return;
        case Type::q4_k:
            encode_k_blocks<BlockQ4_K>(values, n, n_per_row, importance, blocks);
            return;
        case Type::q5_k:
            encode_k_blocks<BlockQ5_K>(values, n, n_per_row, importance, blocks);
            return;
        case Type::q6_k:
            encode_k_blocks<BlockQ6_K>(values, n, n_per_row, importance, blocks);
            return;
    }
}

}  // namespace qi
