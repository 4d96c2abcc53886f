// Products with block formats: int8 activations, integer dot products inside a block, float sums
// across blocks.
//
// The order of float operations, per row and token: n_chains chains (8, or 16 in registers of 512
// bits), chain c taking blocks c, c + n_chains, ... of 32 weights. A block adds, for each of its
// parts (halves of 16 where the format has a scale per 16, else the whole 32),
//     chain = fma(float(Σ (code - offset) · x), weight scale · x scale, chain)
// and, in formats with a minimum, for each half of 16
//     chain = fma(minimum, x scale · Σ x, chain)
// Last the chains are added in the order of add_chains(). The integer sums are exact, so the order
// inside a block is free.
//
// A tile is `tile_rows` rows by one group of n_chains blocks, unpacked so that every dot
// instruction feeds all chains. Few tokens: each tile is unpacked in registers and used at once.
// Many tokens: the tiles of a panel of rows are unpacked to scratch that stays in L2, and tiles of
// tokens pass over it.
#pragma once

#include "kernels/matmul_layout.h"
#include "kernels/matmul_loops_impl.h"

namespace qi::kernels::QI_SIMD_LEVEL {

namespace {

inline constexpr int group_size = n_chains * chain_size;
inline constexpr int n_units = n_chains / unit_chains;  // of a group

inline constexpr int64_t direct_tokens = 4;        // up to here, no panel
inline constexpr size_t panel_bytes = 320 * 1024;  // of L2; the rest is for activations
inline constexpr int64_t panel_rows_max = 64;      // then unpacking costs little already
// Groups swept over at once: the activations of a tile of tokens take so much of L1, 32 KB or more.
// With 36 KB of them on Zen 4, prompts took 1.13 times as long.
inline constexpr size_t sweep_bytes = 24 * 1024;
inline constexpr int64_t sweep_groups = sweep_bytes / (tile_tokens * sizeof(Q8Group));

// Adds a tile's products with n tokens, taken a few at a time so that their chains of dot
// instructions overlap.
template <Type type, int n>
inline void add_products(const Tile<type>& tile, const Q8Group* x, Lanes (&chains)[n]) {
    constexpr Format format = format_of<type>;
    constexpr int part_steps = n_steps / format.parts;
    constexpr int together = n % dot_tokens == 0 ? dot_tokens : n % 4 == 0 ? 4 : n;
#pragma GCC unroll 16
    for (int first = 0; first < n; first += together) {
#pragma GCC unroll 2
        for (int p = 0; p < format.parts; ++p) {
            Ints sums[together];
#pragma GCC unroll 16
            for (int t = 0; t < together; ++t) {
                // -offset · Σ x of the part's halves
                const int low = p == 0 ? -dot_offset<type> : 0;
                const int high = p == format.parts - 1 ? -dot_offset<type> : 0;
                sums[t] =
                    dot_offset<type> ? weigh_pairs(x[first + t].sums, low, high) : zero_ints();
            }
            dot<type, part_steps>(sums, tile.codes + p * part_steps, x + first, p * part_steps);
#pragma GCC unroll 16
            for (int t = 0; t < together; ++t) {
                const Q8Group& token = x[first + t];
                Lanes& chain = chains[first + t];
                chain = fma(to_float(sums[t]), tile.factors[p] * load_lanes(token.scales), chain);
                if constexpr (format.minimum) {
                    const Lanes minimum = tile.factors[format.parts + p];
                    chain = fma(minimum, load_lanes(token.scaled_sums[p]), chain);
                    if (format.parts == 1)
                        chain = fma(minimum, load_lanes(token.scaled_sums[1]), chain);
                }
            }
        }
    }
}

// Stands for units beyond the end of a row.
alignas(64) inline constexpr uint8_t zero_unit[512] = {};

template <Type type>
struct BlockKernels {
    static constexpr Format format = format_of<type>;
    static constexpr int64_t group_bytes = n_units * format.unit_bytes;
    static constexpr int64_t block_bytes = format.unit_bytes / unit_chains;  // of 32 weights
    static constexpr int64_t column_group = group_size;

