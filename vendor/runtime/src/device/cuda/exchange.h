// Rounds between a GPU and its host inside a pass over the layers: the GPU sends rows, goes on with
// work of its own, and takes in what the host has made of them.
//
// Rows cross in pinned memory that both see, and flags there say when; neither side waits for a
// stream. So a pass with rounds in it can be recorded: replayed, its kernels wait for the host
// where they need its answer, while the host does the recorded work round by round. Outside of
// recordings the host does its work between sending and receiving, and no kernel waits.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/cuda/gpu.h"

namespace qi::cuda {

class Exchange {
  public:
    // Kinds of rounds whose times are kept apart: `n_kinds`. room: room_bytes(n_kinds) of device
    // memory, zeroed here. A kernel of a replay waits for the host no longer than wait_limit: far
    // longer than a layer takes on any processor, and an end where the host cannot answer, because
    // it was stopped or the driver does not return from launching what waits.
    Exchange(std::shared_ptr<Gpu> gpu, const Stream& stream, CUdeviceptr room, int64_t n_kinds,
             std::chrono::nanoseconds wait_limit = std::chrono::seconds(60));
    ~Exchange();
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;
    static size_t room_bytes(int64_t n_kinds);

    // Whether kernels may wait for the host, so that rounds can be recorded: neither where a
    // watchdog ends long kernels nor where a trial does not come back in time. The log says so.
    bool can_be_recorded() const { return can_be_recorded_; }

    // ---- enqueued on the stream ----

    // Words for the host to see.
    struct Rows {
        CUdeviceptr from = 0;
        CUdeviceptr to = 0;  // where the device sees PinnedMemory
        int64_t n_words = 0;
    };
    struct Round {
        uint32_t place;  // in the step, from 1
        int64_t kind;
    };
    // Up to three arrays. base: a word in device memory that holds base() of the step.
    Round send(const Stream& stream, CUdeviceptr base, int64_t kind, std::span<const Rows> rows);
    // The host's work between the two: done now, or kept by the recording under way.
    void answer(const Stream& stream, const Round& round, std::function<void()> work);
    // What the host does once that round is answered, while the GPU goes on and may send the next
    // round's words: after receive().
    void afterwards(std::function<void()> work);
    // y = from, or y += from with accumulate; n floats, `from` where the device sees PinnedMemory.
    void receive(const Stream& stream, CUdeviceptr base, const Round& round, CUdeviceptr from,
                 int64_t n, bool accumulate, CUdeviceptr y);

    // ---- steps ----

    // A step begins; what its rounds' numbers are counted from.
    uint32_t begin();

    // What the host does for one replay of a recording.
    struct Answer {
        Round round;
        std::function<void()> work;
        std::function<void()> afterwards{};  // or none
    };
    using Answers = std::vector<Answer>;
    void begin_recording() { recording_ = true; }
    // Also after a failure: the answers kept since begin_recording().
    Answers end_recording();
    // Does a recording's work while the GPU replays it. Whatever work throws is thrown once the GPU
    // has come to rest; what it computed is then without meaning.
    void replay(const Stream& stream, const Answers& answers);
    // Once the stream is at rest: throws QI_DEVICE when a kernel has waited in vain since the last
    // call. What was computed is then without meaning, and rounds are not recorded any more.
    void check();

    // ---- times ----

    struct Times {
        double device_seconds;  // between sending and wanting the answer
        double wait_seconds;    // between that and having it
    };
    // Of each kind since they were last taken; waits for the stream.
    std::vector<Times> take_times(const Stream& stream);

  private:
    bool wait_for(const Stream& stream, uint32_t number, bool replaying);
    bool has_come_to_rest(const Stream& stream, bool replaying, bool& is_stale);
    void finish(uint32_t number);
    bool do_answers(const Stream& stream, const Answers& answers);
    void launch_send(const Stream& stream, std::span<const Rows> rows, CUdeviceptr base,
                     uint32_t place, CUdeviceptr sent, int64_t kind);
    void try_out(const Stream& stream);
    void begin_trial(const Stream& stream);
    std::string try_rounds(const Stream& stream);
    std::string try_recording(const Stream& stream);
    Graph record_trial(const Stream& stream, Answers& answers);

    std::shared_ptr<Gpu> gpu_;
    std::shared_ptr<Module> module_;
    Function send_, receive_;
    // Words uint32: the last round sent, written by the GPU; in another line the last round
    // answered and whether the step was given up, written by the host, and whether a kernel has
    // waited in vain, written by the GPU. The other side only reads them, but for the last, which
    // the host clears while the GPU is at rest.
    PinnedMemory flags_;
    CUdeviceptr ticket_, trial_base_, unused_flag_, times_;
    int64_t n_kinds_;
    int64_t wait_limit_ns_, limit_ns_ = 0;  // of waits in replays, and of those enqueued now
    uint32_t base_ = 0, n_rounds_ = 0;
    bool can_be_recorded_ = false, recording_ = false;
    Answers kept_;
    std::future<bool> question_;  // to the driver, see has_come_to_rest
};

}  // namespace qi::cuda
