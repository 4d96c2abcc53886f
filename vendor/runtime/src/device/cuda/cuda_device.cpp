#include "device/cuda/cuda_device.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "kernels/attention.h"

namespace qi::cuda {

namespace {

// Tokens that one launch of the matrix kernels takes.
constexpr int64_t few_tokens = 8;
constexpr size_t recordings_max = 32;

CUdeviceptr address(const float* array) {
    return reinterpret_cast<CUdeviceptr>(array);
}

int64_t words_of(int64_t n_ff) {
    return name_words(n_ff);
}

uint64_t bytes_of(const Linear& linear) {
    return uint64_t(linear.weight.n_rows) * linear.weight.row_bytes;
}

DeviceAct device_act(HiddenAct::Kind kind) {
    switch (kind) {
        case HiddenAct::Kind::silu:
            return DeviceAct::silu;
        case HiddenAct::Kind::relu:
            return DeviceAct::relu;
        case HiddenAct::Kind::gelu_erf:
            return DeviceAct::gelu_erf;
        case HiddenAct::Kind::gelu_tanh:
            return DeviceAct::gelu_tanh;
        case HiddenAct::Kind::fatrelu:
            return DeviceAct::fatrelu;
        case HiddenAct::Kind::relu_relu:
            return DeviceAct::relu_relu;
    }
    return DeviceAct::silu;
}

// Where everything lies that begin() brings: one array of 32-bit words.
struct InputLayout {
    size_t positions = 0, tables, rules, tiles, pages, cos_sin, n_words;

    explicit InputLayout(const DeviceNeeds& needs) {
        const auto n = size_t(needs.n_batch);
        tables = n;
        rules = 2 * n;
        tiles = rules + (n + 3) / 4;
        pages = tiles + 2 * n;
        cos_sin = pages + size_t(needs.n_pages);
        n_words = cos_sin + n * size_t(needs.kv.head_dim);
    }
};

// Arrays in device memory that a context has beside those it allocates, and their bytes.
struct WorkingSizes {
    size_t inputs, q8, hidden, lifted, low, predictions, masks, named, list, partial, other, attend,
        terms, totals, kv;

    WorkingSizes(const GpuShare& share, const DeviceNeeds& needs, const KvArgs& kv_args) {
        const int64_t n = needs.n_batch, few = std::min(n, few_tokens), n_ff = needs.n_ff;
        const int64_t widest =
            std::max({needs.n_embd, n_ff, needs.n_head * needs.kv.head_dim, needs.predictor_rank});
        inputs = InputLayout(needs).n_words * sizeof(uint32_t);
        q8 = Q8::n_bytes(n, widest);
        hidden = lifted = size_t(n * n_ff) * sizeof(float);
        low = size_t(few * needs.predictor_rank) * sizeof(float);
        predictions = needs.predictor_rank ? size_t(few * n_ff) * sizeof(float) : 0;
        masks = needs.predictor_rank ? size_t(n * words_of(n_ff)) * sizeof(uint32_t) : 0;
        named = needs.predictor_rank ? size_t(words_of(n_ff)) * sizeof(uint32_t) : 0;
        list = needs.predictor_rank ? NeuronList::n_bytes(n_ff) : 0;
        partial = size_t(n_partitions * few * needs.n_embd) * sizeof(float);
        other = size_t(n * needs.n_embd) * sizeof(float);
        AttendArgs attend_args;
        attend_args.kv = kv_args;
        attend_args.n_head = needs.n_head;
        attend_args.n_tokens = few;
        attend_args.max_positions = needs.n_pages * kernels::page_size;
        attend = share.kernels->attend_room_bytes(attend_args);
        terms = size_t(n) * (sizeof(Kernels::LogTerms) + sizeof(int32_t));
        totals = size_t(needs.kv.n_layer) * 2 * sizeof(uint64_t);
        kv = size_t(needs.n_pages) * kv_args.page_stride;
    }
};

KvArgs kv_args_for(const DeviceNeeds& needs) {
    KvArgs kv;
    kv.type = needs.kv.type;
    kv.head_bytes = kernels::kv_head_bytes(needs.kv.type, needs.kv.head_dim);
    kv.n_head_kv = needs.kv.n_head_kv;
    kv.head_dim = needs.kv.head_dim;
    kv.page_stride = size_t(needs.kv.n_layer * needs.kv.n_head_kv) * kv.head_bytes;
    return kv;
}

class CudaDevice final : public Device {
  public:
    CudaDevice(const GpuShare& share, const DeviceNeeds& needs, Device& host);
    ~CudaDevice() override;

    float* allocate(size_t n) override;
    void release(float* array) override;
    const float* host_view(const float* x, size_t n, AlignedBuffer<float>& room) override;
    void write(const float* host, size_t n, float* out) override;

    void reserve_kv(const KvLayout& layout, int64_t n_pages) override;
    size_t kv_page_bytes() const override { return kv_.page_stride; }
    void copy_kv_page(int32_t from, int32_t to) override;
    void release_kv_page(int32_t) override {}
    void read_kv_page(int32_t page, std::byte* out) const override;
    void write_kv_page(int32_t page, const std::byte* data) override;
    size_t scratch_bytes() const override { return scratch_bytes_; }

