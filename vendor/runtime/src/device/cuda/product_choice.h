// Whether cuBLAS or our own tiles multiply prompts faster on a card: found by measuring, once per
// card, type of weights and number of tokens, and kept on disk.
//
// The file is text: a line that says what the findings hold for, then one line each, such as
//
//     Q4_0 rows 128 cublas
//
// the weights' type, what lies along their rows' inner dimension ("neurons": a down projection that
// is stored by neuron), tokens up to which it holds, a power of two, and what is faster. A file
// whose first line is "by hand" is left alone; there a * stands for anything, and what comes first
// holds.
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

    enum class Inner { rows, neurons };

    // Whether cuBLAS is faster; nothing if it has not been measured.
    std::optional<bool> cublas(Type type, Inner inner, int64_t n_tokens) const;
    void set(Type type, Inner inner, int64_t n_tokens, bool cublas);

  private:
    struct Finding {
        std::string type, inner, tokens, winner;
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
