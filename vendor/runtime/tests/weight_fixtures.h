// Weights for kernel tests: memory that must not be read beyond, and blocks of every type.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "quant/half.h"
#include "quant/types.h"

namespace qi::test {

// Memory that ends where the next page cannot be touched: a read beyond it is a crash.
class GuardedBytes {
  public:
    explicit GuardedBytes(size_t n) : n_(n) {
        const auto page = size_t(sysconf(_SC_PAGESIZE));
        mapped_ = (n + page - 1) / page * page + page;
        base_ = static_cast<std::byte*>(
            mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) {
            std::perror("mmap");
            std::_Exit(1);
        }
        end_ = base_ + mapped_ - page;
    }
    ~GuardedBytes() { munmap(base_, mapped_); }
    GuardedBytes(const GuardedBytes&) = delete;
    GuardedBytes& operator=(const GuardedBytes&) = delete;
    std::byte* data() { return end_ - n_; }

  private:
    size_t n_, mapped_;
    std::byte *base_, *end_;
};

// Where a block keeps its f16 scale and minimum, and the sign that makes the minimum raise weights.
struct HalfFields {
    Type type;
    int scale;
    int minimum;  // -1: none
    int raising;
};
inline constexpr HalfFields half_fields[] = {
    {Type::q4_0, 0, -1, 0},   {Type::q4_1, 0, 2, 1},  {Type::q5_0, 0, -1, 0},
    {Type::q5_1, 0, 2, 1},    {Type::q8_0, 0, -1, 0}, {Type::q2_k, 80, 82, -1},
    {Type::q3_k, 108, -1, 0}, {Type::q4_k, 0, 2, -1}, {Type::q5_k, 0, 2, -1},
    {Type::q6_k, 208, -1, 0},
};

inline const HalfFields* fields_of(Type type) {
    for (const HalfFields& fields : half_fields)
        if (fields.type == type) return &fields;
    return nullptr;
}

inline void put_half(std::byte* at, float value) {
    const f16_bits bits = f32_to_f16(value);
    std::memcpy(at, &bits, sizeof bits);
}

enum class Content { random, all_zero_bits, all_one_bits };

inline void fill_weights(Type type, Content content, std::byte* out, size_t n_bytes,
                         std::mt19937& rng) {
    std::normal_distribution<float> normal;
    if (type == Type::f32) {
        for (size_t i = 0; i < n_bytes; i += 4) {
            const float value = normal(rng);
            std::memcpy(out + i, &value, 4);
        }
        return;
    }
    if (type == Type::f16 || type == Type::bf16) {
        for (size_t i = 0; i < n_bytes; i += 2) {
            const float value = normal(rng);
            const uint16_t bits = type == Type::f16 ? f32_to_f16(value) : f32_to_bf16(value);
            std::memcpy(out + i, &bits, 2);
        }
        return;
    }
    for (size_t i = 0; i < n_bytes; ++i)
        out[i] = content == Content::random          ? std::byte(rng())
                 : content == Content::all_zero_bits ? std::byte(0)
                                                     : std::byte(0xff);
    const HalfFields& fields = *fields_of(type);
    const auto block_bytes = size_t(traits(type).block_bytes);
    for (size_t i = 0; i < n_bytes; i += block_bytes) {
        put_half(out + i + fields.scale, normal(rng));
        if (fields.minimum >= 0) put_half(out + i + fields.minimum, normal(rng));
    }
}

}  // namespace qi::test
