#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "base/error.h"
#include "base/log.h"
#include "quant/codec.h"

namespace qi {

namespace {

std::string shape_text(std::initializer_list<int64_t> dims) {
    std::string text = "[";
    for (int64_t d : dims)
        text += format("%s%lld", text.size() > 1 ? ", " : "", (long long)d);
    return text + "]";
}

// Finds tensors by name and checks type and shape; what it has handed out is "used".
class TensorBinder {
  public:
    explicit TensorBinder(const gguf::File& file) : file_(file) {}

    const char* path() const { return file_.path().c_str(); }
    bool is_powerinfer() const { return file_.is_powerinfer(); }
    bool has(const std::string& name) const { return file_.find_tensor(name) != nullptr; }

    // Counts a tensor, if it is there, as used.
    void know(const std::string& name) {
        if (const gguf::TensorInfo* info = file_.find_tensor(name)) used_.insert(info->name);
    }

    // rows 0 takes any number of rows.
    Weight matrix(const std::string& name, int64_t cols, int64_t rows) {
        const gguf::TensorInfo& info = find(name);
        const bool rows_fit = rows == 0 || int64_t(info.dims[1]) == rows;
        if (info.n_dims > 2 || int64_t(info.dims[0]) != cols || !rows_fit)
            fail(QI_FORMAT, "%s: tensor %s has shape %s, expected %s", file_.path().c_str(),
                 name.c_str(), shape(info).c_str(),
                 rows ? shape_text({cols, rows}).c_str()
                      : format("[%lld, any]", (long long)cols).c_str());
        const Type type = Type(info.type);
        return {type, info.data, int64_t(info.dims[1]), cols, row_bytes(type, cols)};
    }

    // One-dimensional tensors are small and used as floats: decoded once.
    std::vector<float> vector(const std::string& name, int64_t n) {
        const gguf::TensorInfo& info = find(name);
        if (info.n_dims != 1 || int64_t(info.dims[0]) != n)
            fail(QI_FORMAT, "%s: tensor %s has shape %s, expected %s", file_.path().c_str(),
                 name.c_str(), shape(info).c_str(), shape_text({n}).c_str());
        std::vector<float> values(static_cast<size_t>(n));
        decode(Type(info.type), info.data, n, values.data());
        return values;
    }
    std::vector<float> optional_vector(const std::string& name, int64_t n) {
        return has(name) ? vector(name, n) : std::vector<float>();
    }

    void warn_about_unused() const {
        std::string names;
        size_t n = 0;
        for (const gguf::TensorInfo& info : file_.tensors()) {
            if (used_.contains(info.name)) continue;
            if (++n <= 3) names += (names.empty() ? "" : ", ") + std::string(info.name);
        }
        if (n > 3) names += ", …";
        if (n > 0)
            log(LogLevel::warning,
                format("%s: %zu tensors are not part of this architecture and stay unused: %s",
                       file_.path().c_str(), n, names.c_str()));
    }

  private:
    const gguf::TensorInfo& find(const std::string& name) {
        const gguf::TensorInfo* info = file_.find_tensor(name);
        if (!info) fail(QI_FORMAT, "%s: tensor %s is missing", file_.path().c_str(), name.c_str());
        if (!find_layout(info->type))
            fail(QI_UNSUPPORTED, "%s: tensor %s is of type number %d, which GGUF does not define",
                 file_.path().c_str(), name.c_str(), info->type);
        if (!find_type(info->type))
            fail(QI_UNSUPPORTED,
                 "%s: tensor %s is of type %s, which this runtime does not compute with",
                 file_.path().c_str(), name.c_str(), gguf_type_name(info->type));
        if (!info->data) fail(QI_ARGUMENT, "%s: opened without its tensors", file_.path().c_str());
        used_.insert(info->name);
        return *info;
    }
    static std::string shape(const gguf::TensorInfo& info) {
        std::string text = "[";
        for (uint32_t i = 0; i < info.n_dims; ++i)
            text += format("%s%llu", i ? ", " : "", (unsigned long long)info.dims[i]);
        return text + "]";
    }

    const gguf::File& file_;
    std::unordered_set<std::string_view> used_;
};

// Binds the tensors of one architecture by their GGUF names.
class Builder {
  public:
    Builder(const gguf::File& file, const HyperParams& hp) : bind_(file), hp_(hp) {}

    Norm norm(const std::string& name) {
        Norm norm{hp_.arch->norm, hp_.norm_epsilon, bind_.vector(name + ".weight", hp_.n_embd), {}};
        if (hp_.arch->norm == Norm::Kind::layer)
            norm.bias = bind_.vector(name + ".bias", hp_.n_embd);
        return norm;
    }

    Linear linear(const std::string& name, int64_t cols, int64_t rows) {
        Linear linear{bind_.matrix(name + ".weight", cols, rows), {}};
        linear.bias = hp_.arch->required_biases ? bind_.vector(name + ".bias", rows)
                                                : bind_.optional_vector(name + ".bias", rows);
        return linear;
    }

