// Attention: sizes, and the choice of instruction set.
#include "kernels/attention.h"

#include <cassert>

#include "kernels/attention_layout.h"
#include "kernels/attention_table.h"

namespace qi::kernels {

const AttentionOps* attention_ops_for(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return &portable::attention_ops;
#if defined(__x86_64__)
        case Isa::avx2:
            return &avx2::attention_ops;
        case Isa::avx512:
            return &avx512::attention_ops;
#elif defined(__aarch64__)
        case Isa::neon:
            return &neon::attention_ops;
#endif
        default:
            return nullptr;
    }
}

namespace {

const AttentionOps& active() {
    static const AttentionOps& table = *attention_ops_for(active_isa());
    return table;
}

}  // namespace

size_t kv_head_bytes(Type kv_type, int64_t head_dim) {
    assert(kv_type == Type::f16 || (kv_type == Type::q8_0 && head_dim % q8_block == 0));
    const size_t n = 2 * size_t(page_size) * size_t(head_dim);
    const size_t bytes = kv_type == Type::f16 ? 2 * n : n + 2 * (n / q8_block);
    return (bytes + 63) / 64 * 64;
}

void kv_store(Type kv_type, int64_t head_dim, int slot, const float* key, const float* value,
              std::byte* head_page) {
    active().kv_store(kv_type, head_dim, slot, key, value, head_page);
}

size_t attention_scratch_bytes(int64_t head_dim, int64_t n_queries) {
    const int64_t padded_dim = (head_dim + row_padding - 1) / row_padding * row_padding;
    const int64_t tiles =
        page_size * (head_dim + padded_dim) + 2 * (head_dim / q8_block) * page_size;
    const int64_t block = query_block * (page_size + padded_dim);
    return size_t(tiles + block + 3 * n_queries + row_padding) * sizeof(float);
}

void attend(const AttentionArgs& args, std::byte* scratch) {
    active().attend(args, scratch);
}

}  // namespace qi::kernels
