// Mapping a file, or reading it into anonymous memory of its own.
#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace qi {

namespace {

// Read by one call: a slow disk's 50 MB/s leave less than 0.1 s between two looks at `cancel`.
constexpr size_t max_read = 4u << 20;

class Descriptor {
  public:
    explicit Descriptor(int number) : number_(number) {}
    ~Descriptor() { close(number_); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int number() const { return number_; }

  private:
    int number_;
};

int open_for_reading(const std::string& path) {
    // O_NONBLOCK: opening a pipe must fail below, not wait for a writer.
    const int number = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (number < 0)
        fail(QI_IO, "cannot open %s: %s", quoted(path, path.size()).c_str(), std::strerror(errno));
    return number;
}

size_t regular_file_size(int descriptor, const std::string& path) {
    struct stat status;
    if (fstat(descriptor, &status) != 0)
        fail(QI_IO, "cannot examine %s: %s", quoted(path, path.size()).c_str(),
             std::strerror(errno));
    if (S_ISDIR(status.st_mode))
        fail(QI_IO, "%s is a directory, not a file", quoted(path, path.size()).c_str());
    if (!S_ISREG(status.st_mode))
        fail(QI_IO, "%s is not a regular file", quoted(path, path.size()).c_str());
    return size_t(status.st_size);
}

void read_all(int descriptor, const std::string& path, std::span<std::byte> out,
              qi_read_progress* progress) {
    size_t done = 0;
    while (done < out.size()) {
        if (progress && std::atomic_ref(progress->cancel).load(std::memory_order_relaxed))
            fail(QI_CANCELLED, "reading %s was cancelled at byte %zu of %zu",
                 quoted(path, path.size()).c_str(), done, out.size());
        const ssize_t got =
            ::read(descriptor, out.data() + done, std::min(out.size() - done, max_read));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            fail(QI_IO, "cannot read %s: %s", quoted(path, path.size()).c_str(),
                 std::strerror(errno));
        if (got == 0)
            fail(QI_IO, "%s became shorter while it was read: %zu of %zu bytes were left",
                 quoted(path, path.size()).c_str(), done, out.size());
        done += size_t(got);
        if (progress)
            std::atomic_ref(progress->n_read).fetch_add(uint64_t(got), std::memory_order_relaxed);
    }
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
    const Descriptor file(open_for_reading(path));
    const size_t n_bytes = regular_file_size(file.number(), path);
    if (n_bytes == 0) return;  // mmap refuses an empty range
    void* address = mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, file.number(), 0);
    if (address == MAP_FAILED)
        fail(QI_IO, "cannot map %s: %s; reading it without mmap may work",
             quoted(path, path.size()).c_str(), std::strerror(errno));
    // A hint: what is not in memory yet may then come in huge pages. A file that does not stay
    // there whole would be read again and again in too large pieces.
    const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    if (n_bytes <= memory / 2) madvise(address, n_bytes, MADV_HUGEPAGE);
    bytes_ = {static_cast<const std::byte*>(address), n_bytes};
}

MappedFile::MappedFile(const std::string& path, qi_read_progress* progress) : path_(path) {
    const Descriptor file(open_for_reading(path));
    const size_t n_bytes = regular_file_size(file.number(), path);
    if (n_bytes == 0) return;
    void* address =
        mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED)
        fail(QI_MEMORY, "no memory for the %zu bytes of %s", n_bytes,
             quoted(path, path.size()).c_str());
    madvise(address, n_bytes, MADV_HUGEPAGE);  // a hint; it has to come before the first touch
    try {
        read_all(file.number(), path, {static_cast<std::byte*>(address), n_bytes}, progress);
    } catch (...) {
        munmap(address, n_bytes);
        throw;
    }
    bytes_ = {static_cast<const std::byte*>(address), n_bytes};
}

MappedFile::~MappedFile() {
    if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace qi
