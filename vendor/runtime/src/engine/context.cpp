#include "engine/context.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "base/cpu.h"
#include "base/error.h"
#include "base/log.h"
#include "kernels/attention.h"
#include "sampling/sampler.h"

namespace qi {

namespace {

constexpr int64_t default_batch = 512;
// Rows of logits that a device holds at a time, by the number of sequences: 32 rows of a 128k
// vocabulary are 16 MB.
constexpr int64_t logits_rows_least = 32, logits_rows_most = 256;

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

ContextOptions completed(const Model& model, ContextOptions options) {
    const HyperParams& hp = model.hyper_params();
    const int64_t limit = model.n_ctx_max();
    if (options.n_ctx == 0)
        options.n_ctx = limit ? std::min(limit, hp.n_ctx_train) : hp.n_ctx_train;
    if (options.n_ctx < 1)
        fail(QI_ARGUMENT, "n_ctx is %lld, expected at least 1", (long long)options.n_ctx);
    if (limit && options.n_ctx > limit)
        fail(QI_ARGUMENT, "n_ctx is %lld, but the model's position table ends at %lld",
             (long long)options.n_ctx, (long long)limit);
    if (options.n_seq < 1 || options.n_seq > 65536)
        fail(QI_ARGUMENT, "n_seq is %lld, expected 1 to 65536", (long long)options.n_seq);
    if (options.n_batch == 0) options.n_batch = default_batch;
    if (options.n_batch < 1 || options.n_batch > 65535)
        fail(QI_ARGUMENT, "n_batch is %lld, expected 1 to 65535", (long long)options.n_batch);
    if (options.n_threads == 0) options.n_threads = cpu_info().n_usable_cores;
    if (options.n_threads < 1 || options.n_threads > 1024)
        fail(QI_ARGUMENT, "n_threads is %d, expected 1 to 1024", options.n_threads);
    if (options.kv_type != Type::f16 && options.kv_type != Type::q8_0)
        fail(QI_ARGUMENT, "kv_type is %s, expected F16 or Q8_0",
             gguf_type_name(int32_t(options.kv_type)));
    if (options.kv_type == Type::q8_0 && hp.head_dim % 32 != 0)
        fail(QI_ARGUMENT,
             "kv_type Q8_0 needs heads of a multiple of 32 dimensions; this model's have %lld",
             (long long)hp.head_dim);
    check(options.kv);
    for (NeuronRule rule : {options.policy.prompt, options.policy.generated}) {
        if (rule == NeuronRule::exact && !is_sparse(hp.act))
            fail(QI_ARGUMENT,
                 "sparsity \"exact\" needs an activation that is zero for many inputs, such as "
                 "relu; "
                 "this model's is %s",
                 hidden_act_name(hp.act).c_str());
        if (rule == NeuronRule::predict && model.predictor_rank() == 0)
            fail(QI_ARGUMENT, "sparsity \"predict\" needs predictors, which %s does not have",
                 model.file().path().c_str());
    }
    const int64_t cross = options.policy.cross_layer_from;
    if (cross != 0 && model.predictor_rank() == 0)
        fail(QI_ARGUMENT, "cross_layer_from needs predictors, which %s does not have",
             model.file().path().c_str());
    if (cross < 0 || cross >= std::max(hp.n_layer, int64_t(1)))
        fail(QI_ARGUMENT,
             "cross_layer_from is %lld, expected a layer from 1 to %lld, or 0 for none",
             (long long)cross, (long long)hp.n_layer - 1);
    if (std::isnan(options.policy.threshold)) options.policy.threshold = hp.sparse_threshold;
    return options;
}

KvLayout kv_layout(const Model& model, Type type) {
    const HyperParams& hp = model.hyper_params();
    return {type, hp.n_layer, hp.n_head_kv, hp.head_dim};
}

}  // namespace

Context::Context(std::shared_ptr<const Model> model, const ContextOptions& options,
                 std::shared_ptr<Offload> offload)
    : model_(std::move(model)),
      options_(completed(*model_, options)),
      offload_(std::move(offload)),
      host_(make_cpu_device(options_.n_threads)),
      stages_(make_stages()),
      forward_(*model_, stages_, options_.policy.cross_layer_from),
      kv_(stages_, kv_layout(*model_, options_.kv_type), options_.n_seq, options_.n_ctx),
      logits_(last_device()) {
    host_->set_cancel(&cancel_);
    if (accelerator_) {
        accelerator_->set_cancel(&cancel_);
        forward_.reserve(batch_max());
        if (&last_device() == accelerator_.get())
            logits_.reserve(size_t(logits_rows() * model_->hyper_params().n_vocab));
    }
    monitor_.threshold = options_.policy.threshold;
    monitor_.counters.resize(size_t(model_->hyper_params().n_layer));
    published_.layers = monitor_.counters;
}

std::vector<Stage> Context::make_stages() {
    const HyperParams& hp = model_->hyper_params();
    if (!offload_) {
        if (!options_.kv.by_default())
            fail(QI_ARGUMENT,
                 "kv_mode, kv_ratio and kv_step say what of the keys and values an accelerator "
                 "keeps; without one the host keeps them all");
        return {{host_.get(), 0, hp.n_layer}};
    }
    DeviceNeeds needs;
    needs.n_batch = batch_max();
    needs.n_seq = options_.n_seq;
    needs.n_pages = KvCache::n_pages(options_.n_seq, options_.n_ctx);
    needs.kv = kv_layout(*model_, options_.kv_type);
    needs.arrays = ForwardPass::array_sizes(hp, batch_max(), options_.policy.cross_layer_from);
    needs.n_logits = logits_rows();
    needs.n_vocab = hp.n_vocab;
    needs.n_head = hp.n_head;
    needs.n_embd = hp.n_embd;
    needs.n_ff = hp.n_ff;
    needs.predictor_rank = model_->predictor_rank();
    needs.deterministic = options_.deterministic;
    Offload::Part part = offload_->make_part(needs, options_.kv, *host_);
    part_alive_ = std::move(part.alive);
    accelerator_ = std::move(part.device);
    accelerator_->set_threads(options_.n_threads);
    kv_share_ = part.kv_share;
    std::vector<Stage> stages{{accelerator_.get(), 0, part.n_layers}};
    if (part.n_layers < hp.n_layer || !part.head)
        stages.push_back({host_.get(), part.n_layers, hp.n_layer});
    return stages;
}

int64_t Context::batch_max() const {
    return std::min(options_.n_batch, options_.n_ctx * options_.n_seq);
}

int64_t Context::logits_rows() const {
    return std::clamp(options_.n_seq, logits_rows_least, logits_rows_most);
}

void Context::check_seq(int32_t seq) const {
    if (seq < 0 || seq >= options_.n_seq)
        fail(QI_ARGUMENT, "sequence %d is out of range: this context holds 0 to %lld", seq,
             (long long)options_.n_seq - 1);
}

void Context::check_token(int32_t token) const {
    if (token < 0 || token >= model_->hyper_params().n_vocab)
        fail(QI_ARGUMENT, "token %d is out of range: the vocabulary has 0 to %lld", token,
             (long long)model_->hyper_params().n_vocab - 1);
}

void Context::run(std::span<const FeedToken> tokens, const ChunkWork& work) {
    std::vector<int64_t> n_of(size_t(options_.n_seq), 0);
    for (const FeedToken& t : tokens) {
        check_seq(t.seq);
        check_token(t.token);
        ++n_of[size_t(t.seq)];
    }
    struct Start {
        int32_t seq;
        int64_t length;
    };
    std::vector<Start> starts;
    bool generating = true;
    for (int32_t s = 0; s < options_.n_seq; ++s) {
        if (n_of[size_t(s)] == 0) continue;
        starts.push_back({s, kv_.length(s)});
        generating &= n_of[size_t(s)] == 1;
    }
    tokens_all_.store(int64_t(tokens.size()), std::memory_order_relaxed);
    tokens_done_.store(0, std::memory_order_relaxed);
    const auto start_time = Clock::now();
    if (!generating) collect_counters();
    const uint64_t ffn_bytes_before = ffn_bytes_counted();
    const uint64_t launches_before = accelerator_ ? accelerator_->n_launches() : 0;
    monitor_.check = check_every_ > 0 && (!generating || n_until_check_ == 0);
    if (generating && check_every_ > 0)
        n_until_check_ = monitor_.check ? check_every_ - 1 : n_until_check_ - 1;
    // Where each sequence's next token goes, while chunks are computed.
    std::vector<int64_t> next(size_t(options_.n_seq), 0);
    try {
        for (const Start& start : starts) {
            kv_.extend(start.seq, n_of[size_t(start.seq)]);
            next[size_t(start.seq)] = start.length;
        }
        for (size_t first = 0; first < tokens.size(); first += size_t(options_.n_batch)) {
            const auto chunk =
                tokens.subspan(first, std::min(tokens.size() - first, size_t(options_.n_batch)));
            const auto n = int64_t(chunk.size());
            const Batch batch = arrange_chunk(chunk, next);
            const HeadRequest wanted = work.wanted ? work.wanted(int64_t(first), n) : HeadRequest{};
            tokens_chunk_.store(n, std::memory_order_relaxed);
            layers_done_.store(0, std::memory_order_relaxed);
            forward_.run(batch, wanted, monitor_, &layers_done_);
            work.done(int64_t(first), n);
            tokens_done_.fetch_add(n, std::memory_order_relaxed);
        }
        for (const Stage& stage : stages_)
            stage.device->finish();
        if (!generating) collect_counters();
    } catch (...) {
        for (const Start& start : starts)
            kv_.truncate(start.seq, start.length);
        n_logits_ = n_hidden_ = 0;
        throw;
    }
    if (generating) {
        stats_.n_generated_tokens += tokens.size();
        stats_.generated_seconds += seconds_since(start_time);
        stats_.weight_bytes_read += model_->n_bytes_per_token() - model_->n_ffn_bytes_per_token();
        if (accelerator_) stats_.n_launches += accelerator_->n_launches() - launches_before;
    } else {
        ffn_bytes_of_prompts_ += ffn_bytes_counted() - ffn_bytes_before;
        stats_.n_prompt_tokens += tokens.size();
        stats_.prompt_seconds += seconds_since(start_time);
    }
}

// Brings a chunk's tokens into rows, each sequence's together and in order.
Batch Context::arrange_chunk(std::span<const FeedToken> tokens, std::vector<int64_t>& next) {
    const size_t n = tokens.size();
    order_.resize(n);
    for (size_t i = 0; i < n; ++i)
        order_[i] = int64_t(i);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
        return tokens[size_t(a)].seq < tokens[size_t(b)].seq;
    });
    chunk_tokens_.resize(n);
    chunk_positions_.resize(n);
    row_of_.resize(n);
    rules_.resize(n);
    segments_.clear();
    for (size_t row = 0; row < n; ++row) {
        const FeedToken& t = tokens[size_t(order_[row])];
        int64_t& position = next[size_t(t.seq)];
        if (row == 0 || t.seq != tokens[size_t(order_[row - 1])].seq)
            segments_.push_back({int64_t(row), 0, position, kv_.pages(t.seq)});
        ++segments_.back().n;
        chunk_tokens_[row] = t.token;
        rules_[row] = options_.policy.rule((t.flags & QI_GENERATED) != 0);
        chunk_positions_[row] = int32_t(position++);
        row_of_[size_t(order_[row])] = int64_t(row);
    }
    return {chunk_tokens_, chunk_positions_, segments_, rules_};
}

