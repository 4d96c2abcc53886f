// What NVRTC knows without being told, for kernels that the host compiler builds: put in front of
// every program. It includes no header of the system, so that a kernel cannot lean on one either.
#pragma once

#include "abi.h"

#ifndef QI_PLAIN
#define QI_PLAIN 1
#endif
#define QI_STANDIN 1
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1

// ---- words of the language ----
#define __global__
#define __device__
#define __host__
#define __constant__ static
// In a function, thread_local means static thread_local. A block runs on one thread of the GPU
// process, so what is shared by a block is local to that thread.
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))  // CUDA allows it after __shared__

using size_t = decltype(sizeof 0);
using ptrdiff_t = decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr));

// ---- vector types ----
#define QI_VECTOR_TYPES(T, name, align2, align4)        \
    struct name##1 {                                    \
        T x;                                            \
    };                                                  \
    struct __align__(align2) name##2 {                  \
        T x, y;                                         \
    };                                                  \
    struct name##3 {                                    \
        T x, y, z;                                      \
    };                                                  \
    struct __align__(align4) name##4 {                  \
        T x, y, z, w;                                   \
    };                                                  \
    inline name##1 make_##name##1(T x) {                \
        return {x};                                     \
    }                                                   \
    inline name##2 make_##name##2(T x, T y) {           \
        return {x, y};                                  \
    }                                                   \
    inline name##3 make_##name##3(T x, T y, T z) {      \
        return {x, y, z};                               \
    }                                                   \
    inline name##4 make_##name##4(T x, T y, T z, T w) { \
        return {x, y, z, w};                            \
    }
QI_VECTOR_TYPES(signed char, char, 2, 4)
QI_VECTOR_TYPES(unsigned char, uchar, 2, 4)
QI_VECTOR_TYPES(short, short, 4, 8)
QI_VECTOR_TYPES(unsigned short, ushort, 4, 8)
QI_VECTOR_TYPES(int, int, 8, 16)
QI_VECTOR_TYPES(unsigned, uint, 8, 16)
QI_VECTOR_TYPES(long long, longlong, 16, 16)
QI_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
QI_VECTOR_TYPES(float, float, 8, 16)
QI_VECTOR_TYPES(double, double, 16, 16)
#undef QI_VECTOR_TYPES

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// ---- who am I ----
// The lane is read anew each time: after a rendezvous it must be this thread's again.
#define threadIdx (qi_standin_lane->thread)
#define blockIdx (qi_standin_lane->block)
#define blockDim (qi_standin_lane->block_dim)
#define gridDim (qi_standin_lane->grid_dim)
#define warpSize 32

// ---- rendezvous ----
#define __syncthreads() qi_standin_barrier()
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    qi_standin_collective(qi_syncwarp, mask, 0, 0, 32);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return static_cast<unsigned>(qi_standin_collective(qi_ballot, mask, predicate != 0, 0, 32));
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}

