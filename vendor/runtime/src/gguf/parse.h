// One GGUF file's header, from bytes to a checked description.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "gguf/file.h"
#include "gguf/name_index.h"

namespace qi::gguf {

struct Part {
    uint32_t version = 0;
    bool is_powerinfer = false;
    uint32_t alignment = 0;
    uint64_t header_bytes = 0;
    std::vector<KeyValue> values;  // keys are unique
    NameIndex key_index;
    std::vector<TensorInfo> tensors;  // names are unique, file is 0
};

// `path` is for messages. Views in the result point into `bytes`.
Part parse_part(std::span<const std::byte> bytes, const std::string& path, bool with_tensors);

}  // namespace qi::gguf
