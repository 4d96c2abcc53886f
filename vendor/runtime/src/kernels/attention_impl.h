// Attention over a Vec; each instruction set's attention.cpp includes this after its simd_*.h.
//
// For every query and page, whatever is computed beside them:
//   s_i = scale · Σ_d q[d] · K[d][i]   one chain of fma over ascending d, from zero; lanes are
//   positions m = max s_i, p_i = exp(s_i - m), l = Σ p_i o[d] = Σ_i p_i · V[i][d]           one
//   chain of fma over ascending visible i, from zero
// and the partials (m, l, o) are merged in ascending order of page. Q8_0 enters as code · scale,
// which float holds exactly, so a page gives the same bits whether it is converted on the fly or
// into a tile first.
#pragma once

#include "kernels/attention_layout.h"
#include "kernels/attention_table.h"
#include "kernels/simd_math.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// Asks for what lies `ahead` bytes after [from, from + n_bytes), line by line.
inline void prefetch(const void* from, intptr_t ahead, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(intptr_t(from) + ahead + i));
}

// Keys and values of a page as vectors of floats: at(d, position) along positions, at(position, d)
// along dimensions; tail is the last n < width dimensions of a value. prefetch(..., n) asks for the
// place in the next page of n vectors.
struct F16Keys {
    const uint16_t* data;  // [head_dim][page_size]
    intptr_t ahead;        // from this page to the next, in bytes
    Vec at(int64_t d, int64_t position) const { return load_f16(data + d * page_size + position); }
    void prefetch(int64_t d, int64_t position, int n) const {
        QI_SIMD_LEVEL::prefetch(data + d * page_size + position, ahead, n * width * 2);
    }
};
struct F16Values {
    const uint16_t* data;  // [page_size][head_dim]
    intptr_t ahead;
    int64_t head_dim;
    Vec at(int64_t position, int64_t d) const { return load_f16(data + position * head_dim + d); }
    Vec tail(int64_t position, int64_t d, int64_t n) const {
        return load_f16_partial(data + position * head_dim + d, n);
    }
    void prefetch(int64_t position, int64_t d, int n) const {
        QI_SIMD_LEVEL::prefetch(data + position * head_dim + d, ahead, n * width * 2);
    }
};
struct Q8Keys {
    const int8_t* codes;  // [head_dim][page_size]
    const float* scales;  // [head_dim/32][page_size]
    intptr_t ahead;
    Vec at(int64_t d, int64_t position) const {
        return load_i8(codes + d * page_size + position) *
               load(scales + d / q8_block * page_size + position);
    }
    void prefetch(int64_t d, int64_t position, int n) const {
        QI_SIMD_LEVEL::prefetch(codes + d * page_size + position, ahead, n * width);
    }
};
struct Q8Values {
    const int8_t* codes;  // [page_size][head_dim]
    const float* scales;  // [page_size][head_dim/32]
    intptr_t ahead;
    int64_t head_dim;  // a multiple of 32, so there is no tail
    Vec at(int64_t position, int64_t d) const {
        return load_i8(codes + position * head_dim + d) *
               broadcast(scales[(position * head_dim + d) / q8_block]);
    }
    Vec tail(int64_t position, int64_t d, int64_t) const { return at(position, d); }
    void prefetch(int64_t position, int64_t d, int n) const {
        QI_SIMD_LEVEL::prefetch(codes + position * head_dim + d, ahead, n * width);
    }
};
struct FloatKeys {
    const float* data;  // [head_dim][page_size]
    Vec at(int64_t d, int64_t position) const { return load(data + d * page_size + position); }
    void prefetch(int64_t, int64_t, int) const {}
};
struct FloatValues {
    const float* data;  // [page_size][padded_dim]
    int64_t padded_dim;
    Vec at(int64_t position, int64_t d) const { return load(data + position * padded_dim + d); }
    Vec tail(int64_t position, int64_t d, int64_t) const { return at(position, d); }
    void prefetch(int64_t, int64_t, int) const {}
};

