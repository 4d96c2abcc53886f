// What a kernel translated from PTX computes with: put in front of every translated unit. Names are
// PTX's; registers are unsigned words or floats.
//
// Written from the PTX ISA alone, not from the kernels' headers, so that what those take for
// granted is tested. Where PTX leaves a result open, NaNs' payloads and uninitialised registers
// among them, nothing is modelled but what is said here.
#pragma once

#include "abi.h"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;
using f32 = float;
using f64 = double;

extern "C" {
float exp2f(float) noexcept;
float log2f(float) noexcept;
void* memcpy(void*, const void*, decltype(sizeof 0)) noexcept;
void* memset(void*, int, decltype(sizeof 0)) noexcept;
int memcmp(const void*, const void*, decltype(sizeof 0)) noexcept;
}

// Kernels are compiled without optimisation: that takes longer than all they do in a test. What
// they call is not.
#pragma GCC push_options
#pragma GCC optimize("O2")

namespace ptx {

#define QI_NOINLINE __attribute__((noinline))

inline u32 bits(f32 v) {
    return __builtin_bit_cast(u32, v);
}
inline u64 bits(f64 v) {
    return __builtin_bit_cast(u64, v);
}
inline f32 as_f32(u32 v) {
    return __builtin_bit_cast(f32, v);
}
inline f64 as_f64(u64 v) {
    return __builtin_bit_cast(f64, v);
}

// What a register holds that was never set: large, and no number.
template <class T>
inline T unset() {
    T value;
    __builtin_memset(&value, 0x7f, sizeof value);
    if (T(0.5) != T(0)) __builtin_memset(&value, 0xff, sizeof value);
    return value;
}

// ---- integers ----

// Shifts by a type's width or more leave nothing, or the sign.
template <class T>
inline T shl(T v, u32 n) {
    return n < 8 * sizeof v ? static_cast<T>(v << n) : T(0);
}
template <class T>
inline T shr(T v, u32 n) {
    constexpr u32 last = 8 * sizeof v - 1;
    if (T(-1) > T(0) && n > last) return 0;
    return static_cast<T>(v >> (n > last ? last : n));
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
// The quotient of the smallest number and -1 does not fit; it wraps. By zero the process faults.
template <class T>
inline T div(T a, T b) {
    return T(-1) < T(0) && b == T(-1) ? static_cast<T>(-static_cast<u64>(a)) : a / b;
}
template <class T>
inline T rem(T a, T b) {
    return T(-1) < T(0) && b == T(-1) ? T(0) : a % b;
}
inline u32 brev(u32 v) {
    u32 reversed = 0;
    for (int i = 0; i < 32; i++)
        reversed |= (v >> i & 1u) << (31 - i);
    return reversed;
}
// By how much to shift left for the highest set bit to become bit 31.
inline u32 bfind_shiftamt(u32 v) {
    return v == 0 ? 0xffffffffu : static_cast<u32>(__builtin_clz(v));
}
inline u32 clz(u32 v) {
    return v == 0 ? 32 : static_cast<u32>(__builtin_clz(v));
}
// The low `length` bits of a go into b from bit `from` on.
template <class Word>
inline Word bfi(Word a, Word b, u32 from, u32 length) {
    constexpr Word one = 1;
    constexpr u32 n_bits = 8 * sizeof(Word);
    from &= 255u;
    length &= 255u;
    for (u32 i = 0; i < length && from + i < n_bits; i++)
        b = (b & ~(one << (from + i))) | (a >> i & one) << (from + i);
    return b;
}
// `length` bits from bit `from` on, extended by the highest of them (or of what is there).
inline u32 bfe_s32(u32 v, u32 from, u32 length) {
    from &= 255u;
    length &= 255u;
    const u32 last = from + length - 1 < 31 ? from + length - 1 : 31;
    const u32 sign = length == 0 ? 0 : v >> last & 1u;
    u32 field = 0;
    for (u32 i = 0; i < 32; i++)
        field |= (i < length && from + i < 32 ? v >> (from + i) & 1u : sign) << i;
    return field;
}
inline u32 prmt(u32 a, u32 b, u32 selector) {
    u32 permuted = 0;
    for (int i = 0; i < 4; i++) {
        const u32 choice = selector >> 4 * i & 15u;
        const u32 word = choice & 4u ? b : a;
        u32 byte = word >> 8 * (choice & 3u) & 255u;
        if (choice & 8u) byte = byte & 128u ? 255u : 0u;
        permuted |= byte << 8 * i;
    }
    return permuted;
}
inline u32 dp4a(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++)
        c += static_cast<u32>(i32(i8(a >> 8 * i)) * i32(i8(b >> 8 * i)));
    return c;
}

// ---- floats ----

constexpr u32 canonical_nan = 0x7fffffff;

inline bool unordered(f32 a, f32 b) {
    return a != a || b != b;
}
// The other one of a NaN; -0 is less than +0.
inline f32 min(f32 a, f32 b) {
    if (a != a) return b != b ? as_f32(canonical_nan) : b;
    if (a == b) return as_f32(bits(a) | bits(b));
    return b < a ? b : a;
}
inline f32 max(f32 a, f32 b) {
    if (a != a) return b != b ? as_f32(canonical_nan) : b;
    if (a == b) return as_f32(bits(a) & bits(b));
    return b > a ? b : a;
}
inline f32 neg(f32 a) {
    return as_f32(bits(a) ^ 0x80000000u);
}
inline f32 abs(f32 a) {
    return as_f32(bits(a) & 0x7fffffffu);
}
inline f32 fma_rn(f32 a, f32 b, f32 c) {
    return __builtin_fmaf(a, b, c);
}
// Rounded down: what the nearest float leaves, product and sum being exact in two doubles, says
// whether it is the one above.
QI_NOINLINE inline f32 fma_rm(f32 a, f32 b, f32 c) {
    const f32 nearest = __builtin_fmaf(a, b, c);
    if (nearest - nearest != 0.0f) return nearest;  // an infinity or NaN
    const f64 product = f64(a) * f64(b), sum = product + f64(c);
    const f64 part = sum - product;
    const f64 lost = (product - (sum - part)) + (f64(c) - part);
    const f64 left = (sum - f64(nearest)) + lost;
    if (left >= 0.0) return nearest;
    if (nearest == 0.0f) return as_f32(0x80000001u);
    return as_f32(nearest > 0.0f ? bits(nearest) - 1 : bits(nearest) + 1);
}
inline f32 flushed(f32 v) {
    return abs(v) < 1.17549435e-38f ? as_f32(bits(v) & 0x80000000u) : v;
}
// Off by two units of the last place, its largest error, but for zero, whose result the ISA gives.
QI_NOINLINE inline f32 ex2_approx_ftz(f32 v) {
    const f32 x = flushed(v), result = flushed(exp2f(x));
    if (x == 0.0f || result == 0.0f || result - result != 0.0f) return result;
    return flushed(as_f32(bits(result) + (bits(x) & 1u ? 2 : -2)));
}
inline f32 sqrt_rn(f32 v) {
    return __builtin_sqrtf(v);
}

// ---- conversions ----

inline f32 saturated(f32 v) {
    return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f;  // NaN to 0
}
inline i32 rounded_to_zero(f32 v) {
    if (v != v) return 0;
    if (v >= 2147483648.0f) return 0x7fffffff;
    if (v <= -2147483648.0f) return -0x7fffffff - 1;
    return static_cast<i32>(v);
}
// 2^n of a normal double.
inline f64 power_of_two(int n) {
    return as_f64(static_cast<u64>(1023 + n) << 52);
}
QI_NOINLINE inline f32 f32_of_f16(u16 h) {
    const u32 sign = static_cast<u32>(h & 0x8000u) << 16;
    const int exponent = h >> 10 & 31;
    const u32 fraction = h & 1023u;
    if (exponent == 31) return as_f32(fraction != 0 ? canonical_nan : sign | 0x7f800000u);
    const f64 magnitude = exponent == 0 ? fraction * power_of_two(-24)
                                        : (fraction + 1024u) * power_of_two(exponent - 25);
    return as_f32(sign | bits(static_cast<f32>(magnitude)));
}
// To the nearest, ties to even.
QI_NOINLINE inline u16 f16_of_f32(f32 v) {
    if (v != v) return 0x7fff;
    const u32 sign = bits(v) >> 16 & 0x8000u;
    const f64 magnitude = abs(v);
    if (magnitude >= 65520.0) return static_cast<u16>(sign | 0x7c00u);
    // In units of the last place of its half: a half of exponent e has 2^(e - 10).
    int exponent = static_cast<int>(bits(magnitude) >> 52) - 1023;
    if (exponent < -14) exponent = -14;
    const f64 units = magnitude * power_of_two(10 - exponent);
    u32 n = static_cast<u32>(units);
    const f64 left = units - n;
    n += left > 0.5 || (left == 0.5 && (n & 1u));
    return static_cast<u16>(sign | ((static_cast<u32>(exponent + 14) << 10) + n));
}

// ---- memory ----

// Addresses of shared memory: static variables first; dynamic ones elsewhere, so that running from
// one into the other is noticed.
constexpr u32 static_base = 0x400, dynamic_base = 0x1000000;

struct Shared {
    char* variables;
    u32 bytes;
    char* dynamic;
};

// Where a global address lies; generic ones are the same, but for shared memory.
template <class T, int n = 1>
inline T* global_at(u64 address, unsigned line) {
    if (__builtin_expect(address % (n * sizeof(T)) != 0, 0))
        qi_standin_misaligned(address, "PTX", line);
    return reinterpret_cast<T*>(address);
}
enum Access { load, store, atomic, repeat };

// values: what is to be stored there. Threads may store the same unordered.
template <class T, int n = 1>
inline T* shared_at(const Shared& shared, u64 address, Access access, unsigned line,
                    const T* values = nullptr) {
    if (__builtin_expect(address % (n * sizeof(T)) != 0, 0))
        qi_standin_misaligned(address, "PTX", line);
    const bool is_dynamic = address >= dynamic_base;
    if (__builtin_expect(!is_dynamic && address - static_base > shared.bytes - n * sizeof(T), 0))
        qi_standin_fault("an access outside of static shared memory", "PTX", line);
    const u64 offset = address - (is_dynamic ? dynamic_base : static_base);
    T* const at = reinterpret_cast<T*>((is_dynamic ? shared.dynamic : shared.variables) + offset);
    // Dynamic memory counts from behind all that static variables may take; beyond what it may be,
    // the access itself fails.
    if (offset < 0x40000) {
        if (values && __builtin_memcmp(at, values, n * sizeof(T)) == 0) access = repeat;
        qi_standin_shared_access(static_cast<u32>(offset) + (is_dynamic ? 0x10000 : 0),
                                 n * sizeof(T), access, line);
    }
    return at;
}
inline u64 generic_of_shared(const Shared& shared, u64 address) {
    return reinterpret_cast<u64>(address >= dynamic_base
                                     ? shared.dynamic + (address - dynamic_base)
                                     : shared.variables + (address - static_base));
}
inline u64 shared_of_generic(const Shared& shared, u64 address) {
    const u64 of_variables = address - reinterpret_cast<u64>(shared.variables);
    return of_variables < shared.bytes
               ? of_variables + static_base
               : address - reinterpret_cast<u64>(shared.dynamic) + dynamic_base;
}

template <class T>
inline T parameter(const u8* arguments, unsigned offset) {
    T value;
    __builtin_memcpy(&value, arguments + offset, sizeof value);
    return value;
}

template <class T>
inline T atom_add(T* at, T v) {
    return __atomic_fetch_add(at, v, __ATOMIC_RELAXED);
}
// v takes the place of what is there if it is better.
template <class T, class Better>
inline T atom_pick(T* at, T v, Better better) {
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (better(v, old) &&
           !__atomic_compare_exchange_n(at, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
template <class T>
inline T atom_min(T* at, T v) {
    return atom_pick(at, v, [](T a, T b) { return a < b; });
}
template <class T>
inline T atom_max(T* at, T v) {
    return atom_pick(at, v, [](T a, T b) { return a > b; });
}
inline void membar() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

}  // namespace ptx

#pragma GCC pop_options
