// Opening GGUF files, split ones included, and looking things up in them.
#include "gguf/file.h"

#include <atomic>
#include <filesystem>
#include <mutex>

#include "base/error.h"
#include "base/text.h"
#include "gguf/name_index.h"
#include "gguf/parse.h"
#include "gguf/split.h"
#include "gguf/values.h"

namespace qi::gguf {

struct File::Impl {
    std::string path;
    std::vector<std::unique_ptr<MappedFile>>
        mappings;  // one per part; none when parsed from memory
    std::span<const std::byte> first_bytes;
    Part first;
    std::vector<TensorInfo> tensors;  // of all parts
    uint32_t n_files = 0;
    uint64_t n_bytes = 0;
    NameIndex tensor_index;
    std::mutex tables_mutex;
    std::vector<std::unique_ptr<const StringTable>> tables;  // by value; null until asked for

    [[noreturn]] void refuse(const std::string& what) const {
        throw Error(QI_FORMAT, quoted(path, path.size()) + ": " + what);
    }

    [[noreturn]] void refuse_absent(std::string_view key) const {
        refuse(format("key %s is missing", quoted(key).c_str()));
    }

    // Descriptions alone are a few pages: mapping them beats reading a whole model into memory.
    static bool maps(const OpenOptions& options) {
        return options.use_mmap || !options.with_tensors;
    }

    // Counts a file that is about to be read; that it cannot be is found out when it is.
    static void announce(const std::string& file_path, const OpenOptions& options) {
        if (!options.progress || maps(options)) return;
        std::error_code problem;
        const uint64_t size = std::filesystem::file_size(file_path, problem);
        if (!problem)
            std::atomic_ref(options.progress->n_bytes).fetch_add(size, std::memory_order_relaxed);
    }

    std::span<const std::byte> map(const std::string& file_path, const OpenOptions& options) {
        mappings.push_back(maps(options)
                               ? std::make_unique<MappedFile>(file_path)
                               : std::make_unique<MappedFile>(file_path, options.progress));
        return mappings.back()->bytes();
    }

    void add_tensors(const Part& part, std::span<const std::byte> bytes) {
        for (TensorInfo tensor : part.tensors) {
            tensor.file = n_files;
            tensors.push_back(tensor);
        }
        n_files++;
        n_bytes += bytes.size();
    }

    void set_first(std::span<const std::byte> bytes, bool with_tensors) {
        first_bytes = bytes;
        first = parse_part(bytes, path, with_tensors);
        add_tensors(first, bytes);
    }

    void add_other_part(const std::string& part_path, uint32_t number, const SplitFacts& split,
                        const OpenOptions& options) {
        const auto bytes = map(part_path, options);
        const Part part = parse_part(bytes, part_path, options.with_tensors);
        const auto facts = split_facts(part, part_path);
        if (!facts || facts->number != number || facts->count != split.count ||
            facts->n_tensors != split.n_tensors)
            fail(QI_FORMAT, "%s: does not say of itself that it is part %u of %u of this model",
                 quoted(part_path, part_path.size()).c_str(), number, split.count);
        add_tensors(part, bytes);
    }

    void add_other_parts(const SplitFacts& split, const OpenOptions& options) {
        const auto first_path = split_path(path, split, 1);
        if (split.number != 1)
            refuse(format("is part %u of %u of a split model; open %s", split.number, split.count,
                          first_path ? quoted(*first_path, first_path->size()).c_str()
                                     : "part 1, which finds the others"));
        if (!first_path)
            refuse(
                format("is part 1 of %u of a split model, but its name does not end in '%s', so "
                       "the other parts cannot be found",
                       split.count, split_suffix(1, split.count).c_str()));
        for (uint32_t number = 2; number <= split.count; number++)
            announce(*split_path(path, split, number), options);
        for (uint32_t number = 2; number <= split.count; number++) {
            try {
                add_other_part(*split_path(path, split, number), number, split, options);
            } catch (const Error& failure) {
                throw Error(failure.status(), format("%s: part %u of %u cannot be used: %s",
                                                     quoted(path, path.size()).c_str(), number,
                                                     split.count, failure.what()));
            }
        }
        if (split.n_tensors && *split.n_tensors != tensors.size())
            refuse(format("says that its %u parts hold %llu tensors, but they hold %zu",
                          split.count, static_cast<unsigned long long>(*split.n_tensors),
                          tensors.size()));
    }

