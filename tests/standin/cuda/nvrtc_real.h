// The real NVRTC, which STANDIN_NVRTC names, up to PTX.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace standin {

// The NVRTC result code (0: success), and what the compiler said. Options as given to the stand-in,
// but for the architecture.
int compile_to_ptx(const std::filesystem::path& library, const std::string& name,
                   const std::string& source, const std::map<std::string, std::string>& headers,
                   std::vector<std::string> options, int architecture, std::string& ptx,
                   std::string& log);

}  // namespace standin
