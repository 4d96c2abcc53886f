// Launching the kernels of rows, products, neurons and logits, and loading what they are in.
#include "device/cuda/launch.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "device/candidate.h"

namespace qi::cuda {

namespace {

constexpr int warp = 32;

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
unsigned blocks(int64_t n, int64_t per_block) {
    return unsigned(ceil_div(n, per_block));
}
int64_t q8_width(int64_t n_cols) {
    return ceil_div(n_cols, 32) * 32;
}
size_t round256(size_t n) {
    return (n + 255) / 256 * 256;
}

// Names as kernels/*.cu and kernels/units.txt have them.
const char* weight_name(Type type) {
    switch (type) {
        case Type::f32:
            return "F32";
        case Type::f16:
            return "F16";
        case Type::bf16:
            return "BF16";
        case Type::q4_0:
            return "Q4_0";
        case Type::q4_1:
            return "Q4_1";
        case Type::q5_0:
            return "Q5_0";
        case Type::q5_1:
            return "Q5_1";
        case Type::q8_0:
            return "Q8_0";
        case Type::q2_k:
            return "Q2_K";
        case Type::q3_k:
            return "Q3_K";
        case Type::q4_k:
            return "Q4_K";
        case Type::q5_k:
            return "Q5_K";
        case Type::q6_k:
            return "Q6_K";
    }
    fail(QI_INTERNAL, "type %d has no CUDA kernels", int(type));
}

const char* kv_name(Type type) {
    return type == Type::f16 ? "KvF16" : "KvQ8_0";
}

// Tokens [first, first + n) of an input.
Input part_of(const Input& in, int64_t n_cols, int64_t first, int64_t n) {
    Input part;
    part.n_tokens = n;
    if (in.x) part.x = in.x + size_t(first * n_cols) * sizeof(float);
    if (in.q8) part.q8 = in.q8.from(first, n_cols);
    return part;
}

// Tokens that one launch multiplies a row with.
constexpr int64_t launch_tokens = 8;

}  // namespace

size_t Q8::n_bytes(int64_t n_tokens, int64_t n_cols) {
    const auto width = size_t(q8_width(n_cols)), n = size_t(n_tokens);
    return round256(n * width) + round256(n * width / 32 * sizeof(float)) +
           round256(n * width / 16 * sizeof(float));
}

Q8 Q8::at(CUdeviceptr base, int64_t n_tokens, int64_t n_cols) {
    const auto width = size_t(q8_width(n_cols)), n = size_t(n_tokens);
    Q8 q8;
    q8.codes = base;
    q8.scales = q8.codes + round256(n * width);
    q8.sums = q8.scales + round256(n * width / 32 * sizeof(float));
    return q8;
}

Q8 Q8::from(int64_t first, int64_t n_cols) const {
    const auto skip = size_t(first * q8_width(n_cols));
    return {codes + skip, scales + skip / 32 * sizeof(float), sums + skip / 16 * sizeof(float)};
}

size_t NeuronList::n_bytes(int64_t capacity) {
    return 2 * round256(size_t(capacity) * sizeof(int32_t)) +
           round256((1 + n_list_bounds) * sizeof(int32_t));
}

NeuronList NeuronList::at(CUdeviceptr base, int64_t capacity) {
    NeuronList list;
    list.capacity = capacity;
    list.ids = base;
    list.slots = list.ids + round256(size_t(capacity) * sizeof(int32_t));
    list.n = list.slots + round256(size_t(capacity) * sizeof(int32_t));
    list.bounds = list.n + sizeof(int32_t);
    return list;
}

double Kernels::LogTerms::log_probability() const {
    return double(target) - double(maximum) - std::log(sum);
}

// ---- units ----

Function Kernels::function(Source source, Type type, const char* name) {
    static constexpr const char* files[n_sources] = {
        "norm.cu",   "matvec.cu", "matmul.cu",      "ffn.cu",        "down.cu",   "rows.cu",
        "append.cu", "attend.cu", "attend_tile.cu", "attend_mma.cu", "select.cu", "logits.cu"};
    const std::lock_guard lock(units_mutex_);
    Unit& unit = units_[{source, type}];
    for (const auto& [known, found] : unit.functions)
        if (known == name) return found;
    if (!unit.module) {
        std::string text = files[size_t(source)];
        switch (source) {
            case Source::norm:
            case Source::select:
            case Source::logits:
                break;
            case Source::append:
            case Source::attend:
            case Source::attend_tile:
            case Source::attend_mma:
                text += std::string(" QI_KV=") + kv_name(type);
                break;
            default:
                text += std::string(" QI_WEIGHT=") + weight_name(type);
        }
        unit.module = gpu_->module(text);
    }
    unit.functions.emplace_back(name, unit.module->function(name));
    return unit.functions.back().second;
}

void Kernels::load(Source source, Type type, std::initializer_list<const char*> names) {
    for (const char* name : names)
        function(source, type, name);
}

// The pointers identify kernels in `function`, so each name is written once.
namespace names {
constexpr const char* norm = "qi_norm";
constexpr const char* quantise = "qi_quantise";
constexpr const char* act_mul = "qi_act_mul";
constexpr const char* scale_rows = "qi_scale_rows";
constexpr const char* narrow_rows = "qi_narrow_rows";
constexpr const char* matvec[] = {"qi_matvec_1", "qi_matvec_1x2", "qi_matvec_2", "qi_matvec_3",
                                  "qi_matvec_4", "qi_matvec_6",   "qi_matvec_8"};
constexpr const char* matmul[] = {"qi_matmul_128x64", "qi_matmul_32x32", "qi_matmul_32x16"};
constexpr const char* ffn[] = {"qi_ffn_1", "qi_ffn_2", "qi_ffn_4", "qi_ffn_8"};
constexpr const char* down[] = {"qi_down_1", "qi_down_2", "qi_down_4", "qi_down_8"};
constexpr const char* down_tile = "qi_down_tile";
constexpr const char* widen_to_half = "qi_widen_to_half";
constexpr const char* widen = "qi_widen";
constexpr const char* select = "qi_select";
constexpr const char* count_active = "qi_count_active";
constexpr const char* place_records = "qi_place_records";
constexpr const char* count_missed = "qi_count_missed";
constexpr const char* add_partials = "qi_add_partials";
constexpr const char* argmax = "qi_argmax";
constexpr const char* top_k = "qi_top_k";
constexpr const char* log_terms = "qi_log_terms";

// 0 to 3 for kernels made for 1, 2, 4 and 8.
int power_index(int64_t n) {
    return n <= 1 ? 0 : n <= 2 ? 1 : n <= 4 ? 2 : 3;
}
}  // namespace names

void Kernels::load_weight_kernels(Type type) {
    for (const char* name : names::matvec)
        function(Source::matvec, type, name);
    for (const char* name : names::matmul)
        function(Source::matmul, type, name);
    for (const char* name : names::ffn)
        function(Source::ffn, type, name);
    for (const char* name : names::down)
        function(Source::down, type, name);
    load(Source::down, type, {names::down_tile});
    load(Source::rows, type, {names::widen_to_half, names::widen});
}

void Kernels::load_common_kernels() {
    load(Source::norm, Type::f32,
         {names::norm, names::quantise, names::act_mul, names::scale_rows, names::narrow_rows});
    load(Source::select, Type::f32,
         {names::select, names::count_active, names::count_missed, names::add_partials,
          names::place_records});
    load(Source::logits, Type::f32, {names::argmax, names::top_k, names::log_terms});
}

void Kernels::load_exchange_kernels() {
    exchange_ = gpu_->module("exchange.cu");
    for (const char* name : {"qi_send", "qi_receive"})
        exchange_->function(name);
}

// ---- rows ----

void Kernels::norm(const Stream& stream, const NormArgs& args) {
    const int64_t quads = ceil_div(args.n, 4);
    const auto threads = unsigned(std::clamp<int64_t>(ceil_div(quads, warp) * warp, warp, 1024));
    function(Source::norm, Type::f32, names::norm)
        .launch(stream, {unsigned(args.n_tokens)}, {threads}, 0, args.x, args.weight, args.bias,
                args.epsilon, int(args.layer), int(args.n), args.out, args.q8.codes, args.q8.scales,
                args.q8.sums, args.x_q8.codes, args.x_q8.scales, args.x_q8.sums);
}

// Threads of elementwise kernels, each with four values.
static constexpr int64_t row_threads = 256;

void Kernels::quantise(const Stream& stream, CUdeviceptr x, int64_t n_tokens, int64_t n,
                       const Q8& out) {
    function(Source::norm, Type::f32, names::quantise)
        .launch(stream, {blocks(n, 4 * row_threads), unsigned(n_tokens)}, {row_threads}, 0, x,
                int(n), out.codes, out.scales, out.sums);
}

void Kernels::act_mul(const Stream& stream, const ActMulArgs& args) {
    function(Source::norm, Type::f32, names::act_mul)
        .launch(stream, {blocks(args.n, 4 * row_threads), unsigned(args.n_tokens)}, {row_threads},
                0, int(args.act), args.threshold, args.gate, args.up, int(args.n), args.h,
                args.q8.codes, args.q8.scales, args.q8.sums);
}

void Kernels::scale_rows(const Stream& stream, CUdeviceptr factors, CUdeviceptr bias,
                         int64_t n_tokens, int64_t n, CUdeviceptr y, int64_t y_stride) {
    function(Source::norm, Type::f32, names::scale_rows)
        .launch(stream, {blocks(n, 4 * row_threads), unsigned(n_tokens)}, {row_threads}, 0, factors,
                bias, int(n), y, (long long)y_stride);
}

void Kernels::narrow_rows(const Stream& stream, CUdeviceptr x, int64_t n_tokens, int64_t n, Type to,
                          CUdeviceptr out, int64_t out_stride, CUdeviceptr powers) {
    function(Source::norm, Type::f32, names::narrow_rows)
        .launch(stream, {unsigned(n_tokens)}, {row_threads}, 0, x, int(n), int(to == Type::bf16),
                out, (long long)out_stride, powers);
}

// ---- products ----

// Warps that keep the memory busy: half of what an SM holds, on all of them.
int64_t Kernels::resident_warps() const {
    const Gpu::Attributes& gpu = gpu_->attributes();
    return int64_t(gpu.n_sm) * std::max(gpu.max_threads_per_sm / warp / 2, 16);
}

void Kernels::launch_product(const Stream& stream, const Input& in,
                             std::span<const Product> products, const NeuronList* list,
                             bool by_neuron, bool accumulate) {
    constexpr int64_t block_warps = 4;
    const DeviceWeight& first = products[0].w;
    int64_t n_rows = 0;
    for (const Product& product : products)
        n_rows += product.w.n_rows;
    if (list) n_rows = list->capacity;
    if (n_rows == 0) return;

    // A warp takes 32 units of a row at a time: blocks, or 16 bytes of floats. The sharing of rows
    // follows from the matrices alone, so that the order of sums does not depend on the batch.
    const int64_t unit_cols = wants_q8(first.type) ? 32 : first.type == Type::f32 ? 4 : 8;
    const int64_t turns = ceil_div(ceil_div(first.n_cols, unit_cols), warp);
    int warps_per_row = 1;
    while (warps_per_row < block_warps && 2 * warps_per_row <= turns &&
           n_rows * warps_per_row < resident_warps() / 2)
        warps_per_row *= 2;

    const int64_t n = in.n_tokens;
    const bool two_rows = n_rows >= 2 * resident_warps();
    const int variant = n == 1 ? (two_rows ? 1 : 0) : n <= 4 ? int(n) : n <= 6 ? 5 : 6;
    const int64_t rows_per_warp = variant == 0 || variant >= 5 ? 1 : 2;
    const int64_t rows_per_block = block_warps / warps_per_row * rows_per_warp;

    CUdeviceptr w[3] = {}, bias[3] = {}, y[3] = {};
    int64_t y_stride[3] = {};
    int rows[3] = {};
    for (size_t i = 0; i < products.size(); ++i) {
        w[i] = products[i].w.data;
        bias[i] = products[i].bias;
        y[i] = products[i].y;
        y_stride[i] = products[i].y_stride;
        rows[i] = int(products[i].w.n_rows);
    }
    const NeuronList none;
    const NeuronList& rows_of = list ? *list : none;
    function(Source::matvec, first.type, names::matvec[variant])
        .launch(stream, {blocks(n_rows, rows_per_block)}, {unsigned(block_warps * warp)}, 0, w[0],
                w[1], w[2], bias[0], bias[1], bias[2], y[0], y[1], y[2], (long long)y_stride[0],
                (long long)y_stride[1], (long long)y_stride[2], rows[0], rows[1], rows[2],
                (long long)first.row_stride, rows_of.slots, rows_of.ids, rows_of.n, int(by_neuron),
                in.x, in.q8.codes, in.q8.scales, in.q8.sums, int(first.n_cols), int(n),
                int(accumulate), int(products[0].relu), warps_per_row);
}

namespace {

struct TileShape {
    int64_t rows, tokens;
};
TileShape tile_shape(Type type, ProductKernel kernel) {
    if (!wants_q8(type)) return {64, 64};
    return kernel == ProductKernel::tile_128x64  ? TileShape{128, 64}
           : kernel == ProductKernel::tile_32x32 ? TileShape{32, 32}
                                                 : TileShape{32, 16};
}

// What matmul.cu keeps of a step: codes of rows and tokens (padded by 16 bytes), factors of rows,
// scales and sums of tokens.
int64_t matmul_shared(Type type, const TileShape& tile) {
    if (!wants_q8(type)) return 2 * 32 * (64 + 4) * int64_t(sizeof(float));
    const int64_t blocks = tile.rows == 128 ? 4 : 8;
    const bool halves = type == Type::q2_k || type == Type::q3_k || type == Type::q6_k;
    return (tile.rows + tile.tokens) * (32 * blocks + 16) + blocks * tile.rows * (halves ? 16 : 8) +
           blocks * tile.tokens * 12;
}

}  // namespace

// The widest tile that still makes enough blocks to fill the SMs.
ProductKernel Kernels::tile_for(const DeviceWeight& w, int64_t n_tokens) const {
    if (n_tokens <= 16) return ProductKernel::tile_32x16;
    const int64_t n_blocks = ceil_div(w.n_rows, 128) * ceil_div(n_tokens, 64);
    return n_tokens > 32 && n_blocks >= gpu_->attributes().n_sm ? ProductKernel::tile_128x64
                                                                : ProductKernel::tile_32x32;
}

void Kernels::launch_tiles(const Stream& stream, const Input& in, const Product& product,
                           bool accumulate, ProductKernel kernel) {
    const DeviceWeight& w = product.w;
    const TileShape tile = tile_shape(w.type, kernel);
    const int variant = int(kernel) - int(ProductKernel::tile_128x64);
    function(Source::matmul, w.type, names::matmul[variant])
        .launch(stream, {blocks(w.n_rows, tile.rows), blocks(in.n_tokens, tile.tokens)}, {256},
                unsigned(matmul_shared(w.type, tile)), w.data, (long long)w.row_stride,
                int(w.n_rows), in.x, in.q8.codes, in.q8.scales, in.q8.sums, int(w.n_cols),
                int(in.n_tokens), product.bias, product.y, (long long)product.y_stride,
                int(accumulate));
}

void Kernels::multiply(const Stream& stream, const Input& in, std::span<const Product> products,
                       bool accumulate, ProductKernel kernel) {
    for (const Product& product : products)
        if (product.w.type != products[0].w.type || product.w.n_cols != products[0].w.n_cols ||
            product.w.row_stride != products[0].w.row_stride || products.size() > 3 ||
            product.relu != products[0].relu)
            fail(QI_INTERNAL, "products of one launch have one type and width, and are at most 3");
    if (kernel == ProductKernel::automatic)
        kernel = in.n_tokens > launch_tokens ? tile_for(products[0].w, in.n_tokens)
                                             : ProductKernel::rows;
    if (kernel != ProductKernel::rows) {
        if (products[0].relu) fail(QI_INTERNAL, "tiles have no relu");
        for (const Product& product : products)
            launch_tiles(stream, in, product, accumulate, kernel);
        return;
    }
    for (int64_t token = 0; token < in.n_tokens; token += launch_tokens) {
        const int64_t n = std::min(launch_tokens, in.n_tokens - token);
        std::array<Product, 3> parts{};
        std::copy(products.begin(), products.end(), parts.begin());
        for (Product& part : parts)
            part.y += size_t(token * part.y_stride) * sizeof(float);
        launch_product(stream, part_of(in, products[0].w.n_cols, token, n),
                       {parts.data(), products.size()}, nullptr, false, accumulate);
    }
}

void Kernels::multiply_listed(const Stream& stream, const Input& in, const Product& product,
                              const NeuronList& list, bool by_neuron) {
    for (int64_t token = 0; token < in.n_tokens; token += launch_tokens) {
        const int64_t n = std::min(launch_tokens, in.n_tokens - token);
        Product part = product;
        part.y += size_t(token * part.y_stride) * sizeof(float);
        launch_product(stream, part_of(in, product.w.n_cols, token, n), {&part, 1}, &list,
                       by_neuron, false);
    }
}

// ---- neurons ----

void Kernels::select(const Stream& stream, const SelectArgs& args) {
    constexpr int64_t threads = 1024;
    const NeuronList none;
    const NeuronList& list = args.list ? *args.list : none;
    function(Source::select, Type::f32, names::select)
        .launch(stream, {blocks(args.n_ff, threads)}, {threads}, 0, args.predictions,
                args.threshold, args.rules, int(args.n_tokens), int(args.n_ff), args.masks,
                args.total, args.slot_of_neuron, args.listed, list.ids, list.slots, list.n,
                list.bounds, args.ticket);
}

void Kernels::ffn_rows(const Stream& stream, const FfnArgs& args) {
    constexpr int64_t block_warps = 4;
    const NeuronWeights& w = args.w;
    if (w.gated && !args.gates && w.gate_type != w.up_type)
        fail(QI_INTERNAL, "gate and up of two types: compute the gates first");
    const int64_t n_neurons = args.list ? args.list->capacity : w.n_ff;
    if (n_neurons == 0) return;
    const NeuronList none;
    const NeuronList& list = args.list ? *args.list : none;
    const int64_t n_words = ceil_div(w.n_ff, 32);
    for (int64_t token = 0; token < args.in.n_tokens; token += launch_tokens) {
        const int64_t n = std::min(launch_tokens, args.in.n_tokens - token);
        const Input in = part_of(args.in, w.n_embd, token, n);
        const CUdeviceptr h = args.h + size_t(token * args.h_stride) * sizeof(float);
        const CUdeviceptr gates =
            args.gates ? args.gates + size_t(token * w.n_ff) * sizeof(float) : 0;
        const CUdeviceptr masks =
            args.masks ? args.masks + size_t(token * n_words) * sizeof(uint32_t) : 0;
        const CUdeviceptr rules = args.rules ? args.rules + size_t(token) : 0;
        function(Source::ffn, w.up_type, names::ffn[names::power_index(n)])
            .launch(stream, {blocks(n_neurons, block_warps)}, {unsigned(block_warps * warp)}, 0,
                    w.records, (long long)w.layout.stride, (long long)w.layout.gate_offset,
                    (long long)w.layout.up_offset, int(w.gated), list.slots, list.ids, list.n,
                    int(w.n_ff), w.gate_bias, w.up_bias, int(args.act), args.threshold, gates,
                    (long long)w.n_ff, masks, int(n_words), h, (long long)args.h_stride,
                    int(args.by_neuron), rules, args.active, args.total, in.x, in.q8.codes,
                    in.q8.scales, in.q8.sums, int(w.n_embd), int(n));
    }
}

// Columns of a block of down.cu.
static constexpr int64_t down_cols = 256;

void Kernels::down_rows(const Stream& stream, const DownArgs& args) {
    const NeuronWeights& w = args.w;
    const NeuronList none;
    const NeuronList& list = args.list ? *args.list : none;
    const int variant = names::power_index(args.n_tokens);
    const int64_t tokens_per_block = int64_t(1) << variant;
    function(Source::down, w.down_type, names::down[variant])
        .launch(stream,
                {blocks(w.n_embd, down_cols), unsigned(n_partitions),
                 blocks(args.n_tokens, tokens_per_block)},
                {256}, 8 * 256 * sizeof(float), w.records + w.layout.down_offset,
                (long long)w.layout.stride, int(w.n_embd), list.slots, list.bounds, int(w.n_ff),
                args.h, (long long)args.h_stride, list.ids, int(args.by_neuron), int(args.n_tokens),
                args.partial, args.tickets, args.bias, args.y);
}

size_t Kernels::down_ticket_bytes(int64_t n_tokens, int64_t n_embd) {
    return size_t(ceil_div(n_tokens, launch_tokens) * ceil_div(n_embd, down_cols)) *
           sizeof(uint32_t);
}

// What down_tile.cuh keeps of a step: rows as one or two halves, h as two with a power of two per
// token; or both as floats.
static unsigned down_tile_shared(Type type) {
    if (!wants_q8(type) && type != Type::f16) return 2 * 32 * 68 * 4;
    return (wants_q8(type) ? 2 : 1) * 32 * 136 * 2 + 2 * 64 * 20 * 4 + 64 * 4;
}

void Kernels::down_tiles(const Stream& stream, const DownTileArgs& args) {
    const DeviceWeight& w = args.w;
    if (w.n_rows == 0) return;
    const bool halves = wants_q8(w.type) || w.type == Type::f16;
    const Size3 grid = {blocks(w.n_cols, halves ? 128 : 64), blocks(args.n_tokens, 64)};
    // Parts of K where the tiles of two blocks per SM are not there, and room for them is.
    constexpr int64_t n_parts = 4;
    const auto part_bytes = size_t(args.n_tokens * w.n_cols) * sizeof(float);
    const bool split = int64_t(grid.x) * grid.y < 2 * gpu_->attributes().n_sm &&
                       w.n_rows >= n_parts * 256 && n_parts * part_bytes <= args.room_bytes;
    function(Source::down, w.type, names::down_tile)
        .launch(stream, {grid.x, grid.y, unsigned(split ? n_parts : 1)}, {256},
                down_tile_shared(w.type), w.data, (long long)w.row_stride, int(w.n_rows),
                int(w.n_cols), args.h, (long long)args.h_stride, int(args.n_tokens), args.bias,
                split ? args.room : args.y);
    if (!split) return;
    function(Source::select, Type::f32, names::add_partials)
        .launch(stream, {blocks(w.n_cols, row_threads), unsigned(args.n_tokens)}, {row_threads}, 0,
                args.room, int(n_parts), args.bias, int(args.n_tokens), int(w.n_cols), args.y);
}

void Kernels::count_active(const Stream& stream, const CountArgs& args, CUdeviceptr active,
                           CUdeviceptr total) {
    const NeuronList none;
    const NeuronList& list = args.list ? *args.list : none;
    function(Source::select, Type::f32, names::count_active)
        .launch(stream, {1}, {1024}, 0, args.h, (long long)args.h_stride, list.ids, list.n,
                int(args.n_ff), int(args.n_tokens), active, total);
}

void Kernels::count_missed(const Stream& stream, CUdeviceptr gates, float threshold,
                           CUdeviceptr slot_of_neuron, CUdeviceptr masks, CUdeviceptr rules,
                           int64_t n_tokens, int64_t n_ff, CUdeviceptr totals) {
    function(Source::select, Type::f32, names::count_missed)
        .launch(stream, {1}, {1024}, 0, gates, threshold, slot_of_neuron, masks, rules,
                int(n_tokens), int(n_ff), totals);
}

void Kernels::place_records(const Stream& stream, CUdeviceptr from, CUdeviceptr slots, int64_t n,
                            const NeuronWeights& w) {
    constexpr int64_t most = 65535;  // of a grid's second dimension
    const size_t stride = w.layout.stride;
    for (int64_t first = 0; first < n; first += most) {
        const Size3 grid = {blocks(int64_t(stride / 16), row_threads),
                            unsigned(std::min(most, n - first))};
        function(Source::select, Type::f32, names::place_records)
            .launch(stream, grid, {row_threads}, 0, from + size_t(first) * stride,
                    slots + size_t(first) * sizeof(int32_t), (long long)(stride / 16), w.records);
    }
}

// ---- rows of a weight as numbers ----

void Kernels::widen(const Stream& stream, const DeviceWeight& w, int64_t first, int64_t n, Type to,
                    CUdeviceptr out) {
    constexpr int64_t most_rows = 65535;  // of a grid's second dimension
    const size_t out_bytes = row_bytes(to, w.n_cols);
    for (int64_t row = 0; row < n; row += most_rows) {
        const Size3 grid = {blocks(w.n_cols, 8 * row_threads),
                            unsigned(std::min(most_rows, n - row))};
        const CUdeviceptr at = out + size_t(row) * out_bytes;
        if (to == Type::f32)
            function(Source::rows, w.type, names::widen)
                .launch(stream, grid, {row_threads}, 0, w.data, (long long)w.row_stride,
                        int(w.n_cols), int(first + row), at);
        else
            function(Source::rows, w.type, names::widen_to_half)
                .launch(stream, grid, {row_threads}, 0, w.data, (long long)w.row_stride,
                        int(w.n_cols), int(first + row), int(to == Type::bf16), at);
    }
}

// ---- logits ----

static constexpr int64_t argmax_cols = 8192;

size_t Kernels::argmax_partial_bytes(int64_t n, int64_t n_vocab) {
    return size_t(n * ceil_div(n_vocab, argmax_cols)) * sizeof(uint64_t);
}

void Kernels::argmax(const Stream& stream, CUdeviceptr logits, int64_t n, int64_t n_vocab,
                     CUdeviceptr tickets, CUdeviceptr partial, CUdeviceptr best) {
    function(Source::logits, Type::f32, names::argmax)
        .launch(stream, {blocks(n_vocab, argmax_cols), unsigned(n)}, {256}, 0, logits, int(n_vocab),
                partial, tickets, best);
}

// A block's part of a row, and what partials may take unless those of one row are more: 512 KiB are
// one row of 128k at k = 1024, and 25 at k = 41.
static constexpr int64_t top_k_cols = 2048;
static constexpr size_t top_k_room = size_t(1) << 19;

static size_t top_k_row_bytes(int64_t n_vocab, int64_t k) {
    const int64_t n_parts = ceil_div(n_vocab, top_k_cols);
    return n_parts > 1 ? size_t(n_parts * k) * sizeof(uint64_t) : 0;
}

size_t Kernels::top_k_partial_bytes(int64_t n, int64_t n_vocab) {
    const size_t of_row = top_k_row_bytes(n_vocab, top_k_max);
    return std::min(size_t(n) * of_row, std::max(of_row, top_k_room));
}

void Kernels::top_k(const Stream& stream, CUdeviceptr logits, int64_t n, int64_t n_vocab, int64_t k,
                    CUdeviceptr tickets, CUdeviceptr partial, CUdeviceptr best) {
    const size_t of_row = top_k_row_bytes(n_vocab, k);
    const int64_t at_once = of_row ? int64_t(top_k_partial_bytes(n, n_vocab) / of_row) : n;
    for (int64_t first = 0; first < n; first += at_once)
        function(Source::logits, Type::f32, names::top_k)
            .launch(stream, {blocks(n_vocab, top_k_cols), unsigned(std::min(at_once, n - first))},
                    {1024}, 0, logits + size_t(first * n_vocab) * sizeof(float), int(n_vocab),
                    int(k), partial, tickets, best + size_t(first * k) * sizeof(Candidate));
}

void Kernels::log_terms(const Stream& stream, CUdeviceptr logits, int64_t n, int64_t n_vocab,
                        CUdeviceptr targets, CUdeviceptr terms) {
    function(Source::logits, Type::f32, names::log_terms)
        .launch(stream, {unsigned(n)}, {1024}, 0, logits, int(n_vocab), targets, terms);
}

}  // namespace qi::cuda
