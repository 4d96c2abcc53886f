// The header is gathered in memory and written when the first data, or the end, comes.
#include "gguf/writer.h"

#include <cstring>
#include <limits>

#include "base/error.h"
#include "base/text.h"
#include "quant/types.h"

namespace qi::gguf {

namespace {

unsigned long long ull(uint64_t n) {
    return n;
}

template <typename Number>
void append(std::string& out, Number number) {
    out.append(reinterpret_cast<const char*>(&number), sizeof number);
}

void append_string(std::string& out, std::string_view text) {
    append<uint64_t>(out, text.size());
    out += text;
}

}  // namespace

Writer::Writer(const std::string& path, bool is_powerinfer, uint32_t alignment)
    : file_(path), is_powerinfer_(is_powerinfer), alignment_(alignment) {
    if (!is_alignment(alignment))
        refuse(format("alignment is %u; it must be %s", alignment, alignment_rule));
}

void Writer::refuse(const std::string& what) const {
    throw Error(QI_ARGUMENT, "writing " + quoted(file_.path(), file_.path().size()) + ": " + what);
}

void Writer::refuse(const char* kind, std::string_view name, const std::string& what) const {
    refuse(std::string(kind) + " " + quoted(name) + ": " + what);
}

void Writer::check_key(std::string_view key) const {
    if (stage_ != Stage::values)
        refuse("key", key, "comes too late; every key comes before the first tensor");
    if (const auto problem = name_problem(key, max_name_bytes)) refuse("key", key, *problem);
    if (keys_.contains(std::string(key))) refuse("key", key, "was added before");
}

void Writer::check_alignment_value(ValueType type, std::span<const std::byte> data) const {
    uint32_t value = 0;
    if (type == ValueType::u32) std::memcpy(&value, data.data(), sizeof value);
    if (value != alignment_)
        refuse("key", alignment_key,
               format("must be a u32 of %u, the alignment this file is written with", alignment_));
}

void Writer::begin_value(std::string_view key, ValueType type, ValueType item_type,
                         uint64_t n_items) {
    keys_.emplace(key);
    append_string(values_, key);
    append(values_, type);
    if (type != ValueType::array) return;
    append(values_, item_type);
    append(values_, n_items);
}

void Writer::add_value(std::string_view key, ValueType type, ValueType item_type, uint64_t n_items,
                       std::span<const std::byte> data) {
    check_key(key);
    if (!is_value_type(uint32_t(type)) || !is_value_type(uint32_t(item_type)))
        refuse("key", key,
               format("type %d or item type %d is not one of GGUF's, 0 to 12", int(type),
                      int(item_type)));
    const uint64_t size = value_type_size(item_type);
    if (size == 0)
        refuse("key", key,
               format("items of type %s cannot be written as numbers", value_type_name(item_type)));
    if (type != ValueType::array && (type != item_type || n_items != 1))
        refuse("key", key, "a value that is no array has one item, of the value's own type");
    if (data.size() % size != 0 || data.size() / size != n_items)
        refuse("key", key,
               format("%llu items of type %s do not take %zu bytes", ull(n_items),
                      value_type_name(item_type), data.size()));
    if (item_type == ValueType::boolean) {
        if (const auto problem = bool_problem(data)) refuse("key", key, *problem);
    }
    if (key == alignment_key) check_alignment_value(type, data);
    begin_value(key, type, item_type, n_items);
    values_.append(reinterpret_cast<const char*>(data.data()), data.size());
}

void Writer::add_string(std::string_view key, std::string_view text) {
    check_key(key);
    if (key == alignment_key) check_alignment_value(ValueType::string, {});
    begin_value(key, ValueType::string, ValueType::string, 1);
    append_string(values_, text);
}

void Writer::add_strings(std::string_view key, const char* bytes,
                         std::span<const uint64_t> offsets) {
    check_key(key);
    if (offsets.empty()) refuse("key", key, "n strings have n + 1 offsets, never none");
    if (key == alignment_key) check_alignment_value(ValueType::array, {});
    for (size_t i = 1; i < offsets.size(); i++) {
        if (offsets[i] < offsets[i - 1])
            refuse("key", key, format("string %zu ends before it begins", i - 1));
    }
    begin_value(key, ValueType::array, ValueType::string, offsets.size() - 1);
    for (size_t i = 1; i < offsets.size(); i++)
        append_string(values_, {bytes + offsets[i - 1], offsets[i] - offsets[i - 1]});
}

void Writer::add_tensor(std::string_view name, int32_t type, std::span<const uint64_t> dims) {
    if (stage_ > Stage::tensors)
        refuse("tensor", name, "comes too late; every description comes before the first data");
    if (const auto problem = name_problem(name, max_written_tensor_name_bytes))
        refuse("tensor", name, *problem);
    if (tensor_names_.contains(std::string(name))) refuse("tensor", name, "was added before");
    const int32_t number = is_powerinfer_ ? type_to_powerinfer(type) : type;
    if (find_layout(type) == nullptr || (is_powerinfer_ && type_from_powerinfer(number) != type))
        refuse("tensor", name,
               format("type %d (%s) is not one that such a file can hold", int(type),
                      gguf_type_name(type)));
    uint64_t n_bytes, end;
    if (const auto problem = shape_problem(type, dims, n_bytes)) refuse("tensor", name, *problem);
    if (__builtin_add_overflow(data_bytes_, align_up(n_bytes, alignment_), &end) ||
        end > uint64_t(std::numeric_limits<int64_t>::max()))
        refuse("tensor", name, "makes the file larger than any file can be");

    stage_ = Stage::tensors;
    tensor_names_.emplace(name);
    append_string(descriptions_, name);
    append(descriptions_, uint32_t(dims.size()));
    for (const uint64_t dim : dims)
        append(descriptions_, dim);
    append(descriptions_, number);
    append(descriptions_, data_bytes_);
    tensors_.push_back({std::string(name), n_bytes});
    data_bytes_ = end;
}

void Writer::begin_data() {
    if (alignment_ != default_alignment && !keys_.contains(alignment_key)) {
        begin_value(alignment_key, ValueType::u32, ValueType::u32, 1);
        append(values_, alignment_);
    }
    std::string header = is_powerinfer_ ? "PWRI" : "GGUF";
    append(header, current_version);
    append<uint64_t>(header, tensors_.size());
    append<uint64_t>(header, keys_.size());
    header += values_;
    header += descriptions_;
    header.resize(align_up(header.size(), alignment_));
    stage_ = Stage::data;
    file_.reserve(header.size() + data_bytes_);
    file_.write(std::as_bytes(std::span(header)));
}

void Writer::pad(uint64_t n_bytes) {
    const std::vector<std::byte> zeros(align_up(n_bytes, alignment_) - n_bytes);
    file_.write(zeros);
}

void Writer::write(std::span<const std::byte> data) {
    if (stage_ == Stage::finished) refuse("the file is finished");
    if (data.empty()) return;
    if (current_ == tensors_.size()) refuse("there is data after that of the last tensor");
    const Tensor& tensor = tensors_[current_];
    if (data.size() > tensor.n_bytes - n_written_)
        refuse("tensor", tensor.name,
               format("takes %llu bytes; %zu more came after the first %llu", ull(tensor.n_bytes),
                      data.size(), ull(n_written_)));
    if (stage_ != Stage::data) begin_data();
    file_.write(data);
    n_written_ += data.size();
    if (n_written_ < tensor.n_bytes) return;
    pad(tensor.n_bytes);
    current_++;
    n_written_ = 0;
}

void Writer::finish() {
    if (stage_ == Stage::finished) refuse("the file is finished");
    if (current_ < tensors_.size())
        refuse("tensor", tensors_[current_].name,
               format("takes %llu bytes, but only %llu were written",
                      ull(tensors_[current_].n_bytes), ull(n_written_)));
    if (stage_ != Stage::data) begin_data();
    file_.commit();
    stage_ = Stage::finished;
}

}  // namespace qi::gguf
