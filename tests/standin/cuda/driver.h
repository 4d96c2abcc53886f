// The driver's state in the host process: settings, contexts, and the objects that handles name.
#pragma once

#include <unistd.h>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cuda_types.h"
#include "gpu_link.h"

#define STANDIN_API extern "C" __attribute__((visibility("default")))

namespace standin {

struct Failure {
    CUresult code;
};

inline void require(bool fact, CUresult otherwise) {
    if (!fact) throw Failure{otherwise};
}

// Of the environment: standin.h explains them.
struct Settings {
    int capability = 90;  // 10 · major + minor
    int n_devices = 1;
    int driver_version = 13000;
    uint64_t memory = 1ull << 30;  // bytes of each device
    uint64_t multiprocessors = 8;
    uint64_t delay_us = 0;
    uint64_t seed = 0;
    uint64_t watchdog_ms = 120000;
    uint64_t clock_rate = 1;
};

inline constexpr uint64_t context_bytes = 24ull << 20;  // device memory that a context takes
// Device memory that the driver takes by itself: for each kernel and each node of a graph that can
// be launched; and cuBLAS for each kind of product.
inline constexpr uint64_t kernel_bytes = 16 << 10, node_bytes = 8, product_bytes = 1 << 20;
inline constexpr uint32_t default_shared = 48 << 10;

struct Capture;
struct Node;

// The last operation on each stream that touches something.
using Uses = std::map<uint32_t, uint64_t>;

struct Stream {
    struct Context* context;
    uint32_t slot;
    bool blocking;  // takes part in the legacy stream's ordering
    bool legacy;
    int priority = 0;
    std::shared_ptr<Capture> capture;
    std::vector<uint32_t> tail;  // nodes that the next captured one depends on
};

struct Event {
    struct Context* context;
    uint64_t slot;
    bool timing;
    uint32_t stream = 0;               // where it was last recorded
    uint64_t sequence = 0;             // 0: never
    std::shared_ptr<Capture> capture;  // set when the last record was captured
    std::vector<uint32_t> tail;
};

struct Function {
    struct Module* module;
    uint64_t index;
    KernelInfo info;
    uint32_t max_dynamic_shared;
    CUfunction handle;
};

struct Module {
    struct Context* context;
    uint64_t id;
    int binary_version;
    std::vector<std::unique_ptr<Function>> functions;
    Uses uses;
};

struct Allocation {
    struct Context* context;
    uint64_t bytes;
    Uses uses;
};

struct Pinned {
    uint64_t bytes;        // as asked for
    uint64_t arena;        // where the GPU process sees its first byte
    uint64_t arena_bytes;  // taken there
    uint64_t arena_start;
    bool registered;
    Uses uses;
};

// One operation of a graph, with its payload as the GPU process gets it.
struct Node {
    Kind kind;
    std::vector<std::byte> payload;
    std::vector<uint32_t> after;  // nodes
    struct Module* module = nullptr;
};

struct Graph {
    std::vector<Node> nodes;
};

struct GraphExec {
    struct Context* context;
    std::vector<Node> nodes;
    uint64_t launches = 0;
};

struct Capture {
    CUstreamCaptureMode mode;
    std::thread::id thread;
    Stream* origin;
    bool invalid = false;
    Graph graph;
    std::set<Stream*> streams;
};

struct FreeRanges {
    std::map<uint64_t, uint64_t> ranges;  // address → bytes
    uint64_t cursor = 0;                  // behind what was taken last
};

struct Context {
    int device;
    int references = 0;
    unsigned flags = 0;
    std::unique_ptr<Stream> legacy;
};

// Handles are numbers that point nowhere and are never used twice.
template <class Handle, class T>
class Registry {
  public:
    Handle add(std::unique_ptr<T> object) {
        const auto handle = reinterpret_cast<Handle>(next_handle());
        objects_[handle] = std::move(object);
        return handle;
    }
    T& get(Handle handle) const {
        auto found = objects_.find(handle);
        require(found != objects_.end(), CUDA_ERROR_INVALID_HANDLE);
        return *found->second;
    }
    void remove(Handle handle) { objects_.erase(handle); }
    template <class Predicate>
    void remove_if(Predicate predicate) {
        std::erase_if(objects_, [&](const auto& item) { return predicate(*item.second); });
    }
    size_t size() const { return objects_.size(); }
    auto begin() const { return objects_.begin(); }
    auto end() const { return objects_.end(); }

  private:
    static uintptr_t next_handle() {
        static std::atomic<uintptr_t> next{0x100};
        return next.fetch_add(0x10);
    }
    std::unordered_map<Handle, std::unique_ptr<T>> objects_;
};

struct Driver {
    std::mutex mutex;
    Settings settings;
    std::vector<int> visible;  // physical number of each device that is seen
    bool initialised = false;
    pid_t owner = 0;
    CUresult injected = CUDA_SUCCESS;  // a sticky error that was injected
    std::string complaint;             // the last misuse that the real driver would not explain

