// What the host process and the GPU process say to each other.
//
// Two mappings and one socket join them:
// * the arena, a memfd mapped at one address in both: its first pages are the Control block, the
//   rest is pinned host memory, which kernels may read and write where the host does, as long as it
//   is allocated;
// * device memory, mapped in the GPU process alone; the host process holds its address range
// without
//   access, so that host code that follows a device pointer faults;
// * a stream socket with messages in order. All go one way but replies to module loads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace standin {

inline constexpr int socket_fd = 3;  // in the GPU process
inline constexpr int arena_fd = 4;
inline constexpr uint32_t max_streams = 2048;
inline constexpr uint32_t max_events = 65536;
inline constexpr size_t page = 4096;
inline constexpr size_t allocation_alignment = 256;

struct Control {
    std::atomic<uint32_t> ready;    // the GPU process has its mappings: 1; 2: it could not
    std::atomic<uint32_t> error;    // a CUresult; once set, the GPU process is gone
    std::atomic<uint32_t> changes;  // futex word: counts completions
    char report[512];               // what the error was
    std::atomic<uint64_t> done[max_streams];  // operations completed; a slot counts on when reused
    std::atomic<uint64_t> event_time[max_events];  // nanoseconds, of the last record
};
inline constexpr size_t control_bytes = (sizeof(Control) + page - 1) / page * page;

// Given to the GPU process as its command line, in this order.
struct Places {
    uint64_t arena, arena_bytes;
    uint64_t device, device_bytes;
    uint64_t parent;
};

enum class Kind : uint32_t {
    // Acted on as they arrive.
    allocate,       // Range
    release,        // Range
    open,           // Range of pages of the arena, which become pinned host memory
    close,          // Range, the same
    load_module,    // the image; answered by ModuleReply
    unload_module,  // uint64_t id
    configure,      // Configuration
    // Queued on a stream.
    copy,         // Copy
    write,        // uint64_t address, then the bytes
    fill,         // Fill
    launch,       // Launch, then the arguments
    gemm,         // Gemm
    wait,         // Point[]
    record,       // uint64_t event slot
    wait_value,   // Value
    write_value,  // Value
    batch,        // operations, each a Header and its payload: a graph
};

struct Header {
    Kind kind;
    uint32_t stream;
    uint64_t sequence;  // of the operation on its stream, from 1
    uint64_t size;      // of the payload that follows
};

struct Range {
    uint64_t address, bytes;
};

struct Configuration {
    uint64_t delay_us;  // an operation waits up to this long before it starts
    uint64_t seed;      // shuffles blocks, threads and delays; 0: everything in order
    uint64_t watchdog_ms;
    uint64_t clock_rate;  // kernels' clocks run so many times faster
    uint64_t multiprocessors;
    uint64_t threads_per_multiprocessor;
};

struct Copy {
    uint64_t to, from, bytes;
};

struct Fill {
    uint64_t to, count;
    uint32_t value, width;  // width: 1 or 4 bytes
};

struct Launch {
    uint64_t module, kernel;  // module id, index into its table
    QiIndex3 grid, block;
    uint32_t dynamic_shared;
    uint32_t argument_bytes;
};

enum class Number : uint32_t { f32, f16, bf16 };

// C[m][n] = alpha · op(A)·op(B) + beta · C, column-major as in BLAS
struct Gemm {
    uint64_t a, b, c;
    int64_t m, n, k, lda, ldb, ldc;
    uint32_t transpose_a, transpose_b;
    Number type_ab, type_c;
    float alpha, beta;
};

struct Point {
    uint64_t stream, sequence;
};

struct Value {
    uint64_t address;
    uint32_t value, flags;
};

struct ModuleReply {
    uint64_t id;  // 0: it does not load, and the text says why
    uint32_t n_kernels;
    uint32_t text_bytes;
    // then KernelReply and its name for each kernel, then the text
};

struct KernelReply {
    uint32_t name_bytes, n_parameters;
    uint32_t static_shared, max_threads, packed_size;
    uint32_t sizes[64], offsets[64];
};

}  // namespace standin
