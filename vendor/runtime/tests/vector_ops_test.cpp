// Vector operators of every instruction set against float64, at odd sizes and with special values.
#include "kernels/vector_ops.h"

#include <algorithm>
#include <cfloat>

#include "kernel_checks.h"
#include "kernels/vector_ops_table.h"

using namespace qi;
using namespace qi::kernels;
using namespace qi::test;

namespace {

constexpr int64_t sizes[] = {1,  2,  3,  4,  5,   7,   8,   9,   15,  16,   17,   31,
                             33, 63, 64, 65, 100, 127, 128, 129, 255, 1000, 2048, 2049};
constexpr Activation activations[] = {Activation::silu, Activation::relu, Activation::gelu_erf,
                                      Activation::gelu_tanh, Activation::fatrelu};
constexpr float threshold = 0.25f;
const float nan = std::nanf("");
const float infinity = HUGE_VALF;

Checks checks;

// The operators of one level, with its name for messages.
struct Level {
    Isa isa;
    const VectorOps& ops;
    const char* name() const { return isa_name(isa); }
};

double exact_activation(Activation act, double x) {
    switch (act) {
        case Activation::silu:
            return x / (1.0 + std::exp(-x));
        case Activation::relu:
            return x <= 0.0 ? 0.0 : x;
        case Activation::gelu_erf:
            return x * 0.5 * std::erfc(-x * M_SQRT1_2);
        case Activation::gelu_tanh: {
            const double u = 2.0 * std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
            return x / (1.0 + std::exp(-u));
        }
        case Activation::fatrelu:
            return x <= double(threshold) ? 0.0 : x;
    }
    return nan;
}

// Largest error allowed, in ulp. An exponential magnifies the relative error of its argument by the
// argument's size: that of gelu_tanh is itself rounded four times, and gelu_erf's x² is exact only
// where there is FMA.
double activation_tolerance(const Level& level, Activation act, double x) {
    switch (act) {
        case Activation::silu:
            return 4.0;
        case Activation::gelu_erf:
            return 5.0 + (level.isa == Isa::portable ? 0.5 * x * x : 0.0);
        case Activation::gelu_tanh:
            return 4.0 + (x < 0.0 ? 6.4 * (-x - 0.044715 * x * x * x) : 0.0);
        default:
            return 0.0;
    }
}

void test_activation_accuracy(const Level& level) {
    std::vector<float> x;
    for (float a = 0x1p-30f; a < 100.0f; a *= 1.0007f)
        x.insert(x.end(), {a, -a});
    x.insert(x.end(), {0.0f, threshold, std::nextafter(threshold, 1.0f), FLT_MAX, infinity, 1e30f});
    const auto n = int64_t(x.size());
    for (Activation act : activations) {
        std::vector<float> y = x;
        level.ops.activate(act, threshold, y.data(), n);
        for (size_t i = 0; i < x.size(); ++i) {
            const double exact = exact_activation(act, x[i]);
            // Sigmoids of less than FLT_MIN may be flushed to zero by the overflow of e^-x.
            const bool tiny = std::fabs(exact) < 1e-34 && std::fabs(y[i]) < 1e-34f;
            checks.expect(tiny || ulp_error(y[i], exact) <= activation_tolerance(level, act, x[i]),
                          "%s: activation %d of %a is %a, not %a (%.1f ulp)", level.name(),
                          int(act), x[i], y[i], exact, ulp_error(y[i], exact));
        }
    }
}

// A result must not depend on the element's place, nor on what surrounds it, nor may anything else
// be written.
void test_slices(const Level& level) {
    std::mt19937 random(1);
    const int64_t n = 131;
    const std::vector<float> x = random_normal(random, n, 3.0f), up = random_normal(random, n);
    for (Activation act : activations) {
        std::vector<float> whole = x, whole_mul = x;
        level.ops.activate(act, threshold, whole.data(), n);
        level.ops.activate_mul(act, threshold, whole_mul.data(), up.data(), n);
        for (int64_t i = 0; i < n; ++i)
            checks.expect(whole_mul[i] == whole[i] * up[i],
                          "%s: activate_mul %d differs from activate, then multiply", level.name(),
                          int(act));
        for (int64_t begin = 0; begin < n; begin += 1 + begin / 9) {
            for (int64_t end = begin; end <= n; end += 1 + (end - begin) / 7) {
                std::vector<float> part = x, part_mul = x, expected = x, expected_mul = x;
                std::copy(whole.begin() + begin, whole.begin() + end, expected.begin() + begin);
                std::copy(whole_mul.begin() + begin, whole_mul.begin() + end,
                          expected_mul.begin() + begin);
                level.ops.activate(act, threshold, part.data() + begin, end - begin);
                level.ops.activate_mul(act, threshold, part_mul.data() + begin, up.data() + begin,
                                       end - begin);
                checks.expect(same_bits(part.data(), expected.data(), n) &&
                                  same_bits(part_mul.data(), expected_mul.data(), n),
                              "%s: activation %d of [%lld, %lld) differs from the whole's",
                              level.name(), int(act), (long long)begin, (long long)end);
            }
        }
    }
}

void test_special_values(const Level& level) {
    for (Activation act : activations) {
        for (int64_t place = 0; place < 37; ++place) {
            std::vector<float> x(37, 1.0f), expected(37, 1.0f);
            x[place] = nan;
            level.ops.activate(act, threshold, x.data(), 37);
            level.ops.activate(act, threshold, expected.data(), 37);
            expected[place] = x[place];
            checks.expect(std::isnan(x[place]) && same_bits(x.data(), expected.data(), 37),
                          "%s: activation %d loses or spreads a NaN at %lld", level.name(),
                          int(act), (long long)place);
        }
    }
    float gate[5] = {nan, 2.0f, -1.0f, 3.0f, 2.0f};
    const float up[5] = {1.0f, nan, 5.0f, -2.0f, 4.0f};
    level.ops.relu_relu_mul(gate, up, 5);
    checks.expect(std::isnan(gate[0]) && std::isnan(gate[1]) && gate[2] == 0.0f &&
                      gate[3] == 0.0f && gate[4] == 8.0f,
                  "%s: relu_relu_mul gives %g %g %g %g %g", level.name(), gate[0], gate[1], gate[2],
                  gate[3], gate[4]);
}

void test_norms(const Level& level) {
    std::mt19937 random(2);
    for (int64_t n : sizes) {
        std::vector<float> x = random_normal(random, n, 2.0f);
        for (float& value : x)
            value += 5.0f;
        const std::vector<float> weight = random_normal(random, n), bias = random_normal(random, n);
        double squares = 0.0, mean = 0.0, variance = 0.0;
        for (float value : x)
            squares += double(value) * value, mean += value;
        mean /= double(n);
        for (float value : x)
            variance += (value - mean) * (value - mean);
        const double epsilon = 1e-5f;
        const double rms = std::sqrt(squares / double(n) + epsilon);
        const double deviation = std::sqrt(variance / double(n) + epsilon);

        std::vector<float> out(n), plain(n), in_place = x;
        level.ops.rms_norm(x.data(), weight.data(), 1e-5f, n, out.data());
        level.ops.rms_norm(in_place.data(), weight.data(), 1e-5f, n, in_place.data());
        checks.expect(same_bits(out.data(), in_place.data(), n),
                      "%s: rms_norm of %lld in place differs", level.name(), (long long)n);
        for (int64_t i = 0; i < n; ++i)
            checks.expect(ulp_error(out[i], x[i] / rms * weight[i]) <= 8.0,
                          "%s: rms_norm of %lld at %lld: %.1f ulp", level.name(), (long long)n,
                          (long long)i, ulp_error(out[i], x[i] / rms * weight[i]));

        level.ops.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, n, out.data());
        level.ops.layer_norm(x.data(), weight.data(), nullptr, 1e-5f, n, plain.data());
        // The mean of 5 is known to 2e-7 or so; a row of one element is nothing but that error.
        const double scale = 1e-6 * (1.0 + 5.0 / deviation);
        for (int64_t i = 0; i < n; ++i) {
            const double exact = (x[i] - mean) / deviation * weight[i];
            const double limit = scale * (std::fabs(weight[i]) + std::fabs(exact) + 1.0);
            checks.expect(std::fabs(plain[i] - exact) <= limit &&
                              std::fabs(out[i] - (exact + bias[i])) <= limit,
                          "%s: layer_norm of %lld at %lld: %g, not %g", level.name(), (long long)n,
                          (long long)i, plain[i], exact);
        }
    }
    std::vector<float> x(40, 1.0f), weight(40, 1.0f), out(40);
    x[33] = nan;
    level.ops.rms_norm(x.data(), weight.data(), 1e-5f, 40, out.data());
    checks.expect(std::all_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }),
                  "%s: rms_norm hides a NaN", level.name());
}

