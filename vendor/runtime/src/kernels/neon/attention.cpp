// NEON build of the attention.
#include "kernels/simd_neon.h"
// The level comes first.
#include "kernels/attention_impl.h"
