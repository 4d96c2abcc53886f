// PTX instructions that a warp carries out together. Each lane hands in its operands; the last one
// to come computes for all. Fragments of matrices are laid out as the PTX ISA lists them.
#pragma once

#include "ptx_unit.h"

#pragma GCC push_options
#pragma GCC optimize("O2")

namespace ptx {

constexpr u32 whole_warp = 0xffffffffu;

// This lane's number: those of a warp follow each other in x, then y, then z.
inline u32 lane_id() {
    const QiLane& lane = *qi_standin_lane;
    const u32 row = lane.thread.z * lane.block_dim.y + lane.thread.y;
    return (row * lane.block_dim.x + lane.thread.x) % 32;
}

// ---- shuffles and votes ----

enum class Shuffle { up, down, bfly, idx };

struct Shuffled {
    u32 value, b, c;  // operands
    u32 result;
    bool in_range;
};

template <Shuffle mode>
QI_NOINLINE void shuffle_warp(void* const* lanes) {
    for (int lane = 0; lane < 32; lane++) {
        if (!lanes[lane]) continue;
        Shuffled& mine = *static_cast<Shuffled*>(lanes[lane]);
        const int b = mine.b & 31u, clamp = mine.c & 31u, segments = mine.c >> 8 & 31u;
        const int first = lane & segments, last = first | (clamp & ~segments);
        int from = 0;
        if (mode == Shuffle::up) {
            from = lane - b;
            mine.in_range = from >= last;
        } else {
            if (mode == Shuffle::down) from = lane + b;
            if (mode == Shuffle::bfly) from = lane ^ b;
            if (mode == Shuffle::idx) from = first | (b & ~segments);
            mine.in_range = from <= last;
        }
        if (!mine.in_range) from = lane;
        if (!lanes[from])
            qi_standin_fault("a shuffle reads from a lane outside its mask", "PTX", 0);
        mine.result = static_cast<Shuffled*>(lanes[from])->value;
    }
}
// Not inlined: kernels have hundreds of them.
template <Shuffle mode>
QI_NOINLINE Shuffled shfl_sync(u32 value, u32 b, u32 c, u32 mask) {
    Shuffled mine = {value, b, c, 0, false};
    qi_standin_warp_call(mask, shuffle_warp<mode>, &mine, 0);
    return mine;
}

struct Vote {
    bool yes;
    u32 ballot;
};

QI_NOINLINE inline void vote_warp(void* const* lanes) {
    u32 ballot = 0;
    for (int lane = 0; lane < 32; lane++)
        ballot |= static_cast<u32>(lanes[lane] && static_cast<Vote*>(lanes[lane])->yes) << lane;
    for (int lane = 0; lane < 32; lane++) {
        if (lanes[lane]) static_cast<Vote*>(lanes[lane])->ballot = ballot;
    }
}
QI_NOINLINE inline u32 vote_ballot(bool yes, u32 mask) {
    Vote mine = {yes, 0};
    qi_standin_warp_call(mask, vote_warp, &mine, 0);
    return mine.ballot;
}

inline void bar_warp_sync(u32 mask) {
    qi_standin_collective(qi_syncwarp, mask, 0, 0, 32);
}

// ---- ldmatrix, .m8n8.b16 ----

// `at` of lane 8 i + r: row r of matrix i, 8 halves. words[i]: the lane's fragment of matrix i.
template <int n>
struct MatrixLoad {
    const u16* at;
    u32 words[n];
};

template <int n, bool transposed>
QI_NOINLINE void ldmatrix_warp(void* const* lanes) {
    for (int lane = 0; lane < 32; lane++) {
        auto& mine = *static_cast<MatrixLoad<n>*>(lanes[lane]);
        for (int i = 0; i < n; i++) {
            const auto element = [&](int row, int column) -> u32 {
                return static_cast<MatrixLoad<n>*>(lanes[8 * i + row])->at[column];
            };
            const int major = lane / 4, minor = lane % 4 * 2;
            mine.words[i] = transposed ? element(minor, major) | element(minor + 1, major) << 16
                                       : element(major, minor) | element(major, minor + 1) << 16;
        }
    }
}
template <int n, bool transposed>
QI_NOINLINE MatrixLoad<n> ldmatrix(const u16* at, unsigned line) {
    MatrixLoad<n> mine = {at, {}};
    qi_standin_warp_call(whole_warp, ldmatrix_warp<n, transposed>, &mine, line);
    return mine;
}

// ---- mma, .row.col ----

// Where element i of a lane's fragment lies in its matrix, by the tables of the ISA.
struct Place {
    int row, column;
};

// Elements of A and B per word, and how words of A and B follow each other: 4 bytes, or 2 halves.
template <int m, int k, int per_word>
struct Fragments {
    static constexpr int group_of(int lane) { return lane >> 2; }
    static constexpr int in_group(int lane) { return lane % 4; }
    static constexpr int half_k = 4 * per_word;  // columns that one word of every lane covers
    static constexpr int a_words = m / 8 * (k / half_k), b_words = k / half_k, d_values = m / 4;

