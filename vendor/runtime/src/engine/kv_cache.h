// Which page of the devices' key/value memory holds which positions of which sequence. Every device
// keeps its own layers' part of a page.
//
// Pages are shared by reference count: a fork copies no data, and a page about to be written while
// shared is copied first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/stage.h"

namespace qi {

class KvCache {
  public:
    // layout: of all layers together.
    KvCache(std::span<const Stage> stages, const KvLayout& layout, int64_t n_seq, int64_t n_ctx);

    // Pages that n_seq sequences of n_ctx positions take; QI_ARGUMENT when they are too many.
    static int64_t n_pages(int64_t n_seq, int64_t n_ctx);

    int64_t n_seq() const { return int64_t(sequences_.size()); }
    int64_t n_ctx() const { return n_ctx_; }
    int64_t length(int64_t seq) const { return sequences_[size_t(seq)].length; }
    const int32_t* pages(int64_t seq) const { return sequences_[size_t(seq)].pages.data(); }

    // Makes room for n more positions of a sequence, its own to write, and counts them in.
    // QI_CONTEXT_FULL when they do not fit in n_ctx.
    void extend(int64_t seq, int64_t n);
    // Drops positions from n_keep on; pages no longer needed go back at once.
    void truncate(int64_t seq, int64_t n_keep);
    // Makes `target` the first n_keep positions of `source`.
    void fork(int64_t source, int64_t target, int64_t n_keep);

    size_t page_bytes() const;     // of memory, on all devices together
    size_t content_bytes() const;  // of a page's contents
    uint64_t bytes_used() const { return uint64_t(n_used_) * page_bytes(); }
    uint64_t bytes_reserved() const { return uint64_t(owners_.size()) * page_bytes(); }
    // The p-th page of a sequence, layer by layer.
    void read_page(int64_t seq, int64_t p, std::byte* out) const;
    void write_page(int64_t seq, int64_t p, const std::byte* data);

  private:
    struct Sequence {
        std::vector<int32_t> pages;
        int64_t length = 0;
    };
    int32_t take_page();
    void drop_page(int32_t page);

    struct Part {
        Device* device;
        size_t content_bytes;  // of a page
    };
    std::vector<Part> parts_;
    int64_t n_ctx_;
    std::vector<Sequence> sequences_;
    std::vector<int32_t> owners_;  // by page: how many sequences hold it
    std::vector<int32_t> free_;    // pages given back, used before fresh ones
    int32_t n_fresh_ = 0;          // pages ever taken
    int64_t n_used_ = 0;
};

}  // namespace qi
