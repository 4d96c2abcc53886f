// Self-tests of the sparse feed-forward network: masks, lists, chosen rows of gate, up and down.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "device/cuda/self_test_bench.h"
#include "kernels/row_sums.h"
#include "kernels/vector_ops.h"
#include "sparse/partition.h"
#include "sparse/policy.h"

namespace qi::cuda {

namespace {

// Some neurons on the GPU, in slots of any order.
std::vector<int32_t> random_slots(Bench& bench, int64_t n_ff, bool all) {
    std::vector<int32_t> slots(size_t(n_ff), -1);
    std::vector<int32_t> order(slots.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), bench.random);
    int32_t used = 0;
    for (const int32_t neuron : order)
        if (all || bench.below(4) != 0) slots[size_t(neuron)] = used++;
    return slots;
}

// ---- masks and lists ----

std::vector<uint32_t> bits_of(int64_t n, const std::function<bool(int64_t)>& is_set) {
    std::vector<uint32_t> words(size_t((n + 31) / 32), 0);
    for (int64_t i = 0; i < n; ++i)
        if (is_set(i)) words[size_t(i / 32)] |= 1u << i % 32;
    return words;
}

void expect_words(Bench& bench, CUdeviceptr got, const std::vector<uint32_t>& want) {
    bench.expect(bench.download<uint32_t>(got, want.size()) == want);
}

void expect_list(Bench& bench, const NeuronList& list, const std::vector<uint32_t>& named,
                 const std::vector<int32_t>& slot_of_neuron) {
    std::vector<int32_t> ids, slots, bounds(n_list_bounds, 0);
    const auto n_ff = int64_t(slot_of_neuron.size());
    for (int64_t j = 0; j < n_ff; ++j) {
        if (slot_of_neuron[size_t(j)] < 0 || !(named[size_t(j / 32)] >> j % 32 & 1u)) continue;
        ids.push_back(int32_t(j));
        slots.push_back(slot_of_neuron[size_t(j)]);
    }
    for (int64_t r = 0; r < n_list_bounds; ++r)
        bounds[size_t(r)] = int32_t(
            std::lower_bound(ids.begin(), ids.end(), n_ff * r / (n_list_bounds - 1)) - ids.begin());
    bench.expect(bench.download<int32_t>(list.n, 1)[0] == int32_t(ids.size()));
    bench.expect(bench.download<int32_t>(list.ids, ids.size()) == ids);
    bench.expect(bench.download<int32_t>(list.slots, slots.size()) == slots);
    bench.expect(bench.download<int32_t>(list.bounds, bounds.size()) == bounds);
}

void test_lists(Bench& bench, int64_t n_ff, int64_t n_tokens, int percent) {
    std::vector<float> values = bench.normal(size_t(n_tokens * n_ff));
    if (n_ff > 5) values[5] = std::nanf("");
    std::vector<uint8_t> rules(static_cast<size_t>(n_tokens), uint8_t(NeuronRule::predict));
    if (n_tokens > 2) rules[1] = uint8_t(NeuronRule::all);
    std::vector<float> sorted = values;
    std::sort(sorted.begin(), sorted.end());
    const float threshold = sorted[sorted.size() * size_t(100 - percent) / 101];
    const std::vector<int32_t> slot_of_neuron = random_slots(bench, n_ff, false);

    const int64_t n_words = (n_ff + 31) / 32;
    const CUdeviceptr slots_at = bench.upload(slot_of_neuron), rules_at = bench.upload(rules);
    const CUdeviceptr values_at = bench.upload(values);
    const NeuronList list = NeuronList::at(bench.room(NeuronList::n_bytes(n_ff)), n_ff);
    const auto predicted = [&](int64_t t, int64_t j) {
        return rules[size_t(t)] != uint8_t(NeuronRule::predict) ||
               !(values[size_t(t * n_ff + j)] < threshold);
    };
    std::vector<uint32_t> all;
    uint64_t n_predicted = 0;
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto words = bits_of(n_ff, [&](int64_t j) { return predicted(t, j); });
        all.insert(all.end(), words.begin(), words.end());
        for (const uint32_t word : words)
            if (rules[size_t(t)] == uint8_t(NeuronRule::predict))
                n_predicted += uint64_t(__builtin_popcount(word));
    }
    const auto any = bits_of(n_ff, [&](int64_t j) {
        for (int64_t t = 0; t < n_tokens; ++t)
            if (predicted(t, j)) return true;
        return false;
    });
    SelectArgs args;
    args.predictions = values_at;
    args.threshold = threshold;
    args.rules = rules_at;
    args.n_tokens = n_tokens;
    args.n_ff = n_ff;
    args.total = bench.zeros(8);
    args.slot_of_neuron = slots_at;
    args.listed = bench.room(size_t(n_words) * 4);
    args.ticket = bench.zeros(4);
    // With a list twice, as the ticket has to be left as it was found.
    for (const int64_t turn : {1, 2, 3}) {
        args.list = turn == 1 ? nullptr : &list;
        args.masks = bench.room(size_t(n_tokens * n_words) * 4);
        bench.kernels.select(bench.stream, args);
        expect_words(bench, args.masks, all);
        bench.expect(bench.download<uint64_t>(args.total, 1)[0] == uint64_t(turn) * n_predicted);
        if (args.list) expect_list(bench, list, any, slot_of_neuron);
    }
    const CUdeviceptr totals = bench.zeros(2 * 8);
    bench.kernels.count_missed(bench.stream, values_at, -0.1f, slots_at, args.masks, rules_at,
                               n_tokens, n_ff, totals);
    uint64_t n_due = 0, n_missed = 0;
    for (int64_t t = 0; t < n_tokens; ++t) {
        if (rules[size_t(t)] != uint8_t(NeuronRule::predict)) continue;
        for (int64_t j = 0; j < n_ff; ++j) {
            if (slot_of_neuron[size_t(j)] < 0 || !(values[size_t(t * n_ff + j)] > -0.1f)) continue;
            ++n_due;
            n_missed += !predicted(t, j);
        }
    }
    const auto found = bench.download<uint64_t>(totals, 2);
    bench.expect(found[0] == n_due && found[1] == n_missed);
}

