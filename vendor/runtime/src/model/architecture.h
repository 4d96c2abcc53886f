// What distinguishes one architecture from another: a table of facts, and the hyper-parameters a
// file gives.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/device.h"
#include "gguf/file.h"

namespace qi {

enum class RopeKind { none, interleaved, neox };

struct Architecture {
    const char* name;  // general.architecture
    Norm::Kind norm;
    RopeKind rope;
    bool learned_positions;  // position_embd.weight, indexed by position + position_offset
    int position_offset;
    bool fused_qkv;          // attn_qkv holds all q rows, then k, then v
    bool required_biases;    // on norms and, unless the norms alone have them, on every projection
    bool parallel_residual;  // attention and FFN both read the layer's input; optional attn_norm_2
                             // feeds attention
    bool gated;
    const char* hidden_act;  // when the file does not say
    const char* sparse_act;  // the same for PowerInfer files, which hold ReLU models only
};

std::span<const Architecture> all_architectures();

// "silu", "relu", "gelu", "gelu_tanh", "relu_relu", "fatrelu:0.01"; nothing for other texts.
std::optional<HiddenAct> parse_hidden_act(const std::string& text);
std::string hidden_act_name(const HiddenAct& act);

struct RopeScaling {
    enum class Kind { none, linear, yarn };
    Kind kind = Kind::none;
    double factor = 1.0;
    double original_context = 0.0;
    double attn_factor = 1.0;
    double beta_fast = 32.0;
    double beta_slow = 1.0;
};

struct HyperParams {
    const Architecture* arch = nullptr;
    int64_t n_vocab = 0;
    int64_t n_embd = 0;
    int64_t n_layer = 0;
    int64_t n_head = 0;
    int64_t n_head_kv = 0;
    int64_t head_dim = 0;
    int64_t n_ff = 0;
    int64_t n_ctx_train = 0;
    int64_t sliding_window = 0;  // 0: none
    float norm_epsilon = 0.0f;
    HiddenAct act;
    float sparse_threshold = 0.0f;  // of the predictors
    int64_t n_rot = 0;
    double rope_base = 10000.0;
    RopeScaling rope_scaling;
};

// Reads and checks what the metadata says; hidden_act overrides the file's when not empty. n_vocab
// comes from the tensors.
HyperParams read_hyper_params(const gguf::File& file, const std::string& hidden_act);

}  // namespace qi