    void set_cancel(const std::atomic<bool>* cancel) override { cancel_ = cancel; }
    void set_threads(int) override {}

    void begin(const BatchInputs& inputs) override;
    void repeat(uint64_t key, const std::function<void()>& steps) override;
    void embed(std::span<const Lookup> lookups, float* out) override;
    void copy(const float* from, size_t n, float* to) override;
    void norm(const Norm& norm, const float* x, int64_t n_rows, float* out) override;
    void gather(const float* x, std::span<const int64_t> rows, int64_t width, float* out) override;
    void project(const float* x, int64_t n_rows, std::span<const Projection> outputs) override;
    void append_kv(int64_t layer, const Heads& heads) override;
    void attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                float* out) override;
    void collect_counters() override;
    void feed_forward(const FeedForward& ffn, const FfnBatch& batch, float* y) override;
    void log_probabilities(const float* logits, int64_t n, int64_t n_vocab, const int32_t* targets,
                           float* out) override;

  private:
    CUdeviceptr take(size_t n_bytes, const char* what);
    // The calling thread's way into the GPU for one step; throws QI_CANCELLED after a cancel.
    Current enter() const;
    CUdeviceptr input(size_t word) const { return inputs_ + word * sizeof(uint32_t); }
    KvArgs kv_of(int64_t layer) const;
    int64_t launch_positions() const;

    // x in the form that weights of that type want: quantised at most once while x does not change.
    Input prepared(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols);
    void forget_prepared(const void* written) {
        if (prepared_from_ == address(static_cast<const float*>(written))) prepared_from_ = 0;
    }

    void predict(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch);
    void compute_few(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                     bool predicting, float* y);
    void compute_many(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                      float* y);
    void add_down(const DeviceFfn& kept, const NeuronList* list, CUdeviceptr h, int64_t h_stride,
                  int64_t n, CUdeviceptr y);
    void count_active(const DeviceFfn& kept, const NeuronList* list, CUdeviceptr h,
                      int64_t h_stride, int64_t first, int64_t n);
    void send_to_host(const DeviceFfn& kept, const FfnBatch& batch, bool predicting);
    void add_of_host(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                     bool predicting, float* y);

    GpuShare share_;
    DeviceNeeds needs_;
    Device& host_;
    InputLayout layout_;
    Stream stream_;
    std::vector<DeviceMemory> memory_;
    std::unordered_map<float*, DeviceMemory> arrays_;
    size_t scratch_bytes_ = 0;
    const std::atomic<bool>* cancel_ = nullptr;

    // Addresses of the arrays that WorkingSizes lists.
    CUdeviceptr inputs_, q8_, hidden_, lifted_, low_, predictions_, masks_, named_, partial_,
        other_, attend_room_, terms_;
    NeuronList list_;
    KvArgs kv_;

    PinnedMemory staged_;  // of inputs
    Event staged_sent_;
    PinnedMemory embedded_;  // [n_batch][n_embd]
    Event embedded_sent_;
    PinnedMemory readback_;
    PinnedMemory host_x_, host_z_, host_y_;  // [n_tokens][n_embd], what the host's neurons need
    PinnedMemory host_names_;                // [n_tokens][n_words]
    Event sent_to_host_;

    BatchInputs batch_{};
    int64_t n_tiles_ = 0;
    int64_t max_positions_ = 0;

    CUdeviceptr prepared_from_ = 0;
    int64_t prepared_rows_ = 0, prepared_cols_ = 0;

    // What a network did since the counters were last collected, as far as the host knows; active
    // and predicted neurons are counted in device memory, [n_ffns][2].
    struct Tally {
        const FeedForward* ffn = nullptr;
        const DeviceFfn* kept = nullptr;
        FfnCounters* counters = nullptr;
        uint64_t n_tokens = 0;  // under a rule other than `all`
        uint64_t n_steps = 0;   // that predicted
        uint64_t n_gates = 0;   // groups of tokens that looked at every neuron kept,
        uint64_t n_whole = 0;   // and those that computed it
    };
    void add_tally(const Tally& more);
    std::vector<Tally> tallies_;
    CUdeviceptr totals_ = 0;
    FfnCounters of_host_{};  // what its neurons did in the step now computed