// ---- moving records ----

// Records that take the places of others; those beside them stay as they are.
void test_places(Bench& bench, int64_t n_slots, int64_t n_moved, size_t stride) {
    std::vector<int32_t> slots(static_cast<size_t>(n_slots));
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), bench.random);
    slots.resize(size_t(n_moved));
    const auto random_words = [&](int64_t n_records) {
        std::vector<uint32_t> words(size_t(n_records) * stride / 4);
        for (uint32_t& word : words)
            word = bench.random();
        return words;
    };
    std::vector<uint32_t> expected = random_words(n_slots);
    const std::vector<uint32_t> arrived = random_words(n_moved);
    NeuronWeights w;
    w.layout.stride = stride;
    w.records = bench.upload(expected);
    bench.kernels.place_records(bench.stream, bench.upload(arrived), bench.upload(slots), n_moved,
                                w);
    for (size_t i = 0; i < slots.size(); ++i)
        std::copy_n(arrived.begin() + int64_t(i * stride / 4), stride / 4,
                    expected.begin() + int64_t(size_t(slots[i]) * stride / 4));
    bench.expect(bench.download<uint32_t>(w.records, expected.size()) == expected);
}

// ---- chosen rows ----

struct FfnCase {
    Type type;
    bool gated;
    DeviceAct act;
    int64_t n_embd, n_ff, n_tokens;
    enum class Way { all, predicted, exact } way;
};

float cpu_activation(DeviceAct act, float threshold, float gate, float up, bool gated) {
    constexpr kernels::Activation kinds[] = {
        kernels::Activation::silu,      kernels::Activation::relu,    kernels::Activation::gelu_erf,
        kernels::Activation::gelu_tanh, kernels::Activation::fatrelu, kernels::Activation::relu};
    float h = gate;
    if (act == DeviceAct::relu_relu && gated)
        kernels::relu_relu_mul(&h, &up, 1);
    else if (gated)
        kernels::activate_mul(kinds[int(act)], threshold, &h, &up, 1);
    else
        kernels::activate(kinds[int(act)], threshold, &h, 1);
    return h;
}

