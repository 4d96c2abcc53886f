#include "ptx_module.h"

#include <cctype>

namespace standin::ptx {
namespace {

bool is_space(char c) {
    return std::isspace(static_cast<unsigned char>(c)) != 0;
}

std::string trimmed(const std::string& text) {
    size_t begin = 0, end = text.size();
    while (begin < end && is_space(text[begin]))
        begin++;
    while (end > begin && is_space(text[end - 1]))
        end--;
    return text.substr(begin, end - begin);
}

// Words between white space.
std::vector<std::string> words_of(const std::string& text) {
    std::vector<std::string> words;
    for (size_t i = 0; i < text.size();) {
        if (is_space(text[i])) {
            i++;
            continue;
        }
        size_t end = i;
        while (end < text.size() && !is_space(text[end]))
            end++;
        words.push_back(text.substr(i, end - i));
        i = end;
    }
    return words;
}

// Comments become spaces, so that lines keep their numbers.
std::string without_comments(std::string text) {
    for (size_t at = 0; (at = text.find("//", at)) != std::string::npos;) {
        while (at < text.size() && text[at] != '\n')
            text[at++] = ' ';
    }
    if (text.find("/*") != std::string::npos) throw Unknown(1, "a comment of the form /* */");
    return text;
}

constexpr const char* scoped_prefix = "%scoped";

class Parser {
  public:
    explicit Parser(const std::string& text) : text_(without_comments(text)) {}

    Module parse() {
        Module module;
        while (skip_space()) {
            const std::string word = peek_word();
            if (word == ".version" || word == ".target" || word == ".address_size") {
                take_until('\n');
            } else if (word == ".visible" || word == ".entry") {
                module.entries.push_back(entry());
            } else {
                declaration(take_until(';'), module.shared);
            }
        }
        return module;
    }

  private:
    // False at the end.
    bool skip_space() {
        while (at_ < text_.size() && is_space(text_[at_]))
            line_ += text_[at_++] == '\n';
        return at_ < text_.size();
    }

    std::string peek_word() const {
        size_t end = at_;
        while (end < text_.size() && !is_space(text_[end]))
            end++;
        return text_.substr(at_, end - at_);
    }

    // The text before a character, which is passed.
    std::string take_until(char last) {
        std::string taken;
        while (at_ < text_.size() && text_[at_] != last) {
            line_ += text_[at_] == '\n';
            taken += text_[at_++];
        }
        if (at_ == text_.size()) throw Unknown(line_, std::string("the text ends before ") + last);
        line_ += text_[at_++] == '\n';
        return trimmed(taken);
    }

    // .shared variables; others are no use: kernels refer to none.
    void declaration(const std::string& text, std::vector<Variable>& shared) const {
        const std::vector<std::string> words = words_of(text);
        Variable variable;
        bool is_shared = false;
        std::string type;
        for (size_t i = 0; i < words.size(); i++) {
            const std::string& word = words[i];
            if (word == ".global" || word == ".const" || word == ".visible" || word == ".weak") {
                if (word == ".global" || word == ".const") return;
            } else if (word == ".extern") {
                variable.external = true;
            } else if (word == ".shared") {
                is_shared = true;
            } else if (word == ".align" && i + 1 < words.size()) {
                variable.align = std::stoul(words[++i]);
            } else if (word[0] == '.') {
                type = word.substr(1);
            } else {
                variable.name = word;
            }
        }
        if (!is_shared || type.empty() || variable.name.empty())
            throw Unknown(line_, "a declaration: " + text);
        const size_t bracket = variable.name.find('[');
        size_t n = 1;
        if (bracket != std::string::npos) {
            const std::string count = variable.name.substr(bracket + 1);
            n = variable.external ? 0 : std::stoul(count);
            if (count.find('[') != std::string::npos)
                throw Unknown(line_, "an array of arrays: " + text);
            variable.name.erase(bracket);
        }
        variable.bytes = n * bytes_of(type);
        shared.push_back(variable);
    }

