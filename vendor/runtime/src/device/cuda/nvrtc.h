// NVRTC: kernels compiled for the card that was found, and kept on disk.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace qi::cuda {

// Where NVRTC was found. Throws QI_DEVICE when it is not there.
struct NvrtcInfo {
    int major = 0;
    int minor = 0;
    std::string path;
};
const NvrtcInfo& nvrtc_info();

struct Cubin {
    enum class Origin { embedded, cached, compiled };
    std::vector<std::byte> bytes;
    Origin origin = Origin::compiled;
    double seconds = 0;  // spent compiling
};

// A unit is a file of kernels/ and its definitions, written as in kernels/units.txt: "matvec.cu
// QI_WEIGHT=Q4_0". `architecture` is the card's, 10 · major + minor. `from` is where to begin: what
// comes before in the order of Origin is passed over. Throws QI_DEVICE with the first lines of the
// compiler's log, QI_INTERNAL for a unit that does not exist.
Cubin make_cubin(std::string_view unit, int architecture,
                 Cubin::Origin from = Cubin::Origin::embedded);

}  // namespace qi::cuda
