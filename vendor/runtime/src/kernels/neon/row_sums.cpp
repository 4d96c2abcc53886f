// NEON build of the row sums.
#include "kernels/simd_neon.h"
// The level comes first.
#include "kernels/row_sums_impl.h"
