// qi_type_*: checks and translation, nothing else.
#include <cstring>
#include <limits>

#include "capi/guard.h"
#include "quant/codec.h"

using namespace qi;

namespace {

const TypeTraits& checked_type(int32_t number) {
    if (const TypeTraits* found = find_type(number)) return *found;
    if (const TypeLayout* layout = find_layout(number))
        fail(QI_UNSUPPORTED, "this runtime does not compute with type %s", layout->name);
    fail(QI_ARGUMENT, "type %d is not one of GGUF's", int(number));
}

void check_count(const TypeTraits& type, const char* what, uint64_t n) {
    if (n % uint64_t(type.block_size) != 0 || n > uint64_t(std::numeric_limits<int64_t>::max()))
        fail(QI_ARGUMENT, "%s is %llu; %s needs a multiple of its block size, %d", what,
             static_cast<unsigned long long>(n), type.name, type.block_size);
}

void check_rows(uint64_t n_elements, uint64_t n_per_row) {
    if (n_per_row == 0 || n_elements % n_per_row != 0)
        fail(QI_ARGUMENT, "n_elements is %llu, which is not a multiple of n_per_row, %llu",
             static_cast<unsigned long long>(n_elements),
             static_cast<unsigned long long>(n_per_row));
}

}  // namespace

int32_t qi_type_by_index(int32_t index, qi_type_info* out) {
    const auto layouts = all_layouts();
    if (!out || index < 0 || size_t(index) >= layouts.size()) return QI_ARGUMENT;
    const TypeLayout& layout = layouts[size_t(index)];
    const TypeTraits* type = find_type(layout.number);
    *out = {.type = layout.number,
            .name = {},
            .block_size = layout.block_size,
            .block_bytes = layout.block_bytes,
            .can_decode = type != nullptr,
            .can_encode = type != nullptr};
    std::memcpy(out->name, layout.name, std::strlen(layout.name));
    return QI_OK;
}

int32_t qi_type_decode(int32_t type, const void* blocks, uint64_t n_elements, float* out,
                       qi_error* error) {
    return guard(error, [&] {
        const TypeTraits& known = checked_type(type);
        require_pointer(blocks, "blocks");
        require_pointer(out, "out");
        check_count(known, "n_elements", n_elements);
        decode(known.type, static_cast<const std::byte*>(blocks), int64_t(n_elements), out);
    });
}

int32_t qi_type_encode(int32_t type, const float* values, uint64_t n_elements, uint64_t n_per_row,
                       const float* importance, void* blocks, qi_error* error) {
    return guard(error, [&] {
        const TypeTraits& known = checked_type(type);
        require_pointer(values, "values");
        require_pointer(blocks, "blocks");
        check_count(known, "n_per_row", n_per_row);
        check_count(known, "n_elements", n_elements);
        check_rows(n_elements, n_per_row);
        encode(known.type, values, int64_t(n_elements), int64_t(n_per_row), importance,
               static_cast<std::byte*>(blocks));
    });
}

int32_t qi_type_convert(int32_t from, const void* blocks, uint64_t n_elements, uint64_t n_per_row,
                        const float* importance, int32_t to, void* out, qi_error* error) {
    return guard(error, [&] {
        const TypeTraits& source = checked_type(from);
        const TypeTraits& target = checked_type(to);
        require_pointer(blocks, "blocks");
        for (const TypeTraits* type : {&source, &target}) {
            check_count(*type, "n_per_row", n_per_row);
            check_count(*type, "n_elements", n_elements);
        }
        check_rows(n_elements, n_per_row);
        convert(source.type, static_cast<const std::byte*>(blocks), int64_t(n_elements),
                int64_t(n_per_row), importance, target.type, static_cast<std::byte*>(out));
    });
}
