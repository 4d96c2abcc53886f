// The weight types as device rows hold them; layout.h describes the planes.
//
// A block type is read by blocks of 32 weights, one block per lane: its codes come as 16-byte (or
// 8- and 4-byte) loads that neighbouring lanes make contiguous. Float types are read by chunks of
// 16 bytes. A type also gives eight weights as floats wherever a kernel wants values: decode8, or
// load8 for many before values8 of the first.
//
// weight = scale · (code - offset) + minimum, with one scale per block (parts == 1) or one per half
// block of 16 (parts == 2). Offsets and minima meet the activations as their sums: -scale · offset
// + minimum is one factor `shift` per part.
#pragma once

#include "prelude.cuh"

// ---- unpacking ----

// Sixteen bytes hold the low four bits of 32 codes: byte i those of codes i and 16 + i.
QI_DEVICE void unpack_nibbles(const Quad& packed, u32 (&codes)[8]) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        codes[q] = packed.v[q] & 0x0f0f0f0fu;
        codes[4 + q] = packed.v[q] >> 4 & 0x0f0f0f0fu;
    }
}
// Four bytes hold two bits of 16 codes: byte i at 2·q those of code 4·q + i.
QI_DEVICE u32 two_bits(u32 packed, int quad) {
    return packed >> 2 * quad & 0x03030303u;
}
// Four bytes hold one bit of 32 codes: byte i at q that of code 4·q + i.
QI_DEVICE u32 one_bit(u32 packed, int quad) {
    return packed >> quad & 0x01010101u;
}

// Scale and shift of each part of a block.
template <int parts>
struct Factors {
    f32 scale[parts];
    f32 shift[parts];
};

// Four codes of a word as floats.
QI_DEVICE void code_floats(u32 word, f32 (&out)[8], int at) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[at + i] = f32(word >> 8 * i & 0xffu);
}

// Codes q and 4 + q of a block whose codes have a fifth bit elsewhere, four each.
QI_DEVICE void fifth_bit_floats(u32 codes, u32 high, int q, f32 (&out)[8]) {
    code_floats((codes & 0x0f0f0f0fu) | one_bit(high, q) << 4, out, 0);
    code_floats((codes >> 4 & 0x0f0f0f0fu) | one_bit(high, 4 + q) << 4, out, 4);
}

// What all types share, over a Type with: Raw8, load8(), values8().
template <class Type>
struct WeightType {
    // The columns of a chunk: four from first_column on, and four from second_part further on.
    QI_DEVICE void decode8(const u8* row, int chunk, f32 (&out)[8]) const {
        const auto& type = static_cast<const Type&>(*this);
        Type::values8(type.load8(row, chunk), chunk, out);
    }
};

// What block types share, over a Type with: Raw, parts, has_shift, load(), codes(), factors().
template <class Type>
struct BlockType : WeightType<Type> {
    static constexpr bool is_float = false;

    // The columns of chunk c: four from 32·(c/4) + 4·(c%4) on, and four that lie 16 further.
    QI_DEVICE static int first_column(int chunk) { return chunk / 4 * 32 + chunk % 4 * 4; }
    static constexpr int second_part = 16;
};

// Row planes: codes [n_blocks][16]; scales f16 [n_blocks].
struct Q4_0 : BlockType<Q4_0> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes;
        u16 scale;
    };
    i64 scales;

    QI_DEVICE explicit Q4_0(int n_cols) : scales(round16(i64(n_cols) / 2)) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)), load_stream2(row + scales + 2 * block)};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) { unpack_nibbles(raw.codes, out); }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int) {
        const f32 scale = f16_to_f32(raw.scale);
        return {{scale}, {-8.0f * scale}};
    }
    struct Raw8 {
        u32 codes;
        u16 scale;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return {load_stream4(row + 4 * i64(chunk)), load_stream2(row + scales + 2 * (chunk / 4))};
    }
    QI_DEVICE static void values8(const Raw8& raw, int, f32 (&out)[8]) {
        const f32 scale = f16_to_f32(raw.scale);
        code_floats(raw.codes & 0x0f0f0f0fu, out, 0);
        code_floats(raw.codes >> 4 & 0x0f0f0f0fu, out, 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = scale * (out[i] - 8.0f);
    }
};

