// Instruction-set levels, and core counts from made-up /proc and /sys trees.
#include "base/cpu.h"

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu_limits.h"
#include "base/error.h"
#include "kernel_checks.h"

using namespace qi;
using namespace qi::test;

namespace {

// A folder that stands for the root of a machine.
class Machine {
  public:
    Machine() {
        char pattern[] = "/tmp/cpu_test.XXXXXX";
        root_ = mkdtemp(pattern);
    }
    ~Machine() { std::filesystem::remove_all(root_); }
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;

    void write(const std::string& path, const std::string& text) {
        const std::filesystem::path file = root_ + path;
        std::filesystem::create_directories(file.parent_path());
        std::ofstream(file) << text << "\n";
    }
    // n_cores cores of two hardware threads, numbered as Linux does: n and n + n_cores.
    void write_cores(int n_cores) {
        write("/sys/devices/system/cpu/online", "0-" + std::to_string(2 * n_cores - 1));
        for (int cpu = 0; cpu < 2 * n_cores; ++cpu) {
            const int core = cpu % n_cores;
            write("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                      "/topology/thread_siblings_list",
                  std::to_string(core) + "," + std::to_string(core + n_cores));
        }
    }
    const std::string& root() const { return root_; }

  private:
    std::string root_;
};

void expect_limits(Checks& checks, const char* what, const Machine& machine,
                   const std::vector<int>& affinity, int n_physical, int n_usable) {
    const CpuLimits found = read_cpu_limits(machine.root(), affinity);
    checks.expect(found.n_physical_cores == n_physical && found.n_usable_cores == n_usable,
                  "%s: %d cores, %d usable, not %d and %d", what, found.n_physical_cores,
                  found.n_usable_cores, n_physical, n_usable);
}

std::vector<int> all_cpus(int n) {
    std::vector<int> cpus(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i)
        cpus[size_t(i)] = i;
    return cpus;
}

void test_topology(Checks& checks) {
    Machine machine;
    machine.write_cores(8);
    expect_limits(checks, "all of 8 cores", machine, all_cpus(16), 8, 8);
    expect_limits(checks, "one thread of 3 cores", machine, {0, 1, 2}, 8, 3);
    expect_limits(checks, "both threads of 2 cores", machine, {3, 11, 4, 12}, 8, 2);
    expect_limits(checks, "no mask", machine, {}, 8, 8);
    machine.write("/sys/devices/system/cpu/online", "0-1,5,12-13");
    expect_limits(checks, "cores 0, 1, 4, 5 online", machine, all_cpus(2), 4, 2);
    Machine bare;
    const int n = int(std::thread::hardware_concurrency());
    expect_limits(checks, "nothing to read", bare, {0}, n, 1);
}

void test_cgroup_v2(Checks& checks) {
    Machine machine;
    machine.write_cores(8);
    machine.write("/proc/self/cgroup", "0::/user.slice/job");
    machine.write("/proc/self/mountinfo",
                  "24 1 0:22 / /proc rw - proc proc rw\n"
                  "31 23 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw");
    const std::string job = "/sys/fs/cgroup/user.slice/job/cpu.max";
    machine.write(job, "max 100000");
    expect_limits(checks, "v2 without a limit", machine, all_cpus(16), 8, 8);
    machine.write(job, "250000 100000");
    expect_limits(checks, "v2, 2.5 cores", machine, all_cpus(16), 8, 3);
    machine.write(job, "5000 100000");
    expect_limits(checks, "v2, a twentieth", machine, all_cpus(16), 8, 1);
    machine.write(job, "1600000 100000");
    expect_limits(checks, "v2, more than there is", machine, all_cpus(16), 8, 8);
    machine.write("/sys/fs/cgroup/user.slice/cpu.max", "400000 100000");
    expect_limits(checks, "v2, the parent is tighter", machine, all_cpus(16), 8, 4);
    expect_limits(checks, "v2, the mask is tighter", machine, {0, 8, 1}, 8, 2);
    // A container: the host's path, and a mount that begins at the container's own group.
    machine.write("/proc/self/cgroup", "0::/docker/abc");
    machine.write("/proc/self/mountinfo",
                  "31 23 0:27 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw");
    machine.write("/sys/fs/cgroup/cpu.max", "200000 100000");
    expect_limits(checks, "v2 in a container", machine, all_cpus(16), 8, 2);
    machine.write("/proc/self/cgroup", "0::/");
    machine.write("/proc/self/mountinfo", "31 23 0:27 / /sys/fs/cgroup ro - cgroup2 cgroup rw");
    expect_limits(checks, "v2 in a namespace", machine, all_cpus(16), 8, 2);
    machine.write("/sys/fs/cgroup/cpu.max", "nonsense");
    expect_limits(checks, "v2, nonsense", machine, all_cpus(16), 8, 8);
}

void test_cgroup_v1(Checks& checks) {
    Machine machine;
    machine.write_cores(4);
    machine.write("/proc/self/cgroup", "4:memory:/box\n3:cpuset:/box\n2:cpu,cpuacct:/box\n0::/");
    machine.write("/proc/self/mountinfo",
                  "30 1 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
                  "32 1 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
                  "33 1 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw");
    const std::string box = "/sys/fs/cgroup/cpu/box/cpu.cfs_";
    machine.write(box + "quota_us", "-1");
    machine.write(box + "period_us", "100000");
    expect_limits(checks, "v1 without a limit", machine, all_cpus(8), 4, 4);
    machine.write(box + "quota_us", "150000");
    expect_limits(checks, "v1, 1.5 cores", machine, all_cpus(8), 4, 2);
}

void test_this_machine(Checks& checks) {
    const CpuInfo& info = cpu_info();
    checks.expect(info.n_usable_cores >= 1 && info.n_usable_cores <= info.n_physical_cores,
                  "%d usable of %d cores", info.n_usable_cores, info.n_physical_cores);
    checks.expect(!info.brand.empty() && !info.features.empty(), "brand '%s', features '%s'",
                  info.brand.c_str(), info.features.c_str());
    checks.expect(!affinity_mask().empty(), "an empty affinity mask");
    checks.expect(isa_supported(Isa::portable) && isa_supported(best_isa()), "levels");
    checks.expect(!isa_supported(Isa::neon) || best_isa() == Isa::neon, "neon is not the best");
    const double speed = measure_read_bandwidth(1, size_t(8) << 20);
    checks.expect(speed > 1e7 && speed < 1e13, "read bandwidth of %g bytes/s", speed);
    for (size_t n_bytes : {size_t(0), size_t(1000), SIZE_MAX}) {
        bool refused = false;
        try {
            measure_read_bandwidth(1, n_bytes);
        } catch (const Error& error) {
            refused = error.status() == QI_ARGUMENT;
        }
        checks.expect(refused, "bandwidth of %zu bytes is not refused", n_bytes);
    }
}

// active_isa() is settled once per process, so each setting gets a process.
void test_forced_level(Checks& checks) {
    const auto in_child = [&](const char* setting, auto test) {
        const pid_t child = fork();
        if (child == 0) {
            if (setting)
                setenv("QINFER_ISA", setting, 1);
            else
                unsetenv("QINFER_ISA");
            _exit(test() ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        checks.expect(status == 0, "QINFER_ISA=%s: status %#x", setting ? setting : "(unset)",
                      status);
    };
    in_child(nullptr, [] { return active_isa() == best_isa(); });
    in_child("", [] { return active_isa() == best_isa(); });
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon}) {
        if (isa_supported(isa)) {
            in_child(isa_name(isa), [isa] { return active_isa() == isa && active_isa() == isa; });
            continue;
        }
        in_child(isa_name(isa), [isa] {
            try {
                active_isa();
                return false;
            } catch (const Error& error) {
                const std::string text = error.what();
                return error.status() == QI_ARGUMENT && text.find(isa_name(isa)) != text.npos &&
                       text.find("portable") != text.npos;
            }
        });
    }
    in_child("avx9000", [] {
        for (int i = 0; i < 2; ++i) {
            try {
                active_isa();
                return false;
            } catch (const Error& error) {
                if (std::string(error.what()).find("avx9000") == std::string::npos) return false;
            }
        }
        return true;
    });
}

}  // namespace

int main() {
    Checks checks;
    test_forced_level(checks);
    test_topology(checks);
    test_cgroup_v2(checks);
    test_cgroup_v1(checks);
    test_this_machine(checks);
    return checks.status();
}
