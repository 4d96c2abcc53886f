// Memory of the host made pinned in place: its pages become a part of the arena, which the GPU
// process sees at another address.
#include <sys/mman.h>
#include <cinttypes>
#include <cstdio>

#include "control.h"

namespace standin {
namespace {

struct Pages {
    uint64_t start, bytes;
};

Pages pages_of(uint64_t address, uint64_t bytes) {
    const uint64_t start = address / page * page;
    return {start, (address + bytes + page - 1) / page * page - start};
}

// PROT_* that all of the pages have; -1 if some are not mapped.
int protection_of(const Pages& pages) {
    std::FILE* maps = std::fopen("/proc/self/maps", "r");
    if (!maps) return -1;
    uint64_t reached = pages.start;
    int protection = PROT_READ | PROT_WRITE;
    char line[512];
    while (std::fgets(line, sizeof line, maps)) {
        uint64_t from, to;
        char rights[5];
        if (std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &from, &to, rights) != 3) continue;
        if (to <= reached || from > reached) continue;
        if (rights[0] != 'r') protection &= ~PROT_READ;
        if (rights[1] != 'w') protection &= ~PROT_WRITE;
        reached = to;
        if (reached >= pages.start + pages.bytes) break;
    }
    std::fclose(maps);
    return reached >= pages.start + pages.bytes ? protection : -1;
}

// Whole pages, whatever else lies on them: not what a sanitizer would let memcpy() read.
__attribute__((no_sanitize("address"))) void copy_pages(uint64_t to, uint64_t from,
                                                        uint64_t bytes) {
    const auto* in = reinterpret_cast<const volatile uint64_t*>(from);
    auto* out = reinterpret_cast<volatile uint64_t*>(to);
    for (uint64_t i = 0; i < bytes / 8; i++)
        out[i] = in[i];
}

}  // namespace
}  // namespace standin

using namespace standin;

STANDIN_API CUresult cuMemHostRegister_v2(void* host, size_t bytes, unsigned flags) {
    return api("cuMemHostRegister_v2", everything | never_captured, [&](Driver& d, auto&) {
        require(host && bytes != 0 && flags < 16, CUDA_ERROR_INVALID_VALUE);
        const auto address = reinterpret_cast<uint64_t>(host);
        const Pages pages = pages_of(address, bytes);
        for (const auto& [other, range] : d.pinned) {
            const Pages taken = pages_of(other, range.bytes);
            require(taken.start + taken.bytes <= pages.start ||
                        pages.start + pages.bytes <= taken.start,
                    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
        }
        const int protection = protection_of(pages);
        require(protection >= 0 && (protection & PROT_READ), CUDA_ERROR_INVALID_VALUE);
        require((protection & PROT_WRITE) || (flags & CU_MEMHOSTREGISTER_READ_ONLY),
                CUDA_ERROR_INVALID_VALUE);
        const uint64_t arena = d.take_arena(pages.bytes);
        copy_pages(arena, pages.start, pages.bytes);
        const auto offset = static_cast<off_t>(arena - reinterpret_cast<uint64_t>(d.gpu.arena()));
        if (mmap(reinterpret_cast<void*>(pages.start), pages.bytes, protection,
                 MAP_SHARED | MAP_FIXED, d.gpu.arena_file(), offset) == MAP_FAILED) {
            d.give_arena(arena, pages.bytes);
            return CUDA_ERROR_OPERATING_SYSTEM;
        }
        d.pinned[address] = {bytes, arena + (address - pages.start), pages.bytes, arena, true, {}};
        d.pinned_bytes += bytes;
        return CUDA_SUCCESS;
    });
}

STANDIN_API CUresult cuMemHostUnregister(void* host) {
    return api(
        "cuMemHostUnregister", everything | never_captured | releases, [&](Driver& d, auto&) {
            const auto address = reinterpret_cast<uint64_t>(host);
            auto found = d.pinned.find(address);
            require(found != d.pinned.end() && found->second.registered,
                    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
            if (d.pending(found->second.uses))
                return d.complain(CUDA_ERROR_ILLEGAL_STATE,
                                  "cuMemHostUnregister of memory that queued work still uses");
            const Pages pages = pages_of(address, found->second.bytes);
            const int protection = protection_of(pages);
            auto* at = reinterpret_cast<void*>(pages.start);
            if (mmap(at, pages.bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
                return CUDA_ERROR_OPERATING_SYSTEM;
            copy_pages(pages.start, found->second.arena_start, pages.bytes);
            mprotect(at, pages.bytes, protection);
            d.give_arena(found->second.arena_start, found->second.arena_bytes);
            d.pinned_bytes -= found->second.bytes;
            d.pinned.erase(found);
            return CUDA_SUCCESS;
        });
}
