// Initialisation, devices, contexts.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "control.h"

namespace standin {
namespace {

uint64_t number(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

CUuuid uuid_of(int physical) {
    CUuuid uuid{};
    std::memcpy(uuid.bytes, "stand-in GPU 000", 16);
    uuid.bytes[15] = static_cast<unsigned char>(physical);
    return uuid;
}

std::string uuid_text(int physical) {
    const CUuuid uuid = uuid_of(physical);
    std::string text = "GPU-";
    for (int i = 0; i < 16; i++) {
        char two[3];
        std::snprintf(two, sizeof two, "%02x", uuid.bytes[i]);
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        text += two;
    }
    return text;
}

// As the driver reads it: up to the first word that names no device, or one named before.
std::vector<int> visible_devices(int n, const char* list) {
    std::vector<int> seen;
    if (!list) {
        for (int i = 0; i < n; i++)
            seen.push_back(i);
        return seen;
    }
    std::stringstream words(list);
    std::string word;
    while (std::getline(words, word, ',')) {
        int device = -1;
        word.erase(0, word.find_first_not_of(' '));
        if (word.rfind("GPU-", 0) == 0) {
            int matches = 0;
            for (int i = 0; i < n; i++) {
                if (uuid_text(i).rfind(word, 0) != 0) continue;
                device = i;
                matches++;
            }
            if (matches != 1) device = -1;
        } else if (!word.empty() && word.find_first_not_of("0123456789") == std::string::npos) {
            device = std::atoi(word.c_str());
        }
        if (device < 0 || device >= n) break;
        if (std::find(seen.begin(), seen.end(), device) != seen.end()) return {};
        seen.push_back(device);
    }
    return seen;
}

void read_settings(Settings& s) {
    s.capability = static_cast<int>(number("STANDIN_CAPABILITY", 90));
    s.n_devices = static_cast<int>(number("STANDIN_DEVICES", 1));
    s.driver_version = static_cast<int>(number("STANDIN_DRIVER_VERSION", 13000));
    s.memory = number("STANDIN_MEMORY", 1ull << 30);
    s.multiprocessors = number("STANDIN_MULTIPROCESSORS", 8);
    s.delay_us = number("STANDIN_DELAY_US", 0);
    s.seed = number("STANDIN_SEED", 0);
    s.watchdog_ms = number("STANDIN_WATCHDOG_MS", 120000);
}

void start_gpu(Driver& d) {
    if (d.gpu.started()) return;
    const auto n = static_cast<uint64_t>(d.settings.n_devices);
    // Room for freed addresses to stay unused for long, so that stale pointers fault.
    const uint64_t device_bytes = std::max<uint64_t>(64ull << 30, 8 * n * d.settings.memory);
    const uint64_t arena_bytes = std::max<uint64_t>(16ull << 30, 4 * n * d.settings.memory);
    d.gpu.start(device_bytes, arena_bytes);
    d.free_memory.ranges[d.gpu.device_base()] = device_bytes;
    d.free_arena.ranges[reinterpret_cast<uint64_t>(d.gpu.arena()) + control_bytes] =
        arena_bytes - control_bytes;
    for (uint32_t i = 0; i < max_streams; i++)
        d.free_slots.push_back(i);
    for (uint64_t i = 0; i < max_events; i++)
        d.free_events.push_back(max_events - 1 - i);
    d.configure_gpu();
}

int attribute(const Settings& s, int which) {
    const int c = s.capability;
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
            return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
            return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
            return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
            return 2147483647;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
            return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
            return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
            return default_shared;
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
            return 65536;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
            return 65536;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
            return 1000000;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            return static_cast<int>(s.multiprocessors);
        case CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT:
            return s.watchdog_ms < 10000;  // as a driver with a display has it
        case CU_DEVICE_ATTRIBUTE_INTEGRATED:
            return 0;
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
            return 1;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_MODE:
            return 0;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
            return 1;
        case CU_DEVICE_ATTRIBUTE_ECC_ENABLED:
            return 0;
        case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
            return 1;
        case CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID:
            return 0;
        case CU_DEVICE_ATTRIBUTE_TCC_DRIVER:
            return 0;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
            return 1000000;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
            return 256;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
            return 4 << 20;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
            return threads_per_multiprocessor(c);
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
            return 2;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
            return 1;
        case CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID:
            return 0;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            return c / 10;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            return c % 10;
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
            return 1;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            return shared_per_block_optin(c) + 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
            return 65536;
        case CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY:
            return 0;
        case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS:
            return 0;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS:
            return 0;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED:
            return 1;
        // Registered memory is seen elsewhere, so that a host pointer handed to a kernel shows up.
        case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
            return 0;
        case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_MEM_OPS_V1:
            return 0;
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
            return 1;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            return shared_per_block_optin(c);
        case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
            return 1;
        case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES:
            return 0;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
            return c == 75 || c == 86 || c == 87 ? 16 : c == 89 || c == 120 ? 24 : 32;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
            return c >= 80 ? 1024 : 0;
        case CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED:
            return 1;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
            return 0;
        case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH:
            return c >= 90;
        case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR:
            return 1;
        default:
            throw Failure{CUDA_ERROR_NOT_SUPPORTED};  // ask for it to be added here
    }
}

}  // namespace

int threads_per_multiprocessor(int capability) {
    if (capability < 80) return 1024;
    return capability == 86 || capability == 87 || capability == 89 || capability >= 120 ? 1536
                                                                                         : 2048;
}

int shared_per_block_optin(int capability) {
    switch (capability) {
        case 75:
            return 64 << 10;
        case 80:
        case 87:
            return 163 << 10;
        case 86:
        case 89:
        case 120:
        case 121:
            return 99 << 10;
        default:
            return 227 << 10;
    }
}

}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuInit(unsigned flags) {
    return api("cuInit", 0, [&](Driver& d, auto&) {
        require(flags == 0, CUDA_ERROR_INVALID_VALUE);
        // A forked child inherits memory but not the link to the GPU.
        require(!d.initialised || d.owner == getpid(), CUDA_ERROR_NOT_INITIALIZED);
        if (d.initialised) return CUDA_SUCCESS;
        read_settings(d.settings);
        d.visible = visible_devices(d.settings.n_devices, std::getenv("CUDA_VISIBLE_DEVICES"));
        require(!d.visible.empty(), CUDA_ERROR_NO_DEVICE);
        for (size_t i = 0; i < d.visible.size(); i++) {
            auto context = std::make_unique<Context>();
            context->device = static_cast<int>(i);
            d.contexts.push_back(std::move(context));
        }
        d.initialised = true;
        d.owner = getpid();
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDriverGetVersion(int* version) {
    return api("cuDriverGetVersion", 0, [&](Driver& d, auto&) {
        require(version, CUDA_ERROR_INVALID_VALUE);
        if (!d.initialised) read_settings(d.settings);  // it may be asked before cuInit
        *version = d.settings.driver_version;
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDeviceGetCount(int* count) {
    return api("cuDeviceGetCount", needs_init, [&](Driver& d, auto&) {
        require(count, CUDA_ERROR_INVALID_VALUE);
        *count = static_cast<int>(d.visible.size());
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    return api("cuDeviceGet", needs_init, [&](Driver& d, auto&) {
        require(device, CUDA_ERROR_INVALID_VALUE);
        *device = d.device_of(ordinal);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    return api("cuDeviceGetName", needs_init, [&](Driver& d, auto&) {
        require(name && length > 0, CUDA_ERROR_INVALID_VALUE);
        const int physical = d.visible[static_cast<size_t>(d.device_of(device))];
        std::snprintf(name, static_cast<size_t>(length), "Stand-in GPU %d", physical);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    return api("cuDeviceGetUuid_v2", needs_init, [&](Driver& d, auto&) {
        require(uuid, CUDA_ERROR_INVALID_VALUE);
        *uuid = uuid_of(d.visible[static_cast<size_t>(d.device_of(device))]);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDeviceGetAttribute(int* value, int which, CUdevice device) {
    return api("cuDeviceGetAttribute", needs_init, [&](Driver& d, auto&) {
        require(value && which > 0 && which < CU_DEVICE_ATTRIBUTE_MAX, CUDA_ERROR_INVALID_VALUE);
        d.device_of(device);
        *value = attribute(d.settings, which);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
    return api("cuDeviceTotalMem_v2", needs_init, [&](Driver& d, auto&) {
        require(bytes, CUDA_ERROR_INVALID_VALUE);
        d.device_of(device);
        *bytes = d.settings.memory;
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return api("cuDevicePrimaryCtxRetain", needs_init | needs_device, [&](Driver& d, auto&) {
        require(context, CUDA_ERROR_INVALID_VALUE);
        Context& c = *d.contexts[static_cast<size_t>(d.device_of(device))];
        if (c.references == 0) {
            require(d.settings.memory >= context_bytes, CUDA_ERROR_OUT_OF_MEMORY);
            start_gpu(d);
            c.legacy = std::make_unique<Stream>();
            c.legacy->context = &c;
            c.legacy->slot = d.take_slot();
            c.legacy->blocking = c.legacy->legacy = true;
        }
        c.references++;
        *context = reinterpret_cast<CUcontext>(&c);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return api("cuDevicePrimaryCtxRelease_v2", needs_init | releases, [&](Driver& d, auto& lock) {
        Context& c = *d.contexts[static_cast<size_t>(d.device_of(device))];
        require(c.references > 0, CUDA_ERROR_INVALID_CONTEXT);
        if (c.references > 1) {
            c.references--;
            return CUDA_SUCCESS;
        }
        const CUresult result = d.wait_all(lock, c);
        c.references = 0;
        d.destroy_context(c);
        return result;
    });
}

namespace {

Context* context_from(Driver& d, CUcontext handle) {
    if (!handle) return nullptr;
    for (const auto& context : d.contexts) {
        if (reinterpret_cast<CUcontext>(context.get()) != handle) continue;
        require(context->references > 0, CUDA_ERROR_CONTEXT_IS_DESTROYED);
        return context.get();
    }
    throw Failure{CUDA_ERROR_INVALID_CONTEXT};
}

}  // namespace

STANDIN_API CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return api("cuCtxPushCurrent_v2", needs_init, [&](Driver& d, auto&) {
        require(context, CUDA_ERROR_INVALID_CONTEXT);
        context_stack().push_back(context_from(d, context));
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    return api("cuCtxPopCurrent_v2", needs_init, [&](Driver&, auto&) {
        require(!context_stack().empty(), CUDA_ERROR_INVALID_CONTEXT);
        if (context) *context = reinterpret_cast<CUcontext>(context_stack().back());
        context_stack().pop_back();
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuCtxSetCurrent(CUcontext context) {
    return api("cuCtxSetCurrent", needs_init, [&](Driver& d, auto&) {
        Context* c = context_from(d, context);
        if (!context_stack().empty()) context_stack().pop_back();
        if (c) context_stack().push_back(c);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuCtxGetCurrent(CUcontext* context) {
    return api("cuCtxGetCurrent", needs_init, [&](Driver&, auto&) {
        require(context, CUDA_ERROR_INVALID_VALUE);
        *context =
            context_stack().empty() ? nullptr : reinterpret_cast<CUcontext>(context_stack().back());
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuCtxSynchronize() {
    return api("cuCtxSynchronize", everything | never_captured, [&](Driver& d, auto& lock) {
        require(!d.invalidate_captures(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        return d.wait_all(lock, d.current());
    });
}
