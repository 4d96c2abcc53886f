// The CUDA kernels as typed calls: what each computes, from where, in which shape.
//
// A call enqueues one launch (a few where said) on a stream and returns; its arguments are baked
// into a captured graph, what they point at is not. Device pointers are addresses; the contexts of
// streams and memory must be those of the Kernels' Gpu, and it must be Current. Rows of
// activations are float [n_tokens][width], contiguous unless a stride is given; n_tokens is at
// least 1 and everything else is checked where it is made, not here.
//
// A token that is only there to fill a captured shape has a position below 0: nothing is stored
// for it, nothing attended to, and what its rows hold is without meaning.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "device/cuda/gpu.h"
#include "device/cuda/layout.h"
#include "kernels/vector_ops.h"
#include "quant/types.h"
#include "sparse/partition.h"

namespace qi::cuda {

// ---- what kernels read and write ----

// A matrix on the device, its rows as layout.h has them.
struct DeviceWeight {
    Type type = Type::f32;
    CUdeviceptr data = 0;
    int64_t n_rows = 0;
    int64_t n_cols = 0;
    size_t row_stride = 0;  // device_row_bytes, or a record's stride
};

// Activations quantised by 32s. width is n_cols rounded up to a multiple of 32.
struct Q8 {
    CUdeviceptr codes = 0;   // int8 [n_tokens][width]
    CUdeviceptr scales = 0;  // float [n_tokens][width/32]
    CUdeviceptr sums = 0;    // float [n_tokens][width/16]

    explicit operator bool() const { return codes != 0; }
    // One allocation for all three, and their places in it.
    static size_t n_bytes(int64_t n_tokens, int64_t n_cols);
    static Q8 at(CUdeviceptr base, int64_t n_tokens, int64_t n_cols);
    // Without the tokens before `first`.
    Q8 from(int64_t first, int64_t n_cols) const;
};

// Block types are multiplied with q8 rows, float types with float rows.
inline bool wants_q8(Type weight_type) {
    return traits(weight_type).block_size > 1;
}

// The input of products; only the form that the weights want need be there.
struct Input {
    CUdeviceptr x = 0;  // float [n_tokens][n_cols]
    Q8 q8;
    int64_t n_tokens = 0;
};

// y = W·x + bias, or y += W·x + bias.
struct Product {
    DeviceWeight w;
    CUdeviceptr bias = 0;  // float [n_rows], or 0
    CUdeviceptr y = 0;     // [n_tokens][y_stride]
    int64_t y_stride = 0;
    bool relu = false;  // y = max(W·x + bias, 0); by rows only, and for all products of a launch
};

// How a product is computed. `automatic` takes rows for up to 8 tokens and the tile that suits the
// shape for more. With `rows` a token's result is the same whatever is in the batch; a tile's also
// depends on which tile it is.
enum class ProductKernel { automatic, rows, tile_128x64, tile_32x32, tile_32x16 };

// Rows chosen by a list in device memory, as `select` makes it.
struct NeuronList {
    CUdeviceptr ids = 0;     // int32, neurons, ascending
    CUdeviceptr slots = 0;   // int32, where each one's record is
    CUdeviceptr n = 0;       // int32, how many
    CUdeviceptr bounds = 0;  // int32 [n_list_bounds], where each fixed run of neurons begins
    int64_t capacity = 0;    // the most there can be

