// The vector operators over a Vec; each instruction set's vector_ops.cpp includes this after its
// simd_*.h.
#pragma once

#include "kernels/simd_math.h"
#include "kernels/vector_ops_table.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// How a step of for_vectors reaches memory: whole vectors, or the first n lanes.
struct Whole {
    Vec load(const float* p) const { return QI_SIMD_LEVEL::load(p); }
    void store(float* p, Vec v) const { QI_SIMD_LEVEL::store(p, v); }
    void load_pairs(const float* p, Vec& first, Vec& second) const {
        deinterleave(load(p), load(p + width), first, second);
    }
    void store_pairs(float* p, Vec first, Vec second) const {
        Vec low, high;
        interleave(first, second, low, high);
        store(p, low);
        store(p + width, high);
    }
};
struct Part {
    int64_t n;
    Vec load(const float* p) const { return load_partial(p, n); }
    void store(float* p, Vec v) const { store_partial(p, v, n); }
    int64_t upper() const { return 2 * n > width ? 2 * n - width : 0; }  // of 2n, in the second
    void load_pairs(const float* p, Vec& first, Vec& second) const {
        deinterleave(load_partial(p, 2 * n - upper()), load_partial(p + width, upper()), first,
                     second);
    }
    void store_pairs(float* p, Vec first, Vec second) const {
        Vec low, high;
        interleave(first, second, low, high);
        store_partial(p, low, 2 * n - upper());
        store_partial(p + width, high, upper());
    }
};
// Calls step(i, lanes) for every vector of an array of n. The last, partial one is computed by the
// same instructions, so that an element's result does not depend on where it stands.
template <class Step>
inline void for_vectors(int64_t n, Step step) {
    int64_t i = 0;
    for (; i + width <= n; i += width)
        step(i, Whole{});
    if (i < n) step(i, Part{n - i});
}