// codes [n_blocks][16]; scale and minimum f16 [n_blocks][2].
struct Q4_1 : BlockType<Q4_1> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes;
        u32 factors;
    };
    i64 scales;

    QI_DEVICE explicit Q4_1(int n_cols) : scales(round16(i64(n_cols) / 2)) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)), load_stream4(row + scales + 4 * block)};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) { unpack_nibbles(raw.codes, out); }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int) {
        return {{f16_to_f32(u16(raw.factors))}, {f16_to_f32(u16(raw.factors >> 16))}};
    }
    struct Raw8 {
        u32 codes, factors;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return {load_stream4(row + 4 * i64(chunk)), load_stream4(row + scales + 4 * (chunk / 4))};
    }
    QI_DEVICE static void values8(const Raw8& raw, int, f32 (&out)[8]) {
        const f32 scale = f16_to_f32(u16(raw.factors));
        const f32 minimum = f16_to_f32(u16(raw.factors >> 16));
        code_floats(raw.codes & 0x0f0f0f0fu, out, 0);
        code_floats(raw.codes >> 4 & 0x0f0f0f0fu, out, 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = mul(scale, out[i]) + minimum;
    }
};

// codes [n_blocks][16]; fifth bits [n_blocks][4]; scales f16 [n_blocks].
struct Q5_0 : BlockType<Q5_0> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes;
        u32 high;
        u16 scale;
    };
    i64 highs, scales;

    QI_DEVICE explicit Q5_0(int n_cols)
        : highs(round16(i64(n_cols) / 2)), scales(highs + round16(i64(n_cols) / 8)) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)), load_stream4(row + highs + 4 * block),
                load_stream2(row + scales + 2 * block)};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
        unpack_nibbles(raw.codes, out);
#pragma unroll
        for (int q = 0; q < 8; ++q)
            out[q] |= one_bit(raw.high, q) << 4;
    }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int) {
        const f32 scale = f16_to_f32(raw.scale);
        return {{scale}, {-16.0f * scale}};
    }
    struct Raw8 {
        u32 codes, high;
        u16 scale;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        const int block = chunk / 4;
        return {load_stream4(row + 4 * i64(chunk)), load_stream4(row + highs + 4 * block),
                load_stream2(row + scales + 2 * block)};
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const f32 scale = f16_to_f32(raw.scale);
        fifth_bit_floats(raw.codes, raw.high, chunk % 4, out);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = scale * (out[i] - 16.0f);
    }
};

// codes [n_blocks][16]; fifth bits [n_blocks][4]; scale and minimum f16 [n_blocks][2].
struct Q5_1 : BlockType<Q5_1> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes;
        u32 high;
        u32 factors;
    };
    i64 highs, scales;

    QI_DEVICE explicit Q5_1(int n_cols)
        : highs(round16(i64(n_cols) / 2)), scales(highs + round16(i64(n_cols) / 8)) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)), load_stream4(row + highs + 4 * block),
                load_stream4(row + scales + 4 * block)};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
        unpack_nibbles(raw.codes, out);
#pragma unroll
        for (int q = 0; q < 8; ++q)
            out[q] |= one_bit(raw.high, q) << 4;
    }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int) {
        return {{f16_to_f32(u16(raw.factors))}, {f16_to_f32(u16(raw.factors >> 16))}};
    }
    struct Raw8 {
        u32 codes, high, factors;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        const int block = chunk / 4;
        return {load_stream4(row + 4 * i64(chunk)), load_stream4(row + highs + 4 * block),
                load_stream4(row + scales + 4 * block)};
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const f32 scale = f16_to_f32(u16(raw.factors));
        const f32 minimum = f16_to_f32(u16(raw.factors >> 16));
        fifth_bit_floats(raw.codes, raw.high, chunk % 4, out);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = mul(scale, out[i]) + minimum;
    }
};

// codes 0-15 of each block [n_blocks][16]; codes 16-31 [n_blocks][16]; scales f16 [n_blocks].
struct Q8_0 : BlockType<Q8_0> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = false;
    struct Raw {
        Quad low, high;
        u16 scale;
    };
    i64 highs, scales;

    QI_DEVICE explicit Q8_0(int n_cols) : highs(round16(i64(n_cols) / 2)), scales(2 * highs) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)), load_stream16(row + highs + 16 * i64(block)),
                load_stream2(row + scales + 2 * block)};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            out[q] = raw.low.v[q];
            out[4 + q] = raw.high.v[q];
        }
    }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int) {
        return {{f16_to_f32(raw.scale)}, {0.0f}};
    }
    struct Raw8 {
        u32 low, high;
        u16 scale;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return {load_stream4(row + 4 * i64(chunk)), load_stream4(row + highs + 4 * i64(chunk)),
                load_stream2(row + scales + 2 * (chunk / 4))};
    }
    QI_DEVICE static void values8(const Raw8& raw, int, f32 (&out)[8]) {
        const f32 scale = f16_to_f32(raw.scale);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[i] = scale * f32(i8(raw.low >> 8 * i));
            out[4 + i] = scale * f32(i8(raw.high >> 8 * i));
        }
    }
};

