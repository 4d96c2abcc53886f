// A model: hyper-parameters and weights by role, pointing into the file they came from.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/device.h"
#include "gguf/file.h"
#include "model/architecture.h"
#include "model/rope.h"

namespace qi {

struct Layer {
    Norm attn_norm;
    std::optional<Norm> attn_norm_2;  // parallel residual with two norms: this one feeds attention
    Linear qkv;                       // fused, or q, k and v apart
    Linear q, k, v;
    Linear attn_output;
    Norm ffn_norm;  // sequential residual only
    FeedForward ffn;
};

struct ModelOptions {
    std::string hidden_act;      // empty: from the file
    bool check_tensors = false;  // scan every weight for NaN and infinity
};

class Model {
  public:
    // Throws QI_FORMAT or QI_UNSUPPORTED naming the key or tensor, what was found and what would
    // have been right.
    Model(std::shared_ptr<const gguf::File> file, const ModelOptions& options);

    const gguf::File& file() const { return *file_; }
    const HyperParams& hyper_params() const { return hp_; }
    const Rope& rope() const { return rope_; }
    const std::vector<Layer>& layers() const { return layers_; }
    const Weight& token_embedding() const { return token_embedding_; }  // [n_vocab][n_embd]
    const Weight* position_embedding() const {                          // [n_positions][n_embd]
        return position_embedding_.data ? &position_embedding_ : nullptr;
    }
    const Norm& output_norm() const { return output_norm_; }
    const Linear& head() const { return head_; }  // [n_vocab][n_embd]
    bool tied_head() const { return tied_head_; }

    int64_t n_ctx_max() const;  // positions the model can address at all; 0: no limit
    uint64_t n_params() const { return n_params_; }
    uint64_t n_weight_bytes() const { return n_weight_bytes_; }
    // Weight bytes one decoded token reads when all neurons are computed, and those of its
    // feed-forward networks.
    uint64_t n_bytes_per_token() const;
    uint64_t n_ffn_bytes_per_token() const;
    int64_t predictor_rank() const;  // the largest of the layers'; 0 without predictors
    bool down_by_neuron() const;     // in all layers

  private:
    std::shared_ptr<const gguf::File> file_;
    HyperParams hp_;
    Rope rope_;
    std::vector<Layer> layers_;
    Weight token_embedding_{}, position_embedding_{};
    Norm output_norm_;
    Linear head_;
    bool tied_head_ = false;
    uint64_t n_params_ = 0;
    uint64_t n_weight_bytes_ = 0;
};

}  // namespace qi
