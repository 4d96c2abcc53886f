// What the codecs need of an instruction set: here nothing but the compiler's own vectors.
//
// A level_*.h names its level and offers `width`, the floats in a register, and conversion between
// halves and floats. Those of vector instruction sets have also what encode32_impl.h is written
// over, which level_avx2.h lists. A codec includes one level_*.h and puts itself into namespace
// QI_CODEC_LEVEL, so that no function compiled for one level can be linked in place of another's;
// hence also no std:: templates there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/half.h"

#define QI_CODEC_LEVEL portable

namespace qi::codecs::portable {

inline constexpr int width = 4;

inline void widen_f16(const std::byte* halves, float* out) {
    f16_bits bits[width];
    __builtin_memcpy(bits, halves, sizeof bits);
    for (int i = 0; i < width; i++)
        out[i] = f16_to_f32(bits[i]);
}

inline void narrow_f16(const float* values, std::byte* halves) {
    f16_bits bits[width];
    for (int i = 0; i < width; i++)
        bits[i] = f32_to_f16(values[i]);
    __builtin_memcpy(halves, bits, sizeof bits);
}

}  // namespace qi::codecs::portable
