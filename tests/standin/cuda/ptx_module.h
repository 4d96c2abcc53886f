// A PTX module as the real NVRTC writes it, taken apart into statements but not yet understood.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace standin::ptx {

// What the translator does not know: the compile fails with these words.
struct Unknown : std::runtime_error {
    Unknown(int line, const std::string& what)
        : std::runtime_error("line " + std::to_string(line) + ": " + what) {}
};

struct Variable {
    std::string name;
    size_t align = 1, bytes = 0;
    bool external = false;  // dynamic shared memory
};

struct Parameter {
    std::string name, type;  // type: "u64"
};

struct Registers {
    std::string type, prefix;  // "b32", "%r"
};

// A label or an instruction.
struct Statement {
    int line = 0;
    std::string label;
    std::string guard;  // the predicate of @p or @!p; empty: always
    bool negated = false;
    std::string opcode;                 // "ld.global.v4.u32"
    std::vector<std::string> operands;  // "%r1", "[%rd1+16]", "{%r1, %r2}", "%r1|%p1"
};

struct Entry {
    std::string name;
    std::vector<Parameter> parameters;
    int max_threads = 0;  // of .maxntid
    std::vector<Registers> registers;
    std::vector<Variable> shared;
    std::vector<Statement> statements;
};

struct Module {
    std::vector<Variable> shared;  // of all entries
    std::vector<Entry> entries;
};

Module parse(const std::string& text);

// Parts between separators outside of brackets, without spaces around them.
std::vector<std::string> split(const std::string& text, char separator);

// Bytes of a type: 4 of "f32".
size_t bytes_of(const std::string& type);

}  // namespace standin::ptx
