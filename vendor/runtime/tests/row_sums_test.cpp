// Row sums of every instruction set: against decoded weights, and bit by bit against one chain of
// fused multiply-adds per output.
#include <cmath>
#include <vector>

#include "kernel_checks.h"
#include "kernels/row_sums_table.h"
#include "quant/codec.h"
#include "weight_fixtures.h"

using namespace qi;
using namespace qi::kernels;
using namespace qi::test;

namespace {

Checks checks;

struct Shape {
    int64_t n_neurons, n_cols, n_tokens;
};

// The portable level rounds a product before it is added, the others do not.
float add_product(Isa isa, float a, float b, float sum) {
    if (isa != Isa::portable) return std::fmaf(a, b, sum);
    volatile float product = a * b;
    return product + sum;
}

void check_shape(Isa isa, Type type, const Shape& shape, bool by_neuron, std::mt19937& rng) {
    const int64_t n_neurons = shape.n_neurons, n_cols = shape.n_cols, n_tokens = shape.n_tokens;
    const size_t bytes = row_bytes(type, n_cols);
    GuardedBytes weights(bytes * size_t(n_neurons));
    fill_weights(type, Content::random, weights.data(), bytes * size_t(n_neurons), rng);
    const Weight w = {type, weights.data(), n_neurons, n_cols, bytes};

    std::vector<int32_t> list;
    for (int64_t j = 0; j < n_neurons; ++j)
        if (rng() % 3) list.push_back(int32_t(j));
    if (list.empty()) list.push_back(0);
    const auto n_rows = int64_t(list.size());
    const int64_t factor_stride = (by_neuron ? n_neurons : n_rows) + 5;
    std::vector<float> factors = random_normal(rng, n_tokens * factor_stride);
    for (float& factor : factors)
        if (rng() % 2) factor = 0.0f;

    std::vector<float> decoded(static_cast<size_t>(n_cols));
    const int64_t sum_stride = n_cols + 7;
    const std::vector<float> start = random_normal(rng, n_tokens * sum_stride);
    std::vector<float> expected = start;
    for (int64_t i = 0; i < n_rows; ++i) {
        const int32_t j = list[size_t(i)];
        decode(type, weights.data() + size_t(j) * bytes, n_cols, decoded.data());
        for (int64_t t = 0; t < n_tokens; ++t) {
            const float factor = factors[size_t(t * factor_stride + (by_neuron ? j : i))];
            if (factor == 0.0f) continue;
            for (int64_t c = 0; c < n_cols; ++c) {
                float& sum = expected[size_t(t * sum_stride + c)];
                sum = add_product(isa, factor, decoded[size_t(c)], sum);
            }
        }
    }

    GuardedBytes scratch(row_sums_scratch_bytes());
    std::vector<float> sums = start;
    // Strip by strip, as threads share columns out.
    for (int64_t col = 0; col < n_cols; col += row_sum_cols) {
        const int64_t end = std::min(n_cols, col + row_sum_cols);
        add_row_sums_for(isa)({w, list.data(), n_rows, factors.data(), factor_stride, by_neuron,
                               n_tokens, col, end, sums.data() + col, sum_stride},
                              scratch.data());
    }
    std::vector<float> whole = start;
    add_row_sums_for(isa)({w, list.data(), n_rows, factors.data(), factor_stride, by_neuron,
                           n_tokens, 0, n_cols, whole.data(), sum_stride},
                          scratch.data());
    const auto expect = [&](const std::vector<float>& found, const char* what) {
        checks.expect(same_bits(found.data(), expected.data(), int64_t(found.size())),
                      "%s: %s %s, %lld neurons, %lld columns, %lld tokens", what, isa_name(isa),
                      traits(type).name, (long long)n_neurons, (long long)n_cols,
                      (long long)n_tokens);
    };
    expect(sums, "differs from the plain sum");
    expect(whole, "depends on the columns asked for");
}

void check_type(Isa isa, Type type) {
    std::mt19937 rng(unsigned(type) * 11 + 3);
    const int64_t block = traits(type).block_size;
    for (const int64_t n_neurons : {1, 7, 8, 9, 40})
        for (const int64_t n_tokens : {1, 2, 5, 17})
            check_shape(isa, type, {n_neurons, block == 1 ? 307 : 3 * block, n_tokens},
                        n_neurons % 2 == 0, rng);
    for (const int64_t n_cols : {1, 8, 9, 17})
        check_shape(isa, type, {20, n_cols * block, 3}, false, rng);
}

}  // namespace

int main() {
    for (const Isa isa : supported_levels())
        for (const TypeTraits& type : all_types())
            check_type(isa, type.type);
    return checks.status();
}
