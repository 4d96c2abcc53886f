#include "device/cuda/working_space.h"

#include <algorithm>

#include "device/cuda/exchange.h"
#include "device/cuda/half_products.h"
#include "kernels/attention.h"

namespace qi::cuda {

InputLayout::InputLayout(const DeviceNeeds& needs)
    : n_rot_(size_t(needs.kv.head_dim)),
      n_bounds_(needs.kv_share.with_host ? size_t(needs.kv.n_layer) : 0) {
    const auto n = size_t(needs.n_batch);
    tables = n;
    rules = 2 * n;
    base = rules + (n + 3) / 4;
    few_ = base + 1;
    pages = end(std::min(needs.n_batch, few_tokens));
    many_ = pages + size_t(needs.n_pages);
    n_words = needs.n_batch > few_tokens ? end(needs.n_batch) : many_;
}

WorkingSizes::WorkingSizes(const GpuShare& share, const DeviceNeeds& needs, const KvArgs& kv_args) {
    const int64_t n = needs.n_batch, few = std::min(n, few_tokens), n_ff = needs.n_ff;
    const int64_t widest =
        std::max({needs.n_embd, n_ff, needs.n_head * needs.kv.head_dim, needs.predictor_rank});
    const bool predicts = needs.predictor_rank > 0;
    bytes_[inputs] = InputLayout(needs).n_words * sizeof(uint32_t);
    bytes_[q8] = Q8::n_bytes(n, widest);
    bytes_[predictor_q8] =
        predicts ? Q8::n_bytes(few, std::max(needs.n_embd, needs.predictor_rank)) : 0;
    bytes_[hidden] = bytes_[lifted] = size_t(n * n_ff) * sizeof(float);
    bytes_[low] = size_t(few * needs.predictor_rank) * sizeof(float);
    bytes_[predictions] = predicts ? size_t(few * n_ff) * sizeof(float) : 0;
    bytes_[masks] = predicts ? size_t(n * name_words(n_ff)) * sizeof(uint32_t) : 0;
    bytes_[listed] = predicts ? size_t(name_words(n_ff)) * sizeof(uint32_t) : 0;
    bytes_[list] = predicts ? NeuronList::n_bytes(n_ff) : 0;
    bytes_[select_ticket] = predicts ? sizeof(uint32_t) : 0;
    bytes_[partial] = size_t(n_partitions * few * needs.n_embd) * sizeof(float);
    bytes_[down_tickets] = Kernels::down_ticket_bytes(few, needs.n_embd);
    AttendArgs attend_args;
    attend_args.kv = kv_args;
    attend_args.n_head = needs.n_head;
    attend_args.n_tokens = few;
    attend_args.max_positions = device_pages(needs) * kernels::page_size;
    bytes_[attend] = Kernels::attend_room_bytes(attend_args);
    bytes_[attend_tickets] = Kernels::attend_ticket_bytes(attend_args);
    bytes_[terms] = size_t(n) * (sizeof(Kernels::LogTerms) + sizeof(int32_t));
    bytes_[tickets] = size_t(needs.n_logits) * sizeof(uint32_t);
    bytes_[partial_best] = std::max(Kernels::argmax_partial_bytes(needs.n_logits, needs.n_vocab),
                                    Kernels::top_k_partial_bytes(needs.n_logits, needs.n_vocab));
    bytes_[best] = size_t(needs.n_logits * best_of(needs)) * sizeof(Candidate);
    bytes_[totals] = size_t(needs.kv.n_layer) * n_totals * sizeof(uint64_t);
    bytes_[counts] = size_t(needs.kv.n_layer * n_ff) * sizeof(uint64_t);
    bytes_[exchange] = Exchange::room_bytes(needs.kv.n_layer * (needs.kv_share.with_host ? 2 : 1));
    // Parts of attention, the device's terms and what the host sends.
    const bool in_parts = needs.kv_share.with_host && needs.kv_share.n_pages > 0;
    bytes_[kv_terms] = in_parts ? size_t(n * needs.n_head * 2) * sizeof(float) : 0;
    bytes_[kv_other] =
        in_parts ? size_t(n * needs.n_head * (needs.kv.head_dim + 2)) * sizeof(float) : 0;
    bytes_[kv] = size_t(device_pages(needs)) * kv_args.page_stride;

    if (needs.deterministic || n <= few_tokens) return;
    // Where memory is short it is better spent on weights.
    constexpr size_t mib = size_t(1) << 20;
    const size_t limit = share.budget->limit_bytes();
    // 8 MiB take a third of a millisecond to bring: many times what launching costs.
    if (limit >= 32 * mib) bytes_[panels] = 2 * std::clamp(limit / 128, mib / 4, 8 * mib);
    if (!share.has_cublas) return;
    // Half a matrix at least fills a card; more room than a layer's largest is of no use.
    const size_t of_matrix = size_t(std::max(widest, needs.n_embd) * widest) * 2;
    bytes_[narrowed] = HalfProducts::narrowed_bytes(n, widest);
    bytes_[widened] = std::min(of_matrix, std::clamp(limit / 32, 8 * mib, 64 * mib));
    cublas_ = Cublas::n_bytes(share.gpu->attributes().architecture);
    if (bytes_[narrowed] + bytes_[widened] + cublas_ > limit / 8)
        bytes_[narrowed] = bytes_[widened] = cublas_ = 0;
}

size_t WorkingSizes::counted_bytes() const {
    size_t sum = cublas_;
    for (const size_t n : bytes_)
        if (n > 0) sum += DeviceMemory::counted_bytes(n);
    return sum;
}

KvArgs kv_args_for(const DeviceNeeds& needs) {
    KvArgs kv;
    kv.type = needs.kv.type;
    kv.head_bytes = kernels::kv_head_bytes(needs.kv.type, needs.kv.head_dim);
    kv.n_head_kv = needs.kv.n_head_kv;
    kv.head_dim = needs.kv.head_dim;
    kv.page_stride = size_t(needs.kv.n_layer * needs.kv.n_head_kv) * kv.head_bytes;
    return kv;
}

size_t working_bytes(const GpuShare& share, const DeviceNeeds& needs) {
    size_t bytes = WorkingSizes(share, needs, kv_args_for(needs)).counted_bytes();
    if (const auto logits = size_t(needs.n_logits * needs.n_vocab))
        bytes += DeviceMemory::counted_bytes(logits * sizeof(float));
    for (const size_t n : needs.arrays)
        if (n > 0) bytes += DeviceMemory::counted_bytes(n * sizeof(float));
    return bytes;
}

}  // namespace qi::cuda
