#include "device/cpu/kv_store.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "kernels/attention.h"

namespace qi {

namespace {
constexpr size_t huge_page = size_t(2) << 20;

size_t round_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}
}  // namespace

HostKvStore::~HostKvStore() {
    if (mapped_) munmap(mapped_, mapped_bytes_);
}

void HostKvStore::reserve(const KvLayout& layout, int64_t n_pages) {
    layout_ = layout;
    head_bytes_ = kernels::kv_head_bytes(layout.type, layout.head_dim);
    const size_t os_page = size_t(sysconf(_SC_PAGESIZE));
    bool overflow = __builtin_mul_overflow(head_bytes_, size_t(layout.n_layer * layout.n_head_kv),
                                           &content_bytes_);
    // Whole pages of the operating system, so that a released page really goes back.
    overflow |= content_bytes_ > SIZE_MAX / 2;
    page_bytes_ = round_up(content_bytes_, os_page);
    overflow |= __builtin_mul_overflow(page_bytes_, size_t(n_pages), &reserved_bytes_);
    overflow |= reserved_bytes_ > SIZE_MAX / 2;
    if (overflow)
        fail(QI_MEMORY, "%lld KV pages do not fit in the address space", (long long)n_pages);
    if (reserved_bytes_ == 0) return;
    // A large page of keys and values fills whole huge pages of memory, which a decoding step then
    // reads with far fewer address translations; a small one would waste them.
    const bool huge = page_bytes_ >= huge_page;
    mapped_bytes_ = reserved_bytes_ + (huge ? huge_page : 0);
    void* base = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        const int reason = errno;
        mapped_bytes_ = 0;
        fail(QI_MEMORY,
             "no address space for %lld KV pages of %zu bytes: %s; ask for a smaller n_ctx",
             (long long)n_pages, page_bytes_, std::strerror(reason));
    }
    mapped_ = base;
    if (huge) {
        base = reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(base), huge_page));
        madvise(base, reserved_bytes_, MADV_HUGEPAGE);
    }
    base_ = static_cast<std::byte*>(base);
}

void HostKvStore::release(int32_t page_id) {
    if (page_bytes_ > 0) madvise(page(page_id), page_bytes_, MADV_DONTNEED);
}

}  // namespace qi
