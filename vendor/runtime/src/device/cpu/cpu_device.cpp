// The CPU as a device: every step of the forward pass as one or two parallel loops over the pool.
//
// A step with little to do runs on the calling thread alone: waking a worker costs more than a few
// thousand multiply-adds.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/aligned_buffer.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "device/cpu/kv_store.h"
#include "device/device.h"
#include "kernels/attention.h"
#include "kernels/vector_ops.h"

namespace qi {

namespace {

using kernels::ActivationForm;
using kernels::row_granularity;

// Weight bytes per chunk of a matrix product: long enough for the prefetchers, short enough to
// share the tail.
constexpr size_t chunk_bytes = 96 * 1024;
// Rows per chunk when a prompt is computed: a panel that stays in L2 while all tokens pass over it.
constexpr int64_t panel_rows = 64;
constexpr int64_t panel_tokens = 8;  // from this many tokens on
// Elementwise work on fewer floats than this is not worth a second thread.
constexpr int64_t small_work = 32 * 1024;
// Tokens per attention task: keys and values are converted once for all of them.
constexpr int64_t attention_tokens = 16;

int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

kernels::Activation kernel_activation(HiddenAct::Kind kind) {
    switch (kind) {
        case HiddenAct::Kind::silu:
            return kernels::Activation::silu;
        case HiddenAct::Kind::gelu_erf:
            return kernels::Activation::gelu_erf;
        case HiddenAct::Kind::gelu_tanh:
            return kernels::Activation::gelu_tanh;
        case HiddenAct::Kind::fatrelu:
            return kernels::Activation::fatrelu;
        case HiddenAct::Kind::relu:
        case HiddenAct::Kind::relu_relu:
            break;
    }
    return kernels::Activation::relu;
}

class CpuDevice final : public Device {
  public:
    explicit CpuDevice(int n_threads) { set_threads(n_threads); }

    void reserve_kv(const KvLayout& layout, int64_t n_pages) override {
        kv_.reserve(layout, n_pages);
    }
    size_t kv_page_bytes() const override { return kv_.page_bytes(); }
    void copy_kv_page(int32_t from, int32_t to) override {
        std::memcpy(kv_.page(to), kv_.page(from), kv_.page_bytes());
    }
    void release_kv_page(int32_t page) override { kv_.release(page); }
    void read_kv_page(int32_t page, std::byte* out) const override {
        std::memcpy(out, kv_.page(page), kv_.page_bytes());
    }
    void write_kv_page(int32_t page, const std::byte* data) override {
        std::memcpy(kv_.page(page), data, kv_.page_bytes());
    }
    size_t scratch_bytes() const override {
        size_t bytes =
            prepared_.capacity_bytes() + hidden_.capacity_bytes() + added_.capacity_bytes();
        for (const auto& worker : workers_)
            bytes += worker.capacity_bytes();
        return bytes;
    }

    void set_cancel(const std::atomic<bool>* cancel) override { cancel_ = cancel; }
    void set_threads(int n_threads) override {
        n_threads_ = n_threads;
        workers_.resize(size_t(n_threads));
    }

    void embed(const Weight& table, std::span<const int32_t> rows, float* out,
               bool accumulate) override {
        const int64_t width = table.n_cols;
        if (accumulate) added_.reserve(rows.size() * size_t(width));
        for_each(int64_t(rows.size()), width, [&](int64_t i) {
            float* row = accumulate ? added_.data() + i * width : out + i * width;
            kernels::decode_row(table, rows[size_t(i)], row);
            if (accumulate) kernels::add(out + i * width, row, width, out + i * width);
        });
    }

    void norm(const Norm& norm, const float* x, int64_t n_tokens, float* out) override {
        const auto n = int64_t(norm.weight.size());
        const float* bias = norm.bias.empty() ? nullptr : norm.bias.data();
        for_each(n_tokens, n, [&](int64_t t) {
            if (norm.kind == Norm::Kind::rms)
                kernels::rms_norm(x + t * n, norm.weight.data(), norm.epsilon, n, out + t * n);
            else
                kernels::layer_norm(x + t * n, norm.weight.data(), bias, norm.epsilon, n,
                                    out + t * n);
        });
    }

