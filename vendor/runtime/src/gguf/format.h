// Facts about the GGUF format that reading and writing share.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "gguf/file.h"

namespace qi::gguf {

inline constexpr uint32_t current_version = 3;
inline constexpr uint32_t default_alignment = 32;
inline constexpr uint32_t max_dims = 4;
inline constexpr size_t max_name_bytes = 65535;  // of keys, and of tensors when reading
inline constexpr size_t max_written_tensor_name_bytes =
    63;  // llama.cpp and PowerInfer read no more
inline constexpr const char* alignment_key = "general.alignment";

// The specification asks for a multiple of 8; a huge page is the most anyone has a use for.
inline constexpr bool is_alignment(uint32_t bytes) {
    return std::has_single_bit(bytes) && bytes >= 8 && bytes <= 2u << 20;
}
inline constexpr const char* alignment_rule = "a power of two from 8 to 2097152";

inline constexpr uint64_t align_up(uint64_t n, uint64_t alignment) {
    return (n + alignment - 1) & ~(alignment - 1);
}

inline constexpr bool is_value_type(uint32_t number) {
    return number <= uint32_t(ValueType::f64);
}

// Bytes of one number or bool; 0 for strings and arrays.
uint32_t value_type_size(ValueType type);

// Each says what is wrong, or nothing.
std::optional<std::string> name_problem(std::string_view name, size_t max_bytes);
std::optional<std::string> bool_problem(std::span<const std::byte> bools);
// On success n_bytes is the size of the tensor, 0 for a type that GGUF does not define.
std::optional<std::string> shape_problem(int32_t type, std::span<const uint64_t> dims,
                                         uint64_t& n_bytes);

// PowerInfer left GGUF when the integer types had the numbers 16, 17 and 18, now 24, 25 and 26.
// Other numbers stay.
int32_t type_from_powerinfer(int32_t number);
int32_t type_to_powerinfer(int32_t number);

}  // namespace qi::gguf
