// How a card computes prompts faster: found by measuring, once per card, type of weights and number
// of tokens, and kept on disk.
//
// The file is text: a line that says what the findings hold for, then one line each, such as
//
//     Q4_0 rows 128 cublas
//
// the weights' type; what is computed: products with "rows", with the rows of "neurons" along the
// inner dimension (a down projection that is stored by neuron), or "streamed" neurons, which the
// host keeps; tokens up to which it holds, a power of two; and what is faster: "cublas" or "tiles"
// of products, of streamed neurons "gpu" or "host". A file whose first line is "by hand" is left
// alone; there a * stands for anything, and what comes first holds.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "device/cuda/gpu.h"
#include "quant/types.h"

namespace qi::cuda {

// Safe for several threads.
class ProductChoice {
  public:
    // Reads what is known of the card.
    explicit ProductChoice(const Gpu& gpu);

    enum class What { rows, neurons, streamed };

    // Whether cuBLAS, or streaming, is faster; nothing if it has not been measured.
    std::optional<bool> known(Type type, What what, int64_t n_tokens) const;
    void set(Type type, What what, int64_t n_tokens, bool faster);

  private:
    struct Finding {
        std::string type, what, tokens, winner;
    };
    void read();
    void write() const;

    std::string path_;  // empty: nothing is kept
    std::string head_;  // the file's first line
    bool by_hand_ = false;
    std::vector<Finding> findings_;
    mutable std::mutex mutex_;
};

}  // namespace qi::cuda
