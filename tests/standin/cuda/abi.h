// What a compiled kernel and the GPU process that runs it agree on. Included by the shim in front
// of kernels, so it includes nothing itself.
#pragma once

struct QiIndex3 {
    unsigned x, y, z;
};

// The thread a kernel is running as; the GPU process keeps more behind it.
struct QiLane {
    QiIndex3 thread;     // threadIdx
    QiIndex3 block;      // blockIdx
    QiIndex3 block_dim;  // blockDim
    QiIndex3 grid_dim;   // gridDim
};

// One `extern "C" __global__` function of a module. The table ends with a null name.
struct QiKernel {
    const char* name;
    void (*run)(const unsigned char* arguments);  // calls it with packed arguments
    int n_parameters;
    const unsigned* sizes;    // [n_parameters] bytes
    const unsigned* offsets;  // [n_parameters] in the packed arguments
    unsigned packed_size;
    int max_threads;  // of __launch_bounds__, or 0
};

enum QiCollective {
    qi_shfl_idx,
    qi_shfl_up,
    qi_shfl_down,
    qi_shfl_xor,
    qi_ballot,
    qi_syncwarp,
    qi_call,
};

// What a warp does together: gets each lane's operands, null for lanes that take no part.
using QiWarpFunction = void (*)(void* const operands[32]);

extern "C" {
// Initial exec: the variable is the executable's, a load from the thread pointer.
extern __thread QiLane* qi_standin_lane __attribute__((tls_model("initial-exec")));

void qi_standin_barrier();
// The threads of a warp have to come to it from the same place.
void qi_standin_barrier_at(unsigned place);
unsigned long long qi_standin_collective(int op, unsigned mask, unsigned long long value,
                                         int source, int width);
// Runs the function once, when the lanes of the mask have come to it, from the same place.
void qi_standin_warp_call(unsigned mask, QiWarpFunction function, void* operands, unsigned place);
// Before an access to shared memory: a load, a store, an atomic operation, or a store of what is
// there already (0 to 3).
void qi_standin_shared_access(unsigned offset, unsigned bytes, int kind, unsigned line);
void qi_standin_yield();               // called by every spin loop: others may run
char* qi_standin_dynamic_shared();     // of the running block
unsigned long long qi_standin_time();  // nanoseconds
void qi_standin_sleep(unsigned nanoseconds);
[[noreturn]] void qi_standin_trap();
[[noreturn]] void qi_standin_misaligned(unsigned long long address, const char* file,
                                        unsigned line);
[[noreturn]] void qi_standin_fault(const char* what, const char* file, unsigned line);
}
