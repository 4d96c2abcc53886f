// Keys and values shared by a device and its host: slots of pages, and boundaries that move.
#include <vector>

#include "device/kv_split.h"
#include "kernel_checks.h"
#include "kernels/attention.h"

using namespace qi;
using namespace qi::test;

namespace {

Checks checks;

constexpr int64_t page = kernels::page_size;

Segment segment_of(int64_t n_positions) {
    return {0, 1, n_positions - 1, nullptr};
}

void test_slots() {
    PageSlots slots(10, 3);
    checks.expect(slots.slot(4) == PageSlots::none, "a page has a slot from the start");
    std::vector<bool> taken(3, false);
    for (const int32_t p : {4, 0, 9}) {
        const int32_t slot = slots.take(p);
        checks.expect(slot >= 0 && slot < 3 && !taken[size_t(slot)], "slot %d twice", slot);
        taken[size_t(slot)] = true;
        checks.expect(slots.slot(p) == slot, "page %d has another slot than it was given", p);
    }
    checks.expect(slots.take(5) == PageSlots::none, "more slots than there are");
    const int32_t given = slots.slot(0);
    slots.release(0);
    slots.release(0);  // of a page without one: nothing
    checks.expect(slots.take(5) == given, "what was released is not given again");
    checks.expect(slots.take(6) == PageSlots::none, "a slot was released twice");
}

// The host has what is not on the device; beyond that the wanted share, to the page.
void test_boundaries() {
    const std::vector<Segment> segments = {segment_of(10 * page), segment_of(7 * page - 5),
                                           segment_of(1)};
    for (const double share : {0.0, 0.1, 0.3, 0.5, 0.9, 1.0}) {
        for (const std::vector<int64_t>& there :
             {std::vector<int64_t>{10, 7, 1}, {10, 0, 1}, {2, 3, 0}, {0, 0, 0}}) {
            KvBoundaries boundaries(2, share, 0.0);
            boundaries.begin(segments, there);
            const std::span<const int64_t> pages = boundaries.pages_of_device(1);
            const int64_t n_there = there[0] + there[1] + there[2];
            const int64_t wanted = 18 - std::lround(share * 18);
            int64_t sum = 0;
            for (size_t i = 0; i < 3; ++i) {
                checks.expect(pages[i] >= 0 && pages[i] <= there[i], "segment %zu: %lld of %lld", i,
                              (long long)pages[i], (long long)there[i]);
                sum += pages[i];
            }
            checks.expect(sum == std::min(n_there, wanted), "%g of 18 pages, %lld there: %lld",
                          share, (long long)n_there, (long long)sum);
            checks.expect(boundaries.device_attends(0) == (sum > 0), "device_attends");
            checks.expect(boundaries.host_attends(0) == (sum < 18), "host_attends");
        }
    }
}

// Both sides take time in proportion to their pages: the boundary comes to rest where they take as
// long, or where room or work ends; within the dead band it does not move at all.
void test_adaptation() {
    for (const double step : {0.01, 0.025, 0.3}) {
        for (const double host_speed : {0.05, 0.5, 1.0, 4.0}) {
            for (const int64_t room : {40, 25}) {
                KvBoundaries boundaries(1, 0.5, step);
                const std::vector<Segment> segments = {segment_of(40 * page)};
                const std::vector<int64_t> there = {room};
                int64_t n = 0;
                for (int i = 0; i < 400; ++i) {
                    boundaries.begin(segments, there);
                    n = boundaries.pages_of_device(0)[0];
                    checks.expect(n >= 0 && n <= room, "%lld pages of %lld", (long long)n,
                                  (long long)room);
                    boundaries.adapt(0, double(n), double(40 - n) / host_speed);
                }
                const double best = std::min(double(room), 40.0 / (1.0 + host_speed));
                const double moved = std::max(1.0, 40 * step);
                checks.expect(std::fabs(double(n) - best) <= moved + 0.5,
                              "step %g, the host %g times as fast, room for %lld: at %lld, not %g",
                              step, host_speed, (long long)room, (long long)n, best);
            }
        }
    }
    KvBoundaries still(1, 0.5, 0.1);
    const std::vector<Segment> long_one = {segment_of(40 * page)}, short_one = {segment_of(200)};
    const std::vector<int64_t> there = {40};
    still.begin(long_one, there);
    still.adapt(0, 1.00, 1.04);
    still.begin(short_one, there);
    still.adapt(0, 1.0, 9.0);  // so few positions are not worth moving
    still.begin(long_one, there);
    checks.expect(still.pages_of_device(0)[0] == 20, "the boundary moved for nothing");
    checks.expect(still.host_share(0) == 0.5, "a half is %g", still.host_share(0));
}

}  // namespace

int main() {
    test_slots();
    test_boundaries();
    test_adaptation();
    return checks.status();
}
