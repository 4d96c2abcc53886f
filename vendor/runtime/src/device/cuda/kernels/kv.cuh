// Pages of keys and values as kernels/attention.h lays them out, and which of them a token sees.
#pragma once

#include "prelude.cuh"

constexpr int page_size = 64;
constexpr int kv_block = 32;  // dimensions that share a scale in Q8_0

// All pages of one layer. A page's part for one head is `head_bytes` long, keys then values.
struct KvPages {
    u8* pool;
    i64 page_stride;   // between pages, all layers included
    i64 layer_offset;  // of this layer inside a page
    i64 head_bytes;
    const i32* pages;  // page tables of all sequences; below 0: not here

    QI_DEVICE u8* head(int page_of_table, int head) const {
        return pool + pages[page_of_table] * page_stride + layer_offset + head * head_bytes;
    }
};

// What changes from step to step, in device memory: by token.
struct Tokens {
    const i32* positions;  // below 0: no token here, nothing is stored or attended to
    const i32* tables;     // where the token's sequence has its table in KvPages::pages
    const i32* bounds;     // or null: pages of the table from here on are left to the host
};

// The last position that a token at `position` sees here, before any it sees where nothing is.
QI_DEVICE int last_visible(const Tokens& tokens, int token, int position) {
    return tokens.bounds ? min_of(position, tokens.bounds[token] * page_size - 1) : position;
}

// The positions a token at `position` sees: [first, position].
QI_DEVICE int first_visible(int position, int window) {
    return window > 0 && position >= window ? position - window + 1 : 0;
}

// Keys [head_dim][64] and values [64][head_dim], both f16.
struct KvF16 {
    QI_DEVICE static i64 keys_bytes(int head_dim) { return i64(head_dim) * page_size * 2; }
    QI_DEVICE static i64 values_bytes(int head_dim) { return i64(head_dim) * page_size * 2; }

    // Dimension d of positions [8·p8, 8·p8 + 8).
    QI_DEVICE static void keys8(const u8* keys, int, int d, int p8, f32 (&out)[8]) {
        const Quad raw = *reinterpret_cast<const Quad*>(keys + (d * page_size + 8 * p8) * 2);
        widen(raw, out);
    }
    // Dimensions [8·chunk, 8·chunk + 8) of a position, zeros beyond the head. With `streamed` the
    // page is in global memory and is read past L1.
    using RawValues = Quad;
    template <bool streamed>
    QI_DEVICE static RawValues load_values8(const u8* values, int head_dim, int position,
                                            int chunk) {
        const u8* at = values + (position * head_dim + 8 * chunk) * 2;
        if (head_dim % 8 == 0) {
            if constexpr (streamed) return load_stream16(at);
            return *reinterpret_cast<const Quad*>(at);
        }
        const u16* halves = reinterpret_cast<const u16*>(at);
        const int n = head_dim - 8 * chunk;
        Quad raw;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 low = 2 * i < n ? halves[2 * i] : 0u;
            const u32 high = 2 * i + 1 < n ? halves[2 * i + 1] : 0u;
            raw.v[i] = low | high << 16;
        }
        return raw;
    }
    QI_DEVICE static void widen(const Quad& raw, f32 (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = f16_to_f32(u16(raw.v[i]));
            out[2 * i + 1] = f16_to_f32(u16(raw.v[i] >> 16));
        }
    }
};

// Codes int8 in the same places, then scales f16: of keys [head_dim/32][64], of values
// [64][head_dim/32].
struct KvQ8_0 {
    QI_DEVICE static i64 keys_bytes(int head_dim) {
        return i64(head_dim) * page_size + i64(head_dim) / kv_block * page_size * 2;
    }
    QI_DEVICE static i64 values_bytes(int head_dim) { return keys_bytes(head_dim); }

    QI_DEVICE static void keys8(const u8* keys, int head_dim, int d, int p8, f32 (&out)[8]) {
        const Pair codes = *reinterpret_cast<const Pair*>(keys + d * page_size + 8 * p8);
        const Quad scales = *reinterpret_cast<const Quad*>(keys + head_dim * page_size +
                                                           (d / kv_block * page_size + 8 * p8) * 2);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = f32(i8(codes.v[i / 4] >> 8 * (i % 4))) *
                     f16_to_f32(u16(scales.v[i / 2] >> 16 * (i % 2)));
    }
    struct RawValues {
        Pair codes;
        u16 scale;
    };
    template <bool streamed>
    QI_DEVICE static RawValues load_values8(const u8* values, int head_dim, int position,
                                            int chunk) {
        const int first = position * head_dim + 8 * chunk;
        const u8* codes = values + first;
        const u8* scale = values + head_dim * page_size + first / kv_block * 2;
        if constexpr (streamed) return {load_stream8(codes), load_stream2(scale)};
        return {*reinterpret_cast<const Pair*>(codes), *reinterpret_cast<const u16*>(scale)};
    }
    QI_DEVICE static void widen(const RawValues& raw, f32 (&out)[8]) {
        const f32 scale = f16_to_f32(raw.scale);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = f32(i8(raw.codes.v[i / 4] >> 8 * (i % 4))) * scale;
    }
};
