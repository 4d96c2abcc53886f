// Finds the processor's instruction sets and picks the level of kernels to run.
#include "base/cpu.h"

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "base/cpu_limits.h"
#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace qi {

namespace {

constexpr Isa all_levels[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::neon};

struct Processor {
    std::string brand;
    std::string features;
    bool supported[std::size(all_levels)] = {true, false, false, false};
};

#if defined(__x86_64__)

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros when the processor does not know the leaf.
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// The register state the operating system saves; without it a feature bit means nothing.
uint64_t saved_state() {
    if (!(cpuid(1).ecx & bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

std::string read_brand() {
    if (cpuid(0x80000000).eax < 0x80000004) return "x86-64";
    char text[49] = {};
    for (unsigned i = 0; i < 3; ++i) {
        const Registers r = cpuid(0x80000002 + i);
        std::memcpy(text + 16 * i, &r, 16);
    }
    const std::string brand(text);
    const size_t first = brand.find_first_not_of(' ');
    if (first == std::string::npos) return "x86-64";
    return brand.substr(first, brand.find_last_not_of(' ') - first + 1);
}

Processor detect() {
    constexpr uint64_t sse_avx_state = 0x06, avx512_state = 0xe6;  // XCR0 bits 1-2 and 5-7
    const uint64_t state = saved_state();
    const bool avx_os = (state & sse_avx_state) == sse_avx_state;
    const bool avx512_os = (state & avx512_state) == avx512_state;
    const Registers base = cpuid(1), extended = cpuid(7), extended1 = cpuid(7, 1);

    Processor processor;
    processor.brand = read_brand();
    const auto note = [&](const char* name, unsigned reg, int bit, bool os) {
        const bool present = os && (reg >> bit & 1);
        if (present)
            processor.features += (processor.features.empty() ? "" : " ") + std::string(name);
        return present;
    };
    note("sse4_2", base.ecx, 20, true);
    note("avx", base.ecx, 28, avx_os);
    const bool f16c = note("f16c", base.ecx, 29, avx_os);
    const bool fma = note("fma", base.ecx, 12, avx_os);
    const bool avx2 = note("avx2", extended.ebx, 5, avx_os);
    const bool bmi2 = note("bmi2", extended.ebx, 8, true);
    note("avx_vnni", extended1.eax, 4, avx_os);
    const bool f = note("avx512f", extended.ebx, 16, avx512_os);
    const bool dq = note("avx512dq", extended.ebx, 17, avx512_os);
    const bool bw = note("avx512bw", extended.ebx, 30, avx512_os);
    const bool vl = note("avx512vl", extended.ebx, 31, avx512_os);
    const bool vbmi = note("avx512_vbmi", extended.ecx, 1, avx512_os);
    const bool vnni = note("avx512_vnni", extended.ecx, 11, avx512_os);
    note("avx512_bf16", extended1.eax, 5, avx512_os);

    const bool level_avx2 = avx2 && fma && f16c && bmi2;
    processor.supported[int(Isa::avx2)] = level_avx2;
    processor.supported[int(Isa::avx512)] = level_avx2 && f && dq && bw && vl && vbmi && vnni;
    return processor;
}

#elif defined(__aarch64__)

std::string read_brand() {
    // The board's name where firmware gives one, else the core's identification register.
    std::string text;
    std::ifstream model("/proc/device-tree/model");
    if (std::getline(model, text, '\0') && !text.empty()) return text;
    std::ifstream midr("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1");
    if (std::getline(midr, text)) return "aarch64, MIDR " + text;
    return "aarch64";
}

Processor detect() {
    const unsigned long caps = getauxval(AT_HWCAP), caps2 = getauxval(AT_HWCAP2);
    Processor processor;
    processor.brand = read_brand();
    const auto note = [&](const char* name, unsigned long word, int bit) {
        const bool present = word >> bit & 1;
        if (present)
            processor.features += (processor.features.empty() ? "" : " ") + std::string(name);
        return present;
    };
    // Bit numbers are the kernel's ABI (asm/hwcap.h); old headers lack the newer names.
    note("asimd", caps, 1);
    const bool half_scalar = note("fphp", caps, 9);
    const bool half_vector = note("asimdhp", caps, 10);
    const bool dotprod = note("asimddp", caps, 20);
    note("sve", caps, 22);
    note("i8mm", caps2, 13);
    note("bf16", caps2, 14);
    processor.supported[int(Isa::neon)] = half_scalar && half_vector && dotprod;
    return processor;
}

#endif

const Processor& processor() {
    static const Processor instance = detect();
    return instance;
}

Isa choose_isa() {
    const char* wanted = std::getenv("QINFER_ISA");
    if (!wanted || !*wanted) return best_isa();
    std::string possible;
    for (Isa isa : all_levels) {
        if (!isa_supported(isa)) continue;
        if (std::strcmp(wanted, isa_name(isa)) == 0) return isa;
        possible += (possible.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    fail(QI_ARGUMENT, "QINFER_ISA is '%s'; this machine can run %s", wanted, possible.c_str());
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return "portable";
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::neon:
            return "neon";
    }
    return "unknown";
}

bool isa_supported(Isa isa) {
    return processor().supported[int(isa)];
}

Isa best_isa() {
    Isa best = Isa::portable;
    for (Isa isa : all_levels)
        if (isa_supported(isa)) best = isa;
    return best;
}

Isa active_isa() {
    static const Isa isa = choose_isa();
    return isa;
}

const CpuInfo& cpu_info() {
    static const CpuInfo info = [] {
        const CpuLimits limits = read_cpu_limits("", affinity_mask());
        return CpuInfo{processor().brand, processor().features, limits.n_physical_cores,
                       limits.n_usable_cores};
    }();
    return info;
}

}  // namespace qi
