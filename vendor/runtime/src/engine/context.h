// A context: sequences of tokens over one model, fed in batches, with the outputs that were asked
// for.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/forward.h"
#include "engine/kv_cache.h"
#include "engine/offload.h"
#include "model/model.h"

namespace qi {

class Sampler;

struct ContextOptions {
    int64_t n_ctx = 0;  // positions per sequence; 0: what the model was trained for
    int64_t n_seq = 1;
    int64_t n_batch = 0;  // tokens computed together at most; 0: 512
    int n_threads = 0;    // 0: usable physical cores
    Type kv_type = Type::f16;
    KvWish kv;
    NeuronPolicy policy;
    bool deterministic = false;  // on an accelerator, too
};

struct FeedToken {
    int32_t token;
    int32_t seq;
    uint8_t flags;  // QI_WANT_*, QI_GENERATED or-ed together
};

// Not safe for two threads at once, except cancel(), clear_cancel(), progress(), stats(),
// layer_counters() and reset_stats().
class Context {
  public:
    // offload: the model's share on an accelerator, or null.
    Context(std::shared_ptr<const Model> model, const ContextOptions& options,
            std::shared_ptr<Offload> offload = nullptr);

    // Asks for the logits of the last token of each sequence.
    void want_last_logits(std::span<FeedToken> tokens) const;
    // Appends tokens to their sequences; on any failure no sequence has changed.
    void feed(std::span<const FeedToken> tokens);
    // Brings them to the host when they are first asked for; valid until the next feed.
    std::span<const float> logits(uint64_t index);
    std::span<const float> hidden(uint64_t index) const;
    uint64_t n_logits() const { return n_logits_; }

    // Feeds one token, whose logits are wanted, to each sequence and draws the next with its
    // sampler.
    void step(std::span<const FeedToken> tokens, std::span<Sampler* const> samplers, int32_t* next);
    // logprobs[i] = log p(targets[i] | … tokens[i]); a target of -1 gives 0.
    void score(int32_t seq, std::span<const int32_t> tokens, std::span<const int32_t> targets,
               bool generated, float* logprobs);

    int64_t length(int32_t seq) const;
    void truncate(int32_t seq, int64_t n_keep);
    void fork(int32_t source, int32_t target, int64_t n_keep);

    uint64_t state_size(int32_t seq) const;
    void save_state(int32_t seq, std::span<std::byte> out) const;
    void load_state(int32_t seq, std::span<const std::byte> data);

    void cancel() { cancel_.store(true, std::memory_order_relaxed); }
    void clear_cancel() { cancel_.store(false, std::memory_order_relaxed); }
    double progress() const;

    void set_threads(int n_threads);
    const Model& model() const { return *model_; }
    const ContextOptions& options() const { return options_; }
    // While another thread computes: as they were after one of its last calls.
    qi_stats stats() const;
    FfnCounters layer_counters(int64_t layer) const;
    // Waits for another thread's call.
    void reset_stats();
    // Holds the predictions of every n-th step against all gates, and those of all tokens that are
    // fed several at a time; 0: of none.
    void check_predictions(int64_t every);
    // Starts counting, from 0, for how many tokens each neuron is active; or stops.
    void count_activations(bool on);
    std::span<const uint64_t> activations(int64_t layer) const;  // [n_ff]
    int page_size() const;
    // Where keys and values of the accelerator's layers live, `host` without one; and pages copied
    // there.
    KvMode kv_mode() const;
    int64_t kv_device_pages() const;
    // The host's share of the positions that a layer's attention looked at in the last batch.
    double kv_host_share(int64_t layer) const;
    uint64_t kv_bytes_used() const { return kv_.bytes_used(); }
    uint64_t kv_bytes_reserved() const { return kv_.bytes_reserved(); }
    uint64_t scratch_bytes() const;

  private:
    // What is made of the chunks that tokens are computed in, by the index of a chunk's first token
    // and how many it has: which logits are wanted of it, and what happens when it is computed.
    struct ChunkWork {
        std::function<HeadRequest(int64_t first, int64_t n)> wanted;  // may be empty: none
        std::function<void(int64_t first, int64_t n)> done;
    };

    std::vector<Stage> make_stages();
    Device& last_device() { return *stages_.back().device; }
    void check_seq(int32_t seq) const;
    void check_token(int32_t token) const;
    void check_layer(int64_t layer) const;
    void collect_counters() const;
    void publish() const;
    void refresh_published() const;
    uint64_t ffn_bytes_counted() const;
    void run(std::span<const FeedToken> tokens, const ChunkWork& work);
    // n_best: how many of each row's best logits to find on the device.
    void compute(std::span<const FeedToken> tokens, int64_t n_best);
    // Tokens that are ever computed together.
    int64_t batch_max() const;
    // Rows of logits that a device holds at a time.
    int64_t logits_rows() const;
    // next: by sequence, the position of its next token.
    Batch arrange_chunk(std::span<const FeedToken> tokens, std::vector<int64_t>& next);

    std::shared_ptr<const Model> model_;
    ContextOptions options_;
    std::shared_ptr<Offload> offload_;
    std::shared_ptr<const void> part_alive_;  // of the offload, for as long as the accelerator is
    std::unique_ptr<Device> host_;
    std::unique_ptr<Device> accelerator_;  // or null
    KvShare kv_share_;
    std::vector<Stage> stages_;
    ForwardPass forward_;
    KvCache kv_;

    std::vector<int32_t> chunk_tokens_, chunk_positions_;
    std::vector<Segment> segments_;
    std::vector<int64_t> order_;   // row of a chunk → index of its token in the chunk
    std::vector<int64_t> row_of_;  // the inverse
    std::vector<NeuronRule> rules_;

    FfnMonitor monitor_;
    int64_t check_every_ = 0, n_until_check_ = 0;

    DeviceArray logits_;                  // of the last device
    const float* host_logits_ = nullptr;  // [n_logits][n_vocab] once they are where the host can
                                          // read them
    AlignedBuffer<float> all_logits_;     // the same when they are many
    AlignedBuffer<float> host_room_;      // copies from devices whose memory is not the host's
    std::vector<Candidate> best_;         // [n_logits][n_best]
    AlignedBuffer<float> hidden_;
    uint64_t n_logits_ = 0, n_hidden_ = 0;

    std::atomic<bool> cancel_{false};
    std::atomic<int64_t> layers_done_{0};  // of the chunk now computed
    std::atomic<int64_t> tokens_done_{0}, tokens_chunk_{0}, tokens_all_{0};
    qi_stats stats_{};
    uint64_t ffn_bytes_of_prompts_ = 0;

    // Held while counters change, so that a thread that asks for them sees whether it may collect.
    mutable std::mutex counting_;
    mutable std::atomic<bool> wanted_{false};  // somebody asked while it was held
    struct Published {
        qi_stats stats{};
        std::vector<FfnCounters> layers;
    };
    mutable std::mutex publishing_;
    mutable Published published_;
};

}  // namespace qi
