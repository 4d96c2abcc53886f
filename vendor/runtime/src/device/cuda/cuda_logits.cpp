// What a GPU makes of logits, so that a few numbers cross to the host and not all of them.
#include <cstring>

#include "base/error.h"
#include "device/cuda/cuda_device.h"

namespace qi::cuda {

void CudaDevice::log_probabilities(const float* logits, int64_t n, int64_t n_vocab,
                                   const int32_t* targets, float* out) {
    const Current current = enter();
    const CUdeviceptr device_targets = terms_ + size_t(n) * sizeof(Kernels::LogTerms);
    stream_.copy_to_device(device_targets, targets, size_t(n) * sizeof(int32_t));
    share_.kernels->log_terms(stream_, address(logits), n, n_vocab, device_targets, terms_);
    std::vector<Kernels::LogTerms> terms(static_cast<size_t>(n));
    stream_.copy_to_host(terms.data(), terms_, terms.size() * sizeof(Kernels::LogTerms));
    stream_.synchronize();
    for (int64_t i = 0; i < n; ++i)
        out[i] = float(terms[size_t(i)].log_probability());
}

void CudaDevice::find_best(const float* logits, int64_t n, int64_t n_vocab, int64_t k) {
    if (n > needs_.n_logits || k > best_max())
        fail(QI_INTERNAL, "more logits are to be ranked than the device was made for");
    const Current current = enter();
    if (k == 1)
        share_.kernels->argmax(stream_, address(logits), n, n_vocab, tickets_, partial_best_,
                               best_);
    else
        share_.kernels->top_k(stream_, address(logits), n, n_vocab, k, tickets_, partial_best_,
                              best_);
    stream_.copy_to_host(candidates_.data(), best_, size_t(n * k) * sizeof(Candidate));
}

void CudaDevice::read_best(int64_t n, int64_t k, Candidate* out) {
    const Current current = enter();
    stream_.synchronize();
    std::memcpy(out, candidates_.data(), size_t(n * k) * sizeof(Candidate));
}

void CudaDevice::finish() {
    const Current current(*share_.gpu);
    stream_.synchronize();
    if (exchange_) exchange_->check();
}

}  // namespace qi::cuda
