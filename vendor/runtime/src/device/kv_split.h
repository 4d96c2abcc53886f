// Keys and values that a device and the host share: which pages have a copy on the device, and
// which of them the device attends to.
//
// The host holds every page; the device has copies of a sequence's first pages, as far as its room
// goes. In each layer it attends to the pages below a boundary, the host to the rest, so that the
// boundary moves without moving data.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/device.h"

namespace qi {

// Room for pages on a device, by slot.
class PageSlots {
  public:
    static constexpr int32_t none = -1;

    PageSlots() = default;
    PageSlots(int64_t n_pages, int64_t n_slots);

    int32_t slot(int32_t page) const { return slot_of_[size_t(page)]; }
    // Gives a page that has none a slot, or none when all are taken.
    int32_t take(int32_t page);
    void release(int32_t page);
    int64_t n_slots() const { return n_slots_; }

  private:
    std::vector<int32_t> slot_of_;  // [n_pages]
    std::vector<int32_t> free_;
    int64_t n_slots_ = 0;
};

// The boundaries of a context's layers and how they move: by the times both sides took (Q-Infer's
// rule, with clamping where that asserts).
class KvBoundaries {
  public:
    KvBoundaries() = default;
    // share: the host's of the positions at first; step: how much of them one adaptation moves, 0
    // for none.
    KvBoundaries(int64_t n_layer, double share, double step);

    bool adapts() const { return step_ > 0; }

    // Draws the boundaries for a batch, of whose segments the first n_on_device pages each have a
    // copy. What follows is about that batch.
    void begin(std::span<const Segment> segments, std::span<const int64_t> n_on_device);
    // The pages of a segment that the device attends to, [n_segments].
    std::span<const int64_t> pages_of_device(int64_t layer) const {
        return {boundaries_.data() + size_t(layer) * segments_.size(), segments_.size()};
    }
    // Whether a layer leaves anything to the host, or to the device.
    bool host_attends(int64_t layer) const { return of_device(layer) < n_pages_; }
    bool device_attends(int64_t layer) const { return of_device(layer) > 0; }
    // Seconds that both took for a layer; the boundaries of later batches move by them.
    void adapt(int64_t layer, double device_seconds, double host_seconds);
    // The host's share of the positions; before the first batch, the wanted one.
    double host_share(int64_t layer) const;

  private:
    struct Shares {
        int64_t n_positions, n_pages, n_on_device;
    };
    int64_t of_device(int64_t layer) const;

    std::vector<double> wanted_;  // [n_layer], by the host
    double step_ = 0;
    std::vector<Shares> segments_;
    std::vector<int64_t> boundaries_;  // [n_layer][n_segments]
    int64_t n_pages_ = 0;              // of all segments
    int64_t n_on_device_ = 0;          // of these
};

}  // namespace qi
