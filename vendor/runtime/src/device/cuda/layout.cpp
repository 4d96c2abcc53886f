#include "device/cuda/layout.h"

#include <array>
#include <cstring>

#include "base/error.h"
#include "quant/blocks.h"

namespace qi::cuda {

namespace {

constexpr size_t round16(size_t n) {
    return (n + 15) / 16 * 16;
}

// Sizes of a row's planes: bytes per 32 weights, then bytes per 256.
struct PlaneSizes {
    int of_block[3];
    int of_super[2];
};

constexpr PlaneSizes plane_sizes(Type type) {
    switch (type) {
        case Type::q4_0:
            return {{16, 2, 0}, {0, 0}};
        case Type::q4_1:
            return {{16, 4, 0}, {0, 0}};
        case Type::q5_0:
            return {{16, 4, 2}, {0, 0}};
        case Type::q5_1:
            return {{16, 4, 4}, {0, 0}};
        case Type::q8_0:
            return {{16, 16, 2}, {0, 0}};
        case Type::q2_k:
            return {{8, 2, 0}, {4, 0}};
        case Type::q3_k:
            return {{8, 4, 1}, {4, 2}};
        case Type::q4_k:
            return {{16, 0, 0}, {16, 0}};
        case Type::q5_k:
            return {{16, 4, 0}, {16, 0}};
        case Type::q6_k:
            return {{16, 8, 2}, {2, 0}};
        default:
            return {};
    }
}

// Where the planes of a row begin.
struct Planes {
    std::array<std::byte*, 3> of_block{};
    std::array<std::byte*, 2> of_super{};
    size_t n_bytes = 0;

    Planes(Type type, int64_t n_cols, std::byte* row) {
        const PlaneSizes sizes = plane_sizes(type);
        for (size_t i = 0; i < of_block.size(); ++i)
            of_block[i] = take(row, sizes.of_block[i], n_cols / 32);
        for (size_t i = 0; i < of_super.size(); ++i)
            of_super[i] = take(row, sizes.of_super[i], n_cols / 256);
    }

