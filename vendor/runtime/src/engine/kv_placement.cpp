#include "engine/kv_placement.h"

#include "base/error.h"

namespace qi {

void check(const KvWish& wish) {
    const bool has_ratio = !std::isnan(wish.ratio);
    if (has_ratio && !(wish.ratio >= 0 && wish.ratio <= 1))
        fail(QI_ARGUMENT, "kv_ratio is %g, expected a share from 0 to 1", wish.ratio);
    if (!(wish.step >= 0 && wish.step <= 1))
        fail(QI_ARGUMENT, "kv_step is %g, expected a share from 0 to 1", wish.step);
    if ((wish.mode == KvMode::device || wish.mode == KvMode::host) && (has_ratio || wish.step > 0))
        fail(QI_ARGUMENT,
             "%s is for keys and values that the device and the host share: kv_mode \"split\"",
             has_ratio ? "kv_ratio" : "kv_step");
}

DeviceNeeds with_device_alone(DeviceNeeds needs) {
    needs.kv_share = {};
    return needs;
}

DeviceNeeds with_host(DeviceNeeds needs, const KvWish& wish, int64_t n_pages) {
    needs.kv_share = {true, n_pages, std::isnan(wish.ratio) ? 0.0 : wish.ratio, wish.step};
    return needs;
}

int64_t most_pages(const DeviceNeeds& needs, const KvWish& wish) {
    if (wish.mode == KvMode::host) return 0;
    // A share that stays as it is leaves the rest of the pages to the host for good.
    const double share = std::isnan(wish.ratio) || wish.step > 0 ? 0.0 : wish.ratio;
    return int64_t(std::ceil((1.0 - share) * double(needs.n_pages)));
}

int64_t fitting_pages(const Accelerator& accelerator, const DeviceNeeds& needs, const KvWish& wish,
                      size_t n_bytes) {
    const auto fits = [&](int64_t n) {
        return accelerator.bytes_of(with_host(needs, wish, n)) <= n_bytes;
    };
    int64_t fitting = 0, beyond = most_pages(needs, wish) + 1;
    while (beyond - fitting > 1) {
        const int64_t middle = fitting + (beyond - fitting) / 2;
        (fits(middle) ? fitting : beyond) = middle;
    }
    return fitting;
}

DeviceNeeds share_kv(const Accelerator& accelerator, const DeviceNeeds& needs, const KvWish& wish,
                     size_t n_bytes) {
    const DeviceNeeds alone = with_device_alone(needs);
    if (wish.mode == KvMode::device ||
        (wish.by_default() && accelerator.bytes_of(alone) <= n_bytes))
        return alone;
    return with_host(needs, wish, fitting_pages(accelerator, needs, wish, n_bytes));
}

}  // namespace qi
