// One GPU: its context, what it is, its memory under a budget, and the objects that live on it.
//
// Objects hold their Gpu and release what they own when they go; releasing never throws and is
// quiet on a lost device and in a forked process. Creating and releasing bring the context along;
// everything else wants a `Current` on the stack of the calling thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "device/cuda/driver.h"
#include "device/cuda/nvrtc.h"

namespace qi::cuda {

class Module;

class Gpu : public std::enable_shared_from_this<Gpu> {
  public:
    struct Attributes {
        int ordinal = 0;  // among the visible ones
        std::string name;
        std::string uuid;      // "GPU-…", as nvidia-smi -L shows it
        int architecture = 0;  // 10 · major + minor of the compute capability
        int n_sm = 0;
        int max_threads_per_sm = 0;
        int shared_bytes_per_block = 0;  // with opting in
        bool has_watchdog = false;       // kernels that take seconds are ended
        int64_t l2_bytes = 0;
        int64_t memory_bytes = 0;
        double memory_bandwidth = 0;  // bytes per second, theoretical; 0: the driver does not say
    };

    // The GPU of that number, shared by all who have it open. Throws QI_DEVICE when there is none
    // or its compute capability is below 7.5.
    static std::shared_ptr<Gpu> open(int ordinal);
    static int count();
    // What can be said of a GPU without opening it.
    static Attributes describe(int ordinal);

    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    const Attributes& attributes() const { return attributes_; }
    CUcontext context() const { return context_; }
    // Of the whole card, whoever uses it.
    size_t free_bytes() const;

    // The unit's kernels, loaded unless someone has them already; see make_cubin. From any thread;
    // several threads compile several units side by side.
    std::shared_ptr<Module> module(std::string_view unit);

    // Held, shared, while a stream is recorded, and alone by what waits for the whole device, which
    // would end the recording. Throws in a forked process.
    std::shared_mutex& recording();

  private:
    struct KnownModule {
        std::mutex mutex;
        std::weak_ptr<Module> module;
    };
    explicit Gpu(int ordinal);

    Attributes attributes_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    std::mutex modules_mutex_;
    std::map<std::string, std::unique_ptr<KnownModule>, std::less<>> modules_;
    std::shared_mutex recording_;
};

// Makes a GPU's context the calling thread's until the end of the scope.
class Current {
  public:
    explicit Current(const Gpu& gpu);
    // For destructors: does nothing where the driver cannot be used; ask `ok`.
    Current(const Gpu& gpu, std::nothrow_t) noexcept;
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

    bool ok() const { return pushed_; }

  private:
    bool pushed_ = false;
};

// What an object on a GPU has in common: it keeps the GPU open.
class OnGpu {
  public:
    const std::shared_ptr<Gpu>& gpu() const { return gpu_; }

  protected:
    OnGpu() = default;
    explicit OnGpu(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)) {}
    ~OnGpu() = default;
    OnGpu(OnGpu&&) noexcept = default;
    OnGpu& operator=(OnGpu&& other) noexcept {
        std::swap(gpu_, other.gpu_);
        return *this;
    }

  private:
    std::shared_ptr<Gpu> gpu_;
};

// How much device memory one owner may hold. Thread-safe.
class Budget {
  public:
    static constexpr size_t unlimited = SIZE_MAX;
    explicit Budget(size_t limit_bytes) : limit_(limit_bytes) {}

    size_t limit_bytes() const { return limit_.load(std::memory_order_relaxed); }
    // By n bytes, which others have taken; not below what is used.
    void lower(size_t n_bytes);
    size_t used_bytes() const { return used_.load(std::memory_order_relaxed); }
    size_t peak_bytes() const { return peak_.load(std::memory_order_relaxed); }
    size_t left_bytes() const { return limit_bytes() - used_bytes(); }

    // Counts n bytes; false, with nothing counted, when they do not fit.
    bool take(size_t n_bytes);
    void give_back(size_t n_bytes) { used_.fetch_sub(n_bytes, std::memory_order_relaxed); }

  private:
    std::atomic<size_t> limit_;
    std::atomic<size_t> used_{0};
    std::atomic<size_t> peak_{0};
};

// Device memory, counted against a budget before it is asked for. Contents are undefined.
class DeviceMemory : public OnGpu {
  public:
    DeviceMemory() = default;
    // Throws QI_MEMORY saying what for (`what`: "the KV cache"), how much was asked, what the
    // budget and the card have left. 0 bytes are fine and take nothing.
    DeviceMemory(std::shared_ptr<Gpu> gpu, std::shared_ptr<Budget> budget, size_t n_bytes,
                 const char* what);
    ~DeviceMemory();
    DeviceMemory(DeviceMemory&& other) noexcept;
    DeviceMemory& operator=(DeviceMemory&& other) noexcept;

    CUdeviceptr address() const { return address_; }
    size_t n_bytes() const { return n_bytes_; }

    // What an allocation of n bytes is counted as: the driver hands out whole 2 MiB pages, and
    // shares one among small allocations in steps of 512 bytes.
    static size_t counted_bytes(size_t n_bytes);

  private:
    std::shared_ptr<Budget> budget_;
    CUdeviceptr address_ = 0;
    size_t n_bytes_ = 0;
};

// Host memory that the GPU reads and writes without the host's help. Contents are undefined.
class PinnedMemory : public OnGpu {
  public:
    PinnedMemory() = default;
    PinnedMemory(std::shared_ptr<Gpu> gpu, size_t n_bytes, const char* what);
    ~PinnedMemory();
    PinnedMemory(PinnedMemory&& other) noexcept;
    PinnedMemory& operator=(PinnedMemory&& other) noexcept;

