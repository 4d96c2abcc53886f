// AVX2 build of the attention.
#include "kernels/simd_avx2.h"
// The level comes first.
#include "kernels/attention_impl.h"
