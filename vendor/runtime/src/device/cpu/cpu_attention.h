// Keys and values in host memory and attention over them, by the threads of a CpuProducts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/cpu/cpu_products.h"
#include "device/cpu/kv_store.h"
#include "device/device.h"

namespace qi {

class CpuAttention {
  public:
    explicit CpuAttention(CpuProducts& products) : products_(products) {}

    HostKvStore& store() { return kv_; }
    const HostKvStore& store() const { return kv_; }
    void copy_page(int32_t from, int32_t to);
    void read_page(int32_t page, std::byte* out) const;
    void write_page(int32_t page, const std::byte* data);

    // Rotates queries and keys in place, then stores keys and values in their pages.
    void append(const BatchInputs& batch, int64_t layer, const Heads& heads);

    // What an attention over only some of the positions is told beside the rest.
    struct Part {
        const int64_t* first;  // [n_segments], positions before it are left out
        float* terms;          // [n_tokens][n_head][2], see kernels/attention.h
    };
    // As Device::attend; with a part, out is left unnormalised.
    void attend(const BatchInputs& batch, int64_t layer, const AttentionShape& shape,
                const float* q, int64_t stride, float* out, const Part* part = nullptr);

  private:
    void rotate(const BatchInputs& batch, float* x, int64_t stride, int64_t n_heads,
                const Heads& heads);

    CpuProducts& products_;
    HostKvStore kv_;
};

}  // namespace qi
