// The C boundary: every exception becomes a status and a message.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "qinfer.h"

namespace qi {

// Fills the caller's slot without allocating. A message too long is cut between characters;
// malformed bytes become '?'.
inline int32_t report(qi_error* error, qi_status status, std::string_view message) noexcept {
    if (error == nullptr) return status;
    error->status = status;
    constexpr size_t capacity = sizeof error->message - 1;
    size_t used = 0;
    while (!message.empty() && used < capacity) {
        const size_t valid = valid_utf8_length(message);
        const size_t length =
            valid_utf8_length(message.substr(0, std::min(valid, capacity - used)));
        std::memcpy(error->message + used, message.data(), length);
        used += length;
        message.remove_prefix(length);
        if (length < valid || message.empty() || used == capacity) break;
        error->message[used++] = '?';
        message.remove_prefix(1);
    }
    error->message[used] = '\0';
    return status;
}

// As much of the text as fits, cut between characters, and a NUL.
inline void copy_text(char* out, size_t capacity, std::string_view text) {
    size_t length = text.size();
    if (length >= capacity) {
        length = capacity - 1;
        while (length > 0 && (text[length] & 0xC0) == 0x80)
            --length;
    }
    std::memcpy(out, text.data(), length);
    out[length] = '\0';
}

// Runs body() and turns whatever it throws into a status; QI_OK leaves the error slot alone.
// `function` is the caller's name, all there is to say of an allocation that fails anywhere.
template <typename F>
int32_t guard(qi_error* error, F&& body, const char* function = __builtin_FUNCTION()) noexcept {
    try {
        body();
        return QI_OK;
    } catch (const Error& failure) {
        return report(error, failure.status(), failure.what());
    } catch (const std::bad_alloc&) {
        // On the stack: nothing can be allocated now.
        char message[sizeof error->message];
        const int length =
            std::snprintf(message, sizeof message, "no memory is left for what %s needs", function);
        return report(error, QI_MEMORY, {message, std::min(size_t(length), sizeof message - 1)});
    } catch (const std::exception& failure) {
        return report(error, QI_INTERNAL, failure.what());
    } catch (...) {
        return report(error, QI_INTERNAL, "an exception of unknown kind");
    }
}

// For arguments of C functions that must not be NULL.
inline void require_pointer(const void* pointer, const char* name) {
    if (pointer == nullptr) fail(QI_ARGUMENT, "argument '%s' is NULL", name);
}

// A path that came as pointer and length.
inline std::string checked_path(const char* path, uint64_t length) {
    require_pointer(path, "path");
    const std::string checked(path, length);
    if (checked.empty()) fail(QI_ARGUMENT, "the path is empty");
    if (checked.find('\0') != std::string::npos)
        fail(QI_ARGUMENT, "the path %s contains a NUL character", quoted(checked).c_str());
    return checked;
}

}  // namespace qi