    // Steps recorded, by all that their launches depend on.
    struct Recording {
        int n_runs = 0;
        Graph graph;
        std::vector<Tally> tallies;  // what one run of it adds
    };
    using RecordingKey = std::tuple<uint64_t, int64_t, int64_t, bool>;
    std::map<RecordingKey, Recording> recordings_;
};

CudaDevice::CudaDevice(const GpuShare& share, const DeviceNeeds& needs, Device& host)
    : share_(share),
      needs_(needs),
      host_(host),
      layout_(needs),
      stream_(share.gpu),
      kv_(kv_args_for(needs)),
      staged_(share.gpu, layout_.n_words * sizeof(uint32_t), "the inputs of a batch"),
      staged_sent_(share.gpu),
      embedded_(share.gpu, size_t(needs.n_batch * needs.n_embd) * sizeof(float), "embeddings"),
      embedded_sent_(share.gpu),
      sent_to_host_(share.gpu) {
    const Current current(*share_.gpu);
    const WorkingSizes sizes(share_, needs_, kv_);
    inputs_ = take(sizes.inputs, "the inputs of a batch");
    q8_ = take(sizes.q8, "quantised activations");
    hidden_ = take(sizes.hidden, "activations");
    lifted_ = take(sizes.lifted, "activations");
    low_ = take(sizes.low, "predictions");
    predictions_ = take(sizes.predictions, "predictions");
    masks_ = take(sizes.masks, "predictions");
    named_ = take(sizes.named, "predictions");
    if (sizes.list) list_ = NeuronList::at(take(sizes.list, "predictions"), needs.n_ff);
    partial_ = take(sizes.partial, "activations");
    other_ = take(sizes.other, "activations");
    attend_room_ = take(sizes.attend, "attention");
    terms_ = take(sizes.terms, "log-probabilities");
    totals_ = take(sizes.totals, "counters");
    tallies_.resize(share_.weights->n_ffns());
    stream_.fill(totals_, 0, sizes.totals);
    kv_.pool = take(sizes.kv, "keys and values");
    AttendArgs tickets;
    tickets.kv = kv_;
    tickets.n_head = needs.n_head;
    tickets.n_tokens = std::min(needs.n_batch, few_tokens);
    stream_.fill(attend_room_, 0, Kernels::attend_ticket_bytes(tickets));
    stream_.synchronize();
}

CudaDevice::~CudaDevice() {
    // Memory goes back only when nothing writes into it any more.
    try {
        const Current current(*share_.gpu);
        stream_.synchronize();
    } catch (...) {
    }
}

CUdeviceptr CudaDevice::take(size_t n_bytes, const char* what) {
    if (n_bytes == 0) return 0;
    memory_.emplace_back(share_.gpu, share_.budget, n_bytes, what);
    scratch_bytes_ += memory_.back().n_bytes();
    return memory_.back().address();
}

Current CudaDevice::enter() const {
    if (cancel_ && cancel_->load(std::memory_order_relaxed)) fail(QI_CANCELLED, "cancelled");
    return Current(*share_.gpu);
}

// ---- memory ----

float* CudaDevice::allocate(size_t n) {
    const Current current(*share_.gpu);
    DeviceMemory memory(share_.gpu, share_.budget, n * sizeof(float), "activations");
    auto* const array = reinterpret_cast<float*>(memory.address());
    stream_.fill(memory.address(), 0, n * sizeof(float));
    arrays_.emplace(array, std::move(memory));
    return array;
}

void CudaDevice::release(float* array) {
    forget_prepared(array);
    recordings_.clear();  // they may use it
    arrays_.erase(array);
}

const float* CudaDevice::host_view(const float* x, size_t n, AlignedBuffer<float>&) {
    const Current current = enter();
    if (readback_.n_bytes() < n * sizeof(float))
        readback_ = PinnedMemory(share_.gpu, n * sizeof(float), "results");
    stream_.copy_to_host(readback_.data(), address(x), n * sizeof(float));
    stream_.synchronize();
    return reinterpret_cast<const float*>(readback_.data());
}

void CudaDevice::write(const float* host, size_t n, float* out) {
    const Current current = enter();
    forget_prepared(out);
    stream_.copy_to_device(address(out), host, n * sizeof(float));
    stream_.synchronize();
}

void CudaDevice::reserve_kv(const KvLayout& layout, int64_t n_pages) {
    if (n_pages > needs_.n_pages || layout.n_layer > needs_.kv.n_layer)
        fail(QI_INTERNAL, "more keys and values are wanted than the device was made for");
}

void CudaDevice::copy_kv_page(int32_t from, int32_t to) {
    const Current current = enter();
    stream_.copy_on_device(kv_.pool + size_t(to) * kv_.page_stride,
                           kv_.pool + size_t(from) * kv_.page_stride, kv_.page_stride);
}

void CudaDevice::read_kv_page(int32_t page, std::byte* out) const {
    const Current current = enter();
    stream_.copy_to_host(out, kv_.pool + size_t(page) * kv_.page_stride, kv_.page_stride);
    stream_.synchronize();
}

void CudaDevice::write_kv_page(int32_t page, const std::byte* data) {
    const Current current = enter();
    stream_.copy_to_device(kv_.pool + size_t(page) * kv_.page_stride, data, kv_.page_stride);
    stream_.synchronize();
}

// ---- steps ----

void CudaDevice::begin(const BatchInputs& inputs) {
    const Current current = enter();
    batch_ = inputs;
    staged_sent_.synchronize();
    auto* const words = reinterpret_cast<int32_t*>(staged_.data());
    int32_t *positions = words + layout_.positions, *tables = words + layout_.tables;
    int32_t *tiles = words + layout_.tiles, *pages = words + layout_.pages;
    auto* const rules = reinterpret_cast<uint8_t*>(words + layout_.rules);
    for (int64_t t = 0; t < inputs.n_tokens; ++t)
        rules[t] = uint8_t(inputs.rules[size_t(t)]);

    AttendArgs shape;
    shape.kv = kv_;
    shape.n_head = needs_.n_head;
    const int64_t tile_tokens = Kernels::attend_tile_tokens(shape);
    int64_t n_pages = 0;
    n_tiles_ = max_positions_ = 0;
    for (const Segment& segment : inputs.segments) {
        for (int64_t i = 0; i < segment.n; ++i) {
            positions[segment.row + i] = int32_t(segment.position + i);
            tables[segment.row + i] = int32_t(n_pages);
        }
        const int64_t end = segment.position + segment.n;
        const int64_t n_own = (end + kernels::page_size - 1) / kernels::page_size;
        std::copy_n(segment.pages, n_own, pages + n_pages);
        n_pages += n_own;
        max_positions_ = std::max(max_positions_, end);
        for (int64_t i = 0; i < segment.n && tile_tokens > 0; i += tile_tokens) {
            tiles[2 * n_tiles_] = int32_t(segment.row + i);
            tiles[2 * n_tiles_ + 1] = int32_t(std::min(tile_tokens, segment.n - i));
            ++n_tiles_;
        }
    }
    const size_t used = (layout_.pages + size_t(n_pages)) * sizeof(uint32_t);
    stream_.copy_to_device(inputs_, words, used);
    if (inputs.cos_sin) {
        const size_t n = size_t(inputs.n_tokens * inputs.n_rot);
        std::memcpy(words + layout_.cos_sin, inputs.cos_sin, n * sizeof(float));
        stream_.copy_to_device(input(layout_.cos_sin), words + layout_.cos_sin, n * sizeof(float));
    }
    staged_sent_.record(stream_);
}

// A pass of few tokens is hundreds of launches of microseconds each: recorded, they are one. The
// first run loads the kernels, the second is recorded.
void CudaDevice::repeat(uint64_t key, const std::function<void()>& steps) {
    if (batch_.n_tokens > few_tokens || !share_.weights->all_resident()) return steps();
    const bool predicting = std::find(batch_.rules.begin(), batch_.rules.end(),
                                      NeuronRule::predict) != batch_.rules.end();
    // Recordings take memory; a context that grows needs one per doubling of its length.
    if (recordings_.size() >= recordings_max) recordings_.clear();
    Recording& recording = recordings_[{key, batch_.n_tokens, launch_positions(), predicting}];
    if (recording.n_runs++ == 0) return steps();
    const Current current = enter();
    prepared_from_ = 0;
    if (!recording.graph) {
        std::vector<Tally> before(tallies_.size());
        before.swap(tallies_);
        recording.graph = Graph(stream_, steps);
        recording.tallies = std::move(tallies_);
        tallies_ = std::move(before);
    }
    recording.graph.launch(stream_);
    for (size_t i = 0; i < tallies_.size(); ++i)
        add_tally(recording.tallies[i]);
    prepared_from_ = 0;
}

void CudaDevice::add_tally(const Tally& more) {
    if (!more.ffn) return;
    Tally& tally = tallies_[more.kept->index];
    tally.ffn = more.ffn;
    tally.kept = more.kept;
    tally.counters = more.counters;
    tally.n_tokens += more.n_tokens;
    tally.n_steps += more.n_steps;
    tally.n_gates += more.n_gates;
    tally.n_whole += more.n_whole;
}

// The bound on positions that attention is launched for: it doubles, so that a growing context
// needs few shapes.
int64_t CudaDevice::launch_positions() const {
    return std::min(int64_t(std::bit_ceil(uint64_t(max_positions_))),
                    needs_.n_pages * kernels::page_size);
}

void CudaDevice::embed(std::span<const Lookup> lookups, float* out) {
    const Current current = enter();
    forget_prepared(out);
    embedded_sent_.synchronize();
    const int64_t n = batch_.n_tokens, width = lookups[0].table->n_cols;
    auto* const rows = reinterpret_cast<float*>(embedded_.data());
    // The tables stay with the host: a token reads one row of them.
    parallel_for(cpu_info().n_usable_cores, n, [&](int64_t i, int) {
        float* row = rows + i * width;
        kernels::decode_row(*lookups[0].table, lookups[0].rows[size_t(i)], row);
        std::vector<float> added(lookups.size() > 1 ? size_t(width) : 0);
        for (const Lookup& other : lookups.subspan(1)) {
            kernels::decode_row(*other.table, other.rows[size_t(i)], added.data());
            kernels::add(row, added.data(), width, row);
        }
    });
    stream_.copy_to_device(address(out), rows, size_t(n * width) * sizeof(float));
    embedded_sent_.record(stream_);
}

void CudaDevice::copy(const float* from, size_t n, float* to) {
    const Current current = enter();
    forget_prepared(to);
    stream_.copy_on_device(address(to), address(from), n * sizeof(float));
}

void CudaDevice::gather(const float* x, std::span<const int64_t> rows, int64_t width, float* out) {
    const Current current = enter();
    forget_prepared(out);
    for (size_t i = 0; i < rows.size(); ++i)
        stream_.copy_on_device(address(out + int64_t(i) * width), address(x + rows[i] * width),
                               size_t(width) * sizeof(float));
}

void CudaDevice::norm(const Norm& norm, const float* x, int64_t n_rows, float* out) {
    const Current current = enter();
    const DeviceNorm& kept = share_.weights->find(norm);
    NormArgs args;
    args.layer = norm.kind == Norm::Kind::layer;
    args.epsilon = norm.epsilon;
    args.weight = kept.weight;
    args.bias = kept.bias;
    args.x = address(x);
    args.n_tokens = n_rows;
    args.n = int64_t(norm.weight.size());
    args.out = address(out);
    args.q8 = Q8::at(q8_, n_rows, args.n);
    share_.kernels->norm(stream_, args);
    prepared_from_ = args.out;
    prepared_rows_ = n_rows;
    prepared_cols_ = args.n;
}

Input CudaDevice::prepared(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols) {
    Input in{x, {}, n_rows};
    if (!wants_q8(type)) return in;
    in.q8 = Q8::at(q8_, n_rows, n_cols);
    if (prepared_from_ != x || prepared_rows_ != n_rows || prepared_cols_ != n_cols) {
        share_.kernels->quantise(stream_, x, n_rows, n_cols, in.q8);
        prepared_from_ = x;
        prepared_rows_ = n_rows;
        prepared_cols_ = n_cols;
    }
    return in;
}

void CudaDevice::project(const float* x, int64_t n_rows, std::span<const Projection> outputs) {
    const Current current = enter();
    const int64_t n_cols = outputs[0].linear->weight.n_cols;
    for (size_t first = 0; first < outputs.size();) {
        // Neighbours of one type go together.
        std::vector<Product> products;
        const Type type = outputs[first].linear->weight.type;
        const bool accumulate = outputs[first].accumulate;
        size_t end = first;
        for (; end < outputs.size() && outputs[end].linear->weight.type == type &&
               outputs[end].accumulate == accumulate;
             ++end) {
            const DeviceLinear& kept = share_.weights->find(*outputs[end].linear);
            products.push_back(
                {kept.weight, kept.bias, address(outputs[end].y), kept.weight.n_rows});
        }
        share_.kernels->multiply(stream_, prepared(type, address(x), n_rows, n_cols), products,
                                 accumulate);
        first = end;
    }
    for (const Projection& output : outputs)
        forget_prepared(output.y);
}

KvArgs CudaDevice::kv_of(int64_t layer) const {
    KvArgs kv = kv_;
    kv.layer_offset = size_t(layer * kv.n_head_kv) * kv.head_bytes;
    kv.pages = input(layout_.pages);
    kv.positions = input(layout_.positions);
    kv.tables = input(layout_.tables);
    return kv;
}

void CudaDevice::append_kv(int64_t layer, const Heads& heads) {
    const Current current = enter();
    AppendArgs args;
    args.kv = kv_of(layer);
    args.q = address(heads.q);
    args.q_stride = heads.q_stride;
    args.n_head = heads.n_head;
    args.k = address(heads.k);
    args.v = address(heads.v);
    args.kv_stride = heads.kv_stride;
    args.cos_sin = heads.n_rot > 0 ? input(layout_.cos_sin) : 0;
    args.n_rot = heads.n_rot;
    args.neox = heads.neox;
    args.n_tokens = batch_.n_tokens;
    share_.kernels->append(stream_, args);
}

void CudaDevice::attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                        float* out) {
    const Current current = enter();
    forget_prepared(out);
    AttendArgs args;
    args.kv = kv_of(layer);
    args.q = address(q);
    args.q_stride = stride;
    args.n_head = shape.n_head;
    args.scale = shape.scale;
    args.window = shape.sliding_window;
    args.out = address(out);
    args.room = attend_room_;
    const int64_t n = batch_.n_tokens;
    if (n > few_tokens && n_tiles_ > 0) {
        args.n_tokens = n;
        args.tiles = input(layout_.tiles);
        args.n_tiles = n_tiles_;
        share_.kernels->attend_tiles(stream_, args);
        return;
    }
    args.max_positions = launch_positions();
    for (int64_t first = 0; first < n; first += few_tokens) {
        AttendArgs some = args;
        some.n_tokens = std::min(few_tokens, n - first);
        some.q += size_t(first * stride) * sizeof(float);
        some.out += size_t(first * shape.n_head * kv_.head_dim) * sizeof(float);
        some.kv.positions += size_t(first) * sizeof(int32_t);
        some.kv.tables += size_t(first) * sizeof(int32_t);
        share_.kernels->attend(stream_, some);
    }
}

