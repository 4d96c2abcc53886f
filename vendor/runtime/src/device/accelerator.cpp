#include "device/accelerator.h"

#include <charconv>

#include "base/error.h"
#ifdef QINFER_CUDA
#include "device/cuda/cuda_accelerator.h"
#endif

namespace qi {

std::unique_ptr<Accelerator> make_accelerator(const std::string& device,
                                              std::optional<size_t> budget) {
    const size_t colon = device.find(':');
    int ordinal = 0;
    bool is_number = true;
    if (colon != std::string::npos) {
        const char *begin = device.data() + colon + 1, *end = device.data() + device.size();
        const auto [at, problem] = std::from_chars(begin, end, ordinal);
        is_number = problem == std::errc() && at == end && ordinal >= 0;
    }
    if (device.substr(0, colon) != "cuda" || !is_number)
        fail(QI_ARGUMENT, "the device '%s' is not 'cuda' or 'cuda:N'", device.c_str());
#ifdef QINFER_CUDA
    return cuda::make_cuda_accelerator(ordinal, budget);
#else
    (void)budget;
    fail(QI_DEVICE, "this build of qinfer has no CUDA: it was made with -Ccuda=off");
#endif
}

}  // namespace qi
