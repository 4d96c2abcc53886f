// Temporary file, fsync, rename.
#include "base/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace qi {

namespace {

constexpr size_t buffer_bytes = 1 << 20;

std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace

OutputFile::OutputFile(const std::string& path) : path_(path) {
    struct stat status;
    if (stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
        fail(QI_IO, "cannot write %s: it exists and is not a regular file",
             quoted(path, path.size()).c_str());
    // The process id and a number keep writers of the same path apart. The mode leaves the rest to
    // the umask.
    for (int number = 0; descriptor_ < 0; number++) {
        temporary_path_ = path + format(".%d-%d.part", int(getpid()), number);
        descriptor_ =
            ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (descriptor_ < 0 && errno != EEXIST) fail_with_errno("create");
    }
}

OutputFile::~OutputFile() {
    if (descriptor_ < 0) return;
    close(descriptor_);
    unlink(temporary_path_.c_str());
}

void OutputFile::fail_with_errno(const char* what) {
    const int reason = errno;
    failed_ = true;
    fail(QI_IO, "cannot %s %s: %s", what, quoted(path_, path_.size()).c_str(),
         std::strerror(reason));
}

void OutputFile::reserve(uint64_t n_bytes) {
    if (n_bytes == 0 || fallocate(descriptor_, 0, 0, off_t(n_bytes)) == 0) return;
    if (errno == ENOSPC || errno == EFBIG || errno == EDQUOT)
        fail_with_errno(format("take %llu bytes for", (unsigned long long)n_bytes).c_str());
}

void OutputFile::write_through(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
        const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) fail_with_errno("write");
        bytes = bytes.subspan(size_t(written));
    }
}

void OutputFile::flush() {
    write_through(buffer_);
    buffer_.clear();
}

void OutputFile::write(std::span<const std::byte> bytes) {
    if (failed_)
        fail(QI_IO, "writing %s failed before; start again", quoted(path_, path_.size()).c_str());
    if (buffer_.size() + bytes.size() > buffer_bytes) flush();
    if (bytes.size() >= buffer_bytes) {
        write_through(bytes);
    } else {
        buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    }
}

void OutputFile::commit() {
    write({});
    flush();
    if (fsync(descriptor_) != 0) fail_with_errno("write");
    if (rename(temporary_path_.c_str(), path_.c_str()) != 0) fail_with_errno("rename to");
    close(descriptor_);
    descriptor_ = -1;
    // The rename is durable once its folder is; the file itself is whole either way, so no failure
    // here is reported.
    const int folder = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    fsync(folder);
    close(folder);
}

}  // namespace qi
