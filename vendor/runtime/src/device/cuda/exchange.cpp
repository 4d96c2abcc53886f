#include "device/cuda/exchange.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/signal_mask.h"

namespace qi::cuda {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr unsigned threads = 256;
constexpr int64_t words_per_block = 4 * threads;
// Each block of a receiving kernel polls over the bus.
constexpr int64_t most_blocks = 16;

// Where the words of flags_ are. What the host polls and what the GPU polls stand in lines of their
// own; the GPU reads its four words, of which the last is not used, at once.
constexpr size_t line = 128;
constexpr size_t to_host = 0, to_device = line;
constexpr size_t given_up = to_device + 4, late = to_device + 8;
constexpr size_t flags_bytes = 2 * line;

// While kernels may wait for the host, the driver is asked only when something is likely to be
// wrong.
constexpr milliseconds patience{1}, patience_of_replays{2000};

constexpr int n_trials = 9;
constexpr int64_t trial_limit_ns = 500'000'000;
// Recordings on trial: hundreds of launches where a model has as many layers.
constexpr int n_trial_replays = 2, trial_launches_between = 8;
constexpr int64_t most_trial_rounds = 32;
constexpr int failed_recordings_max = 3;

constexpr size_t times_bytes = 3 * sizeof(uint64_t);

size_t aligned(size_t n) {
    return (n + 255) / 256 * 256;
}

unsigned blocks_for(int64_t n_words) {
    return unsigned(
        std::clamp<int64_t>((n_words + words_per_block - 1) / words_per_block, 1, most_blocks));
}

std::atomic_ref<uint32_t> flag(const PinnedMemory& flags, size_t offset) {
    return std::atomic_ref(*reinterpret_cast<uint32_t*>(flags.data() + offset));
}

}  // namespace

size_t Exchange::room_bytes(int64_t n_kinds) {
    return aligned(3 * sizeof(uint32_t)) + aligned(size_t(n_kinds) * times_bytes);
}

Exchange::Exchange(std::shared_ptr<Gpu> gpu, const Stream& stream, CUdeviceptr room,
                   int64_t n_kinds, std::chrono::nanoseconds wait_limit)
    : gpu_(std::move(gpu)),
      module_(gpu_->module("exchange.cu")),
      send_(module_->function("qi_send")),
      receive_(module_->function("qi_receive")),
      flags_(gpu_, flags_bytes, "flags"),
      ticket_(room),
      trial_base_(room + sizeof(uint32_t)),
      unused_flag_(room + 2 * sizeof(uint32_t)),
      times_(room + aligned(3 * sizeof(uint32_t))),
      n_kinds_(n_kinds),
      wait_limit_ns_(wait_limit.count()) {
    const Current current(*gpu_);
    std::memset(flags_.data(), 0, flags_bytes);
    stream.fill(room, 0, room_bytes(n_kinds));
    try_out(stream);
    stream.fill(room, 0, room_bytes(n_kinds));
    stream.synchronize();
}

void Exchange::try_out(const Stream& stream) {
    if (gpu_->attributes().has_watchdog) {
        log(LogLevel::info,
            "layers that GPU and processor share are not recorded: this GPU has a display, whose "
            "driver ends kernels that wait");
        return;
    }
    limit_ns_ = std::min(trial_limit_ns, wait_limit_ns_);
    std::string problem = try_rounds(stream);
    if (problem.empty()) problem = try_recording(stream);
    limit_ns_ = wait_limit_ns_;
    begin();
    flag(flags_, late).store(0);
    can_be_recorded_ = problem.empty();
    if (!can_be_recorded_)
        log(LogLevel::warning, "layers that GPU and processor share are not recorded: " + problem);
}

void Exchange::begin_trial(const Stream& stream) {
    const uint32_t base = begin();
    stream.copy_to_device(trial_base_, &base, sizeof base);
    stream.synchronize();
}

// Rounds in which the kernel waits: the host answers only when it has seen the GPU ask. What is
// wrong with that, or nothing.
std::string Exchange::try_rounds(const Stream& stream) {
    int n_unasked = 0;
    for (int i = 0; i < n_trials; ++i) {
        begin_trial(stream);
        const Round round = send(stream, trial_base_, 0, {});
        receive(stream, trial_base_, round, 0, 0, false, 0);
        n_unasked += wait_for(stream, base_ + round.place, false);
        finish(base_ + round.place);
        stream.synchronize();
        if (flag(flags_, late).load())
            return "a kernel did not see what the processor wrote while it ran";
    }
    // A GPU that is busy for others may be slow to begin.
    if (n_unasked == 0) return "the driver starts kernels only when it is asked about them";
    return "";
}

