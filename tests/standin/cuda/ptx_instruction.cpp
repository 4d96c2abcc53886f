#include "ptx_instruction.h"

#include "ptx_opcode.h"
#include "ptx_operand.h"

namespace standin::ptx {
namespace {

std::string unsigned_of(const std::string& type) {
    return "u" + type.substr(1);
}

class Translator {
  public:
    Translator(const Statement& statement, const Scope& scope)
        : line_(std::to_string(statement.line)),
          opcode_(statement.opcode),
          operands_(statement, scope) {}

    std::string run() {
        const auto found = handlers().find(opcode_.base);
        if (found == handlers().end()) operands_.fail("an unknown instruction");
        const std::string text = (this->*found->second)();
        if (!opcode_.rest().empty()) operands_.fail("an unknown " + opcode_.rest());
        return text;
    }

  private:
    using Handler = std::string (Translator::*)();

    static const std::map<std::string, Handler>& handlers() {
        using T = Translator;
        static const std::map<std::string, Handler> all = {
            {"add", &T::sum},       {"sub", &T::sum},      {"mul", &T::mul},
            {"mad", &T::mad},       {"fma", &T::fma},      {"div", &T::div},
            {"rem", &T::div},       {"rcp", &T::rcp},      {"sqrt", &T::sqrt},
            {"ex2", &T::ex2},       {"min", &T::pick},     {"max", &T::pick},
            {"neg", &T::neg},       {"abs", &T::abs},      {"not", &T::bitwise},
            {"and", &T::bitwise},   {"or", &T::bitwise},   {"xor", &T::bitwise},
            {"shl", &T::shift},     {"shr", &T::shift},    {"bfi", &T::insert_bits},
            {"bfe", &T::bits},      {"bfind", &T::bits},   {"brev", &T::bits},
            {"popc", &T::bits},     {"clz", &T::bits},     {"prmt", &T::bits},
            {"dp4a", &T::dp4a},     {"setp", &T::setp},    {"selp", &T::selp},
            {"mov", &T::mov},       {"cvt", &T::cvt},      {"cvta", &T::cvta},
            {"ld", &T::ld},         {"st", &T::st},        {"atom", &T::atom},
            {"membar", &T::membar}, {"fence", &T::membar}, {"bar", &T::bar},
            {"shfl", &T::shfl},     {"vote", &T::vote},    {"ldmatrix", &T::ldmatrix},
            {"mma", &T::mma},       {"bra", &T::bra},      {"ret", &T::ret},
            {"exit", &T::ret},      {"trap", &T::trap},    {"nanosleep", &T::nanosleep},
        };
        return all;
    }

    // ---- arithmetic ----

    std::string in(size_t i, const std::string& type) const { return operands_.value(i, type); }
    std::string out(const std::string& type, const std::string& value) const {
        return operands_.assign(operands_.text(0), type, value);
    }

    // Without .rn the assembler would be free to fuse a product with a sum.
    void need(const char* rounding) {
        if (!opcode_.take(rounding)) operands_.fail(std::string("no .") + rounding);
    }

    std::string sum() {
        std::string type = opcode_.last();
        if (is_float(type)) {
            need("rn");
        } else {
            type = unsigned_of(type);
        }
        return out(type, in(1, type) + (opcode_.base == "add" ? " + " : " - ") + in(2, type));
    }

    // A product of integers and its type, by .lo, .hi or .wide.
    std::string product(std::string& type) {
        if (opcode_.take("wide")) {
            const std::string wide = type[0] + std::to_string(16 * bytes_of(type));
            const std::string a = in(1, type), b = in(2, type);
            type = wide;
            return cpp_type(wide) + "(" + a + ") * " + cpp_type(wide) + "(" + b + ")";
        }
        if (opcode_.take("hi")) {
            if (bytes_of(type) != 4) operands_.fail("a high product of ." + type);
            const std::string wide = cpp_type(type[0] + std::string("64"));
            return "(" + wide + "(" + in(1, type) + ") * " + wide + "(" + in(2, type) + ")) >> 32";
        }
        need("lo");
        type = unsigned_of(type);
        const std::string by = type == "u64" ? "u64" : "u32";
        return by + "(" + in(1, type) + ") * " + by + "(" + in(2, type) + ")";
    }

