// Portable build of the codecs.
#include "quant/level_portable.h"
// The level comes first.
#include "quant/encode32_plain.h"
// Then what encodes blocks of 32.
#include "quant/codec_impl.h"