    // Rows of one tile, at their first group.
    struct Rows {
        const uint8_t* at[tile_rows];
        const uint8_t* ahead[tile_rows];  // the rows that many places on, where some are picked
        const uint8_t* end;               // of all weights

        Rows(const Product& product, int64_t row) : end(product.weights_end()) {
            for (int i = 0; i < tile_rows; ++i) {
                at[i] = product.row(row + i);
                if (product.picks()) ahead[i] = product.row(row + i + product.places_ahead);
            }
        }
        void unpack_whole(int64_t group, Tile<type>& tile) const {
            const uint8_t* units[tile_rows * n_units];
            for (int i = 0; i < tile_rows * n_units; ++i)
                units[i] = at[i / n_units] + group * group_bytes + i % n_units * format.unit_bytes;
            unpack(units, tile);
        }
        // A last group of n_blocks only. Whatever follows the row stands for the rest, with factors
        // of zero; activations are zeros there, too.
        void unpack_part(int64_t group, int64_t n_blocks, Tile<type>& tile) const {
            if constexpr (sum_tiles == width) {  // a tile is a row, its factors are a Vec
                if (at[0] + (group + 1) * group_bytes <= end) {
                    unpack_whole(group, tile);
                    for (auto& factor : tile.factors)
                        factor = select(first_lanes(n_blocks), factor, Vec{});
                    return;
                }
            }
            unpack_copy(group, n_blocks, tile);
        }
        // The same where nothing may follow: zeros stand for the rest.
        [[gnu::noinline]] void unpack_copy(int64_t group, int64_t n_blocks,
                                           Tile<type>& tile) const {
            static_assert(format.unit_bytes <= sizeof zero_unit);
            alignas(cache_line) uint8_t padded[tile_rows][format.unit_bytes];
            const uint8_t* units[tile_rows * n_units];
            for (int i = 0; i < tile_rows * n_units; ++i) {
                const int64_t n_before = i % n_units * unit_chains;
                const uint8_t* unit =
                    at[i / n_units] + group * group_bytes + n_before * block_bytes;
                units[i] = n_blocks <= n_before ? zero_unit : unit;
                if (n_blocks <= n_before || n_blocks - n_before >= unit_chains) continue;
                const auto n_bytes = size_t((n_blocks - n_before) * block_bytes);
                uint8_t* copy = padded[i / n_units];
                __builtin_memset(copy, 0, format.unit_bytes);
                __builtin_memcpy(copy, unit, n_bytes);
                units[i] = copy;
            }
            unpack(units, tile);
        }
        // In the order of addresses over all rows of the tile, though they are used side by side:
        // DRAM gives one stream faster than several. The last row is used that much ahead of its
        // place.
        void prefetch(int64_t group, bool picked) const {
            if (picked) {
                for (const uint8_t* row : ahead)
                    prefetch_lines(row + group * group_bytes, group_bytes);
                return;
            }
            prefetch_ahead(at[tile_rows - 1] + group * tile_rows * group_bytes,
                           tile_rows * group_bytes);
        }
    };

    static void rows(const Product& product, int64_t row_begin, std::byte* scratch) {
        if (product.n_tokens > direct_tokens && !product.picks()) {
            const int64_t step = panel_rows(product.w.n_cols);
            for (int64_t row = row_begin; row < product.row_end; row += step) {
                const int64_t end = row + step < product.row_end ? row + step : product.row_end;
                multiply_panel(product, row, end, scratch);
            }
            return;
        }
        for (int64_t row = row_begin; row < product.row_end; row += sum_rows)
            for_token_tiles<direct_tokens>(0, product.n_tokens, [&]<int n>(int64_t token) {
                Lanes chains[sum_tiles][n];
                const int64_t n_tiles = ceil_div(product.row_end - row, tile_rows);
                for (int i = 0; i < sum_tiles && i < n_tiles; ++i)
                    multiply_rows<n>(product, row + i * tile_rows, token, chains[i]);
                put<n>(product, row, n_tiles, token, chains[0], n);
            });
    }