// Room of one call.
struct Scratch {
    int64_t head_dim, padded_dim;
    float* key_tile;    // [head_dim][page_size]
    float* value_tile;  // [page_size][padded_dim]
    float* scales;      // [2][head_dim/32][page_size], of Q8_0 keys and values
    float* weights;     // [query_block][page_size], scores and then their exponentials
    float* partial;     // [query_block][padded_dim]
    float* maximum;     // [n_queries]
    float* sum;         // [n_queries]
    int32_t* active;    // [n_queries], the queries that see a page

    Scratch(std::byte* room, int64_t dim, int64_t n_queries) : head_dim(dim) {
        padded_dim = (dim + row_padding - 1) / row_padding * row_padding;
        key_tile = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room) + 63) / 64 * 64);
        value_tile = key_tile + dim * page_size;
        scales = value_tile + page_size * padded_dim;
        weights = scales + 2 * (dim / q8_block) * page_size;
        partial = weights + query_block * page_size;
        maximum = partial + query_block * padded_dim;
        sum = maximum + n_queries;
        active = reinterpret_cast<int32_t*>(sum + n_queries);
    }
};

// The two forms a page is stored in.
struct F16Page {
    F16Keys keys;
    F16Values values;
    F16Page(const std::byte* page, intptr_t ahead, const Scratch& scratch) {
        const auto* data = reinterpret_cast<const uint16_t*>(page);
        keys = {data, ahead};
        values = {data + scratch.head_dim * page_size, ahead, scratch.head_dim};
    }
};
struct Q8Page {
    Q8Keys keys;
    Q8Values values;
    Q8Page(const std::byte* page, intptr_t ahead, const Scratch& scratch) {
        const int64_t n = scratch.head_dim * page_size, n_scales = n / q8_block;
        const std::byte* value_codes = page + n + n_scales * 2;
        keys = {reinterpret_cast<const int8_t*>(page), scratch.scales, ahead};
        values = {reinterpret_cast<const int8_t*>(value_codes), scratch.scales + n_scales, ahead,
                  scratch.head_dim};
        const auto* key_scales = reinterpret_cast<const uint16_t*>(page + n);
        const auto* value_scales = reinterpret_cast<const uint16_t*>(value_codes + n);
        prefetch(key_scales, ahead, n_scales * 2);
        prefetch(value_scales, ahead, n_scales * 2);
        for (int64_t i = 0; i < n_scales; i += width) {
            store(scratch.scales + i, load_f16(key_scales + i));
            store(scratch.scales + n_scales + i, load_f16(value_scales + i));
        }
    }
};

// As many accumulators as the registers hold beside what a step loads, up to `limit` vectors per
// query.
constexpr int vectors_per_query(int n_q, int limit) {
    int n = limit;
    while (n * n_q > (n_registers == 32 ? 24 : 12))
        n /= 2;
    return n;
}

// acc[j][v] += weight_j · vector_v, with the fewer of both kept in registers.
template <int n_q, int n_vec, class Weight, class Vector>
inline __attribute__((always_inline)) void accumulate(Vec (&acc)[n_q][n_vec], Weight weight,
                                                      Vector vector) {
    if constexpr (n_q <= n_vec) {
        Vec w[n_q];
#pragma GCC unroll 8
        for (int j = 0; j < n_q; ++j)
            w[j] = broadcast(weight(j));
#pragma GCC unroll 8
        for (int v = 0; v < n_vec; ++v) {
            const Vec x = vector(v);
#pragma GCC unroll 8
            for (int j = 0; j < n_q; ++j)
                acc[j][v] = fma(w[j], x, acc[j][v]);
        }
    } else {
        Vec x[n_vec];
#pragma GCC unroll 8
        for (int v = 0; v < n_vec; ++v)
            x[v] = vector(v);
#pragma GCC unroll 8
        for (int j = 0; j < n_q; ++j) {
            const Vec w = broadcast(weight(j));
#pragma GCC unroll 8
            for (int v = 0; v < n_vec; ++v)
                acc[j][v] = fma(w, x[v], acc[j][v]);
        }
    }
}

