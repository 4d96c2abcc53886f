// AVX-512 build of the row sums.
#include "kernels/simd_avx512.h"
// The level comes first.
#include "kernels/row_sums_impl.h"
