// Models cut into several files: what each part says of itself, and how parts are named.
#pragma once

#include <optional>
#include <string>

#include "gguf/parse.h"

namespace qi::gguf {

struct SplitFacts {
    uint32_t number;  // from 1, as in file names; the metadata counts from 0
    uint32_t count;
    std::optional<uint64_t> n_tensors;  // of all parts
};

// Nothing when the file is whole. QI_FORMAT when the keys contradict themselves.
std::optional<SplitFacts> split_facts(const Part& part, const std::string& path);

// Name of part `number` beside part `sibling.number` at `path`: "<model>-00002-of-00003.gguf".
// Nothing when the sibling's own name does not end as it should.
std::optional<std::string> split_path(const std::string& path, const SplitFacts& sibling,
                                      uint32_t number);

// "-00002-of-00003.gguf"
std::string split_suffix(uint32_t number, uint32_t count);

}  // namespace qi::gguf