namespace qi_standin {
template <class T>
inline T shuffle(int op, unsigned mask, T value, int source, int width) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = qi_standin_collective(op, mask, bits, source, width);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace qi_standin
#define QI_SHUFFLE(T)                                                                      \
    inline T __shfl_sync(unsigned mask, T v, int source, int width = 32) {                 \
        return qi_standin::shuffle(qi_shfl_idx, mask, v, source, width);                   \
    }                                                                                      \
    inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {          \
        return qi_standin::shuffle(qi_shfl_up, mask, v, static_cast<int>(delta), width);   \
    }                                                                                      \
    inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {        \
        return qi_standin::shuffle(qi_shfl_down, mask, v, static_cast<int>(delta), width); \
    }                                                                                      \
    inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {              \
        return qi_standin::shuffle(qi_shfl_xor, mask, v, lanes, width);                    \
    }
QI_SHUFFLE(int)
QI_SHUFFLE(unsigned)
QI_SHUFFLE(long)
QI_SHUFFLE(unsigned long)
QI_SHUFFLE(long long)
QI_SHUFFLE(unsigned long long)
QI_SHUFFLE(float)
QI_SHUFFLE(double)
#undef QI_SHUFFLE

// ---- memory ----
inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_block() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_system() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcg(const T* p) {
    return *p;
}
template <class T>
inline T __ldcs(const T* p) {
    return *p;
}

#define QI_ATOMICS(T)                                                                            \
    inline T atomicAdd(T* p, T v) {                                                              \
        return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);                                       \
    }                                                                                            \
    inline T atomicExch(T* p, T v) {                                                             \
        return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);                                      \
    }                                                                                            \
    inline T atomicAnd(T* p, T v) {                                                              \
        return __atomic_fetch_and(p, v, __ATOMIC_RELAXED);                                       \
    }                                                                                            \
    inline T atomicOr(T* p, T v) {                                                               \
        return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);                                        \
    }                                                                                            \
    inline T atomicXor(T* p, T v) {                                                              \
        return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED);                                       \
    }                                                                                            \
    inline T atomicCAS(T* p, T expected, T v) {                                                  \
        __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
        return expected;                                                                         \
    }                                                                                            \
    inline T atomicMax(T* p, T v) {                                                              \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                            \
        while (old < v && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED,      \
                                                       __ATOMIC_RELAXED)) {                      \
        }                                                                                        \
        return old;                                                                              \
    }                                                                                            \
    inline T atomicMin(T* p, T v) {                                                              \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                            \
        while (v < old && !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED,      \
                                                       __ATOMIC_RELAXED)) {                      \
        }                                                                                        \
        return old;                                                                              \
    }