  private:
    std::byte* take(std::byte* row, int size, int64_t n) {
        std::byte* at = row ? row + n_bytes : nullptr;
        n_bytes += round16(size_t(size) * size_t(n));
        return at;
    }
};

uint32_t load_word(const void* at) {
    uint32_t word;
    std::memcpy(&word, at, 4);
    return word;
}
void store_word(std::byte* at, uint32_t word) {
    std::memcpy(at, &word, 4);
}

// One bit of 32 codes, bit i of `bits` that of code i.
uint32_t spread_bits(uint32_t bits) {
    uint32_t word = 0;
    for (int q = 0; q < 8; ++q)
        word |= ((bits >> 4 * q & 15u) * 0x00204081u & 0x01010101u) << q;
    return word;
}
// One bit of 32 codes, bit `bit` of byte i that of code i.
uint32_t gather_bits(const uint8_t* bytes, int bit) {
    uint32_t word = 0;
    for (int q = 0; q < 8; ++q)
        word |= (load_word(bytes + 4 * q) >> bit & 0x01010101u) << q;
    return word;
}
// Two bits of 32 codes, bits `shift` and up of byte i those of code i.
void gather_pairs(const uint8_t* bytes, int shift, std::byte* out) {
    for (int half = 0; half < 2; ++half) {
        uint32_t word = 0;
        for (int q = 0; q < 4; ++q)
            word |= (load_word(bytes + 16 * half + 4 * q) >> shift & 0x03030303u) << 2 * q;
        store_word(out + 4 * half, word);
    }
}
// Nibbles of 32 codes, each in byte i at `shift`, which is 0 or 4.
void gather_nibbles(const uint8_t* bytes, int shift, std::byte* out) {
    for (int i = 0; i < 16; i += 4) {
        const uint32_t low = load_word(bytes + i) >> shift & 0x0f0f0f0fu;
        const uint32_t high = load_word(bytes + 16 + i) >> shift & 0x0f0f0f0fu;
        store_word(out + i, low | high << 4);
    }
}

// ---- a block of 32, number i of its row ----

void put(const BlockQ4_0& block, const Planes& to, int64_t i) {
    std::memcpy(to.of_block[0] + 16 * i, block.qs, 16);
    std::memcpy(to.of_block[1] + 2 * i, &block.d, 2);
}
void put(const BlockQ4_1& block, const Planes& to, int64_t i) {
    std::memcpy(to.of_block[0] + 16 * i, block.qs, 16);
    std::memcpy(to.of_block[1] + 4 * i, &block, 4);  // d, m
}
void put(const BlockQ5_0& block, const Planes& to, int64_t i) {
    std::memcpy(to.of_block[0] + 16 * i, block.qs, 16);
    store_word(to.of_block[1] + 4 * i, spread_bits(load_word(block.qh)));
    std::memcpy(to.of_block[2] + 2 * i, &block.d, 2);
}
void put(const BlockQ5_1& block, const Planes& to, int64_t i) {
    std::memcpy(to.of_block[0] + 16 * i, block.qs, 16);
    store_word(to.of_block[1] + 4 * i, spread_bits(load_word(block.qh)));
    std::memcpy(to.of_block[2] + 4 * i, &block, 4);  // d, m
}
void put(const BlockQ8_0& block, const Planes& to, int64_t i) {
    std::memcpy(to.of_block[0] + 16 * i, block.qs, 16);
    std::memcpy(to.of_block[1] + 16 * i, block.qs + 16, 16);
    std::memcpy(to.of_block[2] + 2 * i, &block.d, 2);
}

// ---- a block of 256, number s of its row ----

void put(const BlockQ2_K& block, const Planes& to, int64_t s) {
    for (int g = 0; g < 8; ++g)
        gather_pairs(block.qs + g / 4 * 32, g % 4 * 2, to.of_block[0] + 8 * (8 * s + g));
    std::memcpy(to.of_block[1] + 16 * s, block.scales, 16);
    std::memcpy(to.of_super[0] + 4 * s, &block.d, 2);
    std::memcpy(to.of_super[0] + 4 * s + 2, &block.dmin, 2);
}
void put(const BlockQ3_K& block, const Planes& to, int64_t s) {
    const auto low = [&](int g) {
        return uint32_t(g < 8 ? block.scales[g] & 15 : block.scales[g - 8] >> 4);
    };
    const auto high = [&](int g) { return uint32_t(block.scales[8 + g % 4] >> 2 * (g / 4) & 3); };
    uint32_t highs = 0;
    for (int g = 0; g < 8; ++g) {
        gather_pairs(block.qs + g / 4 * 32, g % 4 * 2, to.of_block[0] + 8 * (8 * s + g));
        store_word(to.of_block[1] + 4 * (8 * s + g), gather_bits(block.hmask, g));
        to.of_block[2][8 * s + g] = std::byte(low(2 * g) | low(2 * g + 1) << 4);
        highs |= (high(2 * g) | high(2 * g + 1) << 2) << 4 * g;
    }
    store_word(to.of_super[0] + 4 * s, highs);
    std::memcpy(to.of_super[1] + 2 * s, &block.d, 2);
}
void put(const BlockQ4_K& block, const Planes& to, int64_t s) {
    for (int g = 0; g < 8; ++g)
        gather_nibbles(block.qs + g / 2 * 32, g % 2 * 4, to.of_block[0] + 16 * (8 * s + g));
    std::memcpy(to.of_super[0] + 16 * s, &block, 16);  // d, dmin, scales
}
void put(const BlockQ5_K& block, const Planes& to, int64_t s) {
    for (int g = 0; g < 8; ++g) {
        gather_nibbles(block.qs + g / 2 * 32, g % 2 * 4, to.of_block[0] + 16 * (8 * s + g));
        store_word(to.of_block[1] + 4 * (8 * s + g), gather_bits(block.qh, g));
    }
    std::memcpy(to.of_super[0] + 16 * s, &block, 16);
}
void put(const BlockQ6_K& block, const Planes& to, int64_t s) {
    for (int g = 0; g < 8; ++g) {
        const int half = g / 4, quarter = g % 4;
        gather_nibbles(block.ql + 64 * half + quarter % 2 * 32, quarter / 2 * 4,
                       to.of_block[0] + 16 * (8 * s + g));
        gather_pairs(block.qh + 32 * half, 2 * quarter, to.of_block[1] + 8 * (8 * s + g));
    }
    std::memcpy(to.of_block[2] + 16 * s, block.scales, 16);
    std::memcpy(to.of_super[0] + 2 * s, &block.d, 2);
}

template <class Block>
void repack_blocks(Type type, int64_t n_cols, const std::byte* from, std::byte* row) {
    const Planes planes(type, n_cols, row);
    const int64_t n = n_cols / traits(type).block_size;
    const auto* blocks = reinterpret_cast<const Block*>(from);
    for (int64_t i = 0; i < n; ++i)
        put(blocks[i], planes, i);
}

void repack_row(Type type, int64_t n_cols, const std::byte* from, std::byte* row) {
    switch (type) {
        case Type::f32:
        case Type::f16:
        case Type::bf16:
            std::memcpy(row, from, row_bytes(type, n_cols));
            return;
        case Type::q4_0:
            return repack_blocks<BlockQ4_0>(type, n_cols, from, row);
        case Type::q4_1:
            return repack_blocks<BlockQ4_1>(type, n_cols, from, row);
        case Type::q5_0:
            return repack_blocks<BlockQ5_0>(type, n_cols, from, row);
        case Type::q5_1:
            return repack_blocks<BlockQ5_1>(type, n_cols, from, row);
        case Type::q8_0:
            return repack_blocks<BlockQ8_0>(type, n_cols, from, row);
        case Type::q2_k:
            return repack_blocks<BlockQ2_K>(type, n_cols, from, row);
        case Type::q3_k:
            return repack_blocks<BlockQ3_K>(type, n_cols, from, row);
        case Type::q4_k:
            return repack_blocks<BlockQ4_K>(type, n_cols, from, row);
        case Type::q5_k:
            return repack_blocks<BlockQ5_K>(type, n_cols, from, row);
        case Type::q6_k:
            return repack_blocks<BlockQ6_K>(type, n_cols, from, row);
    }
    fail(QI_INTERNAL, "type %d has no layout on a GPU", int(type));
}

}  // namespace

size_t device_row_bytes(Type type, int64_t n_cols) {
    if (traits(type).block_size == 1) return round16(row_bytes(type, n_cols));
    return Planes(type, n_cols, nullptr).n_bytes;
}

void repack_rows(Type type, int64_t n_cols, const std::byte* from, int64_t n_rows, std::byte* to,
                 size_t to_stride) {
    const size_t from_bytes = row_bytes(type, n_cols), to_bytes = device_row_bytes(type, n_cols);
    for (int64_t i = 0; i < n_rows; ++i) {
        std::byte* row = to + size_t(i) * to_stride;
        // Padding is read where it shares a load with values.
        if (to_bytes != from_bytes) std::memset(row, 0, to_bytes);
        repack_row(type, n_cols, from + size_t(i) * from_bytes, row);
    }
}

NeuronLayout neuron_layout(const Type* gate, const Type* up, const Type* down, int64_t n_embd) {
    NeuronLayout layout;
    const auto take = [&](const Type* type) {
        const size_t at = layout.stride;
        if (type) layout.stride += device_row_bytes(*type, n_embd);
        return at;
    };
    layout.gate_offset = take(gate);
    layout.up_offset = take(up);
    layout.down_offset = take(down);
    return layout;
}

}  // namespace qi::cuda
