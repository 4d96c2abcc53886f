// Which CUDA a library says it is of: 12 or 13, by its SONAME.
#pragma once

namespace standin {

extern const int cuda_major;

}  // namespace standin