// two bits of each code [n_blocks][8]; scale and minimum of 4 bits of each half [n_blocks][2]; d
// and dmin f16 [n_blocks/8][2].
struct Q2_K : BlockType<Q2_K> {
    static constexpr int parts = 2;
    static constexpr bool has_shift = true;
    struct Raw {
        Pair codes;
        u16 halves;
        u32 factors;
    };
    i64 halves, supers;

    QI_DEVICE explicit Q2_K(int n_cols)
        : halves(round16(i64(n_cols) / 4)), supers(halves + round16(i64(n_cols) / 16)) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream8(row + 8 * i64(block)), load_stream2(row + halves + 2 * block),
                load_stream4(row + supers + 4 * (block / 8))};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
#pragma unroll
        for (int q = 0; q < 8; ++q)
            out[q] = two_bits(raw.codes.v[q / 4], q % 4);
    }
    QI_DEVICE static Factors<2> factors(const Raw& raw, int) {
        const f32 d = f16_to_f32(u16(raw.factors)), dmin = f16_to_f32(u16(raw.factors >> 16));
        return {{d * f32(raw.halves & 15u), d * f32(raw.halves >> 8 & 15u)},
                {-dmin * f32(raw.halves >> 4 & 15u), -dmin * f32(raw.halves >> 12)}};
    }
    using Raw8 = Raw;
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return load(row, chunk / 4);
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const int q = chunk % 4;
        const Factors<2> f = factors(raw, chunk / 4);
        code_floats(two_bits(raw.codes.v[0], q), out, 0);
        code_floats(two_bits(raw.codes.v[1], q), out, 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = mul(f.scale[i / 4], out[i]) + f.shift[i / 4];
    }
};

// two bits of each code [n_blocks][8]; third bits [n_blocks][4]; scales of halves: low four bits
// [n_blocks], first half in the low nibble; two high bits of both halves, a nibble per block
// [n_blocks/8][4]; d f16 [n_blocks/8].
struct Q3_K : BlockType<Q3_K> {
    static constexpr int parts = 2;
    static constexpr bool has_shift = true;
    struct Raw {
        Pair codes;
        u32 high;
        u32 scale_highs;
        u16 scale_lows;
        u16 d;
    };
    i64 highs, scale_lows, scale_highs, supers;

    QI_DEVICE explicit Q3_K(int n_cols)
        : highs(round16(i64(n_cols) / 4)),
          scale_lows(highs + round16(i64(n_cols) / 8)),
          scale_highs(scale_lows + round16(i64(n_cols) / 32)),
          supers(scale_highs + round16(i64(n_cols) / 64)) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream8(row + 8 * i64(block)), load_stream4(row + highs + 4 * block),
                load_stream4(row + scale_highs + 4 * (block / 8)),
                load_stream1(row + scale_lows + block),
                load_stream2(row + supers + 2 * (block / 8))};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
#pragma unroll
        for (int q = 0; q < 8; ++q)
            out[q] = two_bits(raw.codes.v[q / 4], q % 4) | one_bit(raw.high, q) << 2;
    }
    QI_DEVICE static Factors<2> factors(const Raw& raw, int block) {
        const f32 d = f16_to_f32(raw.d);
        const u32 high = raw.scale_highs >> 4 * (block % 8);
        const f32 first = d * f32(i32((raw.scale_lows & 15u) | (high & 3u) << 4) - 32);
        const f32 second = d * f32(i32(raw.scale_lows >> 4 | (high >> 2 & 3u) << 4) - 32);
        return {{first, second}, {-4.0f * first, -4.0f * second}};
    }
    using Raw8 = Raw;
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return load(row, chunk / 4);
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const int q = chunk % 4;
        const Factors<2> f = factors(raw, chunk / 4);
        code_floats(two_bits(raw.codes.v[0], q) | one_bit(raw.high, q) << 2, out, 0);
        code_floats(two_bits(raw.codes.v[1], q) | one_bit(raw.high, 4 + q) << 2, out, 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = f.scale[i / 4] * (out[i] - 4.0f);
    }
};

