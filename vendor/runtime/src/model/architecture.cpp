#include "model/architecture.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace qi {

namespace {

using NormIs = Norm::Kind;

// clang-format off
constexpr std::array architectures{
    //           name      norm         rope                   learned offset fused  biases parallel gated hidden_act  sparse_act
    Architecture{"llama",  NormIs::rms,    RopeKind::interleaved, false,  0,     false, false, false,   true,  "silu",      "relu"},
    Architecture{"qwen2",  NormIs::rms,    RopeKind::neox,        false,  0,     false, false, false,   true,  "silu",      "relu"},
    Architecture{"falcon", NormIs::layer,  RopeKind::neox,        false,  0,     true,  false, true,    false, "gelu",      "relu"},
    Architecture{"opt",    NormIs::layer,  RopeKind::none,        true,   2,     false, true,  false,   false, "relu",      "relu"},
    Architecture{"bamboo", NormIs::rms,    RopeKind::interleaved, false,  0,     false, false, false,   true,  "relu_relu", "relu_relu"},
};
// clang-format on

// Larger than any model, small enough that products of two stay far from overflow.
constexpr uint64_t size_limit = 1u << 26;

struct ActName {
    const char* name;
    HiddenAct::Kind kind;
};
constexpr std::array act_names{
    ActName{"silu", HiddenAct::Kind::silu},
    ActName{"relu", HiddenAct::Kind::relu},
    ActName{"gelu", HiddenAct::Kind::gelu_erf},
    ActName{"gelu_tanh", HiddenAct::Kind::gelu_tanh},
    ActName{"relu_relu", HiddenAct::Kind::relu_relu},
};

// Reads `{architecture}.name` keys with range checks whose messages name the key.
class Reader {
  public:
    Reader(const gguf::File& file, const std::string& architecture)
        : file_(file), prefix_(architecture + ".") {}

    int64_t size(const char* name) const {
        const std::string key = prefix_ + name;
        return checked(key, file_.require_uint(key));
    }
    int64_t size_or(const char* name, int64_t fallback) const {
        const std::string key = prefix_ + name;
        const auto value = file_.get_uint(key);
        return value ? checked(key, *value) : fallback;
    }
    double number_or(const char* name, double fallback, double low, double high) const {
        const std::string key = prefix_ + name;
        const auto value = file_.get_float(key);
        if (!value) return fallback;
        if (!(*value >= low && *value <= high))
            fail(QI_FORMAT, "%s: %s is %g, expected %g to %g", file_.path().c_str(), key.c_str(),
                 *value, low, high);
        return *value;
    }
    std::string key(const char* name) const { return prefix_ + name; }
    bool has(const char* name) const { return file_.find(prefix_ + name) != nullptr; }