    static size_t n_bytes(int64_t capacity);
    static NeuronList at(CUdeviceptr base, int64_t capacity);
};
inline constexpr int n_list_bounds = 16 * 8 + 1;

enum class DeviceAct : int { silu, relu, gelu_erf, gelu_tanh, fatrelu, relu_relu };

// ---- rows ----

struct NormArgs {
    bool layer = false;  // layer norm instead of rms norm
    float epsilon = 0;
    CUdeviceptr weight = 0;  // [n]
    CUdeviceptr bias = 0;    // [n], or 0
    CUdeviceptr x = 0;
    int64_t n_tokens = 0, n = 0;
    CUdeviceptr out = 0;  // or 0
    Q8 q8;                // of out, or none
    Q8 x_q8;              // of x, or none
};

// h = act(gate) ⊙ up, or act(gate) where up is 0.
struct ActMulArgs {
    DeviceAct act{};
    float threshold = 0;  // fatrelu's
    CUdeviceptr gate = 0, up = 0;
    int64_t n_tokens = 0, n = 0;
    CUdeviceptr h = 0;  // may be gate; or 0
    Q8 q8;              // or none
};

// ---- attention ----

// Keys and values of one layer, pages as kernels/attention.h has them.
struct KvArgs {
    Type type = Type::f16;
    CUdeviceptr pool = 0;
    size_t page_stride = 0;   // between pages, all layers included
    size_t layer_offset = 0;  // of this layer in a page
    size_t head_bytes = 0;
    int64_t n_head_kv = 0, head_dim = 0;
    // int32, the page tables of all sequences, one after the other; below 0: not on the device
    CUdeviceptr pages = 0;
    CUdeviceptr positions = 0;  // int32 [n_tokens]; below 0: no token
    CUdeviceptr tables = 0;     // int32 [n_tokens], where the token's table begins in `pages`
    CUdeviceptr bounds = 0;     // int32 [n_tokens], pages from there on are not attended to; or 0
};

struct AppendArgs {
    KvArgs kv;
    CUdeviceptr q = 0;  // [n_tokens][q_stride], rotated in place
    int64_t q_stride = 0, n_head = 0;
    CUdeviceptr k = 0, v = 0;  // [n_tokens][kv_stride], left as they are
    int64_t kv_stride = 0;
    CUdeviceptr cos_sin = 0;  // [n_tokens][n_rot/2][2]; 0: no rotation
    int64_t n_rot = 0;
    bool neox = false;
    int64_t n_tokens = 0;
};

struct AttendArgs {
    KvArgs kv;
    CUdeviceptr q = 0;  // [n_tokens][q_stride]
    int64_t q_stride = 0, n_head = 0;
    float scale = 0;
    int64_t window = 0;   // 0: none
    CUdeviceptr out = 0;  // [n_tokens][n_head · head_dim]
    Q8 q8;                // of out, or none; attend only, head_dim a multiple of 32
    // float [n_tokens][n_head][2], or 0: out is then left unnormalised, to be merged with another
    // part, and these are the greatest score and the sum of exp(score - greatest).
    CUdeviceptr terms = 0;
    int64_t n_tokens = 0;
    // Few tokens: no position is at or beyond this, which fixes the launch; room of
    // attend_room_bytes; and attend_ticket_bytes that were zeroed once, that every launch leaves
    // zeroed, and that launches of other numbers of tokens may share.
    int64_t max_positions = 0;
    CUdeviceptr room = 0;
    CUdeviceptr tickets = 0;
    // Many tokens: int32 [n_tiles][2], first token and number of tokens of each tile, all of one
    // sequence and at most attend_tile_tokens of them.
    CUdeviceptr tiles = 0;
    int64_t n_tiles = 0;
};

// ---- neurons ----

// Gate and up (or up alone) of the neurons a GPU holds, one record each.
struct NeuronWeights {
    Type gate_type = Type::f32, up_type = Type::f32, down_type = Type::f32;
    bool gated = false;
    CUdeviceptr records = 0;  // slot s at records + s · layout.stride
    NeuronLayout layout;
    int64_t n_embd = 0;
    int64_t n_ff = 0;           // neurons of the layer, wherever they are
    CUdeviceptr gate_bias = 0;  // [n_ff], or 0
    CUdeviceptr up_bias = 0;    // [n_ff], or 0
};

// Which neurons tokens use, by what a predictor says of them.
struct SelectArgs {
    CUdeviceptr predictions = 0;  // float [n_tokens][n_ff]
    float threshold = 0;
    CUdeviceptr rules = 0;  // uint8 [n_tokens], NeuronRule's numbers
    int64_t n_tokens = 0, n_ff = 0;
    // uint32 [n_tokens][n_words], a bit per neuron: those whose prediction is not below the
    // threshold for tokens of rule `predict`, all for other tokens.
    CUdeviceptr masks = 0;
    CUdeviceptr total = 0;  // uint64 [1], grows by the bits of tokens of rule `predict`; or 0
    // Of the neurons that any token uses those that have a slot; or null, and the rest is 0.
    const NeuronList* list = nullptr;
    CUdeviceptr slot_of_neuron = 0;  // int32 [n_ff], below 0: none
    CUdeviceptr listed = 0;          // room for uint32 [n_words]
    CUdeviceptr ticket = 0;          // uint32, zeroed once
};

struct FfnArgs {
    NeuronWeights w;
    Input in;
    const NeuronList* list = nullptr;  // null: all n_ff neurons, each in the slot of its number
    DeviceAct act{};
    float threshold = 0;    // fatrelu's
    CUdeviceptr gates = 0;  // [n_tokens][n_ff] already known (by neuron, bias included), or 0
    CUdeviceptr masks = 0;  // uint32 [n_tokens][n_words], or 0: every token uses all
    CUdeviceptr h = 0;      // [n_tokens][h_stride]
    int64_t h_stride = 0;
    bool by_neuron = false;  // h stands at the neuron's number, not at its place in the list
    // Counts of values of h that are not 0, each of them or 0: active uint64 [n_ff] grows by the
    // tokens that each listed neuron was active for, total uint64 [1] by their sum over tokens of a
    // rule other than `all`; rules uint8 [n_tokens].
    CUdeviceptr rules = 0, active = 0, total = 0;
};

struct DownArgs {
    NeuronWeights w;
    const NeuronList* list = nullptr;
    CUdeviceptr h = 0;  // as ffn_rows left it
    int64_t h_stride = 0;
    bool by_neuron = false;
    int64_t n_tokens = 0;
    CUdeviceptr partial = 0;  // [n_partitions][n_tokens][n_embd]
    // down_ticket_bytes that were zeroed once, that every launch leaves zeroed, and that launches
    // of fewer tokens may share.
    CUdeviceptr tickets = 0;
    CUdeviceptr bias = 0;  // [n_embd], or 0
    CUdeviceptr y = 0;     // [n_tokens][n_embd]
};

// What `count_active` looks at: h of the listed neurons, as ffn_rows leaves it.
struct CountArgs {
    const NeuronList* list = nullptr;  // null: all n_ff neurons
    int64_t n_ff = 0;
    CUdeviceptr h = 0;
    int64_t h_stride = 0, n_tokens = 0;
};

// y += h · w with rows of w along the inner dimension, for many tokens.
struct DownTileArgs {
    DeviceWeight w;     // [n_slots][n_embd], slots in the order of h
    CUdeviceptr h = 0;  // [n_tokens][h_stride]
    int64_t h_stride = 0, n_tokens = 0;
    CUdeviceptr bias = 0;  // [n_embd], or 0
    CUdeviceptr y = 0;     // [n_tokens][n_embd]
    // Where parts of sums may stand until they are added; too little, and there are no parts.
    CUdeviceptr room = 0;
    size_t room_bytes = 0;
};

class Kernels {
  public:
    explicit Kernels(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)) {}

