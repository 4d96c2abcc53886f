// What tests set and ask of the stand-in: environment variables and functions of libcuda.so.1.
//
// Read by cuInit (STANDIN_DRIVER_VERSION by cuDriverGetVersion too):
//   STANDIN_CAPABILITY       10 · major + minor of every device               90
//   STANDIN_DEVICES          how many there are                               1
//   STANDIN_DRIVER_VERSION   1000 · major + 10 · minor                        13000
//   STANDIN_MEMORY           bytes of each; 24 MiB go to its context, and
//                            kernels, graphs and cuBLAS's products take some  1 GiB
//   STANDIN_MULTIPROCESSORS  of each                                          8
//   STANDIN_DELAY_US         every operation waits up to this long at random  0
//   STANDIN_SEED             shuffles blocks, threads and the nodes of graphs;
//                            0: all in order                                  0
//   STANDIN_WATCHDOG_MS      a kernel that runs longer ends the device        120000
//   CUDA_VISIBLE_DEVICES     as the driver reads it
// Read by NVRTC:
//   STANDIN_CXX              the compiler                                     the stand-in's own
//   STANDIN_CACHE            the folder of compiled kernels                   kernels/ beside it
//   STANDIN_NVRTC            the path of a real NVRTC: kernels are what it
//                            makes of them for the architecture, inline PTX
//                            and tensor cores included, translated to C++     none: plain C++
//
// Kernels from a real NVRTC's PTX are checked further: accesses of shared memory have to be inside
// of it and in an order; what a warp does together, and barriers, have to be met in one place; what
// a register holds that was never set is no number; the exponential and tensor cores' sums are as
// far off as a card's may be.
//
// A failure that the real driver reports by a bare code says more on standard error, and through
// standin_report. Three things are stricter than the real driver: memory and modules that queued
// work uses cannot be taken away (CUDA_ERROR_ILLEGAL_STATE); a warp collective may not name lanes
// that have ended; freed addresses are not given out again soon.
#pragma once

#include <cstdint>

extern "C" {

// Calls so far of the driver, NVRTC and cuBLAS, those for errors' names aside.
uint64_t standin_calls();

// The n-th call from now (1: the next) returns the code, a CUresult; n = 0: none does. NVRTC and
// cuBLAS translate it. A call that releases something does so all the same. Errors that ruin a
// context (700, 702, 710, 714 to 719) stay.
void standin_fail_at(int64_t n, int code);

// Bytes of device memory held, on all devices, without the contexts' own.
uint64_t standin_allocated();

// What is alive, in this order: streams, events, modules, graphs, executable graphs, contexts,
// bytes of pinned memory. The sum of all; counts may be null.
uint64_t standin_live_objects(uint64_t counts[7]);

// Ends the GPU process: the device is lost.
void standin_kill();

// The GPU process, or -1.
int standin_process();

// What the last crash or misuse was. Valid until the thread's next call.
const char* standin_report();

// Changes "delay_us", "seed" or "clock_rate" (kernels' clocks run so many times faster; else 1)
// from now on; false for other names.
bool standin_set(const char* name, uint64_t value);
}
