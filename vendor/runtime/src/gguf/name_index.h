// Looking names up in a list.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace qi::gguf {

// A sorted list rather than a hash table: hostile names cannot make it slower than n log n.
class NameIndex {
  public:
    NameIndex() = default;
    // The bytes of the names must outlive the index. Among equal names the first is found.
    explicit NameIndex(std::vector<std::string_view> names);

    int64_t find(std::string_view name) const;  // position in the list, or -1
    int64_t duplicate() const;  // position of a name that stood in the list before, or -1

  private:
    std::vector<std::string_view> names_;
    std::vector<uint32_t> order_;  // positions, by name and then by position
};

// One index over items that have a name member.
template <typename Items, typename Name>
NameIndex index_names(const Items& items, Name name) {
    std::vector<std::string_view> names;
    names.reserve(items.size());
    for (const auto& item : items)
        names.push_back(item.*name);
    return NameIndex(std::move(names));
}

}  // namespace qi::gguf
