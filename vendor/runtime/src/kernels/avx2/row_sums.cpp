// AVX2 build of the row sums.
#include "kernels/simd_avx2.h"
// The level comes first.
#include "kernels/row_sums_impl.h"
