// What the opaque handles of qinfer.h hold.
#pragma once

#include <atomic>
#include <memory>
#include <utility>

#include "engine/context.h"
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

struct qi_sampler {
    qi_sampler(qi::SamplingParams params, int32_t n) : sampler(std::move(params), n), n_vocab(n) {}
    qi::Sampler sampler;
    int32_t n_vocab;
};

struct qi_context {
    qi_context(std::shared_ptr<const qi::Model> model, const qi::ContextOptions& options)
        : context(std::move(model), options) {}
    qi::Context context;
    std::atomic<bool> busy{false};
};