// ---- feed-forward ----

void CudaDevice::feed_forward(const FeedForward& ffn, const FfnBatch& batch, float* y) {
    const Current current = enter();
    const DeviceFfn& kept = share_.weights->find(ffn);
    const bool wanted = std::any_of(batch_.rules.begin(), batch_.rules.end(),
                                    [](NeuronRule rule) { return rule == NeuronRule::predict; });
    const bool predicting = wanted && kept.n_slots() > 0;
    // Biases stand by neuron, not by slot.
    const bool by_slot = kept.whole() || (!kept.weights.gate_bias && !kept.weights.up_bias);
    const bool many = batch_.n_tokens > few_tokens && !predicting && by_slot;
    Tally tally{&ffn, &kept, batch.counters};
    tally.n_steps += predicting;
    const int64_t together = many ? batch_.n_tokens : few_tokens;
    for (int64_t first = 0; first < batch_.n_tokens; first += together) {
        bool gates = false, whole = false;
        for (int64_t t = first; t < std::min(batch_.n_tokens, first + together); ++t) {
            const NeuronRule rule = batch_.rules[size_t(t)];
            tally.n_tokens += rule != NeuronRule::all;
            gates |= rule != NeuronRule::predict;
            whole |= rule == NeuronRule::all;
        }
        tally.n_gates += gates;
        tally.n_whole += whole;
    }
    add_tally(tally);
    if (predicting) predict(ffn, kept, batch);
    // The host begins while the GPU computes.
    if (!kept.whole()) send_to_host(kept, batch, predicting);
    if (many && kept.n_slots() > 0)
        compute_many(ffn, kept, batch, y);
    else if (kept.n_slots() > 0)
        compute_few(ffn, kept, batch, predicting, y);
    if (!kept.whole()) add_of_host(ffn, kept, batch, predicting, y);
    forget_prepared(y);
}

