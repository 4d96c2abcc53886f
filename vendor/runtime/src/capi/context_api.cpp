// qi_context_*: checks, the guard against two threads at once, nothing else.
#include <algorithm>
#include <deque>
#include <set>
#include <vector>

#include "capi/guard.h"
#include "capi/handles.h"
#include "engine/context.h"

using namespace qi;

namespace {

template <typename F>
int32_t enter(qi_context* context, qi_error* error, F&& body,
              const char* function = __builtin_FUNCTION()) {
    return guard(
        error,
        [&] {
            require_pointer(context, "context");
            Entered entered(context->busy, "context");
            body(context->context);
        },
        function);
}

NeuronRule rule(int32_t number, const char* name) {
    if (number < QI_RULE_ALL || number > QI_RULE_PREDICT)
        fail(QI_ARGUMENT, "%s is %d, expected %d to %d", name, number, QI_RULE_ALL,
             QI_RULE_PREDICT);
    return NeuronRule(number);
}

}  // namespace

int32_t qi_context_create(qi_model* model, const qi_context_params* params, qi_context** out,
                          qi_error* error) {
    return guard(error, [&] {
        require_pointer(model, "model");
        require_pointer(params, "params");
        require_pointer(out, "out");
        ContextOptions options;
        options.n_ctx = params->n_ctx;
        options.n_seq = params->n_seq;
        options.n_batch = params->n_batch;
        options.n_threads = params->n_threads;
        if (!find_type(params->kv_type))
            fail(QI_ARGUMENT, "kv_type is type number %d, expected F16 (1) or Q8_0 (8)",
                 params->kv_type);
        options.kv_type = Type(params->kv_type);
        options.policy = {rule(params->prompt_rule, "prompt_rule"),
                          rule(params->generated_rule, "generated_rule"), params->sparse_threshold,
                          params->cross_layer_from};
        if (params->kv_mode < QI_KV_AUTO || params->kv_mode > QI_KV_SPLIT)
            fail(QI_ARGUMENT, "kv_mode is %d, expected %d to %d", params->kv_mode, QI_KV_AUTO,
                 QI_KV_SPLIT);
        options.kv = {KvMode(params->kv_mode), params->kv_ratio, params->kv_step};
        options.deterministic = params->deterministic != 0;
        std::shared_ptr<Offload> offload;
        if (params->offload) {
            offload = params->offload->offload;
            if (offload->model() != model->model)
                fail(QI_ARGUMENT, "the offload belongs to another model");
        }
        *out = new qi_context(model->model, options, std::move(offload));
    });
}

void qi_context_close(qi_context* context) {
    delete context;
}

int32_t qi_context_get_info(const qi_context* context, qi_context_info* out) {
    if (!context || !out) return QI_ARGUMENT;
    const Context& c = context->context;
    out->n_ctx = int32_t(c.options().n_ctx);
    out->n_seq = int32_t(c.options().n_seq);
    out->n_batch = int32_t(c.options().n_batch);
    out->n_threads = c.options().n_threads;
    out->kv_type = int32_t(c.options().kv_type);
    out->page_size = c.page_size();
    out->kv_bytes_used = c.kv_bytes_used();
    out->kv_bytes_reserved = c.kv_bytes_reserved();
    out->scratch_bytes = c.scratch_bytes();
    out->kv_mode = int32_t(c.kv_mode());
    out->n_device_pages = int32_t(c.kv_device_pages());
    return QI_OK;
}

int32_t qi_context_set_threads(qi_context* context, int32_t n_threads, qi_error* error) {
    return enter(context, error, [&](Context& c) { c.set_threads(n_threads); });
}

int32_t qi_context_feed(qi_context* context, const int32_t* tokens, const int32_t* seqs,
                        const uint8_t* flags, uint64_t n_tokens, qi_error* error) {
    return enter(context, error, [&](Context& c) {
        if (n_tokens > 0) require_pointer(tokens, "tokens");
        std::vector<FeedToken> feed(n_tokens);
        for (uint64_t i = 0; i < n_tokens; ++i)
            feed[i] = {tokens[i], seqs ? seqs[i] : 0, flags ? flags[i] : uint8_t(0)};
        if (!flags) c.want_last_logits(feed);
        c.feed(feed);
    });
}

int32_t qi_context_logits(qi_context* context, uint64_t index, const float** logits,
                          qi_error* error) {
    return enter(context, error, [&](Context& c) {
        require_pointer(logits, "logits");
        *logits = c.logits(index).data();
    });
}

int32_t qi_context_hidden(const qi_context* context, uint64_t index, const float** hidden,
                          qi_error* error) {
    return guard(error, [&] {
        require_pointer(context, "context");
        require_pointer(hidden, "hidden");
        *hidden = context->context.hidden(index).data();
    });
}

uint64_t qi_context_n_logits(const qi_context* context) {
    return context ? context->context.n_logits() : 0;
}

