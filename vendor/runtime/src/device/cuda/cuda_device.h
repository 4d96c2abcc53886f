// A GPU as a device: the steps of a forward pass as launches on one stream.
//
// Weights are those that a Weights keeps; neurons that it leaves to the host are computed there,
// while the GPU computes its own. Everything a step needs to know of the batch lies in device
// memory at fixed addresses, so that the steps of a few tokens are recorded once and replayed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "device/cuda/exchange.h"
#include "device/cuda/gpu.h"
#include "device/cuda/half_products.h"
#include "device/cuda/launch.h"
#include "device/cuda/neuron_mover.h"
#include "device/cuda/neuron_panels.h"
#include "device/cuda/shared_kv.h"
#include "device/cuda/weights.h"
#include "device/cuda/working_space.h"
#include "device/device.h"

namespace qi::cuda {

// Arrays that a device allocates are addresses of its memory.
inline CUdeviceptr address(const float* array) {
    return reinterpret_cast<CUdeviceptr>(array);
}

DeviceAct device_act(HiddenAct::Kind kind);

class CudaDevice final : public Device {
  public:
    CudaDevice(const GpuShare& share, const DeviceNeeds& needs, Device& host);
    ~CudaDevice() override;

    float* allocate(size_t n) override;
    void release(float* array) override;
    const float* host_view(const float* x, size_t n, AlignedBuffer<float>& room) override;
    void write(const float* host, size_t n, float* out) override;

    void reserve_kv(const KvLayout& layout, int64_t n_pages) override;
    size_t kv_page_bytes() const override;
    void copy_kv_page(int32_t from, int32_t to) override;
    void release_kv_page(int32_t page) override;
    void read_kv_page(int32_t page, std::byte* out) const override;
    void write_kv_page(int32_t page, const std::byte* data) override;
    size_t scratch_bytes() const override { return scratch_bytes_; }

    void set_cancel(const std::atomic<bool>* cancel) override;
    void set_threads(int n_threads) override;

    void begin(const BatchInputs& inputs) override;
    void repeat(std::span<const int64_t> key, const std::function<void()>& steps) override;
    void embed(std::span<const Lookup> lookups, float* out) override;
    void copy(const float* from, size_t n, float* to) override;
    void norm(const Norm& norm, const float* x, int64_t n_rows, float* out) override;
    void gather(const float* x, std::span<const int64_t> rows, int64_t width, float* out) override;
    void project(const float* x, int64_t n_rows, std::span<const Projection> outputs) override;
    void append_kv(int64_t layer, const Heads& heads) override;
    void attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                float* out) override;
    double kv_host_share(int64_t layer) const override;
    void collect_counters() override;
    uint64_t n_launches() const override { return stream_.n_launches(); }
    void feed_forward(const FeedForward& ffn, const FfnBatch& batch, float* y) override;
    void log_probabilities(const float* logits, int64_t n, int64_t n_vocab, const int32_t* targets,
                           float* out) override;
    int64_t best_max() const override { return best_of(needs_); }
    void find_best(const float* logits, int64_t n, int64_t n_vocab, int64_t k) override;
    void read_best(int64_t n, int64_t k, Candidate* out) override;
    void finish() override;

  private:
    void replay_or_run(std::span<const int64_t> key, const std::function<void()>& steps);
    CUdeviceptr take(size_t n_bytes, const char* what);
    CUdeviceptr take_zeros(size_t n_bytes, const char* what);
    // The calling thread's way into the GPU for one step; throws QI_CANCELLED after a cancel.
    Current enter() const;
    CUdeviceptr input(size_t word) const { return inputs_ + word * sizeof(uint32_t); }
    KvArgs kv_of(int64_t layer) const;
    CUdeviceptr page_address(int32_t page) const {
        return kv_.pool + size_t(page) * kv_.page_stride;
    }
    int64_t place_pages(const Segment& segment, int64_t n_pages, int32_t* table);
    void adapt_kv();
    // Rounds of layers' attention have kinds behind those of networks.
    int64_t kind_of_kv(int64_t layer) const { return int64_t(share_.weights->n_ffns()) + layer; }
    void attend_here(const AttendArgs& all);
    int64_t launch_positions() const;

