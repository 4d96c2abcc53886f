// Keys and values of a GPU and attention over them: with all pages on the device, or shared with
// the host, which then holds every page and attends to those beyond a boundary.
#include <algorithm>

#include "base/error.h"
#include "device/cuda/cuda_device.h"
#include "kernels/attention.h"

namespace qi::cuda {

// ---- pages ----

void CudaDevice::reserve_kv(const KvLayout& layout, int64_t n_pages) {
    if (n_pages > needs_.n_pages || layout.n_layer > needs_.kv.n_layer)
        fail(QI_INTERNAL, "more keys and values are wanted than the device was made for");
    if (shared_kv_) shared_kv_->host().store().reserve(layout, n_pages);
}

size_t CudaDevice::kv_page_bytes() const {
    return shared_kv_ ? shared_kv_->host().store().page_bytes() : kv_.page_stride;
}

void CudaDevice::copy_kv_page(int32_t from, int32_t to) {
    const Current current = enter();
    if (shared_kv_) {
        shared_kv_->host().copy_page(from, to);
        // Without a copy here it gets one when it is next used, if there is room.
        if (shared_kv_->slots().slot(from) == PageSlots::none) return;
        from = shared_kv_->slots().slot(from);
        const int32_t slot = shared_kv_->slots().take(to);
        if (slot == PageSlots::none) return;
        try {
            stream_.copy_on_device(page_address(slot), page_address(from), kv_.page_stride);
        } catch (...) {
            shared_kv_->slots().release(to);
            throw;
        }
        return;
    }
    stream_.copy_on_device(page_address(to), page_address(from), kv_.page_stride);
}

void CudaDevice::release_kv_page(int32_t page) {
    if (!shared_kv_) return;
    shared_kv_->slots().release(page);
    shared_kv_->host().store().release(page);
}

void CudaDevice::read_kv_page(int32_t page, std::byte* out) const {
    if (shared_kv_) return shared_kv_->host().read_page(page, out);
    const Current current = enter();
    stream_.copy_to_host(out, page_address(page), kv_.page_stride);
    stream_.synchronize();
}

void CudaDevice::write_kv_page(int32_t page, const std::byte* data) {
    const Current current = enter();
    if (shared_kv_) {
        shared_kv_->host().write_page(page, data);
        page = shared_kv_->slots().slot(page);
        if (page == PageSlots::none) return;
    }
    stream_.copy_to_device(page_address(page), data, kv_.page_stride);
    stream_.synchronize();
}

// ---- a batch ----

// Gives the first pages of a segment room on the device as far as it goes, brings what they hold,
// and writes where they are. Pages keep their places, so those with a place are always a sequence's
// first ones. Returns their number.
int64_t CudaDevice::place_pages(const Segment& segment, int64_t n_pages, int32_t* table) {
    PageSlots& slots = shared_kv_->slots();
    int64_t n_placed = 0;
    for (int64_t p = 0; p < n_pages; ++p) {
        const int32_t page = segment.pages[p];
        table[p] = slots.slot(page);
        if (n_placed < p) continue;
        if (table[p] == PageSlots::none) {
            table[p] = slots.take(page);
            if (table[p] == PageSlots::none) continue;
            if (p * kernels::page_size < segment.position) {
                try {
                    stream_.copy_to_device(page_address(table[p]),
                                           shared_kv_->host().store().page(page), kv_.page_stride);
                    stream_.synchronize();
                } catch (...) {
                    slots.release(page);
                    throw;
                }
            }
        }
        ++n_placed;
    }
    return n_placed;
}

// Moves the boundaries by what the last pass took.
void CudaDevice::adapt_kv() {
    if (!shared_kv_ || !shared_kv_->boundaries().adapts()) return;
    collect_times();
    // Only a replay's two sides work at their own pace.
    shared_kv_->adapt(std::exchange(replayed_, false));
}

double CudaDevice::kv_host_share(int64_t layer) const {
    return shared_kv_ ? shared_kv_->boundaries().host_share(layer) : 0.0;
}

// ---- steps ----

KvArgs CudaDevice::kv_of(int64_t layer) const {
    KvArgs kv = kv_;
    kv.layer_offset = size_t(layer * kv.n_head_kv) * kv.head_bytes;
    kv.pages = input(layout_.pages);
    kv.positions = input(layout_.positions);
    kv.tables = input(layout_.tables);
    if (shared_kv_)
        kv.bounds = input(layout_.bounds(batch_.n_tokens) + size_t(layer * batch_.n_tokens));
    return kv;
}

void CudaDevice::append_kv(int64_t layer, const Heads& heads) {
    const Current current = enter();
    if (shared_kv_) {
        // Not yet rotated: the host does that itself.
        const Exchange::Rows rows = shared_kv_->sending(layer, heads);
        kv_round_ = exchange_->send(stream_, input(layout_.base), kind_of_kv(layer), {&rows, 1});
        if (shared_kv_->slots().n_slots() == 0) return;
    }
    AppendArgs args;
    args.kv = kv_of(layer);
    args.q = address(heads.q);
    args.q_stride = heads.q_stride;
    args.n_head = heads.n_head;
    args.k = address(heads.k);
    args.v = address(heads.v);
    args.kv_stride = heads.kv_stride;
    args.cos_sin = heads.n_rot > 0 ? input(layout_.cos_sin(batch_.n_tokens)) : 0;
    args.n_rot = heads.n_rot;
    args.neox = heads.neox;
    args.n_tokens = batch_.n_tokens;
    share_.kernels->append(stream_, args);
}

void CudaDevice::attend(int64_t layer, const AttentionShape& shape, const float* q, int64_t stride,
                        float* out) {
    const Current current = enter();
    forget_prepared(out);
    AttendArgs args;
    args.kv = kv_of(layer);
    args.q = address(q);
    args.q_stride = stride;
    args.n_head = shape.n_head;
    args.scale = shape.scale;
    args.window = shape.sliding_window;
    args.out = address(out);
    args.room = attend_room_;
    args.tickets = attend_tickets_;
    args.n_tokens = batch_.n_tokens;
    if (!shared_kv_) return attend_here(args);

    using Form = SharedKv::Form;
    const Form form = shared_kv_->form();
    if (form == Form::device_alone) args.kv.bounds = 0;
    if (form == Form::both) args.terms = kv_terms_;
    if (form != Form::host_alone) attend_here(args);
    exchange_->answer(stream_, kv_round_, [this, layer, shape, heads = shared_kv_->sent_heads()] {
        shared_kv_->answer(layer, shape, heads);
    });
    if (form == Form::device_alone) return;
    const int64_t n_values = args.n_tokens * shape.n_head * kv_.head_dim;
    if (form == Form::host_alone) {
        exchange_->receive(stream_, input(layout_.base), kv_round_, shared_kv_->answered(),
                           n_values, false, args.out);
        return;
    }
    exchange_->receive(stream_, input(layout_.base), kv_round_, shared_kv_->answered(),
                       SharedKv::part_floats(needs_, args.n_tokens), false, kv_other_);
    share_.kernels->attend_merge(stream_, args, kv_other_,
                                 kv_other_ + size_t(n_values) * sizeof(float));
}

// The device's attention, of all positions or to its boundary.
void CudaDevice::attend_here(const AttendArgs& all) {
    AttendArgs args = all;
    const int64_t n = all.n_tokens;
    if (n > few_tokens && n_tiles_ > 0 && !needs_.deterministic) {
        args.tiles = input(layout_.tiles(batch_.n_tokens));
        args.n_tiles = n_tiles_;
        share_.kernels->attend_tiles(stream_, args);
        return;
    }
    args.max_positions = std::min(launch_positions(), device_pages(needs_) * kernels::page_size);
    // What comes next is most often a product. A part is not what it multiplies.
    const int64_t n_cols = all.n_head * kv_.head_dim;
    const bool quantised = kv_.head_dim % 32 == 0 && !all.terms;
    const Q8 q8 = quantised ? Q8::at(q8_, n, n_cols) : Q8{};
    if (quantised) prepared_ = {all.out, n, n_cols};
    for (int64_t first = 0; first < n; first += few_tokens) {
        AttendArgs some = args;
        some.n_tokens = std::min(few_tokens, n - first);
        some.q += size_t(first * all.q_stride) * sizeof(float);
        some.out += size_t(first * all.n_head * kv_.head_dim) * sizeof(float);
        if (quantised) some.q8 = q8.from(first, n_cols);
        if (all.terms) some.terms += size_t(first * all.n_head * 2) * sizeof(float);
        some.kv.positions += size_t(first) * sizeof(int32_t);
        some.kv.tables += size_t(first) * sizeof(int32_t);
        if (all.kv.bounds) some.kv.bounds += size_t(first) * sizeof(int32_t);
        share_.kernels->attend(stream_, some);
    }
}

}  // namespace qi::cuda
