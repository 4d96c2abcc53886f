// UTF-8 checking and quoting.
#include "base/text.h"

#include <cstdint>

#include "base/error.h"

namespace qi {

namespace {

// Bytes of the well-formed character at the start of a text that is not empty; 0 when malformed.
size_t utf8_character_length(std::string_view text) {
    const auto byte = [&](size_t i) { return uint8_t(text[i]); };
    const uint8_t lead = byte(0);
    if (lead < 0x80) return 1;
    const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4 || text.size() < length) return 0;
    // The second byte's range rules out overlong forms, surrogates and values past U+10FFFF.
    const uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (byte(1) < low || byte(1) > high) return 0;
    for (size_t i = 2; i < length; i++) {
        if ((byte(i) & 0xc0) != 0x80) return 0;
    }
    return length;
}

}  // namespace

size_t valid_utf8_length(std::string_view text) {
    size_t at = 0;
    while (at < text.size()) {
        const size_t length = utf8_character_length(text.substr(at));
        if (length == 0) break;
        at += length;
    }
    return at;
}

std::string quoted(std::string_view text, size_t max_bytes) {
    std::string out = "'";
    size_t at = 0;
    while (at < text.size()) {
        const size_t length = utf8_character_length(text.substr(at));
        if (at + (length ? length : 1) > max_bytes) {
            out += "…";
            break;
        }
        const auto byte = uint8_t(text[at]);
        if (length == 0 || byte < 0x20 || byte == 0x7f) {
            out += format("\\x%02x", byte);
            at++;
        } else {
            out += text.substr(at, length);
            at += length;
        }
    }
    return out + "'";
}

}  // namespace qi
