// What the self-tests share: data on both sides, and comparing.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device/cuda/launch.h"
#include "kernels/matmul.h"

namespace qi::cuda {

// One test's device, data and verdict. Everything it puts on the device goes with it.
class Bench {
  public:
    explicit Bench(const std::shared_ptr<Gpu>& gpu, uint32_t seed)
        : kernels(gpu), stream(gpu), random(seed), gpu_(gpu) {}

    Kernels kernels;
    Stream stream;
    std::mt19937 random;

    // ---- data ----
    CUdeviceptr room(size_t n_bytes);  // filled with 0xff: NaN, -1
    CUdeviceptr zeros(size_t n_bytes);
    CUdeviceptr upload(const void* data, size_t n_bytes);
    template <typename T>
    CUdeviceptr upload(const std::vector<T>& values) {
        return upload(values.data(), values.size() * sizeof(T));
    }
    template <typename T>
    std::vector<T> download(CUdeviceptr from, size_t n) {
        std::vector<T> values(n);
        fetch(values.data(), from, n * sizeof(T));
        return values;
    }
    std::vector<float> normal(size_t n, float deviation = 1.0f);
    int below(int n) { return int(random() % uint32_t(n)); }

    // ---- verdict ----
    // |got - want| over the tolerance; NaN agrees with NaN alone.
    void compare(double got, double want, double tolerance);
    void expect(bool equal) { compare(equal ? 0.0 : 1.0, 0.0, 0.0); }
    double error() const { return error_; }
    size_t n_values() const { return n_values_; }

  private:
    void fetch(void* to, CUdeviceptr from, size_t n_bytes);

    std::shared_ptr<Gpu> gpu_;
    std::shared_ptr<Budget> budget_ = std::make_shared<Budget>(Budget::unlimited);
    std::vector<DeviceMemory> memory_;
    double error_ = 0;
    size_t n_values_ = 0;
};

inline constexpr double float_rounding = 0x1p-24;  // of a float operation, relative

// A weight of random blocks, as a file and as the device has it.
struct TestWeight {
    kernels::Weight host;
    DeviceWeight device;
    std::vector<std::byte> bytes;
    std::vector<float> values;      // [n_rows][n_cols], decoded
    std::vector<float> magnitudes;  // of the terms each value is made of: scale · code and shift

    TestWeight(Bench& bench, Type type, int64_t n_rows, int64_t n_cols);
};
std::vector<std::byte> random_rows(std::mt19937& random, Type type, int64_t n_rows, int64_t n_cols);

// Activations, their q8 copy as the CPU's quantiser defines it, and both on the device.
struct TestInput {
    int64_t n_tokens, n_cols;
    std::vector<float> x;
    std::vector<int8_t> codes;  // [n_tokens][width]
    std::vector<float> scales;  // [n_tokens][width/32]
    std::vector<float> sums;    // [n_tokens][width/16]
    Input device;

    TestInput(Bench& bench, std::vector<float> values, int64_t n_tokens, int64_t n_cols);
    // Activation k of a token as a product with that weight type sees it.
    double seen(Type weight_type, int64_t token, int64_t k) const;
};

// W·x as the CPU computes it, [n_tokens][n_rows], and how far another order of sums may be from it.
struct TestProduct {
    std::vector<float> y;
    std::vector<double> tolerance;
    // tiled: one chain over all blocks or columns.
    TestProduct(const TestWeight& w, const TestInput& in, bool tiled = false);
};

struct SelfTest {
    std::string name;
    std::function<void(Bench&)> run;
};
void add_row_tests(std::vector<SelfTest>& tests);
void add_product_tests(std::vector<SelfTest>& tests);
void add_attention_tests(std::vector<SelfTest>& tests);
void add_neuron_tests(std::vector<SelfTest>& tests);
void add_logit_tests(std::vector<SelfTest>& tests);
void add_exchange_tests(std::vector<SelfTest>& tests);

}  // namespace qi::cuda