// Masks of all tokens: the neurons that each may use.
void CudaDevice::predict(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch) {
    const DeviceLinear& fc1 = share_.weights->find(ffn.predictor->fc1);
    const DeviceLinear& fc2 = share_.weights->find(ffn.predictor->fc2);
    const int64_t n = batch_.n_tokens, n_embd = fc1.weight.n_cols, rank = fc1.weight.n_rows;
    for (int64_t first = 0; first < n; first += few_tokens) {
        const int64_t some = std::min(few_tokens, n - first);
        const Input z = prepared(fc1.weight.type, address(batch.z + first * n_embd), some, n_embd);
        const ::qi::cuda::Product low{fc1.weight, fc1.bias, low_, rank};
        share_.kernels->multiply(stream_, z, {&low, 1}, false);
        ActMulArgs relu;
        relu.act = DeviceAct::relu;
        relu.gate = relu.h = low_;
        relu.n_tokens = some;
        relu.n = rank;
        relu.q8 = wants_q8(fc2.weight.type) ? Q8::at(q8_, some, rank) : Q8{};
        share_.kernels->act_mul(stream_, relu);
        prepared_from_ = 0;
        const ::qi::cuda::Product out{fc2.weight, fc2.bias, predictions_, needs_.n_ff};
        share_.kernels->multiply(stream_, {low_, relu.q8, some}, {&out, 1}, false);
        share_.kernels->predicted_masks(
            stream_, predictions_, batch.threshold, input(layout_.rules) + size_t(first), some,
            needs_.n_ff, masks_ + size_t(first * words_of(needs_.n_ff)) * sizeof(uint32_t), named_);
    }
    for (int64_t t = 0; t < n; ++t)
        if (batch_.rules[size_t(t)] == NeuronRule::predict)
            share_.kernels->count_bits(
                stream_, masks_ + size_t(t * words_of(needs_.n_ff)) * sizeof(uint32_t),
                words_of(needs_.n_ff), totals_ + (2 * kept.index + 1) * sizeof(uint64_t));
}

