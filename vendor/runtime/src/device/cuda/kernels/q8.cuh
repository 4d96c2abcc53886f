// Activations quantised by 32s, x ≈ scale · code, as the CPU's kernels quantise them.
//
// Either four neighbouring values per thread and eight neighbouring threads per block of 32
// (store_q8), or a value per lane and a block per warp (store_q8_lane).
#pragma once

#include "prelude.cuh"

// Where quantised rows of one width go; codes == nullptr: nowhere.
struct Q8Rows {
    i8* codes;    // [n_tokens][width]
    f32* scales;  // [n_tokens][width/32]
    f32* sums;    // [n_tokens][width/16], scale · Σ codes of each half block
    int width;    // n_cols rounded up to a multiple of 32
};

// The factors of a block whose largest magnitude has these bits.
struct Q8Scale {
    f32 scale, inverse;
    bool usable;

    QI_DEVICE explicit Q8Scale(u32 largest) {
        const f32 max = __uint_as_float(largest);
        const bool finite = largest < 0x7f800000u;
        usable = finite && max >= 7.888609052210118e-31f;  // 2^-100: a reciprocal exists
        scale = usable ? max / 127.0f : finite ? 0.0f : not_a_number();
        inverse = usable ? 127.0f / max : 0.0f;
    }
    QI_DEVICE u32 code(f32 x) const {
        // Adding 1.5 · 2^23 lines units up with float's last bit and rounds to nearest even.
        return usable ? __float_as_uint(mul(x, inverse) + 12582912.0f) & 0xffu : 0u;
    }
};

// Columns [4·quad, 4·quad + 4) of a token, zeros beyond the row. All lanes of a warp call together.
QI_DEVICE void store_q8(const Q8Rows& out, i64 token, int quad, const f32 (&x)[4]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
        const u32 other = __shfl_xor_sync(QI_WARP_MASK, largest, step);
        largest = other > largest ? other : largest;
    }
    const Q8Scale factors(largest);
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        word |= factors.code(x[i]) << (8 * i);
    i32 sum = __dp4a(i32(word), 0x01010101, 0);
    sum += __shfl_xor_sync(QI_WARP_MASK, sum, 1);
    sum += __shfl_xor_sync(QI_WARP_MASK, sum, 2);
    if (4 * quad >= out.width) return;
    *reinterpret_cast<u32*>(out.codes + token * out.width + 4 * quad) = word;
    if (quad % 4 == 0) out.sums[token * (out.width / 16) + quad / 4] = mul(factors.scale, f32(sum));
    if (quad % 8 == 0) out.scales[token * (out.width / 32) + quad / 8] = factors.scale;
}

// The column of each lane, a warp's columns being a block of 32. All lanes call together.
QI_DEVICE void store_q8_lane(const Q8Rows& out, i64 token, int column, f32 x) {
    u32 largest = __float_as_uint(x) & 0x7fffffffu;
#pragma unroll
    for (int step = 1; step < warp_size; step *= 2) {
        const u32 other = __shfl_xor_sync(QI_WARP_MASK, largest, step);
        largest = other > largest ? other : largest;
    }
    const Q8Scale factors(largest);
    const i8 code = i8(factors.code(x));
    i32 sum = code;
#pragma unroll
    for (int step = 1; step < 16; step *= 2)
        sum += __shfl_xor_sync(QI_WARP_MASK, sum, step);
    out.codes[token * out.width + column] = code;
    if (column % 16 == 0)
        out.sums[token * (out.width / 16) + column / 16] = mul(factors.scale, f32(sum));
    if (column % 32 == 0) out.scales[token * (out.width / 32) + column / 32] = factors.scale;
}

// Four floats from column 4·quad on of a row of n, zeros beyond its end.
QI_DEVICE void load_quad(const f32* row, int quad, int n, bool aligned, f32 (&x)[4]) {
    if (aligned && 4 * quad + 4 <= n) {
        const Float4 four = reinterpret_cast<const Float4*>(row)[quad];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[i] = four.v[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        x[i] = 4 * quad + i < n ? row[4 * quad + i] : 0.0f;
}
QI_DEVICE void store_quad(f32* row, int quad, int n, bool aligned, const f32 (&x)[4]) {
    if (aligned && 4 * quad + 4 <= n) {
        reinterpret_cast<Float4*>(row)[quad] = {{x[0], x[1], x[2], x[3]}};
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (4 * quad + i < n) row[4 * quad + i] = x[i];
}