QI_ATOMICS(int)
QI_ATOMICS(unsigned)
QI_ATOMICS(unsigned long long)
#undef QI_ATOMICS
inline int atomicSub(int* p, int v) {
    return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED);
}
inline unsigned atomicSub(unsigned* p, unsigned v) {
    return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

// ---- bits ----
inline int __popc(unsigned v) {
    return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v) {
    return __builtin_popcountll(v);
}
inline int __ffs(int v) {
    return __builtin_ffs(v);
}
inline int __ffsll(long long v) {
    return __builtin_ffsll(v);
}
inline int __clz(int v) {
    return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v));
}
inline int __clzll(long long v) {
    return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++)
        r |= (v >> i & 1u) << (31 - i);
    return r;
}
inline int __dp4a(int a, int b, int c) {
    unsigned sum = static_cast<unsigned>(c);
    for (int i = 0; i < 4; i++) {
        const int x = static_cast<signed char>(static_cast<unsigned>(a) >> 8 * i);
        const int y = static_cast<signed char>(static_cast<unsigned>(b) >> 8 * i);
        sum += static_cast<unsigned>(x * y);
    }
    return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; i++)
        c += (a >> 8 * i & 0xffu) * (b >> 8 * i & 0xffu);
    return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned s = selector >> 4 * i & 0xfu;
        unsigned byte = static_cast<unsigned>(bytes >> 8 * (s & 7u)) & 0xffu;
        if (s & 8u) byte = byte & 0x80u ? 0xffu : 0u;
        r |= byte << 8 * i;
    }
    return r;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >>
                                 (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(
        (static_cast<unsigned long long>(high) << 32 | low) << (shift & 31u) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
#define QI_REINTERPRET(name, From, To)      \
    inline To name(From v) {                \
        To r;                               \
        __builtin_memcpy(&r, &v, sizeof r); \
        return r;                           \
    }
QI_REINTERPRET(__float_as_uint, float, unsigned)
QI_REINTERPRET(__float_as_int, float, int)
QI_REINTERPRET(__uint_as_float, unsigned, float)
QI_REINTERPRET(__int_as_float, int, float)
QI_REINTERPRET(__double_as_longlong, double, long long)
QI_REINTERPRET(__longlong_as_double, long long, double)
#undef QI_REINTERPRET

// ---- arithmetic ----
extern "C" {
float expf(float) noexcept;
float exp2f(float) noexcept;
float expm1f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float powf(float, float) noexcept;
float sqrtf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float erff(float) noexcept;
float tanhf(float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float truncf(float) noexcept;
float copysignf(float, float) noexcept;
float ldexpf(float, int) noexcept;
int abs(int) noexcept;
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
int printf(const char*, ...);
}
// The C library may have one too; this one is the kernel's.
#define rsqrtf qi_standin_rsqrtf
inline float qi_standin_rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}
inline bool isnan(float x) {
    return __builtin_isnan(x);
}
inline bool isinf(float x) {
    return __builtin_isinf(x);
}
inline bool isfinite(float x) {
    return __builtin_isfinite(x);
}
inline int min(int a, int b) {
    return b < a ? b : a;
}
inline int max(int a, int b) {
    return a < b ? b : a;
}
inline unsigned min(unsigned a, unsigned b) {
    return b < a ? b : a;
}
inline unsigned max(unsigned a, unsigned b) {
    return a < b ? b : a;
}
inline long long min(long long a, long long b) {
    return b < a ? b : a;
}
inline long long max(long long a, long long b) {
    return a < b ? b : a;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
    return b < a ? b : a;
}
inline unsigned long long max(unsigned long long a, unsigned long long b) {
    return a < b ? b : a;
}
inline float min(float a, float b) {
    return fminf(a, b);
}
inline float max(float a, float b) {
    return fmaxf(a, b);
}
inline float __expf(float x) {
    return expf(x);
}
inline float __logf(float x) {
    return logf(x);
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fsub_rn(float a, float b) {
    return a - b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fsqrt_rn(float a) {
    return sqrtf(a);
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
inline float __frcp_rn(float a) {
    return 1.0f / a;
}
inline float __saturatef(float a) {
    return fminf(fmaxf(a, 0.0f), 1.0f);
}
// Conversions saturate and take NaN to 0, as the hardware's do.
inline int __float2int_rn(float x) {
    if (!(x == x)) return 0;
    if (x >= 2147483648.0f) return 0x7fffffff;
    if (x < -2147483648.0f) return -0x7fffffff - 1;
    return static_cast<int>(rintf(x));
}
inline int __float2int_rz(float x) {
    return __float2int_rn(truncf(x));
}
inline unsigned __float2uint_rn(float x) {
    if (!(x > 0.0f)) return 0;
    return x >= 4294967296.0f ? 0xffffffffu : static_cast<unsigned>(rintf(x));
}
inline float __int2float_rn(int x) {
    return static_cast<float>(x);
}
inline float __uint2float_rn(unsigned x) {
    return static_cast<float>(x);
}

// ---- time ----
inline long long clock64() {
    return static_cast<long long>(qi_standin_time());
}
inline void __nanosleep(unsigned nanoseconds) {
    qi_standin_sleep(nanoseconds);
}
[[noreturn]] inline void __trap() {
    qi_standin_trap();
}

// ---- what the module table is made with ----
namespace qi_standin {
constexpr unsigned align_up(unsigned n, unsigned to) {
    return (n + to - 1) / to * to;
}

template <class... P>
struct Arguments {
    static constexpr int n = sizeof...(P);
    struct Table {
        unsigned sizes[n + 1] = {}, offsets[n + 1] = {};
        unsigned total = 0;
    };
    static constexpr Table make() {
        Table t;
        int i = 0;
        ((t.offsets[i] = align_up(t.total, alignof(P)), t.sizes[i] = sizeof(P),
          t.total = t.offsets[i] + t.sizes[i], i++),
         ...);
        return t;
    }
    static constexpr Table table = make();
    static_assert(table.total <= 4096, "a kernel takes at most 4096 bytes of arguments");
    static_assert(n <= 64, "the stand-in passes at most 64 arguments");
};

template <class T>
inline T argument(const unsigned char* at) {
    static_assert(__is_trivially_copyable(T), "kernel parameters are pointers and scalars");
    T value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
    using type = Indices<I...>;
};

template <auto f>
struct Trampoline;
template <class... P, void (*f)(P...)>
struct Trampoline<f> {
    template <int... I>
    static void call(const unsigned char* packed, Indices<I...>) {
        f(argument<P>(packed + Arguments<P...>::table.offsets[I])...);
    }
    static void run(const unsigned char* packed) {
        call(packed, typename Count<sizeof...(P)>::type());
    }
    static constexpr QiKernel describe(const char* name, int max_threads) {
        return {name,
                run,
                Arguments<P...>::n,
                Arguments<P...>::table.sizes,
                Arguments<P...>::table.offsets,
                Arguments<P...>::table.total,
                max_threads};
    }
};
}  // namespace qi_standin
