// Metadata values as numbers, bools and strings. `path` is for messages; a value of another type is
// a QI_FORMAT error that names path, key, the type found and the type wanted.
#pragma once

#include <string>

#include "gguf/file.h"

namespace qi::gguf {

uint64_t to_uint(const KeyValue& value, const std::string& path);  // any integer type, not negative
double to_float(const KeyValue& value, const std::string& path);   // f32 or f64
bool to_bool(const KeyValue& value, const std::string& path);
std::string to_string(const KeyValue& value, const std::string& path);
StringTable to_strings(const KeyValue& value, const std::string& path);  // a string or an array

}  // namespace qi::gguf