    std::byte* data() const { return data_; }
    CUdeviceptr device_address() const { return device_address_; }
    size_t n_bytes() const { return n_bytes_; }

  private:
    std::byte* data_ = nullptr;
    CUdeviceptr device_address_ = 0;
    size_t n_bytes_ = 0;
};

class Event;

// Ordered work; streams do not wait for the driver's default stream. One that goes waits for its
// work, so declare it after the memory and the modules that the work uses.
class Stream : public OnGpu {
  public:
    // Lower numbers go first. The last is 0, and at most a few below it are told apart: the driver
    // clamps others to what the card has.
    static constexpr int priority_of_steps = -1, last_priority = 0;
    explicit Stream(std::shared_ptr<Gpu> gpu, int priority = priority_of_steps);
    ~Stream();
    Stream(Stream&& other) noexcept;
    Stream& operator=(Stream&& other) noexcept;

    CUstream handle() const { return handle_; }
    void synchronize() const;
    bool idle() const;
    void wait(const Event& event) const;

    void copy_to_device(CUdeviceptr to, const void* from, size_t n_bytes) const;
    void copy_to_host(void* to, CUdeviceptr from, size_t n_bytes) const;
    void copy_on_device(CUdeviceptr to, CUdeviceptr from, size_t n_bytes) const;
    void fill(CUdeviceptr at, uint8_t value, size_t n_bytes) const;

    // Of kernels so far, those of replayed graphs included.
    uint64_t n_launches() const { return n_launches_; }

  private:
    friend class Function;
    friend class Graph;

    CUstream handle_ = nullptr;
    mutable uint64_t n_launches_ = 0;
};

class Event : public OnGpu {
  public:
    explicit Event(std::shared_ptr<Gpu> gpu, bool timing = false);
    ~Event();
    Event(Event&& other) noexcept;
    Event& operator=(Event&& other) noexcept;

    CUevent handle() const { return handle_; }
    void record(const Stream& stream) const;
    bool done() const;
    void synchronize() const;
    // Both recorded, done, and made with timing.
    static double seconds_between(const Event& begin, const Event& end);

  private:
    CUevent handle_ = nullptr;
};

struct Size3 {
    unsigned x = 1, y = 1, z = 1;
};

// A kernel of a module, which must outlive it.
class Function {
  public:
    Function() = default;

    CUfunction handle() const { return handle_; }
    // Needed once before launches with more than 48 KB of it.
    void allow_dynamic_shared(int n_bytes) const;

    // The arguments' types must be those of the kernel's parameters.
    template <typename... Arguments>
    void launch(const Stream& stream, Size3 grid, Size3 block, unsigned shared_bytes,
                Arguments... arguments) const {
        void* parameters[] = {static_cast<void*>(&arguments)..., nullptr};
        launch_with(stream, grid, block, shared_bytes, parameters);
    }

  private:
    friend class Module;
    Function(CUfunction handle, const char* name) : handle_(handle), name_(name) {}
    void launch_with(const Stream& stream, Size3 grid, Size3 block, unsigned shared_bytes,
                     void** parameters) const;

    CUfunction handle_ = nullptr;
    const char* name_ = "";
};

// The kernels of one unit, loaded.
class Module : public OnGpu {
  public:
    // Tries an embedded cubin, then one kept on disk, then compiling: what the driver refuses to
    // load is made again.
    Module(std::shared_ptr<Gpu> gpu, std::string_view unit);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    // `name` is the kernel's, a literal: messages keep the pointer.
    Function function(const char* name) const;
    const std::string& unit() const { return unit_; }
    Cubin::Origin origin() const { return origin_; }
    double compile_seconds() const { return compile_seconds_; }

  private:
    std::string unit_;
    CUmodule handle_ = nullptr;
    Cubin::Origin origin_ = Cubin::Origin::compiled;
    double compile_seconds_ = 0;
};

// Work recorded from a stream, to be replayed.
class Graph : public OnGpu {
  public:
    Graph() = default;
    // Calls `record`, which enqueues on `stream` and neither allocates nor waits.
    template <typename Record>
    Graph(const Stream& stream, Record&& record) : Graph(stream, record, {}) {}
    // Takes the driver's memory for others of the same work, too.
    template <typename Record>
    Graph(const Stream& stream, Record&& record, std::span<Graph> others)
        : OnGpu(stream.gpu()), n_launches_(stream.n_launches_) {
        const std::shared_lock lock(stream.gpu()->recording());
        begin(stream);
        try {
            record();
        } catch (...) {
            abandon(stream);
            stream.n_launches_ = n_launches_;
            throw;
        }
        finish(stream, others);
    }
    ~Graph();
    Graph(Graph&& other) noexcept;
    Graph& operator=(Graph&& other) noexcept;

    explicit operator bool() const { return executable_ != nullptr; }
    void launch(const Stream& stream) const;

  private:
    explicit Graph(std::shared_ptr<Gpu> gpu) : OnGpu(std::move(gpu)) {}
    static void begin(const Stream& stream);
    static void abandon(const Stream& stream) noexcept;
    void finish(const Stream& stream, std::span<Graph> others);

    CUgraphExec executable_ = nullptr;
    uint64_t n_launches_ = 0;  // of a replay
};

}  // namespace qi::cuda
