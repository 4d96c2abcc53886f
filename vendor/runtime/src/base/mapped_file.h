// A file's bytes, mapped read-only or read into private memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace qi {

class MappedFile {
  public:
    // Throws QI_IO naming the path and the reason. use_mmap false reads the file into memory.
    MappedFile(const std::string& path, bool use_mmap);
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
