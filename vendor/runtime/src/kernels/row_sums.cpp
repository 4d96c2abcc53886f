// Row sums: scratch, and the choice of instruction set.
#include "kernels/row_sums.h"

#include "kernels/row_sums_layout.h"
#include "kernels/row_sums_table.h"

namespace qi::kernels {

AddRowSums* add_row_sums_for(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return portable::add_row_sums;
#if defined(__x86_64__)
        case Isa::avx2:
            return avx2::add_row_sums;
        case Isa::avx512:
            return avx512::add_row_sums;
#elif defined(__aarch64__)
        case Isa::neon:
            return neon::add_row_sums;
#endif
        default:
            return nullptr;
    }
}

size_t row_sums_scratch_bytes() {
    return sizeof(RowTile) + 64;
}

void add_row_sums(const RowSums& args, std::byte* scratch) {
    static AddRowSums* const active = add_row_sums_for(active_isa());
    active(args, scratch);
}

}  // namespace qi::kernels
