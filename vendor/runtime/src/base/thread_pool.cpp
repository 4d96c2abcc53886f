// Runs parallel loops: callers publish jobs in fixed slots, workers help with any of them.
#include "base/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "base/cpu.h"
#include "base/error.h"
#include "base/log.h"
#include "base/signal_mask.h"

namespace qi {

namespace {

using Body = FunctionRef<void(int64_t, int)>;
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr size_t line = 128;  // neighbouring 64-byte lines are prefetched in pairs
constexpr int max_workers = 511;
constexpr int n_slots = 8;  // callers served at once; one more computes alone

// Covers the serial work between two loops of a forward pass, and wastes little when a token ends.
constexpr microseconds worker_spin{50};
// The same while more is expected (StayAwake): covers a GPU's part of a layer, 60 to 150 us, many
// times over. To a wait that is longer still, the time that waking takes does not matter.
constexpr microseconds expectant_worker_spin{5000};
// A turn of polling that takes so long says that another thread had the core. Who polls then loses
// it for milliseconds at a time, while who sleeps gets it back when woken: on the core of a busy
// process, a worker that polled came to 1 job of 50, one that slept to 3 of 5. So a worker does not
// wait by polling for a while.
constexpr microseconds lost_core{200}, patience_after_lost_core{100'000};
// The caller polls for the last chunks for two mean chunks, within these bounds: what is still out
// by then belongs to a worker that lost its core, or is long enough to hide the cost of sleeping.
constexpr microseconds shortest_caller_spin{20}, longest_caller_spin{200};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("isb");  // most cores ignore "yield"; this waits about as long as on x86
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t expected) {
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Polls until done() or the time is up; iterations would not do, a pause lasts 10 to 140 cycles.
template <typename Done>
bool spin(Done done, Clock::duration limit) {
    const auto deadline = Clock::now() + limit;
    do {
        for (int i = 0; i < 16; ++i) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() < deadline);
    return false;
}

// All that a worker needs to join a job, in one word, so that joining is one compare-and-swap:
// chunks not yet taken (44 bits, may fall below 0) | first worker invited (10) | how many (10).
struct Ticket {
    static constexpr int64_t one_chunk = int64_t(1) << 20;

    static int64_t pack(int64_t n_left, int first, int n_invited) {
        return n_left * one_chunk + first * 1024 + n_invited;
    }
    static int64_t n_left(int64_t ticket) { return ticket >> 20; }
    static int first(int64_t ticket) { return int(ticket >> 10 & 1023); }
    static int n_invited(int64_t ticket) { return int(ticket & 1023); }
};

// Neighbouring chunks mostly go to one thread, which so reads memory in one stream: matrix rows
// came 35 % faster from DRAM than with chunks handed out in turn.
struct Range {
    alignas(line) std::atomic<int64_t> next{0};
    int64_t end = 0;
};

// A worker reads the job only while it holds a chunk it has not reported done, and the caller
// leaves only when every chunk is reported. So a late worker finds no chunk, or one of the next
// job: both are fine, and nobody waits for workers to arrive or to go.
struct Slot {
    alignas(line) std::atomic<int64_t> ticket{0};
    int64_t n_chunks = 0;
    int n_ranges = 0;  // one a thread
    const Body* body = nullptr;
    int caller_cpu = 0;
    alignas(line) std::atomic<int64_t> n_done{0};  // by workers
    std::atomic<uint32_t> caller_asleep{0};
    alignas(line) std::atomic<bool> taken{false};
    Range ranges[max_workers + 1];

    void share_out(int64_t n, int n_threads) {
        n_chunks = n;
        n_ranges = n_threads;
        for (int64_t i = 0; i < n_threads; ++i) {
            ranges[i].next.store(n * i / n_threads, std::memory_order_relaxed);
            ranges[i].end = n * (i + 1) / n_threads;
        }
    }

    // Leave to take one chunk, if any is left.
    bool admit() {
        return Ticket::n_left(ticket.fetch_sub(Ticket::one_chunk, std::memory_order_relaxed)) > 0;
    }

    // The chunk for a thread that was admitted: the next of its own range, then of the others'. As
    // many are admitted as there are chunks and a range once empty stays so: one pass finds it.
    int64_t take(int thread) {
        for (int i = thread;; i = i + 1 < n_ranges ? i + 1 : 0) {
            Range& range = ranges[i];
            if (range.next.load(std::memory_order_relaxed) >= range.end) continue;
            const int64_t chunk = range.next.fetch_add(1, std::memory_order_relaxed);
            if (chunk < range.end) return chunk;
        }
    }
};

struct Worker {
    alignas(line) std::atomic<uint32_t> parked{0};
    int index = 0;
    int last_slot = 0;
    bool displaced_caller = false;
    Clock::time_point polls_from{};  // earlier, it sleeps even if more is expected
};

class Pool {
  public:
    void run(int n_threads, int64_t n_chunks, Body body);
    void expect(int n) { n_expecting_.fetch_add(n, std::memory_order_relaxed); }
    int64_t n_wakes() const { return n_wakes_.load(std::memory_order_relaxed); }

  private:
    // What the caller did of its own job, and since when.
    struct Share {
        int64_t n_chunks;
        Clock::time_point start;
    };
    Slot* take_slot();
    void publish(Slot& slot, int n_invited, int64_t n_chunks, const Body& body);
    static void wait_for_workers(Slot& slot, Share share);
    int muster(const Slot& slot, int n_wanted);
    void start_workers(int n_wanted);
    void work(Worker& self);
    bool await_job(Worker& self);
    static bool help(Worker& self, Slot& slot);
    bool help_any(Worker& self);

    Slot slots_[n_slots];
    Worker workers_[max_workers];
    alignas(line) std::atomic<int> n_expecting_{0};  // StayAwakes; polled by idle workers
    alignas(line) std::atomic<int> n_workers_{0};
    std::atomic<int64_t> n_wakes_{0};
    std::atomic<int> n_startable_{max_workers};  // fewer once the system has refused one
    std::mutex starting_;
};

// Without a destructor: workers may run on through the process's exit handlers.
constinit Pool process_pool;
static_assert(std::is_trivially_destructible_v<Pool>);

// A child has no workers, and slots taken by threads it does not have either: it starts afresh.
void restart_after_fork() {
    static const int status =
        pthread_atfork(nullptr, nullptr, [] { std::construct_at(&process_pool); });
    if (status != 0) throw std::bad_alloc();
}

void Pool::run(int n_threads, int64_t n_chunks, Body body) {
    const int64_t n_useful = std::min<int64_t>(n_threads, n_chunks) - 1;
    const int n_wanted = int(std::clamp<int64_t>(n_useful, 0, max_workers));
    Slot* slot = n_wanted > 0 ? take_slot() : nullptr;
    const int n_invited = slot ? muster(*slot, n_wanted) : 0;
    if (n_invited > 0) {
        Share share{0, Clock::now()};
        publish(*slot, n_invited, n_chunks, body);
        for (; slot->admit(); ++share.n_chunks)
            body(slot->take(0), 0);
        wait_for_workers(*slot, share);
    } else {
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk)
            body(chunk, 0);
    }
    if (slot) slot->taken.store(false, std::memory_order_release);
}

// A free slot, now the caller's, or null.
Slot* Pool::take_slot() {
    for (Slot& slot : slots_)
        if (!slot.taken.load(std::memory_order_relaxed) &&
            !slot.taken.exchange(true, std::memory_order_acquire))
            return &slot;
    return nullptr;
}

void Pool::publish(Slot& slot, int n_invited, int64_t n_chunks, const Body& body) {
    // Callers at work together invite different workers as far as there are enough.
    const int n_choices = n_workers_.load(std::memory_order_relaxed) - n_invited + 1;
    const int first = int(&slot - slots_) * n_invited % n_choices;
    slot.share_out(n_chunks, n_invited + 1);
    slot.body = &body;
    slot.caller_cpu = sched_getcpu();
    slot.n_done.store(0, std::memory_order_relaxed);
    // Sequentially consistent, like parking and then looking once more: one of the two is seen.
    slot.ticket.store(Ticket::pack(n_chunks, first, n_invited), std::memory_order_seq_cst);
    for (int i = first; i < first + n_invited; ++i) {
        std::atomic<uint32_t>& parked = workers_[i].parked;
        if (!parked.load(std::memory_order_seq_cst) || !parked.exchange(0)) continue;
        futex_wake(parked);
        n_wakes_.fetch_add(1, std::memory_order_relaxed);
    }
}

void Pool::wait_for_workers(Slot& slot, Share share) {
    const int64_t n_theirs = slot.n_chunks - share.n_chunks;
    const auto done = [&] { return slot.n_done.load(std::memory_order_acquire) == n_theirs; };
    if (done()) return;
    const auto mean_chunk = (Clock::now() - share.start) / std::max<int64_t>(share.n_chunks, 1);
    if (spin(done, std::clamp<Clock::duration>(2 * mean_chunk, shortest_caller_spin,
                                               longest_caller_spin)))
        return;
    // Asleep, the caller leaves its core to the worker it waits for.
    for (;;) {
        slot.caller_asleep.store(1, std::memory_order_seq_cst);
        if (slot.n_done.load(std::memory_order_seq_cst) == n_theirs) break;
        futex_wait(slot.caller_asleep, 1);
    }
    slot.caller_asleep.store(0, std::memory_order_relaxed);
}

// How many workers to invite, n_wanted at most, all of them started. Callers and workers together
// do not exceed the cores: one more would only wait for a core, or keep another waiting.
int Pool::muster(const Slot& slot, int n_wanted) {
    const int n_callers = int(&slot - slots_) + 1;
    const int n_free = std::min(cpu_info().n_usable_cores - n_callers,
                                n_startable_.load(std::memory_order_relaxed));
    const int n_invited = std::min(n_wanted, n_free);
    const int n_started = std::min(n_invited * n_callers, n_free);  // so that all have their own
    if (n_started > n_workers_.load(std::memory_order_acquire)) start_workers(n_started);
    return std::min(n_invited, n_workers_.load(std::memory_order_acquire));
}

void Pool::start_workers(int n_wanted) {
    std::lock_guard lock(starting_);
    restart_after_fork();
    const FaultSignalsOnly mask;
    for (int n = n_workers_.load(std::memory_order_relaxed); n < n_wanted; ++n) {
        Worker& worker = workers_[n];
        worker.index = n;
        try {
            std::thread([this, &worker] { work(worker); }).detach();
        } catch (const std::system_error& error) {
            n_startable_.store(n, std::memory_order_relaxed);
            log(LogLevel::warning,
                format("computing with %d thread%s: the system refuses to start another (%s)",
                       n + 1, n == 0 ? "" : "s", error.what()));
            break;
        }
        n_workers_.store(n + 1, std::memory_order_release);
    }
}

void Pool::work(Worker& self) {
    pthread_setname_np(pthread_self(), "qinfer");
    for (;;) {
        // On the caller's core, spinning keeps the caller from publishing the job waited for.
        if (!self.displaced_caller && await_job(self)) continue;
        self.displaced_caller = false;
        self.parked.store(1, std::memory_order_seq_cst);
        if (!help_any(self)) futex_wait(self.parked, 1);
        self.parked.store(0, std::memory_order_relaxed);
    }
}

// Polls for a job and helps with it. False: none came in time.
bool Pool::await_job(Worker& self) {
    const auto has_helped = [&] { return help_any(self); };
    if (spin(has_helped, worker_spin)) return true;
    auto turn = Clock::now();
    const auto deadline = turn + expectant_worker_spin;
    while (n_expecting_.load(std::memory_order_relaxed) > 0 && turn < deadline &&
           turn >= self.polls_from) {
        sched_yield();  // cores may be fewer than the process was told
        if (spin(has_helped, {})) return true;
        const auto next_turn = Clock::now();
        if (next_turn - turn > lost_core) self.polls_from = next_turn + patience_after_lost_core;
        turn = next_turn;
    }
    return false;
}

// Works on the next open job after the one helped last, so that no caller starves. False: none is.
bool Pool::help_any(Worker& self) {
    for (int i = 1; i <= n_slots; ++i) {
        const int slot = (self.last_slot + i) % n_slots;
        if (!help(self, slots_[slot])) continue;
        self.last_slot = slot;
        return true;
    }
    return false;
}

bool Pool::help(Worker& self, Slot& slot) {
    int64_t ticket = slot.ticket.load(std::memory_order_seq_cst);
    int rank;  // among the workers invited
    do {
        rank = self.index - Ticket::first(ticket);
        if (Ticket::n_left(ticket) <= 0 || rank < 0 || rank >= Ticket::n_invited(ticket))
            return false;
    } while (!slot.ticket.compare_exchange_weak(ticket, ticket - Ticket::one_chunk,
                                                std::memory_order_acquire));
    const Body& body = *slot.body;
    int64_t n_mine = 0;
    do {
        body(slot.take(rank + 1), rank + 1);
        ++n_mine;
    } while (slot.admit());

    self.displaced_caller = sched_getcpu() == slot.caller_cpu;
    slot.n_done.fetch_add(n_mine, std::memory_order_seq_cst);
    if (slot.caller_asleep.load(std::memory_order_seq_cst) && slot.caller_asleep.exchange(0))
        futex_wake(slot.caller_asleep);
    return true;
}

}  // namespace

void parallel_for(int n_threads, int64_t n_chunks, FunctionRef<void(int64_t, int)> body) {
    process_pool.run(n_threads, n_chunks, body);
}

StayAwake::StayAwake() {
    restart_after_fork();  // without it a child would inherit what another thread expects
    process_pool.expect(1);
}

StayAwake::~StayAwake() {
    process_pool.expect(-1);
}

int64_t n_worker_wakes() {
    return process_pool.n_wakes();
}

}  // namespace qi
