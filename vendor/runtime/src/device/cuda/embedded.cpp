// Looking up embedded sources; their text is generated into the build tree by embed_kernels.cmake.
#include "device/cuda/embedded.h"

#include <string>

#include "base/error.h"

namespace qi::cuda {

std::string_view kernel_source(std::string_view name) {
    for (const KernelSource& source : kernel_sources())
        if (source.name == name) return source.text;
    fail(QI_INTERNAL, "there is no kernel source named '%s'", std::string(name).c_str());
}

}  // namespace qi::cuda
