#include "device/cpu/cpu_feed_forward.h"

#include <chrono>
#include <cstring>
#include <numeric>

#include "kernels/row_sums.h"
#include "kernels/vector_ops.h"

namespace qi {

using kernels::ActivationForm;

namespace {

using Clock = std::chrono::steady_clock;

// Up to so many tokens, rows are picked; more tokens together want nearly all rows, and are
// computed as whole matrices of which each token then keeps its own neurons.
constexpr int64_t few_tokens = 8;
// Tokens that share the decoding of down rows: their sums stay in L2.
constexpr int64_t down_tokens = 64;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

kernels::Activation kernel_activation(HiddenAct::Kind kind) {
    switch (kind) {
        case HiddenAct::Kind::silu:
            return kernels::Activation::silu;
        case HiddenAct::Kind::gelu_erf:
            return kernels::Activation::gelu_erf;
        case HiddenAct::Kind::gelu_tanh:
            return kernels::Activation::gelu_tanh;
        case HiddenAct::Kind::fatrelu:
            return kernels::Activation::fatrelu;
        case HiddenAct::Kind::relu:
        case HiddenAct::Kind::relu_relu:
            break;
    }
    return kernels::Activation::relu;
}

// gate = act(gate) · up, or with relu_relu relu(gate) · relu(up)
void combine(const HiddenAct& act, float* gate, const float* up, int64_t n) {
    if (act.kind == HiddenAct::Kind::relu_relu)
        kernels::relu_relu_mul(gate, up, n);
    else
        kernels::activate_mul(kernel_activation(act.kind), act.threshold, gate, up, n);
}

uint64_t weight_bytes(const Linear& linear) {
    return uint64_t(linear.weight.n_rows) * linear.weight.row_bytes;
}

void add_bias(const Linear& linear, const int32_t* list, int64_t n, float* y) {
    if (linear.bias.empty()) return;
    for (int64_t i = 0; i < n; ++i)
        y[i] += linear.bias[size_t(list[i])];
}

// Cuts a thread's scratch into arrays, each on a cache line of its own.
class Room {
  public:
    explicit Room(std::byte* at) : at_(at) {}
    template <typename T>
    T* take(int64_t n) {
        T* taken = reinterpret_cast<T*>(at_);
        at_ += bytes<T>(n);
        return taken;
    }
    template <typename T>
    static size_t bytes(int64_t n) {
        return size_t(round_up(n * int64_t(sizeof(T)), 64));
    }

