// Text that comes from files and callers: checking it, and showing it in messages.
#pragma once

#include <string>
#include <string_view>

namespace qi {

// Length of the longest prefix that is well-formed UTF-8; the whole length when all of it is.
size_t valid_utf8_length(std::string_view text);

inline bool is_utf8(std::string_view text) {
    return valid_utf8_length(text) == text.size();
}

// The text between single quotes, fit for a message: control characters and malformed bytes become
// \xNN, and what lies beyond max_bytes of the text becomes an ellipsis.
std::string quoted(std::string_view text, size_t max_bytes = 200);

}  // namespace qi
