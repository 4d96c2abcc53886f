// Matrix kernels of every instruction set against decoded weights in float64, and bit by bit
// against themselves under every way of cutting the work.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernel_checks.h"
#include "kernels/matmul.h"
#include "kernels/matmul_table.h"
#include "quant/codec.h"
#include "quant/half.h"
#include "weight_fixtures.h"

using namespace qi;
using namespace qi::kernels;
using namespace qi::test;

namespace {

Checks checks;

float get_half(const std::byte* at) {
    f16_bits bits;
    std::memcpy(&bits, at, sizeof bits);
    return f16_to_f32(bits);
}

// One row decoded, and the sum of the magnitudes of the terms each weight is made of, which is what
// rounding errors grow with.
void decode_with_magnitudes(const Weight& w, int64_t row, std::vector<float>& values,
                            std::vector<float>& magnitudes) {
    values.resize(size_t(w.n_cols));
    magnitudes.resize(size_t(w.n_cols));
    const std::byte* at = w.data + size_t(row) * w.row_bytes;
    decode(w.type, at, w.n_cols, values.data());
    for (size_t k = 0; k < values.size(); ++k)
        magnitudes[k] = std::fabs(values[k]);
    const HalfFields* fields = fields_of(w.type);
    if (!fields || fields->minimum < 0) return;
    std::vector<std::byte> raised(at, at + w.row_bytes);
    const auto block_bytes = size_t(traits(w.type).block_bytes);
    for (size_t i = 0; i < raised.size(); i += block_bytes) {
        put_half(&raised[i] + fields->scale, std::fabs(get_half(&raised[i] + fields->scale)));
        put_half(&raised[i] + fields->minimum,
                 float(fields->raising) * std::fabs(get_half(&raised[i] + fields->minimum)));
    }
    decode(w.type, raised.data(), w.n_cols, magnitudes.data());
}

// The slow twin of the quantiser: activations as the kernels see them, and the largest error of
// each.
void quantize_plainly(const float* x, int64_t n, std::vector<double>& seen,
                      std::vector<double>& errors) {
    seen.assign(size_t(n), 0.0);
    errors.assign(size_t(n), 0.0);
    for (int64_t first = 0; first < n; first += 32) {
        float largest = 0;
        for (int64_t k = first; k < first + 32; ++k)
            largest = std::fmax(largest, std::fabs(x[k]));
        const bool usable = largest >= 0x1p-100f;  // else the block counts as zeros
        const float scale = usable ? largest / 127.0f : 0.0f;
        const float inverse = usable ? 127.0f / largest : 0.0f;
        for (int64_t k = first; k < first + 32; ++k) {
            seen[size_t(k)] = double(std::nearbyint(x[k] * inverse)) * double(scale);
            errors[size_t(k)] = double(largest) * (usable ? (0.5 + 1e-4) / 127.0 : 1.0);
        }
    }
}

struct Case {
    const MatmulOps& ops;
    Isa isa;
    Weight w;
    int64_t n_tokens;
    const float* x;  // [n_tokens][n_cols]

