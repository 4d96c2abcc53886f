// Split files, as llama.cpp writes them.
#include "gguf/split.h"

#include "base/error.h"
#include "base/text.h"
#include "gguf/values.h"

namespace qi::gguf {

namespace {

constexpr uint64_t max_parts = 65535;  // split.count is a u16

std::optional<uint64_t> find_uint(const Part& part, const char* key, const std::string& path) {
    const int64_t found = part.key_index.find(key);
    if (found < 0) return std::nullopt;
    return to_uint(part.values[size_t(found)], path);
}

}  // namespace

std::optional<SplitFacts> split_facts(const Part& part, const std::string& path) {
    const uint64_t count = find_uint(part, "split.count", path).value_or(0);
    if (count <= 1) return std::nullopt;
    const uint64_t number = find_uint(part, "split.no", path).value_or(count);
    if (count > max_parts || number >= count)
        fail(QI_FORMAT, "%s: split.no is missing or out of range for a split.count of %llu",
             quoted(path, path.size()).c_str(), static_cast<unsigned long long>(count));
    return SplitFacts{uint32_t(number) + 1, uint32_t(count),
                      find_uint(part, "split.tensors.count", path)};
}

std::string split_suffix(uint32_t number, uint32_t count) {
    return format("-%05u-of-%05u.gguf", number, count);
}

std::optional<std::string> split_path(const std::string& path, const SplitFacts& sibling,
                                      uint32_t number) {
    const std::string suffix = split_suffix(sibling.number, sibling.count);
    if (!path.ends_with(suffix)) return std::nullopt;
    return path.substr(0, path.size() - suffix.size()) + split_suffix(number, sibling.count);
}

}  // namespace qi::gguf
