// qi_offload_*: checks, nothing else.
#include <algorithm>
#include <vector>

#include "capi/guard.h"
#include "capi/handles.h"
#include "engine/offload.h"

using namespace qi;

int32_t qi_offload_create(qi_model* model, const char* device, int64_t budget_bytes,
                          qi_offload** out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(model, "model");
        require_pointer(device, "device");
        require_pointer(out, "out");
        std::optional<size_t> budget;
        if (budget_bytes >= 0) budget = size_t(budget_bytes);
        *out = new qi_offload{
            std::make_shared<Offload>(model->model, make_accelerator(device, budget))};
    });
}

void qi_offload_close(qi_offload* offload) {
    delete offload;
}

int32_t qi_offload_choose_neurons(qi_offload* offload, int32_t layer, const int32_t* neurons,
                                  uint64_t n_neurons, qi_error* error) {
    return guard(error, [&] {
        require_pointer(offload, "offload");
        if (n_neurons > 0) require_pointer(neurons, "neurons");
        offload->offload->choose_neurons(layer, {neurons, neurons + n_neurons});
    });
}

int32_t qi_offload_count_neurons(qi_offload* offload, int32_t layer, const float* counts,
                                 uint64_t n_ff, qi_error* error) {
    return guard(error, [&] {
        require_pointer(offload, "offload");
        require_pointer(counts, "counts");
        offload->offload->count_neurons(layer, {counts, counts + n_ff});
    });
}

int32_t qi_offload_balance_layers(qi_offload* offload, qi_error* error) {
    return guard(error, [&] {
        require_pointer(offload, "offload");
        offload->offload->balance_layers();
    });
}

int32_t qi_offload_set_neuron_cache(qi_offload* offload, int32_t policy, qi_error* error) {
    return guard(error, [&] {
        require_pointer(offload, "offload");
        switch (policy) {
            case QI_CACHE_STATIC:
                return offload->offload->set_neuron_cache(NeuronCache::fixed);
            case QI_CACHE_BALANCE:
                return offload->offload->set_neuron_cache(NeuronCache::balance);
            case QI_CACHE_FREQUENCY:
                return offload->offload->set_neuron_cache(NeuronCache::frequency);
            default:
                fail(QI_ARGUMENT, "policy is %d, expected %d to %d", policy, QI_CACHE_STATIC,
                     QI_CACHE_FREQUENCY);
        }
    });
}

int32_t qi_offload_reset(qi_offload* offload, qi_error* error) {
    return guard(error, [&] {
        require_pointer(offload, "offload");
        offload->offload->reset();
    });
}

int32_t qi_offload_get_info(const qi_offload* offload, qi_offload_info* out) {
    if (!offload || !out) return QI_ARGUMENT;
    return guard(nullptr, [&] {
        const Offload::Report report = offload->offload->report();
        *out = {};
        copy_text(out->device, report.device);
        copy_text(out->placement, report.text);
        out->budget_bytes = report.budget;
        out->used_bytes = report.used;
        out->n_moved = report.n_moved;
        out->is_placed = report.placement.has_value();
        if (!report.placement) return;
        const Placement& placement = *report.placement;
        out->attention_bytes = placement.attention_bytes;
        out->predictor_bytes = placement.predictor_bytes;
        out->head_bytes = placement.head_bytes;
        out->neuron_bytes = placement.neuron_bytes;
        for (const NeuronShard& shard : placement.resident)
            out->n_neurons += shard.neurons().size();
        out->n_layers = int32_t(placement.n_layers);
        out->has_head = placement.head;
        out->n_predictors = placement.predictor_bytes ? int32_t(placement.n_predictors) : 0;
    });
}

int32_t qi_offload_get_neurons(const qi_offload* offload, int32_t layer, int32_t* out,
                               uint64_t* n_neurons, qi_error* error) {
    return guard(error, [&] {
        require_pointer(offload, "offload");
        require_pointer(n_neurons, "n_neurons");
        const std::vector<int32_t> neurons = offload->offload->neurons(layer);
        *n_neurons = neurons.size();
        if (out) std::copy(neurons.begin(), neurons.end(), out);
    });
}