    GpuLink gpu;
    std::vector<std::unique_ptr<Context>> contexts;  // by device; made once, their handle stays
    std::vector<uint64_t> last = std::vector<uint64_t>(max_streams);  // sequence sent, by slot
    std::vector<uint32_t> free_slots;
    std::vector<uint64_t> free_events;

    Registry<CUstream, Stream> streams;
    Registry<CUevent, Event> events;
    Registry<CUmodule, Module> modules;
    Registry<CUgraph, Graph> graphs;
    Registry<CUgraphExec, GraphExec> executables;
    std::unordered_map<CUfunction, Function*> functions;
    std::set<std::shared_ptr<Capture>> captures;

    std::map<uint64_t, Allocation> memory;
    FreeRanges free_memory;                 // of the device range
    uint64_t allocated = 0;                 // bytes, on all devices
    std::set<std::array<int, 3>> products;  // of which cuBLAS has loaded the code
    uint64_t copied_to_host = 0;            // bytes, by copies
    uint64_t copies_to_device = 0;          // from the host
    uint64_t launches = 0;                  // of kernels, those of graphs included
    uint64_t lone_launches = 0;             // of kernels outside of graphs
    uint64_t graph_launches = 0;
    std::map<uint64_t, Pinned> pinned;  // by host address
    FreeRanges free_arena;
    uint64_t pinned_bytes = 0;

    // ---- contexts ----
    Context& current();  // the calling thread's, or Failure
    int device_of(CUdevice device) const;
    void destroy_context(Context& context);

    // ---- operations ----
    Stream& stream(CUstream handle);
    // Queues an operation, or adds it to the stream's capture.
    void submit(Stream& stream, Kind kind, std::initializer_list<Part> parts,
                Module* module = nullptr);
    bool pending(const Uses& uses) const;
    CUresult wait(std::unique_lock<std::mutex>& lock, uint32_t slot);
    CUresult wait_all(std::unique_lock<std::mutex>& lock, const Context& context);
    uint32_t take_slot();
    void configure_gpu();
    CUresult complain(CUresult code, const std::string& what);

    // ---- captures ----
    void refuse_in_capture();  // Failure, and the capture is invalid, where a call is not allowed
    // Every thread's, as what waits for the whole device does. Whether there were any.
    bool invalidate_captures();
    void invalidate(Capture& capture);
    void capture_node(Stream& stream, Kind kind, std::initializer_list<Part> parts, Module* module);
    void join_capture(Stream& stream, Event& event);

    // ---- memory ----
    uint64_t allocate(uint64_t bytes);  // device memory of the current context
    // Where [address, address + bytes) lies in one allocation of device memory, or null.
    Allocation* find_device(uint64_t address, uint64_t bytes);
    Pinned* find_pinned(uint64_t address, uint64_t bytes);   // by host address
    bool device_readable(uint64_t address, uint64_t bytes);  // device memory or mapped pinned
    uint64_t allocated_on(const Context& context) const;
    // Of a context's device memory: what is neither allocated nor taken by code and graphs.
    uint64_t free_on(const Context& context) const;
    void require_free(uint64_t bytes) const;
    uint64_t take_arena(uint64_t bytes);
    void give_arena(uint64_t start, uint64_t bytes);
    void note_use(Stream& stream, uint64_t address);
};

Driver& driver();

// The calling thread's stack of contexts; its back is current.
std::vector<Context*>& context_stack();

enum : unsigned {
    needs_init = 1,
    needs_context = 2,
    needs_device = 4,    // fails with the sticky error
    never_captured = 8,  // not allowed while a capture is under way
    releases = 16,       // does its work even when it is told to fail
    everything = needs_init | needs_context | needs_device,
};

// Counts the call; the code it is to fail with, or CUDA_SUCCESS.
CUresult enter(const char* name);

template <class Body>
CUresult api(const char* name, unsigned what, Body&& body) {
    const CUresult injected = enter(name);
    if (injected != CUDA_SUCCESS && !(what & releases)) return injected;
    Driver& d = driver();
    std::unique_lock lock(d.mutex);
    try {
        if (what & needs_init) {
            require(d.initialised && d.owner == getpid(), CUDA_ERROR_NOT_INITIALIZED);
        }
        if (what & needs_context) d.current();
        if (what & needs_device) {
            require(d.injected == CUDA_SUCCESS, d.injected);
            const CUresult error = d.gpu.error();
            require(error == CUDA_SUCCESS, error);
        }
        if (what & never_captured) d.refuse_in_capture();
        const CUresult result = body(d, lock);
        return injected != CUDA_SUCCESS ? injected : result;
    } catch (const Failure& failure) {
        return injected != CUDA_SUCCESS ? injected : failure.code;
    } catch (const std::bad_alloc&) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
}

}  // namespace standin