// Neuron by neuron, those that no token uses left out; a few tokens at a time.
void CudaDevice::compute_few(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                             bool predicting, float* y) {
    Kernels& kernels = *share_.kernels;
    const int64_t n = batch_.n_tokens, n_ff = needs_.n_ff, n_embd = needs_.n_embd;
    for (int64_t first = 0; first < n; first += few_tokens) {
        const int64_t some = std::min(few_tokens, n - first);
        const CUdeviceptr x = address(batch.x + first * n_embd);
        FfnArgs args;
        args.w = kept.weights;
        args.act = device_act(ffn.act.kind);
        args.threshold = ffn.act.threshold;
        args.h = hidden_;
        args.list = kept.whole() ? nullptr : &kept.list;
        if (predicting) {
            args.masks = masks_ + size_t(first * words_of(n_ff)) * sizeof(uint32_t);
            // Columns of an ordinary down are those of all slots.
            if (n <= few_tokens && ffn.down_by_neuron) {
                kernels.compact(stream_, named_, kept.slot_of_neuron, n_ff, list_);
                args.list = &list_;
            }
        }
        args.h_stride = args.list ? args.list->capacity : n_ff;
        if (ffn.gated && args.w.gate_type != args.w.up_type) {
            const ::qi::cuda::Product gates{kept.gate(), args.w.gate_bias, lifted_, n_ff};
            const Input in = prepared(args.w.gate_type, x, some, n_embd);
            if (args.list)
                kernels.multiply_listed(stream_, in, gates, *args.list, true);
            else
                kernels.multiply(stream_, in, {&gates, 1}, false);
            args.gates = lifted_;
        }
        args.in = prepared(args.w.up_type, x, some, n_embd);
        kernels.ffn_rows(stream_, args);
        count_active(kept, args.list, hidden_, args.h_stride, first, some);
        const CUdeviceptr out = address(y + first * n_embd);
        if (ffn.down_by_neuron) {
            add_down(kept, args.list, hidden_, args.h_stride, some, out);
            continue;
        }
        prepared_from_ = 0;
        const Input h = prepared(kept.down.type, hidden_, some, kept.down.n_cols);
        const ::qi::cuda::Product down{kept.down, kept.down_bias, out, n_embd};
        kernels.multiply(stream_, h, {&down, 1}, true);
        prepared_from_ = 0;
    }
}