    static size_t scratch_bytes(const Weight& w, int64_t n_tokens) {
        if (n_tokens <= direct_tokens) return 0;
        const int64_t n_tiles = panel_rows(w.n_cols) / tile_rows;
        const int64_t n_groups = ceil_div(w.n_cols, group_size);
        return size_t(n_tiles * n_groups) * sizeof(Tile<type>) +
               size_t(n_tiles * tile_tokens) * sizeof(Lanes) + size_t(cache_line);
    }

  private:
    static int64_t panel_rows(int64_t n_cols) {
        const auto tile_row_bytes = size_t(ceil_div(n_cols, group_size)) * sizeof(Tile<type>);
        const auto fitting = int64_t(panel_bytes / tile_row_bytes) * tile_rows;
        if (fitting < row_granularity) return row_granularity;
        return fitting < panel_rows_max ? fitting : panel_rows_max;
    }

    static const Q8Group* activations(const Product& product, int64_t group, int64_t token) {
        return reinterpret_cast<const Q8Group*>(product.prepared) + group * product.n_tokens +
               token;
    }

    // Adds the chains of n tokens in the first of n_tiles tiles from `row` on; a tile's lie
    // `stride` behind those of the one before.
    template <int n>
    static void put(const Product& product, int64_t row, int64_t n_tiles, int64_t token,
                    const Lanes* chains, int64_t stride) {
        const int64_t n_summed = n_tiles < sum_tiles ? n_tiles : sum_tiles;
        for (int t = 0; t < n; ++t) {
            Lanes of_token[sum_tiles] = {};
            for (int i = 0; i < n_summed; ++i)
                of_token[i] = chains[i * stride + t];
            float totals[sum_rows];
            add_chains(of_token, totals);
            product.put(row, token + t, totals, n_summed * tile_rows);
        }
    }

    template <int n>
    [[gnu::flatten]] static void multiply_rows(const Product& product, int64_t row, int64_t token,
                                               Lanes (&out)[n]) {
        const Rows rows(product, row);
        const int64_t n_blocks = product.w.n_cols / chain_size;
        const bool picked = product.picks();
        const int64_t n_whole = n_blocks / n_chains;
        Lanes chains[n] = {};
        const int32_t* const groups = product.groups;
        int64_t n_groups = groups ? product.n_groups : ceil_div(n_blocks, n_chains);
        // The last one may be a part only.
        const bool part = n_groups > 0 && (groups ? groups[n_groups - 1] : n_groups - 1) == n_whole;
        n_groups -= part;
        for (int64_t i = 0; i < n_groups; ++i) {
            const int64_t group = groups ? groups[i] : i;
            Tile<type> tile;
            rows.prefetch(group, picked);
            rows.unpack_whole(group, tile);
            add_products(tile, activations(product, group, token), chains);
        }
        if (part) {
            Tile<type> tile;
            rows.unpack_part(n_whole, n_blocks - n_whole * n_chains, tile);
            add_products(tile, activations(product, n_whole, token), chains);
        }
        for (int t = 0; t < n; ++t)
            out[t] = chains[t];
    }

    // The tiles of a panel [n_tiles][n_groups], and where sums wait between sweeps
    // [n_tiles][tile_tokens].
    struct Panel {
        int64_t row, n_tiles, n_groups;
        Tile<type>* tiles;
        Lanes* kept;
    };

    static void unpack_panel(const Product& product, const Panel& panel) {
        const int64_t n_blocks = product.w.n_cols / chain_size;
        for (int64_t i = 0; i < panel.n_tiles; ++i) {
            const Rows rows(product, panel.row + i * tile_rows);
            for (int64_t group = 0; group < panel.n_groups; ++group) {
                Tile<type>& tile = panel.tiles[i * panel.n_groups + group];
                const int64_t rest = n_blocks - group * n_chains;
                rows.prefetch(group, false);
                if (rest >= n_chains)
                    rows.unpack_whole(group, tile);
                else
                    rows.unpack_part(group, rest, tile);
            }
        }
    }

