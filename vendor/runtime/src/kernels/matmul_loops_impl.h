// Loops over rows and tokens that the block and the float kernels of one instruction set share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/matmul.h"
#include "kernels/prefetch_impl.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

// One call of matmul_rows, matmul_listed or matmul_groups.
struct Product {
    const Weight& w;
    int64_t row_end;
    const std::byte* prepared;
    int64_t n_tokens;
    float* y;
    int64_t y_stride;
    const int32_t* list = nullptr;    // [row_end]: row r is the weight's row list[r]
    int64_t places_ahead = 0;         // how many rows to fetch ahead where some are picked
    const int32_t* groups = nullptr;  // [n_groups]: the column groups to take, or all
    int64_t n_groups = 0;

    // Rows or columns are picked: no panel of whole rows is worth its unpacking.
    bool picks() const { return list || groups; }

    // Rows of a tile that reaches past row_end read the last row again; put() drops their results.
    const uint8_t* row(int64_t r) const {
        const int64_t inside = r < row_end ? r : row_end - 1;
        return reinterpret_cast<const uint8_t*>(w.data) +
               size_t(list ? list[inside] : inside) * w.row_bytes;
    }
    const uint8_t* weights_end() const {
        return reinterpret_cast<const uint8_t*>(w.data) + size_t(w.n_rows) * w.row_bytes;
    }
    // Results of n rows from r on.
    void put(int64_t r, int64_t token, const float* values, int64_t n) const {
        const int64_t inside = row_end - r < n ? row_end - r : n;
        __builtin_memcpy(y + token * y_stride + r, values, size_t(inside) * sizeof(float));
    }
};

// Calls body.operator()<n>(first) for tiles of n tokens, then for the rest in tiles of ever smaller
// powers of two.
template <int n, class Body>
inline void for_token_tiles(int64_t begin, int64_t end, Body body) {
    for (; end - begin >= n; begin += n)
        body.template operator()<n>(begin);
    if constexpr (n > 1) for_token_tiles<(n > 8 ? 8 : n > 4 ? 4 : n > 2 ? 2 : 1)>(begin, end, body);
}

inline constexpr int64_t cache_line = 64;
// Far enough that DRAM's latency passes before the bytes are used; nearer gave nothing, see the
// benchmark.
inline constexpr int64_t prefetch_distance = 8192;

// Starts fetching what lies ahead of n bytes at p, at the end of a row the rows after it. A hint
// only: it may point beyond the weights.
inline void prefetch_ahead(const uint8_t* p, int64_t n) {
    prefetch_from(p, prefetch_distance, n);
}

inline int64_t ceil_div(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

template <class T>
inline T* align_up(std::byte* p) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    return reinterpret_cast<T*>((address + cache_line - 1) / cache_line * cache_line);
}

}  // namespace

}  // namespace qi::kernels::QI_SIMD_LEVEL