// The layer's weights on both sides.
struct Layer {
    TestWeight gate, up, down;
    std::vector<float> gate_bias, up_bias;
    std::vector<int32_t> slot_of_neuron;
    NeuronWeights device;

    Layer(Bench& bench, const FfnCase& c)
        : gate(bench, c.type, c.n_ff, c.n_embd),
          up(bench, c.type, c.n_ff, c.n_embd),
          down(bench, c.type, c.n_ff, c.n_embd),
          gate_bias(bench.normal(size_t(c.n_ff))),
          up_bias(bench.normal(size_t(c.n_ff))) {
        // All neurons are in the slots of their numbers where no list says otherwise.
        const bool all = c.way == FfnCase::Way::all;
        slot_of_neuron = random_slots(bench, c.n_ff, all);
        if (all) std::iota(slot_of_neuron.begin(), slot_of_neuron.end(), 0);
        const NeuronLayout layout =
            neuron_layout(c.gated ? &c.type : nullptr, &c.type, &c.type, c.n_embd);
        std::vector<std::byte> records(size_t(c.n_ff) * layout.stride, std::byte(0xff));
        const size_t file_bytes = row_bytes(c.type, c.n_embd);
        for (size_t j = 0; j < size_t(c.n_ff); ++j) {
            if (slot_of_neuron[j] < 0) continue;
            std::byte* record = &records[size_t(slot_of_neuron[j]) * layout.stride];
            const auto put = [&](const TestWeight& w, size_t offset) {
                repack_rows(c.type, c.n_embd, &w.bytes[j * file_bytes], 1, record + offset,
                            layout.stride);
            };
            if (c.gated) put(gate, layout.gate_offset);
            put(up, layout.up_offset);
            put(down, layout.down_offset);
        }
        device = {c.type,
                  c.type,
                  c.type,
                  c.gated,
                  bench.upload(records),
                  layout,
                  c.n_embd,
                  c.n_ff,
                  bench.upload(gate_bias),
                  bench.upload(up_bias)};
    }
};

void add_bias(TestProduct& product, const std::vector<float>& bias) {
    for (size_t i = 0; i < product.y.size(); ++i) {
        const float added = bias[i % bias.size()];
        product.tolerance[i] +=
            2 * float_rounding * (std::fabs(double(product.y[i])) + std::fabs(double(added)));
        product.y[i] += added;
    }
}

// y += down of the h that the GPU has, against the CPU's row sums.
void check_down(Bench& bench, const Layer& layer, const FfnCase& c, DownArgs args,
                const std::vector<float>& h) {
    const auto n = size_t(c.n_tokens * c.n_embd);
    const std::vector<float> before = bench.normal(n), bias = bench.normal(size_t(c.n_embd));
    args.tickets = bench.zeros(Kernels::down_ticket_bytes(c.n_tokens, c.n_embd));
    args.bias = bench.upload(bias);
    std::vector<float> got;
    // Twice, as tickets have to be left as they were found.
    for (int turn = 0; turn < 2; ++turn) {
        args.y = bench.upload(before);
        bench.kernels.down_rows(bench.stream, args);
        const auto found = bench.download<float>(args.y, n);
        bench.expect(turn == 0 || found == got);
        got = found;
    }

    std::vector<std::byte> scratch(kernels::row_sums_scratch_bytes() + 64);
    std::vector<float> want(n, 0.0f), sums(n);
    for (int64_t p = 0; p < n_partitions; ++p) {
        const int64_t begin = partition_begin(c.n_ff, p), end = partition_begin(c.n_ff, p + 1);
        std::vector<int32_t> neurons(size_t(end - begin), 0);
        std::iota(neurons.begin(), neurons.end(), int32_t(begin));
        std::fill(sums.begin(), sums.end(), 0.0f);
        kernels::add_row_sums({layer.down.host, neurons.data(), end - begin, h.data(), c.n_ff, true,
                               c.n_tokens, 0, c.n_embd, sums.data(), c.n_embd},
                              scratch.data());
        for (size_t i = 0; i < n; ++i)
            want[i] += sums[i];
    }
    // The CPU has a chain per partition, the GPU one per run, then 8 runs, 16 partitions and two
    // more terms are added on both sides.
    const double roundings = double(c.n_ff) / 16.0 + double(c.n_ff) / 128.0 + 2 * 32.0;
    for (int64_t t = 0; t < c.n_tokens; ++t) {
        for (int64_t i = 0; i < c.n_embd; ++i) {
            const auto at = size_t(t * c.n_embd + i);
            double size = std::fabs(double(before[at])) + std::fabs(double(bias[size_t(i)]));
            for (int64_t j = 0; j < c.n_ff; ++j)
                size += std::fabs(double(h[size_t(t * c.n_ff + j)]) *
                                  double(layer.down.values[size_t(j * c.n_embd + i)]));
            const double value = double(want[at]) + double(bias[size_t(i)]) + double(before[at]);
            bench.compare(double(got[at]), value, roundings * float_rounding * size);
        }
    }
}

