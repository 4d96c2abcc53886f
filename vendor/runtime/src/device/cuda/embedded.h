// The kernels that the library carries: their source, and the cubins made when it was built.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace qi::cuda {

struct KernelSource {
    std::string_view name;  // "matvec.cu", "prelude.cuh"
    std::string_view text;  // NUL-terminated
};

// A unit, as a line of kernels/units.txt names it, compiled for one architecture.
struct EmbeddedCubin {
    std::string_view unit;  // "matvec.cu QI_WEIGHT=Q4_0"
    int architecture;       // 10 · major + minor
    std::span<const std::byte> bytes;
};

std::span<const KernelSource> kernel_sources();
// Throws QI_INTERNAL for a name that no file in kernels/ has.
std::string_view kernel_source(std::string_view name);

// Empty unless the library was built with embedded cubins.
std::span<const EmbeddedCubin> embedded_cubins();

}  // namespace qi::cuda
