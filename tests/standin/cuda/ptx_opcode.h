// The words of a PTX opcode, taken off one by one; none may be left over.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "ptx_module.h"

namespace standin::ptx {

class Opcode {
  public:
    explicit Opcode(const std::string& text) : words_(split(text, '.')) {
        base = words_.front();
        words_.erase(words_.begin());
    }

    std::string base;  // "ld" of "ld.global.u32"

    bool take(const std::string& word) {
        const auto found = std::find(words_.begin(), words_.end(), word);
        if (found == words_.end()) return false;
        words_.erase(found);
        return true;
    }
    // The one that is there of several words, or an empty one.
    std::string take_of(std::initializer_list<const char*> several) {
        for (const char* word : several) {
            if (take(word)) return word;
        }
        return "";
    }
    // The first, or the last word: an empty one when none is left.
    std::string first() { return words_.empty() ? "" : pop(words_.begin()); }
    std::string last() { return words_.empty() ? "" : pop(words_.end() - 1); }

    // What is left, and was not understood.
    std::string rest() const {
        std::string text;
        for (const std::string& word : words_)
            text += "." + word;
        return text;
    }

  private:
    std::string pop(std::vector<std::string>::iterator at) {
        const std::string word = *at;
        words_.erase(at);
        return word;
    }

    std::vector<std::string> words_;
};

}  // namespace standin::ptx
