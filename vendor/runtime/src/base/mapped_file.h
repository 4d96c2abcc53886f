// A file's bytes, mapped read-only or read into private memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "qinfer.h"

namespace qi {

class MappedFile {
  public:
    // Maps a file. Throws QI_IO naming the path and the reason.
    explicit MappedFile(const std::string& path);
    // Reads a file into memory. Counts n_read of `progress` (may be nullptr) up, and throws
    // QI_CANCELLED soon after `cancel` was set.
    MappedFile(const std::string& path, qi_read_progress* progress);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::span<const std::byte> bytes() const { return bytes_; }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
    std::span<const std::byte> bytes_;
};

}  // namespace qi
