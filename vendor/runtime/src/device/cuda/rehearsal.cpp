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
    // Products take matrices in parts, too; which code is loaded follows from the numbers' type,
    // the matrix's order and whether sides are large.
    constexpr int64_t largest = 4096;
    const int64_t width = std::min(largest, needs.n_embd / 8 * 8);
    const int64_t n_rows = std::min(largest, needs.n_ff / 8 * 8);
    const int64_t n_most = std::min<int64_t>(needs.n_batch, 256);
    if (width == 0 || n_rows == 0) return;
    const DeviceMemory w = memory(n_rows, width, 2), x = memory(n_most, width, 2);
    const DeviceMemory y = memory(n_most, n_rows, 4);
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
        for (const bool by_column : {false, true})
            for (const int64_t n_tokens : {std::min<int64_t>(n_most, 16), n_most})
                cublas.multiply({input, n_rows, width, n_tokens, w.address(), x.address(),
                                 y.address(), by_column ? n_rows : width, width, n_rows, by_column,
                                 by_column});
    }
    stream.synchronize();
}

}  // namespace qi::cuda
