// The process's pool of workers.
#include "base/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "base/cpu.h"

namespace qi {

namespace {

struct Job {
    Job(int n_threads, int64_t n_chunks, FunctionRef<void(int64_t, int)> body)
        : n_threads(n_threads), n_chunks(n_chunks), body(body) {}
    const int n_threads;
    const int64_t n_chunks;
    const FunctionRef<void(int64_t, int)> body;
    std::atomic<int> n_joined{1};  // the caller is worker 0
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> n_done{0};

    void work(int worker) {
        for (int64_t chunk; (chunk = next.fetch_add(1)) < n_chunks;) {
            body(chunk, worker);
            n_done.fetch_add(1);
        }
    }
};

struct Pool {
    std::mutex mutex;
    std::condition_variable changed;
    std::shared_ptr<Job> job;

    Pool() {
        for (int i = 1; i < cpu_info().n_usable_cores; ++i)
            std::thread([this] { run(); }).detach();
    }
    void run() {
        std::shared_ptr<Job> last;
        for (;;) {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return job && job != last; });
            last = job;
            lock.unlock();
            const int worker = last->n_joined.fetch_add(1);
            if (worker < last->n_threads) last->work(worker);
        }
    }
};

}  // namespace

void parallel_for(int n_threads, int64_t n_chunks, FunctionRef<void(int64_t, int)> body) {
    if (n_threads <= 1 || n_chunks <= 1) {
        for (int64_t chunk = 0; chunk < n_chunks; ++chunk)
            body(chunk, 0);
        return;
    }
    static Pool& pool = *new Pool;
    auto job = std::make_shared<Job>(n_threads, n_chunks, body);
    {
        std::lock_guard lock(pool.mutex);
        pool.job = job;
    }
    pool.changed.notify_all();
    job->work(0);
    while (job->n_done.load() < n_chunks)
        std::this_thread::yield();
}

}  // namespace qi
