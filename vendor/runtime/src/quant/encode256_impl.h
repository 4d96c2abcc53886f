// Floats to blocks of 256 by weighted least squares, Q2_K to Q6_K, for the level whose level_*.h
// was included before.
//
// A block has groups of values with a small integer scale each (and a minimum, in the formats that
// have one), which a scale of the whole block multiplies. Every group is first fitted by itself:
// several spacings of the codes are tried, and for the codes that each gives the best scale (and
// minimum) follow by least squares. Then the block's scale and the groups' integers are improved in
// turns, the codes always being those nearest to the values.
//
// One lane of a vector is one group, so what is written below for one group happens to all groups
// of a block at once, and gives the same bits on every machine.
#pragma once

#include "quant/blocks.h"
#include "quant/lanes_impl.h"

namespace qi::codecs::QI_CODEC_LEVEL {

namespace {

inline float max_of(float a, float b) {
    return a < b ? b : a;
}

inline float min_of(float a, float b) {
    return b < a ? b : a;
}

// Fits closer than this share of the values' squares tie, and the first of them stays: where groups
// are alike they should come to the same scale. The error of an exact fit is rounded to less.
constexpr float tie = 0x1p-19f;

// The scale of a block as f16 and as the float it stands for, in units of the block's values.
struct BlockScale {
    f16_bits bits = 0;
    float value = 0;
};

// A block's values and weights, lane g of element i being element i of group g. The values are
// divided by 2^exponent, which brings the largest near 1 whatever the block holds.
template <int n_groups>
struct Values {
    using V = Lanes<n_groups>;
    static constexpr int n = 256 / n_groups;  // elements of a group

    V x[n];
    V w[n];
    V sum_w = 0;
    int exponent;
    bool vanishes;  // no scale is small enough for these values

    Values(const float* values, const float* importance) {
        float largest = 0;
        for (int i = 0; i < 256; i++)
            largest = max_of(largest, __builtin_fabsf(values[i]));
        vanishes = largest < 0x1p-40f;
        if (vanishes) return;
        exponent = __builtin_ilogbf(largest) + 1;
        if (exponent > 126) exponent = 126;
        by_group(values, __builtin_ldexpf(1.0f, -exponent), x);
        float total = 0;
        if (importance != nullptr) {
            for (int i = 0; i < 256; i++)
                total += importance[i] * 0x1p-8f;
        }
        const float share = total > 0 ? 1.0f / total : 0.0f;
        if (share > 0) by_group(importance, share, w);
        for (int i = 0; i < n; i++) {
            // Unimportant values still weigh a little, so that they cannot go astray.
            w[i] = share > 0 ? max_lanes(w[i], V(0x1p-16f)) : V(1.0f);
            sum_w += w[i];
        }
    }

    // The nearest f16, but neither infinite nor 0 for a scale that is not.
    BlockScale round_scale(float scale) const {
        constexpr float least = 0x1p-24f, greatest = 65504.0f;
        float magnitude = __builtin_ldexpf(__builtin_fabsf(scale), exponent);
        if (magnitude != 0) magnitude = min_of(max_of(magnitude, least), greatest);
        const f16_bits bits = f32_to_f16(__builtin_copysignf(magnitude, scale));
        return {bits, __builtin_ldexpf(f16_to_f32(bits), -exponent)};
    }

    // The codes of x as the elements of the block.
    template <class Code>
    static void in_order(const V (&q)[n], Code (&codes)[256]) {
        alignas(64) float turned[n][n_groups];
        for (int i = 0; i < n; i++)
            store_lanes(turned[i], q[i]);
        for (int g = 0; g < n_groups; g++) {
            for (int i = 0; i < n; i++)
                codes[g * n + i] = Code(turned[i][g]);
        }
    }

