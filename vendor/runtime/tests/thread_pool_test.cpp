// parallel_for: every chunk once, workers told apart, visibility, many callers, workers that stay
// awake, forks, exit.
#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/log.h"
#include "kernel_checks.h"

using namespace qi;
using namespace qi::test;

// Instead of base/cpu.cpp's: the pool starts a worker per further core, and workers are to meet
// each other on the smallest machine too.
const CpuInfo& qi::cpu_info() {
    static const CpuInfo info = {"", "", 8, 8};
    return info;
}

// For the leak sanitizer: what threads held when exit() cut them short is no leak.
static bool cut_short = false;
extern "C" int __lsan_is_turned_off() {
    return cut_short;
}

namespace {

// One loop with all its promises checked; `work` bounds how long a chunk takes.
void run_checked(Checks& checks, int n_threads, int64_t n_chunks, int work, int salt) {
    const int n_workers = std::clamp(n_threads, 1, 8);                   // no more than cores
    std::vector<int> visits(size_t(std::max<int64_t>(n_chunks, 0)), 0);  // plain: races are found
    std::vector<int64_t> results(visits.size(), -1);
    std::unique_ptr<std::atomic<int>[]> inside(new std::atomic<int>[size_t(n_workers)]());
    std::atomic<int> n_bad_workers{0}, n_shared_workers{0};
    parallel_for(n_threads, n_chunks, [&](int64_t chunk, int worker) {
        if (worker < 0 || worker >= n_workers) {
            ++n_bad_workers;
            return;
        }
        if (inside[size_t(worker)].fetch_add(1) != 0) ++n_shared_workers;
        volatile int64_t value = chunk;
        for (int i = int((chunk * 7 + salt) % (work + 1)); i > 0; --i)
            value = value + 1;
        ++visits[size_t(chunk)];
        results[size_t(chunk)] = chunk * 3 + salt;
        inside[size_t(worker)].fetch_sub(1);
    });
    int64_t n_wrong = 0;
    for (size_t i = 0; i < visits.size(); ++i)
        n_wrong += visits[i] != 1 || results[i] != int64_t(i) * 3 + salt;
    checks.expect(n_wrong == 0 && n_bad_workers == 0 && n_shared_workers == 0,
                  "%d threads, %lld chunks: %lld chunks wrong, %d calls with a bad worker, %d with "
                  "one in use",
                  n_threads, (long long)n_chunks, (long long)n_wrong, n_bad_workers.load(),
                  n_shared_workers.load());
}

void test_shapes(Checks& checks) {
    for (int n_threads : {INT_MIN, -1, 0, 1, 2, 3, 4, 7, 8, 100})
        for (int64_t n_chunks : {-1, 0, 1, 2, 3, 16, 100, 1000})
            for (int round = 0; round < 20; ++round)
                run_checked(checks, n_threads, n_chunks, round % 2 ? 300 : 0, round);
}

// Chunks that sleep leave the core to other workers, so that all of n_threads get to work.
void test_workers(Checks& checks) {
    const timespec moment = {0, 300'000};
    for (int n_threads : {8, 2, 3, 5, 8, 4}) {
        int most_at_once = 0;
        for (int attempt = 0; attempt < 50 && most_at_once < n_threads; ++attempt) {
            std::atomic<int> inside[8] = {}, n_inside{0}, n_most{0}, n_wrong{0};
            parallel_for(n_threads, 4 * n_threads, [&](int64_t, int worker) {
                if (worker < 0 || worker >= n_threads || inside[worker].fetch_add(1) != 0) {
                    ++n_wrong;
                    return;
                }
                const int now = n_inside.fetch_add(1) + 1;
                for (int most = n_most; now > most && !n_most.compare_exchange_weak(most, now);) {
                }
                nanosleep(&moment, nullptr);
                --n_inside;
                --inside[worker];
            });
            checks.expect(n_wrong == 0, "%d threads: %d calls with a worker in use or out of range",
                          n_threads, n_wrong.load());
            most_at_once = std::max(most_at_once, n_most.load());
        }
        checks.expect(most_at_once == n_threads, "of %d threads %d came together", n_threads,
                      most_at_once);
    }
}

// Jobs end and begin so fast that workers keep arriving late, on stacks that are gone.
void test_rapid_jobs(Checks& checks) {
    std::atomic<int64_t> n_calls{0};
    for (int i = 0; i < 50000; ++i) {
        int64_t on_stack[4] = {};
        parallel_for(3, 4, [&](int64_t chunk, int) {
            on_stack[chunk] = chunk + i;
            n_calls.fetch_add(1, std::memory_order_relaxed);
        });
        const bool ok = on_stack[0] == i && on_stack[1] == 1 + i && on_stack[2] == 2 + i &&
                        on_stack[3] == 3 + i;
        if (!ok || i == 0) checks.expect(ok, "job %d left chunks undone", i);
    }
    checks.expect(n_calls == 200000, "%lld chunks were done, not 200000", (long long)n_calls);
}

void test_callers(Checks& checks) {
    constexpr int n_callers = 12;  // more than there are slots
    Checks each[n_callers];
    std::vector<std::thread> callers;
    for (int c = 0; c < n_callers; ++c)
        callers.emplace_back([&, c] {
            for (int round = 0; round < 300; ++round)
                run_checked(each[c], 1 + (c + round) % 4, 1 + (c * 31 + round) % 40, 200,
                            c + round);
        });
    for (std::thread& caller : callers)
        caller.join();
    for (const Checks& caller : each)
        checks.expect(caller.passed(), "a caller saw failures");
}

// Gaps around the workers' spinning time: some are awake, some about to sleep, some asleep.
void test_gaps(Checks& checks) {
    for (int i = 0; i < 400; ++i) {
        const timespec gap = {0, i * 500};
        nanosleep(&gap, nullptr);
        run_checked(checks, 2 + i % 3, 8, 2000, i);
    }
}

double cpu_seconds() {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

// Jobs for two with gaps that outlast a worker's patience, but not one that expects more: how many
// of them had to wake the worker. Jobs that no worker came to do not count. The two are kept on
// cores of their own: a worker that has come to the caller's sleeps after every job.
int n_wakes_of_jobs(int n_jobs, const cpu_set_t& of_worker) {
    const timespec gap = {0, 500'000}, moment = {0, 200'000};
    int n_woken = 0;
    for (int i = 0; i < n_jobs;) {
        const int64_t n_before = n_worker_wakes();
        std::atomic<bool> helped{false};
        parallel_for(2, 4, [&](int64_t, int worker) {
            if (worker == 1) {
                helped = true;
                pthread_setaffinity_np(pthread_self(), sizeof of_worker, &of_worker);
            }
            nanosleep(&moment, nullptr);  // the caller is not to do it all
        });
        i += helped;
        n_woken += helped && n_worker_wakes() > n_before;
        nanosleep(&gap, nullptr);
    }
    return n_woken;
}

int64_t n_lost_cores() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_nivcsw;
}

// Workers sleep through gaps unless more is expected, and again once it is not. Where other
// processes want the cores, workers sleep all the same for a while: hence attempts, and no verdict
// unless several had the cores for themselves.
void test_staying_awake(Checks& checks) {
    cpu_set_t all, two[2];
    sched_getaffinity(0, sizeof all, &all);
    if (CPU_COUNT(&all) < 2) return;
    for (int core = 0, n = 0; n < 2; ++core) {
        if (!CPU_ISSET(core, &all)) continue;
        CPU_ZERO(&two[n]);
        CPU_SET(core, &two[n++]);
    }
    sched_setaffinity(0, sizeof two[0], &two[0]);
    constexpr int n_jobs = 20;
    int n_expecting = n_jobs, n_expecting_nothing = 0, n_undisturbed = 0;
    bool as_promised = false;
    for (int attempt = 0; attempt < 25 && !as_promised; ++attempt) {
        const timespec while_sleepy = {0, 110'000'000};
        if (attempt > 0) nanosleep(&while_sleepy, nullptr);
        const int64_t n_before = n_lost_cores();
        {
            const StayAwake outer;
            { const StayAwake inner; }
            n_expecting = n_wakes_of_jobs(n_jobs, two[1]);
        }
        n_expecting_nothing = n_wakes_of_jobs(n_jobs, two[1]);
        n_undisturbed += n_lost_cores() == n_before;
        as_promised = n_expecting <= n_jobs / 2 && n_expecting_nothing >= 3 * n_jobs / 4;
    }
    if (!as_promised && n_undisturbed < 5)
        std::fputs("not tested: workers that stay awake; the cores are too busy\n", stderr);
    else
        checks.expect(
            as_promised,
            "of %d jobs after a gap, %d woke the worker while more was expected, %d while "
            "not",
            n_jobs, n_expecting, n_expecting_nothing);
    sched_setaffinity(0, sizeof all, &all);
    n_wakes_of_jobs(1, all);
}

// What is expected and does not come: workers sleep in the end.
void test_expecting_in_vain(Checks& checks) {
    const StayAwake expectant;
    const timespec a_while = {0, 200'000'000};
    run_checked(checks, 4, 100, 100, 0);
    const double before = cpu_seconds();
    nanosleep(&a_while, nullptr);
    const double used = cpu_seconds() - before;
    checks.expect(used < 0.1, "%.4f s of processor time in 0.2 s of waiting for a job", used);
    run_checked(checks, 4, 100, 100, 0);
}

// An idle process with a pool uses no time.
void test_idle(Checks& checks) {
    run_checked(checks, 4, 100, 1000, 0);
    const timespec a_moment = {0, 20'000'000}, a_while = {0, 200'000'000};
    nanosleep(&a_moment, nullptr);
    const double before = cpu_seconds();
    nanosleep(&a_while, nullptr);
    const double used = cpu_seconds() - before;
    checks.expect(used < 0.002, "%.4f s of processor time in 0.2 s of idling", used);
}

// A caller who waits for a long chunk sleeps.
void test_waiting_caller(Checks& checks) {
    const timespec long_chunk = {0, 150'000'000};
    bool helped = false;
    // Now and then the caller is so quick that it takes both chunks.
    for (int attempt = 0; attempt < 20 && !helped; ++attempt) {
        const double before = cpu_seconds();
        std::atomic<int> n_workers_seen{0};
        parallel_for(2, 2, [&](int64_t, int worker) {
            if (worker == 0) {
                const timespec moment = {0, 1'000'000};
                nanosleep(&moment, nullptr);
                return;
            }
            ++n_workers_seen;
            nanosleep(&long_chunk, nullptr);
        });
        if (n_workers_seen == 0) continue;
        helped = true;
        const double used = cpu_seconds() - before;
        checks.expect(used < 0.01, "%.4f s of processor time waiting for a sleeping worker", used);
    }
    checks.expect(helped, "no worker came in 20 jobs");
}

int run_child(void (*body)(Checks&)) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);  // a deadlock ends as a signal
        Checks checks;
        body(checks);
        _exit(checks.passed() ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

// Whether a child of this process, which has threads, may start one at all.
bool children_can_start_threads() {
    for (int i = 0; i < 5; ++i) {
        const int status = run_child([](Checks& in_child) {
            int n_started = 0;
            for (int n = 0; n < 4; ++n)
                std::thread([&] { ++n_started; }).join();
            in_child.expect(n_started == 4, "%d threads were started, not 4", n_started);
        });
        if (status != 0) return false;
    }
    return true;
}

void test_fork(Checks& checks) {
    std::atomic<bool> stop{false};
    std::thread other_caller([&] {
        while (!stop)
            parallel_for(3, 12, [](int64_t, int) {});
    });
    for (int i = 0; i < 30; ++i) {
        const int status = run_child([](Checks& in_child) {
            for (int round = 0; round < 30; ++round)
                run_checked(in_child, 3, 40, 500, round);
            test_workers(in_child);
        });
        checks.expect(status == 0, "forked child %d ended with status %#x", i, status);
    }
    stop = true;
    other_caller.join();
}

// Leaves through exit() and its handlers while workers are at work and another thread calls.
void test_exit(Checks& checks) {
    for (int i = 0; i < 20; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            std::thread([] {
                for (;;)
                    parallel_for(3, 50, [](int64_t, int) { usleep(20); });
            }).detach();
            usleep(useconds_t(200 * i));
            cut_short = true;
            std::exit(0);
        }
        int status = -1;
        waitpid(child, &status, 0);
        checks.expect(status == 0, "exit %d of a busy process gave status %#x", i, status);
    }
}

// Without threads to be had, the caller does everything and says so.
void test_no_threads(Checks& checks) {
    const int status = run_child([](Checks& in_child) {
        const rlimit none = {0, 0};
        const bool limited = setrlimit(RLIMIT_NPROC, &none) == 0 &&
                             (geteuid() != 0 || setuid(65534) == 0);  // root has no limit
        in_child.expect(limited, "the number of threads cannot be limited here");
        run_checked(in_child, 4, 100, 100, 0);
        run_checked(in_child, 4, 100, 100, 0);
        LogLevel level;
        std::string line;
        in_child.expect(next_log_line(level, line) && level == LogLevel::warning &&
                            line.starts_with("computing with 1 thread"),
                        "the log says '%s'", line.c_str());
        in_child.expect(!next_log_line(level, line), "and again '%s'", line.c_str());
    });
    checks.expect(status == 0, "without threads: status %#x", status);
}

}  // namespace

int main() {
    Checks checks;
    // First what forks before there are threads, then what makes them.
    test_exit(checks);
    test_no_threads(checks);
    test_shapes(checks);
    test_workers(checks);
    test_rapid_jobs(checks);
    test_callers(checks);
    test_gaps(checks);
    test_staying_awake(checks);
    test_expecting_in_vain(checks);
    test_idle(checks);
    test_waiting_caller(checks);
    if (children_can_start_threads())
        test_fork(checks);
    else
        std::fputs(
            "not tested: a loop in a forked child; no child can start threads here, as under "
            "the thread sanitizer and qemu\n",
            stderr);
    return checks.status();
}
