// Tensor-core products of small tiles by one warp, in registers: D += A · B with A of 16 rows, B of
// 8 columns.
//
// Fragments as PTX defines them for mma.m16n8k*, with g = lane / 4 and i = lane % 4: a word of A
// holds the neighbouring columns of one row, a word of B the neighbouring rows of one column, and
// D's four values are (g, 2i), (g, 2i + 1), (g + 8, 2i), (g + 8, 2i + 1). QI_PLAIN computes the
// same from the same fragments by shuffles, so what surrounds a product is tested without tensor
// cores. sm_75 has smaller shapes, which these are put together from.
#pragma once

#include "prelude.cuh"

#ifndef QI_PLAIN
#if __CUDA_ARCH__ >= 800
#define QI_MMA_AMPERE 1
#endif
#endif

#ifdef QI_PLAIN
// The dot product of a word of A with a word of B.
QI_DEVICE i32 word_product(u32 a, u32 b, i32 sum) {
    return __dp4a(i32(a), i32(b), sum);
}
QI_DEVICE f32 word_product(u32 a, u32 b, f32 sum) {
    sum = fmaf(f16_to_f32(u16(a)), f16_to_f32(u16(b)), sum);
    return fmaf(f16_to_f32(u16(a >> 16)), f16_to_f32(u16(b >> 16)), sum);
}

// Adds the four words of K that the lanes of a quad hold; low and high are rows g and g + 8.
// Called, not inlined: hundreds of copies would take minutes to compile.
template <class Sum>
__device__ __noinline__ void mma_by_shuffles(Sum (&d)[4], u32 a_low, u32 a_high, u32 b) {
    const int g = lane_id() / 4, i = lane_id() % 4;
    for (int k = 0; k < 4; ++k) {
        const u32 low = __shfl_sync(QI_WARP_MASK, a_low, 4 * g + k);
        const u32 high = __shfl_sync(QI_WARP_MASK, a_high, 4 * g + k);
        const u32 first = __shfl_sync(QI_WARP_MASK, b, 4 * (2 * i) + k);
        const u32 second = __shfl_sync(QI_WARP_MASK, b, 4 * (2 * i + 1) + k);
        d[0] = word_product(low, first, d[0]);
        d[1] = word_product(low, second, d[1]);
        d[2] = word_product(high, first, d[2]);
        d[3] = word_product(high, second, d[3]);
    }
}
#endif

// Signed bytes, K = 16: a[0] row g, a[1] row g + 8, columns 4i to 4i + 3; b likewise of column g.
QI_DEVICE void mma_s8_k16(i32 (&d)[4], u32 a0, u32 a1, u32 b) {
#ifdef QI_PLAIN
    mma_by_shuffles(d, a0, a1, b);
#elif defined(QI_MMA_AMPERE)
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d[0]), "+r"(d[1])
        : "r"(a0), "r"(b));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(d[2]), "+r"(d[3])
        : "r"(a1), "r"(b));
#endif
}

// K = 32: words 0 and 1 of A rows g and g + 8 of the first 16 columns, words 2 and 3 of the others.
QI_DEVICE void mma_s8_k32(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef QI_MMA_AMPERE
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    mma_s8_k16(d, a[0], a[1], b0);
    mma_s8_k16(d, a[2], a[3], b1);
#endif
}

// f16 with float sums, K = 16: words 0 and 1 of A rows g and g + 8 of columns 2i and 2i + 1, words
// 2 and 3 of columns 2i + 8 and 2i + 9; b0 and b1 likewise of column g.
QI_DEVICE void mma_f16_k16(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef QI_PLAIN
    mma_by_shuffles(d, a[0], a[1], b0);
    mma_by_shuffles(d, a[2], a[3], b1);
#elif defined(QI_MMA_AMPERE)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// B fragments out of rows of halves: 16 rows of K by 16 columns from `tile` on, rows `stride`
// halves apart. b[0] and b[1] are the words of the first 8 columns, b[2] and b[3] of the others.
// Rows begin at multiples of 16 bytes in shared memory.
QI_DEVICE void load_f16_k16(u32 (&b)[4], const u16* tile, int stride) {
#ifdef QI_PLAIN
    const int g = lane_id() / 4, i = lane_id() % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u16* at = tile + (j % 2 * 8 + 2 * i) * stride + j / 2 * 8 + g;
        b[j] = u32(at[0]) | u32(at[stride]) << 16;
    }
#else
    // Lane l points at row l % 8 of matrix l / 8; transposed, so that neighbouring rows share
    // words.
    const int matrix = lane_id() / 8, row = lane_id() % 8;
    const u16* at = tile + (matrix % 2 * 8 + row) * stride + matrix / 2 * 8;
    const u32 address = u32(__cvta_generic_to_shared(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
#endif
}

// An A fragment out of rows of halves: 16 rows by 16 columns of K from `tile` on, rows `stride`
// words apart. Rows begin at multiples of 16 bytes in shared memory. Loaded anew wherever it is
// called, so that the compiler does not spend registers on keeping it.
QI_DEVICE void load_f16_rows(u32 (&a)[4], const u32* tile, int stride) {
#ifdef QI_PLAIN
    const int g = lane_id() / 4, i = lane_id() % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        a[j] = tile[(g + j % 2 * 8) * stride + i + j / 2 * 4];
#else
    // Lane l points at row l % 8 of matrix l / 8.
    const int matrix = lane_id() / 8, row = lane_id() % 8;
    const u32* at = tile + (matrix % 2 * 8 + row) * stride + matrix / 2 * 4;
    const u32 address = u32(__cvta_generic_to_shared(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
#endif
}

// Two floats as words of halves: the nearest ones, and what they leave, so that high + low has 22
// bits.
struct SplitPair {
    u32 high, low;

    QI_DEVICE SplitPair(f32 x, f32 y) {
        const u16 hx = f32_to_f16(x), hy = f32_to_f16(y);
        high = u32(hx) | u32(hy) << 16;
        low = u32(f32_to_f16(x - f16_to_f32(hx))) | u32(f32_to_f16(y - f16_to_f32(hy))) << 16;
    }
};
