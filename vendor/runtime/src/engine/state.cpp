// Saving and loading the keys and values of a sequence: a fixed header, then its pages as the
// device stores them.
#include <cstring>

#include "base/error.h"
#include "engine/context.h"
#include "kernels/attention.h"

namespace qi {

namespace {

struct StateHeader {
    char magic[4];
    uint32_t version;
    int32_t kv_type;
    int32_t page_size;
    int64_t n_layer;
    int64_t n_head_kv;
    int64_t head_dim;
    int64_t length;  // positions
    uint64_t page_bytes;
};

StateHeader header_for(const Model& model, Type kv_type, uint64_t page_bytes, int64_t length) {
    const HyperParams& hp = model.hyper_params();
    return {{'Q', 'I', 'K', 'V'}, 1,           int32_t(kv_type), kernels::page_size, hp.n_layer,
            hp.n_head_kv,         hp.head_dim, length,           page_bytes};
}

int64_t pages_for(int64_t length) {
    return (length + kernels::page_size - 1) / kernels::page_size;
}

}  // namespace

uint64_t Context::state_size(int32_t seq) const {
    return sizeof(StateHeader) + uint64_t(pages_for(length(seq))) * kv_.content_bytes();
}

void Context::save_state(int32_t seq, std::span<std::byte> out) const {
    if (out.size() != state_size(seq))
        fail(QI_ARGUMENT, "the state of sequence %d takes %llu bytes, room was given for %zu", seq,
             (unsigned long long)state_size(seq), out.size());
    const StateHeader header =
        header_for(*model_, options_.kv_type, kv_.content_bytes(), length(seq));
    std::memcpy(out.data(), &header, sizeof header);
    for (int64_t p = 0; p < pages_for(header.length); ++p)
        kv_.read_page(seq, p, out.data() + sizeof header + size_t(p) * header.page_bytes);
}

void Context::load_state(int32_t seq, std::span<const std::byte> data) {
    check_seq(seq);
    StateHeader found;
    if (data.size() < sizeof found)
        fail(QI_FORMAT, "a state of %zu bytes has no header", data.size());
    std::memcpy(&found, data.data(), sizeof found);
    const StateHeader wanted =
        header_for(*model_, options_.kv_type, kv_.content_bytes(), found.length);
    if (std::memcmp(&found, &wanted, sizeof found) != 0)
        fail(QI_FORMAT, "this state was saved by another model or with another KV type");
    if (found.length < 0 || found.length > options_.n_ctx)
        fail(QI_CONTEXT_FULL, "a state of %lld positions does not fit in a context of %lld",
             (long long)found.length, (long long)options_.n_ctx);
    if (data.size() != sizeof found + size_t(pages_for(found.length)) * found.page_bytes)
        fail(QI_FORMAT, "a state of %lld positions takes %zu bytes, this one has %zu",
             (long long)found.length,
             sizeof found + size_t(pages_for(found.length)) * found.page_bytes, data.size());
    kv_.truncate(seq, 0);
    kv_.extend(seq, found.length);
    try {
        for (int64_t p = 0; p < pages_for(found.length); ++p)
            kv_.write_page(seq, p, data.data() + sizeof found + size_t(p) * found.page_bytes);
    } catch (...) {
        kv_.truncate(seq, 0);
        throw;
    }
}

}  // namespace qi
