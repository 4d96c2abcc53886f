// qi_gguf_*: checks and translation, nothing else.
#include <algorithm>
#include <iterator>

#include "capi/guard.h"
#include "capi/handles.h"

using namespace qi;

namespace {

// The item at an index that came through the C boundary.
template <typename Item>
const Item& item_at(std::span<const Item> items, uint64_t index, const char* what,
                    const std::string& path) {
    if (index >= items.size())
        fail(QI_ARGUMENT, "%s has %zu %s; there is none at index %llu",
             quoted(path, path.size()).c_str(), items.size(), what,
             static_cast<unsigned long long>(index));
    return items[index];
}

// Position of an item in its list, or -1 for nullptr.
template <typename Item>
int64_t position(std::span<const Item> items, const Item* item) {
    return item ? item - items.data() : -1;
}

}  // namespace

int32_t qi_gguf_open(const char* path, uint64_t path_length, uint32_t flags,
                     qi_read_progress* progress, qi_gguf** out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(out, "out");
        *out = nullptr;
        if (flags & ~uint32_t(QI_GGUF_NO_MMAP | QI_GGUF_NO_TENSORS))
            fail(QI_ARGUMENT, "flags %u are not known", flags);
        const gguf::OpenOptions options{.use_mmap = !(flags & QI_GGUF_NO_MMAP),
                                        .with_tensors = !(flags & QI_GGUF_NO_TENSORS),
                                        .progress = progress};
        *out = new qi_gguf{gguf::File::open(checked_path(path, path_length), options)};
    });
}

void qi_gguf_close(qi_gguf* file) {
    delete file;
}

int32_t qi_gguf_get_info(const qi_gguf* file, qi_gguf_info* out) {
    if (!file || !out) return QI_ARGUMENT;
    const gguf::File& f = *file->file;
    *out = {.version = f.version(),
            .is_powerinfer = f.is_powerinfer(),
            .alignment = f.alignment(),
            .n_files = f.n_files(),
            .n_kv = f.values().size(),
            .n_tensors = f.tensors().size(),
            .n_bytes = f.n_bytes(),
            .header_bytes = f.header().size()};
    return QI_OK;
}

int32_t qi_gguf_get_kv(const qi_gguf* file, uint64_t index, qi_gguf_kv* out, qi_error* error) {
    return guard(error, [&] {
        require_pointer(file, "file");
        require_pointer(out, "out");
        const gguf::KeyValue& value =
            item_at(file->file->values(), index, "keys", file->file->path());
        *out = {.key = value.key.data(),
                .key_length = value.key.size(),
                .type = int32_t(value.type),
                .item_type = int32_t(value.item_type),
                .n_items = value.n_items,
                .data = value.data.data()};
    });
}

int64_t qi_gguf_find_kv(const qi_gguf* file, const char* key, uint64_t key_length) {
    if (!file || !key) return -1;
    return position(file->file->values(), file->file->find({key, key_length}));
}

int32_t qi_gguf_kv_strings(const qi_gguf* file, uint64_t index, const char** bytes,
                           const uint64_t** offsets, qi_error* error) {
    return guard(error, [&] {
        require_pointer(file, "file");
        require_pointer(bytes, "bytes");
        require_pointer(offsets, "offsets");
        const gguf::KeyValue& value =
            item_at(file->file->values(), index, "keys", file->file->path());
        const gguf::StringTable& table = file->file->strings(value);
        *bytes = table.bytes.data();
        *offsets = table.offsets.data();
    });
}

int32_t qi_gguf_get_tensor(const qi_gguf* file, uint64_t index, qi_gguf_tensor* out,
                           qi_error* error) {
    return guard(error, [&] {
        require_pointer(file, "file");
        require_pointer(out, "out");
        const gguf::TensorInfo& tensor =
            item_at(file->file->tensors(), index, "tensors", file->file->path());
        *out = {.name = tensor.name.data(),
                .name_length = tensor.name.size(),
                .type = tensor.type,
                .n_dims = tensor.n_dims,
                .dims = {},
                .n_bytes = tensor.n_bytes,
                .file_index = tensor.file,
                .file_offset = tensor.offset,
                .data = tensor.data};
        std::copy(std::begin(tensor.dims), std::end(tensor.dims), out->dims);
    });
}

int64_t qi_gguf_find_tensor(const qi_gguf* file, const char* name, uint64_t name_length) {
    if (!file || !name) return -1;
    return position(file->file->tensors(), file->file->find_tensor({name, name_length}));
}

const void* qi_gguf_header(const qi_gguf* file) {
    return file ? file->file->header().data() : nullptr;
}
