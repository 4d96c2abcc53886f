// AVX-512 build of the attention.
#include "kernels/simd_avx512.h"
// The level comes first.
#include "kernels/attention_impl.h"