// Scores of n_q queries at n_vec vectors of positions, from `position` on.
template <int n_q, int n_vec, class Keys>
void score_tile(const float* const (&q)[n_q], float scale, const Keys& keys, int64_t head_dim,
                int position, float* scores) {
    Vec acc[n_q][n_vec];
#pragma GCC unroll 8
    for (int j = 0; j < n_q; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < n_vec; ++v)
            acc[j][v] = broadcast(0.0f);
    for (int64_t d = 0; d < head_dim; ++d) {
        keys.prefetch(d, position, n_vec);
        accumulate(
            acc, [&](int j) { return q[j][d]; },
            [&](int v) { return keys.at(d, position + v * width); });
    }
#pragma GCC unroll 8
    for (int j = 0; j < n_q; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < n_vec; ++v)
            store(scores + j * page_size + position + v * width, acc[j][v] * broadcast(scale));
}

// partial[j][d ...] += Σ weights[j][i] · value i, i in [begin, end), for n_vec vectors of
// dimensions; tail is the number of dimensions when the vector is not whole.
template <int n_q, int n_vec, bool whole, class Values>
void weigh_tile(const float* weights, int begin, int end, const Values& values, int64_t d,
                int64_t tail, float* partial, int64_t padded_dim) {
    Vec acc[n_q][n_vec];
#pragma GCC unroll 8
    for (int j = 0; j < n_q; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < n_vec; ++v)
            acc[j][v] = load(partial + j * padded_dim + d + v * width);
    for (int i = begin; i < end; ++i) {
        values.prefetch(i, d, n_vec);
        accumulate(
            acc, [&](int j) { return weights[j * page_size + i]; },
            [&](int v) {
                if constexpr (whole)
                    return values.at(i, d + v * width);
                else
                    return values.tail(i, d, tail);
            });
    }
#pragma GCC unroll 8
    for (int j = 0; j < n_q; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < n_vec; ++v)
            store(partial + j * padded_dim + d + v * width, acc[j][v]);
}

// The same for all dimensions from d on, in tiles of n_vec vectors and then of fewer.
template <int n_q, int n_vec, class Values>
void weigh_from(int64_t d, const float* weights, int begin, int end, const Values& values,
                int64_t head_dim, float* partial, int64_t padded_dim) {
    for (; d + n_vec * width <= head_dim; d += n_vec * width)
        weigh_tile<n_q, n_vec, true>(weights, begin, end, values, d, 0, partial, padded_dim);
    if constexpr (n_vec > 1)
        weigh_from<n_q, n_vec / 2>(d, weights, begin, end, values, head_dim, partial, padded_dim);
    else if (d < head_dim)
        weigh_tile<n_q, 1, false>(weights, begin, end, values, d, head_dim - d, partial,
                                  padded_dim);
}

template <int n_q, class Values>
inline void weigh(const float* weights, int begin, int end, const Values& values,
                  const Scratch& scratch, float* partial) {
    if (begin < end)
        weigh_from<n_q, vectors_per_query(n_q, 8)>(0, weights, begin, end, values, scratch.head_dim,
                                                   partial, scratch.padded_dim);
}

// Turns each query's scores of a page, -infinity where it does not look, into exp(score - maximum);
// gives maxima and sums. The queries go through each step together, so that the latencies of their
// reductions overlap.
template <int n_q>
inline void exponentiate(float* scores, float* maximum, float* total) {
    for (int j = 0; j < n_q; ++j) {
        // Finite even when all scores are -infinity, so that their exponentials are 0 and not NaN.
        Vec largest = broadcast(-__FLT_MAX__);
        for (int i = 0; i < page_size; i += width)
            largest = max(largest, load(scores + j * page_size + i));
        maximum[j] = max_lane(largest);
    }
    Vec sums[n_q];
    for (int j = 0; j < n_q; ++j) {
        sums[j] = broadcast(0.0f);
        for (int i = 0; i < page_size; i += width) {
            float* at = scores + j * page_size + i;
            const Vec e = exp(load(at) - broadcast(maximum[j]));
            store(at, e);
            sums[j] = sums[j] + e;
        }
    }
    for (int j = 0; j < n_q; ++j)
        total[j] = sum(sums[j]);
}

