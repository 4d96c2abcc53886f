#include "device/cuda/cuda_device.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/cpu.h"
#include "base/error.h"
#include "base/log.h"
#include "base/thread_pool.h"
#include "kernels/attention.h"
#include "kernels/vector_ops.h"

namespace qi::cuda {

namespace {

constexpr size_t recordings_max = 64;
constexpr int failed_recordings_max = 3;

}  // namespace

CudaDevice::CudaDevice(const GpuShare& share, const DeviceNeeds& needs, Device& host)
    : share_(share),
      needs_(needs),
      host_(host),
      layout_(needs),
      stream_(share.gpu),
      kv_(kv_args_for(needs)),
      staged_(share.gpu, layout_.n_words * sizeof(uint32_t), "the inputs of a batch"),
      staged_sent_(share.gpu),
      embedded_(share.gpu, size_t(needs.n_batch * needs.n_embd) * sizeof(float), "embeddings"),
      embedded_sent_(share.gpu),
      candidates_(share.gpu, size_t(needs.n_logits * best_of(needs)) * sizeof(Candidate),
                  "candidates for the next token") {
    const Current current(*share_.gpu);
    using enum WorkingSizes::Array;
    const WorkingSizes sizes(share_, needs_, kv_);
    inputs_ = take(sizes[inputs], "the inputs of a batch");
    q8_ = take(sizes[q8], "quantised activations");
    predictor_q8_ = take(sizes[predictor_q8], "quantised activations");
    hidden_ = take(sizes[hidden], "activations");
    lifted_ = take(sizes[lifted], "activations");
    low_ = take(sizes[low], "predictions");
    predictions_ = take(sizes[predictions], "predictions");
    masks_ = take(sizes[masks], "predictions");
    listed_ = take(sizes[listed], "predictions");
    if (sizes[list]) list_ = NeuronList::at(take(sizes[list], "predictions"), needs.n_ff);
    select_ticket_ = take_zeros(sizes[select_ticket], "predictions");
    partial_ = take(sizes[partial], "activations");
    down_tickets_ = take_zeros(sizes[down_tickets], "activations");
    attend_room_ = take(sizes[attend], "attention");
    attend_tickets_ = take_zeros(sizes[attend_tickets], "attention");
    terms_ = take(sizes[terms], "log-probabilities");
    tickets_ = take_zeros(sizes[tickets], "logits");
    partial_best_ = take(sizes[partial_best], "logits");
    best_ = take(sizes[best], "logits");
    totals_ = take_zeros(sizes[totals], "counters");
    counts_ = take_zeros(sizes[counts], "counters");
    tallies_.resize(share_.weights->n_ffns());
    if (sizes.cublas()) {
        const CUdeviceptr narrow = take(sizes[narrowed], "activations");
        const CUdeviceptr wide = take(sizes[widened], "weights of prompts");
        halves_.emplace(stream_, share_.budget, *share_.kernels,
                        HalfProducts::Room{narrow, wide, sizes[widened]});
        scratch_bytes_ += sizes.cublas();
    }
    if (sizes[panels] && !share_.weights->all_resident())
        panels_.emplace(share_.gpu, take(sizes[panels], "neurons of the host"), sizes[panels] / 2);
    const CUdeviceptr exchange_room = take(sizes[exchange], "counters");
    kv_terms_ = take(sizes[kv_terms], "attention");
    kv_other_ = take(sizes[kv_other], "attention");
    kv_.pool = take(sizes[kv], "keys and values");
    for (const size_t n : needs.arrays)
        spare_.emplace_back(share_.gpu, share_.budget, n * sizeof(float), "activations");
    spare_.emplace_back(share_.gpu, share_.budget,
                        size_t(needs.n_logits * needs.n_vocab) * sizeof(float), "logits");
    stream_.synchronize();
    const auto n_ffns = int64_t(share_.weights->n_ffns());
    if (needs.kv_share.with_host) {
        exchange_.emplace(share_.gpu, stream_, exchange_room, kind_of_kv(needs.kv.n_layer));
        shared_kv_.emplace(share_, needs);
        if (shared_kv_->boundaries().adapts() && !exchange_->can_be_recorded())
            log(LogLevel::warning,
                "the share of keys and values that the processor attends to stays as it is: only "
                "recorded steps tell how long each side takes");
    } else if (!share_.weights->all_resident()) {
        exchange_.emplace(share_.gpu, stream_, exchange_room, n_ffns);
    }
    shared_.resize(size_t(n_ffns));
    if (share_.weights->all_resident()) return;
    if (share_.mover) member_ = std::make_unique<NeuronMover::Member>(share_.mover);
    const size_t rows = size_t(needs.n_batch * needs.n_embd) * sizeof(float);
    const char* const what = "what the processor computes";
    host_x_ = PinnedMemory(share_.gpu, rows, what);
    host_y_ = PinnedMemory(share_.gpu, rows, what);
    if (needs.predictor_rank == 0) return;
    host_z_ = PinnedMemory(share_.gpu, rows, what);
    host_names_ = PinnedMemory(
        share_.gpu, size_t(needs.n_batch * name_words(needs.n_ff)) * sizeof(uint32_t), what);
    if (member_) named_.resize(size_t(needs.n_batch * name_words(needs.n_ff)));
}

CudaDevice::~CudaDevice() {
    // Memory goes back only when nothing writes into it any more.
    try {
        const Current current(*share_.gpu);
        stream_.synchronize();
    } catch (...) {
    }
}

CUdeviceptr CudaDevice::take(size_t n_bytes, const char* what) {
    if (n_bytes == 0) return 0;
    memory_.emplace_back(share_.gpu, share_.budget, n_bytes, what);
    scratch_bytes_ += memory_.back().n_bytes();
    return memory_.back().address();
}

CUdeviceptr CudaDevice::take_zeros(size_t n_bytes, const char* what) {
    const CUdeviceptr at = take(n_bytes, what);
    if (at) stream_.fill(at, 0, n_bytes);
    return at;
}

void CudaDevice::set_cancel(const std::atomic<bool>* cancel) {
    cancel_ = cancel;
    if (shared_kv_) shared_kv_->products().set_cancel(cancel);
}

void CudaDevice::set_threads(int n_threads) {
    if (shared_kv_) shared_kv_->products().set_threads(n_threads);
}

Current CudaDevice::enter() const {
    if (cancel_ && cancel_->load(std::memory_order_relaxed)) fail(QI_CANCELLED, "cancelled");
    return Current(*share_.gpu);
}

// ---- memory ----

float* CudaDevice::allocate(size_t n) {
    const Current current(*share_.gpu);
    const auto spare = std::find_if(spare_.begin(), spare_.end(), [&](const DeviceMemory& memory) {
        return memory.n_bytes() == n * sizeof(float);
    });
    DeviceMemory memory;
    if (spare != spare_.end()) {
        memory = std::move(*spare);
        spare_.erase(spare);
    } else {
        memory = DeviceMemory(share_.gpu, share_.budget, n * sizeof(float), "activations");
    }
    auto* const array = reinterpret_cast<float*>(memory.address());
    stream_.fill(memory.address(), 0, n * sizeof(float));
    arrays_.emplace(array, std::move(memory));
    return array;
}

void CudaDevice::release(float* array) {
    forget_prepared(array);
    recordings_.clear();  // they may use it
    try {
        const Current current(*share_.gpu);
        stream_.synchronize();  // so may what is under way
    } catch (const Error&) {
        // A lost device uses nothing any more.
    }
    arrays_.erase(array);
}

const float* CudaDevice::host_view(const float* x, size_t n, AlignedBuffer<float>&) {
    const Current current(*share_.gpu);
    if (readback_.n_bytes() < n * sizeof(float))
        readback_ = PinnedMemory(share_.gpu, n * sizeof(float), "results");
    stream_.copy_to_host(readback_.data(), address(x), n * sizeof(float));
    stream_.synchronize();
    return reinterpret_cast<const float*>(readback_.data());
}

void CudaDevice::write(const float* host, size_t n, float* out) {
    const Current current = enter();
    forget_prepared(out);
    stream_.copy_to_device(address(out), host, n * sizeof(float));
    stream_.synchronize();
}

// ---- steps ----

void CudaDevice::begin(const BatchInputs& inputs) {
    const Current current = enter();
    adapt_kv();
    batch_ = inputs;
    staged_sent_.synchronize();
    auto* const words = reinterpret_cast<int32_t*>(staged_.data());
    int32_t *positions = words + layout_.positions, *tables = words + layout_.tables;
    int32_t *tiles = words + layout_.tiles(inputs.n_tokens), *pages = words + layout_.pages;
    auto* const rules = reinterpret_cast<uint8_t*>(words + layout_.rules);
    words[layout_.base] = exchange_ ? int32_t(exchange_->begin()) : 0;
    for (int64_t t = 0; t < inputs.n_tokens; ++t)
        rules[t] = uint8_t(inputs.rules[size_t(t)]);

    AttendArgs shape;
    shape.kv = kv_;
    shape.n_head = needs_.n_head;
    const int64_t tile_tokens = Kernels::attend_tile_tokens(shape);
    int64_t n_pages = 0;
    std::vector<int64_t> n_placed;
    n_tiles_ = max_positions_ = 0;
    for (const Segment& segment : inputs.segments) {
        for (int64_t i = 0; i < segment.n; ++i) {
            positions[segment.row + i] = int32_t(segment.position + i);
            tables[segment.row + i] = int32_t(n_pages);
        }
        const int64_t end = segment.position + segment.n;
        const int64_t n_own = (end + kernels::page_size - 1) / kernels::page_size;
        if (shared_kv_)
            n_placed.push_back(place_pages(segment, n_own, pages + n_pages));
        else
            std::copy_n(segment.pages, n_own, pages + n_pages);
        n_pages += n_own;
        max_positions_ = std::max(max_positions_, end);
        for (int64_t i = 0; i < segment.n && tile_tokens > 0; i += tile_tokens) {
            tiles[2 * n_tiles_] = int32_t(segment.row + i);
            tiles[2 * n_tiles_ + 1] = int32_t(std::min(tile_tokens, segment.n - i));
            ++n_tiles_;
        }
    }
    if (inputs.cos_sin)
        std::memcpy(words + layout_.cos_sin(inputs.n_tokens), inputs.cos_sin,
                    size_t(inputs.n_tokens * inputs.n_rot) * sizeof(float));
    if (shared_kv_) {
        shared_kv_->begin(inputs, n_placed);
        shared_kv_->write_bounds(words + layout_.bounds(inputs.n_tokens));
    }
    const auto send = [&](size_t from, size_t to) {
        stream_.copy_to_device(input(from), words + from, (to - from) * sizeof(uint32_t));
    };
    send(0, layout_.pages + size_t(n_pages));
    if (inputs.n_tokens > few_tokens)
        send(layout_.tiles(inputs.n_tokens), layout_.end(inputs.n_tokens));
    staged_sent_.record(stream_);
}

// A pass of few tokens is hundreds of launches of microseconds each: recorded, they are one. The
// first run loads the kernels, the second is recorded.
void CudaDevice::replay_or_run(std::span<const int64_t> key, const std::function<void()>& steps) {
    if (batch_.n_tokens > few_tokens) return steps();
    // The host's parts of few tokens come a fraction of a millisecond apart.
    std::optional<StayAwake> awake;
    if (exchange_) awake.emplace();
    if (exchange_ && !exchange_->can_be_recorded()) return steps();
    const SharedKv::Form form = shared_kv_ ? shared_kv_->form() : SharedKv::Form::device_alone;
    uint64_t rules = 0;
    for (const NeuronRule rule : batch_.rules)
        rules = rules << 2 | uint64_t(rule);
    const RecordingKey known{
        {key.begin(), key.end()}, form, batch_.n_tokens, launch_positions(), rules};
    const auto at = recordings_.find(known);
    if (cannot_record_ || at == recordings_.end()) {
        steps();
        // Once it has run to its end, its kernels are loaded. Recordings take memory; a context
        // that grows needs one per doubling of its length.
        if (recordings_.size() >= recordings_max)
            recordings_.erase(std::ranges::min_element(
                recordings_, {}, [](const auto& entry) { return entry.second.last_use; }));
        recordings_[known].last_use = ++n_uses_;
        return;
    }
    Recording& recording = at->second;
    recording.last_use = ++n_uses_;
    const Current current = enter();
    forget_prepared();
    if (recording.graph)
        recording.graph.launch(stream_);
    else if (!record(recording, steps))
        return steps();
    for (size_t i = 0; i < tallies_.size(); ++i)
        add_tally(recording.tallies[i]);
    forget_prepared();
    if (recording.answers.empty()) return;
    exchange_->replay(stream_, recording.answers);
    replayed_ = true;
}

// Records steps and launches them for the first time, for which the driver takes memory, too.
// False where that fails: then nothing was computed.
bool CudaDevice::record(Recording& recording, const std::function<void()>& steps) {
    std::vector<Tally> tallies(tallies_.size());
    tallies.swap(tallies_);
    if (exchange_) exchange_->begin_recording();
    const auto end = [&] {
        tallies.swap(tallies_);
        forget_prepared();
        return exchange_ ? exchange_->end_recording() : Exchange::Answers();
    };
    try {
        Graph graph(stream_, steps);
        graph.launch(stream_);
        recording.graph = std::move(graph);
    } catch (const Error& error) {
        end();
        if (error.status() == QI_CANCELLED) throw;
        // A thread that waits for the whole device, or gives cuBLAS up, ends what others record.
        if (error.status() != QI_MEMORY && ++n_failed_recordings_ < failed_recordings_max)
            return false;
        recordings_.clear();
        cannot_record_ = true;
        log(LogLevel::warning,
            format("steps are not recorded any more, which makes them slower: %s", error.what()));
        return false;
    } catch (...) {
        end();
        throw;
    }
    recording.answers = end();
    recording.tallies = std::move(tallies);
    return true;
}

// The bound on positions that attention is launched for: it doubles, so that a growing context
// needs few shapes.
int64_t CudaDevice::launch_positions() const {
    const auto n_pages = uint64_t(max_positions_ + kernels::page_size - 1) / kernels::page_size;
    return std::min(int64_t(std::bit_ceil(n_pages)), needs_.n_pages) * kernels::page_size;
}

void CudaDevice::embed(std::span<const Lookup> lookups, float* out) {
    const Current current = enter();
    forget_prepared(out);
    embedded_sent_.synchronize();
    const int64_t n = batch_.n_tokens, width = lookups[0].table->n_cols;
    auto* const rows = reinterpret_cast<float*>(embedded_.data());
    // The tables stay with the host: a token reads one row of them.
    parallel_for(cpu_info().n_usable_cores, n, [&](int64_t i, int) {
        float* row = rows + i * width;
        kernels::decode_row(*lookups[0].table, lookups[0].rows[size_t(i)], row);
        std::vector<float> added(lookups.size() > 1 ? size_t(width) : 0);
        for (const Lookup& other : lookups.subspan(1)) {
            kernels::decode_row(*other.table, other.rows[size_t(i)], added.data());
            kernels::add(row, added.data(), width, row);
        }
    });
    stream_.copy_to_device(address(out), rows, size_t(n * width) * sizeof(float));
    embedded_sent_.record(stream_);
}

void CudaDevice::copy(const float* from, size_t n, float* to) {
    const Current current = enter();
    forget_prepared(to);
    stream_.copy_on_device(address(to), address(from), n * sizeof(float));
}

void CudaDevice::gather(const float* x, std::span<const int64_t> rows, int64_t width, float* out) {
    const Current current = enter();
    forget_prepared(out);
    for (size_t i = 0; i < rows.size(); ++i)
        stream_.copy_on_device(address(out + int64_t(i) * width), address(x + rows[i] * width),
                               size_t(width) * sizeof(float));
}

void CudaDevice::norm(const Norm& norm, const float* x, int64_t n_rows, float* out) {
    const Current current = enter();
    const DeviceNorm& kept = share_.weights->find(norm);
    NormArgs args;
    args.layer = norm.kind == Norm::Kind::layer;
    args.epsilon = norm.epsilon;
    args.weight = kept.weight;
    args.bias = kept.bias;
    args.x = address(x);
    args.n_tokens = n_rows;
    args.n = int64_t(norm.weight.size());
    args.out = address(out);
    args.q8 = Q8::at(q8_, n_rows, args.n);
    // The norm before a network reads what a predictor looks at.
    if (share_.weights->has_quantised_predictors() && predicts() && n_rows <= few_tokens) {
        args.x_q8 = Q8::at(predictor_q8_, n_rows, args.n);
        for_predictor_ = {args.x, n_rows, args.n};
    }
    share_.kernels->norm(stream_, args);
    prepared_ = {args.out, n_rows, args.n};
}

}  // namespace qi::cuda