// Scale and minimum of one of the eight blocks that share 16 bytes: d, dmin, and 6 bits each packed
// as in the file.
QI_DEVICE Factors<1> scale_min_of(const Quad& packed, int block) {
    const f32 d = f16_to_f32(u16(packed.v[0])), dmin = f16_to_f32(u16(packed.v[0] >> 16));
    // The first four have their low bits below their high ones; selected, not branched for.
    const bool first = block % 8 < 4;
    const int shift = 8 * (block % 4), high_bits = first ? 4 : 6;
    const u32 scale_byte = packed.v[1] >> shift, minimum_byte = packed.v[2] >> shift;
    const u32 lows = packed.v[3] >> shift;
    const u32 scale = ((first ? scale_byte : lows) & 15u) | (scale_byte >> high_bits & 3u) << 4;
    const u32 minimum =
        ((first ? minimum_byte : lows >> 4) & 15u) | (minimum_byte >> high_bits & 3u) << 4;
    return {{d * f32(scale)}, {-dmin * f32(minimum)}};
}

// codes [n_blocks][16]; d, dmin and packed scales [n_blocks/8][16].
struct Q4_K : BlockType<Q4_K> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes, factors;
    };
    i64 supers;

    QI_DEVICE explicit Q4_K(int n_cols) : supers(i64(n_cols) / 2) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)),
                load_stream16(row + supers + 16 * (block / 8))};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) { unpack_nibbles(raw.codes, out); }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int block) {
        return scale_min_of(raw.factors, block);
    }
    struct Raw8 {
        u32 codes;
        Quad factors;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return {load_stream4(row + 4 * i64(chunk)),
                load_stream16(row + supers + 16 * (chunk / 32))};
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const Factors<1> f = scale_min_of(raw.factors, chunk / 4);
        code_floats(raw.codes & 0x0f0f0f0fu, out, 0);
        code_floats(raw.codes >> 4 & 0x0f0f0f0fu, out, 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = mul(f.scale[0], out[i]) + f.shift[0];
    }
};

// codes [n_blocks][16]; fifth bits [n_blocks][4]; d, dmin and packed scales [n_blocks/8][16].
struct Q5_K : BlockType<Q5_K> {
    static constexpr int parts = 1;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes, factors;
        u32 high;
    };
    i64 highs, supers;

    QI_DEVICE explicit Q5_K(int n_cols) : highs(i64(n_cols) / 2), supers(highs + i64(n_cols) / 8) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)),
                load_stream16(row + supers + 16 * (block / 8)),
                load_stream4(row + highs + 4 * block)};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
        unpack_nibbles(raw.codes, out);
#pragma unroll
        for (int q = 0; q < 8; ++q)
            out[q] |= one_bit(raw.high, q) << 4;
    }
    QI_DEVICE static Factors<1> factors(const Raw& raw, int block) {
        return scale_min_of(raw.factors, block);
    }
    struct Raw8 {
        u32 codes, high;
        Quad factors;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return {load_stream4(row + 4 * i64(chunk)), load_stream4(row + highs + 4 * (chunk / 4)),
                load_stream16(row + supers + 16 * (chunk / 32))};
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const Factors<1> f = scale_min_of(raw.factors, chunk / 4);
        fifth_bit_floats(raw.codes, raw.high, chunk % 4, out);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = mul(f.scale[0], out[i]) + f.shift[0];
    }
};

// low four bits [n_blocks][16]; two high bits [n_blocks][8]; scales int8 of halves [n_blocks][2]; d
// f16 [n_blocks/8].
struct Q6_K : BlockType<Q6_K> {
    static constexpr int parts = 2;
    static constexpr bool has_shift = true;
    struct Raw {
        Quad codes;
        Pair highs;
        u16 halves;
        u16 d;
    };
    i64 highs, halves, supers;

