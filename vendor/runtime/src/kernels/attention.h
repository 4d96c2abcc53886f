// Attention over pages of keys and values, for one thread and one KV head.
//
// One order. The output of a query depends on the query, on the keys and values before it, on their
// absolute positions (pages begin at multiples of page_size) and on the instruction set; not on how
// many queries are computed together, nor on how pages are shared out. Each page gives a partial
// (maximum, sum, weighted values); partials are merged in ascending order of page.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/types.h"

namespace qi::kernels {

// Positions per page.
inline constexpr int page_size = 64;

// Layout of one KV head in one page, keys then values:
//   F16   keys  [head_dim][page_size] f16 (transposed: dot products run down columns and need no
//         horizontal sums), values [page_size][head_dim] f16
//   Q8_0  keys  [head_dim][page_size] int8, then scales [head_dim/32][page_size] f16
//         values [page_size][head_dim] int8, then scales [page_size][head_dim/32] f16
// Room for one head of one page, rounded up to 64 bytes. Q8_0 needs head_dim % 32 == 0.
size_t kv_head_bytes(Type kv_type, int64_t head_dim);

// Stores key and value (head_dim floats each) of one position at `slot` in [0, page_size) of a
// head's page.
void kv_store(Type kv_type, int64_t head_dim, int slot, const float* key, const float* value,
              std::byte* head_page);

struct AttentionQuery {
    const float* q;    // [head_dim], rotated, unscaled
    float* out;        // [head_dim]
    int64_t position;  // attends to positions in (position - window, position]
    // Not null: this is a part of an attention, to be merged with another. out is left
    // unnormalised, and terms is the greatest score and the sum of exp(score - greatest); a query
    // that sees nothing gets zeros, and a greatest score of -FLT_MAX.
    float* terms = nullptr;  // [2]
};

struct AttentionArgs {
    Type kv_type;
    int64_t head_dim;
    float scale;                    // of the scores, usually 1/sqrt(head_dim)
    int64_t window;                 // 0: no sliding window
    const std::byte* const* pages;  // by position / page_size: this head's part of each page
    const AttentionQuery* queries;  // all of one sequence and one KV head, any positions
    int64_t n_queries;
    int64_t first = 0;  // positions before it are left out, and their pages not looked at
};

size_t attention_scratch_bytes(int64_t head_dim, int64_t n_queries);
void attend(const AttentionArgs& args, std::byte* scratch);

}  // namespace qi::kernels
