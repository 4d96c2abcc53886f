// What the engine asks of a device: memory for activations, keys and values, and the steps of a
// forward pass.
//
// Activations are float rows, [n_tokens][width], contiguous, in memory of the device, which nobody
// else looks into. What differs from one pass over the layers to the next is told by begin(), so
// that the steps between can be recorded once and replayed. A device knows no architecture: it is
// told which weights, which activation, which rotation. One Device serves one context and one
// thread at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "device/candidate.h"
#include "kernels/matmul.h"
#include "quant/types.h"
#include "sparse/counters.h"
#include "sparse/policy.h"
#include "sparse/shard.h"

namespace qi {

using kernels::Weight;

// y = W·x + b
struct Linear {
    Weight weight{};          // [n_rows][n_cols]
    std::vector<float> bias;  // [n_rows], or empty
};

struct Norm {
    enum class Kind { rms, layer };
    Kind kind = Kind::rms;
    float epsilon = 0.0f;
    std::vector<float> weight;  // [n_embd]
    std::vector<float> bias;    // [n_embd], or empty
};

struct HiddenAct {
    enum class Kind { silu, relu, gelu_erf, gelu_tanh, fatrelu, relu_relu };
    Kind kind = Kind::silu;
    float threshold = 0.0f;  // fatrelu: values at or below it become 0
};

// Whether an activation is zero for about half of all inputs, so that neurons can be left out.
inline bool is_sparse(const HiddenAct& act) {
    return act.kind == HiddenAct::Kind::relu || act.kind == HiddenAct::Kind::fatrelu ||
           act.kind == HiddenAct::Kind::relu_relu;
}

// p = fc2 · relu(fc1 · z): high where a neuron is likely to be active.
struct Predictor {
    Linear fc1;  // [rank][n_embd]
    Linear fc2;  // [n_ff][rank]
};

// y = down · (act(gate·x) ⊙ up·x), or down · act(up·x) without a gate. relu_relu: relu(gate·x) ⊙
// relu(up·x).
struct FeedForward {
    bool gated = false;
    Linear gate;  // [n_ff][n_embd]
    Linear up;    // [n_ff][n_embd]
    Linear down;  // [n_embd][n_ff], or [n_ff][n_embd] when it is stored by neuron
    bool down_by_neuron = false;
    HiddenAct act;
    std::optional<Predictor> predictor;

    // Neuron j's activation depends on this row j first.
    const Linear& first() const { return gated ? gate : up; }
};

// What the tokens of a batch bring to a feed-forward network.
struct FfnBatch {
    const float* x;   // [n_tokens][n_embd], normalised
    const float* z;   // [n_tokens][n_embd], what the predictor looks at; may be null without one
    float threshold;  // of predictions
    bool check;       // hold predictions against all gates, and count
    FfnCounters* counters;
    uint64_t* activations;  // [n_ff], counts tokens that a neuron was active for; or null
    // The part of a network that another device shares; null: all of it. It takes from `names`,
    // [n_tokens][name_words(n_ff)] in the host's memory, which neurons a predictor names, and
    // leaves down's bias out unless it is all neurons.
    const NeuronShard* shard = nullptr;
    const uint32_t* names = nullptr;
};

// Rows of a table, one for each token.
struct Lookup {
    const Weight* table;
    std::span<const int32_t> rows;  // [n_tokens]
};

// One output of a projection: rows of y = W·x + b, or y += W·x + b.
struct Projection {
    const Linear* linear;
    float* y;  // [n_tokens][n_rows]
    bool accumulate = false;
};

struct KvLayout {
    Type type = Type::f16;
    int64_t n_layer = 0;
    int64_t n_head_kv = 0;
    int64_t head_dim = 0;

    bool operator==(const KvLayout&) const = default;
};

// The tokens of one sequence in a batch: rows [row, row + n) at positions [position, position + n).
struct Segment {
    int64_t row;
    int64_t n;
    int64_t position;
    const int32_t* pages;  // the sequence's page table
};

// What every pass over the layers brings anew; valid until the next begin().
struct BatchInputs {
    int64_t n_tokens;
    std::span<const Segment> segments;
    std::span<const NeuronRule> rules;  // [n_tokens]
    const float* cos_sin;  // [n_tokens][n_rot/2][2], in the host's memory; null without rotation
    int64_t n_rot;
};

// Queries, keys and values of all tokens, which are `stride` floats apart; in one array, in this
// order.
struct Heads {
    float *q, *k, *v;  // [n_tokens][n_head or n_head_kv][head_dim]
    int64_t q_stride, kv_stride;
    int64_t n_head;
    int64_t n_rot;  // dimensions of a head that are rotated; 0: none
    bool neox;      // pairs are (i, i + n_rot/2), else (2i, 2i + 1)
};

// Where the keys and values of an accelerator's layers live, and who attends to them.
enum class KvMode {
    automatic,  // with the device if they fit there, else both
    device,     // all with the device
    host,       // all with the host
    split,      // all with the host, and copies with the device of as many pages as fit
};

// What is left of that choice when it is made.
struct KvShare {
    bool with_host = false;  // the host holds every page, the device copies of some; else it all
    int64_t n_pages = 0;     // that the device has room for, if so
    double host_share = 0;   // of the positions, that the host attends to at first
    double step = 0;         // of them, that one adaptation moves; 0: none does