void test_add(const Level& level) {
    std::mt19937 random(3);
    for (int64_t n : sizes) {
        const std::vector<float> a = random_normal(random, n), b = random_normal(random, n);
        std::vector<float> expected(n), out(n), to_a = a, to_b = b;
        for (int64_t i = 0; i < n; ++i)
            expected[i] = a[i] + b[i];
        level.ops.add(a.data(), b.data(), n, out.data());
        level.ops.add(to_a.data(), b.data(), n, to_a.data());
        level.ops.add(a.data(), to_b.data(), n, to_b.data());
        checks.expect(same_bits(out.data(), expected.data(), n) &&
                          same_bits(to_a.data(), expected.data(), n) &&
                          same_bits(to_b.data(), expected.data(), n),
                      "%s: add of %lld is wrong", level.name(), (long long)n);
    }
}

void test_rope(const Level& level) {
    std::mt19937 random(4);
    for (int64_t n_rot = 2; n_rot <= 160; n_rot += n_rot < 70 ? 2 : 18) {
        const int64_t half = n_rot / 2, head_dim = n_rot + 6;
        std::vector<float> cos_sin(n_rot);
        for (int64_t i = 0; i < half; ++i) {
            cos_sin[2 * i] = std::cos(0.7f * float(i));
            cos_sin[2 * i + 1] = std::sin(0.7f * float(i));
        }
        const std::vector<float> head = random_normal(random, head_dim);
        for (bool neox : {false, true}) {
            std::vector<float> out = head;
            level.ops.rope(out.data(), cos_sin.data(), n_rot, neox);
            for (int64_t i = 0; i < half; ++i) {
                const int64_t first = neox ? i : 2 * i, second = neox ? i + half : 2 * i + 1;
                const double c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
                const double x = head[first], y = head[second];
                const double limit = 2e-7 * (std::fabs(x) + std::fabs(y));
                checks.expect(std::fabs(out[first] - (x * c - y * s)) <= limit &&
                                  std::fabs(out[second] - (x * s + y * c)) <= limit,
                              "%s: rope of %lld, neox %d, pair %lld is wrong", level.name(),
                              (long long)n_rot, neox, (long long)i);
            }
            checks.expect(same_bits(out.data() + n_rot, head.data() + n_rot, 6),
                          "%s: rope of %lld writes past its end", level.name(), (long long)n_rot);
        }
    }
}