    void project(const float* x, int64_t n_tokens, std::span<const Projection> outputs) override {
        // Weights of one input may differ in type (Q4_K beside Q6_K) and share a form all the same.
        std::array<bool, outputs_max> done{};
        for (size_t i = 0; i < outputs.size(); ++i) {
            if (done[i]) continue;
            const ActivationForm form = kernels::activation_form(outputs[i].linear->weight.type);
            std::array<Projection, outputs_max> same{};
            size_t n_same = 0;
            for (size_t j = i; j < outputs.size(); ++j) {
                if (kernels::activation_form(outputs[j].linear->weight.type) != form) continue;
                same[n_same++] = outputs[j];
                done[j] = true;
            }
            const std::byte* prepared =
                prepare(form, x, outputs[i].linear->weight.n_cols, n_tokens);
            multiply(prepared, n_tokens, {same.data(), n_same});
        }
    }

    void rope(float* heads, int64_t n_tokens, int64_t stride, int64_t n_heads, int64_t head_dim,
              const float* cos_sin, int64_t n_rot, bool neox) override {
        for_each(n_tokens, n_heads * head_dim, [&](int64_t t) {
            for (int64_t h = 0; h < n_heads; ++h)
                kernels::rope(heads + t * stride + h * head_dim, cos_sin + t * n_rot, n_rot, neox);
        });
    }

    void append_kv(int64_t layer, std::span<const Segment> segments, const float* k, const float* v,
                   int64_t stride) override {
        const KvLayout& layout = kv_.layout();
        int64_t n_tokens = 0;
        for (const Segment& segment : segments)
            n_tokens += segment.n;
        // By head, not by token: keys lie transposed, so neighbouring tokens share cache lines.
        for_each(layout.n_head_kv, n_tokens * layout.head_dim, [&](int64_t h) {
            for (const Segment& segment : segments) {
                for (int64_t i = 0; i < segment.n; ++i) {
                    const int64_t position = segment.position + i;
                    const int32_t page = segment.pages[position / kernels::page_size];
                    const int64_t at = (segment.row + i) * stride + h * layout.head_dim;
                    kernels::kv_store(layout.type, layout.head_dim,
                                      int(position % kernels::page_size), k + at, v + at,
                                      kv_.head(page, layer, h));
                }
            }
        });
    }

    void attend(int64_t layer, const AttentionShape& shape, std::span<const Segment> segments,
                const float* q, int64_t stride, float* out) override;

    void feed_forward(const FeedForward& ffn, const float* x, int64_t n_tokens, float* y) override {
        const Weight& up = ffn.up.weight;
        const int64_t n_ff = up.n_rows;
        float* hidden = hidden_.reserve(size_t(n_tokens * n_ff));
        const ActivationForm up_form = kernels::activation_form(up.type);
        // Gate and up are nearly always of one form; the rare other case prepares the input twice.
        const bool two_forms =
            ffn.gated && kernels::activation_form(ffn.gate.weight.type) != up_form;
        if (two_forms) {
            const std::byte* prepared =
                prepare(kernels::activation_form(ffn.gate.weight.type), x, up.n_cols, n_tokens);
            const Projection gate{&ffn.gate, hidden, false};
            multiply(prepared, n_tokens, {&gate, 1});
        }
        const std::byte* prepared = prepare(up_form, x, up.n_cols, n_tokens);
        const int64_t step = chunk_rows(up, n_tokens, ffn.gated ? 2 : 1);
        const size_t scratch =
            product_scratch(up, n_tokens, ffn.gated ? &ffn.gate.weight : nullptr);
        const size_t up_bytes = ffn.gated ? size_t(n_tokens * step) * sizeof(float) : 0;
        reserve_workers(scratch + up_bytes);
        loop((n_ff + step - 1) / step, [&](int64_t chunk, int worker) {
            const int64_t begin = chunk * step, end = std::min(n_ff, begin + step);
            std::byte* room = workers_[size_t(worker)].data();
            if (!ffn.gated) {
                rows(ffn.up, begin, end, prepared, n_tokens, hidden, n_ff, room);
                for (int64_t t = 0; t < n_tokens; ++t)
                    kernels::activate(kernel_activation(ffn.act.kind), ffn.act.threshold,
                                      hidden + t * n_ff + begin, end - begin);
                return;
            }
            // This chunk of up·x lives only until it has met the gate: [n_tokens][step].
            float* lifted = reinterpret_cast<float*>(room + scratch);
            if (!two_forms) rows(ffn.gate, begin, end, prepared, n_tokens, hidden, n_ff, room);
            rows(ffn.up, begin, end, prepared, n_tokens, lifted - begin, step, room);
            for (int64_t t = 0; t < n_tokens; ++t) {
                float* gate = hidden + t * n_ff + begin;
                if (ffn.act.kind == HiddenAct::Kind::relu_relu)
                    kernels::relu_relu_mul(gate, lifted + t * step, end - begin);
                else
                    kernels::activate_mul(kernel_activation(ffn.act.kind), ffn.act.threshold, gate,
                                          lifted + t * step, end - begin);
            }
        });
        const Projection down{&ffn.down, y, true};
        project(hidden, n_tokens, {&down, 1});
    }

