// Self-tests of matrix products and of rows as numbers.
#include <algorithm>

#include "base/error.h"
#include "device/cuda/self_test_bench.h"
#include "quant/codec.h"
#include "quant/half.h"

namespace qi::cuda {

namespace {

struct Shape {
    int64_t n_rows, n_blocks, n_tokens;
};

std::string shape_text(Type type, int64_t n_rows, int64_t n_cols, int64_t n_tokens) {
    return format("%s %lldx%lld, %lld tokens", traits(type).name, (long long)n_rows,
                  (long long)n_cols, (long long)n_tokens);
}

// Rows and columns of a type that is stored in blocks of 1, 32 or 256.
int64_t columns_of(Type type, int64_t n_blocks) {
    const int size = traits(type).block_size;
    return size == 1 ? n_blocks * 31 + 1 : n_blocks * size;
}

// One weight with and without bias and accumulation.
void test_product(Bench& bench, Type type, const Shape& shape,
                  ProductKernel kernel = ProductKernel::rows) {
    const int64_t n_cols = columns_of(type, shape.n_blocks), n = shape.n_tokens;
    const TestWeight w(bench, type, shape.n_rows, n_cols);
    const TestInput in(bench, bench.normal(size_t(n * n_cols)), n, n_cols);
    const TestProduct want(w, in, kernel != ProductKernel::rows);
    const std::vector<float> bias = bench.normal(size_t(shape.n_rows));
    const std::vector<float> before = bench.normal(want.y.size());
    const CUdeviceptr bias_at = bench.upload(bias);
    for (const bool accumulate : {false, true}) {
        const CUdeviceptr y = bench.upload(before);
        const Product product{w.device, accumulate ? bias_at : 0, y, shape.n_rows};
        bench.kernels.multiply(bench.stream, in.device, {&product, 1}, accumulate, kernel);
        const auto got = bench.download<float>(y, want.y.size());
        for (size_t i = 0; i < got.size(); ++i) {
            double value = double(want.y[i]), size = 0;
            if (accumulate) {
                const double added = double(bias[i % size_t(shape.n_rows)]);
                value += added + double(before[i]);
                size =
                    std::fabs(added) + std::fabs(double(before[i])) + std::fabs(double(want.y[i]));
            }
            bench.compare(double(got[i]), value, want.tolerance[i] + 3 * float_rounding * size);
        }
    }
}

// A token's results must not depend on the tokens beside it.
void test_alone(Bench& bench, Type type) {
    const int64_t n_cols = columns_of(type, 9), n_rows = 7, n = 8;
    const TestWeight w(bench, type, n_rows, n_cols);
    const TestInput in(bench, bench.normal(size_t(n * n_cols)), n, n_cols);
    const auto multiply = [&](const Input& input, bool relu = false) {
        const CUdeviceptr y = bench.room(size_t(n * n_rows) * sizeof(float));
        const Product product{w.device, 0, y, n_rows, relu};
        bench.kernels.multiply(bench.stream, input, {&product, 1}, false);
        return bench.download<float>(y, size_t(input.n_tokens * n_rows));
    };
    const std::vector<float> all = multiply(in.device);
    for (int64_t count = 1; count < n; ++count) {
        Input fewer = in.device;
        fewer.n_tokens = count;
        const std::vector<float> some = multiply(fewer);
        bench.expect(std::memcmp(some.data(), all.data(), some.size() * sizeof(float)) == 0);
    }
    const std::vector<float> positive = multiply(in.device, true);
    for (size_t i = 0; i < all.size(); ++i)
        bench.expect(positive[i] == std::max(all[i], 0.0f));
}

// Three matrices in one launch, as q, k and v.
void test_three(Bench& bench, Type type) {
    const int64_t n_cols = columns_of(type, 5), n = 2;
    const TestInput in(bench, bench.normal(size_t(n * n_cols)), n, n_cols);
    const TestWeight w[3] = {
        {bench, type, 11, n_cols}, {bench, type, 4, n_cols}, {bench, type, 5, n_cols}};
    std::vector<Product> products;
    for (const TestWeight& weight : w)
        products.push_back({weight.device, 0,
                            bench.room(size_t(n * (weight.host.n_rows + 3)) * sizeof(float)),
                            weight.host.n_rows + 3});
    bench.kernels.multiply(bench.stream, in.device, products, false);
    for (size_t i = 0; i < 3; ++i) {
        const TestProduct want(w[i], in);
        const int64_t n_rows = w[i].host.n_rows, stride = n_rows + 3;
        const auto got = bench.download<float>(products[i].y, size_t(n * stride));
        for (int64_t t = 0; t < n; ++t)
            for (int64_t r = 0; r < n_rows; ++r)
                bench.compare(double(got[size_t(t * stride + r)]),
                              double(want.y[size_t(t * n_rows + r)]),
                              want.tolerance[size_t(t * n_rows + r)]);
    }
}

// Enough rows for two of them per warp.
void test_many_rows(Bench& bench, Type type) {
    const Gpu::Attributes& gpu = bench.kernels.gpu()->attributes();
    const int64_t n_rows = int64_t(gpu.n_sm) * std::max(gpu.max_threads_per_sm, 1024) / 32 + 5;
    test_product(bench, type, {n_rows, 2, 1});
}

// NaN and infinite activations, and weights that are.
void test_not_finite(Bench& bench, Type type) {
    const int64_t n_cols = columns_of(type, 3), n_rows = 3, n = 3;
    const TestWeight w(bench, type, n_rows, n_cols);
    std::vector<float> x = bench.normal(size_t(n * n_cols));
    x[size_t(n_cols / 2)] = std::nanf("");
    x[size_t(n_cols + 1)] = HUGE_VALF;
    const TestInput in(bench, x, n, n_cols);
    const CUdeviceptr y = bench.room(size_t(n * n_rows) * sizeof(float));
    const Product product{w.device, 0, y, n_rows};
    bench.kernels.multiply(bench.stream, in.device, {&product, 1}, false);
    const auto got = bench.download<float>(y, size_t(n * n_rows));
    for (int64_t t = 0; t < n; ++t)
        for (int64_t r = 0; r < n_rows; ++r)
            bench.expect(std::isfinite(got[size_t(t * n_rows + r)]) == (t == 2));
}

void test_widen(Bench& bench, Type type) {
    const int64_t n_cols = columns_of(type, 9), n_rows = 6, first = 2, n = 3;
    const TestWeight w(bench, type, n_rows, n_cols);
    const auto n_values = size_t(n * n_cols);
    const float* want = w.values.data() + first * n_cols;
    const CUdeviceptr out = bench.room(n_values * sizeof(float));
    bench.kernels.widen(bench.stream, w.device, first, n, Type::f32, out);
    const auto floats = bench.download<float>(out, n_values);
    bench.kernels.widen(bench.stream, w.device, first, n, Type::f16, out);
    const auto halves = bench.download<uint16_t>(out, n_values);
    bench.kernels.widen(bench.stream, w.device, first, n, Type::bf16, out);
    const auto brains = bench.download<uint16_t>(out, n_values);
    for (size_t i = 0; i < n_values; ++i) {
        bench.expect(floats[i] == want[i]);
        bench.expect(halves[i] == f32_to_f16(want[i]));
        bench.expect(brains[i] == f32_to_bf16(want[i]));
    }
}

}  // namespace

void add_product_tests(std::vector<SelfTest>& tests) {
    // Odd counts of blocks, rows and tokens; long rows are shared by several warps.
    constexpr Shape small[] = {{1, 1, 1},  {5, 3, 2}, {37, 8, 3}, {3, 9, 4},  {6, 17, 5},
                               {2, 33, 6}, {9, 2, 7}, {4, 5, 8},  {10, 3, 17}};
    constexpr Shape large[] = {{1, 1, 1}, {5, 3, 2}, {9, 2, 3}, {3, 1, 4},
                               {6, 9, 5}, {9, 1, 7}, {4, 2, 8}, {10, 1, 17}};
    for (const TypeTraits& traits : all_types()) {
        const Type type = traits.type;
        const bool super = traits.block_size == 256;
        for (const Shape& shape : super ? std::span<const Shape>(large) : std::span(small))
            tests.push_back(
                {"product " + shape_text(type, shape.n_rows, columns_of(type, shape.n_blocks),
                                         shape.n_tokens),
                 [=](Bench& bench) { test_product(bench, type, shape); }});
        constexpr std::pair<ProductKernel, const char*> tiles[] = {
            {ProductKernel::tile_128x64, "tile 128x64 "},
            {ProductKernel::tile_32x32, "tile 32x32 "},
            {ProductKernel::tile_32x16, "tile 32x16 "},
            {ProductKernel::automatic, "tile "}};
        for (const auto& [kernel, tile_name] : tiles) {
            Shape shape = kernel == ProductKernel::tile_128x64  ? Shape{131, 5, 65}
                          : kernel == ProductKernel::tile_32x32 ? Shape{70, 9, 33}
                          : kernel == ProductKernel::tile_32x16 ? Shape{5, 13, 9}
                                                                : Shape{40, 1, 20};
            if (super) shape.n_blocks = shape.n_blocks / 4 + 1;
            const int64_t n_cols = columns_of(type, shape.n_blocks);
            tests.push_back(
                {tile_name + shape_text(type, shape.n_rows, n_cols, shape.n_tokens),
                 [=, kernel = kernel](Bench& bench) { test_product(bench, type, shape, kernel); }});
        }
        const Shape split = {3, super ? 17 : 136, 2};
        tests.push_back({"product " + shape_text(type, split.n_rows,
                                                 columns_of(type, split.n_blocks), split.n_tokens),
                         [=](Bench& bench) { test_product(bench, type, split); }});
        const std::string name = traits.name;
        tests.push_back({"products alone and together " + name,
                         [=](Bench& bench) { test_alone(bench, type); }});
        tests.push_back({"three products " + name, [=](Bench& bench) { test_three(bench, type); }});
        tests.push_back(
            {"not finite " + name, [=](Bench& bench) { test_not_finite(bench, type); }});
        tests.push_back({"widen " + name, [=](Bench& bench) { test_widen(bench, type); }});
    }
    for (const Type type : {Type::f16, Type::q4_0, Type::q6_k})
        tests.push_back({std::string("many rows ") + traits(type).name,
                         [=](Bench& bench) { test_many_rows(bench, type); }});
}

}  // namespace qi::cuda
