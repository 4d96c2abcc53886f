// A processor with memory of its own: keeps copies of a model's weights there, and makes the
// devices that compute with them.
//
// What is kept is chosen by the engine, in view of the sizes told here. Everything taken counts
// against one budget, which is checked before the memory is asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/device.h"
#include "sparse/neuron_cache.h"
#include "sparse/shard.h"

namespace qi {

// What a context wants of the device made for it.
struct DeviceNeeds {
    int64_t n_batch = 0;  // tokens computed together at most
    int64_t n_seq = 0;
    int64_t n_pages = 0;  // of keys and values, of all sequences together
    KvLayout kv;          // of the layers on this device
    KvShare kv_share;
    std::vector<size_t> arrays;  // that allocate() will be asked for, in floats
    int64_t n_logits = 0;        // rows of logits, beside those, where the head is; else 0
    int64_t n_vocab = 0;
    int64_t n_head = 0;  // of queries
    int64_t n_embd = 0, n_ff = 0;
    int64_t predictor_rank = 0;  // 0: no predictors
    // A token's results depend on nothing else in its batch, nor on how a text is cut into batches.
    bool deterministic = false;

    bool operator==(const DeviceNeeds&) const = default;
};

// How neurons move between an accelerator and the host.
struct Moving {
    NeuronCache cache = NeuronCache::fixed;
    Speeds speeds;
    size_t room_bytes = 0;  // of what was reserved: where they arrive
};

class Accelerator {
  public:
    virtual ~Accelerator() = default;

    virtual std::string name() const = 0;  // "NVIDIA H100 80GB HBM3 (cuda:0)"
    // Makes ready for weights of these types and a context of these needs. What is free then can
    // all be given away: without a budget of its own, or with one beyond that, it is the budget
    // from then on, less what code for later contexts takes.
    virtual void prepare(std::span<const Type> weight_types, const DeviceNeeds& needs) = 0;
    virtual size_t budget() const = 0;
    virtual size_t used() const = 0;

    // Bytes that a copy takes, alignment included, once reserve() has made room for it.
    virtual size_t bytes_of(const Linear& linear) const = 0;
    virtual size_t bytes_of(const Norm& norm) const = 0;
    virtual size_t bytes_of(const FeedForward& ffn, int64_t n_neurons) const = 0;
    virtual size_t bytes_of(const DeviceNeeds& needs) const = 0;

    // Takes memory for copies of so many bytes in all, and what reserving costs beyond them.
    virtual void reserve(size_t n_bytes) = 0;
    virtual size_t reserve_overhead() const = 0;
    // Takes copies; they are found by the address of what they were made from.
    virtual void keep(const Linear& linear) = 0;
    virtual void keep(const Norm& norm) = 0;
    // `resident` here, `rest` with the host: together all neurons.
    virtual void keep(const FeedForward& ffn, NeuronShard resident, NeuronShard rest) = 0;

    // Room for so many neurons on their way, see Moving.
    virtual size_t bytes_to_move(const FeedForward& ffn, size_t n_neurons) const = 0;
    // How fast both sides compute neurons of a network, measured.
    virtual Speeds measure_speeds(const FeedForward& ffn, Device& host) = 0;
    // From now on neurons move, as contexts show which are active; once all are kept. Results then
    // depend, in their rounding, on where neurons are.
    virtual void move_neurons(const Moving& moving) = 0;
    virtual uint64_t n_moved() const = 0;
    // Those of a network that are here now, ascending.
    virtual std::vector<int32_t> neurons(const FeedForward& ffn) const = 0;

    // Gives up all copies and their memory; no device made here may be alive.
    virtual void drop() = 0;

    // `host` computes what is not kept here. Takes all memory that the needs name.
    virtual std::unique_ptr<Device> make_device(const DeviceNeeds& needs, Device& host) = 0;
};

// device: "cuda" or "cuda:N". budget: bytes, or none for all that is free once the kernels are
// loaded. Throws QI_DEVICE naming what is missing.
std::unique_ptr<Accelerator> make_accelerator(const std::string& device,
                                              std::optional<size_t> budget);

}  // namespace qi
