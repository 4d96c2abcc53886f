// Loading libcuda: once per process, and never in a fork of one that has it.
#include "device/cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <optional>

#include "base/error.h"
#include "base/text.h"

namespace qi::cuda {

namespace {

constexpr char update_driver[] =
    "update the NVIDIA driver to version 570 (CUDA 12.8) or newer; qinfer's extra for drivers of "
    "CUDA 12.8 and 12.9 is `pip install \".[cuda12]\"`, for CUDA 13 it is `pip install "
    "\".[cuda]\"`";

// What came of loading the driver, kept for the life of the process.
struct Outcome {
    Driver driver;
    std::string failure;  // empty when it can be used
};

struct Loading {
    std::mutex mutex;
    std::atomic<const Outcome*> outcome{nullptr};
    std::atomic<pid_t> process{0};    // the one that began to load it
    std::atomic<bool> forked{false};  // this process has a copy of another one's driver
};

// Needs neither constructing nor destroying: handles may be released while the process runs its
// exit handlers.
constinit Loading loading;

[[noreturn]] void refuse_fork() {
    fail(QI_DEVICE,
         "process %d is a fork of process %d, which had CUDA started, and CUDA does not survive a "
         "fork: use the `spawn` start method, or fork before a GPU is used",
         int(getpid()), int(loading.process.load()));
}

// Why a driver that was loaded sees no GPU.
std::string no_gpu() {
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    if (visible == nullptr)
        return "the NVIDIA driver finds no GPU: see that `nvidia-smi` lists one, and that a "
               "container was given it";
    return format(
        "the NVIDIA driver finds no GPU among those that CUDA_VISIBLE_DEVICES=%s leaves visible: "
        "unset it or name a GPU that `nvidia-smi -L` lists",
        quoted(visible).c_str());
}

std::string load(Driver& driver) {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = dlerror();
        return format(
            "there is no NVIDIA driver that can be loaded (%s): install it, version 570 (CUDA "
            "12.8) or newer",
            reason ? reason : "libcuda.so.1 not found");
    }
    // An old driver is told by its version before what it lacks: the remedy is the same, and the
    // version says more than a symbol.
    const char* missing = nullptr;
#define QI_CUDA_FIND(name, symbol, parameters)                                     \
    driver.name = reinterpret_cast<decltype(driver.name)>(dlsym(library, symbol)); \
    if (driver.name == nullptr && missing == nullptr) missing = symbol;
    QI_CUDA_ENTRIES(QI_CUDA_FIND)
#undef QI_CUDA_FIND
    if (driver.cuDriverGetVersion != nullptr &&
        driver.cuDriverGetVersion(&driver.version) == CUDA_SUCCESS &&
        driver.version < oldest_driver)
        return format(
            "the NVIDIA driver is for CUDA %s, and qinfer needs one for 12.8 or newer: %s",
            version_text(driver.version).c_str(), update_driver);
    if (missing != nullptr)
        return format("the NVIDIA driver's libcuda.so.1 has no %s, which qinfer calls: %s", missing,
                      update_driver);
    const CUresult started = driver.cuInit(0);
    if (started == CUDA_ERROR_NO_DEVICE) return no_gpu();
    if (started != CUDA_SUCCESS)
        return format("the NVIDIA driver does not start: %s; see whether `nvidia-smi` works",
                      result_text(driver, started).c_str());
    int n_devices = 0;
    const CUresult counted = driver.cuDeviceGetCount(&n_devices);
    if (counted != CUDA_SUCCESS)
        return format("the NVIDIA driver does not count its GPUs: %s",
                      result_text(driver, counted).c_str());
    return n_devices > 0 ? std::string() : no_gpu();
}

}  // namespace

const Driver& driver() {
    if (loading.forked.load(std::memory_order_relaxed)) [[unlikely]]
        refuse_fork();
    const Outcome* outcome = loading.outcome.load(std::memory_order_acquire);
    if (outcome == nullptr) {
        // A child forked while its parent was loading has the mutex locked by nobody.
        pid_t process = 0;
        if (!loading.process.compare_exchange_strong(process, getpid()) && process != getpid())
            refuse_fork();
        std::lock_guard lock(loading.mutex);
        outcome = loading.outcome.load(std::memory_order_relaxed);
        if (outcome == nullptr) {
            auto* made = new Outcome;
            made->failure = load(made->driver);
            // Only now: starting the driver may itself fork, to run a helper program. A flag set
            // in the child makes the check on every entry a plain load.
            if (made->failure.empty())
                pthread_atfork(nullptr, nullptr, [] { loading.forked.store(true); });
            outcome = made;
            loading.outcome.store(made, std::memory_order_release);
        }
    }
    if (!outcome->failure.empty()) throw Error(QI_DEVICE, outcome->failure);
    return outcome->driver;
}

const Driver* driver_if_usable() noexcept {
    const Outcome* outcome = loading.outcome.load(std::memory_order_acquire);
    const bool usable = outcome != nullptr && outcome->failure.empty() &&
                        !loading.forked.load(std::memory_order_relaxed);
    return usable ? &outcome->driver : nullptr;
}

std::string version_text(int version) {
    return format("%d.%d", version / 1000, version % 1000 / 10);
}

std::string result_text(const Driver& driver, CUresult result) {
    const char* name = nullptr;
    const char* text = nullptr;
    if (driver.cuGetErrorName(result, &name) != CUDA_SUCCESS || name == nullptr)
        return format("CUDA error %d", result);
    if (driver.cuGetErrorString(result, &text) != CUDA_SUCCESS || text == nullptr) text = "";
    return format("%s (%d), %s", name, result, text);
}

void fail_cuda(CUresult result, const char* doing) {
    const std::string text = result_text(driver(), result);
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        fail(QI_MEMORY, "the GPU ran out of memory while %s: %s", doing, text.c_str());
    fail(QI_DEVICE, "the GPU failed while %s: %s", doing, text.c_str());
}

}  // namespace qi::cuda
