// A replay whose GPU is busy for others, while another thread is inside the driver until it comes
// to rest: the driver's lock is not to keep the host from answering.
#include "device/cuda/exchange.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <thread>

#include "fake_driver.h"
#include "kernel_checks.h"

using namespace qi;
using namespace qi::cuda;
using namespace qi::test;

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

std::atomic<uint32_t>* to_host = nullptr;  // the flag that a GPU raises when it has sent

// A kernel that sends raises the flag at once, one that receives does nothing.
CUresult launch(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned, CUstream, void** parameters, void**) {
    if (std::strcmp(reinterpret_cast<const char*>(function), "qi_send") != 0) return CUDA_SUCCESS;
    to_host = *static_cast<std::atomic<uint32_t>**>(parameters[12]);
    const auto* base = *static_cast<const uint32_t**>(parameters[9]);
    *to_host = *base + *static_cast<uint32_t*>(parameters[10]);
    return CUDA_SUCCESS;
}

// What the driver's lock waits for.
std::mutex mutex;
std::condition_variable changed;
bool has_answered = false;
std::atomic<int> n_asked{0}, n_in_vain{0};

CUresult query(CUstream) {
    ++n_asked;
    std::unique_lock lock(mutex);
    if (!changed.wait_for(lock, seconds(8), [] { return has_answered; })) ++n_in_vain;
    return CUDA_ERROR_NOT_READY;
}

}  // namespace

int main() {
    Checks checks;
    fake::made().cuLaunchKernel = launch;
    const std::shared_ptr<Gpu> gpu = Gpu::open(0);
    {
        const Stream stream(gpu);
        const DeviceMemory room(gpu, std::make_shared<Budget>(Budget::unlimited),
                                Exchange::room_bytes(1), "a test");
        Exchange exchange(gpu, stream, room.address(), 1);
        checks.expect(exchange.can_be_recorded(), "rounds cannot be recorded");
        fake::made().cuStreamQuery = query;
        const uint32_t base = exchange.begin();
        exchange.replay(stream, {});
        // Longer than a replay waits before it asks.
        std::thread busy([&] {
            std::this_thread::sleep_for(milliseconds(2500));
            *to_host = base + 1;
        });
        const auto answer = [] {
            const std::lock_guard lock(mutex);
            has_answered = true;
            changed.notify_all();
        };
        exchange.replay(stream, {{{1, 0}, answer}});
        busy.join();
        exchange.check();
    }
    checks.expect(n_asked == 1, "the driver was asked %d times", n_asked.load());
    checks.expect(n_in_vain == 0, "the host waited for the driver before it answered");
    return checks.status();
}
