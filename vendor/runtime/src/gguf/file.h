// A GGUF (or PWRI) file, read once into a validated description: later code needs no checks.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/mapped_file.h"

namespace qi::gguf {

// GGUF's value type numbers.
enum class ValueType : int32_t {
    u8 = 0,
    i8 = 1,
    u16 = 2,
    i16 = 3,
    u32 = 4,
    i32 = 5,
    f32 = 6,
    boolean = 7,
    string = 8,
    array = 9,
    u64 = 10,
    i64 = 11,
    f64 = 12,
};
const char* value_type_name(ValueType type);

struct KeyValue {
    std::string_view key;
    ValueType type;
    ValueType item_type;              // of an array; else equal to type
    uint64_t n_items;                 // 1 unless an array
    std::span<const std::byte> data;  // packed, unaligned; strings as in the file
};

// Strings of one value as a byte run and n + 1 offsets.
struct StringTable {
    std::string bytes;
    std::vector<uint64_t> offsets;
    std::string_view operator[](size_t i) const {
        return std::string_view(bytes).substr(offsets[i], offsets[i + 1] - offsets[i]);
    }
    size_t size() const { return offsets.size() - 1; }
};

struct TensorInfo {
    std::string_view name;
    int32_t type;           // GGUF number; may be one the kernels do not know
    uint32_t n_dims;        // 1 to 4
    uint64_t dims[4];       // dims[0] is contiguous; unused ones are 1
    uint64_t n_bytes;       // 0 when GGUF has no such type
    uint32_t file;          // index of the split part
    uint64_t offset;        // in that file
    const std::byte* data;  // nullptr when opened without tensors
};

struct OpenOptions {
    bool use_mmap = true;
    bool with_tensors = true;  // false: metadata and descriptions only, missing data is no error
    qi_read_progress* progress = nullptr;  // of reading without mmap
};

class File {
  public:
    // Opens a file and, when it is part 1 of a split, the parts after it. Every defect is a
    // QI_FORMAT error that names the file and the key, tensor or byte offset. A tensor of a type we
    // do not know is kept (with n_bytes 0) and refused by whoever wants to use it.
    static std::shared_ptr<const File> open(const std::string& path, const OpenOptions& options);
    // The same over bytes in memory that outlive the file, for fuzzing and tests.
    static std::shared_ptr<const File> parse(std::span<const std::byte> bytes,
                                             const std::string& name);

    const std::string& path() const;
    uint32_t version() const;
    bool is_powerinfer() const;  // magic PWRI
    uint32_t alignment() const;
    uint32_t n_files() const;
    uint64_t n_bytes() const;  // all parts
    // Of the first part: magic to the last tensor description.
    std::span<const std::byte> header() const;

    std::span<const KeyValue> values() const;
    std::span<const TensorInfo> tensors() const;
    const KeyValue* find(std::string_view key) const;            // nullptr when absent
    const TensorInfo* find_tensor(std::string_view name) const;  // nullptr when absent

    // Typed access. A key of another type is a QI_FORMAT error naming key, type found and type
    // wanted; integers of any width are accepted where they fit. The `require_` forms also fail
    // when the key is absent.
    std::optional<uint64_t> get_uint(std::string_view key) const;
    std::optional<double> get_float(std::string_view key) const;
    std::optional<bool> get_bool(std::string_view key) const;
    std::optional<std::string> get_string(std::string_view key) const;
    uint64_t require_uint(std::string_view key) const;
    double require_float(std::string_view key) const;
    std::string require_string(std::string_view key) const;
    // Built on first use, then kept. QI_FORMAT when the value is not a string or an array of
    // strings.
    const StringTable& strings(const KeyValue& value) const;

    ~File();

  private:
    File();
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace qi::gguf
