// Device memory, pinned host memory, and copies between them.
#include <fcntl.h>
#include <sys/mman.h>
#include <algorithm>
#include <cstring>

#include "control.h"

namespace standin {
namespace {

uint64_t round_up(uint64_t n, uint64_t to) {
    return (n + to - 1) / to * to;
}
uint64_t to_number(const void* p) {
    return reinterpret_cast<uint64_t>(p);
}

// The next free range from the cursor on, and round again: what was freed is not used anew for
// long, so that a stale pointer meets no access.
uint64_t take(FreeRanges& free, uint64_t bytes) {
    auto carve = [&](auto range, uint64_t from) {
        const uint64_t start = range->first, end = start + range->second;
        free.ranges.erase(range);
        if (from > start) free.ranges[start] = from - start;
        if (end > from + bytes) free.ranges[from + bytes] = end - from - bytes;
        free.cursor = from + bytes;
        return from;
    };
    auto at = free.ranges.upper_bound(free.cursor);
    if (at != free.ranges.begin()) {
        auto around = std::prev(at);
        if (around->first + around->second >= free.cursor + bytes)
            return carve(around, free.cursor);
    }
    const size_t n = free.ranges.size();
    for (size_t i = 0; i < n; i++, ++at) {
        if (at == free.ranges.end()) at = free.ranges.begin();
        if (at->second >= bytes) return carve(at, at->first);
    }
    throw Failure{CUDA_ERROR_OUT_OF_MEMORY};
}

void give(FreeRanges& all, uint64_t start, uint64_t bytes) {
    std::map<uint64_t, uint64_t>& free = all.ranges;
    auto next = free.lower_bound(start);
    if (next != free.end() && start + bytes == next->first) {
        bytes += next->second;
        next = free.erase(next);
    }
    if (next != free.begin()) {
        auto previous = std::prev(next);
        if (previous->first + previous->second == start) {
            previous->second += bytes;
            return;
        }
    }
    free[start] = bytes;
}

// Pages with the allocation at their end, and one page that nobody may touch.
uint64_t device_pages(uint64_t bytes) {
    return round_up(round_up(bytes, allocation_alignment), page) + page;
}

constexpr uint64_t chunk = 1 << 20;  // of pageable memory, in one message

}  // namespace

std::map<uint64_t, Allocation>::iterator release_memory(Driver& d,
                                                        std::map<uint64_t, Allocation>::iterator it,
                                                        bool tell) {
    const Range range = {it->first, it->second.bytes};
    if (tell) d.gpu.send(Kind::release, 0, 0, {{&range, sizeof range}});
    give(d.free_memory, range.address / page * page, device_pages(range.bytes));
    d.allocated -= range.bytes;
    return d.memory.erase(it);
}

Allocation* Driver::find_device(uint64_t address, uint64_t bytes) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return nullptr;
    auto& [start, allocation] = *std::prev(after);
    const uint64_t offset = address - start;
    return offset <= allocation.bytes && bytes <= allocation.bytes - offset ? &allocation : nullptr;
}

Pinned* Driver::find_pinned(uint64_t address, uint64_t bytes) {
    auto after = pinned.upper_bound(address);
    if (after == pinned.begin()) return nullptr;
    auto& [start, range] = *std::prev(after);
    const uint64_t offset = address - start;
    return offset <= range.bytes && bytes <= range.bytes - offset ? &range : nullptr;
}

bool Driver::device_readable(uint64_t address, uint64_t bytes) {
    if (find_device(address, bytes)) return true;
    return std::any_of(pinned.begin(), pinned.end(), [&](const auto& item) {
        const uint64_t offset = address - item.second.arena;
        return offset <= item.second.bytes && bytes <= item.second.bytes - offset;
    });
}

