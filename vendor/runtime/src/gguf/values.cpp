// Typed access to metadata values.
#include "gguf/values.h"

#include <cstring>

#include "base/error.h"
#include "base/text.h"

namespace qi::gguf {

namespace {

template <typename Number>
Number load(const std::byte* bytes) {
    Number number;
    std::memcpy(&number, bytes, sizeof number);
    return number;
}

[[noreturn]] void refuse(const KeyValue& value, const std::string& path, const std::string& what) {
    fail(QI_FORMAT, "%s: key %s: %s", quoted(path, path.size()).c_str(), quoted(value.key).c_str(),
         what.c_str());
}

[[noreturn]] void refuse_type(const KeyValue& value, const std::string& path, const char* wanted) {
    const char* shape = value.type == ValueType::array ? "an array of " : "of type ";
    refuse(value, path,
           std::string("is ") + shape + value_type_name(value.item_type) + "; wanted " + wanted);
}

std::string_view load_string(const std::byte* at) {
    return {reinterpret_cast<const char*>(at + sizeof(uint64_t)), load<uint64_t>(at)};
}

}  // namespace

uint64_t to_uint(const KeyValue& value, const std::string& path) {
    const std::byte* data = value.data.data();
    int64_t number = 0;
    switch (value.type) {
        case ValueType::u8:
            return load<uint8_t>(data);
        case ValueType::u16:
            return load<uint16_t>(data);
        case ValueType::u32:
            return load<uint32_t>(data);
        case ValueType::u64:
            return load<uint64_t>(data);
        case ValueType::i8:
            number = load<int8_t>(data);
            break;
        case ValueType::i16:
            number = load<int16_t>(data);
            break;
        case ValueType::i32:
            number = load<int32_t>(data);
            break;
        case ValueType::i64:
            number = load<int64_t>(data);
            break;
        default:
            refuse_type(value, path, "an integer");
    }
    if (number < 0)
        refuse(value, path, format("is %lld; wanted 0 or more", static_cast<long long>(number)));
    return uint64_t(number);
}

double to_float(const KeyValue& value, const std::string& path) {
    if (value.type == ValueType::f32) return load<float>(value.data.data());
    if (value.type == ValueType::f64) return load<double>(value.data.data());
    refuse_type(value, path, "f32");
}

bool to_bool(const KeyValue& value, const std::string& path) {
    if (value.type != ValueType::boolean) refuse_type(value, path, "bool");
    return value.data[0] != std::byte{0};
}

std::string to_string(const KeyValue& value, const std::string& path) {
    if (value.type != ValueType::string) refuse_type(value, path, "string");
    return std::string(load_string(value.data.data()));
}

StringTable to_strings(const KeyValue& value, const std::string& path) {
    if (value.item_type != ValueType::string)
        refuse_type(value, path, "a string or an array of string");
    StringTable table;
    table.offsets.reserve(value.n_items + 1);
    table.bytes.reserve(value.data.size() - value.n_items * sizeof(uint64_t));
    table.offsets.push_back(0);
    const std::byte* at = value.data.data();
    for (uint64_t i = 0; i < value.n_items; i++) {
        const std::string_view text = load_string(at);
        table.bytes += text;
        table.offsets.push_back(table.bytes.size());
        at += sizeof(uint64_t) + text.size();
    }
    return table;
}

}  // namespace qi::gguf