    QI_DEVICE explicit Q6_K(int n_cols)
        : highs(i64(n_cols) / 2),
          halves(highs + i64(n_cols) / 4),
          supers(halves + i64(n_cols) / 16) {}
    QI_DEVICE Raw load(const u8* row, int block) const {
        return {load_stream16(row + 16 * i64(block)), load_stream8(row + highs + 8 * i64(block)),
                load_stream2(row + halves + 2 * block),
                load_stream2(row + supers + 2 * (block / 8))};
    }
    QI_DEVICE static void codes(const Raw& raw, u32 (&out)[8]) {
        unpack_nibbles(raw.codes, out);
#pragma unroll
        for (int q = 0; q < 8; ++q)
            out[q] |= two_bits(raw.highs.v[q / 4], q % 4) << 4;
    }
    QI_DEVICE static Factors<2> factors(const Raw& raw, int) {
        return factors(raw.halves, raw.d);
    }
    struct Raw8 {
        u32 codes;
        Pair highs;
        u16 halves, d;
    };
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        const int block = chunk / 4;
        return {load_stream4(row + 4 * i64(chunk)), load_stream8(row + highs + 8 * i64(block)),
                load_stream2(row + halves + 2 * block),
                load_stream2(row + supers + 2 * (block / 8))};
    }
    QI_DEVICE static void values8(const Raw8& raw, int chunk, f32 (&out)[8]) {
        const int q = chunk % 4;
        const Factors<2> f = factors(raw.halves, raw.d);
        code_floats((raw.codes & 0x0f0f0f0fu) | two_bits(raw.highs.v[0], q) << 4, out, 0);
        code_floats((raw.codes >> 4 & 0x0f0f0f0fu) | two_bits(raw.highs.v[1], q) << 4, out, 4);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = f.scale[i / 4] * (out[i] - 32.0f);
    }

  private:
    QI_DEVICE static Factors<2> factors(u16 halves, u16 half_d) {
        const f32 d = f16_to_f32(half_d);
        const f32 first = d * f32(i8(halves)), second = d * f32(i8(halves >> 8));
        return {{first, second}, {-32.0f * first, -32.0f * second}};
    }
};

// ---- floats: one plane, rows padded with zeros to 16 bytes ----

template <class Type>
struct FloatType : WeightType<Type> {
    static constexpr bool is_float = true;
    static constexpr int second_part = 4;
    QI_DEVICE static int first_column(int chunk) { return 8 * chunk; }
};

// Two 16-bit values per word.
template <class Type>
struct HalfType : FloatType<Type> {
    static constexpr int chunk_cols = 8;  // of 16 bytes
    using Raw = Quad;

    QI_DEVICE explicit HalfType(int) {}
    QI_DEVICE Raw load(const u8* row, int chunk) const {
        return load_stream16(row + 16 * i64(chunk));
    }
    QI_DEVICE static void values(const Raw& raw, f32 (&out)[chunk_cols]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = Type::widen(u16(raw.v[i]));
            out[2 * i + 1] = Type::widen(u16(raw.v[i] >> 16));
        }
    }
    using Raw8 = Raw;
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        return load(row, chunk);
    }
    QI_DEVICE static void values8(const Raw8& raw, int, f32 (&out)[8]) {
        values(raw, out);
    }
};

struct F16 : HalfType<F16> {
    using HalfType<F16>::HalfType;
    QI_DEVICE static f32 widen(u16 h) { return f16_to_f32(h); }
};
struct BF16 : HalfType<BF16> {
    using HalfType<BF16>::HalfType;
    QI_DEVICE static f32 widen(u16 b) { return bf16_to_f32(b); }
};

struct F32 : FloatType<F32> {
    static constexpr int chunk_cols = 4;
    using Raw = Quad;
    int n_cols;

    QI_DEVICE explicit F32(int n) : n_cols(n) {}
    QI_DEVICE Raw load(const u8* row, int chunk) const {
        return load_stream16(row + 16 * i64(chunk));
    }
    QI_DEVICE static void values(const Raw& raw, f32 (&out)[chunk_cols]) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            out[i] = __uint_as_float(raw.v[i]);
    }
    struct Raw8 {
        Quad low, high;
        bool has_high;
    };
    // The second four may lie beyond the padding: then the first stand in for them.
    QI_DEVICE Raw8 load8(const u8* row, int chunk) const {
        const u8* at = row + 32 * i64(chunk);
        const bool has_high = 8 * chunk + 4 < n_cols;
        return {load_stream16(at), load_stream16(has_high ? at + 16 : at), has_high};
    }
    QI_DEVICE static void values8(const Raw8& raw, int, f32 (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[i] = __uint_as_float(raw.low.v[i]);
            out[4 + i] = raw.has_high ? __uint_as_float(raw.high.v[i]) : 0.0f;
        }
    }
};
