// Portable build of the attention.
#include "kernels/simd_portable.h"
// The level comes first.
#include "kernels/attention_impl.h"
