#include "device/kv_split.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/attention.h"

namespace qi {

namespace {

// Times that differ by less, relative to their sum, are equal.
constexpr double dead_band = 0.025;
// Of fewer pages (256 positions) neither side has enough to be worth sharing.
constexpr int64_t least_pages = 5;

int64_t pages_for(int64_t n_positions) {
    return (n_positions + kernels::page_size - 1) / kernels::page_size;
}

}  // namespace

PageSlots::PageSlots(int64_t n_pages, int64_t n_slots)
    : slot_of_(size_t(n_pages), none), n_slots_(n_slots) {
    free_.reserve(size_t(n_slots));
    for (int64_t slot = n_slots; slot-- > 0;)
        free_.push_back(int32_t(slot));
}

int32_t PageSlots::take(int32_t page) {
    if (free_.empty()) return none;
    slot_of_[size_t(page)] = free_.back();
    free_.pop_back();
    return slot_of_[size_t(page)];
}

void PageSlots::release(int32_t page) {
    int32_t& slot = slot_of_[size_t(page)];
    if (slot != none) free_.push_back(slot);
    slot = none;
}

KvBoundaries::KvBoundaries(int64_t n_layer, double share, double step)
    : wanted_(size_t(n_layer), share), step_(step) {}

void KvBoundaries::begin(std::span<const Segment> segments, std::span<const int64_t> n_on_device) {
    segments_.clear();
    n_pages_ = n_on_device_ = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const int64_t n_positions = segments[i].position + segments[i].n;
        const int64_t n_pages = pages_for(n_positions);
        segments_.push_back({n_positions, n_pages, std::min(n_pages, n_on_device[i])});
        n_pages_ += n_pages;
        n_on_device_ += segments_.back().n_on_device;
    }
    boundaries_.clear();
    for (const double wanted : wanted_) {
        // The host has what is not on the device, and as many pages more as are wanted: of each
        // segment in proportion, rounded so that they add up.
        const int64_t of_host = std::lround(wanted * double(n_pages_));
        const int64_t more = std::max<int64_t>(0, of_host - (n_pages_ - n_on_device_));
        int64_t before = 0, given = 0;
        for (const Shares& shares : segments_) {
            before += shares.n_on_device;
            const int64_t due = n_on_device_ > 0 ? more * before / n_on_device_ : 0;
            boundaries_.push_back(shares.n_on_device - (due - given));
            given = due;
        }
    }
}

int64_t KvBoundaries::of_device(int64_t layer) const {
    const std::span<const int64_t> pages = pages_of_device(layer);
    return std::accumulate(pages.begin(), pages.end(), int64_t(0));
}

void KvBoundaries::adapt(int64_t layer, double device_seconds, double host_seconds) {
    if (n_pages_ < least_pages) return;
    const double difference = device_seconds - host_seconds;
    if (std::fabs(difference) < dead_band * (device_seconds + host_seconds)) return;
    // From where the boundary is, which need not be where it was wanted; by a page at least.
    const auto n = double(n_pages_);
    const double share = 1.0 - double(of_device(layer)) / n, step = std::max(step_, 1.0 / n);
    const double least = 1.0 - double(n_on_device_) / n;
    wanted_[size_t(layer)] = std::clamp(difference > 0 ? share + step : share - step, least, 1.0);
}

double KvBoundaries::host_share(int64_t layer) const {
    if (segments_.empty()) return wanted_[size_t(layer)];
    const std::span<const int64_t> pages = pages_of_device(layer);
    int64_t n = 0, of_host = 0;
    for (size_t i = 0; i < segments_.size(); ++i) {
        n += segments_[i].n_positions;
        of_host += std::max<int64_t>(0, segments_[i].n_positions - pages[i] * kernels::page_size);
    }
    return double(of_host) / double(n);
}

}  // namespace qi
