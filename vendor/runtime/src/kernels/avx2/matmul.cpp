// AVX2 build of the matrix kernels.
#include "kernels/avx2/matmul_tile.h"
// The tile comes first.
#include "kernels/matmul_impl.h"
