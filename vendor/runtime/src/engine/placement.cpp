#include "engine/placement.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "sparse/balanced_split.h"

namespace qi {

namespace {

constexpr double gib = 1024.0 * 1024.0 * 1024.0, mib = 1024.0 * 1024.0;

// Whether the host can compute some of the neurons: their gate and up share one prepared input.
bool can_be_split(const FeedForward& ffn) {
    return !ffn.gated || kernels::activation_form(ffn.gate.weight.type) ==
                             kernels::activation_form(ffn.up.weight.type);
}

// Neurons that move together: where down is stored by neuron one by one, else as many as the host
// can leave out of its part of down.
int64_t unit_of(const FeedForward& ffn) {
    if (!can_be_split(ffn)) return ffn.up.weight.n_rows;
    return ffn.down_by_neuron ? 1 : kernels::column_group(ffn.down.weight.type);
}

size_t attention_bytes(const Layer& layer, const Accelerator& accelerator) {
    size_t bytes = accelerator.bytes_of(layer.attn_norm) + accelerator.bytes_of(layer.attn_output);
    if (layer.qkv.weight.data) {
        bytes += accelerator.bytes_of(layer.qkv);
    } else {
        for (const Linear* linear : {&layer.q, &layer.k, &layer.v})
            bytes += accelerator.bytes_of(*linear);
    }
    if (layer.attn_norm_2) bytes += accelerator.bytes_of(*layer.attn_norm_2);
    if (!layer.ffn_norm.weight.empty()) bytes += accelerator.bytes_of(layer.ffn_norm);
    return bytes;
}

// A run of neurons of one layer and what it is worth.
struct Unit {
    double worth;  // activity per byte
    int32_t layer, first;
};

std::vector<int32_t> all_neurons(int64_t n_ff) {
    std::vector<int32_t> neurons(static_cast<size_t>(n_ff));
    std::iota(neurons.begin(), neurons.end(), 0);
    return neurons;
}

std::vector<int32_t> complement(const std::vector<int32_t>& neurons, int64_t n_ff) {
    std::vector<int32_t> rest;
    auto next = neurons.begin();
    for (int32_t j = 0; j < n_ff; ++j) {
        if (next != neurons.end() && *next == j)
            ++next;
        else
            rest.push_back(j);
    }
    return rest;
}

// Where neurons arrive: a part of what they may take, small enough to be brought in the course of a
// few tokens. One network's records are about as large as another's.
size_t room_to_move(const Model& model, const Accelerator& accelerator, size_t room) {
    constexpr size_t most_bytes = size_t(32) << 20, least_records = 64;
    size_t largest = 0;
    const FeedForward* widest = nullptr;
    for (const Layer& layer : model.layers()) {
        const size_t bytes = accelerator.bytes_to_move(layer.ffn, 1024);
        if (bytes <= largest) continue;
        largest = bytes;
        widest = &layer.ffn;
    }
    const size_t wanted = std::min(most_bytes, room / 64);
    size_t n = std::max(least_records, 1024 * wanted / largest);
    while (n > 1 && accelerator.bytes_to_move(*widest, n) > room)
        n /= 2;
    return accelerator.bytes_to_move(*widest, n);
}

// The best units that fit. Values and costs add up, so that taking them by worth is the optimum but
// for the last unit.
std::vector<std::vector<int32_t>> choose(const Model& model, const Accelerator& accelerator,
                                         const SplitChoice& split, size_t room) {
    const std::vector<std::vector<float>>& counts = split.counts;
    const int64_t n_layer = int64_t(model.layers().size()), n_ff = model.hyper_params().n_ff;
    if (split.speed_ratio > 0) {
        int64_t block = 1;
        for (const Layer& layer : model.layers())
            block = std::max(block, unit_of(layer.ffn));
        const auto cost = [&](size_t layer, int64_t n) {
            return accelerator.bytes_of(model.layers()[layer].ffn, n);
        };
        return balanced_split(counts, room, cost, split.speed_ratio, block);
    }
    std::vector<Unit> units;
    for (int64_t l = 0; l < n_layer; ++l) {
        const FeedForward& ffn = model.layers()[size_t(l)].ffn;
        const int64_t size = unit_of(ffn);
        // Tables of the whole layer cost the same however many neurons are kept.
        const double neuron_bytes = double(accelerator.bytes_of(ffn, n_ff)) / double(n_ff);
        for (int64_t first = 0; first < n_ff; first += size) {
            const int64_t end = std::min(n_ff, first + size);
            double worth = split.cache == NeuronCache::fixed ? 0.0 : -double(first);
            if (!counts.empty())
                worth = std::accumulate(counts[size_t(l)].begin() + first,
                                        counts[size_t(l)].begin() + end, 0.0) /
                        (neuron_bytes * double(end - first));
            units.push_back({worth, int32_t(l), int32_t(first)});
        }
    }
    std::stable_sort(units.begin(), units.end(),
                     [](const Unit& a, const Unit& b) { return a.worth > b.worth; });
    std::vector<std::vector<int32_t>> chosen(static_cast<size_t>(n_layer));
    size_t used = 0;
    for (const Unit& unit : units) {
        const FeedForward& ffn = model.layers()[size_t(unit.layer)].ffn;
        auto& neurons = chosen[size_t(unit.layer)];
        const int64_t n = std::min(n_ff - unit.first, unit_of(ffn));
        const auto held = int64_t(neurons.size());
        const size_t more =
            accelerator.bytes_of(ffn, held + n) - (held ? accelerator.bytes_of(ffn, held) : 0);
        if (more > room - used) continue;
        used += more;
        for (int64_t j = unit.first; j < unit.first + n; ++j)
            neurons.push_back(int32_t(j));
    }
    for (auto& neurons : chosen)
        std::sort(neurons.begin(), neurons.end());
    return chosen;
}

}  // namespace

std::string size_text(size_t n_bytes) {
    return double(n_bytes) < gib ? format("%.1f MiB", double(n_bytes) / mib)
                                 : format("%.2f GiB", double(n_bytes) / gib);
}

namespace {

// A placement under way.
struct Plan {
    const Model& model;
    const Accelerator& accelerator;
    size_t room;  // for everything
    Placement result;
    size_t used = 0;