void Context::want_last_logits(std::span<FeedToken> tokens) const {
    std::vector<bool> seen(size_t(options_.n_seq), false);
    for (auto t = tokens.rbegin(); t != tokens.rend(); ++t) {
        check_seq(t->seq);
        if (!seen[size_t(t->seq)]) t->flags |= QI_WANT_LOGITS;
        seen[size_t(t->seq)] = true;
    }
}

void Context::feed(std::span<const FeedToken> tokens) {
    const std::lock_guard lock(counting_);
    compute(tokens, 0);
    publish();
}

void Context::compute(std::span<const FeedToken> tokens, int64_t n_best) {
    const HyperParams& hp = model_->hyper_params();
    uint64_t n_logits = 0, n_hidden = 0;
    for (const FeedToken& t : tokens) {
        n_logits += (t.flags & QI_WANT_LOGITS) != 0;
        n_hidden += (t.flags & QI_WANT_HIDDEN) != 0;
    }
    n_logits_ = n_hidden_ = 0;
    host_logits_ = nullptr;
    if (tokens.empty()) return;
    const auto n_embd = size_t(hp.n_embd), n_vocab = size_t(hp.n_vocab);
    // Few rows stay where they are computed, more are brought to the host block by block.
    const auto rows_max = size_t(logits_rows());
    const bool few = n_logits <= rows_max;
    float* logits = logits_.reserve(std::min(n_logits, rows_max) * n_vocab);
    float* all_logits = few ? nullptr : all_logits_.reserve(n_logits * n_vocab);
    hidden_.reserve(n_hidden * n_embd);
    best_.resize(n_logits * size_t(n_best));

    std::vector<int64_t> rows;  // of the chunk now computed
    const auto find_rows = [&](uint8_t what, int64_t first, int64_t n) {
        rows.clear();
        for (int64_t i = 0; i < n; ++i)
            if (tokens[size_t(first + i)].flags & what) rows.push_back(row_of_[size_t(i)]);
    };
    uint64_t logits_done = 0, hidden_done = 0;
    const auto next_block = [&](size_t begin) -> HeadRequest {
        return {std::span(rows).subspan(begin, std::min(rows.size() - begin, rows_max)),
                few ? logits + logits_done * n_vocab : logits, n_best};
    };
    ChunkWork work;
    work.wanted = [&](int64_t first, int64_t n) {
        find_rows(QI_WANT_LOGITS, first, n);
        return next_block(0);
    };
    work.done = [&](int64_t first, int64_t n) {
        for (size_t begin = 0; begin < rows.size(); begin += rows_max) {
            const HeadRequest block = next_block(begin);
            const size_t n_block = block.rows.size();
            if (begin > 0) forward_.head(block);
            if (n_best > 0)
                last_device().read_best(int64_t(n_block), n_best,
                                        best_.data() + logits_done * size_t(n_best));
            if (!few)
                std::copy_n(last_device().host_view(block.logits, n_block * n_vocab, host_room_),
                            n_block * n_vocab, all_logits + logits_done * n_vocab);
            logits_done += n_block;
        }
        find_rows(QI_WANT_HIDDEN, first, n);
        if (rows.empty()) return;
        const size_t n_values = rows.size() * n_embd;
        std::copy_n(last_device().host_view(forward_.final_norm(rows), n_values, host_room_),
                    n_values, hidden_.data() + hidden_done * n_embd);
        hidden_done += rows.size();
    };
    run(tokens, work);
    if (!few) host_logits_ = all_logits;
    n_logits_ = n_logits;
    n_hidden_ = n_hidden;
}

