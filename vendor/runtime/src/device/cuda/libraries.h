// NVRTC and cuBLAS: where they are looked for, and in which version.
#pragma once

#include <string>
#include <vector>

namespace qi::cuda {

struct Configuration {
    std::vector<std::string> folders;  // where libraries are looked for before the system's places
    std::string cache_folder;          // of compiled kernels; empty: none are kept
};

// Takes effect for what is loaded and compiled from then on. From any thread.
void configure(Configuration configuration);
Configuration configuration();

// A shared library of the CUDA toolkit, found and loaded for good.
struct ToolkitLibrary {
    void* handle = nullptr;
    std::string path;  // of the file, as the dynamic linker has it
    int major = 0;     // of CUDA
};

// Loads "lib<name>.so.<major>": the one that this process has already, else from the configured
// folders, else what the system's linker finds, else from CUDA_PATH. The major is 13 or 12 for a
// driver of CUDA 13, else 12. `companions` names files (with one * for the version) that are loaded
// first from the same folder, for builds that do not find their own parts. Throws QI_DEVICE with
// what is missing and how to get it: `purpose` is what the library is for.
ToolkitLibrary load_toolkit_library(const char* name, const std::vector<std::string>& companions,
                                    const char* purpose);

// "pip install \".[cuda12]\"" or "…[cuda]…", as it fits the driver.
const char* install_line(int driver_version);

}  // namespace qi::cuda