    // x in the form that weights of that type want: quantised at most once while x does not change.
    Input prepared(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols);
    // The same in predictors' own room, of few tokens: what stands in the other is wanted later.
    Input prepared_for_predictor(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols);
    // Products of x with matrices of one type: by rows for few tokens, for many by tiles or through
    // cuBLAS, whichever is faster.
    void multiply(Type type, CUdeviceptr x, int64_t n_rows, int64_t n_cols,
                  std::span<const cuda::Product> products, bool accumulate);
    void multiply_by_neuron(const DownTileArgs& args);
    // Whether cuBLAS multiplies such matrices faster, measured if it is not known yet; hidden_ and
    // lifted_ may be overwritten then.
    bool choose_cublas(const DeviceWeight& w, ProductChoice::What what, CUdeviceptr x,
                       int64_t n_tokens);
    bool known_cublas(Type type, ProductChoice::What what, int64_t n_tokens) const;
    void choose_for(const FeedForward& ffn, const DeviceFfn& kept, CUdeviceptr x);

    // Whether neurons that the host keeps are brought over and computed here, for this batch. Where
    // it is not known what takes less time, one network is computed each way, and both are timed.
    bool streams(const FeedForward& ffn, const DeviceFfn& kept);
    void compute_streamed(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                          float* y);
    void add_trial(const FeedForward& ffn, const DeviceFfn& kept, bool streamed, double seconds);
    void forget_prepared(const float* written) {
        if (prepared_.from == address(written)) prepared_ = {};
        if (for_predictor_.from == address(written)) for_predictor_ = {};
    }
    void forget_prepared() { prepared_ = for_predictor_ = {}; }

    void predict(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch);
    bool predicts() const { return std::ranges::count(batch_.rules, NeuronRule::predict) > 0; }
    // Whether the neurons that tokens name are listed. Columns of an ordinary down are those of all
    // slots.
    bool lists_predicted(const FeedForward& ffn) const {
        return batch_.n_tokens <= few_tokens && ffn.down_by_neuron;
    }
    void compute_few(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                     bool predicting, float* y);
    void compute_many(const FeedForward& ffn, const DeviceFfn& kept, const FfnBatch& batch,
                      float* y);
    void add_down(const DeviceFfn& kept, const NeuronList* list, CUdeviceptr h, int64_t h_stride,
                  int64_t n, CUdeviceptr y);
    void count_active(const DeviceFfn& kept, CUdeviceptr h, int64_t h_stride, int64_t n);
    CUdeviceptr total(const DeviceFfn& kept, size_t which) const {
        return totals_ + (n_totals * kept.index + which) * sizeof(uint64_t);
    }
    CUdeviceptr counts_of(size_t index) const {
        return counts_ + index * size_t(needs_.n_ff) * sizeof(uint64_t);
    }
    void check_predictions(const FeedForward& ffn, const DeviceFfn& kept, CUdeviceptr x,
                           int64_t first, int64_t n);
    void collect_activations();
    void stop_counting();
    uint64_t* counts_of_mover(const DeviceFfn& kept) const;
    // A network's neurons that the host keeps: what it needs of a batch, what it does, and what
    // that adds to y.
    Exchange::Round send_to_host(const FeedForward& ffn, const DeviceFfn& kept,
                                 const FfnBatch& batch, bool predicting);
    void compute_of_host(const FeedForward& ffn, const DeviceFfn& kept, FfnBatch batch,
                         bool predicting);
    void collect_times();

    GpuShare share_;
    DeviceNeeds needs_;
    Device& host_;
    InputLayout layout_;
    Stream stream_;
    std::vector<DeviceMemory> memory_;
    std::unordered_map<float*, DeviceMemory> arrays_;
    std::vector<DeviceMemory> spare_;  // arrays that will be asked for
    size_t scratch_bytes_ = 0;
    const std::atomic<bool>* cancel_ = nullptr;

