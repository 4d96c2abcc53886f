// Sorted names and binary search.
#include "gguf/name_index.h"

#include <algorithm>
#include <numeric>

namespace qi::gguf {

NameIndex::NameIndex(std::vector<std::string_view> names)
    : names_(std::move(names)), order_(names_.size()) {
    std::iota(order_.begin(), order_.end(), 0u);
    std::ranges::stable_sort(order_, {}, [&](uint32_t i) { return names_[i]; });
}

int64_t NameIndex::find(std::string_view name) const {
    const auto found =
        std::ranges::lower_bound(order_, name, {}, [&](uint32_t i) { return names_[i]; });
    return found == order_.end() || names_[*found] != name ? -1 : int64_t(*found);
}

int64_t NameIndex::duplicate() const {
    const auto found = std::ranges::adjacent_find(
        order_, [&](uint32_t a, uint32_t b) { return names_[a] == names_[b]; });
    return found == order_.end() ? -1 : int64_t(*(found + 1));
}

}  // namespace qi::gguf