int32_t qi_context_step(qi_context* context, const int32_t* tokens, const int32_t* seqs,
                        qi_sampler* const* samplers, uint64_t n, int32_t* next, qi_error* error) {
    return enter(context, error, [&](Context& c) {
        require_pointer(tokens, "tokens");
        require_pointer(seqs, "seqs");
        require_pointer(samplers, "samplers");
        require_pointer(next, "next");
        std::vector<FeedToken> feed(n);
        std::vector<Sampler*> draw(n);
        std::set<const qi_sampler*> seen;
        std::deque<Entered> entered;
        for (uint64_t i = 0; i < n; ++i) {
            require_pointer(samplers[i], "samplers[i]");
            if (samplers[i]->n_vocab != c.model().hyper_params().n_vocab)
                fail(QI_ARGUMENT, "the sampler was made for %d tokens, the model has %lld",
                     samplers[i]->n_vocab, (long long)c.model().hyper_params().n_vocab);
            if (!seen.insert(samplers[i]).second)
                fail(QI_ARGUMENT, "a sampler is given for two sequences; give each its own");
            entered.emplace_back(samplers[i]->busy, "sampler");
            feed[i] = {tokens[i], seqs[i], QI_WANT_LOGITS | QI_GENERATED};
            draw[i] = &samplers[i]->sampler;
        }
        c.step(feed, draw, next);
    });
}

int32_t qi_context_score(qi_context* context, int32_t seq, const int32_t* tokens,
                         const int32_t* targets, uint64_t n, int32_t generated, float* logprobs,
                         qi_error* error) {
    return enter(context, error, [&](Context& c) {
        if (n > 0) {
            require_pointer(tokens, "tokens");
            require_pointer(targets, "targets");
            require_pointer(logprobs, "logprobs");
        }
        c.score(seq, {tokens, n}, {targets, n}, generated != 0, logprobs);
    });
}

int64_t qi_context_seq_length(const qi_context* context, int32_t seq) {
    if (!context || seq < 0 || seq >= context->context.options().n_seq) return -1;
    return context->context.length(seq);
}

int32_t qi_context_truncate(qi_context* context, int32_t seq, int64_t n_keep, qi_error* error) {
    return enter(context, error, [&](Context& c) { c.truncate(seq, n_keep); });
}

int32_t qi_context_fork(qi_context* context, int32_t source, int32_t target, int64_t n_keep,
                        qi_error* error) {
    return enter(context, error, [&](Context& c) { c.fork(source, target, n_keep); });
}

uint64_t qi_context_state_size(const qi_context* context, int32_t seq) {
    if (!context || seq < 0 || seq >= context->context.options().n_seq) return 0;
    return context->context.state_size(seq);
}

int32_t qi_context_state_save(qi_context* context, int32_t seq, void* out, uint64_t n_bytes,
                              qi_error* error) {
    return enter(context, error, [&](Context& c) {
        require_pointer(out, "out");
        c.save_state(seq, {static_cast<std::byte*>(out), n_bytes});
    });
}

int32_t qi_context_state_load(qi_context* context, int32_t seq, const void* data, uint64_t n_bytes,
                              qi_error* error) {
    return enter(context, error, [&](Context& c) {
        require_pointer(data, "data");
        c.load_state(seq, {static_cast<const std::byte*>(data), n_bytes});
    });
}

void qi_context_cancel(qi_context* context) {
    if (context) context->context.cancel();
}

void qi_context_clear_cancel(qi_context* context) {
    if (context) context->context.clear_cancel();
}

double qi_context_progress(const qi_context* context) {
    return context ? context->context.progress() : 1.0;
}

int32_t qi_context_get_stats(const qi_context* context, qi_stats* out) {
    if (!context || !out) return QI_ARGUMENT;
    return guard(nullptr, [&] { *out = context->context.stats(); });
}

void qi_context_reset_stats(qi_context* context) {
    if (context) guard(nullptr, [&] { context->context.reset_stats(); });
}

int32_t qi_context_get_layer_stats(const qi_context* context, int32_t layer, qi_layer_stats* out,
                                   qi_error* error) {
    return guard(error, [&] {
        require_pointer(context, "context");
        require_pointer(out, "out");
        const FfnCounters c = context->context.layer_counters(layer);
        *out = {c.n_tokens, c.n_active,       c.n_predicted,  c.n_checked,
                c.n_due,    c.n_missed,       c.n_bytes,      c.predict_seconds,
                c.seconds,  c.device_seconds, c.host_seconds, c.wait_seconds};
    });
}

int32_t qi_context_kv_host_shares(const qi_context* context, double* out, uint64_t n_layer,
                                  qi_error* error) {
    return guard(error, [&] {
        require_pointer(context, "context");
        require_pointer(out, "out");
        const int64_t n = context->context.model().hyper_params().n_layer;
        if (n_layer != uint64_t(n))
            fail(QI_ARGUMENT, "the model has %lld layers, room was given for %llu", (long long)n,
                 (unsigned long long)n_layer);
        for (int64_t layer = 0; layer < n; ++layer)
            out[layer] = context->context.kv_host_share(layer);
    });
}

int32_t qi_context_check_predictions(qi_context* context, int32_t every, qi_error* error) {
    return enter(context, error, [&](Context& c) {
        if (every < 0) fail(QI_ARGUMENT, "every is %d, expected 0 or more", every);
        c.check_predictions(every);
    });
}

int32_t qi_context_count_activations(qi_context* context, int32_t on, qi_error* error) {
    return enter(context, error, [&](Context& c) { c.count_activations(on != 0); });
}

int32_t qi_context_activations(qi_context* context, int32_t layer, uint64_t* out, uint64_t n_ff,
                               qi_error* error) {
    return enter(context, error, [&](Context& c) {
        require_pointer(out, "out");
        const std::span<const uint64_t> counts = c.activations(layer);
        if (n_ff != counts.size())
            fail(QI_ARGUMENT, "a layer has %zu neurons, room was given for %llu", counts.size(),
                 (unsigned long long)n_ff);
        std::copy(counts.begin(), counts.end(), out);
    });
}
