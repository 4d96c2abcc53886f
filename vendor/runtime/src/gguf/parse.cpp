// Reading a GGUF header. Nothing in it is trusted: every length is held against the file before it
// is used.
#include "gguf/parse.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "gguf/cursor.h"
#include "gguf/format.h"
#include "gguf/name_index.h"

namespace qi::gguf {

namespace {

// The smallest key and value: a length, one character, a type, a one-byte value.
constexpr uint64_t min_value_bytes = 8 + 1 + 4 + 1;
// The smallest tensor description: a length, one character, one dimension, type and offset.
constexpr uint64_t min_tensor_bytes = 8 + 1 + 4 + 8 + 4 + 8;

unsigned long long ull(uint64_t n) {
    return n;
}

bool begins_with(std::span<const std::byte> bytes, std::string_view prefix, size_t at = 0) {
    return bytes.size() >= at + prefix.size() &&
           std::memcmp(bytes.data() + at, prefix.data(), prefix.size()) == 0;
}

// What a file that is not GGUF seems to be: people often have one of these in hand.
std::string foreign_format(std::span<const std::byte> bytes) {
    using namespace std::string_view_literals;
    if (bytes.empty()) return "is empty (0 bytes); was a download interrupted?";
    if (begins_with(bytes, "version https://git-lfs"))
        return "is a Git LFS pointer, not the model itself; fetch it with 'git lfs pull'";
    if (begins_with(bytes, "<!DOCTYPE") || begins_with(bytes, "<!doctype") ||
        begins_with(bytes, "<html"))
        return "is a web page, not a GGUF file; was an error page saved in place of the model?";
    if (begins_with(bytes, "{\"", 8))
        return "is a safetensors file, not GGUF; convert the checkpoint first";
    if (begins_with(bytes, "PK\x03\x04"))
        return "is a zip archive (a PyTorch checkpoint?), not GGUF; convert the checkpoint first";
    if (begins_with(bytes, "\x80\x02"sv) || begins_with(bytes, "\x80\x04"sv))
        return "is a Python pickle (an old PyTorch checkpoint?), not GGUF; convert the checkpoint "
               "first";
    if (begins_with(bytes, "\x1f\x8b")) return "is compressed with gzip; unpack it first";
    if (begins_with(bytes, "lmgg") || begins_with(bytes, "fmgg") || begins_with(bytes, "tjgg"))
        return "is in the GGML format from before GGUF, which nothing reads any more; get or "
               "convert the model as GGUF";
    std::string found;
    for (const std::byte byte : bytes.first(std::min<size_t>(bytes.size(), 4)))
        found += format(found.empty() ? "%02x" : " %02x", unsigned(byte));
    return "is not a GGUF file: it begins with the bytes " + found +
           " where 47 47 55 46 (\"GGUF\") or 50 57 52 49 (\"PWRI\") should be";
}

void read_magic_and_version(Cursor& cursor, std::span<const std::byte> bytes, Part& part) {
    part.is_powerinfer = begins_with(bytes, "PWRI");
    if (!part.is_powerinfer && !begins_with(bytes, "GGUF")) cursor.refuse(foreign_format(bytes));
    cursor.take(4, "the magic");
    part.version = cursor.read<uint32_t>("the version");
    if ((part.version & 0xffff) == 0 && part.version != 0)
        cursor.refuse("is a big-endian GGUF file; this machine needs the little-endian one");
    if (part.version == 1)
        cursor.refuse(
            "is GGUF version 1, which nothing has written since August 2023; versions 2 "
            "and 3 are read");
    if (part.version != 2 && part.version != 3)
        cursor.refuse(format("is GGUF version %u; versions 2 and 3 are read", part.version));
}

void check(const Cursor& cursor, const std::optional<std::string>& problem) {
    if (problem) cursor.refuse(*problem);
}

void skip_strings(Cursor& cursor, uint64_t n) {
    if (n > cursor.remaining() / sizeof(uint64_t))
        cursor.refuse(format("claims %llu strings, more than fit in the %llu bytes left", ull(n),
                             ull(cursor.remaining())));
    for (uint64_t i = 0; i < n; i++)
        cursor.string("a string");
}

ValueType read_value_type(Cursor& cursor, const char* what) {
    const uint32_t number = cursor.read<uint32_t>(what);
    if (!is_value_type(number)) cursor.refuse(format("%s is %u; GGUF has 0 to 12", what, number));
    return ValueType(number);
}

KeyValue read_value(Cursor& cursor) {
    KeyValue value;
    value.key = cursor.string("the key");
    check(cursor, name_problem(value.key, max_name_bytes));
    cursor.set_subject_name(value.key);
    value.type = value.item_type = read_value_type(cursor, "the value type");
    value.n_items = 1;
    if (value.type == ValueType::array) {
        value.item_type = read_value_type(cursor, "the array's item type");
        if (value.item_type == ValueType::array)
            cursor.refuse(
                "is an array of arrays; only arrays of numbers, bools and strings are "
                "read");
        value.n_items = cursor.read<uint64_t>("the array's length");
    }
    if (value.item_type == ValueType::string) {
        Cursor begin = cursor;
        skip_strings(cursor, value.n_items);
        value.data = begin.take(cursor.position() - begin.position(), "the strings");
        return value;
    }
    const uint64_t size = value_type_size(value.item_type);
    if (value.n_items > cursor.remaining() / size)
        cursor.refuse(format("claims %llu values of type %s, more than fit in the %llu bytes left",
                             ull(value.n_items), value_type_name(value.item_type),
                             ull(cursor.remaining())));
    value.data = cursor.take(value.n_items * size, "the value");
    if (value.item_type == ValueType::boolean) check(cursor, bool_problem(value.data));
    return value;
}

void read_values(Cursor& cursor, uint64_t n_values, Part& part) {
    for (uint64_t i = 0; i < n_values; i++) {
        cursor.set_subject("key", i);
        part.values.push_back(read_value(cursor));
    }
    part.key_index = index_names(part.values, &KeyValue::key);
    const int64_t twice = part.key_index.duplicate();
    if (twice >= 0) {
        cursor.set_subject_name(part.values[size_t(twice)].key);
        cursor.refuse("stands in the file more than once");
    }
}

uint32_t read_alignment(Cursor& cursor, const Part& part) {
    const int64_t found = part.key_index.find(alignment_key);
    if (found < 0) return default_alignment;
    const KeyValue& value = part.values[size_t(found)];
    cursor.set_subject_name(alignment_key);
    if (value.type != ValueType::u32)
        cursor.refuse(format("is of type %s; it must be u32", value_type_name(value.type)));
    uint32_t alignment;
    std::memcpy(&alignment, value.data.data(), sizeof alignment);
    if (!is_alignment(alignment))
        cursor.refuse(format("is %u; it must be %s", alignment, alignment_rule));
    return alignment;
}

TensorInfo read_tensor(Cursor& cursor, const Part& part) {
    TensorInfo tensor{};
    tensor.name = cursor.string("the name");
    check(cursor, name_problem(tensor.name, max_name_bytes));
    cursor.set_subject_name(tensor.name);
    tensor.n_dims = cursor.read<uint32_t>("the number of dimensions");
    if (tensor.n_dims < 1 || tensor.n_dims > max_dims)
        cursor.refuse(format("has %u dimensions; 1 to %u are allowed", tensor.n_dims, max_dims));
    std::fill_n(tensor.dims, max_dims, 1);
    for (uint32_t i = 0; i < tensor.n_dims; i++)
        tensor.dims[i] = cursor.read<uint64_t>("a dimension");
    const uint32_t type = cursor.read<uint32_t>("the type");
    if (type > uint32_t(std::numeric_limits<int32_t>::max()))
        cursor.refuse(format("has type number %u, which cannot be one", type));
    tensor.type = part.is_powerinfer ? type_from_powerinfer(int32_t(type)) : int32_t(type);
    check(cursor, shape_problem(tensor.type, {tensor.dims, tensor.n_dims}, tensor.n_bytes));
    tensor.offset = cursor.read<uint64_t>("the offset");
    if (tensor.offset % part.alignment != 0)
        cursor.refuse(
            format("its data begins %llu bytes into the data section, which is not a "
                   "multiple of the alignment, %u",
                   ull(tensor.offset), part.alignment));
    return tensor;
}

void read_tensors(Cursor& cursor, uint64_t n_tensors, Part& part) {
    for (uint64_t i = 0; i < n_tensors; i++) {
        cursor.set_subject("tensor", i);
        part.tensors.push_back(read_tensor(cursor, part));
    }
    const int64_t twice = index_names(part.tensors, &TensorInfo::name).duplicate();
    if (twice >= 0) {
        cursor.set_subject_name(part.tensors[size_t(twice)].name);
        cursor.refuse("stands in the file more than once");
    }
}

// Turns offsets in the data section into offsets in the file, and checks that the file reaches that
// far.
void place_tensors(Cursor& cursor, std::span<const std::byte> bytes, bool with_tensors,
                   Part& part) {
    const uint64_t data_begin = align_up(part.header_bytes, part.alignment);
    for (TensorInfo& tensor : part.tensors) {
        cursor.set_subject_name(tensor.name);
        uint64_t end;
        if (__builtin_add_overflow(tensor.offset, data_begin, &tensor.offset) ||
            __builtin_add_overflow(tensor.offset, tensor.n_bytes, &end))
            cursor.refuse("has an offset beyond any file");
        if (!with_tensors) continue;
        if (end > bytes.size())
            cursor.refuse(
                format("its data lies at bytes %llu to %llu, but the file ends at byte "
                       "%llu; it is cut short or damaged",
                       ull(tensor.offset), ull(end), ull(bytes.size())));
        tensor.data = bytes.data() + tensor.offset;
    }
}

void check_overlaps(Cursor& cursor, const Part& part) {
    std::vector<const TensorInfo*> by_offset;
    by_offset.reserve(part.tensors.size());
    for (const TensorInfo& tensor : part.tensors)
        by_offset.push_back(&tensor);
    std::ranges::sort(by_offset, {}, &TensorInfo::offset);
    for (size_t i = 1; i < by_offset.size(); i++) {
        const TensorInfo &before = *by_offset[i - 1], &after = *by_offset[i];
        // A tensor of unknown type and length has at least a first byte.
        if (after.offset - before.offset >= std::max<uint64_t>(before.n_bytes, 1)) continue;
        cursor.set_subject_name(after.name);
        cursor.refuse(format("its data at byte %llu lies inside that of tensor %s",
                             ull(after.offset), quoted(before.name).c_str()));
    }
}

void check_count(const Cursor& cursor, uint64_t n, uint64_t min_bytes, const char* what) {
    if (n > cursor.remaining() / min_bytes)
        cursor.refuse(
            format("the header claims %llu %s, more than fit in the file's %llu bytes; it "
                   "is cut short or damaged",
                   ull(n), what, ull(cursor.position() + cursor.remaining())));
}

}  // namespace

Part parse_part(std::span<const std::byte> bytes, const std::string& path, bool with_tensors) {
    Part part;
    Cursor cursor(bytes, path);
    read_magic_and_version(cursor, bytes, part);
    const auto n_tensors = cursor.read<uint64_t>("the number of tensors");
    const auto n_values = cursor.read<uint64_t>("the number of keys");
    check_count(cursor, n_values, min_value_bytes, "keys");
    check_count(cursor, n_tensors, min_tensor_bytes, "tensors");
    read_values(cursor, n_values, part);
    part.alignment = read_alignment(cursor, part);
    read_tensors(cursor, n_tensors, part);
    part.header_bytes = cursor.position();
    place_tensors(cursor, bytes, with_tensors, part);
    check_overlaps(cursor, part);
    return part;
}

}  // namespace qi::gguf
