// What the codecs need of AVX-512; level_avx2.h says what each function does.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header, GCC bug 105593
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstddef>
#include <cstdint>

#include "quant/half.h"

#define QI_CODEC_LEVEL avx512

namespace qi::codecs::avx512 {

inline constexpr int width = 16;
using Vec = __m512;
using Bytes [[gnu::vector_size(16)]] = uint8_t;

struct Codes {
    Bytes low, high;
};

inline void widen_f16(const std::byte* halves, float* out) {
    _mm512_storeu_ps(out,
                     _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves))));
}

inline void narrow_f16(const float* values, std::byte* halves) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves),
                        _mm512_cvtps_ph(_mm512_loadu_ps(values), _MM_FROUND_TO_NEAREST_INT));
}
inline f16_bits narrow_f16(float value) {
    return f16_bits(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
inline Vec broadcast(float x) {
    return _mm512_set1_ps(x);
}
inline Vec max(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
inline Vec min(Vec a, Vec b) {
    return _mm512_min_ps(a, b);
}
inline Vec copysign(Vec a, Vec b) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b));
}
inline float max_lane(Vec v) {
    return _mm512_reduce_max_ps(v);
}
inline float min_lane(Vec v) {
    return _mm512_reduce_min_ps(v);
}

inline Codes truncate(const Vec (&v)[2]) {
    return {Bytes(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v[0]))),
            Bytes(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v[1])))};
}

inline uint32_t fifth_bits(const Codes& codes) {
    const __m128i fifth = _mm_set1_epi8(16);
    return uint32_t(_mm_test_epi8_mask(__m128i(codes.low), fifth)) |
           uint32_t(_mm_test_epi8_mask(__m128i(codes.high), fifth)) << 16;
}

}  // namespace qi::codecs::avx512
