// How many cores this process may use, as the kernel's /proc and /sys describe it.
#pragma once

#include <string>
#include <vector>

namespace qi {

struct CpuLimits {
    int n_physical_cores;  // online, of the whole machine
    int n_usable_cores;    // those in the affinity mask, at most the cgroup's quota rounded up
};

// `root` precedes /proc and /sys ("" for the machine itself), `affinity` lists the CPUs this
// process may run on.
CpuLimits read_cpu_limits(const std::string& root, const std::vector<int>& affinity);

// The calling thread's affinity mask; empty when the kernel does not say.
std::vector<int> affinity_mask();

}  // namespace qi
