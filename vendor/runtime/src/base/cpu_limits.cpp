// Counts cores from sysfs topology, the affinity mask and the CPU quotas of cgroup v1 and v2.
#include "base/cpu_limits.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <thread>

namespace qi {

namespace {

std::optional<std::string> first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    if (!std::getline(file, line)) return std::nullopt;
    return line;
}

// "0-3,8" as {0, 1, 2, 3, 8}.
std::vector<int> parse_cpu_list(const std::string& text) {
    std::vector<int> cpus;
    std::istringstream ranges(text);
    for (std::string range; std::getline(ranges, range, ',');) {
        const size_t dash = range.find('-');
        const int first = std::atoi(range.c_str());
        const int last = dash == std::string::npos ? first : std::atoi(range.c_str() + dash + 1);
        for (int cpu = first; cpu <= last; ++cpu)
            cpus.push_back(cpu);
    }
    return cpus;
}

// Hardware threads of one core name the same list of siblings.
int count_cores(const std::string& root, const std::vector<int>& cpus) {
    std::set<std::string> cores;
    for (int cpu : cpus) {
        const std::string id = std::to_string(cpu);
        cores.insert(
            first_line(root + "/sys/devices/system/cpu/cpu" + id + "/topology/thread_siblings_list")
                .value_or(id));
    }
    return int(cores.size());
}

// Whether the comma-separated `list` has `item`.
bool has_item(const std::string& list, const std::string& item) {
    return ("," + list + ",").find("," + item + ",") != std::string::npos;
}

// CPUs' worth of time that one cgroup directory's controller files allow; nothing: no limit.
std::optional<double> quota_in(const std::string& directory, bool is_v2) {
    double quota = 0.0, period = 0.0;
    if (is_v2) {
        std::istringstream fields(first_line(directory + "/cpu.max").value_or("max"));
        if (!(fields >> quota >> period)) return std::nullopt;  // "max 100000"
    } else {
        quota = std::atof(first_line(directory + "/cpu.cfs_quota_us").value_or("-1").c_str());
        period = std::atof(first_line(directory + "/cpu.cfs_period_us").value_or("0").c_str());
    }
    if (quota <= 0.0 || period <= 0.0) return std::nullopt;
    return quota / period;
}

// This process's cgroup in the hierarchy that controls CPU time; nothing when it is in none.
std::optional<std::string> cgroup_path(const std::string& root, bool is_v2) {
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // hierarchy:controllers:path
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        if (is_v2 ? controllers.empty() : has_item(controllers, "cpu"))
            return line.substr(second + 1);
    }
    return std::nullopt;
}

struct Mount {
    std::string root;   // the part of the hierarchy that is mounted
    std::string point;  // where
};

std::optional<Mount> cgroup_mount(const std::string& root, bool is_v2) {
    std::ifstream file(root + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        const size_t separator = line.find(" - ");
        if (separator == std::string::npos) continue;
        std::istringstream left(line), right(line.substr(separator + 3));
        std::string id, parent, device, type, source, options;
        Mount mount;
        left >> id >> parent >> device >> mount.root >> mount.point;
        right >> type >> source >> options;
        if (is_v2 ? type == "cgroup2" : type == "cgroup" && has_item(options, "cpu")) return mount;
    }
    return std::nullopt;
}

// The tightest limit between this process's cgroup and the top of what is mounted.
std::optional<double> cgroup_quota(const std::string& root, bool is_v2) {
    const auto mount = cgroup_mount(root, is_v2);
    auto path = cgroup_path(root, is_v2);
    if (!mount || !path) return std::nullopt;
    // A container may see the host's path beside a mount that starts at its own cgroup.
    if (mount->root != "/" && path->compare(0, mount->root.size(), mount->root) == 0)
        path->erase(0, mount->root.size());
    std::optional<double> tightest;
    for (;;) {
        if (const auto quota = quota_in(root + mount->point + *path, is_v2))
            tightest = std::min(tightest.value_or(*quota), *quota);
        const size_t slash = path->rfind('/');
        if (slash == std::string::npos) break;
        path->erase(slash);
    }
    return tightest;
}

}  // namespace

std::vector<int> affinity_mask() {
    // The kernel refuses a mask smaller than its own, so grow until it fits.
    for (int n_cpus = 1024; n_cpus <= 1 << 20; n_cpus *= 2) {
        cpu_set_t* mask = CPU_ALLOC(n_cpus);
        const size_t n_bytes = CPU_ALLOC_SIZE(n_cpus);
        std::vector<int> cpus;
        if (mask && sched_getaffinity(0, n_bytes, mask) == 0)
            for (int cpu = 0; cpu < n_cpus; ++cpu)
                if (CPU_ISSET_S(cpu, n_bytes, mask)) cpus.push_back(cpu);
        CPU_FREE(mask);
        if (!cpus.empty()) return cpus;
    }
    return {};
}

CpuLimits read_cpu_limits(const std::string& root, const std::vector<int>& affinity) {
    const auto online = first_line(root + "/sys/devices/system/cpu/online");
    CpuLimits limits;
    limits.n_physical_cores = online ? count_cores(root, parse_cpu_list(*online))
                                     : int(std::thread::hardware_concurrency());
    limits.n_physical_cores = std::max(limits.n_physical_cores, 1);
    limits.n_usable_cores = limits.n_physical_cores;
    if (!affinity.empty())
        limits.n_usable_cores = std::min(limits.n_usable_cores, count_cores(root, affinity));
    for (bool is_v2 : {false, true})
        if (const auto quota = cgroup_quota(root, is_v2))
            limits.n_usable_cores = std::min(limits.n_usable_cores, int(std::ceil(*quota)));
    limits.n_usable_cores = std::max(limits.n_usable_cores, 1);
    return limits;
}

}  // namespace qi