    // A panel's products with n tokens over groups [first, last).
    template <int n>
    [[gnu::flatten]] static void sweep(const Product& product, const Panel& panel, int64_t token,
                                       int64_t first, int64_t last) {
        for (int64_t i = 0; i < panel.n_tiles; ++i) {
            Lanes chains[n] = {};
            Lanes* kept = panel.kept + i * tile_tokens;
            if (first > 0)
#pragma GCC unroll 16
                for (int t = 0; t < n; ++t)
                    chains[t] = kept[t];
            for (int64_t group = first; group < last; ++group)
                add_products(panel.tiles[i * panel.n_groups + group],
                             activations(product, group, token), chains);
#pragma GCC unroll 16
            for (int t = 0; t < n; ++t)
                kept[t] = chains[t];
        }
    }

    static void multiply_panel(const Product& product, int64_t row_begin, int64_t row_end,
                               std::byte* scratch) {
        Panel panel = {row_begin, ceil_div(row_end - row_begin, tile_rows),
                       ceil_div(product.w.n_cols, group_size), align_up<Tile<type>>(scratch),
                       nullptr};
        panel.kept = reinterpret_cast<Lanes*>(panel.tiles + panel.n_tiles * panel.n_groups);
        unpack_panel(product, panel);
        for_token_tiles<tile_tokens>(0, product.n_tokens, [&]<int n>(int64_t token) {
            for (int64_t first = 0; first < panel.n_groups; first += sweep_groups) {
                const int64_t end = first + sweep_groups;
                sweep<n>(product, panel, token, first, end < panel.n_groups ? end : panel.n_groups);
            }
            for (int64_t i = 0; i < panel.n_tiles; i += sum_tiles)
                put<n>(product, row_begin + i * tile_rows, panel.n_tiles - i, token,
                       panel.kept + i * tile_tokens, tile_tokens);
        });
    }
};

// Below this no reciprocal can be formed; such activations count as zeros.
inline constexpr float smallest_activation = 0x1p-100f;

// Codes of 32 activations: x · 127 / max|x|, rounded to nearest even. A block with an infinity or a
// NaN gets a NaN scale.
inline void quantize_block(const float* x, int chain, Q8Group& group) {
    uint32_t largest = 0;
    for (int i = 0; i < chain_size; ++i) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float max = __builtin_bit_cast(float, largest);
    const bool finite = largest < 0x7f800000u, usable = finite && max >= smallest_activation;
    const float scale = usable ? max / 127.0f : finite ? 0.0f : __builtin_nanf("");
    const float inverse = usable ? 127.0f / max : 0.0f;

    alignas(cache_line) int8_t codes[chain_size] = {};
    int sums[2] = {};
    if (usable) {
        constexpr float rounding = 0x1.8p23f;  // lines units up with float's last bit
        for (int i = 0; i < chain_size; ++i) {
            const float shifted = x[i] * inverse + rounding;
            codes[i] = int8_t(__builtin_bit_cast(uint32_t, shifted));
        }
        for (int h = 0; h < 2; ++h)
            for (int i = 0; i < chain_size / 2; ++i)
                sums[h] += codes[h * chain_size / 2 + i];
    }
    for (int step = 0; step < n_steps; ++step)
        __builtin_memcpy(group.codes[step][chain], codes + 4 * step, 4);
    group.scales[chain] = scale;
    for (int h = 0; h < 2; ++h) {
        group.sums[chain][h] = int16_t(sums[h]);
        group.scaled_sums[h][chain] = scale * float(sums[h]);
    }
}

size_t quantized_bytes(int64_t n_cols, int64_t n_tokens) {
    return size_t(ceil_div(n_cols, group_size) * n_tokens) * sizeof(Q8Group);
}

void quantize(const float* x, int64_t x_stride, int64_t n_cols, int64_t n_tokens, int64_t begin,
              int64_t end, std::byte* prepared) {
    auto* groups = reinterpret_cast<Q8Group*>(prepared);
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t first = 0; first < n_cols; first += group_size) {
            Q8Group& group = groups[first / group_size * n_tokens + t];
            if (n_cols - first < group_size) group = {};
            for (int chain = 0; chain < n_chains && first + chain * chain_size < n_cols; ++chain)
                quantize_block(x + t * x_stride + first + chain * chain_size, chain, group);
        }
    }
}

}  // namespace

}  // namespace qi::kernels::QI_SIMD_LEVEL
