// Codecs of every instruction set against the portable ones, byte for byte, at any alignment.
#include "quant/codec_table.h"

#include <cfloat>

#include "kernel_checks.h"
#include "weight_fixtures.h"

using namespace qi;
using namespace qi::test;
using codecs::Codec;
using codecs::codec_for;

namespace {

constexpr int64_t n_cols = 1024;

Checks checks;

struct Sample {
    const char* name;
    std::vector<float> values;  // [n_cols], finite
};

template <class Value>
Sample sample(const char* name, Value value) {
    Sample made{name, std::vector<float>(n_cols)};
    for (int64_t i = 0; i < n_cols; ++i)
        made.values[size_t(i)] = value(i);
    return made;
}

std::vector<Sample> samples() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto any = [&](uint32_t mask) {
        const float x = __builtin_bit_cast(float, uint32_t(random()) & mask);
        return std::isfinite(x) ? x : 1.0f;
    };
    const auto zero = [&] { return random() % 2 ? 0.0f : -0.0f; };
    const auto sign = [&] { return random() % 2 ? 1.0f : -1.0f; };
    return {
        sample("normal", [&](int64_t) { return normal(random); }),
        sample("heavy tails", [&](int64_t) { return normal(random) / std::fabs(normal(random)); }),
        sample("any finite bits", [&](int64_t) { return any(0xffffffffu); }),
        sample("denormal", [&](int64_t) { return any(0x807fffffu); }),
        sample("least numbers", [&](int64_t i) { return i % 7 ? 0.0f : sign() * FLT_TRUE_MIN; }),
        sample("greatest numbers", [&](int64_t) { return sign() * FLT_MAX; }),
        sample("a range beyond floats",
               [&](int64_t i) { return FLT_MAX * (float(i - 512) / 512); }),
        sample("both zeros", [&](int64_t) { return zero(); }),
        sample("zeros and more", [&](int64_t) { return random() % 3 ? zero() : normal(random); }),
        sample("zeros and above",
               [&](int64_t) { return random() % 3 ? zero() : std::fabs(normal(random)); }),
        sample("zeros and below",
               [&](int64_t) { return random() % 3 ? zero() : -std::fabs(normal(random)); }),
        sample("two magnitudes", [&](int64_t) { return sign(); }),
        sample("halves of steps", [&](int64_t i) { return float(i % 255 - 127) / 2; }),
        sample("around the least half", [&](int64_t) { return normal(random) * 0x1p-24f; }),
        sample("beyond halves", [&](int64_t) { return normal(random) * 1e6f; }),
        sample("blocks of all sizes",
               [&](int64_t i) { return normal(random) * std::ldexp(1.0f, int(i / 32) * 8 - 128); }),
    };
}

// Numbers of elements that leave a rest beside whole registers where the type has no blocks.
std::vector<int64_t> sizes_of(const TypeTraits& type) {
    if (type.block_size > 1) return {type.block_size, n_cols};
    return {1, 2, 3, 5, 7, 15, 17, 31, 33, n_cols};
}

void test_encoding(const TypeTraits& type, const Codec& plain, const Codec& codec, Isa isa) {
    std::mt19937 random(2);
    std::vector<float> importance(n_cols);
    for (float& weight : importance)
        weight = float(random() % 1000);
    for (const Sample& sample : samples()) {
        for (int64_t n : sizes_of(type)) {
            for (const float* weights :
                 std::initializer_list<const float*>{nullptr, importance.data()}) {
                const size_t n_bytes = row_bytes(type.type, n);
                std::vector<std::byte> expected(n_bytes);
                GuardedBytes got(n_bytes);  // which end where a page does
                plain.encode(type.type, sample.values.data(), n, weights, expected.data());
                codec.encode(type.type, sample.values.data(), n, weights, got.data());
                checks.expect(std::memcmp(expected.data(), got.data(), n_bytes) == 0,
                              "%s: %s of %lld values, '%s'%s, differs from portable", isa_name(isa),
                              type.name, static_cast<long long>(n), sample.name,
                              weights ? " weighted" : "");
            }
        }
    }
}

bool same_but_for_nan(float a, float b) {
    return std::isnan(a) ? std::isnan(b)
                         : __builtin_bit_cast(uint32_t, a) == __builtin_bit_cast(uint32_t, b);
}

void test_decoding(const TypeTraits& type, const Codec& plain, const Codec& codec, Isa isa) {
    std::mt19937 random(3);
    std::vector<float> expected(n_cols), got(n_cols);
    for (int round = 0; round < 200; ++round) {
        for (int64_t n : sizes_of(type)) {
            GuardedBytes blocks(row_bytes(type.type, n));
            for (size_t i = 0; i < row_bytes(type.type, n); ++i)
                blocks.data()[i] = std::byte(random());
            plain.decode(type.type, blocks.data(), n, expected.data());
            codec.decode(type.type, blocks.data(), n, got.data());
            bool same = true;
            for (size_t i = 0; i < size_t(n); ++i)
                same = same && same_but_for_nan(expected[i], got[i]);
            checks.expect(same, "%s: %lld values of %s differ from portable", isa_name(isa),
                          static_cast<long long>(n), type.name);
        }
    }
}

void test_every_half(const Codec& plain, const Codec& codec, Isa isa) {
    std::vector<uint16_t> bits(1 << 16);
    for (size_t i = 0; i < bits.size(); ++i)
        bits[i] = uint16_t(i);
    const auto* bytes = reinterpret_cast<const std::byte*>(bits.data());
    const auto n = int64_t(bits.size());
    for (Type type : {Type::f16, Type::bf16}) {
        std::vector<float> expected(bits.size()), got(bits.size());
        plain.decode(type, bytes, n, expected.data());
        codec.decode(type, bytes, n, got.data());
        for (size_t i = 0; i < bits.size(); ++i)
            checks.expect(same_but_for_nan(expected[i], got[i]),
                          "%s: %s %04x decodes to %g, not %g", isa_name(isa), traits(type).name,
                          unsigned(bits[i]), double(got[i]), double(expected[i]));
    }
}

// One value in the wrong among many, wherever it stands.
void test_limits(const Codec& codec, Isa isa) {
    const float infinity = HUGE_VALF, nan = std::nanf("");
    for (int64_t n : {1, 3, 8, 17, 32, 100}) {
        std::vector<float> values(size_t(n), -2.0f);
        checks.expect(codec.all_within(values.data(), n, 2.0f), "%s: -2 is within 2",
                      isa_name(isa));
        for (float& value : values) {
            for (float wrong : {infinity, -infinity, nan, -nan, 2.0000002f, -2.0000002f}) {
                value = wrong;
                checks.expect(!codec.all_within(values.data(), n, 2.0f), "%s: %g is not within 2",
                              isa_name(isa), double(wrong));
                value = -2.0f;
            }
        }
    }
}

}  // namespace

int main() {
    const Codec& plain = *codec_for(Isa::portable);
    for (Isa isa : supported_levels()) {
        const Codec* codec = codec_for(isa);
        checks.expect(codec != nullptr, "%s: no codecs", isa_name(isa));
        if (!codec) continue;
        for (const TypeTraits& type : all_types()) {
            test_encoding(type, plain, *codec, isa);
            test_decoding(type, plain, *codec, isa);
        }
        test_every_half(plain, *codec, isa);
        test_limits(*codec, isa);
    }
    return checks.status();
}