// Counted twice, since counts grow.
void check_counts(Bench& bench, const FfnCase& c, const CountArgs& args,
                  const std::vector<float>& h) {
    const CUdeviceptr active = bench.zeros(size_t(c.n_ff) * 8), total = bench.zeros(8);
    bench.kernels.count_active(bench.stream, args, 0, total);
    bench.kernels.count_active(bench.stream, args, active, total);
    bench.kernels.count_active(bench.stream, args, active, 0);
    const auto got = bench.download<uint64_t>(active, size_t(c.n_ff));
    uint64_t all = 0;
    for (int64_t j = 0; j < c.n_ff; ++j) {
        uint64_t count = 0;
        for (int64_t t = 0; t < c.n_tokens; ++t)
            count += h[size_t(t * c.n_ff + j)] != 0.0f;
        bench.expect(got[size_t(j)] == 2 * count);
        all += count;
    }
    bench.expect(bench.download<uint64_t>(total, 1)[0] == 2 * all);
}

// What ffn_rows counted of the h that it made.
void expect_counts(Bench& bench, const FfnArgs& args, int64_t n_ff,
                   const std::vector<uint8_t>& rules, const std::vector<float>& h) {
    const auto active = bench.download<uint64_t>(args.active, size_t(n_ff));
    uint64_t total = 0;
    for (int64_t j = 0; j < n_ff; ++j) {
        uint64_t count = 0;
        for (size_t t = 0; t < rules.size(); ++t) {
            const bool is_active = h[t * size_t(n_ff) + size_t(j)] != 0.0f;
            count += is_active;
            total += is_active && rules[t] != uint8_t(NeuronRule::all);
        }
        bench.expect(active[size_t(j)] == count);
    }
    bench.expect(bench.download<uint64_t>(args.total, 1)[0] == total);
}

