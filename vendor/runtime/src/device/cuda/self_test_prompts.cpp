// Self-tests of what only prompts use: the down projection of many tokens by neuron, and products
// through cuBLAS.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "base/log.h"
#include "device/cuda/half_products.h"
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

// ---- through cuBLAS ----

struct HalfCase {
    Type type;
    int64_t n_rows, n_cols, n_tokens;
    bool by_neuron;  // rows along the inner dimension

    int64_t n_inner() const { return by_neuron ? n_rows : n_cols; }
    int64_t n_outer() const { return by_neuron ? n_cols : n_rows; }
};

// Activations of ordinary size, some tokens' beyond f16's range or near its lower end.
std::vector<float> random_activations(Bench& bench, int64_t n_tokens, int64_t width) {
    std::vector<float> x = bench.normal(size_t(n_tokens * width));
    for (int64_t i = 0; i < width; ++i) {
        x[size_t(n_tokens / 2 * width + i)] *= 1e6f;
        x[size_t(n_tokens / 3 * width + i)] *= 1e-5f;
    }
    return x;
}

// Against sums of the decoded weights in double. An activation and a weight of a block type are
// rounded to a half each, or to steps of the smallest half: for a weight 2^-24, for an activation
// that over the power of two its row is scaled by, which leaves its largest at 2^-4 or more. BF16
// has 8 bits.
void compare_halves(Bench& bench, const TestWeight& w, const HalfCase& c,
                    const std::vector<float>& x, const std::vector<float>& got,
                    const std::function<double(int64_t, int64_t)>& added) {
    const int64_t n_inner = c.n_inner(), n_outer = c.n_outer();
    const double of_x = c.type == Type::bf16 ? 0x1p-8 : 0x1p-11;
    const double rounding =
        of_x + (wants_q8(c.type) ? 0x1p-11 : 0.0) + double(n_inner + 8) * float_rounding;
    for (int64_t t = 0; t < c.n_tokens; ++t) {
        const float* row = &x[size_t(t * n_inner)];
        double largest = 0;
        for (int64_t k = 0; k < n_inner; ++k)
            largest = std::max(largest, std::fabs(double(row[k])));
        for (int64_t r = 0; r < n_outer; ++r) {
            double want = 0, size = 0, small = 0;
            for (int64_t k = 0; k < n_inner; ++k) {
                const int64_t at = c.by_neuron ? k * c.n_cols + r : r * c.n_cols + k;
                const auto weight = double(w.values[size_t(at)]), value = double(row[k]);
                want += weight * value;
                size += std::fabs(weight * value);
                small += std::fabs(value) * 0x1p-25 + std::fabs(weight) * largest * 0x1p-21;
            }
            const double more = added(t, r);
            bench.compare(double(got[size_t(t * n_outer + r)]), want + more,
                          rounding * size + small +
                              16 * float_rounding * (std::fabs(more) + std::fabs(want) + 4.0));
        }
    }
}

void test_halves(Bench& bench, const HalfCase& c) {
    if (!HalfProducts::takes(c.type, bench.kernels.gpu()->attributes().architecture))
        return bench.expect(true);  // tiles compute it, and are tested
    try {
        cublas_info();
    } catch (const Error& error) {
        log(LogLevel::info, format("products through cuBLAS are not tested: %s", error.what()));
        return bench.expect(true);
    }
    const int64_t n_inner = c.n_inner(), n_outer = c.n_outer();
    const TestWeight w(bench, c.type, c.n_rows, c.n_cols);
    const std::vector<float> x = random_activations(bench, c.n_tokens, n_inner);
    const std::vector<float> bias = bench.normal(size_t(n_outer));
    const std::vector<float> before = bench.normal(size_t(c.n_tokens * n_outer));
    // Room for a few rows at a time.
    const auto widened_bytes = size_t(16 * c.n_cols) * 2;
    HalfProducts halves(bench.stream, std::make_shared<Budget>(Budget::unlimited), bench.kernels,
                        {bench.room(HalfProducts::narrowed_bytes(c.n_tokens, n_inner)),
                         bench.room(widened_bytes), widened_bytes});
    const CUdeviceptr x_at = bench.upload(x), bias_at = bench.upload(bias);
    for (const bool accumulate : {true, false}) {
        if (c.by_neuron && !accumulate) continue;
        const CUdeviceptr y = bench.upload(before);
        if (c.by_neuron) {
            DownTileArgs args;
            args.w = w.device;
            args.h = x_at;
            args.h_stride = n_inner;
            args.n_tokens = c.n_tokens;
            args.bias = bias_at;
            args.y = y;
            halves.multiply_by_neuron(args);
        } else {
            const Product product{w.device, bias_at, y, n_outer};
            halves.multiply(x_at, c.n_tokens, {&product, 1}, accumulate);
        }
        const auto got = bench.download<float>(y, before.size());
        compare_halves(bench, w, c, x, got, [&](int64_t t, int64_t r) {
            const auto was = double(before[size_t(t * n_outer + r)]);
            return double(bias[size_t(r)]) + (accumulate ? was : 0.0);
        });
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
        for (const bool by_neuron : {false, true}) {
            if (type == Type::f32) continue;
            const HalfCase c{type, 37 + turn, n_cols, 11, by_neuron};
            tests.push_back(
                {format("cuBLAS %s %s %lldx%lld, %lld tokens", by_neuron ? "by neuron" : "by row",
                        traits.name, (long long)c.n_rows, (long long)c.n_cols,
                        (long long)c.n_tokens),
                 [=](Bench& bench) { test_halves(bench, c); }});
        }
        ++turn;
    }
}

}  // namespace qi::cuda