// The same in recordings, of as many launches as a step's: what a driver takes at once of a single
// launch, it need not of hundreds, and it comes back from launching them when it likes.
std::string Exchange::try_recording(const Stream& stream) {
    try {
        Answers answers;
        const Graph graph = record_trial(stream, answers);
        int n_unasked = 0;
        for (int i = 0; i < n_trial_replays; ++i) {
            begin_trial(stream);
            graph.launch(stream);
            n_unasked += do_answers(stream, answers);
            stream.synchronize();
            if (flag(flags_, late).load())
                return "in a recording, a kernel waited for the processor in vain";
        }
        if (n_unasked == 0) return "the driver starts recordings only when it is asked about them";
        return "";
    } catch (const Error& error) {
        return format("a recording fails: %s", error.what());
    }
}

Graph Exchange::record_trial(const Stream& stream, Answers& answers) {
    for (int n_failed = 0;;) {
        begin();
        begin_recording();
        try {
            Graph graph(stream, [&] {
                for (int64_t i = 0; i < std::min(n_kinds_, most_trial_rounds); ++i) {
                    const Round round = send(stream, trial_base_, i, {});
                    for (int k = 0; k < trial_launches_between; ++k)
                        launch_send(stream, {}, trial_base_, 0, unused_flag_, i);
                    answer(stream, round, [] {});
                    receive(stream, trial_base_, round, 0, 0, false, 0);
                }
            });
            answers = end_recording();
            return graph;
        } catch (const Error& error) {
            end_recording();
            // A thread that waits for the whole device ends what others record.
            if (error.status() == QI_MEMORY || ++n_failed == failed_recordings_max) throw;
        }
    }
}

// ---- enqueued on the stream ----

Exchange::Round Exchange::send(const Stream& stream, CUdeviceptr base, int64_t kind,
                               std::span<const Rows> rows) {
    const Round round{++n_rounds_, kind};
    launch_send(stream, rows, base, round.place, flags_.device_address() + to_host, kind);
    return round;
}

void Exchange::launch_send(const Stream& stream, std::span<const Rows> rows, CUdeviceptr base,
                           uint32_t place, CUdeviceptr sent, int64_t kind) {
    Rows three[3];
    if (rows.size() > std::size(three))
        fail(QI_INTERNAL, "%zu arrays are sent to the host at once, 3 can be", rows.size());
    std::copy(rows.begin(), rows.end(), three);
    int64_t most = 0;
    for (const Rows& r : three)
        most = std::max(most, r.n_words);
    send_.launch(stream, {blocks_for(most)}, {threads}, 0, three[0].from, three[0].to,
                 (long long)three[0].n_words, three[1].from, three[1].to,
                 (long long)three[1].n_words, three[2].from, three[2].to,
                 (long long)three[2].n_words, base, place, ticket_, sent,
                 times_ + size_t(kind) * times_bytes);
}

void Exchange::answer(const Stream& stream, const Round& round, std::function<void()> work) {
    if (recording_) {
        kept_.push_back({round, std::move(work), {}});
        return;
    }
    wait_for(stream, base_ + round.place, false);
    work();
    finish(base_ + round.place);
}

void Exchange::afterwards(std::function<void()> work) {
    if (recording_)
        kept_.back().afterwards = std::move(work);
    else
        work();
}

void Exchange::receive(const Stream& stream, CUdeviceptr base, const Round& round, CUdeviceptr from,
                       int64_t n, bool accumulate, CUdeviceptr y) {
    receive_.launch(stream, {blocks_for(n)}, {threads}, 0, from, (long long)n, int(accumulate), y,
                    base, round.place, flags_.device_address() + to_device, (long long)limit_ns_,
                    times_ + size_t(round.kind) * times_bytes);
}

// ---- the host's side ----

