// Runs a kernel's grid on the processor.
//
// A block runs on one OS thread, its threads as fibers. A thread runs until it meets a barrier or a
// warp collective, so a kernel without them is a plain loop on one stack. Blocks run one after the
// other until one of them spins (qi_standin_yield): then further threads take blocks up, as many as
// the device would hold at a time, so that blocks may wait for one another and for the host.
#pragma once

#include <dlfcn.h>
#include <unistd.h>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "abi.h"
#include "protocol.h"

namespace standin {

struct Module {
    Module() = default;
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;
    ~Module() {
        if (library) dlclose(library);
        if (file >= 0) close(file);
    }

    uint64_t id = 0;
    void* library = nullptr;
    int file =
        -1;  // open as long as it is loaded: the loader takes equal paths for equal libraries
    const QiKernel* kernels = nullptr;
    size_t tls_module = 0;  // the dynamic loader's number of its thread-local block
    size_t tls_bytes = 0;   // all __shared__ variables of the module
};

struct Grid {
    const Module* module;
    const QiKernel* kernel;
    QiIndex3 grid, block;
    uint32_t dynamic_shared;
    const unsigned char* arguments;
};

// Comes back when every block has ended. Ends the process with a report if the kernel goes wrong.
void run_grid(const Grid& grid, const Configuration& configuration, uint64_t seed);

// Kernels' clocks run so many times faster from now on.
void set_clock_rate(uint64_t rate);

// What the calling OS thread is executing, for a report: "kernel f, block (1,0,0), thread (3,0,0)".
std::string whereabouts();

// Whether an address is where the calling OS thread's lowest stack overflows to.
bool below_stacks(uint64_t address);

// Makes the calling OS thread's faults on fiber stacks reportable.
void install_signal_stack();

// Leaves the error for the host process and ends this one. `code` is a CUresult.
[[noreturn]] void fail(uint32_t code, const std::string& what);

}  // namespace standin
