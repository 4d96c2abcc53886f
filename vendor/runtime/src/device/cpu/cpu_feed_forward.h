// Feed-forward networks on the CPU: all neurons, or those that a token's rule chooses.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "device/cpu/cpu_products.h"
#include "device/device.h"
#include "sparse/partition.h"

namespace qi {

class CpuFeedForward {
  public:
    explicit CpuFeedForward(CpuProducts& products) : products_(products) {}

    void compute(const FeedForward& ffn, std::span<const NeuronRule> rules, const FfnBatch& batch,
                 float* y);
    size_t scratch_bytes() const;

  private:
    // Tokens of one rule.
    struct Group {
        NeuronRule rule;
        const float *x, *z;  // [n_tokens][n_embd]
        int64_t n_tokens;
        float* y;  // [n_tokens][n_embd]
        const uint32_t* names = nullptr;
    };
    // What one partition did, added up afterwards.
    struct PartitionCounts {
        uint64_t n_active, n_predicted, n_first_rows, n_up_rows, n_down_rows;
    };

    void compute_shard(const FeedForward& ffn, std::span<const NeuronRule> rules,
                       const FfnBatch& batch, float* y);
    void compute_group(const FeedForward& ffn, const FfnBatch& batch, const Group& group);
    void compute_all_neurons(const FeedForward& ffn, const FfnBatch& batch, const Group& group);
    void compute_chosen(const FeedForward& ffn, const FfnBatch& batch, const Group& group);
    void choose_and_add(const FeedForward& ffn, const FfnBatch& batch, const Group& group,
                        const std::byte* prepared, int64_t partition, std::byte* room,
                        PartitionCounts& counts);
    void activate(const FeedForward& ffn, const float* x, int64_t n_tokens, float* hidden);
    const float* predict(const FeedForward& ffn, const FfnBatch& batch, const Group& group);
    void check_predictions(const FeedForward& ffn, const FfnBatch& batch, const Group& group,
                           const std::byte* prepared, const float* predictions);
    void check_names(const FeedForward& ffn, const FfnBatch& batch, const Group& group,
                     const std::byte* prepared);
    void project_down(const FeedForward& ffn, int64_t n_tokens, float* y);
    uint64_t project_down_of_chosen(const FeedForward& ffn, int64_t n_tokens, bool bias, float* y);
    const int32_t* all_neurons(int64_t n_ff);
    void add_down_of_few(const FeedForward& ffn, int64_t n_tokens, float* y);
    void add_down_of_many(const FeedForward& ffn, int64_t n_tokens, float* y);
    void add_partial_sums(const FeedForward& ffn, int64_t n_tokens, bool bias, float* y);

    CpuProducts& products_;
    AlignedBuffer<float> hidden_;       // [n_tokens][n_ff]
    AlignedBuffer<float> low_;          // [n_tokens][rank]
    AlignedBuffer<float> predictions_;  // [n_tokens][n_ff]
    AlignedBuffer<float> gates_;        // [n_tokens][n_ff]
    AlignedBuffer<float> partial_;      // [n_partitions][n_tokens][n_embd]
    AlignedBuffer<float> gathered_;     // x, z and y of a group that is not the whole batch
    AlignedBuffer<int32_t> neurons_;    // 0, 1, …, n_ff - 1
    std::vector<int32_t> groups_;       // of down's columns
};

}  // namespace qi
