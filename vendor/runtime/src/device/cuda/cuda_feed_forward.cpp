// The feed-forward networks of a GPU: its own neurons, those it leaves to the host, and what of
// both is counted.
#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "device/cuda/cuda_device.h"

namespace qi::cuda {

namespace {

uint64_t bytes_of(const Linear& linear) {
    return uint64_t(linear.weight.n_rows) * linear.weight.row_bytes;
}

// Whose active neurons are summed.
bool is_counted(NeuronRule rule) {
    return rule != NeuronRule::all;
}

// Bytes of the neurons that the host keeps, as far as tokens of those rules read them whoever is
// active; all together.
uint64_t streamed_bytes(const FeedForward& ffn, const DeviceFfn& kept,
                        std::span<const NeuronRule> rules) {
    const auto n = uint64_t(kept.rest.neurons().size());
    const bool whole = std::find(rules.begin(), rules.end(), NeuronRule::all) != rules.end();
    uint64_t row_bytes = ffn.first().weight.row_bytes;
    if (whole && ffn.gated) row_bytes += ffn.up.weight.row_bytes;
    if (whole && ffn.down_by_neuron) row_bytes += ffn.down.weight.row_bytes;
    const uint64_t columns =
        ffn.down_by_neuron ? 0 : bytes_of(ffn.down) * n / uint64_t(ffn.down.weight.n_cols);
    return n * row_bytes + columns;
}

}  // namespace

DeviceAct device_act(HiddenAct::Kind kind) {
    switch (kind) {
        case HiddenAct::Kind::silu:
            return DeviceAct::silu;
        case HiddenAct::Kind::relu:
            return DeviceAct::relu;
        case HiddenAct::Kind::gelu_erf:
            return DeviceAct::gelu_erf;
        case HiddenAct::Kind::gelu_tanh:
            return DeviceAct::gelu_tanh;
        case HiddenAct::Kind::fatrelu:
            return DeviceAct::fatrelu;
        case HiddenAct::Kind::relu_relu:
            return DeviceAct::relu_relu;
    }
    return DeviceAct::silu;
}

void CudaDevice::feed_forward(const FeedForward& ffn, const FfnBatch& batch, float* y) {
    const Current current = enter();
    const DeviceFfn& kept = share_.weights->find(ffn);
    const bool wanted = predicts();
    // Of prompts the host computes whole matrices, where it has all neurons.
    const bool predicting =
        wanted && kept.has_predictor && (kept.n_slots() > 0 || batch_.n_tokens <= few_tokens);
    // Biases stand by neuron, not by slot.
    const bool by_slot = kept.whole() || (!kept.weights.gate_bias && !kept.weights.up_bias);
    const bool many =
        batch_.n_tokens > few_tokens && !predicting && by_slot && !needs_.deterministic;
    counting_ = batch.activations || counts_of_mover(kept);
    Tally tally{&ffn, &kept, batch.counters, batch.activations};
    tally.n_steps += predicting;
    const int64_t together = many ? batch_.n_tokens : few_tokens;
    for (int64_t first = 0; first < batch_.n_tokens; first += together) {
        bool gates = false, whole = false;
        for (int64_t t = first; t < std::min(batch_.n_tokens, first + together); ++t) {
            const NeuronRule rule = batch_.rules[size_t(t)];
            tally.n_tokens += rule != NeuronRule::all;
            tally.n_checked += predicting && batch.check && rule == NeuronRule::predict;
            gates |= rule != NeuronRule::predict;
            whole |= rule == NeuronRule::all;
        }
        tally.n_groups += 1;
        tally.n_gates += gates;
        tally.n_whole += whole;
    }
    const bool streamed = streams(ffn, kept);
    if (streamed) tally.n_streamed_bytes = streamed_bytes(ffn, kept, batch_.rules);
    if (kept.n_slots() > 0 || streamed) add_tally(tally);  // else the host counts everything
    if (predicting) predict(ffn, kept, batch);
    // The host computes while the GPU does.
    std::optional<Exchange::Round> round;
    if (!kept.whole() && !streamed) round = send_to_host(ffn, kept, batch, predicting);
    if (many && kept.n_slots() > 0)
        compute_many(ffn, kept, batch, y);
    else if (kept.n_slots() > 0)
        compute_few(ffn, kept, batch, predicting, y);
    if (round) {
        exchange_->answer(stream_, *round, [this, &ffn, &kept, batch, predicting, wanted] {
            const auto start = std::chrono::steady_clock::now();
            compute_of_host(ffn, kept, batch, predicting);
            const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
            if (batch_.n_tokens > few_tokens && !wanted) add_trial(ffn, kept, false, taken.count());
        });
        exchange_->receive(stream_, input(layout_.base), *round, host_y_.device_address(),
                           batch_.n_tokens * needs_.n_embd, true, address(y));
        if (member_ && predicting)
            exchange_->afterwards(
                [this, &kept] { member_->count(kept, named_.data(), batch_.rules); });
    }
    if (streamed) compute_streamed(ffn, kept, batch, y);
    forget_prepared(y);
}

// Masks of all tokens: the neurons that each may use.
void CudaDevice::predict(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch) {
    const DeviceLinear& fc1 = share_.weights->find(ffn.predictor->fc1);
    const DeviceLinear& fc2 = share_.weights->find(ffn.predictor->fc2);
    const int64_t n = batch_.n_tokens, n_embd = fc1.weight.n_cols, rank = fc1.weight.n_rows;
    for (int64_t first = 0; first < n; first += few_tokens) {
        const int64_t some = std::min(few_tokens, n - first);
        const Input z = prepared_for_predictor(fc1.weight.type, address(batch.z + first * n_embd),
                                               some, n_embd);
        const cuda::Product low{fc1.weight, fc1.bias, low_, rank, true};
        share_.kernels->multiply(stream_, z, {&low, 1}, false);
        for_predictor_ = {};  // low_ is new
        const Input in = prepared_for_predictor(fc2.weight.type, low_, some, rank);
        const cuda::Product out{fc2.weight, fc2.bias, predictions_, needs_.n_ff};
        share_.kernels->multiply(stream_, in, {&out, 1}, false);
        SelectArgs select;
        select.predictions = predictions_;
        select.threshold = batch.threshold;
        select.rules = input(layout_.rules) + size_t(first);
        select.n_tokens = some;
        select.n_ff = needs_.n_ff;
        select.masks = masks_ + size_t(first * name_words(needs_.n_ff)) * sizeof(uint32_t);
        select.total = total(kept, 1);
        if (lists_predicted(ffn) && kept.n_slots() > 0) {
            select.list = &list_;
            select.slot_of_neuron = kept.slot_of_neuron;
            select.listed = listed_;
            select.ticket = select_ticket_;
        }
        share_.kernels->select(stream_, select);
    }
}

// Neuron by neuron, those that no token uses left out; a few tokens at a time.
void CudaDevice::compute_few(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                             bool predicting, float* y) {
    Kernels& kernels = *share_.kernels;
    const int64_t n = batch_.n_tokens, n_ff = needs_.n_ff, n_embd = needs_.n_embd;
    for (int64_t first = 0; first < n; first += few_tokens) {
        const int64_t some = std::min(few_tokens, n - first);
        const CUdeviceptr x = address(batch.x + first * n_embd);
        FfnArgs args;
        args.w = kept.weights;
        args.act = device_act(ffn.act.kind);
        args.threshold = ffn.act.threshold;
        args.h = hidden_;
        args.list = kept.whole() ? nullptr : &kept.list;
        if (predicting) {
            args.masks = masks_ + size_t(first * name_words(n_ff)) * sizeof(uint32_t);
            if (batch.check) check_predictions(ffn, kept, x, first, some);
            if (lists_predicted(ffn)) args.list = &list_;
        }
        args.h_stride = args.list ? args.list->capacity : n_ff;
        if (ffn.gated && args.w.gate_type != args.w.up_type) {
            const cuda::Product gates{kept.gate(), args.w.gate_bias, lifted_, n_ff};
            const Input in = prepared(args.w.gate_type, x, some, n_embd);
            if (args.list)
                kernels.multiply_listed(stream_, in, gates, *args.list, true);
            else
                kernels.multiply(stream_, in, {&gates, 1}, false);
            args.gates = lifted_;
        }
        args.in = prepared(args.w.up_type, x, some, n_embd);
        if (counting_) args.active = counts_of(kept.index);
        args.rules = input(layout_.rules) + size_t(first);
        if (std::ranges::any_of(batch_.rules, is_counted)) args.total = total(kept, 0);
        kernels.ffn_rows(stream_, args);
        const CUdeviceptr out = address(y + first * n_embd);
        if (ffn.down_by_neuron) {
            add_down(kept, args.list, hidden_, args.h_stride, some, out);
            continue;
        }
        prepared_ = {};
        const Input h = prepared(kept.down.type, hidden_, some, kept.down.n_cols);
        const cuda::Product down{kept.down, kept.down_bias, out, n_embd};
        kernels.multiply(stream_, h, {&down, 1}, true);
        prepared_ = {};
    }
}

// y += down of h, which stands by place in the list.
void CudaDevice::add_down(const DeviceFfn& kept, const NeuronList* list, CUdeviceptr h,
                          int64_t h_stride, int64_t n, CUdeviceptr y) {
    DownArgs args;
    args.w = kept.weights;
    args.list = list;
    args.h = h;
    args.h_stride = h_stride;
    args.n_tokens = n;
    args.partial = partial_;
    args.tickets = down_tickets_;
    args.bias = kept.down_bias;
    args.y = y;
    share_.kernels->down_rows(stream_, args);
}

// Neurons that contributed to the tokens whose values begin at h, as far as they are counted: the
// sum under rules other than `all`, neuron by neuron under every rule. All slots are looked at.
void CudaDevice::count_active(const DeviceFfn& kept, CUdeviceptr h, int64_t h_stride, int64_t n) {
    const NeuronList by_slot = kept.list_by_slot();
    CountArgs args;
    args.list = kept.whole() ? nullptr : &by_slot;
    args.n_ff = needs_.n_ff;
    args.h_stride = h_stride;
    for (int64_t begin = 0, end; begin < n; begin = end) {
        // Runs of tokens that count, or do not.
        const bool counts = is_counted(batch_.rules[size_t(begin)]);
        for (end = begin + 1; end < n && end - begin < few_tokens; ++end)
            if (is_counted(batch_.rules[size_t(end)]) != counts) break;
        if (!counts && !counting_) continue;
        args.h = h + size_t(begin * h_stride) * sizeof(float);
        args.n_tokens = end - begin;
        share_.kernels->count_active(stream_, args, counting_ ? counts_of(kept.index) : 0,
                                     counts ? total(kept, 0) : 0);
    }
}

void CudaDevice::collect_times() {
    const auto times = exchange_->take_times(stream_);
    for (size_t i = shared_.size(); i < times.size(); ++i)
        shared_kv_->add_device_seconds(int64_t(i - shared_.size()), times[i].device_seconds);
    for (size_t i = 0; i < shared_.size(); ++i) {
        if (!shared_[i]) continue;
        FfnCounters& counters = *shared_[i];
        counters.device_seconds += times[i].device_seconds;
        counters.wait_seconds += times[i].wait_seconds;
        counters.seconds += times[i].device_seconds + times[i].wait_seconds;
    }
}

void CudaDevice::collect_counters() {
    if (exchange_) {
        const Current current(*share_.gpu);
        collect_times();
    }
    const bool any = std::any_of(tallies_.begin(), tallies_.end(),
                                 [](const Tally& tally) { return tally.ffn != nullptr; });
    if (!any) return;
    const Current current(*share_.gpu);
    collect_activations();
    std::vector<uint64_t> totals(n_totals * tallies_.size());
    stream_.copy_to_host(totals.data(), totals_, totals.size() * sizeof(uint64_t));
    stream_.fill(totals_, 0, totals.size() * sizeof(uint64_t));
    stream_.synchronize();
    for (size_t i = 0; i < tallies_.size(); ++i) {
        const Tally& tally = tallies_[i];
        if (!tally.ffn) continue;
        const FeedForward& ffn = *tally.ffn;
        const uint64_t* of_ffn = &totals[n_totals * i];
        const uint64_t n_active = of_ffn[0], n_predicted = of_ffn[1];
        FfnCounters& counters = *tally.counters;
        counters.n_tokens += tally.n_tokens;
        counters.n_active += n_active;
        counters.n_predicted += n_predicted;
        counters.n_checked += tally.n_checked;
        counters.n_due += of_ffn[2];
        counters.n_missed += of_ffn[3];
        // Active and predicted rows as if each token read its own: tokens computed together share
        // some.
        const size_t first_row = ffn.first().weight.row_bytes;
        const size_t other_rows = (ffn.gated ? ffn.up.weight.row_bytes : 0) +
                                  (ffn.down_by_neuron ? ffn.down.weight.row_bytes : 0);
        const auto n_slots = uint64_t(tally.kept->n_slots());
        counters.n_bytes +=
            (tally.n_gates * n_slots + n_predicted - tally.n_predicted_of_host) * first_row +
            (tally.n_whole * n_slots + n_active) * other_rows;
        // The kept columns of an ordinary down are read whoever is active.
        if (!ffn.down_by_neuron)
            counters.n_bytes +=
                tally.n_groups * bytes_of(ffn.down) * n_slots / uint64_t(ffn.down.weight.n_cols);
        counters.n_bytes += tally.n_streamed_bytes;
        if (ffn.predictor)
            counters.n_bytes +=
                tally.n_steps * (bytes_of(ffn.predictor->fc1) + bytes_of(ffn.predictor->fc2));
    }
    std::fill(tallies_.begin(), tallies_.end(), Tally{});
}

// Adds what was counted neuron by neuron to the engine's counts and to those for moving neurons,
// and begins again from 0.
void CudaDevice::collect_activations() {
    const auto n_ff = size_t(needs_.n_ff);
    const auto of_mover = [&](const Tally& tally) {
        return tally.ffn && n_uncollected_ > 0 ? member_->counts_of(*tally.kept) : nullptr;
    };
    std::vector<uint64_t> counts;
    if (std::ranges::any_of(
            tallies_, [&](const Tally& tally) { return tally.activations || of_mover(tally); })) {
        counts.resize(tallies_.size() * n_ff);
        stream_.copy_to_host(counts.data(), counts_, counts.size() * sizeof(uint64_t));
    }
    stream_.fill(counts_, 0, tallies_.size() * n_ff * sizeof(uint64_t));
    stream_.synchronize();
    for (size_t i = 0; i < tallies_.size(); ++i) {
        for (uint64_t* const to : {tallies_[i].activations, of_mover(tallies_[i])})
            for (size_t j = 0; j < n_ff && to; ++j)
                to[j] += counts[i * n_ff + j];
    }
    if (n_uncollected_ > 0) member_->counted(std::exchange(n_uncollected_, 0));
}

Exchange::Round CudaDevice::send_to_host(const FeedForward& ffn, const DeviceFfn& kept,
                                         const FfnBatch& batch, bool predicting) {
    const int64_t n = batch_.n_tokens;
    std::vector<Exchange::Rows> rows{
        {address(batch.x), host_x_.device_address(), n * needs_.n_embd}};
    if (kept.n_slots() == 0 && ffn.predictor && !predicting)
        rows.push_back({address(batch.z), host_z_.device_address(), n * needs_.n_embd});
    if (predicting)
        rows.push_back({masks_, host_names_.device_address(), n * name_words(needs_.n_ff)});
    shared_[kept.index] = batch.counters;
    return exchange_->send(stream_, input(layout_.base), int64_t(kept.index), rows);
}

void CudaDevice::compute_of_host(const FeedForward& ffn, const DeviceFfn& kept, FfnBatch batch,
                                 bool predicting) {
    const auto start = std::chrono::steady_clock::now();
    FfnCounters own;
    FfnCounters& counters = *std::exchange(batch.counters, &own);
    batch.x = reinterpret_cast<const float*>(host_x_.data());
    if (kept.n_slots() > 0 || predicting) {
        batch.shard = &kept.rest;
        batch.z = nullptr;
        if (predicting) batch.names = reinterpret_cast<const uint32_t*>(host_names_.data());
        if (member_ && predicting)
            std::copy_n(batch.names, batch_.n_tokens * name_words(needs_.n_ff), named_.data());
    } else {
        batch.z = ffn.predictor ? reinterpret_cast<const float*>(host_z_.data()) : nullptr;
    }
    auto* const out = reinterpret_cast<float*>(host_y_.data());
    std::fill_n(out, batch_.n_tokens * needs_.n_embd, 0.0f);
    uint64_t* const of_mover = counts_of_mover(kept);
    uint64_t* const of_engine = batch.activations;
    std::vector<uint64_t> of_both(of_mover && of_engine ? size_t(needs_.n_ff) : 0);
    if (of_mover) batch.activations = of_engine ? of_both.data() : of_mover;
    host_.begin(batch_);
    host_.feed_forward(ffn, batch, out);
    for (size_t j = 0; j < of_both.size(); ++j) {
        of_engine[j] += of_both[j];
        of_mover[j] += of_both[j];
    }
    if (of_mover && member_->is_first(kept))
        n_uncollected_ += std::ranges::count(batch_.rules, NeuronRule::exact);
    own.seconds = 0;  // of the network is what the GPU takes from sending to receiving
    if (kept.n_slots() > 0) {
        // Tokens and predictions are counted with the GPU's.
        own.n_tokens = own.n_checked = 0;
        tallies_[kept.index].n_predicted_of_host += std::exchange(own.n_predicted, 0);
    } else if (predicting) {
        own.n_bytes += bytes_of(ffn.predictor->fc1) + bytes_of(ffn.predictor->fc2);
    }
    counters += own;
    counters.host_seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void CudaDevice::add_tally(const Tally& more) {
    if (!more.ffn) return;
    Tally& tally = tallies_[more.kept->index];
    tally.ffn = more.ffn;
    tally.kept = more.kept;
    tally.counters = more.counters;
    if (more.activations) tally.activations = more.activations;
    tally.n_tokens += more.n_tokens;
    tally.n_checked += more.n_checked;
    tally.n_steps += more.n_steps;
    tally.n_groups += more.n_groups;
    tally.n_gates += more.n_gates;
    tally.n_predicted_of_host += more.n_predicted_of_host;
    tally.n_whole += more.n_whole;
    tally.n_streamed_bytes += more.n_streamed_bytes;
}

}  // namespace qi::cuda
