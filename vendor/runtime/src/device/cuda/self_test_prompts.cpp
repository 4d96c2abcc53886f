// Self-tests of what only prompts use: the down projection of many tokens by neuron.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "device/cuda/self_test_bench.h"
#include "kernels/row_sums.h"

namespace qi::cuda {

namespace {

struct DownCase {
    Type type;
    int64_t n_rows, n_cols, n_tokens;
    bool parts;  // there is room for parts of sums
};

// How far a token's sum may be from the CPU's, as a fraction of the sum of its terms' magnitudes: a
// chain of n_rows sums on both sides, the GPU's brought back to size every 32 rows, 4 parts, bias
// and what was there; and where halves are used what two of them leave of h and of weights.
double down_tolerance(const DownCase& c) {
    const double chains = 2.0 * double(c.n_rows) + double(c.n_rows) / 32.0 + 4.0 + 2.0;
    const double halves = wants_q8(c.type) ? 3 * 0x1p-22 : c.type == Type::f16 ? 0x1p-22 : 0.0;
    return chains * float_rounding + halves;
}

void test_down_tiles(Bench& bench, const DownCase& c) {
    const int64_t n_cols = c.n_cols, n = c.n_tokens;
    const TestWeight w(bench, c.type, c.n_rows, n_cols);
    // Rows of h with a stride of their own, some values 0, one token's beyond what halves hold.
    const int64_t stride = c.n_rows + 3;
    std::vector<float> h = bench.normal(size_t(n * stride));
    for (int64_t t = 0; t < n; ++t)
        for (int64_t k = 0; k < stride; ++k) {
            float& value = h[size_t(t * stride + k)];
            if (bench.below(3) == 0) value = 0.0f;
            if (t == n / 2) value *= 1e6f;
            if (t == n / 3) value *= 1e-9f;
        }
    const auto n_values = size_t(n * n_cols);
    const std::vector<float> before = bench.normal(n_values), bias = bench.normal(size_t(n_cols));
    DownTileArgs args;
    args.w = w.device;
    args.h = bench.upload(h);
    args.h_stride = stride;
    args.n_tokens = n;
    args.bias = bench.upload(bias);
    args.y = bench.upload(before);
    if (c.parts) {
        args.room_bytes = 4 * n_values * sizeof(float);
        args.room = bench.room(args.room_bytes);
    }
    bench.kernels.down_tiles(bench.stream, args);
    const auto got = bench.download<float>(args.y, n_values);

    std::vector<int32_t> rows(static_cast<size_t>(c.n_rows));
    std::iota(rows.begin(), rows.end(), 0);
    std::vector<float> want(n_values, 0.0f);
    std::vector<std::byte> scratch(kernels::row_sums_scratch_bytes() + 64);
    kernels::add_row_sums(
        {w.host, rows.data(), c.n_rows, h.data(), stride, true, n, 0, n_cols, want.data(), n_cols},
        scratch.data());
    const double tolerance = down_tolerance(c);
    for (int64_t t = 0; t < n; ++t)
        for (int64_t i = 0; i < n_cols; ++i) {
            const auto at = size_t(t * n_cols + i);
            const double added = double(before[at]) + double(bias[size_t(i)]);
            const double sums = std::fabs(double(before[at])) + std::fabs(double(bias[size_t(i)])) +
                                std::fabs(double(want[at]));
            double size = 0, h_size = 0;
            for (int64_t k = 0; k < c.n_rows; ++k) {
                const double factor = std::fabs(double(h[size_t(t * stride + k)]));
                size += factor * std::fabs(double(w.values[size_t(k * n_cols + i)]));
                h_size += factor;
            }
            // The second half of a weight is off by up to half a step of 2^-24.
            const double small = wants_q8(c.type) ? h_size * 0x1p-25 : 0.0;
            bench.compare(double(got[at]), double(want[at]) + added,
                          tolerance * size + small + 3 * float_rounding * sums);
        }
}

}  // namespace

void add_prompt_tests(std::vector<SelfTest>& tests) {
    int turn = 0;
    for (const TypeTraits& traits : all_types()) {
        const Type type = traits.type;
        // Odd counts of everything: columns beyond a tile, rows beyond a step, tokens beyond a
        // tile.
        const int64_t n_cols = traits.block_size == 1    ? 131 + 6 * turn
                               : traits.block_size == 32 ? 32 * (3 + turn % 4)
                                                         : 256;
        for (const DownCase& c :
             {DownCase{type, 1, n_cols, 9, false}, DownCase{type, 77 + turn, n_cols, 67, false},
              DownCase{type, 1029 + turn, traits.block_size == 1 ? 20 : n_cols, 13, true}})
            tests.push_back(
                {format("down tiles %s %lldx%lld, %lld tokens", traits.name, (long long)c.n_rows,
                        (long long)c.n_cols, (long long)c.n_tokens),
                 [=](Bench& bench) { test_down_tiles(bench, c); }});
        ++turn;
    }
}

}  // namespace qi::cuda
