// What the processor can do, and which kernels may run on it.
#pragma once

#include <cstddef>
#include <string>

namespace qi {

// Levels of kernels, lowest first within an architecture.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, neon = 3 };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);  // by this machine and operating system (cpuid and xgetbv, or hwcaps)
Isa best_isa();

// The level in use: QINFER_ISA if set (an unknown or unsupported value throws QI_ARGUMENT), else
// the best.
Isa active_isa();

struct CpuInfo {
    std::string brand;
    std::string features;  // space-separated
    int n_physical_cores;  // all of the machine's
    int n_usable_cores;    // after the affinity mask and the cgroup's quota, at least 1
};
const CpuInfo& cpu_info();

// Median of several passes of a plain read loop over n_bytes of private memory, in bytes per
// second.
double measure_read_bandwidth(int n_threads, size_t n_bytes);

}  // namespace qi