    std::string mul() {
        std::string type = opcode_.last();
        if (!is_float(type)) {
            const std::string value = product(type);
            return out(type, value);
        }
        need("rn");
        return out(type, in(1, type) + " * " + in(2, type));
    }

    std::string mad() {
        std::string type = opcode_.last();
        if (is_float(type)) operands_.fail("mad of floats");
        const std::string value = product(type);
        const std::string wrapping = unsigned_of(type);
        return out(type, cpp_type(wrapping) + "(" + value + ") + " + in(3, wrapping));
    }

    std::string fma() {
        const std::string type = opcode_.last(), rounding = opcode_.take_of({"rn", "rm"});
        if (type != "f32" || rounding.empty()) operands_.fail("an unknown fma");
        return out(type, "fma_" + rounding + "(" + in(1, type) + ", " + in(2, type) + ", " +
                             in(3, type) + ")");
    }

    std::string div() {
        const std::string type = opcode_.last();
        if (!is_float(type))
            return out(type, opcode_.base + "<" + cpp_type(type) + ">(" + in(1, type) + ", " +
                                 in(2, type) + ")");
        if (opcode_.base != "div") operands_.fail("a remainder of floats");
        need("rn");
        return out(type, in(1, type) + " / " + in(2, type));
    }

    std::string rcp() {
        const std::string type = opcode_.last();
        need("rn");
        return out(type, "1.0f / " + in(1, "f32"));
    }

    std::string sqrt() {
        need("rn");
        if (opcode_.last() != "f32") operands_.fail("an unknown type");
        return out("f32", "sqrt_rn(" + in(1, "f32") + ")");
    }

    std::string ex2() {
        need("approx");
        need("ftz");
        if (opcode_.last() != "f32") operands_.fail("an unknown type");
        return out("f32", "ex2_approx_ftz(" + in(1, "f32") + ")");
    }

    std::string pick() {
        const std::string type = opcode_.last();
        if (type == "f64") operands_.fail("an unknown type");
        const std::string given = is_float(type) ? "" : "<" + cpp_type(type) + ">";
        return out(type, opcode_.base + given + "(" + in(1, type) + ", " + in(2, type) + ")");
    }

    std::string neg() {
        std::string type = opcode_.last();
        if (type == "f32") return out(type, "neg(" + in(1, type) + ")");
        if (is_float(type)) operands_.fail("an unknown type");
        type = unsigned_of(type);
        return out(type, "0 - " + in(1, type));
    }

    std::string abs() {
        const std::string type = opcode_.last();
        if (type != "f32") operands_.fail("an unknown type");
        return out(type, "abs(" + in(1, type) + ")");
    }

    // ---- bits ----

    std::string bitwise() {
        const std::string type = opcode_.last();
        if (opcode_.base == "not") return out(type, (type == "pred" ? "!" : "~") + in(1, type));
        const char* sign = opcode_.base == "and" ? " & " : opcode_.base == "or" ? " | " : " ^ ";
        return out(type, in(1, type) + sign + in(2, type));
    }

    std::string shift() {
        const std::string type = opcode_.last();
        return out(type, opcode_.base + "<" + cpp_type(type) + ">(" + in(1, type) + ", " +
                             in(2, "u32") + ")");
    }

    std::string insert_bits() {
        const std::string type = opcode_.last();
        if (type != "b32" && type != "b64") operands_.fail("an unknown type");
        return out(type, "bfi(" + in(1, type) + ", " + in(2, type) + ", " + in(3, "u32") + ", " +
                             in(4, "u32") + ")");
    }

    // Of words of 32 bits.
    std::string bits() {
        static const std::map<std::string, const char*> names = {
            {"bfe", "bfe_s32"}, {"bfind", "bfind_shiftamt"},    {"brev", "brev"},
            {"clz", "clz"},     {"popc", "__builtin_popcount"}, {"prmt", "prmt"}};
        if (opcode_.base == "bfind") need("shiftamt");
        const std::string type = opcode_.last();
        if (opcode_.base == "bfe" ? type != "s32" : type != "b32" && type != "u32")
            operands_.fail("an unknown type");
        std::string call = std::string(names.at(opcode_.base)) + "(" + in(1, "u32");
        for (size_t i = 2; i < operands_.size(); i++)
            call += ", " + in(i, "u32");
        return out("u32", call + ")");
    }

