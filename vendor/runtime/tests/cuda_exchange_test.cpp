// Rounds on drivers that no stand-in is: one that does not come back from launching a recording
// before it has run, one that has no memory for recordings, and one under whose lock another thread
// is until the GPU comes to rest, which is not to keep the host from answering.
#include "device/cuda/exchange.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/log.h"
#include "fake_driver.h"
#include "kernel_checks.h"

using namespace qi;
using namespace qi::cuda;
using namespace qi::test;

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

std::atomic<uint32_t>* to_host = nullptr;  // the flag that a GPU raises when it has sent

// The one recording there is, while it is made and afterwards.
std::vector<std::function<void()>> recorded;
bool is_recording = false;
bool launches_wait = false;  // graphs' do: the host cannot answer before a kernel gives up

// A kernel that sends raises the flag at once; one that receives does nothing but, in a graph whose
// launch waits, see whether the answer is there.
CUresult launch(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                unsigned, CUstream, void** parameters, void**) {
    const bool sends = std::strcmp(reinterpret_cast<const char*>(function), "qi_send") == 0;
    const auto* base = *static_cast<const uint32_t**>(parameters[sends ? 9 : 4]);
    const uint32_t place = *static_cast<uint32_t*>(parameters[sends ? 10 : 5]);
    auto* const flag = *static_cast<std::atomic<uint32_t>**>(parameters[sends ? 12 : 6]);
    const auto work = [=] {
        if (sends)
            *flag = *base + place;
        else if (launches_wait && *flag != *base + place)
            flag[2] = 1;
    };
    if (sends && place > 0) to_host = flag;
    if (is_recording)
        recorded.emplace_back(work);
    else if (sends)
        work();
    return CUDA_SUCCESS;
}

void add_graphs(Driver& d) {
    d.cuStreamBeginCapture = [](CUstream, int) {
        recorded.clear();
        return is_recording = true, CUDA_SUCCESS;
    };
    d.cuStreamEndCapture = [](CUstream, CUgraph* graph) {
        *graph = fake::any<CUgraph>();
        return is_recording = false, CUDA_SUCCESS;
    };
    d.cuGraphInstantiateWithFlags = [](CUgraphExec* executable, CUgraph, unsigned long long) {
        return *executable = fake::any<CUgraphExec>(), CUDA_SUCCESS;
    };
    d.cuGraphLaunch = [](CUgraphExec, CUstream) {
        for (const auto& work : recorded)
            work();
        return CUDA_SUCCESS;
    };
    d.cuGraphDestroy = [](CUgraph) { return CUDA_SUCCESS; };
    d.cuGraphExecDestroy = [](CUgraphExec) { return CUDA_SUCCESS; };
}

// Rounds are not recorded on such a driver, and the log says why; all else is as ever.
void expect_unrecorded(Checks& checks, const char* why) {
    const std::shared_ptr<Gpu> gpu = Gpu::open(0);
    const Stream stream(gpu);
    const DeviceMemory room(gpu, std::make_shared<Budget>(Budget::unlimited),
                            Exchange::room_bytes(3), "a test");
    Exchange exchange(gpu, stream, room.address(), 3);
    LogLevel level{};
    std::string line;
    const bool is_said = next_log_line(level, line);
    checks.expect(
        !exchange.can_be_recorded() && is_said && level == LogLevel::warning && line.ends_with(why),
        "the log says '%s', not '%s'", line.c_str(), why);
    const uint32_t base = exchange.begin();
    exchange.check();
    bool has_answered = false;
    exchange.answer(stream, exchange.send(stream, CUdeviceptr(&base), 0, {}),
                    [&] { has_answered = true; });
    checks.expect(has_answered, "the host has not answered");
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
    add_graphs(fake::made());
    launches_wait = true;
    expect_unrecorded(checks, "in a recording, a kernel waited for the processor in vain");
    launches_wait = false;
    const auto instantiate = fake::made().cuGraphInstantiateWithFlags;
    fake::made().cuGraphInstantiateWithFlags = [](CUgraphExec*, CUgraph, unsigned long long) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    };
    expect_unrecorded(checks, "error 2");
    fake::made().cuGraphInstantiateWithFlags = instantiate;
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