    bool fits(size_t bytes) const { return bytes <= room - used; }
    // Whether more of the model goes there than in another plan.
    bool keeps_more_than(const Plan& other) const {
        const auto kept = [](const Placement& p) {
            return std::tuple(p.n_layers, p.n_predictors, p.head);
        };
        return kept(result) > kept(other.result);
    }
    bool all_layers() const { return result.n_layers == int64_t(model.layers().size()); }
    bool all_predictors() const { return result.n_predictors == int64_t(model.layers().size()); }
    // Of the neurons that were asked for by name, or of all.
    size_t wanted_neuron_bytes(const SplitChoice& split) const;

    // Attention, predictors and head, as far as they go, with the working space of a context.
    void add_weights(const DeviceNeeds& needs);
    void add_attention(DeviceNeeds needs);
    void add_predictors();
    // Exchanges the first context for one of other needs.
    void change_context(DeviceNeeds needs);
    // Nothing of the feed-forward networks.
    void leave_neurons();
    void add_neurons(const SplitChoice& split);
};

size_t Plan::wanted_neuron_bytes(const SplitChoice& split) const {
    size_t bytes = 0;
    for (size_t l = 0; l < model.layers().size(); ++l) {
        const int64_t n =
            split.neurons.empty() ? model.hyper_params().n_ff : int64_t(split.neurons[l].size());
        bytes += accelerator.bytes_of(model.layers()[l].ffn, n);
    }
    return bytes;
}

void Plan::add_attention(DeviceNeeds needs) {
    result.kv_share = needs.kv_share;
    needs.n_logits = 0;  // they come with the head
    for (const Layer& layer : model.layers()) {
        const size_t attention = result.attention_bytes + attention_bytes(layer, accelerator);
        needs.kv.n_layer = result.n_layers + 1;
        const size_t device = accelerator.bytes_of(needs);
        if (attention + device > room) break;
        result.attention_bytes = attention;
        result.device_bytes = device;
        used = attention + device;
        ++result.n_layers;
    }
}

void Plan::add_predictors() {
    while (result.n_predictors < result.n_layers) {
        const auto& predictor = model.layers()[size_t(result.n_predictors)].ffn.predictor;
        const size_t bytes =
            predictor ? accelerator.bytes_of(predictor->fc1) + accelerator.bytes_of(predictor->fc2)
                      : 0;
        if (!fits(bytes)) break;
        result.predictor_bytes += bytes;
        used += bytes;
        ++result.n_predictors;
    }
}

void Plan::add_weights(const DeviceNeeds& needs) {
    add_attention(needs);
    add_predictors();
    if (!all_predictors()) return;
    const size_t head =
        accelerator.bytes_of(model.output_norm()) + accelerator.bytes_of(model.head());
    const size_t logits = accelerator.bytes_of(needs) - result.device_bytes;
    if (!fits(head + logits)) return;
    result.head = true;
    result.head_bytes = head;
    used += head;
    change_context(needs);
}

void Plan::change_context(DeviceNeeds needs) {
    needs.kv.n_layer = result.n_layers;
    if (!result.head) needs.n_logits = 0;
    used -= result.device_bytes;
    result.device_bytes = accelerator.bytes_of(needs);
    used += result.device_bytes;
    result.kv_share = needs.kv_share;
}

void Plan::leave_neurons() {
    const int64_t n_ff = model.hyper_params().n_ff;
    for (int64_t l = 0; l < result.n_layers; ++l) {
        result.resident.emplace_back();
        result.rest.emplace_back(all_neurons(n_ff), n_ff);
    }
}

void Plan::add_neurons(const SplitChoice& split) {
    const int64_t n_ff = model.hyper_params().n_ff;
    const size_t for_neurons = room - used;
    // Where all are kept, none has to move.
    const bool is_partial =
        split.neurons.empty()
            ? wanted_neuron_bytes(split) > for_neurons
            : std::any_of(split.neurons.begin(), split.neurons.end(),
                          [&](const auto& ids) { return int64_t(ids.size()) < n_ff; });
    if (split.cache != NeuronCache::fixed && is_partial) {
        const size_t moving = room_to_move(model, accelerator, for_neurons);
        if (moving <= for_neurons) result.moving_bytes = moving;
    }
    used += result.moving_bytes;
    auto chosen =
        split.neurons.empty() ? choose(model, accelerator, split, room - used) : split.neurons;
    for (int64_t l = 0; l < result.n_layers; ++l) {
        auto& neurons = chosen[size_t(l)];
        if (!can_be_split(model.layers()[size_t(l)].ffn) && int64_t(neurons.size()) < n_ff)
            neurons.clear();
        if (!neurons.empty())
            result.neuron_bytes +=
                accelerator.bytes_of(model.layers()[size_t(l)].ffn, int64_t(neurons.size()));
        result.resident.emplace_back(neurons, n_ff);
        result.rest.emplace_back(complement(neurons, n_ff), n_ff);
    }
    if (result.neuron_bytes == 0) result.moving_bytes = 0;
    if (!fits(result.neuron_bytes))
        fail(QI_MEMORY,
             "the given split puts %s of neurons on the device, %s of %s are left for them: a "
             "larger budget is needed, a split made for less, or a smaller context",
             size_text(result.neuron_bytes).c_str(), size_text(room - used).c_str(),
             size_text(accelerator.budget()).c_str());
    used += result.neuron_bytes;
}

// Whether keys and values that are all on the device would take more room than they leave for
// neurons that want it, or some of what those asked for by name need.
bool crowds_neurons_out(const Plan& whole, const DeviceNeeds& alone, const DeviceNeeds& none,
                        const SplitChoice& split) {
    if (!whole.result.head) return false;
    const size_t left = whole.room - whole.used;
    if (whole.wanted_neuron_bytes(split) <= left) return false;
    const size_t kv = whole.accelerator.bytes_of(alone) - whole.accelerator.bytes_of(none);
    return !split.neurons.empty() || kv > left;
}

}  // namespace

Placement place(const Model& model, const Accelerator& accelerator, const DeviceNeeds& needs,
                const KvWish& kv, const SplitChoice& split) {
    const size_t overhead = accelerator.reserve_overhead();
    const size_t room = accelerator.budget() - std::min(accelerator.budget(), overhead);
    const DeviceNeeds alone = with_device_alone(needs), none = with_host(needs, kv, 0);
    Plan whole{model, accelerator, room, {}}, parted{model, accelerator, room, {}};
    if (kv.mode == KvMode::device || kv.by_default()) whole.add_weights(alone);
    bool shared = false;
    const bool crowds = kv.by_default() && crowds_neurons_out(whole, alone, none, split);
    if (kv.mode != KvMode::device && (!whole.result.head || crowds)) {
        parted.add_weights(none);
        shared = !kv.by_default() || crowds || parted.keeps_more_than(whole);
    }
    Plan& plan = shared ? parted : whole;
    if (plan.result.n_layers == 0) {
        DeviceNeeds first = kv.mode == KvMode::device ? alone : none;
        first.kv.n_layer = 1;
        first.n_logits = 0;
        const size_t least =
            attention_bytes(model.layers()[0], accelerator) + accelerator.bytes_of(first);
        fail(QI_MEMORY,
             "one layer's attention with its keys and values and the working space of a "
             "context take %s of the device's memory, of which %s may be used: a larger "
             "budget is needed, or a smaller context",
             size_text(least + overhead).c_str(), size_text(accelerator.budget()).c_str());
    }
    DeviceNeeds of_layers = needs;
    of_layers.kv.n_layer = plan.result.n_layers;
    if (!plan.result.head) of_layers.n_logits = 0;
    const auto copy_pages = [&](size_t more) {
        const int64_t n =
            fitting_pages(accelerator, of_layers, kv, plan.result.device_bytes + more);
        plan.change_context(with_host(needs, kv, n));
    };
    const size_t left = room - plan.used;
    const bool neurons = plan.all_predictors();
    // Neurons that were asked for by name come first.
    if (shared && split.neurons.empty())
        copy_pages(neurons && std::isnan(kv.ratio) ? left / 2 : left);
    if (neurons)
        plan.add_neurons(split);
    else
        plan.leave_neurons();
    if (shared) copy_pages(room - plan.used);
    return plan.result;
}

void keep(const Model& model, const Placement& placement, Accelerator& accelerator) {
    accelerator.reserve(placement.attention_bytes + placement.predictor_bytes +
                        placement.head_bytes + placement.neuron_bytes + placement.moving_bytes);
    for (int64_t l = 0; l < placement.n_layers; ++l) {
        const Layer& layer = model.layers()[size_t(l)];
        accelerator.keep(layer.attn_norm);
        if (layer.attn_norm_2) accelerator.keep(*layer.attn_norm_2);
        if (!layer.ffn_norm.weight.empty()) accelerator.keep(layer.ffn_norm);
        if (layer.qkv.weight.data) {
            accelerator.keep(layer.qkv);
        } else {
            for (const Linear* linear : {&layer.q, &layer.k, &layer.v})
                accelerator.keep(*linear);
        }
        accelerator.keep(layer.attn_output);
        if (l < placement.n_predictors && layer.ffn.predictor) {
            accelerator.keep(layer.ffn.predictor->fc1);
            accelerator.keep(layer.ffn.predictor->fc2);
        }
        accelerator.keep(layer.ffn, placement.resident[size_t(l)], placement.rest[size_t(l)]);
    }
    if (placement.head) {
        accelerator.keep(model.output_norm());
        accelerator.keep(model.head());
    }
}

std::string describe(const Placement& placement, const Model& model,
                     const Accelerator& accelerator) {
    size_t n_resident = 0;
    for (const NeuronShard& shard : placement.resident)
        n_resident += shard.neurons().size();
    const auto n_layer = double(model.layers().size());
    const KvShare& kv = placement.kv_share;
    std::string pages;
    if (kv.with_host && kv.n_pages == 0) pages = ", no keys and values";
    if (kv.n_pages > 0)
        pages = format(", %lld page%s of keys and values", (long long)kv.n_pages,
                       kv.n_pages == 1 ? "" : "s");
    std::string predictors;
    if (placement.predictor_bytes > 0) predictors = ", predictors";
    if (!predictors.empty() && placement.n_predictors < placement.n_layers)
        predictors += format(" of %lld", (long long)placement.n_predictors);
    return format("%lld of %zu layers' attention%s%s%s, %.0f %% of the neurons; %s of %s",
                  (long long)placement.n_layers, model.layers().size(), predictors.c_str(),
                  placement.head ? ", head" : "", pages.c_str(),
                  100.0 * double(n_resident) / (n_layer * double(model.hyper_params().n_ff)),
                  size_text(accelerator.used()).c_str(), size_text(accelerator.budget()).c_str());
}

}  // namespace qi
