#include "ptx_translate.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "ptx_instruction.h"

namespace standin::ptx {
namespace {

// As ptx_unit.h has them.
constexpr uint32_t static_base = 0x400, dynamic_base = 0x1000000;

size_t align_up(size_t n, size_t to) {
    return (n + to - 1) / to * to;
}

// Registers of a statement, by the names that occur in its operands.
void find_registers(const Statement& statement, const Scope& scope, std::set<std::string>& found) {
    std::vector<std::string> texts = statement.operands;
    texts.push_back(statement.guard);
    for (const std::string& text : texts) {
        for (size_t at = text.find('%'); at != std::string::npos; at = text.find('%', at + 1)) {
            size_t digits = at + 1;
            while (digits < text.size() && std::isalpha(static_cast<unsigned char>(text[digits])))
                digits++;
            size_t end = digits;
            while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end])))
                end++;
            if (end != digits && scope.registers.contains(text.substr(at, digits - at)))
                found.insert(text.substr(at, end - at));
        }
    }
}

class Unit {
  public:
    explicit Unit(const Module& module) : module_(module) {}

    std::string text() {
        for (const Entry& entry : module_.entries)
            add(entry);
        // All shared variables of the module are one: an entry's begin where those of all end.
        return "namespace ptx {\n"
               "static thread_local char variables[" +
               std::to_string(std::max<size_t>(shared_bytes_, 1)) +
               "] __attribute__((aligned(16)));\n" + functions_ +
               "}  // namespace ptx\n"
               "extern \"C\" __attribute__((visibility(\"default\"))) "
               "const QiKernel qi_standin_kernels[] = {\n" +
               table_ + "{}};\n";
    }

  private:
    void add(const Entry& entry) {
        Scope scope;
        for (const Registers& registers : entry.registers)
            scope.registers[registers.prefix] = registers.type;
        size_t bytes = 0;
        for (const auto* variables : {&module_.shared, &entry.shared}) {
            for (const Variable& variable : *variables) {
                if (variable.align > 16) throw Unknown(0, "the alignment of " + variable.name);
                bytes = align_up(bytes, variable.align);
                scope.shared[variable.name] =
                    variable.external ? dynamic_base : static_base + static_cast<uint32_t>(bytes);
                bytes += variable.bytes;
            }
        }
        shared_bytes_ = std::max(shared_bytes_, bytes);
        describe(entry, scope);

        std::set<std::string> registers;
        std::string body;
        for (const Statement& statement : entry.statements) {
            if (!statement.label.empty()) {
                body += label_of(statement.label) + ":;\n";
                continue;
            }
            find_registers(statement, scope, registers);
            body += translate(statement, scope) + "\n";
        }
        functions_ += "static void " + entry.name + "(const u8* arguments) {\n" +
                      "[[maybe_unused]] const Shared shared = {variables, " +
                      std::to_string(bytes) + ", qi_standin_dynamic_shared()};\n";
        for (const std::string& name : registers) {
            const std::string type =
                scope.registers.at(name.substr(0, name.find_first_of("0123456789")));
            functions_ +=
                cpp_type(type) + " " + variable_of(name) +
                (type == "pred" ? " = false;\n" : " = unset<" + cpp_type(type) + ">();\n");
        }
        functions_ += body + "}\n";
    }

    // Parameters are packed as the shim's Arguments does.
    void describe(const Entry& entry, Scope& scope) {
        std::string sizes, offsets;
        size_t total = 0;
        for (const Parameter& parameter : entry.parameters) {
            const size_t bytes = bytes_of(parameter.type);
            total = align_up(total, bytes);
            scope.parameters[parameter.name] = {total, parameter.type};
            sizes += std::to_string(bytes) + ", ";
            offsets += std::to_string(total) + ", ";
            total += bytes;
        }
        functions_ += "static const unsigned " + entry.name + "_sizes[] = {" + sizes + "0}, " +
                      entry.name + "_offsets[] = {" + offsets + "0};\n";
        table_ += "{\"" + entry.name + "\", ptx::" + entry.name + ", " +
                  std::to_string(entry.parameters.size()) + ", ptx::" + entry.name +
                  "_sizes, ptx::" + entry.name + "_offsets, " + std::to_string(total) + ", " +
                  std::to_string(entry.max_threads) + "},\n";
    }

    const Module& module_;
    size_t shared_bytes_ = 0;
    std::string functions_, table_;
};

}  // namespace

std::string translate_module(const std::string& text) {
    const Module module = parse(text);
    return Unit(module).text();
}

}  // namespace standin::ptx
