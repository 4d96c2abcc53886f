// Tensor element types: GGUF's numbers, names and block shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace qi {

// Types this runtime computes with; values are GGUF's.
enum class Type : int32_t {
    f32 = 0,
    f16 = 1,
    q4_0 = 2,
    q4_1 = 3,
    q5_0 = 6,
    q5_1 = 7,
    q8_0 = 8,
    q2_k = 10,
    q3_k = 11,
    q4_k = 12,
    q5_k = 13,
    q6_k = 14,
    bf16 = 30,
};

struct TypeTraits {
    Type type;
    const char* name;
    int block_size;   // elements per block
    int block_bytes;  // bytes per block
};

std::span<const TypeTraits> all_types();

// nullptr when the number is not a type this runtime computes with.
const TypeTraits* find_type(int32_t gguf_number);

const TypeTraits& traits(Type type);

// How any type GGUF defines lies in a file, whether or not this runtime computes with it.
struct TypeLayout {
    int32_t number;  // GGUF's
    const char* name;
    int block_size;   // elements per block
    int block_bytes;  // bytes per block
};

std::span<const TypeLayout> all_layouts();  // ascending by number

// nullptr when GGUF has no such type.
const TypeLayout* find_layout(int32_t gguf_number);

// Name of a GGUF type for messages; "unknown" when GGUF has no such type.
const char* gguf_type_name(int32_t gguf_number);

// Bytes of a row of n elements; n is a multiple of the block size.
inline size_t row_bytes(Type type, int64_t n) {
    const TypeTraits& t = traits(type);
    return size_t(n / t.block_size) * size_t(t.block_bytes);
}

}  // namespace qi