    void build_indices() {
        tensor_index = index_names(tensors, &TensorInfo::name);
        const int64_t twice = tensor_index.duplicate();
        if (twice >= 0)
            refuse(format("tensor %s stands in more than one part",
                          quoted(tensors[size_t(twice)].name).c_str()));
        tables.resize(first.values.size());
    }
};

File::File() : impl_(std::make_unique<Impl>()) {}
File::~File() = default;

std::shared_ptr<const File> File::open(const std::string& path, const OpenOptions& options) {
    std::shared_ptr<File> file(new File());
    Impl& impl = *file->impl_;
    impl.path = path;
    Impl::announce(path, options);
    impl.set_first(impl.map(path, options), options.with_tensors);
    if (const auto split = split_facts(impl.first, path)) impl.add_other_parts(*split, options);
    impl.build_indices();
    return file;
}

std::shared_ptr<const File> File::parse(std::span<const std::byte> bytes, const std::string& name) {
    std::shared_ptr<File> file(new File());
    Impl& impl = *file->impl_;
    impl.path = name;
    impl.set_first(bytes, true);
    if (const auto split = split_facts(impl.first, name))
        impl.refuse(format("is part %u of %u of a split model, which is opened by its path",
                           split->number, split->count));
    impl.build_indices();
    return file;
}

const std::string& File::path() const {
    return impl_->path;
}
uint32_t File::version() const {
    return impl_->first.version;
}
bool File::is_powerinfer() const {
    return impl_->first.is_powerinfer;
}
uint32_t File::alignment() const {
    return impl_->first.alignment;
}
uint32_t File::n_files() const {
    return impl_->n_files;
}
uint64_t File::n_bytes() const {
    return impl_->n_bytes;
}
std::span<const std::byte> File::header() const {
    return impl_->first_bytes.first(impl_->first.header_bytes);
}
std::span<const KeyValue> File::values() const {
    return impl_->first.values;
}
std::span<const TensorInfo> File::tensors() const {
    return impl_->tensors;
}

const KeyValue* File::find(std::string_view key) const {
    const int64_t found = impl_->first.key_index.find(key);
    return found < 0 ? nullptr : &impl_->first.values[size_t(found)];
}

const TensorInfo* File::find_tensor(std::string_view name) const {
    const int64_t found = impl_->tensor_index.find(name);
    return found < 0 ? nullptr : &impl_->tensors[size_t(found)];
}

std::optional<uint64_t> File::get_uint(std::string_view key) const {
    const KeyValue* value = find(key);
    return value ? std::optional(to_uint(*value, path())) : std::nullopt;
}

std::optional<double> File::get_float(std::string_view key) const {
    const KeyValue* value = find(key);
    return value ? std::optional(to_float(*value, path())) : std::nullopt;
}

std::optional<bool> File::get_bool(std::string_view key) const {
    const KeyValue* value = find(key);
    return value ? std::optional(to_bool(*value, path())) : std::nullopt;
}

std::optional<std::string> File::get_string(std::string_view key) const {
    const KeyValue* value = find(key);
    return value ? std::optional(to_string(*value, path())) : std::nullopt;
}

uint64_t File::require_uint(std::string_view key) const {
    if (const auto found = get_uint(key)) return *found;
    impl_->refuse_absent(key);
}

double File::require_float(std::string_view key) const {
    if (const auto found = get_float(key)) return *found;
    impl_->refuse_absent(key);
}

std::string File::require_string(std::string_view key) const {
    if (auto found = get_string(key)) return std::move(*found);
    impl_->refuse_absent(key);
}

const StringTable& File::strings(const KeyValue& value) const {
    const auto index = size_t(&value - impl_->first.values.data());
    const std::lock_guard lock(impl_->tables_mutex);
    auto& table = impl_->tables.at(index);
    if (!table) table = std::make_unique<const StringTable>(to_strings(value, path()));
    return *table;
}

}  // namespace qi::gguf