    // Addresses of the arrays that WorkingSizes lists.
    CUdeviceptr inputs_, q8_, predictor_q8_, hidden_, lifted_, low_, predictions_, masks_, listed_,
        select_ticket_, partial_, down_tickets_, attend_room_, attend_tickets_, terms_, tickets_,
        partial_best_, best_, kv_terms_, kv_other_;
    NeuronList list_;
    KvArgs kv_;

    PinnedMemory staged_;  // of inputs
    Event staged_sent_;
    PinnedMemory embedded_;  // [n_batch][n_embd]
    Event embedded_sent_;
    PinnedMemory readback_;
    PinnedMemory candidates_;  // [n][k], as best_

    // Where the host keeps neurons, or keys and values.
    std::optional<Exchange> exchange_;
    PinnedMemory host_x_, host_z_, host_y_;  // [n_batch][n_embd]
    PinnedMemory host_names_;                // [n_batch][n_words]
    std::vector<FfnCounters*> shared_;       // by DeviceFfn::index, of networks computed so

    std::unique_ptr<NeuronMover::Member> member_;  // where neurons move
    std::vector<uint32_t> named_;                  // as host_names_, of the round last answered
    int64_t n_uncollected_ = 0;  // tokens whose active neurons the GPU has counted for it
    std::optional<SharedKv> shared_kv_;
    Exchange::Round kv_round_{};  // of the layer now computed
    bool replayed_ = false;       // the last pass was
    std::optional<HalfProducts> halves_;
    std::optional<NeuronPanels> panels_;
    // Seconds per neuron, brought here and with the host, of batches whose way is not known yet; 0:
    // not measured. By type and tokens, as ProductChoice has them.
    struct Trial {
        double streamed = 0, host = 0;
        bool is_warm = false;  // brought once
    };
    std::map<std::pair<Type, int64_t>, Trial> trials_;

    BatchInputs batch_{};
    int64_t n_tiles_ = 0;
    int64_t max_positions_ = 0;

    // Rows whose quantised copies stand in q8_ and in predictor_q8_; from 0: none.
    struct Prepared {
        CUdeviceptr from = 0;
        int64_t n_rows = 0, n_cols = 0;
        bool operator==(const Prepared&) const = default;
    };
    Prepared prepared_, for_predictor_;

    // What a network did since the counters were last collected, as far as the host knows; the rest
    // is counted in device memory: totals_ uint64 [n_ffns][n_totals], and by neuron
    // counts_ uint64 [n_ffns][n_ff].
    struct Tally {
        const FeedForward* ffn = nullptr;
        const DeviceFfn* kept = nullptr;
        FfnCounters* counters = nullptr;
        uint64_t* activations = nullptr;   // [n_ff], or null where neurons are not counted
        uint64_t n_tokens = 0;             // under a rule other than `all`
        uint64_t n_checked = 0;            // under `predict`, whose predictions were checked
        uint64_t n_steps = 0;              // that predicted
        uint64_t n_groups = 0;             // of tokens computed together,
        uint64_t n_gates = 0;              // those that looked at every neuron kept,
        uint64_t n_whole = 0;              // and those that computed it
        uint64_t n_predicted_of_host = 0;  // predicted neurons that the host keeps
        uint64_t n_streamed_bytes = 0;     // of neurons that were brought here
    };
    void add_tally(const Tally& more);
    std::vector<Tally> tallies_;
    CUdeviceptr totals_ = 0, counts_ = 0;
    bool counting_ = false;  // neurons, in the step now computed

    // Steps recorded, by all that their launches depend on.
    struct Recording {
        Graph graph;  // none after the first run
        Exchange::Answers answers;
        std::vector<Tally> tallies;  // what one run of it adds
        uint64_t last_use = 0;
    };
    bool record(Recording& recording, const std::function<void()>& steps);
    // The steps' own key, who attends, tokens, bound on positions, rules.
    using RecordingKey =
        std::tuple<std::vector<int64_t>, SharedKv::Form, int64_t, int64_t, uint64_t>;
    std::map<RecordingKey, Recording> recordings_;
    uint64_t n_uses_ = 0;
    int n_failed_recordings_ = 0;
    bool cannot_record_ = false;  // for lack of memory, or because it keeps failing
};

}  // namespace qi::cuda
