#include "version.h"

namespace standin {

const int cuda_major = STANDIN_CUDA_MAJOR;

}  // namespace standin