// out[d] = out[d] · keep + part[d] · take; part has room for whole vectors.
inline void merge(float* out, const float* part, int64_t n, float keep, float take) {
    const Vec kept = broadcast(keep), taken = broadcast(take);
    int64_t d = 0;
    for (; d + width <= n; d += width)
        store(out + d, fma(load(part + d), taken, load(out + d) * kept));
    if (d < n)
        store_partial(out + d, fma(load(part + d), taken, load_partial(out + d, n - d) * kept),
                      n - d);
}

// The positions in page [start, start + page_size) that a query sees, as [begin, end); empty when
// begin >= end.
struct Sight {
    int begin, end;
    Sight(const AttentionArgs& args, const AttentionQuery& query, int64_t start) {
        const int64_t last = query.position - start;
        int64_t first = args.window > 0 ? last - args.window + 1 : 0;
        first = args.first - start > first ? args.first - start : first;
        begin = first > 0 ? int(first < page_size ? first : page_size) : 0;
        end = last < page_size ? int(last + 1) : page_size;
        if (last < 0) end = 0;
    }
};

// Adds what n_q queries see of the page that begins at position `start`.
template <int n_q, class Keys, class Values>
void attend_block(const AttentionArgs& args, const int32_t* active, int64_t start, const Keys& keys,
                  const Values& values, const Scratch& scratch) {
    const int64_t head_dim = scratch.head_dim, padded_dim = scratch.padded_dim;
    const float* q[n_q];
    int begin[n_q], end[n_q];
    int first = page_size, last = 0;               // what any of the queries sees
    int common_begin = 0, common_end = page_size;  // what all of them see
    for (int j = 0; j < n_q; ++j) {
        const AttentionQuery& query = args.queries[active[j]];
        const Sight sight(args, query, start);
        q[j] = query.q;
        begin[j] = sight.begin;
        end[j] = sight.end;
        first = begin[j] < first ? begin[j] : first;
        last = end[j] > last ? end[j] : last;
        common_begin = begin[j] > common_begin ? begin[j] : common_begin;
        common_end = end[j] < common_end ? end[j] : common_end;
    }

    constexpr int n_vec = vectors_per_query(n_q, page_size / width < 8 ? page_size / width : 8);
    constexpr int step = n_vec * width;
    for (int position = first / step * step; position < last; position += step)
        score_tile<n_q, n_vec>(q, args.scale, keys, head_dim, position, scratch.weights);

    constexpr int lanes = (n_q + width - 1) / width * width;
    float page_max[lanes] = {}, page_sum[lanes] = {}, old_max[lanes] = {}, old_sum[lanes] = {};
    for (int j = 0; j < n_q; ++j) {
        float* scores = scratch.weights + j * page_size;
        for (int i = 0; i < begin[j]; ++i)
            scores[i] = -__builtin_inff();
        for (int i = end[j]; i < page_size; ++i)
            scores[i] = -__builtin_inff();
        old_max[j] = scratch.maximum[active[j]];
        old_sum[j] = scratch.sum[active[j]];
    }
    exponentiate<n_q>(scratch.weights, page_max, page_sum);

    // Values that only some of the queries see are skipped by the others, not multiplied by zero:
    // they may be garbage.
    for (int64_t i = 0; i < n_q * padded_dim; ++i)
        scratch.partial[i] = 0.0f;
    if (common_begin >= common_end) common_begin = common_end = page_size;
    for (int j = 0; j < n_q; ++j)
        weigh<1>(scratch.weights + j * page_size, begin[j],
                 end[j] < common_begin ? end[j] : common_begin, values, scratch,
                 scratch.partial + j * padded_dim);
    weigh<n_q>(scratch.weights, common_begin, common_end, values, scratch, scratch.partial);
    for (int j = 0; j < n_q; ++j)
        weigh<1>(scratch.weights + j * page_size, common_end, end[j], values, scratch,
                 scratch.partial + j * padded_dim);

    float keep[lanes], take[lanes];  // factors of the old and the page's part
    for (int j = 0; j < lanes; j += width) {
        const Vec top = max(load(old_max + j), load(page_max + j));
        const Vec kept = exp(load(old_max + j) - top), taken = exp(load(page_max + j) - top);
        store(keep + j, kept);
        store(take + j, taken);
        store(old_max + j, top);
        store(old_sum + j, fma(load(page_sum + j), taken, load(old_sum + j) * kept));
    }
    for (int j = 0; j < n_q; ++j) {
        scratch.maximum[active[j]] = old_max[j];
        scratch.sum[active[j]] = old_sum[j];
        merge(args.queries[active[j]].out, scratch.partial + j * padded_dim, head_dim, keep[j],
              take[j]);
    }
}

