#include "engine/kv_cache.h"

#include <algorithm>

#include "base/error.h"
#include "kernels/attention.h"

namespace qi {

namespace {
int64_t pages_for(int64_t n_positions) {
    return (n_positions + kernels::page_size - 1) / kernels::page_size;
}
}  // namespace

KvCache::KvCache(std::span<const Stage> stages, const KvLayout& layout, int64_t n_seq,
                 int64_t n_ctx)
    : n_ctx_(n_ctx), sequences_(size_t(n_seq)) {
    const int64_t n_pages = KvCache::n_pages(n_seq, n_ctx);
    for (const Stage& stage : stages) {
        KvLayout part = layout;
        part.n_layer = stage.end_layer - stage.first_layer;
        stage.device->reserve_kv(part, n_pages);
        parts_.push_back({stage.device, size_t(part.n_layer * part.n_head_kv) *
                                            kernels::kv_head_bytes(part.type, part.head_dim)});
    }
    owners_.resize(size_t(n_pages));
}

int64_t KvCache::n_pages(int64_t n_seq, int64_t n_ctx) {
    int64_t n = 0;
    // Page numbers are 32-bit, and every page costs a counter.
    if (__builtin_mul_overflow(n_seq, pages_for(n_ctx), &n) || n > INT32_MAX / 2)
        fail(QI_ARGUMENT, "%lld sequences of %lld positions are more than a context can hold",
             (long long)n_seq, (long long)n_ctx);
    return n;
}

size_t KvCache::page_bytes() const {
    size_t bytes = 0;
    for (const Part& part : parts_)
        bytes += part.device->kv_page_bytes();
    return bytes;
}

size_t KvCache::content_bytes() const {
    size_t bytes = 0;
    for (const Part& part : parts_)
        bytes += part.content_bytes;
    return bytes;
}

void KvCache::read_page(int64_t seq, int64_t p, std::byte* out) const {
    for (const Part& part : parts_) {
        part.device->read_kv_page(sequences_[size_t(seq)].pages[size_t(p)], out);
        out += part.content_bytes;
    }
}

void KvCache::write_page(int64_t seq, int64_t p, const std::byte* data) {
    for (const Part& part : parts_) {
        part.device->write_kv_page(sequences_[size_t(seq)].pages[size_t(p)], data);
        data += part.content_bytes;
    }
}

int32_t KvCache::take_page() {
    // Never exhausted: the pool holds n_ctx positions for every sequence, and sharing only saves.
    int32_t page;
    if (free_.empty()) {
        page = n_fresh_++;
    } else {
        page = free_.back();
        free_.pop_back();
    }
    owners_[size_t(page)] = 1;
    ++n_used_;
    return page;
}

void KvCache::drop_page(int32_t page) {
    if (--owners_[size_t(page)] > 0) return;
    for (const Part& part : parts_)
        part.device->release_kv_page(page);
    free_.push_back(page);
    --n_used_;
}

void KvCache::extend(int64_t seq, int64_t n) {
    Sequence& s = sequences_[size_t(seq)];
    if (n > n_ctx_ - s.length)
        fail(QI_CONTEXT_FULL,
             "%lld more tokens do not fit: the sequence holds %lld of the context's %lld positions",
             (long long)n, (long long)s.length, (long long)n_ctx_);
    s.pages.reserve(size_t(pages_for(s.length + n)));
    free_.reserve(owners_.size());
    const bool writes_into_last = n > 0 && s.length % kernels::page_size != 0;
    if (writes_into_last && owners_[size_t(s.pages.back())] > 1) {
        const int32_t own = take_page();
        try {
            for (const Part& part : parts_)
                part.device->copy_kv_page(s.pages.back(), own);
        } catch (...) {
            drop_page(own);
            throw;
        }
        drop_page(s.pages.back());
        s.pages.back() = own;
    }
    s.length += n;
    while (int64_t(s.pages.size()) < pages_for(s.length))
        s.pages.push_back(take_page());
}

void KvCache::truncate(int64_t seq, int64_t n_keep) {
    Sequence& s = sequences_[size_t(seq)];
    s.length = n_keep;
    while (int64_t(s.pages.size()) > pages_for(n_keep)) {
        drop_page(s.pages.back());
        s.pages.pop_back();
    }
}

void KvCache::fork(int64_t source, int64_t target, int64_t n_keep) {
    if (source == target) return truncate(target, n_keep);
    std::vector<int32_t> pages(sequences_[size_t(source)].pages.begin(),
                               sequences_[size_t(source)].pages.begin() + pages_for(n_keep));
    truncate(target, 0);
    for (int32_t page : pages)
        ++owners_[size_t(page)];
    sequences_[size_t(target)] = {std::move(pages), n_keep};
}

}  // namespace qi
