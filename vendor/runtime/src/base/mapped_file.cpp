// Mapping a file, or reading it into anonymous memory of its own.
#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace qi {

namespace {

// Linux reads at most this much in one call.
constexpr size_t max_read = 0x7ffff000;

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

void read_all(int descriptor, const std::string& path, std::byte* out, size_t n_bytes) {
    size_t done = 0;
    while (done < n_bytes) {
        const ssize_t got = ::read(descriptor, out + done, std::min(n_bytes - done, max_read));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            fail(QI_IO, "cannot read %s: %s", quoted(path, path.size()).c_str(),
                 std::strerror(errno));
        if (got == 0)
            fail(QI_IO, "%s became shorter while it was read: %zu of %zu bytes were left",
                 quoted(path, path.size()).c_str(), done, n_bytes);
        done += size_t(got);
    }
}

}  // namespace

MappedFile::MappedFile(const std::string& path, bool use_mmap) : path_(path) {
    const Descriptor file(open_for_reading(path));
    const size_t n_bytes = regular_file_size(file.number(), path);
    if (n_bytes == 0) return;  // mmap refuses an empty range

    void* address = use_mmap ? mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, file.number(), 0)
                             : mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED && use_mmap)
        fail(QI_IO, "cannot map %s: %s; reading it without mmap may work",
             quoted(path, path.size()).c_str(), std::strerror(errno));
    if (address == MAP_FAILED)
        fail(QI_MEMORY, "no memory for the %zu bytes of %s", n_bytes,
             quoted(path, path.size()).c_str());
    bytes_ = {static_cast<const std::byte*>(address), n_bytes};
    if (use_mmap) return;
    madvise(address, n_bytes, MADV_HUGEPAGE);  // a hint; it has to come before the first touch
    try {
        read_all(file.number(), path, static_cast<std::byte*>(address), n_bytes);
    } catch (...) {
        munmap(address, n_bytes);
        throw;
    }
}

MappedFile::~MappedFile() {
    if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace qi
