// Launching attention: keys and values appended to pages, attended to by few tokens or by tiles.
#include <algorithm>
#include <bit>

#include "base/error.h"
#include "device/cuda/launch.h"

namespace qi::cuda {

namespace {

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

constexpr int attend_threads = 128;
constexpr int64_t attend_page = 64;

// Query heads that a block of attend.cu computes together.
int heads_per_block(int64_t group) {
    return group <= 2 ? int(group) : 4;
}
int64_t attend_blocks_y(const AttendArgs& args) {
    const int64_t group = args.n_head / args.kv.n_head_kv;
    return args.kv.n_head_kv * ceil_div(group, heads_per_block(group));
}
// The most runs of pages that any token below max_positions sees; attend.cu has the lengths.
int64_t attend_runs(const AttendArgs& args) {
    const int64_t visible =
        args.window > 0 ? std::min(args.window, args.max_positions) : args.max_positions;
    int64_t runs = ceil_div(std::min<int64_t>(visible, 2048), attend_page);
    if (visible > 8192) runs = std::max(runs, ceil_div(visible, 16 * attend_page));
    return runs + (args.window > 0);  // a window need not begin where a run does
}

// Heads that attend_mma.cu computes.
bool fits_mma(int64_t head_dim) {
    return head_dim % 16 == 0 && head_dim <= 128;
}
// Query rows of a tile of attend_mma.cu or attend_tile.cu; 0: neither.
int tile_rows(int64_t head_dim) {
    if (fits_mma(head_dim)) return 64;
    return head_dim <= 128 ? 32 : head_dim <= 256 ? 16 : 0;
}

// The pointers identify kernels, so each name is written once.
namespace names {
constexpr const char* append = "qi_append";
constexpr const char* attend[] = {"qi_attend_1", "qi_attend_2", "qi_attend_4"};
constexpr const char* attend_merge = "qi_attend_merge";
constexpr const char* attend_tile[] = {"qi_attend_tile_32", "qi_attend_tile_16"};
constexpr const char* attend_mma[] = {"qi_attend_mma_64", "qi_attend_mma_128"};
}  // namespace names

}  // namespace

void Kernels::load_kv_kernels(Type type) {
    load(Source::append, type, {names::append});
    for (const char* name : names::attend)
        function(Source::attend, type, name);
    function(Source::attend, type, names::attend_merge);
    for (const char* name : names::attend_tile)
        function(Source::attend_tile, type, name);
    for (const char* name : names::attend_mma)
        function(Source::attend_mma, type, name);
}

void Kernels::append(const Stream& stream, const AppendArgs& args) {
    const KvArgs& kv = args.kv;
    function(Source::append, kv.type, names::append)
        .launch(stream, {unsigned(args.n_head + kv.n_head_kv), unsigned(args.n_tokens)},
                {attend_threads}, 0, args.q, (long long)args.q_stride, args.k, args.v,
                (long long)args.kv_stride, int(args.n_head), int(kv.head_dim), args.cos_sin,
                int(args.n_rot), int(args.neox), kv.positions, kv.tables, kv.pool,
                (long long)kv.page_stride, (long long)kv.layer_offset, (long long)kv.head_bytes,
                kv.pages);
}

size_t Kernels::attend_ticket_bytes(const AttendArgs& args) {
    return size_t(args.n_tokens * attend_blocks_y(args)) * sizeof(uint32_t);
}

size_t Kernels::attend_room_bytes(const AttendArgs& args) {
    // One run more, for a window that begins inside one.
    const auto n_partials = size_t(args.n_tokens * args.n_head * (attend_runs(args) + 1));
    return n_partials * size_t(args.kv.head_dim + 2) * sizeof(float);
}

void Kernels::attend(const Stream& stream, const AttendArgs& args) {
    const KvArgs& kv = args.kv;
    if (args.q8 && kv.head_dim % 32 != 0)
        fail(QI_INTERNAL, "heads of %lld have no q8 copy", (long long)kv.head_dim);
    const int64_t group = args.n_head / kv.n_head_kv, runs = attend_runs(args);
    const int heads = heads_per_block(group);
    // q, scores by warp and in all, maximum, total and factor by head, sums by thread; or, in the
    // end, two terms by head and its factors by run: more from some 600 runs on.
    const size_t of_run = size_t(heads) * size_t(kv.head_dim) + 5 * size_t(heads) * attend_page +
                          3 * size_t(heads) + attend_threads * 8;
    const size_t of_all = size_t(heads) * size_t(2 + runs);
    const size_t shared = std::max(of_run, of_all) * sizeof(float);
    function(Source::attend, kv.type, names::attend[std::bit_width(unsigned(heads)) - 1])
        .launch(stream, {unsigned(runs), unsigned(attend_blocks_y(args)), unsigned(args.n_tokens)},
                {attend_threads}, unsigned(shared), args.q, (long long)args.q_stride, args.out,
                int(args.n_head), int(kv.n_head_kv), int(kv.head_dim), args.scale, int(args.window),
                int(runs), args.room, args.tickets, kv.positions, kv.tables, kv.pool,
                (long long)kv.page_stride, (long long)kv.layer_offset, (long long)kv.head_bytes,
                kv.pages, args.q8.codes, args.q8.scales, args.q8.sums, kv.bounds, args.terms);
}

void Kernels::attend_merge(const Stream& stream, const AttendArgs& args, CUdeviceptr other,
                           CUdeviceptr other_terms) {
    function(Source::attend, args.kv.type, names::attend_merge)
        .launch(stream, {unsigned(args.n_head), unsigned(args.n_tokens)}, {attend_threads}, 0,
                args.out, args.terms, other, other_terms, int(args.kv.head_dim));
}

int64_t Kernels::attend_tile_tokens(const AttendArgs& args) {
    const int64_t rows = tile_rows(args.kv.head_dim);
    if (rows == 0) return 0;
    return rows / std::min(rows, args.n_head / args.kv.n_head_kv);
}

void Kernels::attend_mma(const Stream& stream, const AttendArgs& args) {
    const KvArgs& kv = args.kv;
    const int64_t rows = tile_rows(kv.head_dim), group = args.n_head / kv.n_head_kv;
    const int64_t parts = ceil_div(group, std::min(rows, group));
    const int64_t max_dim = kv.head_dim <= 64 ? 64 : 128;
    // Keys and values as halves, rows padded by 8, and the scales of both.
    const int64_t shared = (max_dim * (attend_page + 8) + attend_page * (max_dim + 8)) * 2 +
                           2 * max_dim / 32 * attend_page * 4;
    function(Source::attend_mma, kv.type, names::attend_mma[max_dim == 64 ? 0 : 1])
        .launch(stream, {unsigned(args.n_tiles), unsigned(kv.n_head_kv * parts)}, {attend_threads},
                unsigned(shared), args.q, (long long)args.q_stride, args.out, int(args.n_head),
                int(kv.n_head_kv), int(kv.head_dim), args.scale, int(args.window), args.tiles,
                kv.positions, kv.tables, kv.pool, (long long)kv.page_stride,
                (long long)kv.layer_offset, (long long)kv.head_bytes, kv.pages, kv.bounds,
                args.terms);
}

void Kernels::attend_tiles(const Stream& stream, const AttendArgs& args) {
    const KvArgs& kv = args.kv;
    if (fits_mma(kv.head_dim)) return attend_mma(stream, args);
    const int64_t rows = tile_rows(kv.head_dim), group = args.n_head / kv.n_head_kv;
    const int64_t parts = ceil_div(group, std::min(rows, group));
    const int64_t half_bytes = kv.type == Type::f16
                                   ? kv.head_dim * attend_page * 2
                                   : kv.head_dim * attend_page + kv.head_dim / 32 * attend_page * 2;
    const int64_t shared = rows * (kv.head_dim + attend_page) * int64_t(sizeof(float)) + half_bytes;
    const Function& kernel =
        function(Source::attend_tile, kv.type, names::attend_tile[rows == 32 ? 0 : 1]);
    if (shared > 48 * 1024) kernel.allow_dynamic_shared(int(shared));
    kernel.launch(stream, {unsigned(args.n_tiles), unsigned(kv.n_head_kv * parts)}, {256},
                  unsigned(shared), args.q, (long long)args.q_stride, args.out, int(args.n_head),
                  int(kv.n_head_kv), int(kv.head_dim), args.scale, int(args.window), args.tiles,
                  kv.positions, kv.tables, kv.pool, (long long)kv.page_stride,
                  (long long)kv.layer_offset, (long long)kv.head_bytes, kv.pages, kv.bounds,
                  args.terms);
}

}  // namespace qi::cuda