    void expect(bool ok, const char* what) const {
        checks.expect(ok, "%s: %s %s, %lld rows, %lld columns, %lld tokens", what, isa_name(isa),
                      traits(w.type).name, (long long)w.n_rows, (long long)w.n_cols,
                      (long long)n_tokens);
    }
};

// Results [n_tokens][n_rows] of tokens [first, first + n), rows cut into ranges of row_step.
std::vector<float> multiply(const Case& c, int64_t first, int64_t n, int64_t row_step) {
    const ActivationForm form = activation_form(c.w.type);
    GuardedBytes prepared(form == ActivationForm::f32 ? activation_bytes(form, c.w.n_cols, n)
                                                      : c.ops.quantized_bytes(c.w.n_cols, n));
    const float* x = c.x + first * c.w.n_cols;
    // In two parts, as two threads would.
    for (const auto& [begin, end] : {std::pair{int64_t(0), n / 2}, std::pair{n / 2, n}}) {
        if (form == ActivationForm::f32)
            prepare_activations(form, x, c.w.n_cols, c.w.n_cols, n, begin, end, prepared.data());
        else
            c.ops.quantize(x, c.w.n_cols, c.w.n_cols, n, begin, end, prepared.data());
    }
    GuardedBytes scratch(c.ops.scratch_bytes(c.w, n));
    constexpr float untouched = -12345.0f;
    std::vector<float> y(size_t(n * c.w.n_rows), untouched);
    for (int64_t row = 0; row < c.w.n_rows; row += row_step) {
        const int64_t end = std::min(c.w.n_rows, row + row_step);
        c.ops.rows(c.w, row, end, prepared.data(), n, y.data(), c.w.n_rows, scratch.data());
        if (end < c.w.n_rows) c.expect(y[size_t(end)] == untouched, "writes beyond its rows");
    }
    return y;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Tolerance: every float operation on the way to a result rounds by 2^-24 of at most the sum of the
// magnitudes. A chain sees at most 4 roundings per 256 columns (16 per 64 in the narrowest float
// kernel), then come the adding of chains and the products of scales. Quantised activations add
// half a code step each.
void check_values(const Case& c, const std::vector<float>& y) {
    const bool quantized = activation_form(c.w.type) == ActivationForm::q8_block32;
    const double n_roundings = quantized ? 4.0 * std::ceil(double(c.w.n_cols) / 256.0) + 8.0
                                         : std::ceil(double(c.w.n_cols) / 4.0) + 8.0;
    std::vector<float> weights, magnitudes;
    std::vector<double> seen, errors;
    for (int64_t t = 0; t < c.n_tokens; ++t) {
        const float* x = c.x + t * c.w.n_cols;
        quantize_plainly(x, quantized ? c.w.n_cols : 0, seen, errors);
        for (int64_t r = 0; r < c.w.n_rows; ++r) {
            decode_with_magnitudes(c.w, r, weights, magnitudes);
            double exact = 0, as_seen = 0, size = 0, step = 0;
            for (int64_t k = 0; k < c.w.n_cols; ++k) {
                const auto i = size_t(k);
                const double xk = quantized ? seen[i] : double(x[k]);
                as_seen += double(weights[i]) * xk;
                exact += double(weights[i]) * double(x[k]);
                size += double(magnitudes[i]) * std::fabs(xk);
                step += quantized ? std::fabs(double(weights[i])) * errors[i] : 0.0;
            }
            const double rounding = n_roundings * 0x1p-24 * size;
            const double value = double(y[size_t(t * c.w.n_rows + r)]);
            c.expect(std::fabs(value - as_seen) <= rounding, "differs from the quantised product");
            c.expect(std::fabs(value - exact) <= rounding + step, "differs from the product");
        }
    }
}

void check_cuts(const Case& c, const std::vector<float>& y) {
    c.expect(same_bits(y, multiply(c, 0, c.n_tokens, row_granularity)),
             "depends on the row ranges");
    for (int64_t t = 0; t < c.n_tokens; ++t) {
        const std::vector<float> alone = multiply(c, t, 1, c.w.n_rows);
        const auto begin = y.begin() + t * c.w.n_rows;
        c.expect(same_bits({begin, begin + c.w.n_rows}, alone), "depends on the batch");
    }
}

// Rows picked by number, also repeatedly, are the same rows.
void check_lists(const Case& c, const std::vector<float>& y) {
    const ActivationForm form = activation_form(c.w.type);
    GuardedBytes prepared(form == ActivationForm::f32
                              ? activation_bytes(form, c.w.n_cols, c.n_tokens)
                              : c.ops.quantized_bytes(c.w.n_cols, c.n_tokens));
    if (form == ActivationForm::f32)
        prepare_activations(form, c.x, c.w.n_cols, c.w.n_cols, c.n_tokens, 0, c.n_tokens,
                            prepared.data());
    else
        c.ops.quantize(c.x, c.w.n_cols, c.w.n_cols, c.n_tokens, 0, c.n_tokens, prepared.data());
    std::vector<int32_t> list;
    for (int64_t r = 0; r < c.w.n_rows; r += 1 + r % 3)
        list.push_back(int32_t(r));
    list.push_back(int32_t(c.w.n_rows - 1));
    const auto n = int64_t(list.size()), stride = n + 3;
    constexpr float untouched = -12345.0f;
    std::vector<float> found(size_t(c.n_tokens * stride), untouched);
    c.ops.listed(c.w, list.data(), n, prepared.data(), c.n_tokens, found.data(), stride);
    for (int64_t t = 0; t < c.n_tokens; ++t) {
        for (int64_t i = 0; i < n; ++i)
            c.expect(test::same_bits(&found[size_t(t * stride + i)],
                                     &y[size_t(t * c.w.n_rows + list[size_t(i)])], 1),
                     "gives listed rows other values");
        c.expect(found[size_t(t * stride + n)] == untouched, "writes beyond its list");
    }
}

// Leaving out groups of columns whose activations are zeros changes nothing, and their weights are
// not looked at: NaN stands there.
void check_groups(const Case& c) {
    const ActivationForm form = activation_form(c.w.type);
    const int64_t n_cols = c.w.n_cols, group = c.ops.column_group(c.w.type);
    const int64_t block = traits(c.w.type).block_size;
    const size_t block_bytes = row_bytes(c.w.type, block);
    std::vector<float> x(c.x, c.x + c.n_tokens * n_cols);
    GuardedBytes marked(c.w.row_bytes * size_t(c.w.n_rows));
    std::memcpy(marked.data(), c.w.data, c.w.row_bytes * size_t(c.w.n_rows));
    std::vector<int32_t> listed;
    for (int64_t begin = 0; begin < n_cols; begin += group) {
        if (begin / group % 3 != 1) {
            listed.push_back(int32_t(begin / group));
            continue;
        }
        const int64_t end = std::min(n_cols, begin + group);
        for (int64_t t = 0; t < c.n_tokens; ++t)
            std::fill(x.begin() + t * n_cols + begin, x.begin() + t * n_cols + end, 0.0f);
        for (int64_t r = 0; r < c.w.n_rows; ++r)
            std::memset(
                marked.data() + size_t(r) * c.w.row_bytes + size_t(begin / block) * block_bytes,
                0xff, size_t((end - begin) / block) * block_bytes);
    }
    std::vector<int32_t> found(size_t((n_cols + group - 1) / group));
    found.resize(size_t(nonzero_groups(x.data(), n_cols, c.n_tokens, group, found.data())));
    c.expect(std::includes(listed.begin(), listed.end(), found.begin(), found.end()),
             "finds groups of zeros not to be zero");

    Case zeroed = c;
    zeroed.x = x.data();
    const std::vector<float> all = multiply(zeroed, 0, c.n_tokens, c.w.n_rows);
    GuardedBytes prepared(form == ActivationForm::f32 ? activation_bytes(form, n_cols, c.n_tokens)
                                                      : c.ops.quantized_bytes(n_cols, c.n_tokens));
    if (form == ActivationForm::f32)
        prepare_activations(form, x.data(), n_cols, n_cols, c.n_tokens, 0, c.n_tokens,
                            prepared.data());
    else
        c.ops.quantize(x.data(), n_cols, n_cols, c.n_tokens, 0, c.n_tokens, prepared.data());
    zeroed.w.data = marked.data();
    std::vector<float> picked(all.size());
    for (int64_t r = 0; r < c.w.n_rows; r += row_granularity)
        c.ops.groups(zeroed.w, r, std::min(c.w.n_rows, r + row_granularity), listed.data(),
                     int64_t(listed.size()), prepared.data(), c.n_tokens, picked.data(),
                     c.w.n_rows);
    c.expect(same_bits(all, picked), "by groups of columns gives other values");
}

void check_not_finite(Case c, std::vector<float> x) {
    const std::vector<float> before = multiply(c, 0, c.n_tokens, c.w.n_rows);
    c.x = x.data();
    for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
        x[size_t(c.w.n_cols + c.w.n_cols / 2)] = bad;  // of token 1
        const std::vector<float> y = multiply(c, 0, c.n_tokens, c.w.n_rows);
        for (int64_t t = 0; t < c.n_tokens; ++t) {
            for (int64_t r = 0; r < c.w.n_rows; ++r) {
                const auto i = size_t(t * c.w.n_rows + r);
                const bool right = t == 1 ? !std::isfinite(y[i])
                                          : std::memcmp(&y[i], &before[i], sizeof(float)) == 0;
                c.expect(right, "mishandles NaN or infinity");
            }
        }
    }
}

std::vector<float> activations(int64_t n, bool extremes, std::mt19937& rng) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(n));
    for (float& value : x)
        value = extremes ? (rng() % 2 ? 3.0f : -3.0f) : normal(rng);
    // A block of zeros, one too small to quantise and one of huge values.
    if (!extremes && n >= 96) {
        std::fill_n(x.begin(), 32, 0.0f);
        for (int i = 0; i < 32; ++i)
            x[size_t(32 + i)] *= 1e-35f;
        for (int i = 0; i < 32; ++i)
            x[size_t(64 + i)] *= 1e+20f;
    }
    return x;
}