  private:
    int64_t checked(const std::string& key, uint64_t value) const {
        if (value < 1 || value > size_limit)
            fail(QI_FORMAT, "%s: %s is %llu, expected 1 to %llu", file_.path().c_str(), key.c_str(),
                 (unsigned long long)value, (unsigned long long)size_limit);
        return int64_t(value);
    }
    const gguf::File& file_;
    std::string prefix_;
};

RopeScaling read_rope_scaling(const gguf::File& file, const Reader& read, int64_t n_ctx_train) {
    RopeScaling scaling;
    const double old_style = read.number_or("rope.scale_linear", 1.0, 1e-6, 1e6);
    const auto type = file.get_string(read.key("rope.scaling.type"));
    scaling.factor = read.number_or("rope.scaling.factor", old_style, 1e-6, 1e6);
    scaling.original_context =
        double(read.size_or("rope.scaling.original_context_length", n_ctx_train));
    if (!type)
        scaling.kind = scaling.factor != 1.0 ? RopeScaling::Kind::linear : RopeScaling::Kind::none;
    else if (*type == "none")
        scaling.kind = RopeScaling::Kind::none;
    else if (*type == "linear")
        scaling.kind = RopeScaling::Kind::linear;
    else if (*type == "yarn")
        scaling.kind = RopeScaling::Kind::yarn;
    else
        fail(QI_UNSUPPORTED, "%s: %s is \"%s\"; known are none, linear and yarn",
             file.path().c_str(), read.key("rope.scaling.type").c_str(), type->c_str());
    scaling.attn_factor = read.number_or("rope.scaling.attn_factor", 1.0, 1e-6, 1e6);
    scaling.beta_fast = read.number_or("rope.scaling.yarn_beta_fast", 32.0, 1e-6, 1e6);
    scaling.beta_slow = read.number_or("rope.scaling.yarn_beta_slow", 1.0, 1e-6, 1e6);
    return scaling;
}

// QI_UNSUPPORTED naming the file, with the list of known names.
const Architecture& find_architecture(const std::string& name, const char* path) {
    std::string known;
    for (const Architecture& arch : architectures) {
        if (name == arch.name) return arch;
        known += known.empty() ? "" : ", ";
        known += arch.name;
    }
    fail(QI_UNSUPPORTED, "%s: general.architecture is %s; this runtime knows %s", path,
         quoted(name).c_str(), known.c_str());
}

// Refuses a file that holds what only PowerInfer's files do and begins as others, where the
// architecture's name means another activation than there: one of the two is wrong.
void refuse_other_magic(const gguf::File& file, const Architecture& arch) {
    if (file.is_powerinfer() || std::strcmp(arch.hidden_act, arch.sparse_act) == 0) return;
    for (const gguf::TensorInfo& tensor : file.tensors()) {
        if (!tensor.name.starts_with("blk.")) continue;
        for (const char* kind : {".ffn_down_t.weight", ".fc1.weight", ".fc2.weight"}) {
            if (tensor.name.ends_with(kind))
                fail(QI_FORMAT,
                     "%s: tensor %s belongs to PowerInfer's files, which begin with PWRI and where "
                     "%s has the activation %s; this one begins with GGUF, where that is %s, and "
                     "has no key qinfer.hidden_act: either would be right, or hidden_act given by "
                     "the caller",
                     file.path().c_str(), std::string(tensor.name).c_str(), arch.name,
                     arch.sparse_act, arch.hidden_act);
        }
    }
}

// The activation that the caller asks for, else the file, else the architecture. What is wrong with
// it is told of whoever named it: QI_ARGUMENT of the caller, QI_UNSUPPORTED of the file.
HiddenAct choose_hidden_act(const gguf::File& file, const Architecture& arch,
                            const std::string& asked) {
    const qi_status status = asked.empty() ? QI_UNSUPPORTED : QI_ARGUMENT;
    const std::string source = asked.empty() ? file.path() + ": qinfer.hidden_act" : "hidden_act";
    std::optional<std::string> given = asked;
    if (asked.empty()) given = file.get_string("qinfer.hidden_act");
    if (!given) refuse_other_magic(file, arch);
    const std::string text =
        given.value_or(file.is_powerinfer() ? arch.sparse_act : arch.hidden_act);
    const auto act = parse_hidden_act(text);
    if (!act)
        fail(status,
             "%s is %s, not one of silu, relu, gelu, gelu_tanh, relu_relu, fatrelu:<threshold of 0 "
             "or more>",
             source.c_str(), quoted(text).c_str());
    if (act->kind == HiddenAct::Kind::relu_relu && !arch.gated)
        fail(status, "%s is relu_relu, which needs a gate; architecture %s has none",
             source.c_str(), arch.name);
    return *act;
}

}  // namespace

std::span<const Architecture> all_architectures() {
    return architectures;
}

std::optional<HiddenAct> parse_hidden_act(const std::string& text) {
    for (const ActName& act : act_names)
        if (text == act.name) return HiddenAct{act.kind, 0.0f};
    const std::string prefix = "fatrelu:";
    if (text.starts_with(prefix)) {
        float threshold = 0.0f;
        const char* end = text.data() + text.size();
        const auto [stop, problem] = std::from_chars(text.data() + prefix.size(), end, threshold);
        if (problem == std::errc() && stop == end && std::isfinite(threshold) && threshold >= 0.0f)
            return HiddenAct{HiddenAct::Kind::fatrelu, threshold};
    }
    return std::nullopt;
}

