// Self-tests of norms, quantisation and activation functions.
#include <algorithm>

#include "base/error.h"
#include "device/cuda/self_test_bench.h"
#include "kernels/vector_ops.h"
#include "quant/half.h"

namespace qi::cuda {

namespace {

// The q8 copy of floats that the GPU has: every code and scale is the CPU's.
void compare_q8(Bench& bench, const Q8& q8, const TestInput& want) {
    const int64_t width = (want.n_cols + 31) / 32 * 32;
    const auto n = size_t(want.n_tokens * width);
    const auto codes = bench.download<int8_t>(q8.codes, n);
    const auto scales = bench.download<float>(q8.scales, n / 32);
    const auto sums = bench.download<float>(q8.sums, n / 16);
    for (size_t i = 0; i < n; ++i)
        bench.expect(codes[i] == want.codes[i]);
    for (size_t i = 0; i < n / 32; ++i)
        bench.compare(double(scales[i]), double(want.scales[i]), 0.0);
    for (size_t i = 0; i < n / 16; ++i)
        bench.compare(double(sums[i]), double(want.sums[i]), 0.0);
}

void test_norm(Bench& bench, bool layer, int64_t n, int64_t n_tokens) {
    std::vector<float> x = bench.normal(size_t(n * n_tokens));
    for (float& value : x)
        value = value * 3.0f + 0.5f;
    const std::vector<float> weight = bench.normal(size_t(n)), bias = bench.normal(size_t(n));
    const bool biased = layer && n % 2 == 0;
    std::vector<float> want(x.size());
    for (int64_t t = 0; t < n_tokens; ++t) {
        if (layer)
            kernels::layer_norm(&x[size_t(t * n)], weight.data(), biased ? bias.data() : nullptr,
                                1e-5f, n, &want[size_t(t * n)]);
        else
            kernels::rms_norm(&x[size_t(t * n)], weight.data(), 1e-5f, n, &want[size_t(t * n)]);
    }
    const CUdeviceptr x_at = bench.upload(x), out = bench.room(x.size() * sizeof(float));
    const Q8 q8 = Q8::at(bench.room(Q8::n_bytes(n_tokens, n)), n_tokens, n);
    const Q8 x_q8 = Q8::at(bench.room(Q8::n_bytes(n_tokens, n)), n_tokens, n);
    bench.kernels.norm(bench.stream,
                       {layer, 1e-5f, bench.upload(weight), biased ? bench.upload(bias) : 0, x_at,
                        n_tokens, n, out, q8, x_q8});
    const auto got = bench.download<float>(out, x.size());
    // The sum of squares (and the mean) may each be off by the roundings of its longest chain, a
    // quarter of the row in the narrowest kernel of the CPU's, and the root halves that; then come
    // three roundings of the value itself.
    const double relative = (double(n) / 8.0 + 8.0) * float_rounding;
    for (size_t i = 0; i < got.size(); ++i) {
        const size_t column = i % size_t(n);
        const double size = std::fabs(double(want[i])) +
                            (layer ? 2.0 * std::fabs(double(weight[column])) : 0.0) +
                            (biased ? std::fabs(double(bias[column])) : 0.0);
        bench.compare(double(got[i]), double(want[i]), relative * size);
    }
    compare_q8(bench, q8, TestInput(bench, got, n_tokens, n));
    compare_q8(bench, x_q8, TestInput(bench, x, n_tokens, n));
}

void test_quantise(Bench& bench, int64_t n, int64_t n_tokens) {
    std::vector<float> x = bench.normal(size_t(n * n_tokens));
    for (size_t i = 0; i < x.size(); ++i) {
        if (i / 32 % 5 == 1) x[i] = 0.0f;
        if (i / 32 % 5 == 2) x[i] *= 1e-31f;  // below what has a reciprocal, for some
        if (i / 32 % 5 == 3) x[i] *= 1e30f;
    }
    if (x.size() > 40) x[40] = HUGE_VALF;
    if (x.size() > 170) x[170] = std::nanf("");
    const TestInput want(bench, x, n_tokens, n);
    const Q8 q8 = Q8::at(bench.room(Q8::n_bytes(n_tokens, n)), n_tokens, n);
    bench.kernels.quantise(bench.stream, want.device.x, n_tokens, n, q8);
    compare_q8(bench, q8, want);
}

// On both sides of a value, so that the tails of the functions are there.
std::vector<float> spread_values(Bench& bench, size_t n) {
    std::vector<float> values(n);
    for (float& value : values)
        value = float(bench.below(4001) - 2000) * 0.01f;
    for (size_t i = 0; i < std::min<size_t>(n, 3); ++i)
        values[i] = i == 0 ? 0.0f : i == 1 ? 0.25f : std::nanf("");
    return values;
}

void test_act_mul(Bench& bench, DeviceAct act, bool gated, int64_t n, int64_t n_tokens) {
    constexpr float threshold = 0.25f;
    const std::vector<float> gate = spread_values(bench, size_t(n * n_tokens));
    const std::vector<float> up = bench.normal(gate.size());
    std::vector<float> want = gate;
    const auto count = int64_t(gate.size());
    const auto cpu = [&] {
        switch (act) {
            case DeviceAct::silu:
                return kernels::Activation::silu;
            case DeviceAct::gelu_erf:
                return kernels::Activation::gelu_erf;
            case DeviceAct::gelu_tanh:
                return kernels::Activation::gelu_tanh;
            case DeviceAct::fatrelu:
                return kernels::Activation::fatrelu;
            default:
                return kernels::Activation::relu;
        }
    }();
    if (!gated)
        kernels::activate(cpu, threshold, want.data(), count);
    else if (act == DeviceAct::relu_relu)
        kernels::relu_relu_mul(want.data(), up.data(), count);
    else
        kernels::activate_mul(cpu, threshold, want.data(), up.data(), count);

    const CUdeviceptr h = bench.upload(gate);
    const Q8 q8 = Q8::at(bench.room(Q8::n_bytes(n_tokens, n)), n_tokens, n);
    bench.kernels.act_mul(bench.stream,
                          {act, threshold, h, gated ? bench.upload(up) : 0, n_tokens, n, h, q8});
    const auto got = bench.download<float>(h, gate.size());
    for (size_t i = 0; i < got.size(); ++i) {
        // Exponentials of two libraries, 2 ulp each, whose argument's rounding grows with |x| (x³
        // for gelu_tanh's, x² for gelu_erf's), and five products and quotients. What underflows on
        // one side may be tiny on the other.
        const double x = std::isnan(gate[i]) ? 0.0 : std::fabs(double(gate[i]));
        const double argument = 1.0 + x + x * x + 0.1 * x * x * x;
        const double scale = gated ? std::fabs(double(up[i])) : 1.0;
        bench.compare(
            double(got[i]), double(want[i]),
            (12.0 + argument) * float_rounding * std::fabs(double(want[i])) + x * scale * 0x1p-140);
    }
    compare_q8(bench, q8, TestInput(bench, got, n_tokens, n));
}

// Rows within f16's range, beyond it, below it, of zeros, and not finite.
void test_narrow(Bench& bench, int64_t n) {
    constexpr float sizes[] = {1.0f, 1e6f, 1e-5f, 0.0f, HUGE_VALF};
    const auto n_tokens = int64_t(std::size(sizes)), stride = n + 3;
    std::vector<float> x = bench.normal(size_t(n * n_tokens));
    for (size_t i = 0; i < x.size(); ++i) {
        const float size = sizes[i / size_t(n)];
        x[i] = std::isinf(size) ? (i % size_t(n) ? x[i] : size) : x[i] * size;
    }
    const CUdeviceptr x_at = bench.upload(x), out = bench.room(size_t(n_tokens * stride) * 2);
    const CUdeviceptr powers_at = bench.room(size_t(2 * n_tokens) * sizeof(float));
    for (const Type to : {Type::f16, Type::bf16}) {
        bench.kernels.narrow_rows(bench.stream, x_at, n_tokens, n, to, out, stride, powers_at);
        const auto got = bench.download<uint16_t>(out, size_t((n_tokens - 1) * stride + n));
        const auto powers = bench.download<float>(powers_at, size_t(2 * n_tokens));
        for (int64_t t = 0; t < n_tokens; ++t) {
            const auto of_token = std::span(x).subspan(size_t(t * n), size_t(n));
            const float power = powers[size_t(t)];
            float largest = 0.0f;
            for (const float value : of_token)
                largest = std::max(largest, std::fabs(value));
            const bool fits = largest == 0.0f || (largest >= 0x1p-4f && largest <= 65504.0f);
            bench.expect(fits || std::isinf(largest) || to == Type::bf16 ? power == 1.0f
                                                                         : power != 1.0f);
            bench.expect(powers[size_t(n_tokens + t)] * power == 1.0f);
            int exponent = 0;
            bench.expect(std::frexp(power, &exponent) == 0.5f);
            for (int64_t i = 0; i < n; ++i) {
                const uint16_t value = got[size_t(t * stride + i)];
                const float scaled = of_token[size_t(i)] * power;
                bench.expect(value == (to == Type::f16 ? f32_to_f16(scaled) : f32_to_bf16(scaled)));
                bench.expect(std::isinf(largest) || std::fabs(scaled) <= 65504.0f ||
                             to == Type::bf16);
            }
        }
    }
}

void test_scale(Bench& bench, int64_t n, int64_t n_tokens) {
    const int64_t stride = n + 5;
    const std::vector<float> y = bench.normal(size_t(n_tokens * stride));
    const std::vector<float> bias = bench.normal(size_t(n));
    std::vector<float> factors(static_cast<size_t>(n_tokens), 1.0f);
    factors.back() = 0x1p-20f;
    for (const bool biased : {false, true}) {
        const CUdeviceptr y_at = bench.upload(y);
        bench.kernels.scale_rows(bench.stream, bench.upload(factors),
                                 biased ? bench.upload(bias) : 0, n_tokens, n, y_at, stride);
        const auto got = bench.download<float>(y_at, y.size());
        for (size_t i = 0; i < got.size(); ++i) {
            const size_t t = i / size_t(stride), column = i % size_t(stride);
            float want = y[i];
            if (column < size_t(n)) want = y[i] * factors[t] + (biased ? bias[column] : 0.0f);
            bench.expect(got[i] == want);
        }
    }
}

}  // namespace

void add_row_tests(std::vector<SelfTest>& tests) {
    for (const int64_t n : {1, 31, 64, 97, 576, 4099, 5120}) {
        const int64_t n_tokens = n > 1000 ? 2 : 3;
        for (const bool layer : {false, true})
            tests.push_back({format("%s norm of %lld", layer ? "layer" : "rms", (long long)n),
                             [=](Bench& bench) { test_norm(bench, layer, n, n_tokens); }});
        tests.push_back({format("quantise %lld", (long long)n),
                         [=](Bench& bench) { test_quantise(bench, n, n_tokens); }});
        tests.push_back(
            {format("narrow %lld", (long long)n), [=](Bench& bench) { test_narrow(bench, n); }});
        tests.push_back({format("scale %lld", (long long)n),
                         [=](Bench& bench) { test_scale(bench, n, n_tokens); }});
    }
    constexpr std::pair<DeviceAct, const char*> acts[] = {
        {DeviceAct::silu, "silu"},         {DeviceAct::relu, "relu"},
        {DeviceAct::gelu_erf, "gelu_erf"}, {DeviceAct::gelu_tanh, "gelu_tanh"},
        {DeviceAct::fatrelu, "fatrelu"},   {DeviceAct::relu_relu, "relu_relu"}};
    for (const auto& [act, name] : acts)
        for (const bool gated : {true, false}) {
            if (!gated && act == DeviceAct::relu_relu) continue;
            tests.push_back(
                {std::string(gated ? "gated " : "plain ") + name,
                 [=, act = act](Bench& bench) { test_act_mul(bench, act, gated, 1030, 2); }});
        }
}

}  // namespace qi::cuda