// Σ term(vector of x) over a row, in an order that depends on n alone: vector number j adds to
// accumulator j % 4. Lanes beyond n come last and must give 0, so term gets the number of valid
// lanes.
template <class Term>
inline float sum_row(const float* x, int64_t n, Term term) {
    Vec sums[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    int64_t i = 0;
    for (; i + 4 * width <= n; i += 4 * width)
        for (int j = 0; j < 4; ++j)
            sums[j] = term(load(x + i + j * width), sums[j]);
    for (int j = 0; i < n; ++j, i += width) {
        const int64_t rest = n - i;
        if (rest >= width) {
            sums[j] = term(load(x + i), sums[j]);
        } else {
            const Vec grown = term(load_partial(x + i, rest), sums[j]);
            sums[j] = select(first_lanes(rest), grown, sums[j]);
        }
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
    const float squares = sum_row(x, n, [](Vec v, Vec total) { return fma(v, v, total); });
    const Vec inverse = broadcast(1.0f / __builtin_sqrtf(squares / float(n) + epsilon));
    for_vectors(n, [&](int64_t i, auto lanes) {
        lanes.store(out + i, lanes.load(x + i) * inverse * lanes.load(weight + i));
    });
}

void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t n,
                float* out) {
    const Vec mean =
        broadcast(sum_row(x, n, [](Vec v, Vec total) { return total + v; }) / float(n));
    const float squares =
        sum_row(x, n, [mean](Vec v, Vec total) { return fma(v - mean, v - mean, total); });
    const Vec inverse = broadcast(1.0f / __builtin_sqrtf(squares / float(n) + epsilon));
    for_vectors(n, [&](int64_t i, auto lanes) {
        const Vec scaled = (lanes.load(x + i) - mean) * inverse * lanes.load(weight + i);
        lanes.store(out + i, bias ? scaled + lanes.load(bias + i) : scaled);
    });
}

struct Silu {
    Vec operator()(Vec x) const { return x * sigmoid(x); }
};
// 0 at or below the threshold; NaN stays NaN.
struct Fatrelu {
    Vec threshold;
    Vec operator()(Vec x) const { return select(less_equal(x, threshold), broadcast(0.0f), x); }
};
struct GeluErf {
    Vec operator()(Vec x) const { return x * normal_cdf(x); }
};
// x/2 · (1 + tanh(u)) = x · sigmoid(2u), which keeps its precision where tanh approaches -1.
struct GeluTanh {
    Vec operator()(Vec x) const {
        const Vec linear = broadcast(0x1.988454p+0f);  // 2 √(2/π)
        const Vec cubic = broadcast(0x1.2444f2p-4f);   // 0.044715 · 2 √(2/π)
        return x * sigmoid(x * fma(x * x, cubic, linear));
    }
};

template <class Body>
inline void with_activation(Activation act, float threshold, Body body) {
    switch (act) {
        case Activation::silu:
            return body(Silu{});
        case Activation::relu:
            return body(Fatrelu{broadcast(0.0f)});
        case Activation::gelu_erf:
            return body(GeluErf{});
        case Activation::gelu_tanh:
            return body(GeluTanh{});
        case Activation::fatrelu:
            return body(Fatrelu{broadcast(threshold)});
    }
}

void activate(Activation act, float threshold, float* h, int64_t n) {
    with_activation(act, threshold, [&](auto f) {
        for_vectors(n, [&](int64_t i, auto lanes) { lanes.store(h + i, f(lanes.load(h + i))); });
    });
}

void activate_mul(Activation act, float threshold, float* gate, const float* up, int64_t n) {
    with_activation(act, threshold, [&](auto f) {
        for_vectors(n, [&](int64_t i, auto lanes) {
            lanes.store(gate + i, f(lanes.load(gate + i)) * lanes.load(up + i));
        });
    });
}

void relu_relu_mul(float* gate, const float* up, int64_t n) {
    const Fatrelu relu{broadcast(0.0f)};
    for_vectors(n, [&](int64_t i, auto lanes) {
        lanes.store(gate + i, relu(lanes.load(gate + i)) * relu(lanes.load(up + i)));
    });
}

void add(const float* a, const float* b, int64_t n, float* out) {
    for_vectors(n, [&](int64_t i, auto lanes) {
        lanes.store(out + i, lanes.load(a + i) + lanes.load(b + i));
    });
}

// (x, y) turned by the angle whose cosine is c and sine is s.
inline void rotate(Vec c, Vec s, Vec& x, Vec& y) {
    const Vec turned = fma(x, c, -(y * s));
    y = fma(x, s, y * c);
    x = turned;
}

void rope(float* head, const float* cos_sin, int64_t n_rot, bool neox) {
    const int64_t n_pairs = n_rot / 2;
    for_vectors(n_pairs, [&](int64_t i, auto lanes) {
        Vec c, s, x, y;
        lanes.load_pairs(cos_sin + 2 * i, c, s);
        if (neox) {
            x = lanes.load(head + i);
            y = lanes.load(head + n_pairs + i);
            rotate(c, s, x, y);
            lanes.store(head + i, x);
            lanes.store(head + n_pairs + i, y);
        } else {
            lanes.load_pairs(head + 2 * i, x, y);
            rotate(c, s, x, y);
            lanes.store_pairs(head + 2 * i, x, y);
        }
    });
}

void max_and_sum_exp(const float* x, int64_t n, float* max_out, double* sum_exp) {
    Vec largest = broadcast(x[0]);
    int64_t i = 0;
    for (; i + width <= n; i += width)
        largest = max(largest, load(x + i));
    if (i < n)
        largest = select(first_lanes(n - i), max(largest, load_partial(x + i, n - i)), largest);
    *max_out = max_lane(largest);

    double sums[width] = {};  // by lane, so that the order of additions is fixed
    float terms[width];
    for (i = 0; i + width <= n; i += width) {
        store(terms, exp(load(x + i) - broadcast(*max_out)));
        for (int lane = 0; lane < width; ++lane)
            sums[lane] += double(terms[lane]);
    }
    if (i < n) {
        store(terms, exp(load_partial(x + i, n - i) - broadcast(*max_out)));
        for (int lane = 0; lane < n - i; ++lane)
            sums[lane] += double(terms[lane]);
    }
    *sum_exp = 0.0;
    for (double sum : sums)
        *sum_exp += sum;
}

}  // namespace

const VectorOps vector_ops = {rms_norm,      layer_norm, activate, activate_mul,
                              relu_relu_mul, add,        rope,     max_and_sum_exp};

}  // namespace qi::kernels::QI_SIMD_LEVEL
