// Copies of a model's weights in the memory of one GPU, found by the address of what they were made
// from.
#pragma once

#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "device/cuda/gpu.h"
#include "device/cuda/launch.h"
#include "device/device.h"
#include "sparse/shard.h"

namespace qi::cuda {

struct DeviceLinear {
    DeviceWeight weight;
    CUdeviceptr bias = 0;  // [n_rows] floats; 0: none
};

struct DeviceNorm {
    CUdeviceptr weight = 0, bias = 0;  // [n_embd] floats; bias 0: none
};

// The neurons of one feed-forward network that are kept, one in each slot: at first in ascending
// order of their numbers, later in any where a NeuronMover exchanges them with the host's. Which
// ones they are may change between steps, but not where the tables are, nor how many.
struct DeviceFfn {
    size_t index = 0;  // among all that are kept
    NeuronShard resident, rest;
    NeuronWeights weights;
    NeuronList list;                 // of all that are kept
    CUdeviceptr slot_of_neuron = 0;  // [n_ff] int32, -1 where a neuron is not kept
    CUdeviceptr neuron_of_slot = 0;  // [n_slots] int32
    DeviceWeight down;               // [n_embd][n_slots] where down is not stored by neuron
    CUdeviceptr down_bias = 0;       // [n_embd] floats; 0: none
    int64_t n_kept = 0, n_rest = 0;
    bool has_predictor = false;  // kept, too

    int64_t n_slots() const { return n_kept; }
    bool whole() const { return n_rest == 0; }
    // All that are kept, one in each place that is its slot: not ascending, and without bounds.
    NeuronList list_by_slot() const { return {neuron_of_slot, 0, list.n, 0, list.capacity}; }
    // What writes the three tables: they lie one after the other, from slot_of_neuron on.
    size_t table_bytes() const;
    void write_tables(std::span<const int32_t> neuron_of_slot, std::byte* out) const;
    // Rows of the records as matrices.
    DeviceWeight gate() const {
        return {weights.gate_type, weights.records + weights.layout.gate_offset, n_slots(),
                weights.n_embd, weights.layout.stride};
    }
    DeviceWeight up() const {
        return {weights.up_type, weights.records + weights.layout.up_offset, n_slots(),
                weights.n_embd, weights.layout.stride};
    }
    // Down as it is stored by neuron.
    DeviceWeight by_neuron() const {
        return {weights.down_type, weights.records + weights.layout.down_offset, n_slots(),
                weights.n_embd, weights.layout.stride};
    }
};

// How a neuron's rows lie in its record.
NeuronLayout record_layout(const FeedForward& ffn);
// The record of one neuron, as the device has it.
void write_record(const FeedForward& ffn, const NeuronLayout& layout, int32_t neuron,
                  std::byte* out);
// Of one row of a weight the columns of those neurons, whole blocks side by side, as the device has
// it.
void write_columns(const Weight& w, int64_t row, std::span<const int32_t> neurons, std::byte* out);

class Weights {
  public:
    Weights(std::shared_ptr<Gpu> gpu, std::shared_ptr<Budget> budget);

    // Takes memory that copies of so many bytes in all will fill.
    void reserve(size_t n_bytes);
    void keep(const Linear& linear);
    void keep(const Norm& norm);
    // After its predictor, if that is kept.
    void keep(const FeedForward& ffn, NeuronShard resident, NeuronShard rest);
    // What keep() takes of the memory reserved.
    static size_t bytes_of(const Linear& linear);
    static size_t bytes_of(const Norm& norm);
    static size_t bytes_of(const FeedForward& ffn, int64_t n_neurons);

    // Of what was reserved, for uses of the caller's own.
    CUdeviceptr allocate(size_t n_bytes);
    // The networks of which the host keeps some neurons and the device others, which can change.
    std::vector<std::pair<const FeedForward*, DeviceFfn*>> movable();

    // Whether nothing of the networks kept is left to the host.
    bool all_resident() const { return all_resident_; }
    // Whether inputs of predictors are quantised.
    bool has_quantised_predictors() const { return has_quantised_predictors_; }
    size_t n_ffns() const { return ffns_.size(); }

    // Throw QI_INTERNAL when it was never kept.
    const DeviceLinear& find(const Linear& linear) const;
    const DeviceNorm& find(const Norm& norm) const;
    const DeviceFfn& find(const FeedForward& ffn) const;

  private:
    // Writes item `i` of an array into pinned memory at `out`.
    using WriteItem = std::function<void(int64_t i, std::byte* out)>;

    // Brings n items of `stride` bytes to the GPU, a few MiB at a time: threads write one part
    // while another is on its way.
    void upload(CUdeviceptr to, int64_t n, size_t stride, const WriteItem& write);
    CUdeviceptr upload_floats(const std::vector<float>& values);
    void keep_tables(std::span<const int32_t> neurons, DeviceFfn& kept);
    void keep_down(const Weight& down, std::span<const int32_t> neurons, DeviceFfn& kept);

    std::shared_ptr<Gpu> gpu_;
    std::shared_ptr<Budget> budget_;
    Stream stream_;
    PinnedMemory staging_[2];
    Event sent_[2];
    std::vector<DeviceMemory> memory_;
    size_t used_ = 0;  // of the last of them
    bool all_resident_ = true, has_quantised_predictors_ = false;
    std::unordered_map<const void*, DeviceLinear> linears_;
    std::unordered_map<const void*, DeviceNorm> norms_;
    std::unordered_map<const void*, DeviceFfn> ffns_;
};

}  // namespace qi::cuda
