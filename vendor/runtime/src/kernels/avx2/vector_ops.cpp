// AVX2 build of the vector operators.
#include "kernels/simd_avx2.h"
// The level comes first.
#include "kernels/vector_ops_impl.h"