    Layer layer(int64_t index) {
        const std::string prefix = format("blk.%lld.", (long long)index);
        const int64_t q_rows = hp_.n_head * hp_.head_dim, kv_rows = hp_.n_head_kv * hp_.head_dim;
        Layer layer;
        layer.attn_norm = norm(prefix + "attn_norm");
        if (hp_.arch->parallel_residual && bind_.has(prefix + "attn_norm_2.weight"))
            layer.attn_norm_2 = norm(prefix + "attn_norm_2");
        if (hp_.arch->fused_qkv) {
            layer.qkv = linear(prefix + "attn_qkv", hp_.n_embd, q_rows + 2 * kv_rows);
        } else {
            layer.q = linear(prefix + "attn_q", hp_.n_embd, q_rows);
            layer.k = linear(prefix + "attn_k", hp_.n_embd, kv_rows);
            layer.v = linear(prefix + "attn_v", hp_.n_embd, kv_rows);
        }
        layer.attn_output = linear(prefix + "attn_output", q_rows, hp_.n_embd);
        if (!hp_.arch->parallel_residual) layer.ffn_norm = norm(prefix + "ffn_norm");
        layer.ffn.gated = hp_.arch->gated;
        if (hp_.arch->gated) layer.ffn.gate = linear(prefix + "ffn_gate", hp_.n_embd, hp_.n_ff);
        layer.ffn.up = linear(prefix + "ffn_up", hp_.n_embd, hp_.n_ff);
        down(prefix, layer.ffn);
        layer.ffn.act = hp_.act;
        return layer;
    }

    // By neuron where the file has it so, as PowerInfer files do.
    void down(const std::string& prefix, FeedForward& ffn) {
        ffn.down_by_neuron = bind_.has(prefix + "ffn_down_t.weight");
        if (!ffn.down_by_neuron) {
            if (bind_.is_powerinfer()) refuse_down(prefix);
            ffn.down = linear(prefix + "ffn_down", hp_.n_ff, hp_.n_embd);
            return;
        }
        ffn.down.weight = bind_.matrix(prefix + "ffn_down_t.weight", hp_.n_embd, hp_.n_ff);
        const bool renamed = bind_.has(prefix + "ffn_down_t.bias");
        const std::string bias = prefix + (renamed ? "ffn_down_t.bias" : "ffn_down.bias");
        ffn.down.bias = hp_.arch->required_biases ? bind_.vector(bias, hp_.n_embd)
                                                  : bind_.optional_vector(bias, hp_.n_embd);
    }

    // Of a PowerInfer file that has no ffn_down_t.
    [[noreturn]] void refuse_down(const std::string& prefix) const {
        const char* path = bind_.path();
        if (!bind_.has(prefix + "ffn_down.weight"))
            fail(QI_FORMAT, "%s: tensor %sffn_down_t.weight is missing", path, prefix.c_str());
        fail(QI_FORMAT,
             "%s: holds the tensor %sffn_down.weight, but begins with PWRI, and such files have "
             "%sffn_down_t.weight, a row per neuron; an ordinary model begins with GGUF, and "
             "qinfer.tools.neuron_major writes its twin by neuron",
             path, prefix.c_str(), prefix.c_str());
    }

    // Predictors of all layers. A model runs without them as well: a faulty one is left out with a
    // warning, and one layer without makes all do without. PowerInfer files are made for them, so
    // there their absence is said, too.
    void predictors(std::vector<Layer>& layers) {
        std::string problem;
        size_t n_found = 0;
        for (size_t i = 0; i < layers.size(); ++i) {
            const std::string fc1 = format("blk.%zu.fc1.weight", i),
                              fc2 = format("blk.%zu.fc2.weight", i);
            // Also of what is left out: the one warning is enough.
            bind_.know(fc1);
            bind_.know(fc2);
            if (!problem.empty() || (!bind_.has(fc1) && !bind_.has(fc2))) continue;
            try {
                Predictor predictor;
                predictor.fc1.weight = bind_.matrix(fc1, hp_.n_embd, 0);
                predictor.fc2.weight = bind_.matrix(fc2, predictor.fc1.weight.n_rows, hp_.n_ff);
                layers[i].ffn.predictor = std::move(predictor);
                ++n_found;
            } catch (const Error& error) {
                problem = error.what();
            }
        }
        if (n_found == layers.size()) return;
        const bool was_due = bind_.is_powerinfer();
        if (n_found == 0 && problem.empty() && !was_due) return;
        if (problem.empty())
            problem = format("%s: %zu of %zu layers have a predictor (blk.N.fc1.weight and fc2)",
                             bind_.path(), n_found, layers.size());
        const bool is_exact = was_due && is_sparse(hp_.act);
        log(LogLevel::warning,
            format("no predictors will be used: %s%s", problem.c_str(),
                   is_exact ? "; it runs in the mode exact unless another is asked for" : ""));
        for (Layer& layer : layers)
            layer.ffn.predictor.reset();
    }