    void log_probabilities(const float* logits, int64_t n, int64_t n_vocab, const int32_t* targets,
                           float* out) override {
        for_each(n, n_vocab, [&](int64_t i) {
            const float* row = logits + i * n_vocab;
            float max = 0.0f;
            double sum = 0.0;
            kernels::max_and_sum_exp(row, n_vocab, &max, &sum);
            out[i] = float(double(row[targets[i]]) - double(max) - std::log(sum));
        });
    }

  private:
    static constexpr size_t outputs_max = 3;  // q, k, v

    void check_cancelled() const {
        if (cancelled()) fail(QI_CANCELLED, "cancelled");
    }
    bool cancelled() const { return cancel_ && cancel_->load(std::memory_order_relaxed); }

    // body(chunk, worker) over chunks, in parallel; after a cancel the chunks left are skipped and
    // the step throws.
    template <typename Body>
    void loop(int64_t n_chunks, Body&& body) {
        if (n_threads_ == 1 || n_chunks == 1) {
            for (int64_t chunk = 0; chunk < n_chunks && !cancelled(); ++chunk)
                body(chunk, 0);
        } else {
            parallel_for(n_threads_, n_chunks, [&](int64_t chunk, int worker) {
                if (!cancelled()) body(chunk, worker);
            });
        }
        check_cancelled();
    }

    // body(i) for n items of `width` floats each, in parallel when there is enough to do.
    template <typename Body>
    void for_each(int64_t n, int64_t width, Body&& body) {
        if (n == 1 || n * width < small_work) {
            for (int64_t i = 0; i < n; ++i)
                body(i);
            return;
        }
        const int64_t step = std::max<int64_t>(1, n / (int64_t(n_threads_) * 4));
        loop((n + step - 1) / step, [&](int64_t chunk, int) {
            for (int64_t i = chunk * step; i < std::min(n, (chunk + 1) * step); ++i)
                body(i);
        });
    }

    const std::byte* prepare(ActivationForm form, const float* x, int64_t n_cols,
                             int64_t n_tokens) {
        std::byte* prepared = prepared_.reserve(kernels::activation_bytes(form, n_cols, n_tokens));
        if (n_tokens * n_cols < small_work) {
            kernels::prepare_activations(form, x, n_cols, n_cols, n_tokens, 0, n_tokens, prepared);
            return prepared;
        }
        const int64_t step = std::max<int64_t>(1, n_tokens / (int64_t(n_threads_) * 4));
        loop((n_tokens + step - 1) / step, [&](int64_t chunk, int) {
            kernels::prepare_activations(form, x, n_cols, n_cols, n_tokens, chunk * step,
                                         std::min(n_tokens, (chunk + 1) * step), prepared);
        });
        return prepared;
    }

