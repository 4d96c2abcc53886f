// The CPU as a device: every step of the forward pass as one or two parallel loops over the pool.
//
// A step with little to do runs on the calling thread alone: waking a worker costs more than a few
// thousand multiply-adds.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>

#include "base/aligned_buffer.h"
#include "device/cpu/cpu_feed_forward.h"
#include "device/cpu/cpu_products.h"
#include "device/cpu/kv_store.h"
#include "device/device.h"
#include "kernels/attention.h"
#include "kernels/vector_ops.h"

namespace qi {

namespace {

// Tokens per attention task: keys and values are converted once for all of them.
constexpr int64_t attention_tokens = 16;

class CpuDevice final : public Device {
  public:
    explicit CpuDevice(int n_threads) : products_(n_threads) {}

    float* allocate(size_t n) override {
        const auto owner = arrays_.emplace(arrays_.end());
        try {
            return owner->reserve(n);
        } catch (...) {
            arrays_.erase(owner);
            throw;
        }
    }
    void release(float* array) override {
        std::erase_if(arrays_, [&](AlignedBuffer<float>& owner) { return owner.data() == array; });
    }
    const float* host_view(const float* x, size_t, AlignedBuffer<float>&) override { return x; }
    void write(const float* host, size_t n, float* out) override { copy(host, n, out); }

    void reserve_kv(const KvLayout& layout, int64_t n_pages) override {
        kv_.reserve(layout, n_pages);
    }
    size_t kv_page_bytes() const override { return kv_.page_bytes(); }
    void copy_kv_page(int32_t from, int32_t to) override {
        std::memcpy(kv_.page(to), kv_.page(from), kv_.content_bytes());
    }
    void release_kv_page(int32_t page) override { kv_.release(page); }
    void read_kv_page(int32_t page, std::byte* out) const override {
        std::memcpy(out, kv_.page(page), kv_.content_bytes());
    }
    void write_kv_page(int32_t page, const std::byte* data) override {
        std::memcpy(kv_.page(page), data, kv_.content_bytes());
    }
    size_t scratch_bytes() const override {
        return products_.scratch_bytes() + ffn_.scratch_bytes() + added_.capacity_bytes();
    }

    void set_cancel(const std::atomic<bool>* cancel) override { products_.set_cancel(cancel); }
    void set_threads(int n_threads) override { products_.set_threads(n_threads); }

    void begin(const BatchInputs& inputs) override { inputs_ = inputs; }

    void embed(std::span<const Lookup> lookups, float* out) override {
        const int64_t n = inputs_.n_tokens, width = lookups[0].table->n_cols;
        if (lookups.size() > 1) added_.reserve(size_t(n * width));
        products_.for_each(n, width, [&](int64_t i) {
            float* row = out + i * width;
            kernels::decode_row(*lookups[0].table, lookups[0].rows[size_t(i)], row);
            for (const Lookup& other : lookups.subspan(1)) {
                float* added = added_.data() + i * width;
                kernels::decode_row(*other.table, other.rows[size_t(i)], added);
                kernels::add(row, added, width, row);
            }
        });
    }

    void copy(const float* from, size_t n, float* to) override {
        std::memcpy(to, from, n * sizeof(float));
    }

    void gather(const float* x, std::span<const int64_t> rows, int64_t width, float* out) override {
        for (size_t i = 0; i < rows.size(); ++i)
            std::memcpy(out + int64_t(i) * width, x + rows[i] * width,
                        size_t(width) * sizeof(float));
    }

    void norm(const Norm& norm, const float* x, int64_t n_tokens, float* out) override {
        const auto n = int64_t(norm.weight.size());
        const float* bias = norm.bias.empty() ? nullptr : norm.bias.data();
        products_.for_each(n_tokens, n, [&](int64_t t) {
            if (norm.kind == Norm::Kind::rms)
                kernels::rms_norm(x + t * n, norm.weight.data(), norm.epsilon, n, out + t * n);
            else
                kernels::layer_norm(x + t * n, norm.weight.data(), bias, norm.epsilon, n,
                                    out + t * n);
        });
    }

