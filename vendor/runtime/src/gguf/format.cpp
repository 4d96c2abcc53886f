// GGUF's value types, and what names, values and shapes must be like.
#include "gguf/format.h"

#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "quant/types.h"

namespace qi::gguf {

namespace {

// So that counts fit signed 64-bit integers as well.
constexpr uint64_t max_count = uint64_t(std::numeric_limits<int64_t>::max());

constexpr int32_t powerinfer_i8 = 16, powerinfer_i32 = 18;
constexpr int32_t i8 = 24, i32 = 26;

struct ValueTypeFacts {
    const char* name;
    uint32_t size;
};

constexpr ValueTypeFacts value_types[] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

}  // namespace

const char* value_type_name(ValueType type) {
    return is_value_type(uint32_t(type)) ? value_types[size_t(type)].name : "unknown";
}

uint32_t value_type_size(ValueType type) {
    return value_types[size_t(type)].size;
}

std::optional<std::string> name_problem(std::string_view name, size_t max_bytes) {
    if (name.empty()) return "has an empty name";
    if (name.size() > max_bytes)
        return format("has a name of %zu bytes; at most %zu are allowed", name.size(), max_bytes);
    if (!is_utf8(name)) return "has a name that is not UTF-8: " + quoted(name);
    return std::nullopt;
}

std::optional<std::string> bool_problem(std::span<const std::byte> bools) {
    for (const std::byte value : bools) {
        if (value > std::byte{1})
            return format("holds %u as a bool; 0 and 1 are allowed", unsigned(value));
    }
    return std::nullopt;
}

std::optional<std::string> shape_problem(int32_t type, std::span<const uint64_t> dims,
                                         uint64_t& n_bytes) {
    if (dims.empty() || dims.size() > max_dims)
        return format("has %zu dimensions; 1 to %u are allowed", dims.size(), max_dims);
    uint64_t n_elements = 1;
    for (size_t i = 0; i < dims.size(); i++) {
        if (dims[i] == 0) return format("dimension %zu is 0", i);
        if (__builtin_mul_overflow(n_elements, dims[i], &n_elements) || n_elements > max_count)
            return format("dimension %zu of %llu makes more elements than can be counted", i,
                          static_cast<unsigned long long>(dims[i]));
    }
    n_bytes = 0;
    const TypeLayout* layout = find_layout(type);
    if (layout == nullptr) return std::nullopt;
    if (dims[0] % uint64_t(layout->block_size) != 0)
        return format("rows of %llu elements cannot be %s, whose blocks have %d",
                      static_cast<unsigned long long>(dims[0]), layout->name, layout->block_size);
    if (__builtin_mul_overflow(n_elements / uint64_t(layout->block_size),
                               uint64_t(layout->block_bytes), &n_bytes) ||
        n_bytes > max_count)
        return "has more bytes than can be counted";
    return std::nullopt;
}

int32_t type_from_powerinfer(int32_t number) {
    return number >= powerinfer_i8 && number <= powerinfer_i32 ? number - powerinfer_i8 + i8
                                                               : number;
}

int32_t type_to_powerinfer(int32_t number) {
    return number >= i8 && number <= i32 ? number - i8 + powerinfer_i8 : number;
}

}  // namespace qi::gguf
