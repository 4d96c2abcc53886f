// Every CUDA kernel against its CPU twin on the device that libcuda shows, and repacked rows
// against the files' codec, which needs no device. Arguments: a word that names of tests to run
// contain.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "device/cuda/layout.h"
#include "device/cuda/self_test.h"
#include "device/cuda/self_test_bench.h"
#include "kernel_checks.h"
#include "quant/codec.h"
#include "quant/half.h"

using namespace qi;
using namespace qi::cuda;

namespace {

constexpr int skipped = 77;  // ctest's SKIP_RETURN_CODE, set in CMakeLists.txt

test::Checks checks;

// ---- rows as the device has them, read slowly and by the words of layout.h ----

class DeviceRow {
  public:
    DeviceRow(Type type, int64_t n_cols, const std::byte* row)
        : type_(type), n_blocks_(n_cols / 32), row_(row) {}

    float value(int64_t k) const {
        const int64_t b = k / 32;
        const int e = int(k % 32);
        const int64_t n = n_blocks_, s = b / 8;
        switch (type_) {
            case Type::f32: {
                float v;
                std::memcpy(&v, row_ + 4 * k, 4);
                return v;
            }
            case Type::f16:
                return half(0, k);
            case Type::bf16:
                return bf16_to_f32(u16(0, k));
            case Type::q4_0:
                return half(plane({16 * n}), b) * float(nibble(0, b, e) - 8);
            case Type::q4_1: {
                const int64_t at = plane({16 * n});
                return half(at, 2 * b) * float(nibble(0, b, e)) + half(at, 2 * b + 1);
            }
            case Type::q5_0: {
                const int64_t high = plane({16 * n}), at = plane({16 * n, 4 * n});
                return half(at, b) * float(nibble(0, b, e) + 16 * one_bit(high, b, e) - 16);
            }
            case Type::q5_1: {
                const int64_t high = plane({16 * n}), at = plane({16 * n, 4 * n});
                return half(at, 2 * b) * float(nibble(0, b, e) + 16 * one_bit(high, b, e)) +
                       half(at, 2 * b + 1);
            }
            case Type::q8_0: {
                const int64_t at = (e < 16 ? 0 : plane({16 * n})) + 16 * b + e % 16;
                return half(plane({16 * n, 16 * n}), b) * float(int8_t(byte(at)));
            }
            case Type::q2_k: {
                const int halves = byte(plane({8 * n}) + 2 * b + e / 16);
                const int64_t at = plane({8 * n, 2 * n});
                const float scale = half(at, 2 * s) * float(halves & 15);
                return scale * float(two_bits(0, b, e)) - half(at, 2 * s + 1) * float(halves >> 4);
            }
            case Type::q3_k: {
                const int64_t high = plane({8 * n}), lows = plane({8 * n, 4 * n});
                const int64_t highs = plane({8 * n, 4 * n, n});
                const int64_t at = plane({8 * n, 4 * n, n, n / 2});
                const int low = byte(lows + b) >> (e / 16 * 4) & 15;
                const int top = byte(highs + 4 * s + b % 8 / 2) >> (b % 2 * 4 + e / 16 * 2) & 3;
                const float scale = half(at, s) * float((low | top << 4) - 32);
                return scale * float(two_bits(0, b, e) + 4 * one_bit(high, b, e) - 4);
            }
            case Type::q4_k:
            case Type::q5_k: {
                const bool five = type_ == Type::q5_k;
                const int64_t at = (five ? plane({16 * n, 4 * n}) : plane({16 * n})) + 16 * s;
                const int g = int(b % 8);
                const auto packed = [&](int i) { return int(byte(at + 4 + i)); };
                int scale = packed(g % 4), minimum = packed(4 + g % 4);
                if (g < 4) {
                    scale &= 63;
                    minimum &= 63;
                } else {
                    scale = (packed(8 + g % 4) & 15) | scale >> 6 << 4;
                    minimum = packed(8 + g % 4) >> 4 | minimum >> 6 << 4;
                }
                const int code = nibble(0, b, e) + (five ? 16 * one_bit(plane({16 * n}), b, e) : 0);
                return half(at, 0) * float(scale) * float(code) - half(at, 1) * float(minimum);
            }
            case Type::q6_k: {
                const int64_t high = plane({16 * n}), halves = plane({16 * n, 8 * n});
                const float scale = half(plane({16 * n, 8 * n, 2 * n}), s) *
                                    float(int8_t(byte(halves + 2 * b + e / 16)));
                return scale * float(nibble(0, b, e) + 16 * two_bits(high, b, e) - 32);
            }
        }
        return 0.0f;
    }

