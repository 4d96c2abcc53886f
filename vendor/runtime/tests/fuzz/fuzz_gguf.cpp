// Feeds any bytes to the GGUF reader and touches all that it lets through.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/error.h"
#include "gguf/file.h"
#include "gguf/parse.h"

namespace {

using qi::gguf::File;

void require(bool holds) {
    if (!holds) __builtin_trap();
}

// Runs body, which may refuse the file but nothing else.
template <typename F>
void refusing(F&& body) {
    try {
        body();
    } catch (const qi::Error& error) {
        require(error.status() == QI_FORMAT && std::strlen(error.what()) > 0);
    }
}

void touch_value(const File& file, const qi::gguf::KeyValue& value) {
    require(file.find(value.key) == &value);
    for (const std::byte byte : value.data) {
        [[maybe_unused]] volatile std::byte sink = byte;
    }
    refusing([&] { file.require_uint(value.key); });
    refusing([&] { file.require_float(value.key); });
    refusing([&] { file.get_bool(value.key); });
    refusing([&] { file.require_string(value.key); });
    refusing([&] {
        const qi::gguf::StringTable& strings = file.strings(value);
        require(strings.size() == value.n_items);
        size_t n_bytes = 0;
        for (size_t i = 0; i < strings.size(); i++)
            n_bytes += strings[i].size();
        require(n_bytes == strings.bytes.size() && &file.strings(value) == &strings);
    });
}

void touch_tensor(const File& file, const qi::gguf::TensorInfo& tensor) {
    require(file.find_tensor(tensor.name) == &tensor);
    require(tensor.n_dims >= 1 && tensor.n_dims <= 4 && tensor.dims[0] > 0);
    if (tensor.n_bytes == 0) return;
    [[maybe_unused]] volatile std::byte sink = tensor.data[0];
    sink = tensor.data[tensor.n_bytes - 1];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const auto bytes = std::as_bytes(std::span(data, size));
    const std::string name = "input";
    refusing([&] { qi::gguf::parse_part(bytes, name, /*with_tensors=*/false); });
    refusing([&] {
        const auto file = File::parse(bytes, name);
        require(file->header().size() <= size && file->n_bytes() == size);
        for (const auto& value : file->values())
            touch_value(*file, value);
        for (const auto& tensor : file->tensors())
            touch_tensor(*file, tensor);
    });
    return 0;
}
