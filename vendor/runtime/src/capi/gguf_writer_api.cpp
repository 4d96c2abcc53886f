// qi_gguf_writer_*: checks and translation, nothing else.
#include "capi/guard.h"
#include "gguf/writer.h"

using namespace qi;

struct qi_gguf_writer {
    gguf::Writer writer;
};

namespace {

std::string_view checked_text(const char* text, uint64_t length, const char* name) {
    require_pointer(text, name);
    return {text, length};
}

// NULL is fine for no bytes at all.
std::span<const std::byte> checked_bytes(const void* data, uint64_t n_bytes) {
    if (n_bytes != 0) require_pointer(data, "data");
    return {static_cast<const std::byte*>(data), n_bytes};
}

}  // namespace

int32_t qi_gguf_writer_create(const char* path, uint64_t path_length, int32_t is_powerinfer,
                              uint32_t alignment, qi_gguf_writer** out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        *out = nullptr;
        const std::string checked = checked_path(path, path_length);
        *out = new qi_gguf_writer{gguf::Writer(checked, is_powerinfer != 0, alignment)};
    });
}

int32_t qi_gguf_writer_add_kv(qi_gguf_writer* writer, const char* key, uint64_t key_length,
                              int32_t type, int32_t item_type, uint64_t n_items, const void* data,
                              uint64_t n_bytes, qi_error* error) {
    return guard(error, [&] {
        require_pointer(writer, "writer");
        writer->writer.add_value(checked_text(key, key_length, "key"), gguf::ValueType(type),
                                 gguf::ValueType(item_type), n_items, checked_bytes(data, n_bytes));
    });
}

int32_t qi_gguf_writer_add_strings(qi_gguf_writer* writer, const char* key, uint64_t key_length,
                                   int32_t is_array, const char* bytes, const uint64_t* offsets,
                                   uint64_t n_items, qi_error* error) {
    return guard(error, [&] {
        require_pointer(writer, "writer");
        require_pointer(offsets, "offsets");
        const std::string_view name = checked_text(key, key_length, "key");
        require_pointer(bytes, "bytes");
        if (is_array) return writer->writer.add_strings(name, bytes, {offsets, n_items + 1});
        if (n_items != 1 || offsets[1] < offsets[0])
            fail(QI_ARGUMENT, "key %s: a single string is one item with ascending offsets",
                 quoted(name).c_str());
        writer->writer.add_string(name, {bytes + offsets[0], offsets[1] - offsets[0]});
    });
}

int32_t qi_gguf_writer_add_tensor(qi_gguf_writer* writer, const char* name, uint64_t name_length,
                                  int32_t type, uint32_t n_dims, const uint64_t* dims,
                                  qi_error* error) {
    return guard(error, [&] {
        require_pointer(writer, "writer");
        require_pointer(dims, "dims");
        writer->writer.add_tensor(checked_text(name, name_length, "name"), type, {dims, n_dims});
    });
}

int32_t qi_gguf_writer_write(qi_gguf_writer* writer, const void* data, uint64_t n_bytes,
                             qi_error* error) {
    return guard(error, [&] {
        require_pointer(writer, "writer");
        writer->writer.write(checked_bytes(data, n_bytes));
    });
}

int32_t qi_gguf_writer_finish(qi_gguf_writer* writer, qi_error* error) {
    return guard(error, [&] {
        require_pointer(writer, "writer");
        writer->writer.finish();
    });
}

void qi_gguf_writer_close(qi_gguf_writer* writer) {
    delete writer;
}
