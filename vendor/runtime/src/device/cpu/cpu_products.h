// Parallel loops and matrix products on the CPU: what all steps of a forward pass are made of.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "device/device.h"
#include "kernels/matmul.h"

namespace qi {

inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

class CpuProducts {
  public:
    explicit CpuProducts(int n_threads) { set_threads(n_threads); }

    void set_cancel(const std::atomic<bool>* cancel) { cancel_ = cancel; }
    void set_threads(int n_threads) {
        n_threads_ = n_threads;
        workers_.resize(size_t(n_threads));
    }
    int n_threads() const { return n_threads_; }
    size_t scratch_bytes() const;

    // Scratch of a thread, as large as reserve_workers was told; outgrown by the next step.
    void reserve_workers(size_t bytes) {
        for (auto& worker : workers_)
            worker.reserve(bytes);
    }
    std::byte* room(int worker) { return workers_[size_t(worker)].data(); }

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

    // Activations in the form that weights want; valid until the next call.
    const std::byte* prepare(kernels::ActivationForm form, const float* x, int64_t n_cols,
                             int64_t n_tokens);
    // Rows of a chunk, a multiple of the kernels' granularity; n_weights matrices are read
    // together.
    int64_t chunk_rows(const Weight& w, int64_t n_tokens, int n_weights) const;
    // Scratch for the rows of one weight, or of two that take turns.
    static size_t scratch_for(const Weight& w, int64_t n_tokens, const Weight* other);
    // Rows [begin, end) of y = W·x + b.
    static void rows(const Linear& linear, int64_t begin, int64_t end, const std::byte* prepared,
                     int64_t n_tokens, float* y, int64_t stride, std::byte* scratch,
                     const std::vector<int32_t>* groups = nullptr);
    // One parallel loop over the rows of all outputs, which share the prepared input. `groups`: of
    // columns, outside of which the input is zero; or null, and all are read.
    void multiply(const std::byte* prepared, int64_t n_tokens, std::span<const Projection> outputs,
                  const std::vector<int32_t>* groups = nullptr);
    // All outputs of one input, whatever forms their weights want.
    void project(const float* x, int64_t n_tokens, std::span<const Projection> outputs);

    // Elementwise work on fewer floats than this is not worth a second thread.
    static constexpr int64_t small_work = 32 * 1024;

  private:
    static constexpr size_t outputs_max = 3;  // q, k, v

    void check_cancelled() const;
    bool cancelled() const { return cancel_ && cancel_->load(std::memory_order_relaxed); }

    int n_threads_ = 1;
    const std::atomic<bool>* cancel_ = nullptr;
    AlignedBuffer<std::byte> prepared_;
    std::vector<AlignedBuffer<std::byte>> workers_;
};

}  // namespace qi