std::span<const float> Context::logits(uint64_t index) {
    if (index >= n_logits_)
        fail(QI_ARGUMENT, "logits %llu were not asked for: the last feed gave %llu rows",
             (unsigned long long)index, (unsigned long long)n_logits_);
    const auto n = size_t(model_->hyper_params().n_vocab);
    if (!host_logits_)
        host_logits_ = last_device().host_view(logits_.data(), n_logits_ * n, host_room_);
    return {host_logits_ + index * n, n};
}

std::span<const float> Context::hidden(uint64_t index) const {
    if (index >= n_hidden_)
        fail(QI_ARGUMENT, "hidden state %llu was not asked for: the last feed gave %llu rows",
             (unsigned long long)index, (unsigned long long)n_hidden_);
    const auto n = size_t(model_->hyper_params().n_embd);
    return {hidden_.data() + index * n, n};
}

void Context::step(std::span<const FeedToken> tokens, std::span<Sampler* const> samplers,
                   int32_t* next) {
    std::vector<bool> seen(size_t(options_.n_seq), false);
    for (const FeedToken& t : tokens) {
        check_seq(t.seq);
        if (seen[size_t(t.seq)]) fail(QI_ARGUMENT, "sequence %d is given twice in one step", t.seq);
        seen[size_t(t.seq)] = true;
    }
    // Some samplers need no more than the best logits.
    const int64_t most = last_device().best_max();
    std::vector<size_t> n_deciding;
    size_t n_best = 0;
    for (const Sampler* sampler : samplers) {
        const size_t n = sampler->n_deciding();
        n_deciding.push_back(int64_t(n) <= most ? n : 0);
        n_best = std::max(n_best, n_deciding.back());
    }
    const std::lock_guard lock(counting_);
    compute(tokens, int64_t(n_best));
    const auto start = Clock::now();
    try {
        for (size_t i = 0; i < tokens.size(); ++i) {
            std::optional<int32_t> token;
            if (n_deciding[i] > 0)
                token = samplers[i]->sample_best({best_.data() + i * n_best, n_deciding[i]});
            next[i] = token ? *token : samplers[i]->sample(logits(i));
        }
    } catch (...) {
        for (const FeedToken& t : tokens)
            kv_.truncate(t.seq, kv_.length(t.seq) - 1);
        throw;
    }
    stats_.sample_seconds += seconds_since(start);
    publish();
}

