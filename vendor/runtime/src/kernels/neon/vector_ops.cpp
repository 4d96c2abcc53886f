// NEON build of the vector operators.
#include "kernels/simd_neon.h"
// The level comes first.
#include "kernels/vector_ops_impl.h"
