#include "device/cuda/neuron_panels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/cpu.h"
#include "base/thread_pool.h"

namespace qi::cuda {

namespace {

size_t aligned(size_t n_bytes) {
    return (n_bytes + 255) / 256 * 256;
}

// Where everything of a panel lies, from its beginning.
struct PanelLayout {
    NeuronLayout record;
    size_t down_stride = 0;  // of an ordinary down's rows
    size_t down, gate_bias, up_bias, down_bias, ids, n, end;

    PanelLayout(const FeedForward& ffn, int64_t n_neurons) : record(record_layout(ffn)) {
        const auto count = size_t(n_neurons);
        const auto n_embd = size_t(ffn.up.weight.n_cols);
        if (!ffn.down_by_neuron) down_stride = device_row_bytes(ffn.down.weight.type, n_neurons);
        down = aligned(count * record.stride);
        gate_bias = down + aligned(n_embd * down_stride);
        up_bias = gate_bias + aligned(ffn.gate.bias.empty() ? 0 : count * sizeof(float));
        down_bias = up_bias + aligned(ffn.up.bias.empty() ? 0 : count * sizeof(float));
        ids = down_bias + aligned(ffn.down.bias.size() * sizeof(float));
        n = ids + aligned(count * sizeof(int32_t));
        end = n + sizeof(int32_t);
    }
};

int64_t unit_of(const FeedForward& ffn) {
    return ffn.down_by_neuron ? 1 : traits(ffn.down.weight.type).block_size;
}

void write_biases(const std::vector<float>& bias, std::span<const int32_t> neurons,
                  std::byte* out) {
    if (bias.empty()) return;
    for (size_t i = 0; i < neurons.size(); ++i)
        std::memcpy(out + i * sizeof(float), &bias[size_t(neurons[i])], sizeof(float));
}

}  // namespace

NeuronPanels::NeuronPanels(std::shared_ptr<Gpu> gpu, CUdeviceptr room, size_t panel_bytes)
    : panel_bytes_(panel_bytes),
      panels_{room, room + panel_bytes},
      staging_{{gpu, panel_bytes, "staging"}, {gpu, panel_bytes, "staging"}},
      brought_{Event(gpu), Event(gpu)},
      used_{Event(gpu), Event(gpu)},
      copies_(gpu) {}

int64_t NeuronPanels::neurons_together(const FeedForward& ffn) const {
    const int64_t unit = unit_of(ffn);
    const size_t per_unit = PanelLayout(ffn, unit).end;
    // Each unit for itself takes more than in company, so this many fit.
    int64_t n = int64_t(panel_bytes_ / per_unit) * unit;
    while (n > 0 && PanelLayout(ffn, n + unit).end <= panel_bytes_)
        n += unit;
    return n;
}

DeviceFfn NeuronPanels::bring(const FeedForward& ffn, std::span<const int32_t> neurons,
                              bool down_bias, const Stream& stream) {
    const auto count = int64_t(neurons.size());
    const Weight &gate = ffn.gate.weight, &up = ffn.up.weight, &down = ffn.down.weight;
    const PanelLayout layout(ffn, count);
    if (layout.end > panel_bytes_) fail(QI_INTERNAL, "more neurons are brought than a panel holds");
    side_ ^= 1;
    brought_[side_].synchronize();  // the staging memory is read no more
    std::byte* const out = staging_[side_].data();
    constexpr int64_t per_chunk = 16;
    const int64_t n_rows = ffn.down_by_neuron ? 0 : down.n_rows;
    const int64_t record_chunks = (count + per_chunk - 1) / per_chunk;
    const int64_t row_chunks = (n_rows + per_chunk - 1) / per_chunk;
    parallel_for(cpu_info().n_usable_cores, record_chunks + row_chunks, [&](int64_t chunk, int) {
        const bool of_down = chunk >= record_chunks;
        const int64_t begin = (of_down ? chunk - record_chunks : chunk) * per_chunk;
        const int64_t end = std::min(of_down ? n_rows : count, begin + per_chunk);
        for (int64_t i = begin; i < end; ++i) {
            if (of_down)
                write_columns(down, i, neurons, out + layout.down + size_t(i) * layout.down_stride);
            else
                write_record(ffn, layout.record, neurons[size_t(i)],
                             out + size_t(i) * layout.record.stride);
        }
    });
    write_biases(ffn.gate.bias, neurons, out + layout.gate_bias);
    write_biases(ffn.up.bias, neurons, out + layout.up_bias);
    if (down_bias && !ffn.down.bias.empty())
        std::memcpy(out + layout.down_bias, ffn.down.bias.data(),
                    ffn.down.bias.size() * sizeof(float));
    std::memcpy(out + layout.ids, neurons.data(), neurons.size() * sizeof(int32_t));
    const auto n_listed = int32_t(count);
    std::memcpy(out + layout.n, &n_listed, sizeof n_listed);

    const CUdeviceptr panel = panels_[side_];
    copies_.wait(used_[side_]);
    copies_.copy_to_device(panel, out, layout.end);
    brought_[side_].record(copies_);
    stream.wait(brought_[side_]);

    DeviceFfn brought;
    NeuronWeights& w = brought.weights;
    w.gate_type = gate.type;
    w.up_type = up.type;
    w.down_type = down.type;
    w.gated = ffn.gated;
    w.layout = layout.record;
    w.n_embd = up.n_cols;
    w.n_ff = up.n_rows;
    w.records = panel;
    w.gate_bias = ffn.gate.bias.empty() ? 0 : panel + layout.gate_bias;
    w.up_bias = ffn.up.bias.empty() ? 0 : panel + layout.up_bias;
    brought.n_kept = count;
    brought.n_rest = up.n_rows - count;
    brought.neuron_of_slot = panel + layout.ids;
    brought.list.n = panel + layout.n;
    brought.list.capacity = count;
    if (!ffn.down_by_neuron)
        brought.down = {down.type, panel + layout.down, down.n_rows, count, layout.down_stride};
    if (down_bias && !ffn.down.bias.empty()) brought.down_bias = panel + layout.down_bias;
    return brought;
}

void NeuronPanels::done(const Stream& stream) {
    used_[side_].record(stream);
}

}  // namespace qi::cuda
