// Exchanges neurons that a GPU keeps with the host's, while a model runs.
//
// A thread plans from what the contexts have counted and brings the records of the neurons to come
// into a landing room on the GPU, over a stream of low priority. At the next boundary between
// steps that finds them there, they are placed: records go from the landing room to their slots and
// the tables of the network change, in the order of the stream that computes the next step; the
// shards that the host computes by change with them. Addresses and numbers of slots stay, so that
// recorded steps stay valid. A step sees the neurons of before or of after, never a mixture: steps
// hold a lock that placing wants for itself, and streams wait for one another by events.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <thread>
#include <vector>

#include "device/accelerator.h"
#include "device/cuda/gpu.h"
#include "device/cuda/launch.h"
#include "device/cuda/weights.h"
#include "sparse/neuron_cache.h"
#include "sparse/policy.h"

namespace qi::cuda {

class NeuronMover {
  public:
    // The landing room is taken of what `weights` has reserved.
    NeuronMover(std::shared_ptr<Gpu> gpu, std::shared_ptr<Kernels> kernels,
                std::shared_ptr<Weights> weights, const Moving& moving);
    ~NeuronMover();
    NeuronMover(const NeuronMover&) = delete;
    NeuronMover& operator=(const NeuronMover&) = delete;

    // The landing room for so many records of a network, and what belongs to it.
    static size_t room_bytes(const FeedForward& ffn, size_t n_records);

    // A context that computes with the weights; serves one thread at a time.
    class Member {
      public:
        explicit Member(std::shared_ptr<NeuronMover> mover);
        ~Member();

        // Counts the neurons named for tokens of rule `predict`: names [n_tokens][name_words].
        void count(const DeviceFfn& kept, const uint32_t* names, std::span<const NeuronRule> rules);
        // Where others count how often a network's neurons were active, [n_ff]; null: nowhere.
        uint64_t* counts_of(const DeviceFfn& kept);
        // So many tokens have been counted for every network.
        void counted(int64_t n_tokens) { n_tokens_ += n_tokens; }
        // Whether it is the first of a step's networks that neurons move in.
        bool is_first(const DeviceFfn& kept) const { return mover_->network_of_[kept.index] == 0; }

        // Whether no neuron will move any more.
        bool is_over() const { return mover_->state_ == State::given_up; }

      private:
        friend class NeuronMover;
        std::shared_ptr<NeuronMover> mover_;
        Event done_;  // the last step
        bool has_run_ = false, is_lost_ = false;
        uint64_t n_placed_ = 0;
        int64_t n_tokens_ = 0;
        std::vector<uint64_t> counts_;  // [n_networks][n_ff], of the last steps
    };

    // While it lives, neurons stay where they are; before, those that have landed are placed if
    // may_place. At its end the context's counts are handed over.
    class Step {
      public:
        Step(Member& member, const Stream& stream, bool may_place);
        ~Step();
        Step(const Step&) = delete;
        Step& operator=(const Step&) = delete;

      private:
        bool at_rest() const;

        Member& member_;
        const Stream& stream_;
        std::shared_lock<std::shared_mutex> lock_;
    };

    // The neurons kept now, ascending.
    std::vector<int32_t> neurons(const DeviceFfn& kept);
    uint64_t n_moved() const { return n_moved_.load(std::memory_order_relaxed); }

  private:
    struct Network {
        const FeedForward* ffn;
        DeviceFfn* kept;
        std::vector<int32_t> neuron_of_slot;
        size_t tables_at;              // in tables_
        std::vector<uint32_t> counts;  // [n_ff], since it was last planned for
    };
    struct Change {
        Network* network;
        std::vector<Swap> swaps;
        std::vector<int32_t> neuron_of_slot;
        NeuronShard resident, rest;
        size_t landing_at, first_slot;  // in the landing room, in slots_
    };
    enum class State {
        counting,
        landed,       // changes_ can be placed
        half_placed,  // placing failed: it has to succeed before anything else is computed
        placed,
        given_up,
    };

    void work();
    bool wait_for_counts();
    void add_counts(std::vector<uint64_t>& counts);
    void make_plan();
    void bring();
    void send_records(Change& change, size_t& side);
    bool wait_until_placed();
    void wait_for(const Event& event) const;
    void place_if_landed(const Stream& stream, bool may_place);
    void place(const Stream& stream);
    void give_up(const char* why);
    void take_counts(Member& member);

    std::shared_ptr<Gpu> gpu_;
    std::shared_ptr<Kernels> kernels_;
    std::shared_ptr<Weights> weights_;
    std::unique_ptr<CachePolicy> policy_;
    Speeds speeds_;
    int64_t tokens_first_;  // before the first plan
    std::vector<Network> networks_;
    std::vector<int> network_of_;  // by DeviceFfn::index; below 0: none
    size_t n_ff_ = 0;

    CUdeviceptr landing_ = 0, landing_slots_ = 0;
    size_t landing_bytes_ = 0, n_landing_slots_ = 0;
    PinnedMemory staging_[2], tables_, slots_;
    Stream stream_;
    Event sent_[2], landed_, placed_;

    std::atomic<State> state_{State::counting};
    std::atomic<uint64_t> n_moved_{0};
    std::vector<Change> changes_;  // the thread's, and while landed or half placed those who place
    size_t next_ = 0;              // network to be planned for first
    bool has_planned_ = false;

    std::mutex turnstile_;     // that steps pass; held by who waits to place
    std::shared_mutex steps_;  // held by steps; alone by who places
    std::atomic<int> n_refused_{0};
    uint64_t n_placed_ = 0;  // under steps_

    std::mutex mutex_;  // of what follows
    std::condition_variable changed_;
    bool stopping_ = false;
    std::vector<Member*> members_;
    std::vector<std::vector<uint64_t>> handed_, zeroed_;
    int64_t tokens_handed_ = 0;

    std::thread thread_;  // last: it uses all of the above
};

}  // namespace qi::cuda
