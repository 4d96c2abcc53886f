// How much static shared memory a kernel takes, read from its module's symbol table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace standin {

struct SharedSizes {
    std::map<std::string, uint32_t> by_function;
    uint32_t elsewhere = 0;  // of device functions, counted to every kernel of the module

    uint32_t of(const std::string& kernel) const {
        auto found = by_function.find(kernel);
        return elsewhere + (found == by_function.end() ? 0 : found->second);
    }
};

SharedSizes shared_sizes(const std::vector<std::byte>& image);

}  // namespace standin