    void project(const float* x, int64_t n_rows, std::span<const Projection> outputs) override {
        products_.project(x, n_rows, outputs);
    }

    void append_kv(int64_t layer, const Heads& heads) override {
        const KvLayout& layout = kv_.layout();
        if (heads.n_rot > 0) {
            rotate(heads.q, heads.q_stride, heads.n_head, heads);
            rotate(heads.k, heads.kv_stride, layout.n_head_kv, heads);
        }
        // By head, not by token: keys lie transposed, so neighbouring tokens share cache lines.
        products_.for_each(layout.n_head_kv, inputs_.n_tokens * layout.head_dim, [&](int64_t h) {
            for (const Segment& segment : inputs_.segments) {
                for (int64_t i = 0; i < segment.n; ++i) {
                    const int64_t position = segment.position + i;
                    const int32_t page = segment.pages[position / kernels::page_size];
                    const int64_t at = (segment.row + i) * heads.kv_stride + h * layout.head_dim;
                    kernels::kv_store(layout.type, layout.head_dim,
                                      int(position % kernels::page_size), heads.k + at,
                                      heads.v + at, kv_.head(page, layer, h));
                }
            }
        });
    }

    void attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                float* out) override;

    void feed_forward(const FeedForward& ffn, const FfnBatch& batch, float* y) override {
        ffn_.compute(ffn, inputs_.rules, batch, y);
    }

    void log_probabilities(const float* logits, int64_t n, int64_t n_vocab, const int32_t* targets,
                           float* out) override {
        products_.for_each(n, n_vocab, [&](int64_t i) {
            const float* row = logits + i * n_vocab;
            float max = 0.0f;
            double sum = 0.0;
            kernels::max_and_sum_exp(row, n_vocab, &max, &sum);
            out[i] = float(double(row[targets[i]]) - double(max) - std::log(sum));
        });
    }

  private:
    void rotate(float* x, int64_t stride, int64_t n_heads, const Heads& heads) {
        const int64_t head_dim = kv_.layout().head_dim, n_rot = heads.n_rot;
        products_.for_each(inputs_.n_tokens, n_heads * head_dim, [&](int64_t t) {
            for (int64_t h = 0; h < n_heads; ++h)
                kernels::rope(x + t * stride + h * head_dim, inputs_.cos_sin + t * n_rot, n_rot,
                              heads.neox);
        });
    }

    BatchInputs inputs_{};
    std::list<AlignedBuffer<float>> arrays_;
    CpuProducts products_;
    CpuFeedForward ffn_{products_};
    HostKvStore kv_;
    AlignedBuffer<float> added_;  // [n_tokens][width] rows that embed() adds
};

void CpuDevice::attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                       float* out) {
    const std::span<const Segment> segments = inputs_.segments;
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
        const int64_t last = segment->position + end - 1;
        for (int64_t p = 0; p <= last / kernels::page_size; ++p)
            pages[p] = kv_.head(segment->pages[p], layer, kv_head);
        int64_t n_queries = 0;
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t g = 0; g < group; ++g) {
                const int64_t head = kv_head * group + g;
                const int64_t row = segment->row + i;
                queries[n_queries++] = {q + row * stride + head * head_dim,
                                        out + (row * shape.n_head + head) * head_dim,
                                        segment->position + i};
            }
        }
        const kernels::AttentionArgs args{layout.type, head_dim, shape.scale, shape.sliding_window,
                                          pages,       queries,  n_queries};
        kernels::attend(args, room + queries_bytes + pages_bytes);
    });
}

}  // namespace

std::unique_ptr<Device> make_cpu_device(int n_threads) {
    return std::make_unique<CpuDevice>(n_threads);
}

}  // namespace qi
