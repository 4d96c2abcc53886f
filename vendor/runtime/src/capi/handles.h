// What the opaque handles of qinfer.h hold.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "base/error.h"
#include "engine/context.h"
#include "engine/offload.h"
#include "gguf/file.h"
#include "model/model.h"
#include "qinfer.h"
#include "sampling/sampler.h"

struct qi_gguf {
    std::shared_ptr<const qi::gguf::File> file;
};

struct qi_model {
    std::shared_ptr<const qi::Model> model;
};

struct qi_offload {
    std::shared_ptr<qi::Offload> offload;
};

struct qi_sampler {
    qi_sampler(qi::SamplingParams params, int32_t n) : sampler(std::move(params), n), n_vocab(n) {}
    qi::Sampler sampler;
    int32_t n_vocab;
    std::atomic<bool> busy{false};
};

struct qi_context {
    qi_context(std::shared_ptr<const qi::Model> model, const qi::ContextOptions& options,
               std::shared_ptr<qi::Offload> offload)
        : context(std::move(model), options, std::move(offload)) {}
    qi::Context context;
    std::atomic<bool> busy{false};
};

namespace qi {

// Holds an object for one call; another thread inside it means QI_BUSY.
class Entered {
  public:
    Entered(std::atomic<bool>& busy, const char* what) : busy_(busy) {
        if (busy_.exchange(true, std::memory_order_acquire))
            fail(QI_BUSY, "this %s is in use by another thread; give each thread its own", what);
    }
    ~Entered() { busy_.store(false, std::memory_order_release); }
    Entered(const Entered&) = delete;
    Entered& operator=(const Entered&) = delete;

  private:
    std::atomic<bool>& busy_;
};

}  // namespace qi
