#include "source_scan.h"

#include <algorithm>
#include <cctype>
#include <cstring>

namespace standin {
namespace {

bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
}

// Behind the comment, string or character literal that starts at i, or i.
size_t skip_opaque(const std::string& text, size_t i) {
    if (text.compare(i, 2, "//") == 0) return std::min(text.find('\n', i), text.size());
    if (text.compare(i, 2, "/*") == 0) {
        const size_t end = text.find("*/", i + 2);
        return end == std::string::npos ? text.size() : end + 2;
    }
    if (text[i] != '"' && text[i] != '\'') return i;
    // In 1'000 the quote separates digits.
    if (text[i] == '\'' && i > 0 && std::isdigit(static_cast<unsigned char>(text[i - 1]))) return i;
    for (size_t j = i + 1; j < text.size(); j++) {
        if (text[j] == '\\') {
            j++;
        } else if (text[j] == text[i]) {
            return j + 1;
        } else if (text[j] == '\n') {
            return i;
        }
    }
    return text.size();
}

struct Token {
    std::string text;
    size_t at;
};

// Words and single characters; strings are tokens, comments and line directives are none.
std::vector<Token> tokens_of(const std::string& text) {
    std::vector<Token> tokens;
    for (size_t i = 0; i < text.size();) {
        if (text[i] == '#' && (i == 0 || text[i - 1] == '\n')) {
            i = std::min(text.find('\n', i), text.size());
        } else if (const size_t end = skip_opaque(text, i); end != i) {
            if (text[i] == '"') tokens.push_back({text.substr(i, end - i), i});
            i = end;
        } else if (is_word(text[i])) {
            size_t end_of_word = i;
            while (end_of_word < text.size() && is_word(text[end_of_word]))
                end_of_word++;
            tokens.push_back({text.substr(i, end_of_word - i), i});
            i = end_of_word;
        } else {
            if (!std::isspace(static_cast<unsigned char>(text[i])))
                tokens.push_back({std::string(1, text[i]), i});
            i++;
        }
    }
    return tokens;
}

// Behind the parenthesis that closes the one at i.
size_t close_of(const std::vector<Token>& tokens, size_t i) {
    int depth = 0;
    for (; i < tokens.size(); i++) {
        if (tokens[i].text == "(") depth++;
        if (tokens[i].text == ")" && --depth == 0) return i + 1;
    }
    return i;
}

}  // namespace

std::vector<KernelName> find_kernels(const std::string& preprocessed) {
    std::vector<KernelName> kernels;
    const std::vector<Token> tokens = tokens_of(preprocessed);
    for (size_t i = 2; i < tokens.size(); i++) {
        if (tokens[i].text != "__global__" || tokens[i - 1].text != "\"C\"" ||
            tokens[i - 2].text != "extern")
            continue;
        KernelName kernel{"", "0"};
        for (size_t j = i + 1; j + 1 < tokens.size(); j++) {
            if (tokens[j].text == "__launch_bounds__") {
                const size_t end = close_of(tokens, j + 1);
                kernel.max_threads.clear();
                int depth = 0;
                for (size_t k = j + 2; k + 1 < end; k++) {
                    if (tokens[k].text == "(") depth++;
                    if (tokens[k].text == ")") depth--;
                    if (tokens[k].text == "," && depth == 0) break;
                    kernel.max_threads += tokens[k].text + " ";
                }
                j = end - 1;
            } else if (tokens[j + 1].text == "(") {
                kernel.name = tokens[j].text;
                break;
            }
        }
        const bool known = std::any_of(kernels.begin(), kernels.end(),
                                       [&](const KernelName& k) { return k.name == kernel.name; });
        if (!kernel.name.empty() && !known) kernels.push_back(kernel);
    }
    return kernels;
}

std::string with_dynamic_shared(const std::string& text) {
    std::string out;
    int depth = 0;
    for (size_t i = 0; i < text.size();) {
        if (const size_t end = skip_opaque(text, i); end != i) {
            out.append(text, i, end - i);
            i = end;
            continue;
        }
        if (text[i] == '{') depth++;
        if (text[i] == '}') depth--;
        const bool word = is_word(text[i]) && (i == 0 || !is_word(text[i - 1]));
        const size_t end = word && text.compare(i, 6, "extern") == 0 ? text.find(';', i) : i;
        const std::string declaration =
            end != i && end != std::string::npos ? text.substr(i, end - i) : "";
        const size_t shared = declaration.find("__shared__");
        const size_t bracket = declaration.rfind('[');
        if (shared == std::string::npos || bracket == std::string::npos ||
            declaration.find('{') != std::string::npos) {
            out += text[i++];
            continue;
        }
        // extern __shared__ <attributes> T name[]
        std::vector<Token> tokens = tokens_of(declaration);
        std::string type, name;
        for (size_t t = 0; t < tokens.size() && tokens[t].at < bracket; t++) {
            const std::string& word_here = tokens[t].text;
            if (word_here == "extern" || word_here == "__shared__") continue;
            if (word_here == "__align__" || word_here == "alignas" ||
                word_here == "__attribute__") {
                t = close_of(tokens, t + 1) - 1;
                continue;
            }
            if (!name.empty()) type += name + " ";
            name = word_here;
        }
        const std::string value = "reinterpret_cast<" + type + "*>(qi_standin_dynamic_shared())";
        if (depth > 0) {
            out += type + "* const " + name + " = " + value;
        } else {
            out += "\n#define " + name + " (" + value + ")\n#line " +
                   std::to_string(
                       1 + std::count(text.begin(), text.begin() + static_cast<long>(i), '\n')) +
                   "\n";
        }
        out.append(static_cast<size_t>(std::count(declaration.begin(), declaration.end(), '\n')),
                   '\n');
        i = end;
    }
    return out;
}

}  // namespace standin
