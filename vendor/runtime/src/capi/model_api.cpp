// qi_model_*: checks and translation, nothing else.
#include <algorithm>
#include <memory>

#include "capi/guard.h"
#include "capi/handles.h"
#include "kernels/attention.h"

using namespace qi;

int32_t qi_model_load(const qi_gguf* file, const qi_model_params* params, qi_model** out,
                      qi_error* error) {
    return guard(error, [&] {
        require_pointer(file, "file");
        require_pointer(params, "params");
        require_pointer(out, "out");
        ModelOptions options;
        if (params->hidden_act) options.hidden_act = params->hidden_act;
        options.check_tensors = params->check_tensors != 0;
        *out = new qi_model{std::make_shared<const Model>(file->file, options)};
    });
}

void qi_model_close(qi_model* model) {
    delete model;
}

int32_t qi_model_get_info(const qi_model* model, qi_model_info* out) {
    if (!model || !out) return QI_ARGUMENT;
    const Model& m = *model->model;
    const HyperParams& hp = m.hyper_params();
    *out = {};
    copy_text(out->architecture, hp.arch->name);
    copy_text(out->hidden_act, hidden_act_name(hp.act));
    out->n_vocab = int32_t(hp.n_vocab);
    out->n_embd = int32_t(hp.n_embd);
    out->n_layer = int32_t(hp.n_layer);
    out->n_head = int32_t(hp.n_head);
    out->n_head_kv = int32_t(hp.n_head_kv);
    out->head_dim = int32_t(hp.head_dim);
    out->n_ff = int32_t(hp.n_ff);
    out->n_ctx_train = int32_t(hp.n_ctx_train);
    out->n_ctx_max = int32_t(m.n_ctx_max());
    out->sliding_window = int32_t(hp.sliding_window);
    out->is_powerinfer = m.file().is_powerinfer();
    out->tied_head = m.tied_head();
    out->has_sparse_act = is_sparse(hp.act);
    out->predictor_rank = int32_t(m.predictor_rank());
    out->down_by_neuron = m.down_by_neuron();
    out->sparse_threshold = hp.sparse_threshold;
    out->n_params = m.n_params();
    out->n_weight_bytes = m.n_weight_bytes();
    out->n_bytes_per_token = m.n_bytes_per_token();
    out->n_ffn_bytes_per_token = m.n_ffn_bytes_per_token();
    out->kv_bytes_per_token_f16 = uint64_t(hp.n_layer) * uint64_t(hp.n_head_kv) *
                                  kernels::kv_head_bytes(Type::f16, hp.head_dim) /
                                  kernels::page_size;
    return QI_OK;
}
