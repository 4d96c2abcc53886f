#include "device/cuda/speeds.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "base/error.h"
#include "base/median.h"
#include "device/cuda/weights.h"

namespace qi::cuda {

namespace {

// A token names about so much of a sparse network.
constexpr int64_t one_in = 10;
constexpr int n_rounds = 9;

// Every tenth of the first n neurons, from `first` on.
std::vector<int32_t> some_neurons(int64_t n, int64_t first) {
    std::vector<int32_t> neurons;
    for (int64_t j = first; j < n; j += one_in)
        neurons.push_back(int32_t(j));
    return neurons;
}

std::vector<float> random_input(int64_t n) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(n));
    for (float& value : x)
        value = normal(rng);
    return x;
}

// Other neurons in each round, which are in no cache.
double host_seconds(const FeedForward& ffn, Device& host, int64_t n, const std::vector<float>& x) {
    const std::vector<NeuronRule> rules{NeuronRule::predict};
    std::vector<float> y(x.size());
    std::vector<double> seconds;
    for (int round = 0; round < n_rounds; ++round) {
        const NeuronShard shard(some_neurons(n, round % one_in), ffn.up.weight.n_rows);
        const std::vector<uint32_t> names(size_t(name_words(ffn.up.weight.n_rows)), ~0u);
        FfnCounters counters;
        FfnBatch batch{x.data(), nullptr, 0, false, &counters, nullptr, &shard, names.data()};
        host.begin({1, {}, rules, nullptr, 0});
        const auto start = std::chrono::steady_clock::now();
        host.feed_forward(ffn, batch, y.data());
        seconds.push_back(
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return median(seconds);
}

// What a GPU keeps for the measurement, and the launches of one step.
class Probe {
  public:
    Probe(const GpuShare& share, const FeedForward& ffn, int64_t n, const std::vector<float>& x)
        : kernels_(*share.kernels), ffn_(ffn), weights_(share.gpu, share.budget) {
        const int64_t n_ff = ffn.up.weight.n_rows, n_embd = ffn.up.weight.n_cols;
        std::vector<int32_t> kept, rest;
        for (int32_t j = 0; j < n_ff; ++j)
            (j < n ? kept : rest).push_back(j);
        weights_.reserve(bytes(ffn, n));
        weights_.keep(ffn, {std::move(kept), n_ff}, {std::move(rest), n_ff});
        list_ = NeuronList::at(weights_.allocate(NeuronList::n_bytes(n_ff)), n_ff);
        x_ = weights_.allocate(size_t(n_embd) * sizeof(float));
        q8_ = Q8::at(weights_.allocate(Q8::n_bytes(1, n_embd)), 1, n_embd);
        h_ = weights_.allocate(size_t(n_ff) * sizeof(float));
        y_ = weights_.allocate(size_t(n_embd) * sizeof(float));
        partial_ = weights_.allocate(size_t(n_partitions * n_embd) * sizeof(float));
        tickets_ = weights_.allocate(n_ticket_bytes(n_embd));
        masks_ = weights_.allocate(2 * n_name_bytes(n_ff));
        predictions_ = weights_.allocate(size_t(n_ff + one_in) * sizeof(float));
        rules_ = weights_.allocate(1);
        stream_.emplace(share.gpu);
        stream_->copy_to_device(x_, x.data(), x.size() * sizeof(float));
        if (wants_q8(ffn.up.weight.type)) kernels_.quantise(*stream_, x_, 1, n_embd, q8_);
        stream_->fill(y_, 0, size_t(n_embd) * sizeof(float));
        stream_->fill(tickets_, 0, n_ticket_bytes(n_embd));
        stream_->fill(rules_, uint8_t(NeuronRule::predict), 1);
        // Predictions from the k-th on name every tenth neuron, others for each k below ten.
        std::vector<float> predictions(size_t(n_ff + one_in), -1.0f);
        for (int64_t j = 0; j < n_ff + one_in; j += one_in)
            predictions[size_t(j)] = 1.0f;
        stream_->copy_to_device(predictions_, predictions.data(),
                                predictions.size() * sizeof(float));
        stream_->synchronize();
    }

    // Beyond alignment, of which weights_.allocate() takes up to 256 bytes an array.
    static size_t bytes(const FeedForward& ffn, int64_t n) {
        const auto n_ff = size_t(ffn.up.weight.n_rows), n_embd = size_t(ffn.up.weight.n_cols);
        return Weights::bytes_of(ffn, n) + NeuronList::n_bytes(int64_t(n_ff)) +
               Q8::n_bytes(1, int64_t(n_embd)) +
               ((2 + n_partitions) * n_embd + 2 * n_ff + one_in) * sizeof(float) +
               2 * n_name_bytes(int64_t(n_ff)) + n_ticket_bytes(int64_t(n_embd)) + 11 * 256;
    }

    // As steps are replayed: networks of a graph, each with other neurons, which are in no cache.
    double seconds() {
        const DeviceFfn& kept = weights_.find(ffn_);
        launch(kept, 0);  // loads the kernels
        const Graph networks(*stream_, [&] {
            for (int64_t turn = 0; turn < one_in; ++turn)
                launch(kept, turn);
        });
        const Event begin(stream_->gpu(), true), end(stream_->gpu(), true);
        std::vector<double> seconds;
        for (int round = 0; round < n_rounds; ++round) {
            begin.record(*stream_);
            networks.launch(*stream_);
            end.record(*stream_);
            stream_->synchronize();
            seconds.push_back(Event::seconds_between(begin, end) / one_in);
        }
        return median(seconds);
    }

  private:
    static size_t n_name_bytes(int64_t n_ff) { return size_t(name_words(n_ff)) * sizeof(uint32_t); }
    // Of the sums of down, and the list's behind them.
    static size_t n_ticket_bytes(int64_t n_embd) {
        return Kernels::down_ticket_bytes(1, n_embd) + sizeof(uint32_t);
    }

    // Of every tenth neuron, in each turn others.
    void launch(const DeviceFfn& kept, int64_t turn) {
        const int64_t n_embd = ffn_.up.weight.n_cols, n_ff = ffn_.up.weight.n_rows;
        SelectArgs select;
        select.predictions = predictions_ + size_t(turn) * sizeof(float);
        select.rules = rules_;
        select.n_tokens = 1;
        select.n_ff = n_ff;
        select.masks = masks_;
        select.list = &list_;
        select.slot_of_neuron = kept.slot_of_neuron;
        select.listed = masks_ + n_name_bytes(n_ff);
        select.ticket = tickets_ + Kernels::down_ticket_bytes(1, n_embd);
        kernels_.select(*stream_, select);
        FfnArgs rows;
        rows.w = kept.weights;
        // Gates of another type cost about what these do.
        rows.w.gate_type = rows.w.up_type;
        rows.in = {x_, q8_, 1};
        rows.list = &list_;
        rows.act = DeviceAct::relu;
        rows.h = h_;
        rows.h_stride = list_.capacity;
        kernels_.ffn_rows(*stream_, rows);
        DownArgs down;
        down.w = kept.weights;
        down.list = &list_;
        down.h = h_;
        down.h_stride = list_.capacity;
        down.n_tokens = 1;
        down.partial = partial_;
        down.tickets = tickets_;
        down.y = y_;
        kernels_.down_rows(*stream_, down);
    }

    Kernels& kernels_;
    const FeedForward& ffn_;
    Weights weights_;
    CUdeviceptr x_ = 0, h_ = 0, y_ = 0, partial_ = 0, tickets_ = 0, masks_ = 0, predictions_ = 0,
                rules_ = 0;
    Q8 q8_;
    NeuronList list_;
    std::optional<Stream> stream_;
};

}  // namespace

Speeds measure_speeds(const GpuShare& share, const FeedForward& ffn, Device& host) {
    const int64_t n_ff = ffn.up.weight.n_rows;
    // Memory is handed out in pages.
    constexpr size_t page = size_t(1) << 21;
    const size_t left = share.budget->left_bytes();
    int64_t n = n_ff;
    while (n >= one_in && DeviceMemory::counted_bytes(Probe::bytes(ffn, n)) + page > left)
        n /= 2;
    if (n < one_in)
        fail(QI_MEMORY, "the budget of the GPU's memory leaves no room to measure its speed");
    const Current current(*share.gpu);
    const std::vector<float> x = random_input(ffn.up.weight.n_cols);
    Probe probe(share, ffn, n, x);
    const double n_active = double(some_neurons(n, 0).size());
    return {n_active / std::max(probe.seconds(), 1e-9),
            n_active / std::max(host_seconds(ffn, host, n, x), 1e-9)};
}

}  // namespace qi::cuda
