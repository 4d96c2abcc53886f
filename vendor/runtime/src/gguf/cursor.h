// Reading a header field by field, never past its end, with errors that say where.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/text.h"

namespace qi::gguf {

class Cursor {
  public:
    Cursor(std::span<const std::byte> bytes, const std::string& path)
        : bytes_(bytes), path_(path) {}

    uint64_t position() const { return position_; }
    uint64_t remaining() const { return bytes_.size() - position_; }

    // What is being read, for messages: "key 'a.b'", or "tensor 17" while the name is not yet
    // known.
    void set_subject(const char* kind, uint64_t index) { kind_ = kind, index_ = index, name_ = {}; }
    void set_subject_name(std::string_view name) { name_ = name; }

    // Throws QI_FORMAT: the path, the subject if there is one, and what is wrong with it.
    [[noreturn]] void refuse(const std::string& what) const {
        throw Error(QI_FORMAT, quoted(path_, path_.size()) + ": " + subject() + what);
    }

    template <typename Number>
    Number read(const char* what) {
        Number number;
        std::memcpy(&number, take(sizeof number, what).data(), sizeof number);
        return number;
    }

    std::span<const std::byte> take(uint64_t n_bytes, const char* what) {
        if (n_bytes > remaining()) refuse_truncated(n_bytes, what);
        const auto taken = bytes_.subspan(position_, n_bytes);
        position_ += n_bytes;
        return taken;
    }

    std::string_view string(const char* what) {
        const auto text = take(read<uint64_t>(what), what);
        return {reinterpret_cast<const char*>(text.data()), text.size()};
    }

  private:
    std::string subject() const {
        if (kind_ == nullptr) return {};
        if (name_.empty()) return format("%s %llu: ", kind_, (unsigned long long)index_);
        return format("%s %s: ", kind_, quoted(name_).c_str());
    }

    [[noreturn]] void refuse_truncated(uint64_t n_bytes, const char* what) const {
        refuse(
            format("%s would take %llu bytes at byte %llu, but the file ends at byte %llu; it is "
                   "cut short or damaged",
                   what, (unsigned long long)n_bytes, (unsigned long long)position_,
                   (unsigned long long)bytes_.size()));
    }

    std::span<const std::byte> bytes_;
    const std::string& path_;
    uint64_t position_ = 0;
    const char* kind_ = nullptr;
    uint64_t index_ = 0;
    std::string_view name_;
};

}  // namespace qi::gguf
