// NEON build of the matrix kernels.
#include "kernels/neon/matmul_tile.h"
// The tile comes first.
#include "kernels/matmul_impl.h"