std::string hidden_act_name(const HiddenAct& act) {
    for (const ActName& named : act_names)
        if (act.kind == named.kind) return named.name;
    return format("fatrelu:%g", double(act.threshold));
}

HyperParams read_hyper_params(const gguf::File& file, const std::string& hidden_act) {
    const char* path = file.path().c_str();
    HyperParams hp;
    const std::string name = file.require_string("general.architecture");
    hp.arch = &find_architecture(name, path);
    const Reader read(file, name);

    hp.n_embd = read.size("embedding_length");
    hp.n_layer = read.size("block_count");
    hp.n_ff = read.size("feed_forward_length");
    hp.n_ctx_train = read.size("context_length");
    hp.n_head = read.size("attention.head_count");
    hp.n_head_kv = read.size_or("attention.head_count_kv", hp.n_head);
    if (hp.n_head % hp.n_head_kv != 0)
        fail(QI_FORMAT, "%s: %lld heads cannot share %lld KV heads evenly", path,
             (long long)hp.n_head, (long long)hp.n_head_kv);
    if (!read.has("attention.key_length") && hp.n_embd % hp.n_head != 0)
        fail(QI_FORMAT, "%s: embedding_length %lld is not a multiple of head_count %lld", path,
             (long long)hp.n_embd, (long long)hp.n_head);
    hp.head_dim = read.size_or("attention.key_length", hp.n_embd / hp.n_head);
    if (read.size_or("attention.value_length", hp.head_dim) != hp.head_dim)
        fail(QI_UNSUPPORTED, "%s: keys and values of different length", path);
    if (hp.head_dim % 2 != 0 || hp.head_dim > 256)
        fail(QI_UNSUPPORTED, "%s: heads of %lld dimensions; even numbers up to 256 are supported",
             path, (long long)hp.head_dim);
    if (file.get_uint(read.key("expert_count")).value_or(0) > 0)
        fail(QI_UNSUPPORTED, "%s: mixture-of-experts models are not supported", path);
    if (const auto window = file.get_uint(read.key("attention.sliding_window")))
        hp.sliding_window = int64_t(std::min<uint64_t>(*window, size_limit));

    const char* epsilon = hp.arch->norm == Norm::Kind::rms ? "attention.layer_norm_rms_epsilon"
                                                           : "attention.layer_norm_epsilon";
    // PowerInfer's OPT files leave it out; 1e-5 is what the model was trained with.
    if (!read.has(epsilon) && name != "opt") file.require_float(read.key(epsilon));
    hp.norm_epsilon = float(read.number_or(epsilon, 1e-5, 0.0, 1.0));

    hp.act = choose_hidden_act(file, *hp.arch, hidden_act);

    if (const auto threshold = file.get_float("powerinfer.sparse_threshold")) {
        hp.sparse_threshold = float(*threshold);
        if (!std::isfinite(hp.sparse_threshold))
            fail(QI_FORMAT, "%s: powerinfer.sparse_threshold is %g, expected a finite number", path,
                 *threshold);
    }

    if (hp.arch->rope != RopeKind::none) {
        hp.n_rot = read.size_or("rope.dimension_count", hp.head_dim);
        if (hp.n_rot % 2 != 0 || hp.n_rot > hp.head_dim)
            fail(QI_FORMAT, "%s: %s is %lld, expected an even number up to %lld", path,
                 read.key("rope.dimension_count").c_str(), (long long)hp.n_rot,
                 (long long)hp.head_dim);
        hp.rope_base = read.number_or("rope.freq_base", 10000.0, 1.0, 1e12);
        hp.rope_scaling = read_rope_scaling(file, read, hp.n_ctx_train);
    }
    return hp;
}

}  // namespace qi