    TensorBinder& bind() { return bind_; }

  private:
    TensorBinder bind_;
    const HyperParams& hp_;
};

void check_finite(const gguf::File& file) {
    std::vector<float> row;
    for (const gguf::TensorInfo& info : file.tensors()) {
        const TypeTraits* type = find_type(info.type);
        if (!type) continue;
        const auto n_cols = int64_t(info.dims[0]);
        const int64_t n_rows = int64_t(info.dims[1] * info.dims[2] * info.dims[3]);
        const size_t bytes = row_bytes(type->type, n_cols);
        row.resize(size_t(n_cols));
        for (int64_t r = 0; r < n_rows; ++r) {
            decode(type->type, info.data + size_t(r) * bytes, n_cols, row.data());
            for (int64_t c = 0; c < n_cols; ++c) {
                if (!std::isfinite(row[size_t(c)]))
                    fail(QI_FORMAT, "%s: tensor %s holds %g at row %lld, column %lld",
                         file.path().c_str(), std::string(info.name).c_str(),
                         double(row[size_t(c)]), (long long)r, (long long)c);
            }
        }
    }
}

}  // namespace

Model::Model(std::shared_ptr<const gguf::File> file, const ModelOptions& options)
    : file_(std::move(file)), hp_(read_hyper_params(*file_, options.hidden_act)) {
    Builder build(*file_, hp_);
    TensorBinder& bind = build.bind();

    token_embedding_ = bind.matrix("token_embd.weight", hp_.n_embd, 0);
    hp_.n_vocab = token_embedding_.n_rows;
    if (const gguf::KeyValue* tokens = file_->find("tokenizer.ggml.tokens")) {
        if (int64_t(tokens->n_items) > hp_.n_vocab)
            fail(QI_FORMAT,
                 "%s: the vocabulary has %llu tokens, token_embd.weight has rows for %lld",
                 file_->path().c_str(), (unsigned long long)tokens->n_items,
                 (long long)hp_.n_vocab);
    }
    if (hp_.arch->learned_positions) {
        position_embedding_ = bind.matrix("position_embd.weight", hp_.n_embd, 0);
        if (position_embedding_.n_rows <= hp_.arch->position_offset)
            fail(QI_FORMAT, "%s: tensor position_embd.weight has %lld rows, expected more than %d",
                 file_->path().c_str(), (long long)position_embedding_.n_rows,
                 hp_.arch->position_offset);
    }
    if (hp_.arch->rope != RopeKind::none)
        rope_ = Rope(hp_, bind.optional_vector("rope_freqs.weight", hp_.n_rot / 2));
    for (int64_t i = 0; i < hp_.n_layer; ++i)
        layers_.push_back(build.layer(i));
    build.predictors(layers_);
    output_norm_ = build.norm("output_norm");
    tied_head_ = !bind.has("output.weight");
    if (tied_head_)
        head_.weight = token_embedding_;
    else
        head_.weight = bind.matrix("output.weight", hp_.n_embd, hp_.n_vocab);
    bind.warn_about_unused();

    for (const gguf::TensorInfo& info : file_->tensors()) {
        n_params_ += info.dims[0] * info.dims[1] * info.dims[2] * info.dims[3];
        n_weight_bytes_ += info.n_bytes;
    }
    if (options.check_tensors) check_finite(*file_);
}

int64_t Model::n_ctx_max() const {
    return position_embedding_.data ? position_embedding_.n_rows - hp_.arch->position_offset : 0;
}

namespace {
uint64_t bytes_of(const Linear& linear) {
    return uint64_t(linear.weight.n_rows) * linear.weight.row_bytes +
           linear.bias.size() * sizeof(float);
}
}  // namespace

uint64_t Model::n_ffn_bytes_per_token() const {
    uint64_t total = 0;
    for (const Layer& layer : layers_)
        total += bytes_of(layer.ffn.gate) + bytes_of(layer.ffn.up) + bytes_of(layer.ffn.down);
    return total;
}

uint64_t Model::n_bytes_per_token() const {
    uint64_t total = bytes_of(head_) + token_embedding_.row_bytes + position_embedding_.row_bytes;
    for (const Layer& layer : layers_) {
        total += bytes_of(layer.qkv) + bytes_of(layer.q) + bytes_of(layer.k) + bytes_of(layer.v);
        total += bytes_of(layer.attn_output);
    }
    return total + n_ffn_bytes_per_token();
}

int64_t Model::predictor_rank() const {
    int64_t rank = 0;
    for (const Layer& layer : layers_)
        if (layer.ffn.predictor) rank = std::max(rank, layer.ffn.predictor->fc1.weight.n_rows);
    return rank;
}

bool Model::down_by_neuron() const {
    return std::all_of(layers_.begin(), layers_.end(),
                       [](const Layer& layer) { return layer.ffn.down_by_neuron; });
}

}  // namespace qi
