// Codecs: what they refuse, and the choice of instruction set.
#include "quant/codec.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "quant/codec_table.h"

namespace qi {

namespace codecs {

const Codec* codec_for(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return &portable::codec;
#if defined(__x86_64__)
        case Isa::avx2:
            return &avx2::codec;
        case Isa::avx512:
            return &avx512::codec;
#elif defined(__aarch64__)
        case Isa::neon:
            return &neon::codec;
#endif
        default:
            return nullptr;
    }
}

}  // namespace codecs

namespace {

// Elements looked at, decoded or encoded together: a multiple of every block size, and 4 KiB of
// floats, so that the first-level cache holds them from one step to the next.
constexpr int64_t n_together = 1024;

const codecs::Codec& active() {
    static const codecs::Codec& codec = *codecs::codec_for(active_isa());
    return codec;
}

// `first` is the index of the first value, for the message.
void require_within(Type type, const float* values, int64_t n, float limit, int64_t first) {
    if (active().all_within(values, n, limit)) return;
    int64_t i = 0;
    while (std::fabs(values[i]) <= limit)
        i++;
    if (std::isfinite(values[i]))
        fail(QI_ARGUMENT, "cannot encode %s: value %lld is %g, and it holds numbers up to %g",
             traits(type).name, static_cast<long long>(first + i), double(values[i]),
             double(limit));
    fail(QI_ARGUMENT, "cannot encode %s: value %lld is %s, and only finite values can be",
         traits(type).name, static_cast<long long>(first + i),
         std::isnan(values[i]) ? "NaN" : "infinite");
}

void require_weights(const float* importance, int64_t n_per_row) {
    for (int64_t i = 0; i < n_per_row; i++) {
        if (!(importance[i] >= 0.0f && std::isfinite(importance[i])))
            fail(QI_ARGUMENT,
                 "the importance of column %lld is %g; it must be 0 or more and finite",
                 static_cast<long long>(i), double(importance[i]));
    }
}

// Calls piece(first, n, importance of these) for pieces of up to n_together elements. A row that
// importance belongs to is not crossed.
template <class Piece>
void in_pieces(int64_t n, int64_t n_per_row, const float* importance, const Piece& piece) {
    const int64_t run = importance ? n_per_row : n;
    for (int64_t row = 0; row < n; row += run) {
        for (int64_t i = 0; i < run; i += n_together)
            piece(row + i, std::min(n_together, run - i), importance ? importance + i : nullptr);
    }
}

}  // namespace

float greatest(Type type) {
    switch (type) {
        case Type::f32:
            return FLT_MAX;
        case Type::bf16:
            return 0x1.fep127f;
        default:
            return 65504.0f;
    }
}

void decode(Type type, const std::byte* blocks, int64_t n, float* out) {
    active().decode(type, blocks, n, out);
}

void encode(Type type, const float* values, int64_t n, int64_t n_per_row, const float* importance,
            std::byte* blocks) {
    if (importance) require_weights(importance, n_per_row);
    in_pieces(n, n_per_row, importance, [&](int64_t first, int64_t count, const float* weights) {
        require_within(type, values + first, count, FLT_MAX, first);
        active().encode(type, values + first, count, weights, blocks + row_bytes(type, first));
    });
}

void convert(Type from, const std::byte* blocks, int64_t n, int64_t n_per_row,
             const float* importance, Type to, std::byte* out) {
    if (importance) require_weights(importance, n_per_row);
    alignas(64) float values[n_together];
    in_pieces(n, n_per_row, importance, [&](int64_t first, int64_t count, const float* weights) {
        active().decode(from, blocks + row_bytes(from, first), count, values);
        require_within(to, values, count, greatest(to), first);
        if (out && from != to)
            active().encode(to, values, count, weights, out + row_bytes(to, first));
    });
    if (out && from == to) std::memcpy(out, blocks, row_bytes(to, n));
}

}  // namespace qi
