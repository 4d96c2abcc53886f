#include "device/cuda/self_test.h"

#include <algorithm>

#include "base/error.h"
#include "device/cuda/self_test_bench.h"
#include "quant/codec.h"
#include "quant/half.h"

namespace qi::cuda {

namespace {

const std::vector<SelfTest>& all_tests() {
    static const std::vector<SelfTest> tests = [] {
        std::vector<SelfTest> made;
        add_row_tests(made);
        add_product_tests(made);
        add_neuron_tests(made);
        add_attention_tests(made);
        add_logit_tests(made);
        add_exchange_tests(made);
        return made;
    }();
    return tests;
}

// Where a block keeps its f16 scale and minimum, and its codes.
struct BlockFields {
    Type type;
    int scale;
    int minimum;  // -1: none
    int codes_begin, codes_end;
};
constexpr BlockFields block_fields[] = {
    {Type::q4_0, 0, -1, 2, 18},    {Type::q4_1, 0, 2, 4, 20},   {Type::q5_0, 0, -1, 2, 22},
    {Type::q5_1, 0, 2, 4, 24},     {Type::q8_0, 0, -1, 2, 34},  {Type::q2_k, 80, 82, 16, 80},
    {Type::q3_k, 108, -1, 0, 96},  {Type::q4_k, 0, 2, 16, 144}, {Type::q5_k, 0, 2, 16, 176},
    {Type::q6_k, 208, -1, 0, 192},
};

const BlockFields* fields_of(Type type) {
    for (const BlockFields& fields : block_fields)
        if (fields.type == type) return &fields;
    return nullptr;
}

void put_half(std::byte* at, float value) {
    const f16_bits bits = f32_to_f16(value);
    std::memcpy(at, &bits, sizeof bits);
}

}  // namespace

size_t n_self_tests() {
    return all_tests().size();
}

std::string self_test_name(size_t index) {
    return all_tests().at(index).name;
}

SelfTestResult run_self_test(const std::shared_ptr<Gpu>& gpu, size_t index) {
    const SelfTest& test = all_tests().at(index);
    const Current current(*gpu);
    Bench bench(gpu, uint32_t(index) + 1);
    test.run(bench);
    return {test.name, bench.error(), bench.n_values()};
}

// ---- data ----

CUdeviceptr Bench::room(size_t n_bytes) {
    memory_.emplace_back(gpu_, budget_, std::max<size_t>(n_bytes, 16), "a self-test");
    stream.fill(memory_.back().address(), 0xff, memory_.back().n_bytes());
    return memory_.back().address();
}

CUdeviceptr Bench::zeros(size_t n_bytes) {
    const CUdeviceptr at = room(n_bytes);
    stream.fill(at, 0, std::max<size_t>(n_bytes, 16));
    return at;
}

CUdeviceptr Bench::upload(const void* data, size_t n_bytes) {
    const CUdeviceptr at = room(n_bytes);
    if (n_bytes > 0) stream.copy_to_device(at, data, n_bytes);
    stream.synchronize();  // the source may go
    return at;
}

void Bench::fetch(void* to, CUdeviceptr from, size_t n_bytes) {
    if (n_bytes > 0) stream.copy_to_host(to, from, n_bytes);
    stream.synchronize();
}

std::vector<float> Bench::normal(size_t n, float deviation) {
    std::normal_distribution<float> distribution(0.0f, deviation);
    std::vector<float> values(n);
    for (float& value : values)
        value = distribution(random);
    return values;
}

void Bench::compare(double got, double want, double tolerance) {
    ++n_values_;
    if (got == want || (std::isnan(got) && std::isnan(want))) return;
    const double error = std::fabs(got - want) / tolerance;
    error_ = std::isnan(error) ? HUGE_VAL : std::max(error_, error);
}

// ---- weights ----

std::vector<std::byte> random_rows(std::mt19937& random, Type type, int64_t n_rows,
                                   int64_t n_cols) {
    std::vector<std::byte> bytes(size_t(n_rows) * row_bytes(type, n_cols));
    std::normal_distribution<float> normal;
    const BlockFields* fields = fields_of(type);
    if (!fields) {
        std::vector<float> values(size_t(n_rows * n_cols));
        for (float& value : values)
            value = normal(random);
        encode(type, values.data(), n_rows * n_cols, n_cols, nullptr, bytes.data());
        return bytes;
    }
    for (std::byte& byte : bytes)
        byte = std::byte(random());
    const auto block_bytes = size_t(traits(type).block_bytes);
    for (size_t i = 0; i < bytes.size(); i += block_bytes) {
        put_half(&bytes[i] + fields->scale, 0.01f * normal(random));
        if (fields->minimum >= 0) put_half(&bytes[i] + fields->minimum, 0.01f * normal(random));
    }
    return bytes;
}

TestWeight::TestWeight(Bench& bench, Type type, int64_t n_rows, int64_t n_cols)
    : bytes(random_rows(bench.random, type, n_rows, n_cols)),
      values(size_t(n_rows * n_cols)),
      magnitudes(size_t(n_rows * n_cols)) {
    host = {type, bytes.data(), n_rows, n_cols, row_bytes(type, n_cols)};
    decode(type, bytes.data(), n_rows * n_cols, values.data());
    for (size_t i = 0; i < values.size(); ++i)
        magnitudes[i] = std::fabs(values[i]);
    if (const BlockFields* fields = fields_of(type)) {
        // With codes of 0 only the shift is left.
        std::vector<std::byte> empty = bytes;
        const auto block_bytes = size_t(traits(type).block_bytes);
        for (size_t i = 0; i < empty.size(); i += block_bytes)
            std::memset(&empty[i] + fields->codes_begin, 0,
                        size_t(fields->codes_end - fields->codes_begin));
        std::vector<float> shifts(values.size());
        decode(type, empty.data(), n_rows * n_cols, shifts.data());
        for (size_t i = 0; i < values.size(); ++i)
            magnitudes[i] = std::fabs(values[i] - shifts[i]) + std::fabs(shifts[i]);
    }
    const size_t stride = device_row_bytes(type, n_cols);
    std::vector<std::byte> repacked(size_t(n_rows) * stride);
    repack_rows(type, n_cols, bytes.data(), n_rows, repacked.data(), stride);
    device = {type, bench.upload(repacked), n_rows, n_cols, stride};
}

// ---- activations ----

TestInput::TestInput(Bench& bench, std::vector<float> values, int64_t tokens, int64_t cols)
    : n_tokens(tokens), n_cols(cols), x(std::move(values)) {
    const int64_t width = (n_cols + 31) / 32 * 32;
    codes.assign(size_t(n_tokens * width), 0);
    scales.assign(size_t(n_tokens * width / 32), 0.0f);
    sums.assign(size_t(n_tokens * width / 16), 0.0f);
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t b = 0; b < width / 32; ++b) {
            const int64_t n = std::min<int64_t>(32, n_cols - 32 * b);
            const float* from = &x[size_t(t * n_cols + 32 * b)];
            float max = 0.0f;
            bool finite = true;
            for (int64_t i = 0; i < n; ++i) {
                max = std::max(max, std::fabs(from[i]));
                finite = finite && std::isfinite(from[i]);
            }
            const bool usable = finite && max >= 0x1p-100f;
            const float scale = usable ? max / 127.0f : finite ? 0.0f : std::nanf("");
            const float inverse = usable ? 127.0f / max : 0.0f;
            scales[size_t(t * width / 32 + b)] = scale;
            int halves[2] = {};
            for (int64_t i = 0; usable && i < n; ++i) {
                const auto code = int8_t(std::nearbyint(from[i] * inverse));
                codes[size_t(t * width + 32 * b + i)] = code;
                halves[i / 16] += code;
            }
            for (int h = 0; h < 2; ++h)
                sums[size_t(t * width / 16 + 2 * b + h)] = scale * float(halves[h]);
        }
    }
    device.n_tokens = n_tokens;
    device.x = bench.upload(x);
    device.q8 = {bench.upload(codes), bench.upload(scales), bench.upload(sums)};
}