    // Rows of one chunk, a multiple of the kernels' granularity; n_weights matrices are read
    // together.
    int64_t chunk_rows(const Weight& w, int64_t n_tokens, int n_weights) const {
        if (n_tokens >= panel_tokens) return panel_rows;
        const auto by_bytes = int64_t(chunk_bytes / (w.row_bytes * size_t(n_weights)));
        const int64_t by_share = w.n_rows / (int64_t(n_threads_) * 4);
        return std::max(row_granularity,
                        std::min(by_bytes, by_share) / row_granularity * row_granularity);
    }

    size_t product_scratch(const Weight& w, int64_t n_tokens, const Weight* other) const {
        size_t bytes = kernels::matmul_scratch_bytes(w, n_tokens);
        if (other) bytes = std::max(bytes, kernels::matmul_scratch_bytes(*other, n_tokens));
        return size_t(round_up(int64_t(bytes), 64));
    }

    void reserve_workers(size_t bytes) {
        for (auto& worker : workers_)
            worker.reserve(bytes);
    }

    static void rows(const Linear& linear, int64_t begin, int64_t end, const std::byte* prepared,
                     int64_t n_tokens, float* y, int64_t stride, std::byte* scratch) {
        kernels::matmul_rows(linear.weight, begin, end, prepared, n_tokens, y, stride, scratch);
        if (linear.bias.empty()) return;
        for (int64_t t = 0; t < n_tokens; ++t)
            kernels::add(y + t * stride + begin, linear.bias.data() + begin, end - begin,
                         y + t * stride + begin);
    }

    // One parallel loop over the rows of all outputs, which share the prepared input.
    void multiply(const std::byte* prepared, int64_t n_tokens,
                  std::span<const Projection> outputs) {
        std::array<int64_t, outputs_max> step{}, first{};
        int64_t n_chunks = 0;
        size_t scratch = 0, added = 0;
        for (size_t i = 0; i < outputs.size(); ++i) {
            const Weight& w = outputs[i].linear->weight;
            step[i] = chunk_rows(w, n_tokens, 1);
            first[i] = n_chunks;
            n_chunks += (w.n_rows + step[i] - 1) / step[i];
            scratch = std::max(scratch, product_scratch(w, n_tokens, nullptr));
            if (outputs[i].accumulate) added = std::max(added, size_t(n_tokens * step[i]));
        }
        reserve_workers(scratch + added * sizeof(float));
        loop(n_chunks, [&](int64_t chunk, int worker) {
            size_t i = outputs.size() - 1;
            while (first[i] > chunk)
                --i;
            const Linear& linear = *outputs[i].linear;
            const int64_t n_rows = linear.weight.n_rows;
            const int64_t begin = (chunk - first[i]) * step[i];
            const int64_t end = std::min(n_rows, begin + step[i]);
            std::byte* room = workers_[size_t(worker)].data();
            float* y = outputs[i].y;
            if (!outputs[i].accumulate) {
                rows(linear, begin, end, prepared, n_tokens, y, n_rows, room);
                return;
            }
            float* product = reinterpret_cast<float*>(room + scratch);  // [n_tokens][step]
            rows(linear, begin, end, prepared, n_tokens, product - begin, step[i], room);
            for (int64_t t = 0; t < n_tokens; ++t)
                kernels::add(y + t * n_rows + begin, product + t * step[i], end - begin,
                             y + t * n_rows + begin);
        });
    }

    int n_threads_ = 1;
    const std::atomic<bool>* cancel_ = nullptr;
    HostKvStore kv_;
    AlignedBuffer<std::byte> prepared_;              // activations in the form the weights want
    AlignedBuffer<float> hidden_;                    // [n_tokens][n_ff]
    AlignedBuffer<float> added_;                     // rows on their way into an accumulating embed
    std::vector<AlignedBuffer<std::byte>> workers_;  // scratch of each thread
};

void CpuDevice::attend(int64_t layer, const AttentionShape& shape,
                       std::span<const Segment> segments, const float* q, int64_t stride,
                       float* out) {
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
    reserve_workers(queries_bytes + pages_bytes +
                    kernels::attention_scratch_bytes(head_dim, queries_max));

    loop(n_tasks, [&](int64_t task, int worker) {
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

        std::byte* room = workers_[size_t(worker)].data();
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
