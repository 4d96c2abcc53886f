// Eight floats in one AVX2 register; simd_portable.h says what each operation promises.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define QI_SIMD_LEVEL avx2

namespace qi::kernels::avx2 {

using Vec = __m256;
using Mask = __m256;
inline constexpr int width = 8;
using IntLanes [[gnu::vector_size(4 * width)]] = int32_t;
inline constexpr int n_registers = 16;

inline Vec broadcast(float x) {
    return _mm256_set1_ps(x);
}
inline Mask first_lanes(int64_t n) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane));
}

inline Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline Vec load_partial(const float* p, int64_t n) {
    return _mm256_maskload_ps(p, _mm256_castps_si256(first_lanes(n)));
}
inline void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v);
}
inline void store_partial(float* p, Vec v, int64_t n) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n)), v);
}

inline Vec load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_f16_partial(const uint16_t* p, int64_t n) {
    uint16_t lanes[width] = {};
    __builtin_memcpy(lanes, p, size_t(n) * sizeof(uint16_t));
    return load_f16(lanes);
}
inline Vec broadcast_f16(uint16_t bits) {
    return _mm256_cvtph_ps(_mm_set1_epi16(short(bits)));
}
inline void store_f16(uint16_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec load_i8(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}
inline IntLanes load_u8(const uint8_t* p) {
    return IntLanes(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec low_nibbles(IntLanes codes, int offset) {
    return _mm256_cvtepi32_ps(__m256i((codes & 15) - offset));
}

inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline Vec max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
inline Vec min(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
inline Vec abs(Vec v) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
}
inline Mask less_equal(Vec a, Vec b) {
    return _mm256_cmp_ps(a, b, _CMP_LE_OQ);
}
inline Vec select(Mask m, Vec a, Vec b) {
    return _mm256_blendv_ps(b, a, m);
}
inline Vec round(Vec v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline Vec scale_by_power(Vec v, Vec n) {
    // In two steps, so that results may be subnormal or infinite.
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return v * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}

inline float sum(Vec v) {
    const __m128 four = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}
// The additions of sum() for all vectors at once.
inline Vec sums(const Vec (&v)[width]) {
    Vec four[4], two[2];
    for (int i = 0; i < 4; ++i)
        four[i] = _mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x20) +
                  _mm256_permute2f128_ps(v[2 * i], v[2 * i + 1], 0x31);
    for (int i = 0; i < 2; ++i)
        two[i] = _mm256_shuffle_ps(four[2 * i], four[2 * i + 1], _MM_SHUFFLE(1, 0, 1, 0)) +
                 _mm256_shuffle_ps(four[2 * i], four[2 * i + 1], _MM_SHUFFLE(3, 2, 3, 2));
    // Lane 4·h + k has the sum of v[2·k + h].
    const Vec one = _mm256_shuffle_ps(two[0], two[1], _MM_SHUFFLE(2, 0, 2, 0)) +
                    _mm256_shuffle_ps(two[0], two[1], _MM_SHUFFLE(3, 1, 3, 1));
    return _mm256_permutevar8x32_ps(one, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
}
inline float max_lane(Vec v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
}

inline void deinterleave(Vec low, Vec high, Vec& even, Vec& odd) {
    const __m256i order = _mm256_set_epi32(7, 6, 3, 2, 5, 4, 1, 0);
    even = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0x88), order);
    odd = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, 0xdd), order);
}
inline void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
    const Vec first = _mm256_unpacklo_ps(even, odd), second = _mm256_unpackhi_ps(even, odd);
    low = _mm256_permute2f128_ps(first, second, 0x20);
    high = _mm256_permute2f128_ps(first, second, 0x31);
}

}  // namespace qi::kernels::avx2