    bool operator==(const KvShare&) const = default;
};

struct AttentionShape {
    int64_t n_head;
    int64_t sliding_window;  // 0: none
    float scale;
};

class Device {
  public:
    virtual ~Device() = default;

    // ---- memory ----
    // Zeroed room for n floats.
    virtual float* allocate(size_t n) = 0;
    virtual void release(float* array) = 0;
    // The same values where the host can read them: x itself, or a copy in `room`.
    virtual const float* host_view(const float* x, size_t n, AlignedBuffer<float>& room) = 0;
    virtual void write(const float* host, size_t n, float* out) = 0;
    // Reserves address space for n_pages pages; memory is taken as pages are written.
    virtual void reserve_kv(const KvLayout& layout, int64_t n_pages) = 0;
    virtual size_t kv_page_bytes() const = 0;  // of memory
    virtual void copy_kv_page(int32_t from, int32_t to) = 0;
    virtual void release_kv_page(int32_t page) = 0;  // gives its memory back
    // A page's contents, [n_layer][n_head_kv][kv_head_bytes]; see kernels/attention.h.
    virtual void read_kv_page(int32_t page, std::byte* out) const = 0;
    virtual void write_kv_page(int32_t page, const std::byte* data) = 0;
    virtual size_t scratch_bytes() const = 0;

    // ---- steps ----
    // Throws QI_CANCELLED once *cancel is set; polled inside every step.
    virtual void set_cancel(const std::atomic<bool>* cancel) = 0;
    virtual void set_threads(int n_threads) = 0;

    // The tokens that all steps until the next begin() are about.
    virtual void begin(const BatchInputs& inputs) = 0;
    // Runs `steps`, or does again what earlier steps of the same key did: they are the same ones,
    // with the same arguments and the same number of tokens; only what begin() brings differs.
    virtual void repeat(std::span<const int64_t> key, const std::function<void()>& steps) {
        (void)key;
        steps();
    }
    // out[i] = the sum of the lookups' rows i.
    virtual void embed(std::span<const Lookup> lookups, float* out) = 0;
    virtual void copy(const float* from, size_t n, float* to) = 0;
    virtual void norm(const Norm& norm, const float* x, int64_t n_rows, float* out) = 0;
    // out[i] = x[rows[i]], rows of `width` floats.
    virtual void gather(const float* x, std::span<const int64_t> rows, int64_t width,
                        float* out) = 0;
    // All projections share the input x [n_rows][n_cols].
    virtual void project(const float* x, int64_t n_rows, std::span<const Projection> outputs) = 0;
    // Rotates queries and keys in place and appends keys and values to those of one layer.
    virtual void append_kv(int64_t layer, const Heads& heads) = 0;
    // q [n_tokens][stride] → out [n_tokens][n_head · head_dim]
    virtual void attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                        float* out) = 0;
    // The host's share of the positions attended to in one layer by the last batch.
    virtual double kv_host_share(int64_t layer) const {
        (void)layer;
        return 0;
    }
    // Brings what feed_forward() has counted up to date; devices may count by themselves meanwhile.
    virtual void collect_counters() {}
    // Kernels launched so far, those of replays included.
    virtual uint64_t n_launches() const { return 0; }
    // y += FFN(x), each token by the neurons its rule chooses. Its result depends on nothing else
    // in the batch; with down by neuron, `exact` gives the bits that `all` gives.
    virtual void feed_forward(const FeedForward& ffn, const FfnBatch& batch, float* y) = 0;
    // Natural-log probability of targets[i] under logits [n][n_vocab]; targets and out are the
    // host's.
    virtual void log_probabilities(const float* logits, int64_t n, int64_t n_vocab,
                                   const int32_t* targets, float* out) = 0;
    // How many of a row's best logits are found at most; 0: the host reads all of them as fast.
    virtual int64_t best_max() const { return 0; }
    // Finds the k best of each row of logits [n][n_vocab]. 1 <= k <= best_max(), k <= n_vocab.
    virtual void find_best(const float* logits, int64_t n, int64_t n_vocab, int64_t k) {
        (void)logits, (void)n, (void)n_vocab, (void)k;
    }
    // Waits for what was last found: out [n][k], the host's, each row in order of rank, NaN before
    // all others.
    virtual void read_best(int64_t n, int64_t k, Candidate* out) { (void)n, (void)k, (void)out; }
    // Waits until all steps are done; what went wrong in one of them is thrown here at the latest.
    virtual void finish() {}
};

// A growing array in a device's memory; contents are lost when it grows.
class DeviceArray {
  public:
    explicit DeviceArray(Device& device) : device_(device) {}
    ~DeviceArray() { drop(); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    // Makes room for at least n floats and returns them.
    float* reserve(size_t n) {
        if (n > capacity_) {
            drop();
            data_ = device_.allocate(n);
            capacity_ = n;
        }
        return data_;
    }
    float* data() const { return data_; }
    size_t capacity_bytes() const { return capacity_ * sizeof(float); }

  private:
    void drop() {
        if (data_) device_.release(data_);
        data_ = nullptr;
        capacity_ = 0;
    }

    Device& device_;
    float* data_ = nullptr;
    size_t capacity_ = 0;
};

std::unique_ptr<Device> make_cpu_device(int n_threads);

}  // namespace qi
