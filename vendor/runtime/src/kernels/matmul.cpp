// Matrix products: picks the instruction set once, and what does not depend on it.
#include "kernels/matmul.h"

#include <algorithm>
#include <cstring>

#include "kernels/matmul_layout.h"
#include "kernels/matmul_table.h"
#include "quant/codec.h"

namespace qi::kernels {

namespace {

int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

const MatmulOps& active() {
    static const MatmulOps& table = *matmul_ops_for(active_isa());
    return table;
}

void copy_rows(const float* x, int64_t x_stride, int64_t n_cols, int64_t n_tokens, int64_t begin,
               int64_t end, float* prepared) {
    for (int64_t first = 0; first < n_cols; first += chunk_cols) {
        const int64_t n = std::min(chunk_cols, n_cols - first), padded = round_up(n, col_padding);
        for (int64_t t = begin; t < end; ++t) {
            float* row = prepared + first * n_tokens + t * padded;
            std::memcpy(row, x + t * x_stride + first, size_t(n) * sizeof(float));
            std::fill(row + n, row + padded, 0.0f);
        }
    }
}

}  // namespace

const MatmulOps* matmul_ops_for(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return &portable::matmul_ops;
#if defined(__x86_64__)
        case Isa::avx2:
            return &avx2::matmul_ops;
        case Isa::avx512:
            return &avx512::matmul_ops;
#elif defined(__aarch64__)
        case Isa::neon:
            return &neon::matmul_ops;
#endif
        default:
            return nullptr;
    }
}

ActivationForm activation_form(Type weight_type) {
    switch (weight_type) {
        case Type::f32:
        case Type::f16:
        case Type::bf16:
            return ActivationForm::f32;
        default:
            return ActivationForm::q8_block32;
    }
}

size_t activation_bytes(ActivationForm form, int64_t n_cols, int64_t n_tokens) {
    if (form == ActivationForm::f32)
        return size_t(round_up(n_cols, col_padding) * n_tokens) * sizeof(float);
    return active().quantized_bytes(n_cols, n_tokens);
}

void prepare_activations(ActivationForm form, const float* x, int64_t x_stride, int64_t n_cols,
                         int64_t n_tokens, int64_t begin, int64_t end, std::byte* prepared) {
    if (form == ActivationForm::f32)
        copy_rows(x, x_stride, n_cols, n_tokens, begin, end, reinterpret_cast<float*>(prepared));
    else
        active().quantize(x, x_stride, n_cols, n_tokens, begin, end, prepared);
}

size_t matmul_scratch_bytes(const Weight& w, int64_t n_tokens) {
    return active().scratch_bytes(w, n_tokens);
}

void matmul_rows(const Weight& w, int64_t row_begin, int64_t row_end, const std::byte* prepared,
                 int64_t n_tokens, float* y, int64_t y_stride, std::byte* scratch) {
    active().rows(w, row_begin, row_end, prepared, n_tokens, y, y_stride, scratch);
}

void matmul_listed(const Weight& w, const int32_t* list, int64_t n_rows, const std::byte* prepared,
                   int64_t n_tokens, float* y, int64_t y_stride) {
    if (n_rows > 0) active().listed(w, list, n_rows, prepared, n_tokens, y, y_stride);
}

int64_t column_group(Type weight_type) {
    return active().column_group(weight_type);
}

int64_t nonzero_groups(const float* x, int64_t n_cols, int64_t n_tokens, int64_t group,
                       int32_t* list) {
    int64_t n_listed = 0;
    for (int64_t begin = 0; begin < n_cols; begin += group) {
        const int64_t end = std::min(n_cols, begin + group);
        bool nonzero = false;
        for (int64_t t = 0; t < n_tokens && !nonzero; ++t)
            nonzero = std::any_of(x + t * n_cols + begin, x + t * n_cols + end,
                                  [](float value) { return value != 0.0f; });
        if (nonzero) list[n_listed++] = int32_t(begin / group);
    }
    return n_listed;
}

void matmul_groups(const Weight& w, int64_t row_begin, int64_t row_end, const int32_t* groups,
                   int64_t n_groups, const std::byte* prepared, int64_t n_tokens, float* y,
                   int64_t y_stride) {
    active().groups(w, row_begin, row_end, groups, n_groups, prepared, n_tokens, y, y_stride);
}

void fetch_listed(const Weight& w, const int32_t* list, int64_t n_rows) {
    const auto most = int64_t(list_distance / w.row_bytes) + 1;
    for (int64_t i = 0; i < std::min(n_rows, most); ++i) {
        const std::byte* row = w.data + size_t(list[i]) * w.row_bytes;
        for (size_t at = 0; at < w.row_bytes; at += 64)  // into L2, as prefetch_impl.h says why
            __builtin_prefetch(row + at, 0, 2);
    }
}

void decode_row(const Weight& w, int64_t row, float* out) {
    decode(w.type, w.data + size_t(row) * w.row_bytes, w.n_cols, out);
}

}  // namespace qi::kernels