void check_shape(Isa isa, Type type, Content content, int64_t n_rows, int64_t n_cols,
                 int64_t n_tokens, std::mt19937& rng) {
    const size_t bytes = row_bytes(type, n_cols);
    GuardedBytes weights(bytes * size_t(n_rows));
    fill_weights(type, content, weights.data(), bytes * size_t(n_rows), rng);
    const std::vector<float> x = activations(n_tokens * n_cols, content != Content::random, rng);
    const Case c = {*matmul_ops_for(isa),
                    isa,
                    {type, weights.data(), n_rows, n_cols, bytes},
                    n_tokens,
                    x.data()};
    const std::vector<float> y = multiply(c, 0, n_tokens, n_rows);
    check_values(c, y);
    check_cuts(c, y);
    check_lists(c, y);
    if (content == Content::random) check_groups(c);
    if (n_tokens > 1 && content == Content::random) check_not_finite(c, x);
}

void check_type(Isa isa, Type type) {
    std::mt19937 rng(unsigned(type) * 7 + 1);
    const int64_t block = traits(type).block_size;
    for (int64_t n_tokens = 1; n_tokens <= 17; ++n_tokens)
        check_shape(isa, type, Content::random, 21, block == 1 ? 307 : 5 * block, n_tokens, rng);
    for (const int64_t n_cols : {1, 3, 8, 9, 17, 18})
        check_shape(isa, type, Content::random, 3, n_cols * block, 5, rng);
    check_shape(isa, type, Content::random, 1, 2 * block, 1, rng);
    check_shape(isa, type, Content::random, 37, 2816, 64, rng);  // several sweeps of a panel
    check_shape(isa, type, Content::random, 83, 8192, 13, rng);  // panels of odd numbers of rows
    check_shape(isa, type, Content::all_zero_bits, 4, 512, 14, rng);
    check_shape(isa, type, Content::all_one_bits, 4, 512, 14, rng);
}

// One weight and one activation, so that decode_row and the dispatching entry points are seen too.
void check_entry_points() {
    const float weights[2] = {0.5f, -3.0f}, x = 4.0f;
    const Weight w = {Type::f32, reinterpret_cast<const std::byte*>(weights), 2, 1, sizeof(float)};
    float row = 0, y[2] = {};
    decode_row(w, 1, &row);
    std::vector<std::byte> prepared(activation_bytes(ActivationForm::f32, 1, 1));
    std::vector<std::byte> scratch(matmul_scratch_bytes(w, 1));
    prepare_activations(ActivationForm::f32, &x, 1, 1, 1, 0, 1, prepared.data());
    matmul_rows(w, 0, 2, prepared.data(), 1, y, 2, scratch.data());
    checks.expect(row == -3.0f && y[0] == 2.0f && y[1] == -12.0f,
                  "the entry points give %g, %g, %g", double(row), double(y[0]), double(y[1]));
}

}  // namespace

int main() {
    for (const Isa isa : supported_levels())
        for (const TypeTraits& type : all_types())
            check_type(isa, type.type);
    check_entry_points();
    return checks.status();
}