    Entry entry() {
        Entry entry;
        std::string head = take_until('{');
        const size_t open = head.find('('), close = head.find(')');
        const std::vector<std::string> words = words_of(head.substr(0, open));
        if (words.size() < 2 || words[words.size() - 2] != ".entry")
            throw Unknown(line_, "what is no .entry: " + words.front());
        entry.name = words.back();
        if (open != std::string::npos) {
            for (const std::string& text : split(head.substr(open + 1, close - open - 1), ',')) {
                const std::vector<std::string> parts = words_of(text);
                // ".param .u64 .ptr .align 1 name": what it points to is of no interest.
                const bool is_pointer = parts.size() > 3 && parts[2] == ".ptr";
                if ((parts.size() != 3 && !is_pointer) || parts[0] != ".param" ||
                    parts.back().find('[') != std::string::npos)
                    throw Unknown(line_, "a parameter: " + text);
                entry.parameters.push_back({parts.back(), parts[1].substr(1)});
            }
            head.erase(0, close + 1);
        }
        const std::vector<std::string> directives = words_of(head);
        for (size_t i = 0; i < directives.size(); i++) {
            if (directives[i] == ".maxntid") {
                entry.max_threads = 1;
                for (i++; i < directives.size() && directives[i][0] != '.'; i++)
                    entry.max_threads *= std::stoi(directives[i]);
                i--;
            } else if (directives[i] == ".minnctapersm") {
                i++;
            } else {
                throw Unknown(line_, "the directive " + directives[i]);
            }
        }
        body(entry);
        return entry;
    }

    void body(Entry& entry) {
        entry.registers.push_back({"b16", scoped_prefix});
        int scoped = 0;         // registers of scopes so far
        std::string temporary;  // the one register of the scope we are in, by its name there
        while (skip_space()) {
            const int line = line_;
            if (text_[at_] == '}') {
                if (temporary.empty()) break;
                temporary.clear();
                at_++;
                continue;
            }
            if (text_[at_] == '{') {
                // "{ .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r1; }"
                at_++;
                const std::vector<std::string> words = words_of(take_until(';'));
                if (words.size() != 3 || words[0] != ".reg" || words[1] != ".b16" ||
                    !temporary.empty())
                    throw Unknown(line, "a scope of its own");
                temporary = words[2];
                scoped++;
                continue;
            }
            // A label; "ld.global.L1::no_allocate" is none.
            const size_t end = text_.find_first_of(":;{", at_);
            if (end != std::string::npos && text_.compare(end, 2, "::") != 0 && text_[end] == ':') {
                Statement label;
                label.line = line;
                label.label = take_until(':');
                entry.statements.push_back(label);
                continue;
            }
            const std::string text = take_until(';');
            const std::vector<std::string> words = words_of(text);
            if (words[0] == ".reg") {
                const std::string& name = words.back();
                entry.registers.push_back({words[1].substr(1), name.substr(0, name.find('<'))});
            } else if (words[0] == ".shared") {
                declaration(text, entry.shared);
            } else if (words[0] == ".pragma") {
                continue;  // hints of unrolling
            } else if (words[0][0] == '.' || words[0][0] == '{') {
                throw Unknown(line, text);
            } else {
                entry.statements.push_back(instruction(text, line));
                for (std::string& operand : entry.statements.back().operands) {
                    const size_t at =
                        temporary.empty() ? std::string::npos : operand.find(temporary);
                    if (at != std::string::npos)
                        operand.replace(at, temporary.size(),
                                        scoped_prefix + std::to_string(scoped));
                }
            }
        }
        take_until('}');
    }

    static Statement instruction(std::string text, int line) {
        Statement statement;
        statement.line = line;
        size_t at = 0;
        const auto word = [&] {
            size_t end = at;
            while (end < text.size() && !is_space(text[end]))
                end++;
            const std::string found = text.substr(at, end - at);
            while (end < text.size() && is_space(text[end]))
                end++;
            at = end;
            return found;
        };
        if (text[0] == '@') {
            statement.guard = word().substr(1);
            statement.negated = statement.guard[0] == '!';
            if (statement.negated) statement.guard.erase(0, 1);
        }
        // "mov.b64 {%r1,%r2}, %rd1" may have no space before the brace.
        const size_t brace = text.find('{', at);
        size_t space = at;
        while (space < text.size() && !is_space(text[space]))
            space++;
        if (brace != std::string::npos && brace < space) text.insert(brace, " ");
        statement.opcode = word();
        if (at < text.size()) statement.operands = split(text.substr(at), ',');
        return statement;
    }

    std::string text_;
    size_t at_ = 0;
    int line_ = 1;
};

}  // namespace

Module parse(const std::string& text) {
    return Parser(text).parse();
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (const char c : text) {
        if (c == '{' || c == '[' || c == '(') depth++;
        if (c == '}' || c == ']' || c == ')') depth--;
        if (c == separator && depth == 0) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    for (std::string& part : parts)
        part = trimmed(part);
    if (parts.size() == 1 && parts[0].empty()) parts.clear();
    return parts;
}

size_t bytes_of(const std::string& type) {
    if (type == "pred") return 1;
    const std::string digits = type.substr(1);
    for (const char* bits : {"8", "16", "32", "64"}) {
        if (digits == bits) return std::stoul(digits) / 8;
    }
    throw Unknown(0, "the type ." + type);
}

}  // namespace standin::ptx
