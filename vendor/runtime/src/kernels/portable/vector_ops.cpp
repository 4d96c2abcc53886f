// Portable build of the vector operators.
#include "kernels/simd_portable.h"
// The level comes first.
#include "kernels/vector_ops_impl.h"