// The caller is about to queue an operation on `stream` that uses what lies at `address`.
void Driver::note_use(Stream& stream, uint64_t address) {
    if (stream.capture) return;
    if (Allocation* allocation = find_device(address, 0)) {
        allocation->uses[stream.slot] = last[stream.slot] + 1;
    } else {
        for (auto& [host, range] : pinned) {
            if (address - range.arena < range.bytes)
                range.uses[stream.slot] = last[stream.slot] + 1;
        }
    }
}

uint64_t Driver::allocated_on(const Context& context) const {
    uint64_t bytes = 0;
    for (const auto& [address, allocation] : memory) {
        if (allocation.context == &context) bytes += allocation.bytes;
    }
    return bytes;
}

uint64_t Driver::free_on(const Context& context) const {
    uint64_t taken = context_bytes + allocated_on(context) + products.size() * product_bytes;
    for (const auto& [handle, module] : modules)
        if (module->context == &context) taken += module->functions.size() * kernel_bytes;
    for (const auto& [handle, graph] : executables)
        if (graph->context == &context) taken += graph->nodes.size() * node_bytes;
    return settings.memory - std::min(settings.memory, taken);
}

void Driver::require_free(uint64_t bytes) const {
    require(bytes <= free_on(*context_stack().back()), CUDA_ERROR_OUT_OF_MEMORY);
}

uint64_t Driver::allocate(uint64_t bytes) {
    Context& context = current();
    require_free(bytes);
    const uint64_t pages = device_pages(bytes);
    const uint64_t start = take(free_memory, pages);
    // It ends at the last page, as nearly as its alignment allows.
    const uint64_t address = start + pages - page - round_up(bytes, allocation_alignment);
    const Range range = {address, bytes};
    gpu.send(Kind::allocate, 0, 0, {{&range, sizeof range}});
    memory[address] = {&context, bytes, {}};
    allocated += bytes;
    return address;
}

uint64_t Driver::take_arena(uint64_t bytes) {
    const Range range = {take(free_arena, round_up(bytes, page) + page), round_up(bytes, page)};
    gpu.send(Kind::open, 0, 0, {{&range, sizeof range}});
    mprotect(reinterpret_cast<void*>(range.address), range.bytes, PROT_READ | PROT_WRITE);
    return range.address;
}

