// The matrix kernels of one instruction set; its matmul.cpp includes this after its simd_*.h and
// matmul_tile.h.
#pragma once

#include "kernels/matmul_blocks_impl.h"
#include "kernels/matmul_floats_impl.h"
#include "kernels/matmul_table.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// Calls use(kernels of the weight's type).
template <class Use>
inline void with_kernels(Type type, Use use) {
    switch (type) {
        case Type::f32:
            return use(FloatKernels<Type::f32>{});
        case Type::f16:
            return use(FloatKernels<Type::f16>{});
        case Type::bf16:
            return use(FloatKernels<Type::bf16>{});
        case Type::q4_0:
            return use(BlockKernels<Type::q4_0>{});
        case Type::q4_1:
            return use(BlockKernels<Type::q4_1>{});
        case Type::q5_0:
            return use(BlockKernels<Type::q5_0>{});
        case Type::q5_1:
            return use(BlockKernels<Type::q5_1>{});
        case Type::q8_0:
            return use(BlockKernels<Type::q8_0>{});
        case Type::q2_k:
            return use(BlockKernels<Type::q2_k>{});
        case Type::q3_k:
            return use(BlockKernels<Type::q3_k>{});
        case Type::q4_k:
            return use(BlockKernels<Type::q4_k>{});
        case Type::q5_k:
            return use(BlockKernels<Type::q5_k>{});
        case Type::q6_k:
            return use(BlockKernels<Type::q6_k>{});
    }
}

size_t scratch_bytes(const Weight& w, int64_t n_tokens) {
    size_t bytes = 0;
    with_kernels(w.type, [&](auto kernels) { bytes = kernels.scratch_bytes(w, n_tokens); });
    return bytes;
}

void rows(const Weight& w, int64_t row_begin, int64_t row_end, const std::byte* prepared,
          int64_t n_tokens, float* y, int64_t y_stride, std::byte* scratch) {
    const Product product = {w, row_end, prepared, n_tokens, y, y_stride};
    with_kernels(w.type, [&](auto kernels) { kernels.rows(product, row_begin, scratch); });
}

void listed(const Weight& w, const int32_t* list, int64_t n_rows, const std::byte* prepared,
            int64_t n_tokens, float* y, int64_t y_stride) {
    const Product product = {w, n_rows,   prepared, n_tokens,
                             y, y_stride, list,     ceil_div(list_distance, int64_t(w.row_bytes))};
    with_kernels(w.type, [&](auto kernels) { kernels.rows(product, 0, nullptr); });
}

int64_t column_group(Type type) {
    int64_t n_cols = 0;
    with_kernels(type, [&](auto kernels) { n_cols = kernels.column_group; });
    return n_cols;
}

void groups(const Weight& w, int64_t row_begin, int64_t row_end, const int32_t* groups,
            int64_t n_groups, const std::byte* prepared, int64_t n_tokens, float* y,
            int64_t y_stride) {
    Product product = {w, row_end, prepared, n_tokens, y, y_stride};
    product.groups = groups;
    product.n_groups = n_groups;
    const size_t picked = w.row_bytes * size_t(n_groups * column_group(w.type)) / size_t(w.n_cols);
    product.places_ahead = ceil_div(list_distance, int64_t(picked) + 1);
    with_kernels(w.type, [&](auto kernels) { kernels.rows(product, row_begin, nullptr); });
}

}  // namespace

const MatmulOps matmul_ops = {quantized_bytes, quantize,     scratch_bytes, rows,
                              listed,          column_group, groups};

}  // namespace qi::kernels::QI_SIMD_LEVEL
