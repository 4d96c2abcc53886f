// Facts about the GGUF format that reading and writing share.
#pragma once

#include <bit>
#include <cstdint>

#include "gguf/file.h"

namespace qi::gguf {

inline constexpr uint32_t current_version = 3;
inline constexpr uint32_t default_alignment = 32;
inline constexpr uint32_t max_dims = 4;
inline constexpr uint64_t max_key_bytes = 65535;
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

// PowerInfer left GGUF when the integer types had the numbers 16, 17 and 18, now 24, 25 and 26.
// Other numbers stay.
int32_t type_from_powerinfer(int32_t number);
int32_t type_to_powerinfer(int32_t number);

}  // namespace qi::gguf
