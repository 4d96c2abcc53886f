// Sixteen floats in one AVX-512 register; simd_portable.h says what each operation promises.
#pragma once

// GCC 12 takes the intrinsics' undefined operands for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#define QI_SIMD_LEVEL avx512

namespace qi::kernels::avx512 {

using Vec = __m512;
using Mask = __mmask16;
inline constexpr int width = 16;
using IntLanes [[gnu::vector_size(4 * width)]] = int32_t;
inline constexpr int n_registers = 32;

inline Vec broadcast(float x) {
    return _mm512_set1_ps(x);
}
inline Mask first_lanes(int64_t n) {
    return Mask((1u << n) - 1);
}

inline Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline Vec load_partial(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline void store(float* p, Vec v) {
    _mm512_storeu_ps(p, v);
}
inline void store_partial(float* p, Vec v, int64_t n) {
    _mm512_mask_storeu_ps(p, first_lanes(n), v);
}

inline Vec load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_f16_partial(const uint16_t* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vec broadcast_f16(uint16_t bits) {
    return _mm512_cvtph_ps(_mm256_set1_epi16(short(bits)));
}
inline void store_f16(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_i8(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}
inline IntLanes load_u8(const uint8_t* p) {
    return IntLanes(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec low_nibbles(IntLanes codes, int offset) {
    const __m512i values = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const Vec table = _mm512_cvtepi32_ps(_mm512_sub_epi32(values, _mm512_set1_epi32(offset)));
    return _mm512_permutexvar_ps(__m512i(codes), table);
}

inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline Vec max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
inline Vec min(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
inline Vec abs(Vec v) {
    return _mm512_abs_ps(v);
}
inline Mask less_equal(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}
inline Vec select(Mask m, Vec a, Vec b) {
    return _mm512_mask_blend_ps(m, b, a);
}
inline Vec round(Vec v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec scale_by_power(Vec v, Vec n) {
    return _mm512_scalef_ps(v, n);
}

inline float sum(Vec v) {
    const __m256 eight = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}
// The additions of sum() for all vectors at once: 3 operations each, where one alone takes 9.
inline Vec sums(const Vec (&v)[width]) {
    Vec eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i)
        eight[i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], _MM_SHUFFLE(1, 0, 1, 0)) +
                   _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], _MM_SHUFFLE(3, 2, 3, 2));
    for (int i = 0; i < 4; ++i)
        four[i] = _mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], _MM_SHUFFLE(2, 0, 2, 0)) +
                  _mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], _MM_SHUFFLE(3, 1, 3, 1));
    for (int i = 0; i < 2; ++i)
        two[i] = _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], _MM_SHUFFLE(1, 0, 1, 0)) +
                 _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], _MM_SHUFFLE(3, 2, 3, 2));
    // Lane 4·q + k has the sum of v[4·k + q].
    const Vec one = _mm512_shuffle_ps(two[0], two[1], _MM_SHUFFLE(2, 0, 2, 0)) +
                    _mm512_shuffle_ps(two[0], two[1], _MM_SHUFFLE(3, 1, 3, 1));
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_ps(order, one);
}
inline float max_lane(Vec v) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
}

inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    even = _mm512_permutex2var_ps(low, evens, high);
    odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), high);
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
    const __m512i lows = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    low = _mm512_permutex2var_ps(even, lows, odd);
    high = _mm512_permutex2var_ps(even, _mm512_add_epi32(lows, _mm512_set1_epi32(8)), odd);
}

}  // namespace qi::kernels::avx512
