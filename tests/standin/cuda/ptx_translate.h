// PTX as a C++ unit that the host compiler makes a module of.
#pragma once

#include <string>

namespace standin::ptx {

// Throws Unknown for PTX that is not known in full.
std::string translate_module(const std::string& text);

}  // namespace standin::ptx
