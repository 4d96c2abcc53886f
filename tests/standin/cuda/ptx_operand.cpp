#include "ptx_operand.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>

namespace standin::ptx {
namespace {

const std::map<std::string, std::string> special_registers = {
    {"%tid.x", "qi_standin_lane->thread.x"},
    {"%tid.y", "qi_standin_lane->thread.y"},
    {"%tid.z", "qi_standin_lane->thread.z"},
    {"%ntid.x", "qi_standin_lane->block_dim.x"},
    {"%ntid.y", "qi_standin_lane->block_dim.y"},
    {"%ntid.z", "qi_standin_lane->block_dim.z"},
    {"%ctaid.x", "qi_standin_lane->block.x"},
    {"%ctaid.y", "qi_standin_lane->block.y"},
    {"%ctaid.z", "qi_standin_lane->block.z"},
    {"%nctaid.x", "qi_standin_lane->grid_dim.x"},
    {"%nctaid.y", "qi_standin_lane->grid_dim.y"},
    {"%nctaid.z", "qi_standin_lane->grid_dim.z"},
    {"%laneid", "lane_id()"},
    {"%clock64", "qi_standin_time()"},
    {"%globaltimer", "qi_standin_time()"},
};

std::string hex(uint64_t value) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llxull", static_cast<unsigned long long>(value));
    return text;
}

// Of "base + offset" or "base" without brackets.
struct Address {
    std::string base;
    long long offset;
};

Address parts_of(const std::string& operand) {
    const std::string inside = operand.substr(1, operand.size() - 2);
    const size_t plus = inside.find('+');
    if (plus == std::string::npos) return {inside, 0};
    return {inside.substr(0, plus), std::strtoll(inside.c_str() + plus + 1, nullptr, 0)};
}

}  // namespace

std::string variable_of(const std::string& name) {
    return name.substr(1) + "_";
}

std::string label_of(const std::string& label) {
    std::string name = "at";
    for (const char c : label)
        name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
    return name;
}

std::string cpp_type(const std::string& type) {
    if (type == "pred") return "bool";
    const std::string bits = type.substr(1);
    if (is_float(type)) return type;
    if (type[0] == 'b' || type[0] == 'u' || type == "f16") return "u" + bits;
    if (type[0] == 's') return "i" + bits;
    throw Unknown(0, "the type ." + type);
}

void Operands::fail(const std::string& what) const {
    std::string text = statement_.opcode;
    for (size_t i = 0; i < size(); i++)
        text += (i == 0 ? " " : ", ") + statement_.operands[i];
    throw Unknown(statement_.line, what + " in: " + text);
}

const std::string& Operands::text(size_t i) const {
    if (i >= size()) fail("too few operands");
    return statement_.operands[i];
}

const std::string& Operands::type_of(const std::string& name) const {
    const size_t digits = name.find_first_of("0123456789");
    const auto found = scope_.registers.find(name.substr(0, digits));
    if (found == scope_.registers.end()) fail("no register " + name);
    return found->second;
}

std::string Operands::literal(const std::string& text, const std::string& type) const {
    const bool single = text.compare(0, 2, "0f") == 0, twice = text.compare(0, 2, "0d") == 0;
    char* end = nullptr;
    const uint64_t value = single || twice ? std::strtoull(text.c_str() + 2, &end, 16)
                           : text[0] == '-'
                               ? static_cast<uint64_t>(std::strtoll(text.c_str(), &end, 0))
                               : std::strtoull(text.c_str(), &end, 0);
    if (*end == 'U') end++;
    if (*end != '\0') fail("the operand " + text);
    if (type == "pred") return value != 0 ? "true" : "false";
    if (single || twice) {
        if (bytes_of(type) != (single ? 4 : 8)) fail("a literal of another width");
        if (is_float(type)) return "as_" + type + "(" + hex(value) + ")";
    } else if (is_float(type)) {
        fail("an integer for a float");
    }
    return cpp_type(type) + "(" + hex(value) + ")";
}

std::string Operands::value(const std::string& operand, const std::string& type) const {
    if (operand[0] != '%') {
        const auto symbol = scope_.shared.find(operand);
        if (symbol != scope_.shared.end()) return cpp_type(type) + "(" + hex(symbol->second) + ")";
        return literal(operand, type);
    }
    const auto special = special_registers.find(operand);
    if (special != special_registers.end()) return cpp_type(type) + "(" + special->second + ")";
    const std::string& held = type_of(operand);
    const std::string name = variable_of(operand);
    if (type == "pred" || held == "pred") {
        if (type != held) fail("a predicate as ." + type);
        return name;
    }
    if (bytes_of(held) < bytes_of(type)) fail("a register too narrow for ." + type);
    if (is_float(type)) {
        if (held == type) return name;
        if (bytes_of(held) != bytes_of(type)) fail("a register too wide for ." + type);
        return "as_" + type + "(" + name + ")";
    }
    if (is_float(held)) return cpp_type(type) + "(bits(" + name + "))";
    return cpp_type(type) == cpp_type(held) ? name : cpp_type(type) + "(" + name + ")";
}

std::string Operands::assign(const std::string& target, const std::string& type,
                             const std::string& value) const {
    if (target[0] != '%') fail("no register to set");
    const std::string& held = type_of(target);
    const std::string name = variable_of(target) + " = ";
    if ((type == "pred") != (held == "pred")) fail("a predicate as ." + type);
    if (type == "pred") return name + value + ";";
    if (bytes_of(held) < bytes_of(type)) fail("a register too narrow for ." + type);
    if (is_float(held) == is_float(type)) {
        if (is_float(type) && type != held) fail("a register too wide for ." + type);
        return name + cpp_type(type) + "(" + value + ");";
    }
    if (bytes_of(held) != bytes_of(type)) fail("a register too wide for ." + type);
    if (is_float(type)) return name + "bits(" + cpp_type(type) + "(" + value + "));";
    return name + "as_" + held + "(" + cpp_type(type) + "(" + value + "));";
}

std::string Operands::address(size_t i) const {
    if (text(i)[0] != '[') fail("no address");
    const auto [base, offset] = parts_of(text(i));
    const bool narrow = base[0] == '%' && bytes_of(type_of(base)) == 4;
    std::string sum = value(base, narrow ? "u32" : "u64");
    if (narrow) sum = "u64(" + sum + ")";
    return offset == 0 ? sum : sum + " + " + hex(static_cast<uint64_t>(offset));
}

size_t Operands::parameter(size_t i, size_t bytes) const {
    const auto [base, offset] = parts_of(text(i));
    const auto found = scope_.parameters.find(base);
    if (found == scope_.parameters.end()) fail("no parameter " + base);
    if (offset < 0 || static_cast<size_t>(offset) + bytes > bytes_of(found->second.type))
        fail("beyond the parameter");
    return found->second.offset + static_cast<size_t>(offset);
}

std::vector<std::string> Operands::elements(size_t i) const {
    const std::string& operand = text(i);
    if (operand[0] != '{') return {operand};
    return split(operand.substr(1, operand.size() - 2), ',');
}

}  // namespace standin::ptx