void Context::score(int32_t seq, std::span<const int32_t> tokens, std::span<const int32_t> targets,
                    bool generated, float* logprobs) {
    const HyperParams& hp = model_->hyper_params();
    std::vector<FeedToken> feed_tokens;
    feed_tokens.reserve(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) {
        if (targets[i] != -1) check_token(targets[i]);
        feed_tokens.push_back({tokens[i], seq, uint8_t(generated ? QI_GENERATED : 0)});
    }
    n_logits_ = n_hidden_ = 0;
    if (tokens.empty()) return;
    std::fill_n(logprobs, tokens.size(), 0.0f);
    std::vector<int64_t> rows;
    std::vector<int32_t> wanted;
    std::vector<float> found;
    const std::lock_guard lock(counting_);
    const auto score_chunk = [&](int64_t first, int64_t n) {
        for (int64_t i = 0; i < n;) {
            rows.clear();
            wanted.clear();
            const int64_t begin = i;
            for (; i < n && int64_t(rows.size()) < logits_rows_least; ++i) {
                if (targets[size_t(first + i)] == -1) continue;
                rows.push_back(row_of_[size_t(i)]);
                wanted.push_back(targets[size_t(first + i)]);
            }
            if (rows.empty()) break;
            const auto n_rows = int64_t(rows.size());
            float* logits = logits_.reserve(rows.size() * size_t(hp.n_vocab));
            forward_.head({rows, logits});
            found.resize(rows.size());
            last_device().log_probabilities(logits, n_rows, hp.n_vocab, wanted.data(),
                                            found.data());
            size_t row = 0;
            for (int64_t j = begin; j < i; ++j)
                if (targets[size_t(first + j)] != -1) logprobs[first + j] = found[row++];
        }
    };
    run(feed_tokens, {nullptr, score_chunk});
    publish();
}

