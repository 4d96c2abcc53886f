// Temporary file, fsync, rename.
#include "base/output_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "base/error.h"
#include "base/log.h"
#include "base/text.h"

namespace qi {

namespace {

constexpr size_t buffer_bytes = 1 << 20;

std::string folder_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    if (slash == std::string::npos) return ".";
    return slash == 0 ? "/" : path.substr(0, slash);
}

// Whether name is `target.<digits>-<digits>.part`.
bool is_part_of(std::string_view name, std::string_view target) {
    constexpr std::string_view digits = "0123456789", end = ".part";
    if (name.size() <= target.size() + 1 + end.size() || !name.starts_with(target) ||
        name[target.size()] != '.' || !name.ends_with(end))
        return false;
    name.remove_prefix(target.size() + 1);
    name.remove_suffix(end.size());
    const size_t dash = name.find_first_not_of(digits);
    return dash != 0 && dash != std::string_view::npos && name[dash] == '-' &&
           dash + 1 < name.size() &&
           name.find_first_not_of(digits, dash + 1) == std::string_view::npos;
}

// Removes a temporary file unless a process still writes it. Writers hold a lock, which goes with
// them however they end, and, unlike a process id, is known in every container.
void remove_if_abandoned(const std::string& part) {
    const int descriptor = ::open(part.c_str(), O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (descriptor < 0) return;
    struct stat status;
    if (fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) &&
        flock(descriptor, LOCK_EX | LOCK_NB) == 0 && unlink(part.c_str()) == 0)
        log(LogLevel::info, format("%s: removed, its writer is gone", part.c_str()));
    close(descriptor);
}

// Removes what writers of the same path left when they were killed.
void remove_abandoned_parts(const std::string& path) {
    const std::string folder = folder_of(path);
    const std::string target = path.substr(path.rfind('/') + 1);
    DIR* entries = opendir(folder.c_str());
    if (!entries) return;
    while (const dirent* entry = readdir(entries)) {
        if (is_part_of(entry->d_name, target)) remove_if_abandoned(folder + "/" + entry->d_name);
    }
    closedir(entries);
}

// Whether the file, just made, is ours: another writer may have found it before it was locked, and
// taken it for abandoned. Where there are no locks nobody does.
bool keep_locked(int descriptor) {
    struct stat status;
    if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    return fstat(descriptor, &status) == 0 && status.st_nlink > 0;
}

}  // namespace

OutputFile::OutputFile(const std::string& path) : path_(path) {
    struct stat status;
    if (stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
        fail(QI_IO, "cannot write %s: it exists and is not a regular file",
             quoted(path, path.size()).c_str());
    remove_abandoned_parts(path);
    // The process id and a number keep writers of the same path apart. The mode leaves the rest to
    // the umask.
    for (int number = 0; descriptor_ < 0; number++) {
        temporary_path_ = path + format(".%d-%d.part", int(getpid()), number);
        descriptor_ =
            ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (descriptor_ < 0 && errno != EEXIST) fail_with_errno("create");
        if (descriptor_ >= 0 && !keep_locked(descriptor_)) {
            close(descriptor_);
            descriptor_ = -1;
        }
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
