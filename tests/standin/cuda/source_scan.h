// What the stand-in's NVRTC has to know of a program's text before the host compiler gets it.
#pragma once

#include <string>
#include <vector>

namespace standin {

struct KernelName {
    std::string name;
    std::string max_threads;  // the first argument of __launch_bounds__, or "0"
};

// The `extern "C" __global__` functions of preprocessed text, each once.
std::vector<KernelName> find_kernels(const std::string& preprocessed);

// `extern __shared__ T name[];` made a pointer to the block's dynamic shared memory: a variable in
// a function, a macro at namespace scope. Lines keep their numbers.
std::string with_dynamic_shared(const std::string& text);

}  // namespace standin
