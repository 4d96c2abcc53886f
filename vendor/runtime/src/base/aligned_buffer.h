// Zeroed, cache-line-aligned memory that grows on demand and is released with its owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "base/error.h"

namespace qi {

// Contents are lost when it grows: for scratch and outputs, not for data that lives on.
template <typename T>
class AlignedBuffer {
  public:
    // Makes room for at least n elements and returns them.
    T* reserve(size_t n) {
        if (n > capacity_) {
            data_.reset();
            capacity_ = 0;
            if (n > SIZE_MAX / sizeof(T) - alignment)
                fail(QI_MEMORY, "a buffer of %zu elements is too large", n);
            const size_t bytes = (n * sizeof(T) + alignment - 1) / alignment * alignment;
            data_.reset(
                static_cast<T*>(::operator new(bytes, std::align_val_t(alignment), std::nothrow)));
            if (!data_) fail(QI_MEMORY, "no memory for %zu bytes of working space", bytes);
            std::memset(static_cast<void*>(data_.get()), 0, bytes);
            capacity_ = n;
        }
        return data_.get();
    }
    void release() {
        data_.reset();
        capacity_ = 0;
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    size_t capacity_bytes() const { return capacity_ * sizeof(T); }

  private:
    static constexpr size_t alignment = 64;
    struct Free {
        void operator()(T* p) const { ::operator delete(p, std::align_val_t(alignment)); }
    };
    std::unique_ptr<T, Free> data_;
    size_t capacity_ = 0;
};

}  // namespace qi
