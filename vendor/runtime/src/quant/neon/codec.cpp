// NEON build of the codecs.
#include "quant/level_neon.h"
// The level comes first.
#include "quant/encode32_impl.h"
// Then what encodes blocks of 32.
#include "quant/codec_impl.h"
