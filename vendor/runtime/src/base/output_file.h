// A file that appears under its name whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace qi {

// Writes go to a temporary name in the same folder; commit() makes them durable and renames. Every
// failure is QI_IO and names the path; after one, nothing more can be written.
class OutputFile {
  public:
    explicit OutputFile(const std::string& path);
    ~OutputFile();  // without commit(), removes what was written
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    // Takes the disk space for n_bytes where the file system can, so that a full disk shows before
    // hours of work.
    void reserve(uint64_t n_bytes);
    void write(std::span<const std::byte> bytes);
    void commit();

    const std::string& path() const { return path_; }

  private:
    [[noreturn]] void fail_with_errno(const char* what);
    void write_through(std::span<const std::byte> bytes);
    void flush();

    std::string path_;
    std::string temporary_path_;
    int descriptor_ = -1;
    bool failed_ = false;
    std::vector<std::byte> buffer_;  // gathers small writes
};

}  // namespace qi