  private:
    // Element i of each group, times a factor, into lanes[i].
    static void by_group(const float* values, float factor, V (&lanes)[n]) {
        alignas(64) float turned[n][n_groups];
        for (int i = 0; i < n; i++) {
            for (int g = 0; g < n_groups; g++)
                turned[i][g] = values[g * n + i] * factor;
        }
        for (int i = 0; i < n; i++)
            lanes[i] = load_lanes<n_groups>(turned[i]);
    }
};

// ---- formats with a minimum: scale · code - min ----

// What the codes of a group amount to: sums of w·q, w·q² and w·q·x.
template <class V>
struct Sums {
    V wq = 0.0f, wqq = 0.0f, wqx = 0.0f;
};

template <int n_groups, int max_code, int max_scale>
class RangeFit {
  public:
    RangeFit(const float* values, const float* importance) : in_(values, importance) {
        if (in_.vanishes) return;
        center();
        fit_groups();
        fit_block();
    }

    BlockScale d, dmin;
    uint8_t scales[n_groups] = {};
    uint8_t mins[n_groups] = {};
    uint8_t codes[256] = {};

  private:
    using V = Lanes<n_groups>;
    static constexpr int n = 256 / n_groups;

    // Sums of values much larger than their spread would lose it.
    void center() {
        V sum = 0.0f;
        low_ = high_ = in_.x[0];
        for (int i = 0; i < n; i++) {
            sum += in_.w[i] * in_.x[i];
            low_ = min_lanes(low_, in_.x[i]);
            high_ = max_lanes(high_, in_.x[i]);
        }
        center_ = sum / in_.sum_w;
        for (int i = 0; i < n; i++) {
            in_.x[i] = in_.x[i] - center_;
            wx_ += in_.w[i] * in_.x[i];
            wxx_ += in_.w[i] * in_.x[i] * in_.x[i];
        }
    }

    QI_INLINE V code(int i, const V& inverse, const V& offset) const {
        return round_lanes(clamp_lanes(in_.x[i] * inverse + offset, 0.0f, float(max_code)));
    }

    // Of the codes nearest to (x + min) / scale.
    QI_INLINE Sums<V> sums(const V& inverse, const V& min) const {
        Sums<V> s;
        const V offset = (min + center_) * inverse;
        for (int i = 0; i < n; i++) {
            const V q = code(i, inverse, offset), wq = in_.w[i] * q;
            s.wq += wq;
            s.wqq += wq * q;
            s.wqx += wq * in_.x[i];
        }
        return s;
    }

    QI_INLINE V error(const Sums<V>& s, const V& scale, const V& min) const {
        const V m = min + center_;
        return wxx_ + scale * (scale * s.wqq - 2.0f * (s.wqx + m * s.wq)) +
               m * (2.0f * wx_ + m * in_.sum_w);
    }

    // Every group by itself, its scale and minimum being any numbers.
    void fit_groups() {
        const V floor = min_lanes(low_, V(0.0f));
        const V per_range = inverse_lanes(high_ - floor);
        // Of codes that are all 0.
        scale_ = 0.0f;
        min_ = max_lanes(0.0f - center_, V(0.0f));
        V best = error(Sums<V>(), scale_, min_);
        constexpr int n_tries = 16;
        for (int k = 0; k < n_tries; k++) {
            const float steps = float(max_code) + 0.1f * float(k) - 0.9f;
            const Sums<V> s = sums(per_range * steps, 0.0f - floor);
            const V slope = in_.sum_w * s.wqq - s.wq * s.wq;
            V scale = (in_.sum_w * s.wqx - wx_ * s.wq) * inverse_lanes(slope);
            V min = (scale * s.wq - wx_) / in_.sum_w - center_;
            // Without room below zero, the line goes through it.
            const V through_zero = (s.wqx + center_ * s.wq) * inverse_lanes(s.wqq);
            scale = select(min < 0.0f, through_zero, scale);
            min = max_lanes(min, V(0.0f));
            const V e = error(s, scale, min);
            const auto better = (e < best - tie * wxx_) & (0.0f < scale);
            best = select(better, e, best);
            scale_ = select(better, scale, scale_);
            min_ = select(better, min, min_);
        }
    }

    // The block's two scales, and integers for the groups.
    void fit_block() {
        BlockScale try_d = in_.round_scale(max_lane(scale_) / float(max_scale));
        BlockScale try_dmin = in_.round_scale(max_lane(min_) / float(max_scale));
        V ls = integers(scale_, try_d.value), lm = integers(min_, try_dmin.value);
        float least = __builtin_inff();
        for (int round = 0; round < n_rounds; round++) {
            Sums<V> s;
            const float e = improve_integers(try_d.value, try_dmin.value, ls, lm, s);
            if (e < least) {
                least = e;
                d = try_d;
                dmin = try_dmin;
                best_ls_ = ls;
                best_lm_ = lm;
            }
            refit(ls, lm, s, try_d, try_dmin);
        }
        write_codes();
    }

