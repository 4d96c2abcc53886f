// Where the keys and values of a context live: chosen by what was asked for and by the room there
// is.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/accelerator.h"

namespace qi {

// What a user asks for.
struct KvWish {
    KvMode mode = KvMode::automatic;
    double ratio = NAN;  // the host's share of the positions at first; NaN: what does not fit
    double step = 0;     // of one adaptation; 0: none

    bool by_default() const { return mode == KvMode::automatic && std::isnan(ratio) && step == 0; }
    bool operator==(const KvWish& other) const {
        const bool same_ratio =
            ratio == other.ratio || (std::isnan(ratio) && std::isnan(other.ratio));
        return mode == other.mode && same_ratio && step == other.step;
    }
};

// QI_ARGUMENT for ratios and steps that are none, or of a mode that knows none.
void check(const KvWish& wish);

// With all pages on the device.
DeviceNeeds with_device_alone(DeviceNeeds needs);
// With the host, and with copies of n_pages on the device.
DeviceNeeds with_host(DeviceNeeds needs, const KvWish& wish, int64_t n_pages);
// The most copies that a device of those needs could use.
int64_t most_pages(const DeviceNeeds& needs, const KvWish& wish);
// Of these, the most that fit when working space, keys and values may take n_bytes.
int64_t fitting_pages(const Accelerator& accelerator, const DeviceNeeds& needs, const KvWish& wish,
                      size_t n_bytes);

// The needs of a context beside which nothing else wants the room that is left.
DeviceNeeds share_kv(const Accelerator& accelerator, const DeviceNeeds& needs, const KvWish& wish,
                     size_t n_bytes);

}  // namespace qi
