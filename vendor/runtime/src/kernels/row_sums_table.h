// The row sums of every instruction set, for dispatch and for tests.
#pragma once

#include "base/cpu.h"
#include "kernels/row_sums.h"

namespace qi::kernels {

using AddRowSums = void(const RowSums& args, std::byte* scratch);

// nullptr when this build has no kernels of that level.
AddRowSums* add_row_sums_for(Isa isa);

namespace portable {
AddRowSums add_row_sums;
}
namespace avx2 {
AddRowSums add_row_sums;
}
namespace avx512 {
AddRowSums add_row_sums;
}
namespace neon {
AddRowSums add_row_sums;
}

}  // namespace qi::kernels
