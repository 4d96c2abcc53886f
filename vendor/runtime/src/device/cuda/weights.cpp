#include "device/cuda/weights.h"

#include <algorithm>
#include <cstring>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "device/cuda/layout.h"

namespace qi::cuda {

namespace {

constexpr size_t staging_bytes = size_t(4) << 20;

// Arrays begin at multiples of this, as the driver's own allocations do.
constexpr size_t alignment = 256;

size_t aligned(size_t n_bytes) {
    return (n_bytes + alignment - 1) / alignment * alignment;
}

size_t floats_bytes(size_t n) {
    return aligned(n * sizeof(float));
}

void repack_row(const Weight& w, int64_t row, std::byte* out) {
    repack_rows(w.type, w.n_cols, w.data + size_t(row) * w.row_bytes, 1, out, 0);
}

size_t tables_bytes(int64_t n_ff, int64_t n_slots) {
    return aligned(size_t(n_ff) * sizeof(int32_t)) + aligned(NeuronList::n_bytes(n_slots)) +
           aligned(size_t(n_slots) * sizeof(int32_t));
}

}  // namespace

NeuronLayout record_layout(const FeedForward& ffn) {
    return neuron_layout(ffn.gated ? &ffn.gate.weight.type : nullptr, &ffn.up.weight.type,
                         ffn.down_by_neuron ? &ffn.down.weight.type : nullptr,
                         ffn.up.weight.n_cols);
}

void write_record(const FeedForward& ffn, const NeuronLayout& layout, int32_t neuron,
                  std::byte* out) {
    if (ffn.gated) repack_row(ffn.gate.weight, neuron, out + layout.gate_offset);
    repack_row(ffn.up.weight, neuron, out + layout.up_offset);
    if (ffn.down_by_neuron) repack_row(ffn.down.weight, neuron, out + layout.down_offset);
}

void write_columns(const Weight& w, int64_t row, std::span<const int32_t> neurons, std::byte* out) {
    const auto n = neurons.size(), block = size_t(traits(w.type).block_size);
    const auto block_bytes = size_t(traits(w.type).block_bytes);
    std::vector<std::byte> blocks(n / block * block_bytes);
    for (size_t i = 0; i < n; i += block)
        std::memcpy(&blocks[i / block * block_bytes],
                    w.data + size_t(row) * w.row_bytes + size_t(neurons[i]) / block * block_bytes,
                    block_bytes);
    repack_rows(w.type, int64_t(n), blocks.data(), 1, out, 0);
}

size_t DeviceFfn::table_bytes() const {
    return tables_bytes(weights.n_ff, n_kept);
}

void DeviceFfn::write_tables(std::span<const int32_t> of_slot, std::byte* out) const {
    const auto table = [&](CUdeviceptr at) {
        return reinterpret_cast<int32_t*>(out + (at - slot_of_neuron));
    };
    int32_t *slots_by_neuron = table(slot_of_neuron), *ids = table(list.ids);
    int32_t *slots = table(list.slots), *bounds = table(list.bounds);
    const int64_t n_ff = weights.n_ff;
    std::fill_n(slots_by_neuron, n_ff, -1);
    for (size_t s = 0; s < of_slot.size(); ++s)
        slots_by_neuron[of_slot[s]] = int32_t(s);
    int64_t n = 0;
    for (int64_t j = 0; j < n_ff; ++j) {
        if (slots_by_neuron[j] < 0) continue;
        ids[n] = int32_t(j);
        slots[n++] = slots_by_neuron[j];
    }
    *table(list.n) = int32_t(n);
    constexpr int64_t n_runs = n_list_bounds - 1;
    for (int64_t run = 0; run <= n_runs; ++run)
        bounds[run] = int32_t(std::lower_bound(ids, ids + n, n_ff * run / n_runs) - ids);
    std::copy(of_slot.begin(), of_slot.end(), table(neuron_of_slot));
}

Weights::Weights(std::shared_ptr<Gpu> gpu, std::shared_ptr<Budget> budget)
    : gpu_(std::move(gpu)),
      budget_(std::move(budget)),
      stream_(gpu_),
      staging_{{gpu_, staging_bytes, "staging"}, {gpu_, staging_bytes, "staging"}},
      sent_{Event(gpu_), Event(gpu_)} {}

void Weights::reserve(size_t n_bytes) {
    memory_.emplace_back(gpu_, budget_, n_bytes, "weights");
    used_ = 0;
}

CUdeviceptr Weights::allocate(size_t n_bytes) {
    if (memory_.empty() || aligned(n_bytes) > memory_.back().n_bytes() - used_)
        fail(QI_INTERNAL, "more weights are kept on the GPU than memory was reserved for");
    const CUdeviceptr at = memory_.back().address() + used_;
    used_ += aligned(n_bytes);
    return at;
}

void Weights::upload(CUdeviceptr to, int64_t n, size_t stride, const WriteItem& write) {
    const Current current(*gpu_);
    const auto together = int64_t(staging_bytes / stride);
    if (together == 0) {
        // An item larger than the staging memory goes through memory of its own.
        const PinnedMemory own(gpu_, stride, "a row of weights");
        for (int64_t i = 0; i < n; ++i) {
            write(i, own.data());
            stream_.copy_to_device(to + size_t(i) * stride, own.data(), stride);
            stream_.synchronize();
        }
        return;
    }
    const int n_threads = cpu_info().n_usable_cores;
    int side = 0;
    for (int64_t first = 0; first < n; first += together, side ^= 1) {
        const int64_t end = std::min(n, first + together);
        sent_[side].synchronize();
        std::byte* out = staging_[side].data();
        constexpr int64_t per_chunk = 16;
        parallel_for(n_threads, (end - first + per_chunk - 1) / per_chunk, [&](int64_t chunk, int) {
            const int64_t begin = first + chunk * per_chunk;
            for (int64_t i = begin; i < std::min(end, begin + per_chunk); ++i)
                write(i, out + size_t(i - first) * stride);
        });
        stream_.copy_to_device(to + size_t(first) * stride, out, size_t(end - first) * stride);
        sent_[side].record(stream_);
    }
    stream_.synchronize();
}

CUdeviceptr Weights::upload_floats(const std::vector<float>& values) {
    if (values.empty()) return 0;
    const CUdeviceptr at = allocate(values.size() * sizeof(float));
    upload(at, int64_t(values.size()), sizeof(float),
           [&](int64_t i, std::byte* out) { std::memcpy(out, &values[size_t(i)], sizeof(float)); });
    return at;
}

size_t Weights::bytes_of(const Linear& linear) {
    const Weight& w = linear.weight;
    return aligned(size_t(w.n_rows) * device_row_bytes(w.type, w.n_cols)) +
           floats_bytes(linear.bias.size());
}

size_t Weights::bytes_of(const Norm& norm) {
    return floats_bytes(norm.weight.size()) + floats_bytes(norm.bias.size());
}

size_t Weights::bytes_of(const FeedForward& ffn, int64_t n_neurons) {
    if (n_neurons == 0) return 0;
    const auto n = size_t(n_neurons);
    size_t bytes = aligned(n * record_layout(ffn).stride) +
                   tables_bytes(ffn.up.weight.n_rows, n_neurons) +
                   floats_bytes(ffn.gate.bias.size()) + floats_bytes(ffn.up.bias.size()) +
                   floats_bytes(ffn.down.bias.size());
    if (!ffn.down_by_neuron)
        bytes += aligned(size_t(ffn.down.weight.n_rows) *
                         device_row_bytes(ffn.down.weight.type, n_neurons));
    return bytes;
}

void Weights::keep(const Linear& linear) {
    const Weight& w = linear.weight;
    const size_t stride = device_row_bytes(w.type, w.n_cols);
    DeviceLinear kept{{w.type, allocate(size_t(w.n_rows) * stride), w.n_rows, w.n_cols, stride}, 0};
    upload(kept.weight.data, w.n_rows, stride,
           [&](int64_t row, std::byte* out) { repack_row(w, row, out); });
    kept.bias = upload_floats(linear.bias);
    linears_[&linear] = kept;
}

void Weights::keep(const Norm& norm) {
    norms_[&norm] = {upload_floats(norm.weight), upload_floats(norm.bias)};
}

void Weights::keep(const FeedForward& ffn, NeuronShard resident, NeuronShard rest) {
    const Weight &gate = ffn.gate.weight, &up = ffn.up.weight, &down = ffn.down.weight;
    DeviceFfn kept;
    kept.index = ffns_.size();
    kept.n_kept = int64_t(resident.neurons().size());
    kept.n_rest = int64_t(rest.neurons().size());
    const std::span<const int32_t> neurons = resident.neurons();
    if (!neurons.empty()) {
        kept.down_bias = upload_floats(ffn.down.bias);
        const auto n_slots = int64_t(neurons.size());
        NeuronWeights& w = kept.weights;
        w.gate_type = gate.type;
        w.up_type = up.type;
        w.down_type = down.type;
        w.gated = ffn.gated;
        w.layout = record_layout(ffn);
        w.n_embd = up.n_cols;
        w.n_ff = up.n_rows;
        w.records = allocate(neurons.size() * w.layout.stride);
        upload(w.records, n_slots, w.layout.stride, [&](int64_t slot, std::byte* out) {
            write_record(ffn, w.layout, neurons[size_t(slot)], out);
        });
        w.gate_bias = upload_floats(ffn.gate.bias);
        w.up_bias = upload_floats(ffn.up.bias);
        keep_tables(neurons, kept);
        if (!ffn.down_by_neuron) keep_down(down, neurons, kept);
    }
    all_resident_ = all_resident_ && rest.neurons().empty();
    kept.has_predictor = ffn.predictor && linears_.contains(&ffn.predictor->fc1);
    has_quantised_predictors_ |= kept.has_predictor && wants_q8(ffn.predictor->fc1.weight.type);
    kept.resident = std::move(resident);
    kept.rest = std::move(rest);
    ffns_[&ffn] = std::move(kept);
}

void Weights::keep_tables(std::span<const int32_t> neurons, DeviceFfn& kept) {
    const auto n_slots = int64_t(neurons.size());
    const size_t n_bytes = kept.table_bytes();
    kept.slot_of_neuron = allocate(n_bytes);
    kept.list = NeuronList::at(
        kept.slot_of_neuron + aligned(size_t(kept.weights.n_ff) * sizeof(int32_t)), n_slots);
    kept.neuron_of_slot =
        kept.slot_of_neuron + n_bytes - aligned(size_t(n_slots) * sizeof(int32_t));
    upload(kept.slot_of_neuron, 1, n_bytes, [&](int64_t, std::byte* out) {
        std::memset(out, 0, n_bytes);
        kept.write_tables(neurons, out);
    });
}

// Of each row the blocks of the kept neurons, side by side.
void Weights::keep_down(const Weight& down, std::span<const int32_t> neurons, DeviceFfn& kept) {
    const auto n_slots = int64_t(neurons.size());
    const size_t stride = device_row_bytes(down.type, n_slots);
    kept.down = {down.type, allocate(size_t(down.n_rows) * stride), down.n_rows, n_slots, stride};
    upload(kept.down.data, down.n_rows, stride,
           [&](int64_t row, std::byte* out) { write_columns(down, row, neurons, out); });
}

std::vector<std::pair<const FeedForward*, DeviceFfn*>> Weights::movable() {
    std::vector<std::pair<const FeedForward*, DeviceFfn*>> networks;
    for (auto& [key, kept] : ffns_) {
        const auto* ffn = static_cast<const FeedForward*>(key);
        if (ffn->down_by_neuron && kept.n_slots() > 0 && !kept.whole())
            networks.emplace_back(ffn, &kept);
    }
    std::sort(networks.begin(), networks.end(),
              [](const auto& a, const auto& b) { return a.second->index < b.second->index; });
    return networks;
}

namespace {

template <typename Map, typename Key>
const auto& found(const Map& map, const Key& key, const char* what) {
    const auto at = map.find(&key);
    if (at == map.end()) fail(QI_INTERNAL, "a %s that the GPU does not keep was asked for", what);
    return at->second;
}

}  // namespace

const DeviceLinear& Weights::find(const Linear& linear) const {
    return found(linears_, linear, "matrix");
}

const DeviceNorm& Weights::find(const Norm& norm) const {
    return found(norms_, norm, "norm");
}

const DeviceFfn& Weights::find(const FeedForward& ffn) const {
    return found(ffns_, ffn, "feed-forward network");
}

}  // namespace qi::cuda
