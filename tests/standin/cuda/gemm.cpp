// cuBLAS's one operation that is used, as the definition says: float32 sums along k in order.
#include <cstring>
#include <vector>

#include "gpu_streams.h"

namespace standin {
namespace {

float from_half(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t exponent = h >> 10 & 31u, fraction = h & 1023u;
    uint32_t bits;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = exponent == 31 ? sign | 0x7f800000u | fraction << 13
                          : sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To nearest, ties to even.
uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
    if (bits < 0x38800000u) {                        // below 2^-14: steps of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude = magnitude * 0x1p24f + 0x1p23f;
        std::memcpy(&bits, &magnitude, sizeof bits);
        return static_cast<uint16_t>(sign | (bits & 0x7fffu));
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

float load(uint64_t base, int64_t i, Number type) {
    if (type == Number::f32) return reinterpret_cast<const float*>(base)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(base)[i];
    if (type == Number::f16) return from_half(bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

void store(uint64_t base, int64_t i, Number type, float value) {
    if (type == Number::f32) {
        reinterpret_cast<float*>(base)[i] = value;
    } else if (type == Number::f16) {
        reinterpret_cast<uint16_t*>(base)[i] = to_half(value);
    } else {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        if ((bits & 0x7fffffffu) <= 0x7f800000u)
            bits += 0x7fffu + (bits >> 16 & 1u);
        else
            bits |= 0x400000u;
        reinterpret_cast<uint16_t*>(base)[i] = static_cast<uint16_t>(bits >> 16);
    }
}

// Row i of op(A), or column i of op(B), as [k] floats.
std::vector<float> gather(uint64_t base, int64_t n, int64_t k, int64_t step, int64_t k_step,
                          Number type) {
    std::vector<float> out(static_cast<size_t>(n * k));
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++)
            out[static_cast<size_t>(i * k + j)] = load(base, i * step + j * k_step, type);
    return out;
}

}  // namespace

void run_gemm(const Gemm& g) {
    const std::vector<float> a =
        gather(g.a, g.m, g.k, g.transpose_a ? g.lda : 1, g.transpose_a ? 1 : g.lda, g.type_ab);
    const std::vector<float> b =
        gather(g.b, g.n, g.k, g.transpose_b ? 1 : g.ldb, g.transpose_b ? g.ldb : 1, g.type_ab);
    for (int64_t j = 0; j < g.n; j++) {
        for (int64_t i = 0; i < g.m; i++) {
            float sum = 0.0f;
            for (int64_t l = 0; l < g.k; l++)
                sum += a[static_cast<size_t>(i * g.k + l)] * b[static_cast<size_t>(j * g.k + l)];
            const int64_t at = j * g.ldc + i;
            // With beta 0, C is not read: it may hold anything.
            const float old = g.beta == 0.0f ? 0.0f : g.beta * load(g.c, at, g.type_c);
            store(g.c, at, g.type_c, g.alpha * sum + old);
        }
    }
}

}  // namespace standin