// Comes back when the GPU has sent round `number`: true unless the driver had to be asked.
bool Exchange::wait_for(const Stream& stream, uint32_t number, bool replaying) {
    const auto sent = flag(flags_, to_host);
    // Rounds without an answer do not hold the GPU up: it may be further.
    const auto has_come = [&] {
        return int32_t(sent.load(std::memory_order_acquire) - number) >= 0;
    };
    bool was_asked = false, is_stale = question_.valid();
    auto asked = Clock::now();
    while (true) {
        for (int i = 0; i < 64; ++i)
            if (has_come()) return !was_asked;
        const auto waited = Clock::now() - asked;
        // The GPU's own work may be long; then the processor is better left to others.
        if (waited > microseconds(200)) std::this_thread::yield();
        const bool is_new_question = replaying && !question_.valid();
        if (waited < (is_new_question ? patience_of_replays : patience)) continue;
        if (has_come_to_rest(stream, replaying, is_stale) && !has_come())
            fail(QI_INTERNAL, "the GPU has come to rest and not sent what the host waits for");
        asked = Clock::now();
        was_asked = true;
    }
}

// Throws when the GPU is lost. The driver answers under a lock that another thread may hold until
// the GPU comes to rest, which in a replay it does not before the host has answered: there a thread
// of its own asks, and "no" is what is known until it comes back. is_stale: it was asked for an
// earlier round.
bool Exchange::has_come_to_rest(const Stream& stream, bool replaying, bool& is_stale) {
    if (!replaying) return stream.idle();
    using std::chrono::seconds;
    if (question_.valid()) {
        if (question_.wait_for(seconds(0)) != std::future_status::ready) return false;
        const bool answer = question_.get();
        if (!std::exchange(is_stale, false)) return answer;
    }
    const FaultSignalsOnly mask;
    try {
        question_ = std::async(std::launch::async, [this, &stream] {
            const Current current(*gpu_);
            return stream.idle();
        });
    } catch (const std::system_error&) {
        return stream.idle();  // there are no more threads
    }
    return false;
}

Exchange::~Exchange() {
    // A forked process does not have the thread that asks.
    if (question_.valid() && !driver_if_usable()) new std::future(std::move(question_));
}

void Exchange::finish(uint32_t number) {
    flag(flags_, to_device).store(number, std::memory_order_release);
}

uint32_t Exchange::begin() {
    base_ += n_rounds_;
    n_rounds_ = 0;
    return base_;
}

Exchange::Answers Exchange::end_recording() {
    recording_ = false;
    return std::exchange(kept_, {});
}

void Exchange::replay(const Stream& stream, const Answers& answers) {
    do_answers(stream, answers);
}

// True unless the driver had to be asked.
bool Exchange::do_answers(const Stream& stream, const Answers& answers) {
    n_rounds_ = uint32_t(answers.size());
    bool was_asked = false;
    try {
        for (const Answer& answer : answers) {
            was_asked |= !wait_for(stream, base_ + answer.round.place, true);
            answer.work();
            finish(base_ + answer.round.place);
            if (answer.afterwards) answer.afterwards();
        }
    } catch (...) {
        flag(flags_, given_up).store(1, std::memory_order_release);
        try {
            stream.synchronize();
        } catch (const Error&) {
            // A lost device; the first failure says it.
        }
        flag(flags_, given_up).store(0, std::memory_order_release);
        flag(flags_, late).store(0, std::memory_order_release);
        throw;
    }
    return !was_asked;
}

void Exchange::check() {
    if (flag(flags_, late).exchange(0) == 0) return;
    can_be_recorded_ = false;
    fail(QI_DEVICE,
         "the GPU waited %.3g s for the processor's part of a layer, in vain: the process was "
         "stopped, or the driver starts nothing while a kernel waits; from now on this context "
         "launches such layers anew for every token, which is slower",
         double(wait_limit_ns_) * 1e-9);
}

std::vector<Exchange::Times> Exchange::take_times(const Stream& stream) {
    std::vector<uint64_t> words(3 * size_t(n_kinds_));
    stream.copy_to_host(words.data(), times_, words.size() * sizeof(uint64_t));
    stream.fill(times_, 0, words.size() * sizeof(uint64_t));
    stream.synchronize();
    std::vector<Times> times;
    for (size_t i = 0; i < size_t(n_kinds_); ++i)
        times.push_back({double(words[3 * i + 1]) * 1e-9, double(words[3 * i + 2]) * 1e-9});
    return times;
}

}  // namespace qi::cuda
