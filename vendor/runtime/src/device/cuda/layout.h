// How weight rows lie on the GPU: the fields of a row's blocks apart, in planes.
//
// File blocks of 18 to 210 bytes forbid wide loads. On the device a row is its planes one after the
// other, each padded with zeros to 16 bytes: codes first, then their high bits, then scales. All of
// it stays inside the row, so rows can be listed, moved and exchanged one by one. With b a block of
// 32 weights and s a block of 256:
//
//   F32 F16 BF16   values
//   Q4_0           codes [b][16] · scale f16 [b]
//   Q4_1           codes [b][16] · scale, minimum f16 [b][2]
//   Q5_0           codes [b][16] · fifth bits [b][4] · scale f16 [b]
//   Q5_1           codes [b][16] · fifth bits [b][4] · scale, minimum f16 [b][2]
//   Q8_0           codes 0-15 [b][16] · codes 16-31 [b][16] · scale f16 [b]
//   Q2_K           two bits [b][8] · scale and minimum of each half [b][2] · d, dmin f16 [s][2]
//   Q3_K           two bits [b][8] · third bits [b][4] · scales' low bits [b] · their high bits
//                  [s][4] · d f16 [s]
//   Q4_K           codes [b][16] · d, dmin, packed scales [s][16]
//   Q5_K           codes [b][16] · fifth bits [b][4] · d, dmin, packed scales [s][16]
//   Q6_K           low bits [b][16] · two high bits [b][8] · scales of halves [b][2] · d f16 [s]
//
// Inside a block: nibbles, byte i holds codes i and 16 + i. Two bits, byte i of word h holds at 2·q
// those of code 16·h + 4·q + i. One bit, byte i holds at q that of code 4·q + i. So shifts and
// masks give four neighbouring codes in one word, as __dp4a wants them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/types.h"

namespace qi::cuda {

// Bytes from a row to the next, a multiple of 16. n_cols is a multiple of the type's block size.
size_t device_row_bytes(Type type, int64_t n_cols);

// Puts n_rows rows as a file holds them, one after the other, to where the device wants them:
// row i at to + i · to_stride. Different rows may be repacked by different threads.
void repack_rows(Type type, int64_t n_cols, const std::byte* from, int64_t n_rows, std::byte* to,
                 size_t to_stride);

// A neuron's rows side by side, so that it is one unit to move. Without a gate gate_offset is 0 and
// takes no room; likewise down, where it is not stored by neuron.
struct NeuronLayout {
    size_t gate_offset = 0;
    size_t up_offset = 0;
    size_t down_offset = 0;
    size_t stride = 0;  // of a record, a multiple of 16
};
// A type is nullptr for rows that are not part of the record.
NeuronLayout neuron_layout(const Type* gate, const Type* up, const Type* down, int64_t n_embd);

}  // namespace qi::cuda
