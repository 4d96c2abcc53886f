#include "device/cpu/cpu_attention.h"

#include <algorithm>
#include <cstring>

#include "kernels/attention.h"
#include "kernels/vector_ops.h"

namespace qi {

namespace {
// Tokens per attention task: keys and values are converted once for all of them.
constexpr int64_t attention_tokens = 16;
}  // namespace

void CpuAttention::copy_page(int32_t from, int32_t to) {
    std::memcpy(kv_.page(to), kv_.page(from), kv_.content_bytes());
}

void CpuAttention::read_page(int32_t page, std::byte* out) const {
    std::memcpy(out, kv_.page(page), kv_.content_bytes());
}

void CpuAttention::write_page(int32_t page, const std::byte* data) {
    std::memcpy(kv_.page(page), data, kv_.content_bytes());
}

void CpuAttention::rotate(const BatchInputs& batch, float* x, int64_t stride, int64_t n_heads,
                          const Heads& heads) {
    const int64_t head_dim = kv_.layout().head_dim, n_rot = heads.n_rot;
    products_.for_each(batch.n_tokens, n_heads * head_dim, [&](int64_t t) {
        for (int64_t h = 0; h < n_heads; ++h)
            kernels::rope(x + t * stride + h * head_dim, batch.cos_sin + t * n_rot, n_rot,
                          heads.neox);
    });
}

void CpuAttention::append(const BatchInputs& batch, int64_t layer, const Heads& heads) {
    const KvLayout& layout = kv_.layout();
    if (heads.n_rot > 0) {
        rotate(batch, heads.q, heads.q_stride, heads.n_head, heads);
        rotate(batch, heads.k, heads.kv_stride, layout.n_head_kv, heads);
    }
    // By head, not by token: keys lie transposed, so neighbouring tokens share cache lines.
    products_.for_each(layout.n_head_kv, batch.n_tokens * layout.head_dim, [&](int64_t h) {
        for (const Segment& segment : batch.segments) {
            for (int64_t i = 0; i < segment.n; ++i) {
                const int64_t position = segment.position + i;
                const int32_t page = segment.pages[position / kernels::page_size];
                const int64_t at = (segment.row + i) * heads.kv_stride + h * layout.head_dim;
                kernels::kv_store(layout.type, layout.head_dim, int(position % kernels::page_size),
                                  heads.k + at, heads.v + at, kv_.head(page, layer, h));
            }
        }
    });
}

void CpuAttention::attend(const BatchInputs& batch, int64_t layer, const AttentionShape& shape,
                          const float* q, int64_t stride, float* out, const Part* part) {
    const std::span<const Segment> segments = batch.segments;
    const KvLayout& layout = kv_.layout();
    const int64_t head_dim = layout.head_dim;
    const int64_t group = shape.n_head / layout.n_head_kv;  // query heads that share a KV head

    // A task is one KV head and a run of tokens of one segment.
    int64_t n_tasks = 0, pages_max = 0;
    for (const Segment& segment : segments) {
        n_tasks += (segment.n + attention_tokens - 1) / attention_tokens * layout.n_head_kv;
        pages_max =
            std::max(pages_max, (segment.position + segment.n - 1) / kernels::page_size + 1);
    }
    const int64_t queries_max = attention_tokens * group;
    const size_t queries_bytes =
        size_t(round_up(queries_max * int64_t(sizeof(kernels::AttentionQuery)), 64));
    const size_t pages_bytes = size_t(round_up(pages_max * int64_t(sizeof(std::byte*)), 64));
    products_.reserve_workers(queries_bytes + pages_bytes +
                              kernels::attention_scratch_bytes(head_dim, queries_max));

    products_.loop(n_tasks, [&](int64_t task, int worker) {
        const Segment* segment = segments.data();
        int64_t n_runs = (segment->n + attention_tokens - 1) / attention_tokens;
        while (task >= n_runs * layout.n_head_kv) {
            task -= n_runs * layout.n_head_kv;
            ++segment;
            n_runs = (segment->n + attention_tokens - 1) / attention_tokens;
        }
        const int64_t kv_head = task % layout.n_head_kv;
        const int64_t begin = task / layout.n_head_kv * attention_tokens;
        const int64_t end = std::min(segment->n, begin + attention_tokens);

        std::byte* room = products_.room(worker);
        auto* queries = reinterpret_cast<kernels::AttentionQuery*>(room);
        auto* pages = reinterpret_cast<const std::byte**>(room + queries_bytes);
        const int64_t first = part ? part->first[segment - segments.data()] : 0;
        const int64_t last = segment->position + end - 1;
        for (int64_t p = first / kernels::page_size; p <= last / kernels::page_size; ++p)
            pages[p] = kv_.head(segment->pages[p], layer, kv_head);
        int64_t n_queries = 0;
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t g = 0; g < group; ++g) {
                const int64_t head = kv_head * group + g;
                const int64_t row = segment->row + i;
                queries[n_queries++] = {
                    q + row * stride + head * head_dim,
                    out + (row * shape.n_head + head) * head_dim, segment->position + i,
                    part ? part->terms + 2 * (row * shape.n_head + head) : nullptr};
            }
        }
        const kernels::AttentionArgs args{layout.type, head_dim, shape.scale, shape.sliding_window,
                                          pages,       queries,  n_queries,   first};
        kernels::attend(args, room + queries_bytes + pages_bytes);
    });
}

}  // namespace qi
