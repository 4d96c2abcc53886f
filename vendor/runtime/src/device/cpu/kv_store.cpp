#include "device/cpu/kv_store.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "kernels/attention.h"

namespace qi {

HostKvStore::~HostKvStore() {
    if (base_) munmap(base_, reserved_bytes_);
}

void HostKvStore::reserve(const KvLayout& layout, int64_t n_pages) {
    layout_ = layout;
    head_bytes_ = kernels::kv_head_bytes(layout.type, layout.head_dim);
    const size_t os_page = size_t(sysconf(_SC_PAGESIZE));
    size_t bytes = 0;
    bool overflow =
        __builtin_mul_overflow(head_bytes_, size_t(layout.n_layer * layout.n_head_kv), &bytes);
    // Whole pages of the operating system, so that a released page really goes back.
    overflow |= __builtin_add_overflow(bytes, os_page - 1, &bytes);
    page_bytes_ = bytes / os_page * os_page;
    overflow |= __builtin_mul_overflow(page_bytes_, size_t(n_pages), &reserved_bytes_);
    if (overflow)
        fail(QI_MEMORY, "%lld KV pages do not fit in the address space", (long long)n_pages);
    void* base = mmap(nullptr, reserved_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        const int reason = errno;
        reserved_bytes_ = 0;
        fail(QI_MEMORY,
             "no address space for %lld KV pages of %zu bytes: %s; ask for a smaller n_ctx",
             (long long)n_pages, page_bytes_, std::strerror(reason));
    }
    base_ = static_cast<std::byte*>(base);
}

void HostKvStore::release(int32_t page_id) {
    madvise(page(page_id), page_bytes_, MADV_DONTNEED);
}

}  // namespace qi