// Whole matrices, for prompts.
void CudaDevice::compute_many(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                              float* y) {
    Kernels& kernels = *share_.kernels;
    const NeuronWeights& w = kept.weights;
    const int64_t n = batch_.n_tokens, n_embd = needs_.n_embd, n_slots = kept.n_slots();
    const CUdeviceptr x = address(batch.x);
    const ::qi::cuda::Product gate{kept.gate(), w.gate_bias, hidden_, n_slots};
    const ::qi::cuda::Product up{kept.up(), w.up_bias, ffn.gated ? lifted_ : hidden_, n_slots};
    if (ffn.gated)
        kernels.multiply(stream_, prepared(w.gate_type, x, n, n_embd), {&gate, 1}, false);
    kernels.multiply(stream_, prepared(w.up_type, x, n, n_embd), {&up, 1}, false);
    const bool by_neuron = ffn.down_by_neuron;
    ActMulArgs act;
    act.act = device_act(ffn.act.kind);
    act.threshold = ffn.act.threshold;
    act.gate = act.h = hidden_;
    act.up = ffn.gated ? lifted_ : 0;
    act.n_tokens = n;
    act.n = n_slots;
    if (!by_neuron && wants_q8(kept.down.type)) act.q8 = Q8::at(q8_, n, n_slots);
    kernels.act_mul(stream_, act);
    count_active(kept, kept.whole() ? nullptr : &kept.list, hidden_, n_slots, 0, n);
    prepared_from_ = 0;
    if (!by_neuron) {
        const ::qi::cuda::Product down{kept.down, kept.down_bias, address(y), n_embd};
        kernels.multiply(stream_, {hidden_, act.q8, n}, {&down, 1}, true);
        return;
    }
    for (int64_t first = 0; first < n; first += few_tokens)
        add_down(kept, kept.whole() ? nullptr : &kept.list,
                 hidden_ + size_t(first * n_slots) * sizeof(float), n_slots,
                 std::min(few_tokens, n - first), address(y + first * n_embd));
}

// y += down of h, which stands by place in the list.
void CudaDevice::add_down(const DeviceFfn& kept, const NeuronList* list, CUdeviceptr h,
                          int64_t h_stride, int64_t n, CUdeviceptr y) {
    DownArgs args;
    args.w = kept.weights;
    args.list = list;
    args.h = h;
    args.h_stride = h_stride;
    args.n_tokens = n;
    args.partial = partial_;
    share_.kernels->down_rows(stream_, args);
    share_.kernels->add_partials(stream_, partial_, kept.down_bias, 0, n, needs_.n_embd, y);
}

namespace {

// Pinned room for n bytes; contents are lost when it grows.
std::byte* room_of(PinnedMemory& memory, const std::shared_ptr<Gpu>& gpu, size_t n_bytes) {
    if (memory.n_bytes() < n_bytes) memory = PinnedMemory(gpu, n_bytes, "what the host computes");
    return memory.data();
}

}  // namespace

// Neurons that contributed to tokens [first, first + n), whose values begin at h, as far as they
// are counted.
void CudaDevice::count_active(const DeviceFfn& kept, const NeuronList* list, CUdeviceptr h,
                              int64_t h_stride, int64_t first, int64_t n) {
    DownArgs args;
    args.w = kept.weights;
    args.list = list;
    args.h_stride = h_stride;
    for (int64_t begin = 0, end; begin < n; begin = end) {
        // Runs of tokens that count, or do not.
        const auto counts = [&](int64_t t) {
            return batch_.rules[size_t(first + t)] != NeuronRule::all;
        };
        for (end = begin + 1; end < n && end - begin < few_tokens; ++end)
            if (counts(end) != counts(begin)) break;
        if (!counts(begin)) continue;
        args.h = h + size_t(begin * h_stride) * sizeof(float);
        args.n_tokens = end - begin;
        share_.kernels->count_active(stream_, args, 0, totals_ + 2 * kept.index * sizeof(uint64_t));
    }
}

