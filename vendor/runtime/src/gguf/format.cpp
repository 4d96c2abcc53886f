// Tables of GGUF's value types.
#include "gguf/format.h"

namespace qi::gguf {

namespace {

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

int32_t type_from_powerinfer(int32_t number) {
    return number >= powerinfer_i8 && number <= powerinfer_i32 ? number - powerinfer_i8 + i8
                                                               : number;
}

int32_t type_to_powerinfer(int32_t number) {
    return number >= i8 && number <= i32 ? number - i8 + powerinfer_i8 : number;
}

}  // namespace qi::gguf
