// Tokens from the most to the least likely, put in order only as far as somebody looks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "device/candidate.h"

namespace qi {

// What one pass over the logits finds.
struct LogitSummary {
    float best;         // the largest
    size_t n_possible;  // above -infinity
    bool has_nan;       // then the other two mean nothing
};
LogitSummary summarize(std::span<const float> logits);

// A candidate's weight is e^x, x = (logit - best) / temperature; its probability, weight / total.
struct Mass {
    double weight = 0.0;     // sum of the weights
    double weighted = 0.0;   // sum of weight times x
    double entropy() const;  // nats
};

// The candidates for the next token, at first all with a logit above -infinity.
class Ranking {
  public:
    // The logits hold no NaN and no +infinity, and outlive the ranking's use.
    void reset(std::span<const float> logits, const LogitSummary& summary);
    // The first n of more candidates, of which only the best, in order, are known: n and more.
    void reset(std::span<const Candidate> best, size_t n);
    void truncate(size_t n) { size_ = n < size_ ? n : size_; }  // to the n most likely
    void slice(size_t begin, size_t end);                       // to those ranks, at least one

    size_t size() const { return size_; }
    const Candidate& operator[](size_t rank) { return first(rank + 1)[rank]; }
    std::span<const Candidate> first(size_t n);  // the n most likely, in order

    double weight(float logit, float temperature) const;
    Mass mass(float temperature);
    size_t count_from(float logit);  // how many have this logit or a larger one

  private:
    bool is_whole() const { return size_ == n_possible_; }
    float exponent(float logit, float temperature) const;
    void select_best(size_t n);
    void sort_all();

    std::span<const float> logits_;
    std::vector<Candidate> ordered_;  // a prefix of the ranking
    std::vector<Candidate> scratch_;
    size_t size_ = 0;
    size_t n_possible_ = 0;  // of logits_; 0 once sliced, or where there are none
    float best_ = 0.0f;
};

}  // namespace qi
