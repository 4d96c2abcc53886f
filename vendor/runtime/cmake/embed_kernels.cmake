# Writes kernel sources as C++: cmake -D OUTPUT=<file> -P embed_kernels.cmake -- <kernel files>
set(files "")
set(after_dashes FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
    if(after_dashes)
        list(APPEND files "${CMAKE_ARGV${i}}")
    elseif(CMAKE_ARGV${i} STREQUAL "--")
        set(after_dashes TRUE)
    endif()
endforeach()

set(entries "")
foreach(file IN LISTS files)
    file(READ "${file}" text)
    string(FIND "${text}" ")qi_kernel\"" ending)
    if(NOT ending EQUAL -1)
        message(FATAL_ERROR "${file} holds the characters that end its text in the generated file.")
    endif()
    get_filename_component(name "${file}" NAME)
    string(APPEND entries "    {\"${name}\", R\"qi_kernel(${text})qi_kernel\"},\n")
endforeach()

file(WRITE "${OUTPUT}" "// Generated from src/device/cuda/kernels by embed_kernels.cmake.
#include \"device/cuda/embedded.h\"

namespace qi::cuda {

namespace {
constexpr KernelSource sources[] = {
${entries}};
}  // namespace

std::span<const KernelSource> kernel_sources() {
    return sources;
}

}  // namespace qi::cuda
")
