#include "race_check.h"

namespace standin {

bool RaceCheck::is_ordered(const Access& before, unsigned thread) const {
    if (before.epoch != epoch_ || before.thread == thread) return true;
    if (before.thread == several) return false;
    const unsigned warp = before.thread & of_warp ? before.thread & 31u : before.thread / 32u;
    return warp == thread / 32 && before.warp_epoch != warp_epochs_[warp];
}

// Reads of many threads become one of several.
void RaceCheck::add_read(Access& read, const Access& now) const {
    const uint16_t warp = now.thread / 32;
    if (is_ordered(read, now.thread)) {
        read = now;
    } else if (read.thread == (of_warp | warp) ||
               (!(read.thread & of_warp) && read.thread / 32 == warp)) {
        read.thread = of_warp | warp;
    } else {
        read.thread = several;
    }
}

const RaceCheck::Access* RaceCheck::access(unsigned thread, uint32_t offset, uint32_t bytes,
                                           Kind kind, unsigned line) {
    const Access now = {epoch_, warp_epochs_[thread / 32], static_cast<uint16_t>(thread),
                        kind == atomic, line};
    const uint32_t first = offset / granule, last = (offset + bytes - 1) / granule;
    if (cells_.size() <= last) cells_.resize(last + 1);
    for (uint32_t i = first; i <= last; i++) {
        Cell& cell = cells_[i];
        const bool after_write = is_ordered(cell.write, thread);
        const bool is_harmless = kind == repeat || (kind == atomic && cell.write.is_atomic);
        if (!after_write && !is_harmless) {
            found_ = cell.write;
            return &found_;
        }
        if (kind == load) {
            add_read(cell.read, now);
            continue;
        }
        if (!is_ordered(cell.read, thread)) {
            found_ = cell.read;
            return &found_;
        }
        // Of equal stores the first stays, which others may race with.
        if (after_write || kind != repeat) cell = {now, {}};
    }
    return nullptr;
}

}  // namespace standin