    // Kernels are compiled and loaded when first launched, which must not happen while capturing;
    // these do it ahead.
    void load_weight_kernels(Type type);
    void load_kv_kernels(Type type);
    void load_common_kernels();
    // Those of Exchange, kept loaded.
    void load_exchange_kernels();

    // ---- rows ----
    void norm(const Stream& stream, const NormArgs& args);
    void quantise(const Stream& stream, CUdeviceptr x, int64_t n_tokens, int64_t n, const Q8& out);
    void act_mul(const Stream& stream, const ActMulArgs& args);
    // y[t] = y[t] · factors[t] + bias; factors float [n_tokens], bias [n] or 0.
    void scale_rows(const Stream& stream, CUdeviceptr factors, CUdeviceptr bias, int64_t n_tokens,
                    int64_t n, CUdeviceptr y, int64_t y_stride);
    // out[t] = x[t] · powers[t] as f16, or x[t] as bf16, what cuBLAS multiplies; powers float
    // [2][n_tokens], powers of two that keep a row within f16's range, and their reciprocals.
    void narrow_rows(const Stream& stream, CUdeviceptr x, int64_t n_tokens, int64_t n, Type to,
                     CUdeviceptr out, int64_t out_stride, CUdeviceptr powers);

    // ---- products ----
    // Products of one input with up to three matrices of one type and width: by rows one launch for
    // each 8 tokens, by tiles one for each matrix.
    void multiply(const Stream& stream, const Input& in, std::span<const Product> products,
                  bool accumulate, ProductKernel kernel = ProductKernel::automatic);
    // The listed rows: y[t] at the place in the list, or at the neuron's number.
    void multiply_listed(const Stream& stream, const Input& in, const Product& product,
                         const NeuronList& list, bool by_neuron);

    // ---- attention ----
    void append(const Stream& stream, const AppendArgs& args);
    // By runs of pages, for few tokens.
    void attend(const Stream& stream, const AttendArgs& args);
    // Of args whose window is not known yet, too.
    static size_t attend_room_bytes(const AttendArgs& args);
    static size_t attend_ticket_bytes(const AttendArgs& args);
    // By tiles of tokens, for prompts: by tensor cores where heads are multiples of 16 up to 128,
    // else by plain arithmetic. 0 tokens per tile: heads too wide, use attend.
    void attend_tiles(const Stream& stream, const AttendArgs& args);
    static int64_t attend_tile_tokens(const AttendArgs& args);
    // Makes two parts the attention of all positions, in args.out; other and other_terms are shaped
    // as out and terms.
    void attend_merge(const Stream& stream, const AttendArgs& args, CUdeviceptr other,
                      CUdeviceptr other_terms);

