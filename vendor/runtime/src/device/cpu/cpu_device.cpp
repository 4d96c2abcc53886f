// The CPU as a device: every step of the forward pass as one or two parallel loops over the pool.
//
// A step with little to do runs on the calling thread alone: waking a worker costs more than a few
// thousand multiply-adds.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>

#include "base/aligned_buffer.h"
#include "device/cpu/cpu_attention.h"
#include "device/cpu/cpu_feed_forward.h"
#include "device/cpu/cpu_products.h"
#include "device/device.h"
#include "kernels/vector_ops.h"

namespace qi {

namespace {

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
        attention_.store().reserve(layout, n_pages);
    }
    size_t kv_page_bytes() const override { return attention_.store().page_bytes(); }
    void copy_kv_page(int32_t from, int32_t to) override { attention_.copy_page(from, to); }
    void release_kv_page(int32_t page) override { attention_.store().release(page); }
    void read_kv_page(int32_t page, std::byte* out) const override {
        attention_.read_page(page, out);
    }
    void write_kv_page(int32_t page, const std::byte* data) override {
        attention_.write_page(page, data);
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
        attention_.append(inputs_, layer, heads);
    }
    void attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                float* out) override {
        attention_.attend(inputs_, layer, shape, q, stride, out);
    }

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
    BatchInputs inputs_{};
    std::list<AlignedBuffer<float>> arrays_;
    CpuProducts products_;
    CpuFeedForward ffn_{products_};
    CpuAttention attention_{products_};
    AlignedBuffer<float> added_;  // [n_tokens][width] rows that embed() adds
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(int n_threads) {
    return std::make_unique<CpuDevice>(n_threads);
}

}  // namespace qi