  private:
    // Where the plane after those of the given sizes begins.
    static int64_t plane(std::initializer_list<int64_t> before) {
        int64_t at = 0;
        for (const int64_t size : before)
            at += (size + 15) / 16 * 16;
        return at;
    }
    int byte(int64_t at) const { return std::to_integer<int>(row_[at]); }
    uint16_t u16(int64_t at, int64_t i) const {
        return uint16_t(byte(at + 2 * i) | byte(at + 2 * i + 1) << 8);
    }
    float half(int64_t at, int64_t i) const { return f16_to_f32(u16(at, i)); }
    int nibble(int64_t at, int64_t b, int e) const {
        return byte(at + 16 * b + e % 16) >> (e / 16 * 4) & 15;
    }
    int two_bits(int64_t at, int64_t b, int e) const {
        return byte(at + 8 * b + e / 16 * 4 + e % 4) >> (2 * (e % 16 / 4)) & 3;
    }
    int one_bit(int64_t at, int64_t b, int e) const {
        return byte(at + 4 * b + e % 4) >> (e / 4) & 1;
    }

    Type type_;
    int64_t n_blocks_;
    const std::byte* row_;
};

void check_repacking() {
    std::mt19937 random(7);
    for (const TypeTraits& traits : all_types()) {
        for (const int64_t n_blocks : {1, 2, 3, 9, 16, 31}) {
            const int64_t n_cols = n_blocks * traits.block_size, n_rows = 3;
            const auto file = random_rows(random, traits.type, n_rows, n_cols);
            std::vector<float> want(size_t(n_rows * n_cols));
            decode(traits.type, file.data(), n_rows * n_cols, want.data());

            const size_t n_bytes = device_row_bytes(traits.type, n_cols), stride = n_bytes + 32;
            checks.expect(n_bytes % 16 == 0, "%s: rows of %zu bytes", traits.name, n_bytes);
            const size_t packed = row_bytes(traits.type, n_cols);
            checks.expect(n_bytes >= packed && n_bytes < packed + 5 * 16,
                          "%s: %zu bytes for %zu of the file", traits.name, n_bytes, packed);
            constexpr auto untouched = std::byte(0xa5);
            std::vector<std::byte> rows(size_t(n_rows) * stride, untouched);
            // Two threads' worth of rows.
            repack_rows(traits.type, n_cols, file.data(), 1, rows.data(), stride);
            repack_rows(traits.type, n_cols, file.data() + packed, n_rows - 1, rows.data() + stride,
                        stride);
            for (int64_t r = 0; r < n_rows; ++r) {
                const std::byte* row = rows.data() + size_t(r) * stride;
                const DeviceRow read(traits.type, n_cols, row);
                for (int64_t k = 0; k < n_cols; ++k)
                    checks.expect(read.value(k) == want[size_t(r * n_cols + k)],
                                  "%s: row %d column %d of %d is %g, not %g", traits.name, int(r),
                                  int(k), int(n_cols), double(read.value(k)),
                                  double(want[size_t(r * n_cols + k)]));
                for (size_t i = n_bytes; i < stride; ++i)
                    checks.expect(row[i] == untouched, "%s: writes beyond a row", traits.name);
            }
        }
    }
    const Type gate = Type::q4_0, up = Type::q4_0, down = Type::q6_k;
    const NeuronLayout layout = neuron_layout(&gate, &up, &down, 512);
    checks.expect(layout.gate_offset == 0 && layout.up_offset == device_row_bytes(gate, 512) &&
                      layout.down_offset == 2 * layout.up_offset &&
                      layout.stride == layout.down_offset + device_row_bytes(down, 512),
                  "a neuron's rows do not follow each other");
}

// The share-th of n_shares runs of those whose names have the word; neighbours use the same
// kernels.
void run_self_tests(const std::shared_ptr<Gpu>& gpu, const char* word, size_t share,
                    size_t n_shares) {
    const size_t n = n_self_tests();
    for (size_t i = share * n / n_shares; i < (share + 1) * n / n_shares; ++i) {
        if (self_test_name(i).find(word) == std::string::npos) continue;
        const SelfTestResult result = run_self_test(gpu, i);
        checks.expect(result.passed(), "%s: %.3g times its tolerance over %zu values",
                      result.name.c_str(), result.error, result.n_values);
        if (*word)
            std::fprintf(stderr, "%-50s %8.3g  %zu values\n", result.name.c_str(), result.error,
                         result.n_values);
    }
}

}  // namespace

int main(int argc, char** argv) {
    check_repacking();
    std::shared_ptr<Gpu> gpu;
    try {
        gpu = Gpu::open(0);
    } catch (const Error& error) {
        std::fprintf(stderr, "skipped: no CUDA device for the kernels: %s\n", error.what());
        return checks.status() == 0 ? skipped : 1;
    }
    // [WORD [SHARE N_SHARES]]
    const bool is_share = argc > 3;
    run_self_tests(gpu, argc > 1 ? argv[1] : "", is_share ? std::stoul(argv[2]) : 0,
                   is_share ? std::stoul(argv[3]) : 1);
    return checks.status();
}
