// One PTX statement as C++, in terms of ptx_unit.h and ptx_warp.h.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "ptx_module.h"

namespace standin::ptx {

// What an entry's statements may name.
struct Scope {
    struct Place {
        size_t offset;  // in the packed arguments
        std::string type;
    };
    std::map<std::string, std::string> registers;  // types by prefixes
    std::map<std::string, uint32_t> shared;        // addresses
    std::map<std::string, Place> parameters;
};

// The C++ names of a register, of a label and of a type.
std::string variable_of(const std::string& name);
std::string label_of(const std::string& label);
std::string cpp_type(const std::string& type);

// Throws Unknown for all that it does not know in full.
std::string translate(const Statement& statement, const Scope& scope);

}  // namespace standin::ptx
