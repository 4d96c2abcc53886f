// AVX-512 build of the codecs.
#include "quant/level_avx512.h"
// The level comes first.
#include "quant/encode32_impl.h"
// Then what encodes blocks of 32.
#include "quant/codec_impl.h"