    std::string dp4a() {
        if (opcode_.first() != "s32" || opcode_.first() != "s32") operands_.fail("unknown types");
        return out("u32", "dp4a(" + in(1, "u32") + ", " + in(2, "u32") + ", " + in(3, "u32") + ")");
    }

    // ---- choices ----

    std::string setp() {
        const std::string type = opcode_.last(), compare = opcode_.first();
        const std::string a = in(1, type), b = in(2, type);
        static const std::map<std::string, const char*> signs = {
            {"eq", " == "}, {"ne", " != "}, {"lt", " < "},  {"le", " <= "}, {"gt", " > "},
            {"ge", " >= "}, {"lo", " < "},  {"ls", " <= "}, {"hi", " > "},  {"hs", " >= "}};
        const std::string nan = "unordered(" + a + ", " + b + ")";
        if (compare == "num") return out("pred", "!" + nan);
        if (compare == "nan") return out("pred", nan);
        // The unordered forms of floats end in u: true of a NaN.
        const bool or_nan = is_float(type) && compare.size() == 3 && compare[2] == 'u';
        const auto sign = signs.find(or_nan ? compare.substr(0, 2) : compare);
        if (sign == signs.end()) operands_.fail("an unknown comparison");
        const std::string test = a + sign->second + b;
        if (or_nan) return out("pred", nan + " || " + test);
        if (is_float(type) && compare == "ne") return out("pred", "!" + nan + " && " + test);
        return out("pred", test);
    }

    std::string selp() {
        const std::string type = opcode_.last();
        return out(type, in(3, "pred") + " ? " + in(1, type) + " : " + in(2, type));
    }

    // ---- moves and conversions ----

    std::string mov() {
        const std::string type = opcode_.last();
        const auto to = operands_.elements(0), from = operands_.elements(1);
        if (to.size() == 1 && from.size() == 1) return out(type, in(1, type));
        // Packed from the low end, or unpacked.
        const size_t n = std::max(to.size(), from.size());
        const std::string part = "b" + std::to_string(8 * bytes_of(type) / n);
        const std::string width = std::to_string(8 * bytes_of(part));
        std::string whole, text;
        for (size_t i = 0; i < n; i++) {
            const std::string places = std::to_string(i) + " * " + width;
            if (from.size() == n) {
                whole += (i == 0 ? "" : " | ") + std::string("u64(") +
                         operands_.value(from[i], part) + ") << " + places;
            } else if (to[i] != "_") {  // a part that nobody wants
                text += operands_.assign(to[i], part, "whole >> " + places) + " ";
            }
        }
        if (from.size() == n && to.size() == 1) return out(type, whole);
        if (from.size() != 1) operands_.fail("vectors of different sizes");
        return "{ const u64 whole = " + in(1, type) + "; " + text + "}";
    }

    std::string cvt() {
        const std::string from = opcode_.last(), to = opcode_.last();
        const std::string a = in(1, from == "f16" ? "b16" : from);
        const std::string rounding = opcode_.take_of({"rn", "rzi"});
        const bool saturate = opcode_.take("sat");
        const std::string how = to + " " + rounding + (saturate ? "sat " : " ") + from;
        if (how == "f32  f16") return out(to, "f32_of_f16(" + a + ")");
        if (how == "f16 rn f32") return out("b16", "f16_of_f32(" + a + ")");
        if (how == "f32 sat f32") return out(to, "saturated(" + a + ")");
        if (how == "s32 rzi f32") return out(to, "rounded_to_zero(" + a + ")");
        if (how == "f64  f32") return out(to, a);
        const bool exact = rounding.empty() && !saturate;
        if (exact && !is_float(to) && !is_float(from)) return out(to, a);
        if (rounding == "rn" && !saturate && is_float(to) && !is_float(from))
            return out(to, cpp_type(to) + "(" + a + ")");
        operands_.fail("an unknown conversion");
    }

    std::string cvta() {
        const bool back = opcode_.take("to");
        const std::string space = opcode_.take_of({"global", "shared"}), type = opcode_.last();
        if (space.empty()) operands_.fail("an unknown space");
        if (space == "global") return out(type, in(1, type));
        return out(type, std::string(back ? "shared_of_generic" : "generic_of_shared") +
                             "(shared, " + in(1, type) + ")");
    }

    // ---- memory ----