    QI_INLINE static V integers(const V& of, float unit) {
        const float inverse = unit == 0.0f ? 0.0f : 1.0f / unit;
        return round_lanes(clamp_lanes(of * inverse, 0.0f, float(max_scale)));
    }

    // Moves each group's integers to a better place nearby; returns the error of the block and the
    // sums of its codes.
    QI_INLINE float improve_integers(float d, float dmin, V& ls, V& lm, Sums<V>& kept) const {
        V best = __builtin_inff();
        const V from_ls = ls, from_lm = lm;
        for (int step = -1; step <= 1; step++) {
            const V l = clamp_lanes(from_ls + float(step), 0.0f, float(max_scale));
            const V scale = l * d, inverse = inverse_lanes(scale);
            const Sums<V> rough = sums(inverse, from_lm * dmin);
            const V m = integers((scale * rough.wq - wx_) / in_.sum_w - center_, dmin);
            const Sums<V> s = sums(inverse, m * dmin);
            const V e = error(s, scale, m * dmin);
            const auto better = e < best;
            best = select(better, e, best);
            ls = select(better, l, ls);
            lm = select(better, m, lm);
            kept.wq = select(better, s.wq, kept.wq);
            kept.wqq = select(better, s.wqq, kept.wqq);
            kept.wqx = select(better, s.wqx, kept.wqx);
        }
        return sum_lanes(best);
    }

    // The best d and dmin for the integers and codes at hand.
    void refit(const V& ls, const V& lm, const Sums<V>& s, BlockScale& d, BlockScale& dmin) const {
        const V wqx = s.wqx + center_ * s.wq, wx = wx_ + center_ * in_.sum_w;
        const float dd = sum_lanes(ls * ls * s.wqq);
        const float dm = sum_lanes(ls * lm * s.wq);
        const float mm = sum_lanes(lm * lm * in_.sum_w);
        const float dx = sum_lanes(ls * wqx);
        const float mx = sum_lanes(lm * wx);
        const float determinant = dd * mm - dm * dm;
        if (determinant > 0x1p-20f * dd * mm) {
            d = in_.round_scale((dx * mm - dm * mx) / determinant);
            // The best beside d as it was rounded, which makes up for some of that.
            dmin = in_.round_scale((d.value * dm - mx) / mm);
        } else if (dd > 0 && mm == 0) {
            d = in_.round_scale(dx / dd);
        }
    }

    void write_codes() {
        const V scale = best_ls_ * d.value, inverse = inverse_lanes(scale);
        const V offset = (best_lm_ * dmin.value + center_) * inverse;
        V q[n];
        for (int i = 0; i < n; i++)
            q[i] = code(i, inverse, offset);
        in_.in_order(q, codes);
        for (int g = 0; g < n_groups; g++) {
            scales[g] = uint8_t(best_ls_[g]);
            mins[g] = uint8_t(best_lm_[g]);
        }
    }

    static constexpr int n_rounds = 3;

    Values<n_groups> in_;
    V center_, low_, high_, wx_ = 0.0f, wxx_ = 0.0f;
    V scale_, min_;                      // of each group by itself
    V best_ls_ = 0.0f, best_lm_ = 0.0f;  // integers
};

// ---- formats without one: scale · code, of either sign ----

template <int max_code, int max_scale>
class SignedFit {
  public:
    SignedFit(const float* values, const float* importance) : in_(values, importance) {
        if (in_.vanishes) return;
        fit_groups();
        fit_block();
    }

    BlockScale d;
    int8_t scales[16] = {};
    int8_t codes[256] = {};  // -max_code - 1 … max_code

  private:
    static constexpr int n_groups = 16, n = 16;
    using V = Lanes<n_groups>;

    QI_INLINE V code(int i, const V& inverse) const {
        return round_lanes(clamp_lanes(in_.x[i] * inverse, float(-max_code - 1), float(max_code)));
    }

