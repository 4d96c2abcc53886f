#include "device/cuda/working_space.h"

#include <algorithm>

#include "device/cuda/exchange.h"
#include "device/cuda/half_products.h"
#include "kernels/attention.h"

namespace qi::cuda {

InputLayout::InputLayout(const DeviceNeeds& needs) {
    const auto n = size_t(needs.n_batch);
    tables = n;
    rules = 2 * n;
    tiles = rules + (n + 3) / 4;
    base = tiles + 2 * n;
    pages = base + 1;
    cos_sin = pages + size_t(needs.n_pages);
    bounds = cos_sin + n * size_t(needs.kv.head_dim);
    n_words = bounds + (needs.kv_share.with_host ? n * size_t(needs.kv.n_layer) : 0);
}

WorkingSizes::WorkingSizes(const GpuShare& share, const DeviceNeeds& needs, const KvArgs& kv_args) {
    const int64_t n = needs.n_batch, few = std::min(n, few_tokens), n_ff = needs.n_ff;
    const int64_t widest =
        std::max({needs.n_embd, n_ff, needs.n_head * needs.kv.head_dim, needs.predictor_rank});
    inputs = InputLayout(needs).n_words * sizeof(uint32_t);
    q8 = Q8::n_bytes(n, widest);
    hidden = lifted = size_t(n * n_ff) * sizeof(float);
    low = size_t(few * needs.predictor_rank) * sizeof(float);
    predictions = needs.predictor_rank ? size_t(few * n_ff) * sizeof(float) : 0;
    masks = needs.predictor_rank ? size_t(n * name_words(n_ff)) * sizeof(uint32_t) : 0;
    named = needs.predictor_rank ? size_t(name_words(n_ff)) * sizeof(uint32_t) : 0;
    list = needs.predictor_rank ? NeuronList::n_bytes(n_ff) : 0;
    partial = size_t(n_partitions * few * needs.n_embd) * sizeof(float);
    AttendArgs attend_args;
    attend_args.kv = kv_args;
    attend_args.n_head = needs.n_head;
    attend_args.n_tokens = few;
    attend_args.max_positions = device_pages(needs) * kernels::page_size;
    attend = Kernels::attend_room_bytes(attend_args);
    attend_tickets = Kernels::attend_ticket_bytes(attend_args);
    terms = size_t(n) * (sizeof(Kernels::LogTerms) + sizeof(int32_t));
    tickets = size_t(needs.n_logits) * sizeof(uint32_t);
    partial_best = Kernels::argmax_partial_bytes(needs.n_logits, needs.n_vocab);
    best = size_t(needs.n_logits * best_of(needs)) * sizeof(Candidate);
    totals = size_t(needs.kv.n_layer) * n_totals * sizeof(uint64_t);
    counts = size_t(needs.kv.n_layer * n_ff) * sizeof(uint64_t);
    exchange = Exchange::room_bytes(needs.kv.n_layer * (needs.kv_share.with_host ? 2 : 1));
    // Parts of attention, the device's terms and what the host sends.
    const bool in_parts = needs.kv_share.with_host && needs.kv_share.n_pages > 0;
    kv_terms = in_parts ? size_t(n * needs.n_head * 2) * sizeof(float) : 0;
    kv_other = in_parts ? size_t(n * needs.n_head * (needs.kv.head_dim + 2)) * sizeof(float) : 0;
    kv = size_t(device_pages(needs)) * kv_args.page_stride;

    narrowed = widened = cublas = panels = 0;
    if (needs.deterministic || n <= few_tokens) return;
    // Where memory is short it is better spent on weights.
    constexpr size_t mib = size_t(1) << 20;
    const size_t limit = share.budget->limit_bytes();
    // 8 MiB take a third of a millisecond to bring: many times what launching costs.
    if (limit >= 32 * mib) panels = 2 * std::clamp(limit / 128, mib / 4, 8 * mib);
    if (!share.has_cublas) return;
    // Half a matrix at least fills a card; more room than a layer's largest is of no use.
    const size_t of_matrix = size_t(std::max(widest, needs.n_embd) * widest) * 2;
    narrowed = HalfProducts::narrowed_bytes(n, widest);
    widened = std::min(of_matrix, std::clamp(limit / 32, 8 * mib, 64 * mib));
    cublas = Cublas::n_bytes(share.gpu->attributes().architecture);
    if (narrowed + widened + cublas > limit / 8) narrowed = widened = cublas = 0;
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
    const WorkingSizes s(share, needs, kv_args_for(needs));
    size_t bytes = 0;
    for (const size_t n : {s.inputs,
                           s.q8,
                           s.hidden,
                           s.lifted,
                           s.low,
                           s.predictions,
                           s.masks,
                           s.named,
                           s.list,
                           s.partial,
                           s.exchange,
                           s.attend,
                           s.attend_tickets,
                           s.terms,
                           s.tickets,
                           s.partial_best,
                           s.best,
                           s.totals,
                           s.counts,
                           s.kv_terms,
                           s.kv_other,
                           s.kv,
                           size_t(needs.n_logits * needs.n_vocab) * sizeof(float)})
        if (n > 0) bytes += DeviceMemory::counted_bytes(n);
    for (const size_t n : {s.narrowed, s.widened, s.panels})
        if (n > 0) bytes += DeviceMemory::counted_bytes(n);
    bytes += s.cublas;
    for (const size_t n : needs.arrays)
        if (n > 0) bytes += DeviceMemory::counted_bytes(n * sizeof(float));
    return bytes;
}

}  // namespace qi::cuda
