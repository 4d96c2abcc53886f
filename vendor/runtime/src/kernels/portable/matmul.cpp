// Portable build of the matrix kernels.
#include "kernels/portable/matmul_tile.h"
// The tile comes first.
#include "kernels/matmul_impl.h"
