// Eight or sixteen floats that are computed alike, in the registers of the level whose level_*.h
// was included before. The same bits on every level.
#pragma once

#include <cstdint>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define QI_INLINE inline __attribute__((always_inline))

namespace qi::codecs::QI_CODEC_LEVEL {

namespace {

// Spelt out: GCC takes a vector whose size depends on a template's argument for one element.
template <int n>
struct VectorOf;
template <>
struct VectorOf<4> {
    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
};
template <>
struct VectorOf<8> {
    typedef float Floats __attribute__((vector_size(32)));
    typedef int32_t Ints __attribute__((vector_size(32)));
};
template <>
struct VectorOf<16> {
    typedef float Floats __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
};

// True or false in n lanes: a vector of -1 and 0, or two halves where a register does not hold
// that many.
template <int n, bool split = (n > width)>
struct Mask {
    typename VectorOf<n>::Ints v;

    QI_INLINE friend Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
};

template <int n>
struct Mask<n, true> {
    Mask<n / 2> low, high;

    QI_INLINE friend Mask operator&(Mask a, Mask b) { return {a.low & b.low, a.high & b.high}; }
};

// n floats. Compilers take vectors wider than a register apart lane by lane, so these are split by
// hand.
template <int n, bool split = (n > width)>
struct Lanes {
    using Vector = typename VectorOf<n>::Floats;
    Vector v;

    Lanes() = default;
    QI_INLINE Lanes(float x) : v(Vector{} + x) {}
    QI_INLINE explicit Lanes(Vector vector) : v(vector) {}

    QI_INLINE float operator[](int lane) const { return v[lane]; }

    QI_INLINE friend Lanes operator+(Lanes a, Lanes b) { return Lanes(a.v + b.v); }
    QI_INLINE friend Lanes operator-(Lanes a, Lanes b) { return Lanes(a.v - b.v); }
    QI_INLINE friend Lanes operator*(Lanes a, Lanes b) { return Lanes(a.v * b.v); }
    QI_INLINE friend Lanes operator/(Lanes a, Lanes b) { return Lanes(a.v / b.v); }
    QI_INLINE friend Mask<n> operator<(Lanes a, Lanes b) { return {a.v < b.v}; }
    QI_INLINE friend Mask<n> operator==(Lanes a, Lanes b) { return {a.v == b.v}; }
    QI_INLINE friend Lanes select(Mask<n> mask, Lanes a, Lanes b) {
        return Lanes(mask.v ? a.v : b.v);
    }
};

template <int n>
struct Lanes<n, true> {
    using Half = Lanes<n / 2>;
    Half low, high;

    Lanes() = default;
    QI_INLINE Lanes(float x) : low(x), high(x) {}
    QI_INLINE Lanes(Half first, Half second) : low(first), high(second) {}

    QI_INLINE float operator[](int lane) const {
        return lane < n / 2 ? low[lane] : high[lane - n / 2];
    }

    QI_INLINE friend Lanes operator+(Lanes a, Lanes b) { return {a.low + b.low, a.high + b.high}; }
    QI_INLINE friend Lanes operator-(Lanes a, Lanes b) { return {a.low - b.low, a.high - b.high}; }
    QI_INLINE friend Lanes operator*(Lanes a, Lanes b) { return {a.low * b.low, a.high * b.high}; }
    QI_INLINE friend Lanes operator/(Lanes a, Lanes b) { return {a.low / b.low, a.high / b.high}; }
    QI_INLINE friend Mask<n> operator<(Lanes a, Lanes b) {
        return {a.low < b.low, a.high < b.high};
    }
    QI_INLINE friend Mask<n> operator==(Lanes a, Lanes b) {
        return {a.low == b.low, a.high == b.high};
    }
    QI_INLINE friend Lanes select(Mask<n> mask, Lanes a, Lanes b) {
        return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
    }
};

template <int n>
QI_INLINE Lanes<n>& operator+=(Lanes<n>& a, Lanes<n> b) {
    return a = a + b;
}

template <int n>
QI_INLINE Lanes<n> load_lanes(const float* p) {
    Lanes<n> lanes;
    __builtin_memcpy(&lanes, p, sizeof lanes);
    return lanes;
}

template <int n>
QI_INLINE void store_lanes(float* p, Lanes<n> lanes) {
    __builtin_memcpy(p, &lanes, sizeof lanes);
}

template <int n>
QI_INLINE Lanes<n> max_lanes(Lanes<n> a, Lanes<n> b) {
    return select(a < b, b, a);
}

template <int n>
QI_INLINE Lanes<n> min_lanes(Lanes<n> a, Lanes<n> b) {
    return select(b < a, b, a);
}

template <int n>
QI_INLINE Lanes<n> clamp_lanes(Lanes<n> value, float low, float high) {
    return min_lanes(max_lanes(value, Lanes<n>(low)), Lanes<n>(high));
}

// To the nearest integer, halves to even; |value| < 2^22.
template <int n>
QI_INLINE Lanes<n> round_lanes(Lanes<n> value) {
    constexpr float shift = 0x1.8p23f;  // has no bits left for a fraction
    return (value + shift) - shift;
}

// 1 / value, and 0 for 0.
template <int n>
QI_INLINE Lanes<n> inverse_lanes(Lanes<n> value) {
    return select(value == Lanes<n>(0.0f), Lanes<n>(0.0f), 1.0f / value);
}

// In order, so that it is the same sum on every level.
template <int n>
QI_INLINE float sum_lanes(Lanes<n> lanes) {
    float sum = 0;
    for (int g = 0; g < n; g++)
        sum += lanes[g];
    return sum;
}

template <int n>
QI_INLINE float max_lane(Lanes<n> lanes) {
    float most = lanes[0];
    for (int g = 1; g < n; g++)
        most = most < lanes[g] ? lanes[g] : most;
    return most;
}

}  // namespace

}  // namespace qi::codecs::QI_CODEC_LEVEL