int64_t Context::length(int32_t seq) const {
    check_seq(seq);
    return kv_.length(seq);
}

void Context::truncate(int32_t seq, int64_t n_keep) {
    check_seq(seq);
    if (n_keep < 0 || n_keep > kv_.length(seq))
        fail(QI_ARGUMENT, "cannot keep %lld positions of sequence %d, which holds %lld",
             (long long)n_keep, seq, (long long)kv_.length(seq));
    kv_.truncate(seq, n_keep);
}

void Context::fork(int32_t source, int32_t target, int64_t n_keep) {
    check_seq(source);
    check_seq(target);
    if (n_keep == -1) n_keep = kv_.length(source);
    if (n_keep < 0 || n_keep > kv_.length(source))
        fail(QI_ARGUMENT, "cannot keep %lld positions of sequence %d, which holds %lld",
             (long long)n_keep, source, (long long)kv_.length(source));
    kv_.fork(source, target, n_keep);
}

double Context::progress() const {
    const auto all = double(tokens_all_.load(std::memory_order_relaxed));
    if (all == 0) return 1.0;
    const double of_chunk = double(layers_done_.load(std::memory_order_relaxed)) /
                            double(model_->hyper_params().n_layer);
    const double done = double(tokens_done_.load(std::memory_order_relaxed)) +
                        double(tokens_chunk_.load(std::memory_order_relaxed)) * of_chunk;
    return std::min(1.0, done / all);
}

void Context::set_threads(int n_threads) {
    ContextOptions changed = options_;
    changed.n_threads = n_threads;
    options_ = completed(*model_, changed);
    host_->set_threads(options_.n_threads);
    if (accelerator_) accelerator_->set_threads(options_.n_threads);
}