    // Sums of w·q² and w·q·x of the codes nearest to x / scale.
    QI_INLINE void sums(const V& inverse, V& wqq, V& wqx) const {
        wqq = wqx = 0.0f;
        for (int i = 0; i < n; i++) {
            const V q = code(i, inverse), wq = in_.w[i] * q;
            wqq += wq * q;
            wqx += wq * in_.x[i];
        }
    }

    // Every group by itself. The value of largest magnitude may take either end of the codes.
    void fit_groups() {
        V extreme = 0.0f;
        for (int i = 0; i < n; i++) {
            const V x = in_.x[i];
            extreme = select(extreme * extreme < x * x, x, extreme);
        }
        const V per_extreme = inverse_lanes(extreme);
        V best = 0.0f;
        scale_ = 0.0f;
        for (int sign = -1; sign <= 1; sign += 2) {
            constexpr int n_tries = 8;
            const float end = sign < 0 ? float(max_code + 1) : float(max_code);
            for (int k = 0; k < n_tries; k++) {
                const float steps = end + step_of_tries * float(k) - first_try;
                V wqq, wqx;
                sums(per_extreme * (float(sign) * steps), wqq, wqx);
                const V scale = wqx * inverse_lanes(wqq);
                const V gain = scale * wqx;  // what the error loses against all zeros
                const auto better = best * (1.0f + tie) < gain;
                best = select(better, gain, best);
                scale_ = select(better, scale, scale_);
            }
        }
    }

    void fit_block() {
        // There is one more integer below zero than above: the sign of d says on which side that
        // helps.
        const float highest = max_of(max_lane(scale_), 0.0f);
        const float lowest = -max_of(max_lane(0.0f - scale_), 0.0f);
        constexpr float above = max_scale, below = max_scale + 1;
        const float positive = max_of(highest / above, -lowest / below);
        const float negative = max_of(highest / below, -lowest / above);
        BlockScale try_d = in_.round_scale(positive < negative ? positive : -negative);
        V ls = try_d.value == 0 ? V(0.0f) : clamp_scale(scale_ / try_d.value);
        V best_ls = 0.0f;
        float most = -__builtin_inff();
        for (int round = 0; round < n_rounds; round++) {
            V kept_wqq = 0.0f, kept_wqx = 0.0f, best = -__builtin_inff();
            const V from = ls;
            for (int step = -1; step <= 1; step++) {
                const V l = clamp_scale(from + float(step));
                const V scale = l * try_d.value;
                V wqq, wqx;
                sums(inverse_lanes(scale), wqq, wqx);
                const V gain = scale * (2.0f * wqx - scale * wqq);
                const auto better = best < gain;
                best = select(better, gain, best);
                ls = select(better, l, ls);
                kept_wqq = select(better, wqq, kept_wqq);
                kept_wqx = select(better, wqx, kept_wqx);
            }
            const float gain = sum_lanes(best);
            if (gain > most) {
                most = gain;
                d = try_d;
                best_ls = ls;
            }
            const float dd = sum_lanes(ls * ls * kept_wqq);
            const float dx = sum_lanes(ls * kept_wqx);
            if (dd > 0) try_d = in_.round_scale(dx / dd);
        }
        const V inverse = inverse_lanes(V(best_ls * d.value));
        V q[n];
        for (int i = 0; i < n; i++)
            q[i] = code(i, inverse);
        in_.in_order(q, codes);
        for (int g = 0; g < n_groups; g++)
            scales[g] = int8_t(best_ls[g]);
    }

    QI_INLINE static V clamp_scale(const V& scale) {
        return round_lanes(clamp_lanes(scale, float(-max_scale - 1), float(max_scale)));
    }

    static constexpr int n_rounds = 3;
    // In steps of a code: fewer codes gain more from a cut-off extreme.
    static constexpr float step_of_tries = max_code < 8 ? 0.15f : 0.25f;
    static constexpr float first_try = max_code < 8 ? 0.75f : 1.0f;