void test_ffn(Bench& bench, const FfnCase& c) {
    constexpr float threshold = 0.25f;  // fatrelu's
    const int64_t n = c.n_tokens, n_ff = c.n_ff, n_words = (n_ff + 31) / 32;
    const float limit = c.act == DeviceAct::fatrelu ? threshold : 0.0f;
    const Layer layer(bench, c);
    const TestInput in(bench, bench.normal(size_t(n * c.n_embd)), n, c.n_embd);
    TestProduct gate(layer.gate, in), up(layer.up, in);
    add_bias(gate, layer.gate_bias);
    add_bias(up, layer.up_bias);

    FfnArgs args{layer.device, in.device};
    args.act = c.act;
    args.threshold = threshold;
    const NeuronList list = NeuronList::at(bench.room(NeuronList::n_bytes(n_ff)), n_ff);
    const CUdeviceptr slots_at = bench.upload(layer.slot_of_neuron);
    const CUdeviceptr masks = bench.room(size_t(n * n_words) * 4);
    SelectArgs select;
    select.n_tokens = n;
    select.n_ff = n_ff;
    select.masks = masks;
    select.list = &list;
    select.slot_of_neuron = slots_at;
    select.listed = bench.room(size_t(n_words) * 4);
    select.ticket = bench.zeros(4);
    const std::vector<uint8_t> predict(static_cast<size_t>(n), uint8_t(NeuronRule::predict));
    const std::vector<uint8_t> exact(static_cast<size_t>(n), uint8_t(NeuronRule::exact));
    std::vector<uint32_t> mask_words(size_t(n * n_words), ~0u);
    std::vector<float> gates;
    if (c.way == FfnCase::Way::predicted) {
        select.predictions = bench.upload(bench.normal(size_t(n * n_ff)));
        select.threshold = 0.7f;
        select.rules = bench.upload(predict);
    } else if (c.way == FfnCase::Way::exact) {
        // All gates of the neurons that are here, then those that pass.
        select.rules = bench.upload(exact);
        bench.kernels.select(bench.stream, select);
        args.gates = bench.room(size_t(n * n_ff) * sizeof(float));
        const CUdeviceptr rows = layer.device.records + layer.device.layout.gate_offset;
        const DeviceWeight w{c.type, rows, n_ff, c.n_embd, layer.device.layout.stride};
        bench.kernels.multiply_listed(bench.stream, in.device,
                                      {w, layer.device.gate_bias, args.gates, n_ff}, list, true);
        select.predictions = args.gates;
        select.threshold = std::nextafter(limit, HUGE_VALF);
        select.rules = bench.upload(predict);
        gates = bench.download<float>(args.gates, size_t(n * n_ff));
        for (size_t i = 0; i < gates.size(); ++i)
            if (layer.slot_of_neuron[i % size_t(n_ff)] >= 0)
                bench.compare(double(gates[i]), double(gate.y[i]), gate.tolerance[i]);
    }
    if (c.way != FfnCase::Way::all) {
        bench.kernels.select(bench.stream, select);
        args.masks = masks;
        args.list = &list;
        mask_words = bench.download<uint32_t>(masks, mask_words.size());
    }
    // Tokens of the rule `all` are not summed.
    std::vector<uint8_t> rules = exact;
    if (n > 2) rules[1] = uint8_t(NeuronRule::all);
    args.rules = bench.upload(rules);

    for (const bool by_neuron : {false, true}) {
        args.by_neuron = by_neuron;
        args.h_stride = n_ff + 5;
        args.h = bench.zeros(size_t(n * args.h_stride) * sizeof(float));
        args.active = bench.zeros(size_t(n_ff) * 8);
        args.total = bench.zeros(8);
        bench.kernels.ffn_rows(bench.stream, args);
        const auto got = bench.download<float>(args.h, size_t(n * args.h_stride));
        std::vector<int32_t> ids(static_cast<size_t>(n_ff));
        std::iota(ids.begin(), ids.end(), 0);
        if (args.list) {
            const auto count = size_t(bench.download<int32_t>(list.n, 1)[0]);
            ids = bench.download<int32_t>(list.ids, count);
            bench.expect(count > 0);
        }
        // h by neuron, as it should be and as it is.
        std::vector<float> h(size_t(n * n_ff), 0.0f);
        for (int64_t t = 0; t < n; ++t) {
            for (size_t place = 0; place < ids.size(); ++place) {
                const int32_t j = ids[place];
                const auto at = size_t(t * n_ff + j);
                const float value =
                    got[size_t(t * args.h_stride) + size_t(by_neuron ? j : int(place))];
                h[at] = value;
                const bool masked = !(mask_words[size_t(t * n_words + j / 32)] >> j % 32 & 1u);
                const TestProduct& first = c.gated ? gate : up;
                const float g = gates.empty() ? first.y[at] : gates[at];
                const float want =
                    masked ? 0.0f : cpu_activation(c.act, threshold, g, up.y[at], c.gated);
                // A step of the activation may fall on either side.
                const double g_tolerance = gates.empty() ? first.tolerance[at] : 0.0;
                if (!masked && limit > 0 && value == 0.0f &&
                    std::fabs(double(g - limit)) <= g_tolerance)
                    continue;
                const double u = c.gated ? std::fabs(double(up.y[at])) : 1.0;
                const double slope = 1.2;  // the steepest that an activation gets
                bench.compare(
                    double(value), double(want),
                    slope * g_tolerance * u +
                        (c.gated ? (std::fabs(double(g)) + g_tolerance) * up.tolerance[at] : 0.0) +
                        16 * float_rounding * std::fabs(double(want)));
            }
        }
        const DownArgs down{layer.device,
                            args.list,
                            args.h,
                            args.h_stride,
                            by_neuron,
                            n,
                            bench.room(size_t(n_partitions * n * c.n_embd) * sizeof(float))};
        check_down(bench, layer, c, down, h);
        expect_counts(bench, args, n_ff, rules, h);
        if (!by_neuron) check_counts(bench, c, {args.list, n_ff, args.h, args.h_stride, n}, h);
    }
}

}  // namespace

