#include "device/cuda/rehearsal.h"

#include <algorithm>
#include <bit>

#include "device/cuda/cublas.h"
#include "device/cuda/half_products.h"

namespace qi::cuda {

namespace {

// Launches of one layer's step and of what is around the layers, at most; graphs by length of the
// context: of steps whose logits the host wants, and of those whose best ones are enough.
constexpr int64_t launches_per_layer = 32;
constexpr size_t graphs_per_length = 2;

}  // namespace

RecordedSteps::RecordedSteps(const GpuShare& share, const DeviceNeeds& needs) : stream_(share.gpu) {
    const Current current(*share.gpu);
    constexpr int64_t n = 32;
    const DeviceMemory values(share.gpu, std::make_shared<Budget>(Budget::unlimited),
                              2 * n * sizeof(float), "recorded steps");
    const CUdeviceptr factors = values.address(), y = factors + n * sizeof(float);
    const auto record = [&] {
        for (int64_t i = 0; i < (needs.kv.n_layer + 1) * launches_per_layer; ++i)
            share.kernels->scale_rows(stream_, factors, 0, 1, n, y, n);
    };
    // The bound on positions that steps are launched for doubles.
    const auto n_lengths = size_t(std::bit_width(uint64_t(needs.n_pages)));
    graphs_.resize(graphs_per_length * n_lengths);
    graphs_[0] = Graph(stream_, record, std::span(graphs_).subspan(1));
    for (const Graph& graph : graphs_)
        graph.launch(stream_);
    stream_.synchronize();
}

void load_products(const GpuShare& share, std::span<const Type> weight_types,
                   const DeviceNeeds& needs) {
    if (needs.deterministic || needs.n_batch <= few_tokens) return;
    const Current current(*share.gpu);
    const auto unlimited = std::make_shared<Budget>(Budget::unlimited);
    const auto memory = [&](int64_t n, int64_t width, size_t size) {
        return DeviceMemory(share.gpu, unlimited, size_t(n * width) * size, "products");
    };
    // Which code cuBLAS loads follows from all sizes.
    struct Shape {
        int64_t n_rows, n_cols;
        bool by_column = false;
    };
    const int64_t n_embd = needs.n_embd, n_ff = needs.n_ff;
    const int64_t q_width = needs.n_head * needs.kv.head_dim;
    const int64_t kv_width = needs.kv.n_head_kv * needs.kv.head_dim;
    const Shape shapes[] = {{q_width, n_embd}, {kv_width, n_embd}, {n_embd, q_width},
                            {n_ff, n_embd},    {n_embd, n_ff},     {n_embd, n_ff, true}};
    const int64_t n_most = needs.n_batch, widest = std::max({q_width, n_embd, n_ff});
    const DeviceMemory w = memory(n_embd, std::max(q_width, n_ff), 2);
    const DeviceMemory x = memory(n_most, widest, 2), y = memory(n_most, widest, 4);
    const Stream stream(share.gpu);
    for (const DeviceMemory* each : {&w, &x, &y})
        stream.fill(each->address(), 0, each->n_bytes());
    const Cublas cublas(stream, unlimited);
    const int architecture = share.gpu->attributes().architecture;
    for (const Cublas::Input input : {Cublas::Input::f16, Cublas::Input::bf16}) {
        const bool is_bf16 = input == Cublas::Input::bf16;
        if (std::ranges::none_of(weight_types, [&](Type type) {
                return HalfProducts::takes(type, architecture) && (type == Type::bf16) == is_bf16;
            }))
            continue;
        for (const int64_t n_tokens : {int64_t(16), n_most / 8, n_most / 2, n_most}) {
            if (n_tokens <= few_tokens || n_tokens > n_most) continue;
            for (const auto& [n_rows, n_cols, by_column] : shapes)
                cublas.multiply({input, n_rows, n_cols, n_tokens, w.address(), x.address(),
                                 y.address(), by_column ? n_rows : n_cols, n_cols, n_rows,
                                 by_column, by_column});
        }
    }
    stream.synchronize();
}

}  // namespace qi::cuda