void Context::collect_counters() const {
    if (accelerator_) accelerator_->collect_counters();
}

// What others read from now on. Devices' own counters cost a moment and are brought only where
// somebody looks.
void Context::publish() const {
    if (wanted_.exchange(false, std::memory_order_relaxed)) {
        try {
            collect_counters();
        } catch (const Error& error) {
            // What was computed stands; the counters are those of before.
            log(LogLevel::warning, format("counters could not be read: %s", error.what()));
        }
    }
    qi_stats stats = stats_;
    if (stats.n_generated_tokens > 0)
        stats.weight_bytes_read += ffn_bytes_counted() - ffn_bytes_of_prompts_;
    const std::lock_guard lock(publishing_);
    published_.stats = stats;
    published_.layers = monitor_.counters;
}

// Where no other thread computes.
void Context::refresh_published() const {
    wanted_.store(true, std::memory_order_relaxed);
    const std::unique_lock lock(counting_, std::try_to_lock);
    if (lock) publish();
}

qi_stats Context::stats() const {
    refresh_published();
    const std::lock_guard lock(publishing_);
    return published_.stats;
}

uint64_t Context::ffn_bytes_counted() const {
    uint64_t total = 0;
    for (const FfnCounters& counters : monitor_.counters)
        total += counters.n_bytes;
    return total;
}

void Context::reset_stats() {
    const std::lock_guard lock(counting_);
    collect_counters();
    stats_ = {};
    ffn_bytes_of_prompts_ = 0;
    std::fill(monitor_.counters.begin(), monitor_.counters.end(), FfnCounters{});
    std::fill(monitor_.activations.begin(), monitor_.activations.end(), 0);
    publish();
}

void Context::check_predictions(int64_t every) {
    check_every_ = every;
}

void Context::count_activations(bool on) {
    const std::lock_guard lock(counting_);
    collect_counters();
    const HyperParams& hp = model_->hyper_params();
    // The array stays where it is: devices have been told of it.
    monitor_.activations.clear();
    if (on) monitor_.activations.resize(size_t(hp.n_layer * hp.n_ff));
}

FfnCounters Context::layer_counters(int64_t layer) const {
    check_layer(layer);
    refresh_published();
    const std::lock_guard lock(publishing_);
    return published_.layers[size_t(layer)];
}

std::span<const uint64_t> Context::activations(int64_t layer) const {
    check_layer(layer);
    const std::lock_guard lock(counting_);
    collect_counters();
    if (monitor_.activations.empty()) fail(QI_ARGUMENT, "activations are not being counted");
    const auto n_ff = size_t(model_->hyper_params().n_ff);
    return {monitor_.activations.data() + size_t(layer) * n_ff, n_ff};
}

void Context::check_layer(int64_t layer) const {
    if (layer < 0 || layer >= model_->hyper_params().n_layer)
        fail(QI_ARGUMENT, "layer %lld does not exist: the model has 0 to %lld", (long long)layer,
             (long long)model_->hyper_params().n_layer - 1);
}

KvMode Context::kv_mode() const {
    if (!accelerator_) return KvMode::host;
    if (!kv_share_.with_host) return KvMode::device;
    return kv_share_.n_pages > 0 ? KvMode::split : KvMode::host;
}

int64_t Context::kv_device_pages() const {
    if (!accelerator_) return 0;
    return kv_share_.with_host ? kv_share_.n_pages
                               : KvCache::n_pages(options_.n_seq, options_.n_ctx);
}

double Context::kv_host_share(int64_t layer) const {
    check_layer(layer);
    const Stage& stage = layer < stages_[0].end_layer ? stages_[0] : stages_.back();
    if (stage.device == host_.get()) return 1.0;
    return stage.device->kv_host_share(layer - stage.first_layer);
}

int Context::page_size() const {
    return kernels::page_size;
}

uint64_t Context::scratch_bytes() const {
    return forward_.scratch_bytes() + host_->scratch_bytes() + logits_.capacity_bytes() +
           host_room_.capacity_bytes() + all_logits_.capacity_bytes() + hidden_.capacity_bytes();
}

}  // namespace qi