void add_neuron_tests(std::vector<SelfTest>& tests) {
    for (const int64_t n_ff : {1, 33, 150, 4100, 40000}) {
        const int64_t n_tokens = n_ff > 1000 ? 2 : 5;
        for (const int percent : {10, 100})
            tests.push_back({format("lists of %lld neurons, %d%%", (long long)n_ff, percent),
                             [=](Bench& bench) { test_lists(bench, n_ff, n_tokens, percent); }});
    }
    const auto add_places = [&](int n_slots, int n_moved, int stride) {
        tests.push_back(
            {format("%d of %d records placed, %d bytes", n_moved, n_slots, stride),
             [=](Bench& bench) { test_places(bench, n_slots, n_moved, size_t(stride)); }});
    };
    add_places(1, 1, 16);
    add_places(300, 40, 848);
    add_places(70, 70, 24576);
    using Way = FfnCase::Way;
    const auto add = [&](const FfnCase& c) {
        constexpr const char* ways[] = {"all", "predicted", "exact"};
        constexpr const char* acts[] = {"silu",      "relu",    "gelu_erf",
                                        "gelu_tanh", "fatrelu", "relu_relu"};
        tests.push_back({format("ffn %s %s %s %s, %lldx%lld, %lld tokens", traits(c.type).name,
                                ways[int(c.way)], c.gated ? "gated" : "plain", acts[int(c.act)],
                                (long long)c.n_ff, (long long)c.n_embd, (long long)c.n_tokens),
                         [=](Bench& bench) { test_ffn(bench, c); }});
    };
    int64_t turn = 0;
    for (const TypeTraits& traits : all_types()) {
        const Type type = traits.type;
        const int64_t n_embd = traits.block_size == 1    ? 301 + 8 * turn
                               : traits.block_size == 32 ? 32 * (3 + turn)
                                                         : 512;
        constexpr int64_t tokens[] = {1, 2, 3, 5, 8, 11};
        const auto n_of = [&](int64_t i) { return tokens[(turn + i) % 6]; };
        add({type, true, DeviceAct::relu, n_embd, 150, n_of(0), Way::predicted});
        add({type, true, DeviceAct::fatrelu, n_embd, 150, n_of(1), Way::exact});
        add({type, true, DeviceAct::silu, n_embd, 61, n_of(2), Way::all});
        ++turn;
    }
    add({Type::q4_0, false, DeviceAct::relu, 288, 300, 1, Way::predicted});
    add({Type::f16, false, DeviceAct::gelu_tanh, 280, 300, 2, Way::all});
    add({Type::q8_0, true, DeviceAct::relu_relu, 64, 300, 4, Way::predicted});
    add({Type::q8_0, true, DeviceAct::gelu_erf, 64, 17, 1, Way::predicted});
    add({Type::f32, true, DeviceAct::relu, 20, 1, 1, Way::all});
}

}  // namespace qi::cuda