void test_exponential(const Level& level) {
    // Beside a 0, the sum is 1 + e^x, from which double precision recovers e^x.
    for (float x = -20.0f; x < 0.0f; x += 0.000731f) {
        const float pair[2] = {0.0f, x};
        float max;
        double sum;
        level.ops.max_and_sum_exp(pair, 2, &max, &sum);
        const double error = ulp_error(float(sum - 1.0), std::exp(double(x)));
        checks.expect(max == 0.0f && error <= 2.0, "%s: e^%a is off by %.2f ulp", level.name(), x,
                      error);
    }
}

void test_max_and_sum_exp(const Level& level) {
    std::mt19937 random(5);
    float max;
    double sum;
    for (int64_t n : sizes) {
        std::vector<float> x = random_normal(random, n, 4.0f);
        for (float& value : x)
            value -= 20.0f;  // all negative: padding lanes of 0 would show
        double exact = 0.0;
        const float largest = *std::max_element(x.begin(), x.end());
        for (float value : x)
            exact += std::exp(double(value) - largest);
        level.ops.max_and_sum_exp(x.data(), n, &max, &sum);
        checks.expect(max == largest && std::fabs(sum - exact) <= 3e-7 * exact,
                      "%s: max_and_sum_exp of %lld: %g %.9g, not %g %.9g", level.name(),
                      (long long)n, max, sum, largest, exact);

        level.ops.max_and_sum_exp(std::vector<float>(n, -3.5f).data(), n, &max, &sum);
        checks.expect(max == -3.5f && sum == double(n),
                      "%s: %lld equal values give %.17g instead of their number", level.name(),
                      (long long)n, sum);

        x[n / 2] = -infinity;
        x[0] = 1.0f;  // the largest
        level.ops.max_and_sum_exp(x.data(), n, &max, &sum);
        exact = 0.0;
        for (float value : x)
            exact += std::exp(double(value) - 1.0);
        checks.expect(max == 1.0f && std::fabs(sum - exact) <= 3e-7 * exact,
                      "%s: with -infinity among %lld the sum is %.9g, not %.9g", level.name(),
                      (long long)n, sum, exact);
        x[n - 1] = nan;
        level.ops.max_and_sum_exp(x.data(), n, &max, &sum);
        checks.expect(std::isnan(sum), "%s: a NaN at the end of %lld is lost", level.name(),
                      (long long)n);
    }
}

// The public functions are those of the active level.
void test_dispatch() {
    const VectorOps& ops = *vector_ops_for(active_isa());
    std::mt19937 random(6);
    const std::vector<float> x = random_normal(random, 77);
    std::vector<float> a = x, b = x;
    activate(Activation::silu, 0.0f, a.data(), 77);
    ops.activate(Activation::silu, 0.0f, b.data(), 77);
    checks.expect(same_bits(a.data(), b.data(), 77), "activate is not the active level's");
    rms_norm(x.data(), x.data(), 1e-6f, 77, a.data());
    ops.rms_norm(x.data(), x.data(), 1e-6f, 77, b.data());
    checks.expect(same_bits(a.data(), b.data(), 77), "rms_norm is not the active level's");
}

}  // namespace

int main() {
    for (Isa isa : supported_levels()) {
        const VectorOps* ops = vector_ops_for(isa);
        checks.expect(ops != nullptr, "no vector operators for %s", isa_name(isa));
        if (!ops) continue;
        const Level level{isa, *ops};
        test_activation_accuracy(level);
        test_slices(level);
        test_special_values(level);
        test_norms(level);
        test_add(level);
        test_rope(level);
        test_exponential(level);
        test_max_and_sum_exp(level);
    }
    test_dispatch();
    return checks.status();
}
