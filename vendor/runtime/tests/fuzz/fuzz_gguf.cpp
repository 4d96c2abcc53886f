// Feeds any bytes to the GGUF reader and the model builder, touches all they let through, and runs
// the small models among them.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "engine/context.h"
#include "gguf/file.h"
#include "gguf/parse.h"
#include "model/model.h"

namespace {

using qi::gguf::File;

void require(bool holds) {
    if (!holds) __builtin_trap();
}

// Runs body, which may refuse the file but nothing else.
template <typename F>
void refusing(F&& body, bool may_be_unsupported = false) {
    try {
        body();
    } catch (const qi::Error& error) {
        require(error.status() == QI_FORMAT ||
                (may_be_unsupported && error.status() == QI_UNSUPPORTED));
        require(std::strlen(error.what()) > 0);
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

void run_model(const std::shared_ptr<const File>& file) {
    const auto model = std::make_shared<const qi::Model>(file, qi::ModelOptions{});
    qi::ContextOptions options;
    options.n_threads = 1;
    options.n_ctx = 4;
    const int64_t limit = model->n_ctx_max();
    if (limit != 0 && limit < options.n_ctx) options.n_ctx = limit;
    qi::Context context(model, options);
    std::vector<qi::FeedToken> tokens;
    for (int64_t i = 0; i < options.n_ctx; ++i)
        tokens.push_back({int32_t(i % model->hyper_params().n_vocab), 0, QI_WANT_LOGITS});
    context.feed(tokens);
    require(context.n_logits() == tokens.size());
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
        refusing([&] { run_model(file); }, /*may_be_unsupported=*/true);
    });
    return 0;
}
