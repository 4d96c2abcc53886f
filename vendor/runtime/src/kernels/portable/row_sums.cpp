// Portable build of the row sums.
#include "kernels/simd_portable.h"
// The level comes first.
#include "kernels/row_sums_impl.h"
