// Measures how fast this machine reads memory: the roof that decoding speed is compared with.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "base/cpu.h"
#include "base/error.h"
#include "base/thread_pool.h"

namespace qi {

namespace {

constexpr size_t chunk_bytes = size_t(1) << 20;
constexpr int n_passes = 9;

typedef uint64_t Bytes16 __attribute__((vector_size(16), may_alias));
typedef uint64_t Bytes32 __attribute__((vector_size(32), may_alias));
typedef uint64_t Bytes64 __attribute__((vector_size(64), may_alias));

// Eight sums that do not wait for each other: enough loads in flight that memory is the limit.
template <typename Vector>
[[gnu::always_inline]] inline uint64_t read_all(const std::byte* data, size_t n_bytes) {
    const Vector* vectors = reinterpret_cast<const Vector*>(data);
    Vector sums[8] = {};
    for (size_t i = 0; i < n_bytes / sizeof(Vector); i += 8)
        for (size_t j = 0; j < 8; ++j)
            sums[j] ^= vectors[i + j];
    for (size_t j = 1; j < 8; ++j)
        sums[0] ^= sums[j];
    uint64_t total = 0;
    for (size_t j = 0; j < sizeof(Vector) / sizeof(uint64_t); ++j)
        total ^= sums[0][j];
    return total;
}

using ReadFunction = uint64_t (*)(const std::byte* data, size_t n_bytes);

uint64_t read_16(const std::byte* data, size_t n_bytes) {
    return read_all<Bytes16>(data, n_bytes);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t read_32(const std::byte* data, size_t n_bytes) {
    return read_all<Bytes32>(data, n_bytes);
}
[[gnu::target("avx512f")]] uint64_t read_64(const std::byte* data, size_t n_bytes) {
    return read_all<Bytes64>(data, n_bytes);
}
#endif

ReadFunction widest_read() {
#if defined(__x86_64__)
    if (isa_supported(Isa::avx512)) return read_64;
    if (isa_supported(Isa::avx2)) return read_32;
#endif
    return read_16;
}

// Private memory, on huge pages where they are to be had: address translation is not the subject.
class Pages {
  public:
    explicit Pages(size_t n_bytes) : n_bytes_(n_bytes) {
        void* memory =
            mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED)
            fail(QI_MEMORY, "%zu bytes for measuring the read bandwidth: %s", n_bytes,
                 std::strerror(errno));
        madvise(memory, n_bytes, MADV_HUGEPAGE);
        data_ = static_cast<std::byte*>(memory);
    }
    ~Pages() { munmap(data_, n_bytes_); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    std::byte* data() { return data_; }

  private:
    std::byte* data_;
    size_t n_bytes_;
};

}  // namespace

double measure_read_bandwidth(int n_threads, size_t n_bytes) {
    if (n_threads < 1) fail(QI_ARGUMENT, "n_threads is %d; it must be at least 1", n_threads);
    // Half of the memory: what a process takes beyond what there is, it may be killed for.
    const size_t most_bytes = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 2;
    if (n_bytes < chunk_bytes || n_bytes > most_bytes)
        fail(QI_ARGUMENT, "n_bytes is %zu; it must be from %zu to %zu", n_bytes, chunk_bytes,
             most_bytes);
    const int64_t n_chunks = int64_t(n_bytes / chunk_bytes);
    Pages pages(size_t(n_chunks) * chunk_bytes);
    const ReadFunction read = widest_read();
    std::atomic<uint64_t> sink{0};  // so that no read can be left out

    // Touched by the threads that will read: on machines of several nodes, pages lie near them.
    parallel_for(n_threads, n_chunks, [&](int64_t chunk, int) {
        std::memset(pages.data() + size_t(chunk) * chunk_bytes, 1, chunk_bytes);
    });
    double seconds[n_passes];
    for (double& pass : seconds) {
        const auto start = std::chrono::steady_clock::now();
        parallel_for(n_threads, n_chunks, [&](int64_t chunk, int) {
            sink.fetch_xor(read(pages.data() + size_t(chunk) * chunk_bytes, chunk_bytes),
                           std::memory_order_relaxed);
        });
        pass = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    std::nth_element(seconds, seconds + n_passes / 2, seconds + n_passes);
    return double(n_chunks) * double(chunk_bytes) / seconds[n_passes / 2];
}

}  // namespace qi
