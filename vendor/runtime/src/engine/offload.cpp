#include "engine/offload.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>
#include <utility>

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

bool Offload::is_by_neuron() const {
    return std::all_of(model_->layers().begin(), model_->layers().end(),
                       [](const Layer& layer) { return layer.ffn.down_by_neuron; });
}

void Offload::check_by_neuron(const char* what) const {
    if (!is_by_neuron())
        fail(QI_ARGUMENT,
             "%s only where down is stored by neuron; qinfer.tools.neuron_major writes such a file",
             what);
}

void Offload::balance_layers() {
    const std::lock_guard lock(mutex_);
    check_open();
    if (split_.counts.empty())
        fail(QI_ARGUMENT, "layers are balanced by how often neurons are active: counts are needed");
    check_by_neuron("layers can be balanced");
    is_balanced_ = true;
}

void Offload::set_neuron_cache(NeuronCache cache) {
    const std::lock_guard lock(mutex_);
    check_open();
    if (cache != NeuronCache::fixed) check_by_neuron("neurons can move");
    split_.cache = cache;
}

NeuronCache Offload::cache() const {
    if (split_.cache != NeuronCache::fixed) return split_.cache;
    // With nothing else to go by, the first tokens that leave neurons out decide.
    const bool can_be_counted =
        (is_sparse(model_->hyper_params().act) || model_->predictor_rank() > 0) && is_by_neuron();
    const bool is_chosen = !split_.neurons.empty() || !split_.counts.empty();
    return can_be_counted && !is_chosen ? NeuronCache::counted : NeuronCache::fixed;
}

void Offload::measure_speeds(Device& host) {
    if (speeds_) return;
    speeds_ = accelerator_->measure_speeds(model_->layers()[0].ffn, host);
    log(LogLevel::info, format("neurons per second: %.3g on %s, %.3g on the processor",
                               speeds_->device, accelerator_->name().c_str(), speeds_->host));
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

// Whether the same is kept; contexts may differ.
bool keeps_the_same(const Placement& a, const Placement& b) {
    const auto kept = [](const Placement& p) {
        return std::tie(p.n_layers, p.n_predictors, p.head, p.moving_bytes, p.resident);
    };
    return kept(a) == kept(b);
}

}  // namespace

// Where nobody computes: what is kept by now makes room.
void Offload::place_anew(const DeviceNeeds& needs, const KvWish& kv, Device& host) {
    accelerator_->prepare(weight_types(*model_), needs);
    SplitChoice split = split_;
    split.cache = cache();
    if (split.cache == NeuronCache::balance || is_balanced_) measure_speeds(host);
    if (is_balanced_) split.speed_ratio = speeds_->device / speeds_->host;
    // With all that is known to fit: what is kept is only given up for something.
    Placement placement = place(*model_, *accelerator_, needs, kv, split);
    if (!kept_ || !keeps_the_same(*kept_, placement)) make_copies(placement, split.cache);
    placement_ = std::move(placement);
    needs_ = needs;
    kv_ = kv;
}

void Offload::make_copies(const Placement& placement, NeuronCache cache) {
    accelerator_->drop();
    placement_.reset();
    kept_.reset();
    keep(*model_, placement, *accelerator_);
    const bool is_whole = std::all_of(placement.rest.begin(), placement.rest.end(),
                                      [](const auto& rest) { return rest.neurons().empty(); });
    if (split_.cache != NeuronCache::fixed && placement.moving_bytes == 0 && !is_whole &&
        !std::exchange(has_warned_, true))
        log(LogLevel::warning,
            format("neurons do not move: of %s the budget leaves no room to keep some and to "
                   "bring others",
                   size_text(accelerator_->budget()).c_str()));
    if (placement.moving_bytes > 0) move_neurons(cache, placement.moving_bytes);
    kept_ = placement;
}

void Offload::reset() {
    const std::lock_guard lock(mutex_);
    if (alive_.use_count() > 1) return;
    placement_.reset();
    if (kept_ && kept_->moving_bytes > 0) kept_.reset();
}

void Offload::move_neurons(NeuronCache cache, size_t room_bytes) {
    try {
        accelerator_->move_neurons({cache, speeds_.value_or(Speeds{}), room_bytes});
    } catch (const Error& error) {
        if (split_.cache != NeuronCache::fixed) throw;
        // Nobody asked for it.
        log(LogLevel::warning, format("neurons stay where they are: %s", error.what()));
    }
}

Offload::Part Offload::make_part(const DeviceNeeds& needs, const KvWish& kv, Device& host) {
    const std::lock_guard lock(mutex_);
    const auto of_part = [&] {
        DeviceNeeds part = needs;
        part.kv.n_layer = placement_->n_layers;
        if (!placement_->head) part.n_logits = 0;
        part.kv_share = placement_->kv_share;
        return part;
    };
    const bool alone = alive_.use_count() == 1;
    const bool is_new = !placement_ || (alone && !(needs == needs_ && kv == kv_));
    if (is_new) place_anew(needs, kv, host);
    DeviceNeeds part = of_part();
    if (!alone) {
        const size_t left = accelerator_->budget() - accelerator_->used();
        part = share_kv(*accelerator_, part, kv, left);
        const size_t wanted = accelerator_->bytes_of(part);
        if (wanted > left)
            fail(QI_MEMORY,
                 "a context of these sizes takes %s of the device's memory, %s of %s are left "
                 "beside the model and its other contexts",
                 size_text(wanted).c_str(), size_text(left).c_str(),
                 size_text(accelerator_->budget()).c_str());
    }
    auto device = accelerator_->make_device(part, host);
    if (is_new)
        log(LogLevel::info, format("%s keeps %s", accelerator_->name().c_str(),
                                   describe(*placement_, *model_, *accelerator_).c_str()));
    return {alive_, std::move(device), placement_->n_layers, placement_->head, part.kv_share};
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
