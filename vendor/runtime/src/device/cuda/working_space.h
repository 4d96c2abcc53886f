// The device memory that a context takes beside what the engine allocates: which arrays, how large,
// and where the inputs of a batch lie in theirs.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>

#include "device/accelerator.h"
#include "device/cuda/gpu.h"
#include "device/cuda/launch.h"
#include "device/cuda/product_choice.h"
#include "device/cuda/weights.h"

namespace qi::cuda {

class NeuronMover;

// What a GPU brings to all contexts of a model.
struct GpuShare {
    std::shared_ptr<Gpu> gpu;
    std::shared_ptr<Budget> budget;
    std::shared_ptr<Kernels> kernels;
    std::shared_ptr<Weights> weights;
    std::shared_ptr<ProductChoice> choice;
    bool has_cublas = false;
    std::shared_ptr<NeuronMover> mover;  // or null: neurons stay where they are
};

// Tokens that one launch of the matrix kernels takes.
inline constexpr int64_t few_tokens = 8;

// Pages of keys and values that the device has room for.
inline int64_t device_pages(const DeviceNeeds& needs) {
    return needs.kv_share.with_host ? needs.kv_share.n_pages : needs.n_pages;
}

// Where everything lies that begin() brings: one array of 32-bit words. What a few tokens need
// comes before the pages, so that one copy brings it together with those that are used.
class InputLayout {
  public:
    // base: what rounds of an Exchange are counted from.
    size_t positions = 0, tables, rules, base, pages, n_words;

    explicit InputLayout(const DeviceNeeds& needs);
    size_t tiles(int64_t n_tokens) const { return n_tokens <= few_tokens ? few_ : many_; }
    size_t cos_sin(int64_t n_tokens) const { return tiles(n_tokens) + 2 * size_t(n_tokens); }
    // [n_layer][n_tokens] of SharedKv.
    size_t bounds(int64_t n_tokens) const { return cos_sin(n_tokens) + size_t(n_tokens) * n_rot_; }
    size_t end(int64_t n_tokens) const { return bounds(n_tokens) + size_t(n_tokens) * n_bounds_; }

  private:
    size_t few_, many_, n_rot_, n_bounds_;
};

// Arrays in device memory that a context has beside those it allocates, and their bytes.
class WorkingSizes {
  public:
    enum Array {
        inputs,
        q8,
        predictor_q8,
        hidden,
        lifted,
        low,
        predictions,
        masks,
        listed,
        list,
        select_ticket,
        partial,
        down_tickets,
        attend,
        attend_tickets,
        terms,
        tickets,
        partial_best,
        best,
        totals,
        counts,
        exchange,
        kv_terms,
        kv_other,
        kv,
        narrowed,  // of prompts through cuBLAS, as `widened`; 0 where it is not used
        widened,
        panels,  // two, for neurons that the host keeps; 0: none are brought
        n_arrays
    };

    WorkingSizes(const GpuShare& share, const DeviceNeeds& needs, const KvArgs& kv_args);

    size_t operator[](Array array) const { return bytes_[array]; }
    size_t cublas() const { return cublas_; }  // its own, where it is used
    size_t counted_bytes() const;              // of the budget, all of it

  private:
    std::array<size_t, n_arrays> bytes_{};
    size_t cublas_ = 0;
};

// What is counted of each feed-forward network: neurons that were active, predicted, and, of
// predictions that are checked, due and missed.
inline constexpr size_t n_totals = 4;

// Candidates of a row of logits that the device finds at most.
inline int64_t best_of(const DeviceNeeds& needs) {
    return needs.n_logits ? std::min(Kernels::top_k_max, needs.n_vocab) : 0;
}

// Keys and values of a context, but for the layer.
KvArgs kv_args_for(const DeviceNeeds& needs);

// Device memory that a context of those needs takes of the budget, all of it.
size_t working_bytes(const GpuShare& share, const DeviceNeeds& needs);

}  // namespace qi::cuda
