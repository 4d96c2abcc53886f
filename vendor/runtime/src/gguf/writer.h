// Writing GGUF and PWRI files.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "base/output_file.h"
#include "gguf/format.h"

namespace qi::gguf {

// Calls come in the order of the file: every value, every tensor description, the data of each
// tensor. A call that is out of order, or whose arguments no reader would accept, is QI_ARGUMENT,
// names the key or tensor and changes nothing.
class Writer {
  public:
    Writer(const std::string& path, bool is_powerinfer, uint32_t alignment);

    // One number or bool, or an array of them (type array).
    void add_value(std::string_view key, ValueType type, ValueType item_type, uint64_t n_items,
                   std::span<const std::byte> data);
    void add_string(std::string_view key, std::string_view text);
    // offsets: n + 1 ascending positions in bytes.
    void add_strings(std::string_view key, const char* bytes, std::span<const uint64_t> offsets);
    void add_tensor(std::string_view name, int32_t type, std::span<const uint64_t> dims);
    // The next piece of the current tensor's data; a piece never reaches into the next tensor.
    void write(std::span<const std::byte> data);
    // Gives the file its name. Without it, nothing is left behind.
    void finish();

  private:
    enum class Stage { values, tensors, data, finished };
    struct Tensor {
        std::string name;
        uint64_t n_bytes;
    };

    [[noreturn]] void refuse(const std::string& what) const;
    [[noreturn]] void refuse(const char* kind, std::string_view name,
                             const std::string& what) const;
    void check_key(std::string_view key) const;
    void check_alignment_value(ValueType type, std::span<const std::byte> data) const;
    void begin_value(std::string_view key, ValueType type, ValueType item_type, uint64_t n_items);
    void begin_data();
    void pad(uint64_t n_bytes);

    OutputFile file_;
    bool is_powerinfer_;
    uint32_t alignment_;
    Stage stage_ = Stage::values;
    std::unordered_set<std::string> keys_;
    std::unordered_set<std::string> tensor_names_;
    std::string values_;        // as they will stand in the file
    std::string descriptions_;  // of tensors, likewise
    std::vector<Tensor> tensors_;
    uint64_t data_bytes_ = 0;  // of the tensors described, each padded
    size_t current_ = 0;       // tensor whose data comes next
    uint64_t n_written_ = 0;   // of that tensor
};

}  // namespace qi::gguf
