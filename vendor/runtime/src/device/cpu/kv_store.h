// Pages of keys and values in host memory: one reservation of address space, filled as it is
// written.
//
// A page holds page_size positions of every layer and KV head: [n_layer][n_head_kv][kv_head_bytes].
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/device.h"

namespace qi {

class HostKvStore {
  public:
    HostKvStore() = default;
    ~HostKvStore();
    HostKvStore(const HostKvStore&) = delete;
    HostKvStore& operator=(const HostKvStore&) = delete;

    void reserve(const KvLayout& layout, int64_t n_pages);
    const KvLayout& layout() const { return layout_; }
    size_t page_bytes() const { return page_bytes_; }        // of memory
    size_t content_bytes() const { return content_bytes_; }  // of these, what is used
    std::byte* page(int32_t page) const { return base_ + size_t(page) * page_bytes_; }
    std::byte* head(int32_t page_id, int64_t layer, int64_t head) const {
        return page(page_id) + size_t(layer * layout_.n_head_kv + head) * head_bytes_;
    }
    void release(int32_t page);

  private:
    KvLayout layout_;
    size_t head_bytes_ = 0;
    size_t content_bytes_ = 0;
    size_t page_bytes_ = 0;
    size_t reserved_bytes_ = 0;
    std::byte* base_ = nullptr;
    void* mapped_ = nullptr;  // what the system gave, base_ lies in it
    size_t mapped_bytes_ = 0;
};

}  // namespace qi