void CudaDevice::collect_counters() {
    const bool any = std::any_of(tallies_.begin(), tallies_.end(),
                                 [](const Tally& tally) { return tally.ffn != nullptr; });
    if (!any) return;
    const Current current(*share_.gpu);
    std::vector<uint64_t> totals(2 * tallies_.size());
    stream_.copy_to_host(totals.data(), totals_, totals.size() * sizeof(uint64_t));
    stream_.fill(totals_, 0, totals.size() * sizeof(uint64_t));
    stream_.synchronize();
    for (size_t i = 0; i < tallies_.size(); ++i) {
        const Tally& tally = tallies_[i];
        if (!tally.ffn) continue;
        const FeedForward& ffn = *tally.ffn;
        const uint64_t n_active = totals[2 * i], n_predicted = totals[2 * i + 1];
        FfnCounters& counters = *tally.counters;
        counters.n_tokens += tally.n_tokens;
        counters.n_active += n_active;
        counters.n_predicted += n_predicted;
        // Active and predicted rows as if each token read its own: tokens computed together share
        // some.
        const size_t first_row = ffn.first().weight.row_bytes;
        const size_t other_rows = (ffn.gated ? ffn.up.weight.row_bytes : 0) +
                                  (ffn.down_by_neuron ? ffn.down.weight.row_bytes : 0);
        const auto n_slots = uint64_t(tally.kept->n_slots());
        counters.n_bytes += (tally.n_gates * n_slots + n_predicted) * first_row +
                            (tally.n_whole * n_slots + n_active) * other_rows;
        if (ffn.predictor)
            counters.n_bytes +=
                tally.n_steps * (bytes_of(ffn.predictor->fc1) + bytes_of(ffn.predictor->fc2));
    }
    std::fill(tallies_.begin(), tallies_.end(), Tally{});
}

// What the host needs for its neurons.
void CudaDevice::send_to_host(const DeviceFfn& kept, const FfnBatch& batch, bool predicting) {
    const size_t bytes = size_t(batch_.n_tokens * needs_.n_embd) * sizeof(float);
    stream_.copy_to_host(room_of(host_x_, share_.gpu, bytes), address(batch.x), bytes);
    if (kept.n_slots() == 0 && batch.z)
        stream_.copy_to_host(room_of(host_z_, share_.gpu, bytes), address(batch.z), bytes);
    if (predicting) {
        const size_t n = size_t(batch_.n_tokens * words_of(needs_.n_ff)) * sizeof(uint32_t);
        stream_.copy_to_host(room_of(host_names_, share_.gpu, n), masks_, n);
    }
    sent_to_host_.record(stream_);
}

// What the neurons that the host keeps add.
void CudaDevice::add_of_host(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                             bool predicting, float* y) {
    const size_t bytes = size_t(batch_.n_tokens * needs_.n_embd) * sizeof(float);
    FfnBatch of_host = batch;
    of_host_ = {};
    if (kept.n_slots() > 0) of_host.counters = &of_host_;
    of_host.x = reinterpret_cast<const float*>(host_x_.data());
    of_host.z = nullptr;
    if (kept.n_slots() > 0) {
        of_host.shard = &kept.rest;
        if (predicting) of_host.names = reinterpret_cast<const uint32_t*>(host_names_.data());
    } else if (batch.z) {
        of_host.z = reinterpret_cast<const float*>(host_z_.data());
    }
    auto* const out = reinterpret_cast<float*>(room_of(host_y_, share_.gpu, bytes));
    // The last layer's sum has been sent by then.
    sent_to_host_.synchronize();
    std::memset(out, 0, bytes);
    host_.begin(batch_);
    host_.feed_forward(ffn, of_host, out);
    // Tokens and predictions are counted with the GPU's.
    batch.counters->n_active += of_host_.n_active;
    batch.counters->n_bytes += of_host_.n_bytes;
    stream_.copy_to_device(other_, out, bytes);
    share_.kernels->add(stream_, other_, batch_.n_tokens, needs_.n_embd, address(y));
}

void CudaDevice::log_probabilities(const float* logits, int64_t n, int64_t n_vocab,
                                   const int32_t* targets, float* out) {
    const Current current = enter();
    const CUdeviceptr device_targets = terms_ + size_t(n) * sizeof(Kernels::LogTerms);
    stream_.copy_to_device(device_targets, targets, size_t(n) * sizeof(int32_t));
    share_.kernels->log_terms(stream_, address(logits), n, n_vocab, device_targets, terms_);
    std::vector<Kernels::LogTerms> terms(static_cast<size_t>(n));
    stream_.copy_to_host(terms.data(), terms_, terms.size() * sizeof(Kernels::LogTerms));
    stream_.synchronize();
    for (int64_t i = 0; i < n; ++i)
        out[i] = float(terms[size_t(i)].log_probability());
}

}  // namespace

size_t working_bytes(const GpuShare& share, const DeviceNeeds& needs) {
    const WorkingSizes s(share, needs, kv_args_for(needs));
    size_t bytes = 0;
    for (const size_t n : {s.inputs, s.q8, s.hidden, s.lifted, s.low, s.predictions, s.masks,
                           s.named, s.list, s.partial, s.other, s.attend, s.terms, s.totals, s.kv})
        if (n > 0) bytes += DeviceMemory::counted_bytes(n);
    for (const size_t n : needs.arrays)
        if (n > 0) bytes += DeviceMemory::counted_bytes(n * sizeof(float));
    return bytes;
}

std::unique_ptr<Device> make_cuda_device(const GpuShare& share, const DeviceNeeds& needs,
                                         Device& host) {
    return std::make_unique<CudaDevice>(share, needs, host);
}

}  // namespace qi::cuda