    struct Access {
        bool ordered;  // not to be merged, left out or moved
        std::string space, type;
        size_t n;
    };

    Access access() {
        Access a;
        a.ordered = !opcode_.take_of({"volatile", "relaxed"}).empty();
        opcode_.take_of({"cta", "gpu", "sys"});
        a.space = opcode_.take_of({"global", "shared", "param"});
        for (const char* hint : {"L1::no_allocate", "L2::128B", "nc"})
            opcode_.take(hint);
        const std::string vector = opcode_.take_of({"v2", "v4"});
        a.n = vector.empty() ? 1 : vector == "v2" ? 2 : 4;
        a.type = opcode_.last();
        return a;
    }

    // A pointer to what an operand addresses.
    std::string pointer(const Access& a, size_t i, const char* kind) const {
        const std::string at = cpp_type(a.type) + ", " + std::to_string(a.n) + ">(";
        const std::string address = operands_.address(i) + ", ";
        if (a.space != "shared") return "global_at<" + at + address + line_ + ")";
        const char* values = kind == std::string("store") ? ", values)" : ")";
        return "shared_at<" + at + "shared, " + address + kind + ", " + line_ + values;
    }

    std::string ld() {
        const Access a = access();
        const auto to = operands_.elements(0);
        if (to.size() != a.n) operands_.fail("another number of registers");
        if (a.space == "param") {
            if (a.n != 1) operands_.fail("a vector of parameters");
            const size_t offset = operands_.parameter(1, bytes_of(a.type));
            return operands_.assign(
                to[0], a.type,
                "parameter<" + cpp_type(a.type) + ">(arguments, " + std::to_string(offset) + ")");
        }
        std::string text = "{ const " + std::string(a.ordered ? "volatile " : "") +
                           cpp_type(a.type) + "* const from = " + pointer(a, 1, "load") + "; ";
        for (size_t i = 0; i < a.n; i++)
            text += operands_.assign(to[i], a.type, "from[" + std::to_string(i) + "]") + " ";
        return text + "}";
    }

    std::string st() {
        const Access a = access();
        const auto from = operands_.elements(1);
        if (from.size() != a.n || a.space == "param") operands_.fail("an unknown store");
        const std::string type = cpp_type(a.type);
        std::string text = "{ const " + type + " values[] = {";
        for (const std::string& element : from)
            text += operands_.value(element, a.type) + ", ";
        text += std::string("}; ") + (a.ordered ? "volatile " : "") + type +
                "* const to = " + pointer(a, 0, "store") + "; ";
        for (size_t i = 0; i < a.n; i++) {
            const std::string at = "[" + std::to_string(i) + "]";
            text += "to" + at + " = values" + at + "; ";
        }
        return text + "}";
    }

    std::string atom() {
        const std::string operation = opcode_.take_of({"add", "min", "max"});
        const Access a = access();
        if (operation.empty() || is_float(a.type)) operands_.fail("an unknown operation");
        return out(a.type, "atom_" + operation + "(" + pointer(a, 1, "atomic") + ", " +
                               in(2, a.type) + ")");
    }

    std::string membar() {
        if (opcode_.base == "fence") opcode_.take_of({"sc", "acq_rel"});
        if (opcode_.take_of({"gl", "gpu", "sys", "cta"}).empty()) operands_.fail("no scope");
        return "membar();";
    }

    // ---- a block and a warp together ----

    std::string bar() {
        const bool of_warp = opcode_.take("warp");
        need("sync");
        if (of_warp) return "bar_warp_sync(" + in(0, "u32") + ");";
        if (operands_.size() != 1 || operands_.text(0) != "0") operands_.fail("not barrier 0");
        return "qi_standin_barrier_at(" + line_ + ");";
    }

    std::string shfl() {
        need("sync");
        const std::string mode = opcode_.take_of({"up", "down", "bfly", "idx"});
        if (mode.empty() || opcode_.last() != "b32") operands_.fail("an unknown shuffle");
        std::string text = "{ const Shuffled all = shfl_sync<Shuffle::" + mode + ">(";
        for (size_t i = 1; i <= 4; i++)
            text += in(i, "u32") + (i < 4 ? ", " : "); ");
        const auto targets = split(operands_.text(0), '|');
        text += operands_.assign(targets[0], "u32", "all.result") + " ";
        if (targets.size() > 1) text += operands_.assign(targets[1], "pred", "all.in_range");
        return text + "}";
    }

