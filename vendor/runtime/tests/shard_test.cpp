// A feed-forward network cut into shards: their contributions, and the bias, add up to the whole. A
// shard of all neurons is the whole.
#include <cmath>
#include <vector>

#include "device/device.h"
#include "kernel_checks.h"
#include "kernels/vector_ops.h"
#include "weight_fixtures.h"

using namespace qi;
using namespace qi::test;

namespace {

Checks checks;

constexpr int64_t n_embd = 256, n_ff = 768, rank = 256, n_tokens_max = 11;
constexpr float threshold = 0.1f;

struct Network {
    GuardedBytes gate, up, down, fc1, fc2;
    FeedForward ffn;

    Network(Type type, bool gated, bool by_neuron, std::mt19937& rng)
        : gate(bytes(type, n_ff, n_embd)),
          up(bytes(type, n_ff, n_embd)),
          down(by_neuron ? bytes(type, n_ff, n_embd) : bytes(type, n_embd, n_ff)),
          fc1(bytes(Type::f32, rank, n_embd)),
          fc2(bytes(Type::f32, n_ff, rank)) {
        ffn.gated = gated;
        ffn.gate = linear(gate, type, n_ff, n_embd, rng);
        ffn.up = linear(up, type, n_ff, n_embd, rng);
        ffn.down = by_neuron ? linear(down, type, n_ff, n_embd, rng)
                             : linear(down, type, n_embd, n_ff, rng);
        ffn.down.bias = random_normal(rng, n_embd);
        ffn.up.bias = random_normal(rng, n_ff);
        ffn.down_by_neuron = by_neuron;
        ffn.act.kind = HiddenAct::Kind::relu;
        ffn.predictor = Predictor{linear(fc1, Type::f32, rank, n_embd, rng),
                                  linear(fc2, Type::f32, n_ff, rank, rng)};
    }
    static size_t bytes(Type type, int64_t n_rows, int64_t n_cols) {
        return size_t(n_rows) * row_bytes(type, n_cols);
    }
    static Linear linear(GuardedBytes& at, Type type, int64_t n_rows, int64_t n_cols,
                         std::mt19937& rng) {
        fill_weights(type, Content::random, at.data(), bytes(type, n_rows, n_cols), rng);
        return {{type, at.data(), n_rows, n_cols, row_bytes(type, n_cols)}, {}};
    }
};

// Which neurons the predictor names, by bit.
std::vector<uint32_t> names_of(Device& device, const Predictor& predictor, const float* z,
                               int64_t n) {
    std::vector<float> low(size_t(n * rank)), predictions(size_t(n * n_ff));
    const Projection first{&predictor.fc1, low.data()};
    device.project(z, n, {&first, 1});
    kernels::activate(kernels::Activation::relu, 0.0f, low.data(), n * rank);
    const Projection second{&predictor.fc2, predictions.data()};
    device.project(low.data(), n, {&second, 1});
    std::vector<uint32_t> names(size_t(n * name_words(n_ff)));
    for (int64_t t = 0; t < n; ++t)
        for (int64_t j = 0; j < n_ff; ++j)
            if (!(predictions[size_t(t * n_ff + j)] < threshold))
                names[size_t(t * name_words(n_ff) + j / 32)] |= 1u << (j % 32);
    return names;
}

void check_network(Type type, bool gated, bool by_neuron, std::mt19937& rng) {
    Network network(type, gated, by_neuron, rng);
    const FeedForward& ffn = network.ffn;
    const auto device = make_cpu_device(2);
    // Whole blocks of an ordinary down stay together.
    std::vector<int32_t> parts[2];
    for (int32_t j = 0; j < n_ff; ++j)
        parts[by_neuron ? rng() % 3 == 0 : j / 256 == 1].push_back(j);
    std::vector<int32_t> all(n_ff);
    std::iota(all.begin(), all.end(), 0);
    const std::vector<NeuronShard> splits[] = {{{parts[0], n_ff}, {parts[1], n_ff}}, {{all, n_ff}}};
    const std::vector<float> x = random_normal(rng, n_tokens_max * n_embd, 0.1f);
    const std::vector<uint32_t> names = names_of(*device, *ffn.predictor, x.data(), n_tokens_max);

    for (int64_t n : {1, 2, 8, 11}) {
        for (int rule = 0; rule < 4; ++rule) {  // the last: a mixture
            std::vector<NeuronRule> rules;
            for (int64_t t = 0; t < n; ++t)
                rules.push_back(NeuronRule(rule < 3 ? rule : t % 3));
            device->begin({n, {}, rules, nullptr, 0});
            FfnCounters whole_counters;
            FfnBatch batch{x.data(), x.data(), threshold, false, &whole_counters, nullptr};
            std::vector<float> whole(size_t(n * n_embd));
            device->feed_forward(ffn, batch, whole.data());
            batch.names = names.data();
            for (const auto& shards : splits) {
                FfnCounters counters;
                batch.counters = &counters;
                std::vector<float> sum(whole.size());
                for (const NeuronShard& shard : shards) {
                    batch.shard = &shard;
                    device->feed_forward(ffn, batch, sum.data());
                }
                double error = 0, size = 0;
                for (size_t i = 0; i < sum.size(); ++i) {
                    const float bias = shards.size() > 1 ? ffn.down.bias[i % n_embd] : 0.0f;
                    const float added = sum[i] + bias;
                    error += (added - whole[i]) * (added - whole[i]);
                    size += whole[i] * whole[i];
                }
                // The order of the sum over neurons is another one; activations of a quantised down
                // are rounded in other blocks only where a block is cut, and none is.
                checks.expect(std::sqrt(error / size) < 1e-6,
                              "%s%s%s, %d tokens, rule %d: %zu shards differ from the whole by %g",
                              traits(type).name, gated ? ", gated" : "",
                              by_neuron ? ", by neuron" : "", int(n), rule, shards.size(),
                              std::sqrt(error / size));
                checks.expect(counters.n_active == whole_counters.n_active &&
                                  counters.n_predicted == whole_counters.n_predicted,
                              "%s, %d tokens, rule %d: %zu shards count other neurons",
                              traits(type).name, int(n), rule, shards.size());
            }
        }
    }
}

}  // namespace

int main() {
    std::mt19937 rng(3);
    for (Type type : {Type::f32, Type::f16, Type::q4_0, Type::q4_k, Type::q6_k})
        for (bool gated : {true, false})
            for (bool by_neuron : {true, false})
                check_network(type, gated, by_neuron, rng);
    return checks.status();
}
