// Notices threads of a block that use the same shared memory in no order: one of them writes, and
// neither a barrier of the block nor one of their warp lies between. Shuffles, votes and products
// of matrices order nothing, as CUDA has it.
#pragma once

#include <cstdint>
#include <vector>

namespace standin {

class RaceCheck {
  public:
    enum Kind { load, store, atomic, repeat };  // repeat: stores what is there already

    struct Access {
        uint32_t epoch = 0;       // of the block
        uint32_t warp_epoch = 0;  // of the thread's warp
        uint16_t thread = 0;      // or `several`, or several_of a warp
        bool is_atomic = false;
        unsigned line = 0;
    };

    // Each begins what is ordered after all before it.
    void next_block() { epoch_++; }
    void block_barrier() { epoch_++; }
    void warp_barrier(unsigned warp) { warp_epochs_[warp]++; }

    // The earlier access that this one races with, or null.
    const Access* access(unsigned thread, uint32_t offset, uint32_t bytes, Kind kind,
                         unsigned line);

  private:
    static constexpr uint32_t granule = 2;  // bytes: kernels store no single ones
    static constexpr uint16_t several = 0xffff;
    static constexpr uint16_t of_warp = 0x8000;

    struct Cell {
        Access write, read;
    };

    bool is_ordered(const Access& before, unsigned thread) const;
    void add_read(Access& read, const Access& now) const;

    std::vector<Cell> cells_;
    uint32_t epoch_ = 1;
    uint32_t warp_epochs_[32] = {};
    Access found_;
};

}  // namespace standin