template <class Keys, class Values>
void attend_page(const AttentionArgs& args, int64_t n_active, int64_t start, const Keys& keys,
                 const Values& values, const Scratch& scratch) {
    // Blocks as even as possible: 4 + 4 queries cost less than 6 + 2.
    const int64_t n_blocks = (n_active + query_block - 1) / query_block;
    for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t begin = b * n_active / n_blocks, end = (b + 1) * n_active / n_blocks;
        const int32_t* active = scratch.active + begin;
        switch (end - begin) {
            case 1:
                attend_block<1>(args, active, start, keys, values, scratch);
                break;
            case 2:
                attend_block<2>(args, active, start, keys, values, scratch);
                break;
            case 3:
                attend_block<3>(args, active, start, keys, values, scratch);
                break;
            case 4:
                attend_block<4>(args, active, start, keys, values, scratch);
                break;
            case 5:
                attend_block<5>(args, active, start, keys, values, scratch);
                break;
            default:
                attend_block<query_block>(args, active, start, keys, values, scratch);
        }
    }
}

// Converts a page once for all blocks of queries.
template <class Keys, class Values>
void fill_tiles(const Keys& keys, const Values& values, const Scratch& scratch) {
    const int64_t head_dim = scratch.head_dim;
    for (int64_t d = 0; d < head_dim; ++d) {
        keys.prefetch(d, 0, page_size / width);
        for (int64_t position = 0; position < page_size; position += width)
            store(scratch.key_tile + d * page_size + position, keys.at(d, position));
    }
    for (int64_t position = 0; position < page_size; ++position) {
        float* row = scratch.value_tile + position * scratch.padded_dim;
        values.prefetch(position, 0, int((head_dim + width - 1) / width));
        int64_t d = 0;
        for (; d + width <= head_dim; d += width)
            store(row + d, values.at(position, d));
        if (d < head_dim) store(row + d, values.tail(position, d, head_dim - d));
    }
}

template <class Page>
void attend_pages(const AttentionArgs& args, const Scratch& scratch) {
    int64_t first_page = INT64_MAX, last_page = 0;
    for (int64_t i = 0; i < args.n_queries; ++i) {
        const int64_t position = args.queries[i].position;
        int64_t first = args.window > 0 && position >= args.window ? position - args.window + 1 : 0;
        first = args.first > first ? args.first : first;
        first_page = first / page_size < first_page ? first / page_size : first_page;
        last_page = position / page_size > last_page ? position / page_size : last_page;
        for (int64_t d = 0; d < args.head_dim; ++d)
            args.queries[i].out[d] = 0.0f;
        scratch.maximum[i] = -__FLT_MAX__;
        scratch.sum[i] = 0.0f;
    }
    for (int64_t p = first_page; p <= last_page; ++p) {
        const int64_t start = p * page_size;
        int64_t n_active = 0;
        for (int64_t i = 0; i < args.n_queries; ++i) {
            const Sight sight(args, args.queries[i], start);
            scratch.active[n_active] = int32_t(i);
            n_active += sight.begin < sight.end;
        }
        if (n_active == 0) continue;
        const std::byte* next = args.pages[p < last_page ? p + 1 : p];
        const Page page(args.pages[p], intptr_t(next) - intptr_t(args.pages[p]), scratch);
        // Converting twice on the fly costs less than writing tiles and reading them back.
        if (n_active <= 2 * query_block) {
            attend_page(args, n_active, start, page.keys, page.values, scratch);
        } else {
            fill_tiles(page.keys, page.values, scratch);
            attend_page(args, n_active, start, FloatKeys{scratch.key_tile},
                        FloatValues{scratch.value_tile, scratch.padded_dim}, scratch);
        }
    }
    for (int64_t i = 0; i < args.n_queries; ++i) {
        if (float* terms = args.queries[i].terms) {
            terms[0] = scratch.maximum[i];
            terms[1] = scratch.sum[i];
            continue;
        }
        const float inverse = 1.0f / scratch.sum[i];
        for (int64_t d = 0; d < args.head_dim; ++d)
            args.queries[i].out[d] *= inverse;
    }
}

