// What every kernel uses: short type names, half and bfloat16, wide loads, reductions in a fixed
// order.
//
// QI_PLAIN leaves out all inline PTX: the same source then compiles as plain C++ with the built-in
// functions of a CUDA compiler. Products and sums that must round separately go through mul();
// those that must round once are written fmaf().
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef float f32;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "sizes of integers");

#define QI_DEVICE __device__ __forceinline__
#define QI_WARP_MASK 0xffffffffu
// The names of kernels are looked up as they stand here.
#define QI_KERNEL extern "C" __global__ void

constexpr int warp_size = 32;
constexpr f32 largest_float = 3.402823466e+38f;

// 16 bytes that are loaded at once, 4 or 8 of them likewise.
struct alignas(16) Quad {
    u32 v[4];
};
struct alignas(8) Pair {
    u32 v[2];
};
struct alignas(16) Float4 {
    f32 v[4];
};

// NeuronRule's numbers: which neurons a token uses.
enum Rule { rule_all, rule_exact, rule_predict };

QI_DEVICE int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
QI_DEVICE i64 round16(i64 n) {
    return (n + 15) / 16 * 16;
}
QI_DEVICE int min_of(int a, int b) {
    return a < b ? a : b;
}
QI_DEVICE int max_of(int a, int b) {
    return a > b ? a : b;
}
QI_DEVICE int lane_id() {
    return int(threadIdx.x) % warp_size;
}
QI_DEVICE int warp_id() {
    return int(threadIdx.x) / warp_size;
}

// ---- numbers ----

QI_DEVICE f32 infinity() {
    return __uint_as_float(0x7f800000u);
}
QI_DEVICE f32 not_a_number() {
    return __uint_as_float(0x7fc00000u);
}

// a · b, rounded, whatever is added to it.
QI_DEVICE f32 mul(f32 a, f32 b) {
#ifndef QI_PLAIN
    f32 product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
#else
    return a * b;
#endif
}

QI_DEVICE f32 f16_to_f32(u16 h) {
#ifndef QI_PLAIN
    f32 value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
    return value;
#else
    const u32 sign = u32(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x0400u) return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
    // Subnormal: magnitude · 2^-24
    return __uint_as_float(sign | __float_as_uint(f32(magnitude) * 5.9604644775390625e-8f));
#endif
}

// Rounds to nearest even; overflow gives infinity.
QI_DEVICE u16 f32_to_f16(f32 value) {
#ifndef QI_PLAIN
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value));
    return h;
#else
    const u32 bits = __float_as_uint(value);
    const u16 sign = u16((bits >> 16) & 0x8000u);
    const u32 magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return u16(sign | 0x7fffu);
    if (magnitude >= 0x477ff000u) return u16(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 lines its last bit up with float's.
        const f32 shifted = __uint_as_float(magnitude) + 0.5f;
        return u16(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    return u16(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
#endif
}

QI_DEVICE f32 bf16_to_f32(u16 b) {
    return __uint_as_float(u32(b) << 16);
}

QI_DEVICE u16 f32_to_bf16(f32 value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return u16((bits >> 16) | 0x40u);
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The power of two that brings the largest of some magnitudes to about 2^13, so that their halves
// neither overflow nor lose their low parts.
QI_DEVICE f32 power_for(f32 largest) {
    const int exponent = int(__float_as_uint(largest) >> 23 & 255u);
    const int wanted = 127 + 13 - exponent + 127;
    return __uint_as_float(u32(min_of(max_of(wanted, 1), 253)) << 23);
}

// ---- memory ----

// Weights, read once by a step: past L1, where activations stay. Relaxed and volatile, because such
// loads stay where they are written. ptxas moves plain ones behind the branch before their first
// use, and then one block's loads at a time are on the way.
QI_DEVICE Quad load_stream16(const void* at) {
#ifndef QI_PLAIN
    Quad q;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.v[0]), "=r"(q.v[1]), "=r"(q.v[2]), "=r"(q.v[3])
                 : "l"(at));
    return q;
#else
    return *static_cast<const Quad*>(at);
#endif
}
QI_DEVICE Pair load_stream8(const void* at) {
#ifndef QI_PLAIN
    Pair p;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(p.v[0]), "=r"(p.v[1])
                 : "l"(at));
    return p;
#else
    return *static_cast<const Pair*>(at);
#endif
}
QI_DEVICE u32 load_stream4(const void* at) {
#ifndef QI_PLAIN
    u32 word;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.L2::128B.u32 %0, [%1];"
                 : "=r"(word)
                 : "l"(at));
    return word;
#else
    return *static_cast<const u32*>(at);
#endif
}
QI_DEVICE u16 load_stream2(const void* at) {
#ifndef QI_PLAIN
    u16 half;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.L2::128B.u16 %0, [%1];"
                 : "=h"(half)
                 : "l"(at));
    return half;
#else
    return *static_cast<const u16*>(at);
#endif
}
QI_DEVICE u8 load_stream1(const void* at) {
#ifndef QI_PLAIN
    u16 byte;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.L2::128B.u8 %0, [%1];"
                 : "=h"(byte)
                 : "l"(at));
    return u8(byte);
#else
    return *static_cast<const u8*>(at);
#endif
}

// ---- reductions, in an order that depends on nothing ----

QI_DEVICE f32 warp_sum(f32 value) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2)
        value += __shfl_xor_sync(QI_WARP_MASK, value, step);
    return value;
}
QI_DEVICE f32 warp_max(f32 value) {
#pragma unroll
    for (int step = warp_size / 2; step > 0; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(QI_WARP_MASK, value, step));
    return value;
}

// Over all threads of a block, a multiple of 32 of them; every thread gets the result. room: one
// float per warp, free again when the call returns.
template <class Combine>
QI_DEVICE f32 block_combine(f32 of_warp, f32* room, Combine combine) {
    if (lane_id() == 0) room[warp_id()] = of_warp;
    __syncthreads();
    f32 total = room[0];
    for (int i = 1; i < int(blockDim.x) / warp_size; ++i)
        total = combine(total, room[i]);
    __syncthreads();
    return total;
}
QI_DEVICE f32 block_sum(f32 value, f32* room) {
    return block_combine(warp_sum(value), room, [](f32 a, f32 b) { return a + b; });
}
QI_DEVICE f32 block_max(f32 value, f32* room) {
    return block_combine(warp_max(value), room, [](f32 a, f32 b) { return fmaxf(a, b); });
}

// True in every thread of the block that is the last of `n_blocks` to come here; all that the
// others wrote before is then visible to it. The ticket starts at zero and is left at zero.
QI_DEVICE bool last_block(u32* ticket, u32 n_blocks) {
    __shared__ u32 is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(ticket, 1u) == n_blocks - 1;
        if (is_last) *ticket = 0;
    }
    __syncthreads();
    if (is_last) __threadfence();
    return is_last != 0;
}