double TestInput::seen(Type weight_type, int64_t token, int64_t k) const {
    if (!wants_q8(weight_type)) return double(x[size_t(token * n_cols + k)]);
    const int64_t width = (n_cols + 31) / 32 * 32;
    return double(codes[size_t(token * width + k)]) *
           double(scales[size_t((token * width + k) / 32)]);
}

// ---- products ----

// Roundings on the way to a sum of n_cols terms, as fractions of the sum of their magnitudes. The
// CPU has at most 4 per 256 columns and 8 to add chains (float types: one per 4 columns in the
// narrowest kernel). The GPU has at most 4 per block of a lane's chain, of which there is one in
// 32 · 32 columns (float types: one per column of the chain, 1 in 32), 5 to add lanes, 3 to add
// warps, 2 for bias and accumulation, 3 for the factors of a term; in a tile the chain has all
// blocks (float types: all columns).
static double product_roundings(Type type, int64_t n_cols, bool tiled) {
    const double n = double(n_cols);
    const double cpu = wants_q8(type) ? 4.0 * std::ceil(n / 256.0) + 8.0 : std::ceil(n / 4.0) + 8.0;
    const double chain = wants_q8(type) ? 4.0 * std::ceil(tiled ? n / 32.0 : n / 1024.0)
                         : tiled        ? n
                                        : 8.0 * std::ceil(n / 256.0);
    const double gpu = chain + 13.0;
    return cpu + gpu;
}

TestProduct::TestProduct(const TestWeight& w, const TestInput& in, bool tiled) {
    const kernels::Weight& weight = w.host;
    const int64_t n = in.n_tokens, n_rows = weight.n_rows, n_cols = weight.n_cols;
    y.resize(size_t(n * n_rows));
    tolerance.resize(y.size());
    const kernels::ActivationForm form = kernels::activation_form(weight.type);
    std::vector<std::byte> prepared(kernels::activation_bytes(form, n_cols, n) + 64);
    std::vector<std::byte> scratch(kernels::matmul_scratch_bytes(weight, n) + 64);
    kernels::prepare_activations(form, in.x.data(), n_cols, n_cols, n, 0, n, prepared.data());
    kernels::matmul_rows(weight, 0, n_rows, prepared.data(), n, y.data(), n_rows, scratch.data());
    const double roundings = product_roundings(weight.type, n_cols, tiled);
    for (int64_t t = 0; t < n; ++t) {
        for (int64_t r = 0; r < n_rows; ++r) {
            double size = 0;
            for (int64_t k = 0; k < n_cols; ++k)
                size += double(w.magnitudes[size_t(r * n_cols + k)]) *
                        std::fabs(in.seen(weight.type, t, k));
            tolerance[size_t(t * n_rows + r)] = roundings * float_rounding * size;
        }
    }
}

}  // namespace qi::cuda
