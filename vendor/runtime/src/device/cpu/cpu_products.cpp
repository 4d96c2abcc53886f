#include "device/cpu/cpu_products.h"

#include <array>

#include "base/error.h"
#include "kernels/vector_ops.h"

namespace qi {

using kernels::ActivationForm;
using kernels::row_granularity;

namespace {

// Weight bytes per chunk of a matrix product: long enough for the prefetchers, short enough to
// share the tail.
constexpr size_t chunk_bytes = 96 * 1024;
// Rows per chunk when a prompt is computed: a panel that stays in L2 while all tokens pass over it.
constexpr int64_t panel_rows = 64;
constexpr int64_t panel_tokens = 8;  // from this many tokens on
}  // namespace

size_t CpuProducts::scratch_bytes() const {
    size_t bytes = prepared_.capacity_bytes();
    for (const auto& worker : workers_)
        bytes += worker.capacity_bytes();
    return bytes;
}

void CpuProducts::check_cancelled() const {
    if (cancelled()) fail(QI_CANCELLED, "cancelled");
}

void CpuProducts::project(const float* x, int64_t n_tokens, std::span<const Projection> outputs) {
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
        const std::byte* prepared = prepare(form, x, outputs[i].linear->weight.n_cols, n_tokens);
        multiply(prepared, n_tokens, {same.data(), n_same});
    }
}

const std::byte* CpuProducts::prepare(ActivationForm form, const float* x, int64_t n_cols,
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

int64_t CpuProducts::chunk_rows(const Weight& w, int64_t n_tokens, int n_weights) const {
    if (n_tokens >= panel_tokens) return panel_rows;
    const auto by_bytes = int64_t(chunk_bytes / (w.row_bytes * size_t(n_weights)));
    const int64_t by_share = w.n_rows / (int64_t(n_threads_) * 4);
    return std::max(row_granularity,
                    std::min(by_bytes, by_share) / row_granularity * row_granularity);
}

size_t CpuProducts::scratch_for(const Weight& w, int64_t n_tokens, const Weight* other) {
    size_t bytes = kernels::matmul_scratch_bytes(w, n_tokens);
    if (other) bytes = std::max(bytes, kernels::matmul_scratch_bytes(*other, n_tokens));
    return size_t(round_up(int64_t(bytes), 64));
}

void CpuProducts::rows(const Linear& linear, int64_t begin, int64_t end, const std::byte* prepared,
                       int64_t n_tokens, float* y, int64_t stride, std::byte* scratch,
                       const std::vector<int32_t>* groups) {
    if (groups)
        kernels::matmul_groups(linear.weight, begin, end, groups->data(), int64_t(groups->size()),
                               prepared, n_tokens, y, stride);
    else
        kernels::matmul_rows(linear.weight, begin, end, prepared, n_tokens, y, stride, scratch);
    if (linear.bias.empty()) return;
    for (int64_t t = 0; t < n_tokens; ++t)
        kernels::add(y + t * stride + begin, linear.bias.data() + begin, end - begin,
                     y + t * stride + begin);
}

void CpuProducts::multiply(const std::byte* prepared, int64_t n_tokens,
                           std::span<const Projection> outputs,
                           const std::vector<int32_t>* groups) {
    std::array<int64_t, outputs_max> step{}, first{};
    int64_t n_chunks = 0;
    size_t scratch = 0, added = 0;
    for (size_t i = 0; i < outputs.size(); ++i) {
        const Weight& w = outputs[i].linear->weight;
        step[i] = chunk_rows(w, n_tokens, 1);
        first[i] = n_chunks;
        n_chunks += (w.n_rows + step[i] - 1) / step[i];
        scratch = std::max(scratch, scratch_for(w, n_tokens, nullptr));
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
        std::byte* own = room(worker);
        float* y = outputs[i].y;
        if (!outputs[i].accumulate) {
            rows(linear, begin, end, prepared, n_tokens, y, n_rows, own, groups);
            return;
        }
        float* product = reinterpret_cast<float*>(own + scratch);  // [n_tokens][step]
        rows(linear, begin, end, prepared, n_tokens, product - begin, step[i], own, groups);
        for (int64_t t = 0; t < n_tokens; ++t)
            kernels::add(y + t * n_rows + begin, product + t * step[i], end - begin,
                         y + t * n_rows + begin);
    });
}

}  // namespace qi
