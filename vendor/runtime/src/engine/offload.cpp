#include "engine/offload.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "base/log.h"

namespace qi {

Offload::Offload(std::shared_ptr<const Model> model, std::unique_ptr<Accelerator> accelerator)
    : model_(std::move(model)), accelerator_(std::move(accelerator)) {}

void Offload::check_layer(int64_t layer) const {
    const auto n_layer = int64_t(model_->layers().size());
    if (layer < 0 || layer >= n_layer)
        fail(QI_ARGUMENT, "layer %lld does not exist: the model has 0 to %lld", (long long)layer,
             (long long)n_layer - 1);
}

void Offload::check_open() const {
    if (placement_)
        fail(QI_ARGUMENT,
             "the neurons on the device were chosen when the model's first context was made");
}

void Offload::choose_neurons(int64_t layer, std::vector<int32_t> neurons) {
    const std::lock_guard lock(mutex_);
    check_layer(layer);
    check_open();
    const int64_t n_ff = model_->hyper_params().n_ff;
    const bool ascending = std::is_sorted(neurons.begin(), neurons.end(), std::less_equal<>());
    if (!ascending || (!neurons.empty() && (neurons.front() < 0 || neurons.back() >= n_ff)))
        fail(QI_ARGUMENT, "layer %lld: neurons have to be ascending numbers from 0 to %lld",
             (long long)layer, (long long)n_ff - 1);
    const FeedForward& ffn = model_->layers()[size_t(layer)].ffn;
    const int64_t block = ffn.down_by_neuron ? 1 : traits(ffn.down.weight.type).block_size;
    for (size_t i = 0; i < neurons.size(); ++i) {
        const bool whole = neurons[i] % block == int64_t(i) % block;
        if (!whole || (i + 1 == neurons.size() && int64_t(neurons.size()) % block != 0))
            fail(QI_ARGUMENT,
                 "layer %lld: down is stored in blocks of %lld neurons, which cannot be parted at "
                 "neuron %d; qinfer.tools.neuron_major writes a file where they can",
                 (long long)layer, (long long)block, neurons[i]);
    }
    split_.neurons.resize(model_->layers().size());
    split_.neurons[size_t(layer)] = std::move(neurons);
}

void Offload::count_neurons(int64_t layer, std::vector<float> counts) {
    const std::lock_guard lock(mutex_);
    check_layer(layer);
    check_open();
    const int64_t n_ff = model_->hyper_params().n_ff;
    if (int64_t(counts.size()) != n_ff)
        fail(QI_ARGUMENT, "layer %lld: %zu counts were given, the model has %lld neurons",
             (long long)layer, counts.size(), (long long)n_ff);
    for (size_t j = 0; j < counts.size(); ++j)
        if (!(counts[j] >= 0.0f) || std::isinf(counts[j]))
            fail(QI_ARGUMENT, "layer %lld: the count of neuron %zu is %g", (long long)layer, j,
                 double(counts[j]));
    split_.counts.resize(model_->layers().size(), std::vector<float>(size_t(n_ff), 0.0f));
    split_.counts[size_t(layer)] = std::move(counts);
}

void Offload::balance_layers() {
    const std::lock_guard lock(mutex_);
    check_open();
    if (split_.counts.empty())
        fail(QI_ARGUMENT, "layers are balanced by how often neurons are active: counts are needed");
    is_balanced_ = true;
}

void Offload::set_neuron_cache(NeuronCache cache) {
    const std::lock_guard lock(mutex_);
    check_open();
    for (const Layer& layer : model_->layers())
        if (cache != NeuronCache::fixed && !layer.ffn.down_by_neuron)
            fail(QI_ARGUMENT,
                 "neurons can move only where down is stored by neuron; "
                 "qinfer.tools.neuron_major writes such a file");
    split_.cache = cache;
}

NeuronCache Offload::cache_for(const DeviceNeeds& needs) const {
    if (split_.cache != NeuronCache::fixed) return split_.cache;
    // With nothing else to go by, the first tokens decide.
    const bool can_be_counted = needs.leaves_out && model_->layers()[0].ffn.down_by_neuron;
    const bool is_chosen = !split_.neurons.empty() || !split_.counts.empty();
    return can_be_counted && !is_chosen ? NeuronCache::counted : NeuronCache::fixed;
}

Speeds Offload::measure_speeds(Device& host) {
    const Speeds speeds = accelerator_->measure_speeds(model_->layers()[0].ffn, host);
    log(LogLevel::info, format("neurons per second: %.3g on %s, %.3g on the processor",
                               speeds.device, accelerator_->name().c_str(), speeds.host));
    return speeds;
}

namespace {

std::vector<Type> weight_types(const Model& model) {
    std::set<Type> types{model.head().weight.type};
    for (const Layer& layer : model.layers()) {
        for (const Linear* linear : {&layer.qkv, &layer.q, &layer.k, &layer.v, &layer.attn_output,
                                     &layer.ffn.gate, &layer.ffn.up, &layer.ffn.down})
            if (linear->weight.data) types.insert(linear->weight.type);
        if (!layer.ffn.predictor) continue;
        types.insert(layer.ffn.predictor->fc1.weight.type);
        types.insert(layer.ffn.predictor->fc2.weight.type);
    }
    return {types.begin(), types.end()};
}

}  // namespace

Offload::Part Offload::make_part(const DeviceNeeds& given, Device& host) {
    const std::lock_guard lock(mutex_);
    DeviceNeeds needs = given;
    needs.counts_activity =
        given.counts_activity &&
        (placement_ ? placement_->moving_bytes > 0 : cache_for(given) != NeuronCache::fixed);
    if (!placement_) {
        accelerator_->prepare(weight_types(*model_), needs.kv.type);
        SplitChoice split = split_;
        split.cache = cache_for(needs);
        Moving moving{split.cache, {}, 0};
        if (split.cache == NeuronCache::balance || is_balanced_)
            moving.speeds = measure_speeds(host);
        if (is_balanced_) split.speed_ratio = moving.speeds.device / moving.speeds.host;
        Placement placement = place(*model_, *accelerator_, needs, split);
        keep(*model_, placement, *accelerator_);
        placement_ = std::move(placement);
        moving.room_bytes = placement_->moving_bytes;
        if (moving.room_bytes > 0) accelerator_->move_neurons(moving);
        log(LogLevel::info, format("%s keeps %s", accelerator_->name().c_str(),
                                   describe(*placement_, *model_, *accelerator_).c_str()));
    }
    DeviceNeeds of_part = needs;
    of_part.kv.n_layer = placement_->n_layers;
    auto device = accelerator_->make_device(of_part, host);
    return {std::move(device), placement_->n_layers, placement_->head};
}

Offload::Report Offload::report() const {
    const std::lock_guard lock(mutex_);
    return {accelerator_->name(),
            accelerator_->budget(),
            accelerator_->used(),
            placement_,
            placement_ ? describe(*placement_, *model_, *accelerator_) : std::string(),
            accelerator_->n_moved()};
}

std::vector<int32_t> Offload::neurons(int64_t layer) const {
    const std::lock_guard lock(mutex_);
    check_layer(layer);
    if (!placement_ || layer >= placement_->n_layers) return {};
    return accelerator_->neurons(model_->layers()[size_t(layer)].ffn);
}

}  // namespace qi
