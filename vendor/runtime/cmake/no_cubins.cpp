// Stands where embedded cubins would: kernels are compiled at first use.
#include "device/cuda/embedded.h"

namespace qi::cuda {

std::span<const EmbeddedCubin> embedded_cubins() {
    return {};
}

}  // namespace qi::cuda
