// A processor with memory of its own: keeps copies of a model's weights there, and makes the
// devices that compute with them.
//
// What is kept is chosen by the engine, in view of the sizes told here. Everything taken counts
// against one budget, which is checked before the memory is asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "device/device.h"
#include "sparse/shard.h"

namespace qi {

// What a context wants of the device made for it.
struct DeviceNeeds {
    int64_t n_batch = 0;    // tokens computed together at most
    int64_t n_seq = 0;      // sequences
    int64_t n_pages = 0;    // of keys and values, in all sequences together
    int64_t width_max = 0;  // of activations
    int64_t n_ff = 0;
    int64_t predictor_rank = 0;
    int64_t n_vocab = 0;
    int64_t n_embd = 0;
    KvLayout kv;  // of the layers on this device
};

class Accelerator {
  public:
    virtual ~Accelerator() = default;

    virtual size_t budget() const = 0;
    virtual size_t used() const = 0;

    // Bytes that a copy takes, alignment included.
    virtual size_t bytes_of(const Linear& linear) const = 0;
    virtual size_t bytes_of(const Norm& norm) const = 0;
    virtual size_t bytes_of(const FeedForward& ffn, int64_t n_neurons) const = 0;
    virtual size_t bytes_of(const DeviceNeeds& needs) const = 0;

    // Takes copies; they are found by the address of what they were made from.
    virtual void keep(const Linear& linear) = 0;
    virtual void keep(const Norm& norm) = 0;
    // `resident` here, `rest` with the host: together all neurons.
    virtual void keep(const FeedForward& ffn, NeuronShard resident, NeuronShard rest) = 0;

    // `host` computes what is not kept here.
    virtual std::unique_ptr<Device> make_device(const DeviceNeeds& needs, Device& host) = 0;
};

}  // namespace qi