    std::string vote() {
        need("sync");
        const std::string mode = opcode_.take_of({"ballot", "all", "any"}), type = opcode_.last();
        const std::string mask = in(2, "u32");
        const std::string ballot = "vote_ballot(" + in(1, "pred") + ", " + mask + ")";
        if (mode == "ballot" && type == "b32") return out(type, ballot);
        if (mode == "any" && type == "pred") return out(type, ballot + " != 0");
        if (mode == "all" && type == "pred") return out(type, ballot + " == " + mask);
        operands_.fail("an unknown vote");
    }

    std::string ldmatrix() {
        for (const char* word : {"sync", "aligned", "m8n8", "shared", "b16"})
            need(word);
        const std::string number = opcode_.take_of({"x1", "x2", "x4"});
        const bool transposed = opcode_.take("trans");
        const auto to = operands_.elements(0);
        if (number.empty() || number.substr(1) != std::to_string(to.size()))
            operands_.fail("another number of registers");
        const std::string n = std::to_string(to.size());
        std::string text = "{ const MatrixLoad<" + n + "> all = ldmatrix<" + n + ", " +
                           (transposed ? "true" : "false") + ">(shared_at<u16, 8>(shared, " +
                           operands_.address(1) + ", load, " + line_ + "), " + line_ + "); ";
        for (size_t i = 0; i < to.size(); i++)
            text += operands_.assign(to[i], "b32", "all.words[" + std::to_string(i) + "]") + " ";
        return text + "}";
    }

    std::string mma() {
        for (const char* word : {"sync", "aligned", "row", "col"})
            need(word);
        const std::string shape = opcode_.first(), types = opcode_.rest();
        static const std::map<std::string, const char*> known = {
            {"m16n8k8.f32.f16.f16.f32", "f32, 16, 8, 2"},
            {"m16n8k16.f32.f16.f16.f32", "f32, 16, 16, 2"},
            {"m8n8k16.s32.s8.s8.s32", "i32, 8, 16, 4"},
            {"m16n8k16.s32.s8.s8.s32", "i32, 16, 16, 4"},
            {"m16n8k32.s32.s8.s8.s32", "i32, 16, 32, 4"}};
        const auto found = known.find(shape + types);
        if (found == known.end()) operands_.fail("an unknown product");
        while (!opcode_.rest().empty())
            opcode_.first();
        const std::string sum = types.substr(1, 3),
                          kind = std::string("Mma<") + found->second + ">";
        const auto list = [&](size_t i, const char* type) {
            std::string text = "{";
            for (const std::string& element : operands_.elements(i))
                text += operands_.value(element, type) + ", ";
            return text + "}";
        };
        // Braces take fewer values than there are places, so numbers are compared.
        std::string text = "{ " + kind + " all = {" + list(1, "b32") + ", " + list(2, "b32") +
                           ", " + list(3, sum.c_str()) + "}; ";
        for (size_t i = 1; i <= 3; i++)
            text += "static_assert(sizeof all." + std::string(1, " abd"[i]) +
                    " == " + std::to_string(4 * operands_.elements(i).size()) + "); ";
        text += "mma_sync(all, " + line_ + "); ";
        const auto to = operands_.elements(0);
        if (to.size() != operands_.elements(3).size())
            operands_.fail("another number of registers");
        for (size_t i = 0; i < to.size(); i++)
            text += operands_.assign(to[i], sum, "all.d[" + std::to_string(i) + "]") + " ";
        return text + "}";
    }

    // ---- the way ----

    std::string bra() {
        opcode_.take("uni");
        return "goto " + label_of(operands_.text(0)) + ";";
    }
    std::string ret() { return "return;"; }
    std::string trap() { return "qi_standin_trap();"; }
    std::string nanosleep() {
        need("u32");
        return "qi_standin_sleep(" + in(0, "u32") + ");";
    }

    const std::string line_;
    Opcode opcode_;
    Operands operands_;
};

}  // namespace

std::string translate(const Statement& statement, const Scope& scope) {
    const std::string text = Translator(statement, scope).run();
    if (statement.guard.empty()) return text;
    return std::string("if (") + (statement.negated ? "!" : "") + variable_of(statement.guard) +
           ") { " + text + " }";
}

}  // namespace standin::ptx
