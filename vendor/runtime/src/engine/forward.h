// The forward pass: one function for every architecture.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "engine/stage.h"
#include "model/model.h"

namespace qi {

// Tokens computed together. Rows of one segment are consecutive, in order of position.
struct Batch {
    std::span<const int32_t> tokens;     // [n]
    std::span<const int32_t> positions;  // [n]
    std::span<const Segment> segments;
    std::span<const NeuronRule> rules;  // [n]
};

// What the layers' feed-forward networks are told and report besides activations.
struct FfnMonitor {
    float threshold = 0.0f;
    bool check = false;                 // this run's predictions are held against all gates
    std::vector<FfnCounters> counters;  // [n_layer]
    std::vector<uint64_t> activations;  // [n_layer][n_ff], or empty
};

// Logits that are wanted of some rows of a batch, and how many of each row's best ones.
struct HeadRequest {
    std::span<const int64_t> rows;  // none: no logits
    float* logits = nullptr;        // [rows.size()][n_vocab], in the last device's memory
    int64_t n_best = 0;
};

class ForwardPass {
  public:
    // cross_layer_from: see NeuronPolicy.
    ForwardPass(const Model& model, std::span<const Stage> stages, int64_t cross_layer_from);

    // The working space that runs of n tokens take on each device, in floats.
    static std::vector<size_t> array_sizes(const HyperParams& hp, int64_t n,
                                           int64_t cross_layer_from);
    // Takes it at once, for devices that must not run out of memory later.
    void reserve(int64_t n);

    // Runs all layers and the head. *layers_done counts up to n_layer while it works.
    void run(const Batch& batch, const HeadRequest& request, FfnMonitor& monitor,
             std::atomic<int64_t>* layers_done);

    // The final norm of some rows of the last run: [rows.size()][n_embd] in the device's memory,
    // valid until the next call of anything here.
    const float* final_norm(std::span<const int64_t> rows);
    // The head for more rows of the last run.
    void head(const HeadRequest& request);

    size_t scratch_bytes() const;

  private:
    // A stage and its working space.
    struct Part {
        Stage stage;
        DeviceArray residual;  // [n][n_embd]
        DeviceArray normed;    // [n][n_embd]
        DeviceArray qkv;       // [n][(n_head + 2 n_head_kv) · head_dim], or q, k and v one by one
        DeviceArray attended;  // [n][n_head · head_dim]
        // [n][n_embd] or [2][n][n_embd]: what a layer's predictor looks at, where it does not last;
        // with two, layers take turns.
        DeviceArray inputs;

        explicit Part(const Stage& given)
            : stage(given),
              residual(*given.device),
              normed(*given.device),
              qkv(*given.device),
              attended(*given.device),
              inputs(*given.device) {}
    };

    bool predicts_from_before(int64_t layer) const {
        return cross_layer_from_ > 0 && layer >= cross_layer_from_;
    }
    static size_t n_predictor_inputs(const HyperParams& hp, int64_t cross_layer_from);
    // Where what the predictor of a layer looks at is kept.
    float* predictor_input(Part& part, int64_t index, int64_t n);

    void cross(Part& from, Part& to, int64_t n);
    void embed(Part& part, const Batch& batch, float* x);
    void run_layer(Part& part, int64_t index, int64_t n, FfnMonitor& monitor, float* x);
    void attention(Part& part, int64_t index, int64_t n, const float* x, float* y);

    const Model& model_;
    const HyperParams& hp_;
    int64_t cross_layer_from_;
    std::deque<Part> parts_;
    AlignedBuffer<float> cos_sin_;    // [n][n_rot/2][2]
    AlignedBuffer<int32_t> shifted_;  // [n] rows of the position table
    AlignedBuffer<float> crossing_;   // [n][n_embd] on its way from one device to the next
};

}  // namespace qi