  private:
    std::byte* at_;
};

}  // namespace

size_t CpuFeedForward::scratch_bytes() const {
    return hidden_.capacity_bytes() + low_.capacity_bytes() + predictions_.capacity_bytes() +
           gates_.capacity_bytes() + partial_.capacity_bytes() + gathered_.capacity_bytes() +
           neurons_.capacity_bytes();
}

void CpuFeedForward::compute(const FeedForward& ffn, std::span<const NeuronRule> rules,
                             const FfnBatch& batch, float* y) {
    const auto start = Clock::now();
    const auto n_tokens = int64_t(rules.size());
    if (batch.shard) {
        compute_shard(ffn, rules, batch, y);
        batch.counters->seconds += seconds_since(start);
        return;
    }
    const bool one_rule =
        std::all_of(rules.begin(), rules.end(), [&](NeuronRule rule) { return rule == rules[0]; });
    if (one_rule) {
        compute_group(ffn, batch, {rules[0], batch.x, batch.z, n_tokens, y});
    } else {
        const int64_t n_embd = ffn.up.weight.n_cols;
        const auto size = size_t(n_tokens * n_embd);
        float* x = gathered_.reserve(3 * size);
        float *z = x + size, *out = z + size;
        for (NeuronRule rule : {NeuronRule::all, NeuronRule::exact, NeuronRule::predict}) {
            std::vector<int64_t> rows;
            for (int64_t t = 0; t < n_tokens; ++t)
                if (rules[size_t(t)] == rule) rows.push_back(t);
            if (rows.empty()) continue;
            const auto copy_row = [&](float* to, int64_t i, const float* from, int64_t j) {
                std::copy_n(from + j * n_embd, n_embd, to + i * n_embd);
            };
            for (size_t i = 0; i < rows.size(); ++i) {
                copy_row(x, int64_t(i), batch.x, rows[i]);
                if (batch.z) copy_row(z, int64_t(i), batch.z, rows[i]);
                copy_row(out, int64_t(i), y, rows[i]);
            }
            compute_group(ffn, batch, {rule, x, z, int64_t(rows.size()), out});
            for (size_t i = 0; i < rows.size(); ++i)
                copy_row(y, rows[i], out, int64_t(i));
        }
    }
    batch.counters->seconds += seconds_since(start);
}

// Runs of tokens of one rule, a few at a time: what another device leaves to this one is meant to
// be little.
void CpuFeedForward::compute_shard(const FeedForward& ffn, std::span<const NeuronRule> rules,
                                   const FfnBatch& batch, float* y) {
    const auto n_tokens = int64_t(rules.size());
    const int64_t n_embd = ffn.up.weight.n_cols, n_words = name_words(ffn.up.weight.n_rows);
    for (int64_t begin = 0, end; begin < n_tokens; begin = end) {
        const NeuronRule rule = rules[size_t(begin)];
        for (end = begin + 1; end < std::min(n_tokens, begin + few_tokens); ++end)
            if (rules[size_t(end)] != rule) break;
        compute_chosen(ffn, batch,
                       {rule, batch.x + begin * n_embd, nullptr, end - begin, y + begin * n_embd,
                        batch.names ? batch.names + begin * n_words : nullptr});
    }
}

void CpuFeedForward::compute_group(const FeedForward& ffn, const FfnBatch& batch,
                                   const Group& group) {
    // Chosen rows of gate and up share one prepared input; types that want two are rare.
    const bool one_form = !ffn.gated || kernels::activation_form(ffn.gate.weight.type) ==
                                            kernels::activation_form(ffn.up.weight.type);
    if (group.rule != NeuronRule::all && group.n_tokens <= few_tokens && one_form)
        compute_chosen(ffn, batch, group);
    else
        compute_all_neurons(ffn, batch, group);
}

// ---- whole matrices ----

void CpuFeedForward::compute_all_neurons(const FeedForward& ffn, const FfnBatch& batch,
                                         const Group& group) {
    const int64_t n = group.n_tokens, n_ff = ffn.up.weight.n_rows;
    const bool predicting = group.rule == NeuronRule::predict;
    const float* predictions = predicting ? predict(ffn, batch, group) : nullptr;
    float* hidden = hidden_.reserve(size_t(n * n_ff));
    activate(ffn, group.x, n, hidden);
    batch.counters->n_bytes +=
        (ffn.gated ? weight_bytes(ffn.gate) : 0) + weight_bytes(ffn.up) + weight_bytes(ffn.down);

    if (group.rule != NeuronRule::all || batch.activations) {
        // By neuron, so that threads do not meet in the counts.
        const int64_t step = round_up((n_ff + n_partitions - 1) / n_partitions, 16);
        std::atomic<uint64_t> n_active{0}, n_predicted{0}, n_due{0}, n_missed{0};
        products_.loop((n_ff + step - 1) / step, [&](int64_t chunk, int) {
            uint64_t active = 0, predicted = 0, due = 0, missed = 0;
            for (int64_t t = 0; t < n; ++t) {
                for (int64_t j = chunk * step; j < std::min(n_ff, (chunk + 1) * step); ++j) {
                    float& h = hidden[t * n_ff + j];
                    if (predicting) {
                        due += h != 0.0f;
                        if (predictions[t * n_ff + j] < batch.threshold) {
                            missed += h != 0.0f;
                            h = 0.0f;
                        } else {
                            ++predicted;
                        }
                    }
                    active += h != 0.0f;
                    if (batch.activations) batch.activations[j] += h != 0.0f;
                }
            }
            n_active += active;
            n_predicted += predicted;
            n_due += due;
            n_missed += missed;
        });
        if (group.rule != NeuronRule::all) {
            FfnCounters& counters = *batch.counters;
            counters.n_tokens += uint64_t(n);
            counters.n_active += n_active;
            counters.n_predicted += n_predicted;
            counters.n_checked += predicting ? uint64_t(n) : 0;
            counters.n_due += n_due;
            counters.n_missed += n_missed;
        }
    }
    if (!ffn.down_by_neuron)
        project_down(ffn, n, group.y);
    else if (n <= few_tokens)
        add_down_of_few(ffn, n, group.y);
    else
        add_down_of_many(ffn, n, group.y);
}

// hidden = act(gate·x) ⊙ up·x of all neurons: [n_tokens][n_ff]
void CpuFeedForward::activate(const FeedForward& ffn, const float* x, int64_t n_tokens,
                              float* hidden) {
    const Weight& up = ffn.up.weight;
    const int64_t n_ff = up.n_rows;
    const ActivationForm up_form = kernels::activation_form(up.type);
    // Gate and up are nearly always of one form; the rare other case prepares the input twice.
    const bool two_forms = ffn.gated && kernels::activation_form(ffn.gate.weight.type) != up_form;
    if (two_forms) {
        const std::byte* prepared = products_.prepare(
            kernels::activation_form(ffn.gate.weight.type), x, up.n_cols, n_tokens);
        const Projection gate{&ffn.gate, hidden, false};
        products_.multiply(prepared, n_tokens, {&gate, 1});
    }
    const std::byte* prepared = products_.prepare(up_form, x, up.n_cols, n_tokens);
    const int64_t step = products_.chunk_rows(up, n_tokens, ffn.gated ? 2 : 1);
    const size_t scratch =
        CpuProducts::scratch_for(up, n_tokens, ffn.gated ? &ffn.gate.weight : nullptr);
    const size_t up_bytes = ffn.gated ? size_t(n_tokens * step) * sizeof(float) : 0;
    products_.reserve_workers(scratch + up_bytes);
    products_.loop((n_ff + step - 1) / step, [&](int64_t chunk, int worker) {
        const int64_t begin = chunk * step, end = std::min(n_ff, begin + step);
        std::byte* room = products_.room(worker);
        if (!ffn.gated) {
            CpuProducts::rows(ffn.up, begin, end, prepared, n_tokens, hidden, n_ff, room);
            for (int64_t t = 0; t < n_tokens; ++t)
                kernels::activate(kernel_activation(ffn.act.kind), ffn.act.threshold,
                                  hidden + t * n_ff + begin, end - begin);
            return;
        }
        // This chunk of up·x lives only until it has met the gate: [n_tokens][step].
        float* lifted = reinterpret_cast<float*>(room + scratch);
        if (!two_forms)
            CpuProducts::rows(ffn.gate, begin, end, prepared, n_tokens, hidden, n_ff, room);
        CpuProducts::rows(ffn.up, begin, end, prepared, n_tokens, lifted - begin, step, room);
        for (int64_t t = 0; t < n_tokens; ++t)
            combine(ffn.act, hidden + t * n_ff + begin, lifted + t * step, end - begin);
    });
}

void CpuFeedForward::project_down(const FeedForward& ffn, int64_t n_tokens, float* y) {
    const Projection down{&ffn.down, y, true};
    products_.project(hidden_.data(), n_tokens, {&down, 1});
}

// The same bits; groups of columns in which no token has an active neuron are left out where that
// is faster. Returns the bytes of down that were wanted.
uint64_t CpuFeedForward::project_down_of_chosen(const FeedForward& ffn, int64_t n_tokens, bool bias,
                                                float* y) {
    const Weight& down = ffn.down.weight;
    const int64_t size = kernels::column_group(down.type), n_ff = down.n_cols;
    const int64_t n_groups = (n_ff + size - 1) / size;
    groups_.resize(size_t(n_groups));
    groups_.resize(
        size_t(kernels::nonzero_groups(hidden_.data(), n_ff, n_tokens, size, groups_.data())));
    const bool all = int64_t(groups_.size()) * 2 > n_groups;
    const std::byte* prepared =
        products_.prepare(kernels::activation_form(down.type), hidden_.data(), n_ff, n_tokens);
    const Linear bare{down, {}};
    const Projection projection{bias ? &ffn.down : &bare, y, true};
    products_.multiply(prepared, n_tokens, {&projection, 1}, all ? nullptr : &groups_);
    if (all) return weight_bytes(ffn.down);
    int64_t n_cols = 0;
    for (const int32_t group : groups_)
        n_cols += std::min(size, n_ff - group * size);
    return weight_bytes(ffn.down) * uint64_t(n_cols) / uint64_t(n_ff);
}

// 0, 1, …, n_ff - 1
const int32_t* CpuFeedForward::all_neurons(int64_t n_ff) {
    if (neurons_.capacity_bytes() < size_t(n_ff) * sizeof(int32_t)) {
        int32_t* numbers = neurons_.reserve(size_t(n_ff));
        std::iota(numbers, numbers + n_ff, 0);
    }
    return neurons_.data();
}

// y += down of hidden_, all rows of down, partition by partition.
void CpuFeedForward::add_down_of_few(const FeedForward& ffn, int64_t n_tokens, float* y) {
    const Weight& down = ffn.down.weight;
    const int64_t n_ff = down.n_rows, n_embd = down.n_cols;
    const int32_t* neurons = all_neurons(n_ff);
    float* partial = partial_.reserve(size_t(n_partitions * n_tokens * n_embd));
    products_.reserve_workers(kernels::row_sums_scratch_bytes());
    products_.loop(n_partitions, [&](int64_t p, int worker) {
        const int64_t begin = partition_begin(n_ff, p), end = partition_begin(n_ff, p + 1);
        float* sums = partial + p * n_tokens * n_embd;
        std::fill_n(sums, n_tokens * n_embd, 0.0f);
        kernels::add_row_sums({down, neurons + begin, end - begin, hidden_.data(), n_ff, true,
                               n_tokens, 0, n_embd, sums, n_embd},
                              products_.room(worker));
    });
    add_partial_sums(ffn, n_tokens, true, y);
}

// The same for many tokens, shared out by columns: nobody reads another's sums.
void CpuFeedForward::add_down_of_many(const FeedForward& ffn, int64_t n_tokens, float* y) {
    constexpr int64_t cols = kernels::row_sum_cols;
    const Weight& down = ffn.down.weight;
    const int64_t n_ff = down.n_rows, n_embd = down.n_cols;
    const int64_t n_strips = (n_embd + cols - 1) / cols;
    const int64_t n_runs = (n_tokens + down_tokens - 1) / down_tokens;
    const int64_t width = n_ff / n_partitions + 1;
    products_.reserve_workers(Room::bytes<int32_t>(width) +
                              2 * Room::bytes<float>(down_tokens * cols) +
                              kernels::row_sums_scratch_bytes());
    products_.loop(n_strips * n_runs, [&](int64_t task, int worker) {
        const int64_t col = task % n_strips * cols, n_cols = std::min(cols, n_embd - col);
        const int64_t first = task / n_strips * down_tokens;
        const int64_t n = std::min(down_tokens, n_tokens - first);
        const float* hidden = hidden_.data() + first * n_ff;
        Room room(products_.room(worker));
        int32_t* list = room.take<int32_t>(width);
        float* totals = room.take<float>(down_tokens * cols);
        float* sums = room.take<float>(down_tokens * cols);
        std::byte* scratch = room.take<std::byte>(0);
        for (int64_t p = 0; p < n_partitions; ++p) {
            int64_t n_listed = 0;
            for (int64_t j = partition_begin(n_ff, p); j < partition_begin(n_ff, p + 1); ++j) {
                bool active = false;
                for (int64_t t = 0; t < n && !active; ++t)
                    active = hidden[t * n_ff + j] != 0.0f;
                if (active) list[n_listed++] = int32_t(j);
            }
            float* into = p == 0 ? totals : sums;
            std::fill_n(into, n * cols, 0.0f);
            if (n_listed > 0)
                kernels::add_row_sums(
                    {down, list, n_listed, hidden, n_ff, true, n, col, col + n_cols, into, cols},
                    scratch);
            if (p > 0) kernels::add(totals, sums, n * cols, totals);
        }
        for (int64_t t = 0; t < n; ++t) {
            float* total = totals + t * cols;
            if (!ffn.down.bias.empty())
                kernels::add(total, ffn.down.bias.data() + col, n_cols, total);
            float* out = y + (first + t) * n_embd + col;
            kernels::add(out, total, n_cols, out);
        }
    });
}

// y += the partitions' sums, added in order, and down's bias where it is wanted.
void CpuFeedForward::add_partial_sums(const FeedForward& ffn, int64_t n_tokens, bool bias,
                                      float* y) {
    const int64_t n_embd = ffn.down.weight.n_cols, stride = n_tokens * n_embd;
    products_.for_each(n_tokens, n_partitions * n_embd, [&](int64_t t) {
        float* total = partial_.data() + t * n_embd;
        for (int64_t p = 1; p < n_partitions; ++p)
            kernels::add(total, total + p * stride, n_embd, total);
        if (bias && !ffn.down.bias.empty())
            kernels::add(total, ffn.down.bias.data(), n_embd, total);
        kernels::add(y + t * n_embd, total, n_embd, y + t * n_embd);
    });
}

// ---- chosen neurons ----

const float* CpuFeedForward::predict(const FeedForward& ffn, const FfnBatch& batch,
                                     const Group& group) {
    const auto start = Clock::now();
    const Predictor& predictor = *ffn.predictor;
    const int64_t n = group.n_tokens, rank = predictor.fc1.weight.n_rows;
    float* low = low_.reserve(size_t(n * rank));
    const Projection first{&predictor.fc1, low};
    products_.project(group.z, n, {&first, 1});
    kernels::activate(kernels::Activation::relu, 0.0f, low, n * rank);
    float* predictions = predictions_.reserve(size_t(n * predictor.fc2.weight.n_rows));
    const Projection second{&predictor.fc2, predictions};
    products_.project(low, n, {&second, 1});
    batch.counters->predict_seconds += seconds_since(start);
    batch.counters->n_bytes += weight_bytes(predictor.fc1) + weight_bytes(predictor.fc2);
    return predictions;
}

// Sampled: every gate of a token, to see which active neurons the predictor did not name.
void CpuFeedForward::check_predictions(const FeedForward& ffn, const FfnBatch& batch,
                                       const Group& group, const std::byte* prepared,
                                       const float* predictions) {
    const Linear& first = ffn.first();
    const int64_t n_ff = first.weight.n_rows;
    float* gates = gates_.reserve(size_t(group.n_tokens * n_ff));
    const Projection gate{&first, gates};
    products_.multiply(prepared, group.n_tokens, {&gate, 1});
    FfnCounters& counters = *batch.counters;
    counters.n_checked += uint64_t(group.n_tokens);
    for (int64_t i = 0; i < group.n_tokens * n_ff; ++i) {
        if (!(gates[i] > ffn.act.threshold)) continue;
        ++counters.n_due;
        counters.n_missed += predictions[i] < batch.threshold;
    }
}

// The same of the neurons of a shard, whose names another device knows.
void CpuFeedForward::check_names(const FeedForward& ffn, const FfnBatch& batch, const Group& group,
                                 const std::byte* prepared) {
    const Linear& first = ffn.first();
    const std::span<const int32_t> neurons = batch.shard->neurons();
    const auto stride = int64_t(neurons.size()), n_words = name_words(first.weight.n_rows);
    float* gates = gates_.reserve(size_t(group.n_tokens * stride));
    products_.loop(n_partitions, [&](int64_t p, int) {
        const std::span<const int32_t> ours = batch.shard->partition(p);
        const auto n = int64_t(ours.size());
        float* of_ours = gates + (ours.data() - neurons.data());
        kernels::matmul_listed(first.weight, ours.data(), n, prepared, group.n_tokens, of_ours,
                               stride);
        for (int64_t t = 0; t < group.n_tokens; ++t)
            add_bias(first, ours.data(), n, of_ours + t * stride);
    });
    FfnCounters& counters = *batch.counters;
    counters.n_checked += uint64_t(group.n_tokens);
    for (int64_t t = 0; t < group.n_tokens; ++t) {
        for (int64_t i = 0; i < stride; ++i) {
            if (!(gates[t * stride + i] > ffn.act.threshold)) continue;
            ++counters.n_due;
            counters.n_missed += !is_named(group.names + t * n_words, neurons[size_t(i)]);
        }
    }
}

void CpuFeedForward::compute_chosen(const FeedForward& ffn, const FfnBatch& batch,
                                    const Group& group) {
    const Linear& first = ffn.first();
    const int64_t n = group.n_tokens, n_ff = first.weight.n_rows, n_embd = first.weight.n_cols;
    const bool predicting = group.rule == NeuronRule::predict;
    FfnCounters& counters = *batch.counters;
    if (predicting && !group.names) predict(ffn, batch, group);
    if (!batch.shard) all_neurons(n_ff);

    const ActivationForm form = kernels::activation_form(first.weight.type);
    const std::byte* prepared = products_.prepare(form, group.x, n_embd, n);
    // A shard's gates come with the partitions.
    if (!predicting && !batch.shard) {
        const Projection gate{&first, gates_.reserve(size_t(n * n_ff))};
        products_.multiply(prepared, n, {&gate, 1});
        counters.n_bytes += weight_bytes(first);
    } else if (batch.check && predicting) {
        if (batch.shard)
            check_names(ffn, batch, group, prepared);
        else
            check_predictions(ffn, batch, group, prepared, predictions_.data());
    }
    const int64_t width = n_ff / n_partitions + 1;
    products_.reserve_workers(2 * Room::bytes<int32_t>(width) + 2 * Room::bytes<float>(n * width) +
                              kernels::row_sums_scratch_bytes());
    if (ffn.down_by_neuron)
        partial_.reserve(size_t(n_partitions * n * n_embd));
    else
        hidden_.reserve(size_t(n * n_ff));

    PartitionCounts counts[n_partitions] = {};
    products_.loop(n_partitions, [&](int64_t p, int worker) {
        choose_and_add(ffn, batch, group, prepared, p, products_.room(worker), counts[p]);
    });
    const bool choosing = group.rule != NeuronRule::all;
    if (choosing) counters.n_tokens += uint64_t(n);
    for (const PartitionCounts& c : counts) {
        if (choosing) counters.n_active += c.n_active;
        counters.n_predicted += c.n_predicted;
        counters.n_bytes += c.n_first_rows * first.weight.row_bytes +
                            c.n_up_rows * ffn.up.weight.row_bytes +
                            c.n_down_rows * ffn.down.weight.row_bytes;
    }
    const bool adds_bias = !batch.shard || int64_t(batch.shard->neurons().size()) == n_ff;
    if (ffn.down_by_neuron) {
        add_partial_sums(ffn, n, adds_bias, group.y);
    } else {
        counters.n_bytes += project_down_of_chosen(ffn, n, adds_bias, group.y);
    }
}

// One partition's neurons: which are active, what they are worth, and their part of the sum.
void CpuFeedForward::choose_and_add(const FeedForward& ffn, const FfnBatch& batch,
                                    const Group& group, const std::byte* prepared,
                                    int64_t partition, std::byte* scratch,
                                    PartitionCounts& counts) {
    const Linear& first = ffn.first();
    const int64_t n = group.n_tokens, n_ff = first.weight.n_rows, n_embd = first.weight.n_cols;
    const int64_t begin = partition_begin(n_ff, partition);
    const int64_t end = partition_begin(n_ff, partition + 1), width = n_ff / n_partitions + 1;
    Room room(scratch);
    int32_t* named = room.take<int32_t>(width);
    int32_t* list = room.take<int32_t>(width);
    float* hidden = room.take<float>(n * width);  // [n][width], the gates first
    float* lifted = room.take<float>(n * width);
    std::byte* row_sums = room.take<std::byte>(0);

    // Each of the products waits for its first rows otherwise.
    const auto fetch = [&](const int32_t* neurons, int64_t n_neurons) {
        if (group.rule == NeuronRule::predict || batch.shard)
            kernels::fetch_listed(first.weight, neurons, n_neurons);
        if (ffn.gated) kernels::fetch_listed(ffn.up.weight, neurons, n_neurons);
        if (ffn.down_by_neuron) kernels::fetch_listed(ffn.down.weight, neurons, n_neurons);
    };

    // The gates of neurons that a token of the group may need, and 0 where a token does not.
    const std::span<const int32_t> ours =
        batch.shard ? batch.shard->partition(partition)
                    : std::span(neurons_.data() + begin, size_t(end - begin));
    const bool predicting = group.rule == NeuronRule::predict;
    const auto is_due = [&](int64_t t, int32_t j) {
        return group.names ? is_named(group.names + t * name_words(n_ff), j)
                           : !(predictions_.data()[t * n_ff + j] < batch.threshold);
    };
    int64_t n_named = 0;
    for (const int32_t j : ours) {
        int64_t n_of = !predicting;
        for (int64_t t = 0; t < n && predicting; ++t)
            n_of += is_due(t, j);
        named[n_named] = j;
        n_named += n_of > 0;
        if (predicting) counts.n_predicted += uint64_t(n_of);
    }
    if (predicting || batch.shard) {
        fetch(named, n_named);
        kernels::matmul_listed(first.weight, named, n_named, prepared, n, lifted, width);
        for (int64_t t = 0; t < n; ++t) {
            add_bias(first, named, n_named, lifted + t * width);
            for (int64_t i = 0; i < n_named && predicting; ++i)
                if (!is_due(t, named[i])) lifted[t * width + i] = 0;
        }
        counts.n_first_rows += uint64_t(n_named);
    } else {
        for (int64_t t = 0; t < n; ++t)
            std::copy_n(gates_.data() + t * n_ff + begin, end - begin, lifted + t * width);
    }
    // Where the activation can be 0, only neurons whose gate passes it go on.
    const bool refine = is_sparse(ffn.act);
    int64_t n_listed = 0;
    for (int64_t i = 0; i < n_named; ++i) {
        bool active = !refine;
        for (int64_t t = 0; t < n; ++t)
            active |= !(lifted[t * width + i] <= ffn.act.threshold);
        if (!active) continue;
        for (int64_t t = 0; t < n; ++t)
            hidden[t * width + n_listed] = lifted[t * width + i];
        list[n_listed++] = named[i];
    }

    if (!predicting && !batch.shard) fetch(list, n_listed);
    if (ffn.gated) {
        kernels::matmul_listed(ffn.up.weight, list, n_listed, prepared, n, lifted, width);
        counts.n_up_rows += uint64_t(n_listed);
    }
    for (int64_t t = 0; t < n; ++t) {
        float* h = hidden + t * width;
        if (ffn.gated) {
            add_bias(ffn.up, list, n_listed, lifted + t * width);
            combine(ffn.act, h, lifted + t * width, n_listed);
        } else {
            kernels::activate(kernel_activation(ffn.act.kind), ffn.act.threshold, h, n_listed);
        }
        for (int64_t i = 0; i < n_listed; ++i) {
            counts.n_active += h[i] != 0.0f;
            if (batch.activations) batch.activations[list[i]] += h[i] != 0.0f;
        }
    }

    if (ffn.down_by_neuron) {
        float* sums = partial_.data() + partition * n * n_embd;
        std::fill_n(sums, n * n_embd, 0.0f);
        if (n_listed > 0)
            kernels::add_row_sums(
                {ffn.down.weight, list, n_listed, hidden, width, false, n, 0, n_embd, sums, n_embd},
                row_sums);
        counts.n_down_rows += uint64_t(n_listed);
        return;
    }
    for (int64_t t = 0; t < n; ++t) {
        float* all = hidden_.data() + t * n_ff;
        std::fill(all + begin, all + end, 0.0f);
        for (int64_t i = 0; i < n_listed; ++i)
            all[list[i]] = hidden[t * width + i];
    }
}

}  // namespace qi