void attend(const AttentionArgs& args, std::byte* room) {
    const Scratch scratch(room, args.head_dim, args.n_queries);
    if (args.kv_type == Type::f16)
        attend_pages<F16Page>(args, scratch);
    else
        attend_pages<Q8Page>(args, scratch);
}

// Both stores write element i of the n at to[i * stride].
void store_halves(const float* from, int64_t n, uint16_t* to, int64_t stride) {
    uint16_t halves[width];
    for (int64_t i = 0; i < n; i += width) {
        const int64_t rest = n - i < width ? n - i : width;
        store_f16(halves, load_partial(from + i, rest));
        for (int64_t j = 0; j < rest; ++j)
            to[(i + j) * stride] = halves[j];
    }
}

// One block of Q8_0. A value that is not finite makes its whole block NaN, rather than vanish.
void store_q8_block(const float* from, int8_t* codes, int64_t stride, uint16_t* scale) {
    const Vec zero = broadcast(0.0f);
    Vec largest = zero, not_finite = zero;
    for (int i = 0; i < q8_block; i += width) {
        const Vec x = load(from + i);
        largest = max(largest, abs(x));
        not_finite = not_finite + (x - x);
    }
    uint16_t halves[width];
    store_f16(halves, broadcast(max_lane(largest) / 127.0f + sum(not_finite)));
    *scale = halves[0];
    float rounded[width];  // the scale as it will be read
    store(rounded, load_f16(halves));
    const float inverse = rounded[0] > 0.0f ? 1.0f / rounded[0] : 0.0f;
    for (int i = 0; i < q8_block; i += width) {
        const Vec code = inverse > 0.0f ? round(load(from + i) * broadcast(inverse)) : zero;
        float lanes[width];
        store(lanes, min(max(code, broadcast(-127.0f)), broadcast(127.0f)));
        for (int j = 0; j < width; ++j)
            codes[(i + j) * stride] = int8_t(lanes[j]);
    }
}

void kv_store(Type kv_type, int64_t head_dim, int slot, const float* key, const float* value,
              std::byte* head_page) {
    const int64_t n = head_dim * page_size;
    if (kv_type == Type::f16) {
        auto* keys = reinterpret_cast<uint16_t*>(head_page);
        store_halves(key, head_dim, keys + slot, page_size);
        store_halves(value, head_dim, keys + n + slot * head_dim, 1);
        return;
    }
    const int64_t n_blocks = head_dim / q8_block;
    auto* key_codes = reinterpret_cast<int8_t*>(head_page);
    auto* key_scales = reinterpret_cast<uint16_t*>(key_codes + n);
    int8_t* value_codes = key_codes + n + n_blocks * page_size * 2;
    auto* value_scales = reinterpret_cast<uint16_t*>(value_codes + n);
    for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t d = b * q8_block;
        store_q8_block(key + d, key_codes + d * page_size + slot, page_size,
                       key_scales + b * page_size + slot);
        store_q8_block(value + d, value_codes + slot * head_dim + d, 1,
                       value_scales + slot * n_blocks + b);
    }
}

}  // namespace

const AttentionOps attention_ops = {kv_store, attend};

}  // namespace qi::kernels::QI_SIMD_LEVEL