    // ---- neurons ----
    void select(const Stream& stream, const SelectArgs& args);
    // h = act(gate·x) · (up·x) of the listed neurons, 0 where a token does not use one. Up to 8
    // tokens a launch. Gate and up of one type, unless the gates are known.
    void ffn_rows(const Stream& stream, const FfnArgs& args);
    // y += the down rows of the listed neurons, weighed by h and added by partition, + bias.
    void down_rows(const Stream& stream, const DownArgs& args);
    static size_t down_ticket_bytes(int64_t n_tokens, int64_t n_embd);
    // The down rows of all slots for many tokens, by tiles. A token's result depends on the number
    // of tokens, which decides whether sums are made in parts.
    void down_tiles(const Stream& stream, const DownTileArgs& args);

    // active uint64 [n_ff] (or 0) grows by the tokens each listed neuron was active for, total
    // uint64 [1] (or 0) by their sum.
    void count_active(const Stream& stream, const CountArgs& args, CUdeviceptr active,
                      CUdeviceptr total);
    // totals uint64 [2] grow by the neurons whose gate passes the threshold, of tokens of rule
    // `predict`, and by those of them that the masks leave out. Neurons without a slot have no
    // gate: slot_of_neuron int32 [n_ff], or 0.
    void count_missed(const Stream& stream, CUdeviceptr gates, float threshold,
                      CUdeviceptr slot_of_neuron, CUdeviceptr masks, CUdeviceptr rules,
                      int64_t n_tokens, int64_t n_ff, CUdeviceptr totals);

    // The records at `from`, one after the other, to the slots listed, int32 [n].
    void place_records(const Stream& stream, CUdeviceptr from, CUdeviceptr slots, int64_t n,
                       const NeuronWeights& w);

    // ---- rows of a weight as numbers ----
    // out [n][n_cols] = rows first … first + n - 1, to f32, f16 or bf16.
    void widen(const Stream& stream, const DeviceWeight& w, int64_t first, int64_t n, Type to,
               CUdeviceptr out);

    // ---- logits [n][n_vocab] ----
    // best Candidate [n]; tickets uint32 [n], zeroed once; partial of argmax_partial_bytes.
    void argmax(const Stream& stream, CUdeviceptr logits, int64_t n, int64_t n_vocab,
                CUdeviceptr tickets, CUdeviceptr partial, CUdeviceptr best);
    static size_t argmax_partial_bytes(int64_t n, int64_t n_vocab);
    // best Candidate [n][k], falling, lower ids first among equals, NaN before everything; k to
    // 1024. tickets as of argmax; partial of top_k_partial_bytes, for that many rows or more: where
    // it is too little for all of them there is a launch for some at a time.
    void top_k(const Stream& stream, CUdeviceptr logits, int64_t n, int64_t n_vocab, int64_t k,
               CUdeviceptr tickets, CUdeviceptr partial, CUdeviceptr best);
    static size_t top_k_partial_bytes(int64_t n, int64_t n_vocab);
    static constexpr int64_t top_k_max = 1024;
    // terms [n] of targets int32 [n].
    struct LogTerms {
        float target, maximum;
        double sum;  // Σ exp(logit - maximum)
        double log_probability() const;
    };
    void log_terms(const Stream& stream, CUdeviceptr logits, int64_t n, int64_t n_vocab,
                   CUdeviceptr targets, CUdeviceptr terms);

    const std::shared_ptr<Gpu>& gpu() const { return gpu_; }

  private:
    // A loaded unit and those of its kernels that were asked for, by the address of their name.
    struct Unit {
        std::shared_ptr<Module> module;
        std::vector<std::pair<const char*, Function>> functions;
    };
    enum class Source {
        norm,
        matvec,
        matmul,
        ffn,
        down,
        rows,
        append,
        attend,
        attend_tile,
        attend_mma,
        select,
        logits
    };
    static constexpr size_t n_sources = 12;

    // From any thread, as contexts share their accelerator's kernels.
    Function function(Source source, Type type, const char* name);
    void load(Source source, Type type, std::initializer_list<const char*> names);
    void attend_mma(const Stream& stream, const AttendArgs& args);
    void launch_product(const Stream& stream, const Input& in, std::span<const Product> products,
                        const NeuronList* list, bool by_neuron, bool accumulate);
    void launch_tiles(const Stream& stream, const Input& in, const Product& product,
                      bool accumulate, ProductKernel kernel);
    ProductKernel tile_for(const DeviceWeight& w, int64_t n_tokens) const;
    int64_t resident_warps() const;

    std::shared_ptr<Gpu> gpu_;
    std::mutex units_mutex_;
    std::map<std::pair<Source, Type>, Unit> units_;
    std::shared_ptr<Module> exchange_;
};

}  // namespace qi::cuda