    static constexpr Place a(int lane, int i) {
        const int word = i / per_word;
        const bool lower = m == 16 && word % 2 == 1;
        const bool second = m == 16 ? word >= 2 : word >= 1;
        return {group_of(lane) + (lower ? 8 : 0),
                in_group(lane) * per_word + i % per_word + (second ? half_k : 0)};
    }
    static constexpr Place b(int lane, int i) {
        return {in_group(lane) * per_word + i % per_word + i / per_word * half_k, group_of(lane)};
    }
    static constexpr Place d(int lane, int i) {
        return {group_of(lane) + (i < 2 ? 0 : 8), in_group(lane) * 2 + (i & 1)};
    }
};

template <class Sum, int m, int k, int per_word>
struct Mma {
    using Layout = Fragments<m, k, per_word>;
    u32 a[Layout::a_words], b[Layout::b_words];
    Sum d[Layout::d_values];  // C, then D
};

// n products and a term, summed as tensor cores are known to: terms are cut off, not rounded, below
// a bit under the largest's last place, and so is the sum. (M. Fasi et al., Numerical behavior of
// NVIDIA tensor cores, 2021.)
inline f32 cut_sum(const f64* terms, int n, f32 start) {
    f64 largest = start < 0 ? -f64(start) : f64(start);
    f64 plain = start;
    for (int i = 0; i < n; i++) {
        const f64 magnitude = terms[i] < 0 ? -terms[i] : terms[i];
        largest = magnitude > largest ? magnitude : largest;
        plain += terms[i];
    }
    if (plain - plain != 0.0) return static_cast<f32>(plain);  // an infinity or NaN
    if (largest == 0.0) return 0.0f;
    const int exponent = static_cast<int>(bits(largest) >> 52 & 2047u) - 1023;
    if (exponent < -500) return 0.0f;
    const f64 scale = power_of_two(24 - exponent);
    i64 sum = static_cast<i64>(start * scale);
    for (int i = 0; i < n; i++)
        sum += static_cast<i64>(terms[i] * scale);
    const f64 value = static_cast<f64>(sum) * power_of_two(exponent - 24);
    const f32 nearest = static_cast<f32>(value);
    const bool above = nearest > 0 ? nearest > value : nearest < value;
    return above ? as_f32(bits(nearest) - 1) : nearest;
}

template <int k>
inline i32 product(const i32 (&row)[k], const i32 (&column)[k], i32 sum) {
    for (int i = 0; i < k; i++)
        sum = static_cast<i32>(static_cast<u32>(sum) + static_cast<u32>(row[i] * column[i]));
    return sum;
}
template <int k>
inline f32 product(const f32 (&row)[k], const f32 (&column)[k], f32 sum) {
    for (int first = 0; first < k; first += 8) {
        f64 terms[8];
        for (int i = 0; i < 8; i++)
            terms[i] = f64(row[first + i]) * f64(column[first + i]);
        sum = cut_sum(terms, 8, sum);
    }
    return sum;
}

// Element i of packed words: a signed byte or a half.
template <class Sum>
inline Sum element(const u32* words, int i);
template <>
inline i32 element<i32>(const u32* words, int i) {
    return i8(words[i / 4] >> 8 * (i % 4));
}
template <>
inline f32 element<f32>(const u32* words, int i) {
    return f32_of_f16(u16(words[i / 2] >> 16 * (i % 2)));
}

template <class Sum, int m, int k, int per_word>
QI_NOINLINE void mma_warp(void* const* lanes) {
    using Operands = Mma<Sum, m, k, per_word>;
    using Layout = typename Operands::Layout;
    Sum a[m][k], b[8][k];  // b: by column
    for (int lane = 0; lane < 32; lane++) {
        const auto& mine = *static_cast<Operands*>(lanes[lane]);
        for (int i = 0; i < Layout::a_words * per_word; i++) {
            const Place at = Layout::a(lane, i);
            a[at.row][at.column] = element<Sum>(mine.a, i);
        }
        for (int i = 0; i < Layout::b_words * per_word; i++) {
            const Place at = Layout::b(lane, i);
            b[at.column][at.row] = element<Sum>(mine.b, i);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        auto& mine = *static_cast<Operands*>(lanes[lane]);
        for (int i = 0; i < Layout::d_values; i++) {
            const Place at = Layout::d(lane, i);
            mine.d[i] = product<k>(a[at.row], b[at.column], mine.d[i]);
        }
    }
}
template <class Sum, int m, int k, int per_word>
inline void mma_sync(Mma<Sum, m, k, per_word>& mine, unsigned line) {
    qi_standin_warp_call(whole_warp, mma_warp<Sum, m, k, per_word>, &mine, line);
}

}  // namespace ptx

#pragma GCC pop_options
