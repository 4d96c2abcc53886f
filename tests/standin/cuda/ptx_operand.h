// Operands of PTX instructions as C++ expressions.
#pragma once

#include <string>
#include <vector>

#include "ptx_instruction.h"

namespace standin::ptx {

class Operands {
  public:
    Operands(const Statement& statement, const Scope& scope)
        : statement_(statement), scope_(scope) {}

    size_t size() const { return statement_.operands.size(); }
    const std::string& text(size_t i) const;

    // The value of an operand as a type: a register (whose low bits count), a special register, a
    // literal or a shared variable's address.
    std::string value(size_t i, const std::string& type) const { return value(text(i), type); }
    std::string value(const std::string& operand, const std::string& type) const;

    // A statement that gives a register a value of the type; signed ones are extended.
    std::string assign(const std::string& target, const std::string& type,
                       const std::string& value) const;

    // "[register or symbol + offset]" as a 64-bit expression.
    std::string address(size_t i) const;
    // "[parameter + offset]" as the offset in the packed arguments.
    size_t parameter(size_t i, size_t bytes) const;

    // The elements of "{a, b}", or the operand alone.
    std::vector<std::string> elements(size_t i) const;

    [[noreturn]] void fail(const std::string& what) const;

  private:
    const std::string& type_of(const std::string& name) const;
    std::string literal(const std::string& text, const std::string& type) const;

    const Statement& statement_;
    const Scope& scope_;
};

inline bool is_float(const std::string& type) {
    return type == "f32" || type == "f64";
}

}  // namespace standin::ptx
