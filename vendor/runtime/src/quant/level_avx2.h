// What the codecs need of AVX2 with F16C; level_portable.h says what for.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "quant/half.h"

#define QI_CODEC_LEVEL avx2

namespace qi::codecs::avx2 {

inline constexpr int width = 8;
using Vec = __m256;
using Bytes [[gnu::vector_size(16)]] = uint8_t;

// The codes of a block of 32, elements 0-15 and 16-31.
struct Codes {
    Bytes low, high;
};

// `width` halves; exact.
inline void widen_f16(const std::byte* halves, float* out) {
    _mm256_storeu_ps(out,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
}

// To nearest even.
inline void narrow_f16(const float* values, std::byte* halves) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values), _MM_FROUND_TO_NEAREST_INT));
}
inline f16_bits narrow_f16(float value) {
    return f16_bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
inline Vec broadcast(float x) {
    return _mm256_set1_ps(x);
}
inline Vec max(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}
inline Vec min(Vec a, Vec b) {
    return _mm256_min_ps(a, b);
}
// |a| with the sign of b.
inline Vec copysign(Vec a, Vec b) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b));
}
inline float max_lane(Vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float min_lane(Vec v) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}

// Truncated values, which fit in int8.
inline Codes truncate(const Vec (&v)[4]) {
    const __m256i a = _mm256_packs_epi32(_mm256_cvttps_epi32(v[0]), _mm256_cvttps_epi32(v[1]));
    const __m256i b = _mm256_packs_epi32(_mm256_cvttps_epi32(v[2]), _mm256_cvttps_epi32(v[3]));
    // Packing works on 128-bit halves: the fours come out as 0 2 4 6 1 3 5 7.
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return {Bytes(_mm256_castsi256_si128(bytes)), Bytes(_mm256_extracti128_si256(bytes, 1))};
}

// Bit 4 of each code, that of element i in bit i.
inline uint32_t fifth_bits(const Codes& codes) {
    const int low = _mm_movemask_epi8(_mm_slli_epi16(__m128i(codes.low), 3));
    const int high = _mm_movemask_epi8(_mm_slli_epi16(__m128i(codes.high), 3));
    return uint32_t(low) | uint32_t(high) << 16;
}

}  // namespace qi::codecs::avx2