void Driver::give_arena(uint64_t start, uint64_t bytes) {
    const Range range = {start, round_up(bytes, page)};
    mprotect(reinterpret_cast<void*>(start), range.bytes, PROT_NONE);
    fallocate(gpu.arena_file(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
              static_cast<off_t>(start - to_number(gpu.arena())), static_cast<off_t>(range.bytes));
    give(free_arena, start, range.bytes + page);
    if (gpu.error() == CUDA_SUCCESS) gpu.send(Kind::close, 0, 0, {{&range, sizeof range}});
}

namespace {

// A host range as the GPU process sees it: pinned memory, or nothing.
struct HostRange {
    Pinned* pinned;
    uint64_t arena;
};

HostRange host_range(Driver& d, const void* host, uint64_t bytes) {
    const uint64_t address = to_number(host);
    Pinned* range = d.find_pinned(address, bytes);
    if (!range) {
        // Half in, half out of pinned memory is no range at all.
        require(!d.find_pinned(address, 0) ||
                    d.find_pinned(address, 0)->bytes ==
                        address - std::prev(d.pinned.upper_bound(address))->first,
                CUDA_ERROR_INVALID_VALUE);
        return {nullptr, 0};
    }
    const uint64_t start = std::prev(d.pinned.upper_bound(address))->first;
    return {range, range->arena + (address - start)};
}

void require_host_pointer(Driver& d, const void* host) {
    const uint64_t address = to_number(host);
    require(host && !(address >= d.gpu.device_base() &&
                      address < d.gpu.device_base() + d.gpu.device_bytes()),
            CUDA_ERROR_INVALID_VALUE);
}

CUresult copy_in(Driver& d, std::unique_lock<std::mutex>& lock, Stream& stream, uint64_t to,
                 const void* from, uint64_t bytes, bool wait) {
    if (bytes == 0) return CUDA_SUCCESS;
    require_host_pointer(d, from);
    require(d.find_device(to, bytes), CUDA_ERROR_INVALID_VALUE);
    const HostRange host = host_range(d, from, bytes);
    d.copies_to_device += !stream.capture;
    if (host.pinned) {
        d.note_use(stream, to);
        d.note_use(stream, host.arena);
        const Copy copy = {to, host.arena, bytes};
        d.submit(stream, Kind::copy, {{&copy, sizeof copy}});
    } else {
        // A graph would read memory that may be gone when it is launched.
        if (stream.capture) {
            d.invalidate(*stream.capture);
            throw Failure{CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED};
        }
        // Staged: the caller may change it as soon as the call returns.
        const auto* at = static_cast<const std::byte*>(from);
        for (uint64_t done = 0; done < bytes; done += chunk) {
            const uint64_t address = to + done;
            d.note_use(stream, to);
            d.submit(stream, Kind::write,
                     {{&address, sizeof address}, {at + done, std::min(chunk, bytes - done)}});
        }
    }
    return wait ? d.wait(lock, stream.slot) : CUDA_SUCCESS;
}

CUresult copy_out(Driver& d, std::unique_lock<std::mutex>& lock, Stream& stream, void* to,
                  uint64_t from, uint64_t bytes, bool wait) {
    if (bytes == 0) return CUDA_SUCCESS;
    require_host_pointer(d, to);
    require(d.find_device(from, bytes), CUDA_ERROR_INVALID_VALUE);
    const HostRange host = host_range(d, to, bytes);
    d.note_use(stream, from);
    if (!stream.capture) d.copied_to_host += bytes;
    if (host.pinned) {
        d.note_use(stream, host.arena);
        const Copy copy = {host.arena, from, bytes};
        d.submit(stream, Kind::copy, {{&copy, sizeof copy}});
        return wait ? d.wait(lock, stream.slot) : CUDA_SUCCESS;
    }
    if (stream.capture) {
        d.invalidate(*stream.capture);
        throw Failure{CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED};
    }
    // To pageable memory every copy is synchronous, as the hardware's are.
    const uint64_t staging = d.take_arena(bytes);
    const Copy copy = {staging, from, bytes};
    CUresult result;
    try {
        d.submit(stream, Kind::copy, {{&copy, sizeof copy}});
        result = d.wait(lock, stream.slot);
    } catch (const Failure& failure) {
        result = failure.code;
    }
    if (result == CUDA_SUCCESS) std::memcpy(to, reinterpret_cast<void*>(staging), bytes);
    d.give_arena(staging, bytes);
    return result;
}

void fill(Driver& d, CUstream handle, uint64_t to, uint32_t value, uint64_t count, uint32_t width) {
    Stream& stream = d.stream(handle);
    if (count == 0) return;
    require(to % width == 0 && count <= d.settings.memory, CUDA_ERROR_INVALID_VALUE);
    require(d.find_device(to, count * width), CUDA_ERROR_INVALID_VALUE);
    d.note_use(stream, to);
    const Fill fill = {to, count, value, width};
    d.submit(stream, Kind::fill, {{&fill, sizeof fill}});
}

}  // namespace
}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    return api("cuMemGetInfo_v2", everything, [&](Driver& d, auto&) {
        require(free && total, CUDA_ERROR_INVALID_VALUE);
        *total = d.settings.memory;
        *free = d.free_on(d.current());
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
    return api("cuMemAlloc_v2", everything | never_captured, [&](Driver& d, auto&) {
        require(pointer && bytes != 0, CUDA_ERROR_INVALID_VALUE);
        *pointer = d.allocate(bytes);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemFree_v2(CUdeviceptr pointer) {
    return api("cuMemFree_v2", everything | never_captured | releases, [&](Driver& d, auto&) {
        if (pointer == 0) return CUDA_SUCCESS;
        auto found = d.memory.find(pointer);
        require(found != d.memory.end(), CUDA_ERROR_INVALID_VALUE);
        if (d.pending(found->second.uses))
            return d.complain(CUDA_ERROR_ILLEGAL_STATE,
                              "cuMemFree of memory that queued work still uses");
        release_memory(d, found, true);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    return api("cuMemHostAlloc", everything | never_captured, [&](Driver& d, auto&) {
        require(pointer && bytes != 0 && flags < 8, CUDA_ERROR_INVALID_VALUE);
        const uint64_t address = d.take_arena(bytes);
        // It ends at the guard page, as nearly as its alignment allows.
        const uint64_t host =
            address + round_up(bytes, page) - round_up(bytes, allocation_alignment);
        // The rest of a large one stays untaken, and reads as 0.
        std::memset(reinterpret_cast<void*>(host), 0xff, std::min<size_t>(bytes, 64 << 20));
        d.pinned[host] = {bytes, host, round_up(bytes, page), address, false, {}};
        d.pinned_bytes += bytes;
        *pointer = reinterpret_cast<void*>(host);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemFreeHost(void* pointer) {
    return api("cuMemFreeHost", everything | never_captured | releases, [&](Driver& d, auto&) {
        auto found = d.pinned.find(to_number(pointer));
        require(found != d.pinned.end() && !found->second.registered, CUDA_ERROR_INVALID_VALUE);
        if (d.pending(found->second.uses))
            return d.complain(CUDA_ERROR_ILLEGAL_STATE,
                              "cuMemFreeHost of memory that queued work still uses");
        d.give_arena(found->second.arena_start, found->second.arena_bytes);
        d.pinned_bytes -= found->second.bytes;
        d.pinned.erase(found);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* device, void* host, unsigned flags) {
    return api("cuMemHostGetDevicePointer_v2", everything, [&](Driver& d, auto&) {
        require(device && flags == 0, CUDA_ERROR_INVALID_VALUE);
        require(d.find_pinned(to_number(host), 1), CUDA_ERROR_INVALID_VALUE);
        *device = host_range(d, host, 1).arena;
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return api("cuMemcpyHtoD_v2", everything | never_captured, [&](Driver& d, auto& lock) {
        return copy_in(d, lock, d.stream(nullptr), to, from, bytes, true);
    });
}

STANDIN_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return api("cuMemcpyDtoH_v2", everything | never_captured, [&](Driver& d, auto& lock) {
        return copy_out(d, lock, d.stream(nullptr), to, from, bytes, true);
    });
}

STANDIN_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes,
                                          CUstream stream) {
    return api("cuMemcpyHtoDAsync_v2", everything, [&](Driver& d, auto& lock) {
        return copy_in(d, lock, d.stream(stream), to, from, bytes, false);
    });
}

STANDIN_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes,
                                          CUstream stream) {
    return api("cuMemcpyDtoHAsync_v2", everything, [&](Driver& d, auto& lock) {
        return copy_out(d, lock, d.stream(stream), to, from, bytes, false);
    });
}

STANDIN_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes,
                                          CUstream handle) {
    return api("cuMemcpyDtoDAsync_v2", everything, [&](Driver& d, auto&) {
        Stream& stream = d.stream(handle);
        if (bytes == 0) return CUDA_SUCCESS;
        require(d.find_device(to, bytes) && d.find_device(from, bytes), CUDA_ERROR_INVALID_VALUE);
        d.note_use(stream, to);
        d.note_use(stream, from);
        const Copy copy = {to, from, bytes};
        d.submit(stream, Kind::copy, {{&copy, sizeof copy}});
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t n,
                                     CUstream stream) {
    return api("cuMemsetD8Async", everything, [&](Driver& d, auto&) {
        fill(d, stream, to, value, n, 1);
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t n, CUstream stream) {
    return api("cuMemsetD32Async", everything, [&](Driver& d, auto&) {
        fill(d, stream, to, value, n, 4);
        return CUDA_SUCCESS;
    });
}
