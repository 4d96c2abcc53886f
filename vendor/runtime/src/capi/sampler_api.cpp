// qi_sampler_*: checks and translation, nothing else.
#include <limits>
#include <memory>

#include "capi/guard.h"
#include "capi/handles.h"

using namespace qi;

namespace {

SamplingParams translate(const qi_sampling_params& params) {
    SamplingParams out;
    out.temperature = params.temperature;
    out.dynatemp_range = params.dynatemp_range;
    out.dynatemp_exponent = params.dynatemp_exponent;
    out.top_k = params.top_k;
    out.top_p = params.top_p;
    out.min_p = params.min_p;
    out.typical_p = params.typical_p;
    out.repeat_penalty = params.repeat_penalty;
    out.presence_penalty = params.presence_penalty;
    out.frequency_penalty = params.frequency_penalty;
    out.penalty_window = params.penalty_window;
    out.mirostat = params.mirostat;
    out.mirostat_tau = params.mirostat_tau;
    out.mirostat_eta = params.mirostat_eta;
    out.min_keep = params.min_keep;
    out.seed = params.seed;
    if (params.n_bias < 0) fail(QI_ARGUMENT, "n_bias is %d; it must be at least 0", params.n_bias);
    if (params.n_bias > 0) {
        require_pointer(params.bias_tokens, "bias_tokens");
        require_pointer(params.bias_values, "bias_values");
    }
    for (int32_t i = 0; i < params.n_bias; ++i)
        out.bias.emplace_back(params.bias_tokens[i], params.bias_values[i]);
    return out;
}

}  // namespace

int32_t qi_sampler_create(const qi_sampling_params* params, int32_t n_vocab, qi_sampler** out,
                          qi_error* error) {
    return guard(error, [&] {
        require_pointer(params, "params");
        require_pointer(out, "out");
        *out = std::make_unique<qi_sampler>(translate(*params), n_vocab).release();
    });
}

void qi_sampler_close(qi_sampler* sampler) {
    delete sampler;
}

int32_t qi_sampler_accept(qi_sampler* sampler, const int32_t* tokens, uint64_t n_tokens,
                          qi_error* error) {
    return guard(error, [&] {
        require_pointer(sampler, "sampler");
        if (n_tokens > 0) require_pointer(tokens, "tokens");
        Entered entered(sampler->busy, "sampler");
        sampler->sampler.accept({tokens, n_tokens});
    });
}

int32_t qi_sampler_sample(qi_sampler* sampler, const float* logits, int32_t* token,
                          qi_error* error) {
    return guard(error, [&] {
        require_pointer(sampler, "sampler");
        require_pointer(logits, "logits");
        require_pointer(token, "token");
        Entered entered(sampler->busy, "sampler");
        *token = sampler->sampler.sample({logits, size_t(sampler->n_vocab)});
    });
}