    Values<n_groups> in_;
    V scale_;  // of each group by itself
};

// ---- packing ----

// Two bits of element i in the order that Q2_K and Q3_K share.
inline void put_two_bits(uint8_t (&qs)[64], int i, int bits) {
    uint8_t& byte = qs[i / 128 * 32 + i % 32];
    byte = uint8_t(byte | bits << (i / 32 % 4 * 2));
}

inline void pack_scales_mins(const uint8_t (&scales)[8], const uint8_t (&mins)[8],
                             uint8_t (&packed)[12]) {
    for (int g = 0; g < 4; g++) {
        packed[g] = uint8_t(scales[g] | scales[g + 4] >> 4 << 6);
        packed[g + 4] = uint8_t(mins[g] | mins[g + 4] >> 4 << 6);
        packed[g + 8] = uint8_t((scales[g + 4] & 15) | (mins[g + 4] & 15) << 4);
    }
}

// Groups 2·k and 2·k + 1 share 32 bytes.
inline void pack_nibble_groups(const uint8_t (&codes)[256], uint8_t (&qs)[128]) {
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < 32; i++)
            qs[32 * k + i] = uint8_t((codes[64 * k + i] & 15) | (codes[64 * k + 32 + i] & 15) << 4);
    }
}

inline void encode_block(const float* x, const float* importance, BlockQ2_K& block) {
    const RangeFit<16, 3, 15> fit(x, importance);
    block = {};
    block.d = fit.d.bits;
    block.dmin = fit.dmin.bits;
    for (int g = 0; g < 16; g++)
        block.scales[g] = uint8_t(fit.scales[g] | fit.mins[g] << 4);
    for (int i = 0; i < 256; i++)
        put_two_bits(block.qs, i, fit.codes[i]);
}

inline void encode_block(const float* x, const float* importance, BlockQ3_K& block) {
    const SignedFit<3, 31> fit(x, importance);
    block = {};
    block.d = fit.d.bits;
    for (int g = 0; g < 16; g++) {
        const int scale = fit.scales[g] + 32;
        uint8_t& low = block.scales[g % 8];
        uint8_t& high = block.scales[8 + g % 4];
        low = uint8_t(low | (scale & 15) << (g / 8 * 4));
        high = uint8_t(high | (scale >> 4) << (g / 4 * 2));
    }
    for (int i = 0; i < 256; i++) {
        const int code = fit.codes[i] + 4;
        put_two_bits(block.qs, i, code & 3);
        block.hmask[i % 32] = uint8_t(block.hmask[i % 32] | (code >> 2) << (i / 32));
    }
}

inline void encode_block(const float* x, const float* importance, BlockQ4_K& block) {
    const RangeFit<8, 15, 63> fit(x, importance);
    block.d = fit.d.bits;
    block.dmin = fit.dmin.bits;
    pack_scales_mins(fit.scales, fit.mins, block.scales);
    pack_nibble_groups(fit.codes, block.qs);
}

inline void encode_block(const float* x, const float* importance, BlockQ5_K& block) {
    const RangeFit<8, 31, 63> fit(x, importance);
    block.d = fit.d.bits;
    block.dmin = fit.dmin.bits;
    pack_scales_mins(fit.scales, fit.mins, block.scales);
    pack_nibble_groups(fit.codes, block.qs);
    for (int i = 0; i < 32; i++) {
        block.qh[i] = 0;
        for (int g = 0; g < 8; g++)
            block.qh[i] = uint8_t(block.qh[i] | (fit.codes[32 * g + i] >> 4) << g);
    }
}

inline void encode_block(const float* x, const float* importance, BlockQ6_K& block) {
    const SignedFit<31, 127> fit(x, importance);
    block = {};
    block.d = fit.d.bits;
    __builtin_memcpy(block.scales, fit.scales, 16);
    for (int i = 0; i < 256; i++) {
        const int half = i / 128, quarter = i / 32 % 4, l = i % 32;
        const int code = fit.codes[i] + 32;
        uint8_t& low = block.ql[64 * half + quarter % 2 * 32 + l];
        uint8_t& high = block.qh[32 * half + l];
        low = uint8_t(low | (code & 15) << (quarter / 2 * 4));
        high = uint8_t(high | (code >> 4) << (2 * quarter));
    }
}

}  // namespace

}  // namespace qi::codecs::QI_CODEC_LEVEL
