#include "device/cuda/neuron_mover.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/signal_mask.h"

namespace qi::cuda {

namespace {

constexpr size_t chunk_bytes = size_t(256) << 10;
// First counts that are to decide for good.
constexpr int64_t tokens_of_first_counts = 64;
// Planning looks at every neuron: of more networks it would keep a core busy that computes.
constexpr size_t networks_at_once = 8;
// Steps' counts that wait for the thread at most; those of later steps wait with their context.
constexpr size_t handed_max = 4;
// Steps that find another one under way before one of them waits to place what has landed.
constexpr int refusals_max = 8;

size_t aligned(size_t n_bytes) {
    return (n_bytes + 255) / 256 * 256;
}

}  // namespace

size_t NeuronMover::room_bytes(const FeedForward& ffn, size_t n_records) {
    return aligned(n_records * record_layout(ffn).stride) + aligned(n_records * sizeof(int32_t));
}

NeuronMover::NeuronMover(std::shared_ptr<Gpu> gpu, std::shared_ptr<Kernels> kernels,
                         std::shared_ptr<Weights> weights, const Moving& moving)
    : gpu_(std::move(gpu)),
      kernels_(std::move(kernels)),
      weights_(std::move(weights)),
      policy_(make_cache_policy(moving.cache)),
      speeds_(moving.speeds),
      tokens_first_(policy_->plans_once() ? tokens_of_first_counts : 1),
      stream_(gpu_, Stream::last_priority),
      sent_{Event(gpu_), Event(gpu_)},
      landed_(gpu_),
      placed_(gpu_) {
    network_of_.assign(weights_->n_ffns(), -1);
    size_t tables = 0, smallest = SIZE_MAX, largest = 0;
    for (const auto& [ffn, kept] : weights_->movable()) {
        const std::span<const int32_t> neurons = kept->resident.neurons();
        n_ff_ = size_t(kept->weights.n_ff);
        network_of_[kept->index] = int(networks_.size());
        networks_.push_back(
            {ffn, kept, {neurons.begin(), neurons.end()}, tables, std::vector<uint32_t>(n_ff_)});
        tables += kept->table_bytes();
        smallest = std::min(smallest, kept->weights.layout.stride);
        largest = std::max(largest, kept->weights.layout.stride);
    }
    if (networks_.empty()) fail(QI_INTERNAL, "no network keeps neurons that could be moved");
    // As many slots as the smallest records there is room for.
    n_landing_slots_ = moving.room_bytes / (smallest + sizeof(int32_t));
    const size_t slots_bytes = aligned(n_landing_slots_ * sizeof(int32_t));
    if (n_landing_slots_ == 0 || moving.room_bytes < slots_bytes + largest)
        fail(QI_INTERNAL, "the room for moving neurons is smaller than one of them");
    landing_ = weights_->allocate(moving.room_bytes);
    landing_bytes_ = moving.room_bytes - slots_bytes;
    landing_slots_ = landing_ + landing_bytes_;
    tables_ = PinnedMemory(gpu_, tables, "moving neurons");
    slots_ = PinnedMemory(gpu_, slots_bytes, "moving neurons");
    for (PinnedMemory& staging : staging_)
        staging = PinnedMemory(gpu_, std::max(chunk_bytes, largest), "moving neurons");
    const FaultSignalsOnly mask;
    thread_ = std::thread([this] { work(); });
}

NeuronMover::~NeuronMover() {
    // A forked process has no such thread, and the lock may be held for good.
    if (!driver_if_usable()) {
        thread_.detach();
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
}

// ---- what contexts count ----

NeuronMover::Member::Member(std::shared_ptr<NeuronMover> mover)
    : mover_(std::move(mover)),
      done_(mover_->gpu_),
      counts_(mover_->networks_.size() * mover_->n_ff_) {
    const std::lock_guard lock(mover_->mutex_);
    mover_->members_.push_back(this);
}

NeuronMover::Member::~Member() {
    if (!driver_if_usable()) return;  // see ~NeuronMover
    const std::lock_guard lock(mover_->mutex_);
    std::erase(mover_->members_, this);
}

uint64_t* NeuronMover::Member::counts_of(const DeviceFfn& kept) {
    const int network = mover_->network_of_[kept.index];
    return network < 0 ? nullptr : counts_.data() + size_t(network) * mover_->n_ff_;
}

void NeuronMover::Member::count(const DeviceFfn& kept, const uint32_t* names,
                                std::span<const NeuronRule> rules) {
    uint64_t* const counts = counts_of(kept);
    if (!counts) return;
    if (is_first(kept)) counted(std::ranges::count(rules, NeuronRule::predict));
    const int64_t n_words = name_words(int64_t(mover_->n_ff_));
    for (size_t t = 0; t < rules.size(); ++t, names += n_words) {
        if (rules[t] != NeuronRule::predict) continue;
        for (int64_t word = 0; word < n_words; ++word)
            for (uint32_t left = names[word]; left; left &= left - 1)
                ++counts[32 * word + std::countr_zero(left)];
    }
}

void NeuronMover::take_counts(Member& member) {
    if (member.n_tokens_ == 0 || state_ != State::counting) return;
    {
        const std::lock_guard lock(mutex_);
        if (handed_.size() >= handed_max) return;
        // All that may fail comes first.
        if (zeroed_.empty()) zeroed_.emplace_back(member.counts_.size());
        handed_.emplace_back();
        handed_.back() = std::exchange(member.counts_, std::move(zeroed_.back()));
        zeroed_.pop_back();
        tokens_handed_ += std::exchange(member.n_tokens_, 0);
    }
    changed_.notify_all();
}

// ---- steps ----

NeuronMover::Step::Step(Member& member, const Stream& stream, bool may_place)
    : member_(member), stream_(stream), lock_(member.mover_->steps_, std::defer_lock) {
    NeuronMover& mover = *member.mover_;
    while (true) {
        mover.place_if_landed(stream, may_place);
        {
            const std::lock_guard turn(mover.turnstile_);
            lock_.lock();
        }
        if (mover.state_ != State::half_placed) break;
        lock_.unlock();
    }
    if (member.n_placed_ == mover.n_placed_) return;
    stream.wait(mover.placed_);
    member.n_placed_ = mover.n_placed_;
}

NeuronMover::Step::~Step() {
    try {
        const Current current(*stream_.gpu());
        member_.done_.record(stream_);
        member_.has_run_ = true;
        member_.is_lost_ = false;
    } catch (const Error&) {
        member_.has_run_ = false;
        member_.is_lost_ = !at_rest();
    }
    try {
        member_.mover_->take_counts(member_);
    } catch (const std::bad_alloc&) {
        // They wait for the next step's.
    }
}

// Whether the stream's work is known to be done, waited for where an event could not be had.
bool NeuronMover::Step::at_rest() const {
    try {
        const Current current(*stream_.gpu());
        stream_.synchronize();
        return true;
    } catch (const Error&) {
        return false;
    }
}

// Places what has landed, unless another step is being computed: then the next one will. Where
// steps of several contexts overlap all the time, there is no such next one: after some refusals it
// waits for those under way, and no other begins meanwhile.
void NeuronMover::place_if_landed(const Stream& stream, bool may_place) {
    const State seen = state_;
    if (seen != State::half_placed && !(seen == State::landed && may_place)) return;
    try {
        if (seen == State::landed && !landed_.done()) return;
    } catch (const Error&) {
        // It is asked again below, where no other step can be placing.
    }
    std::unique_lock turn(turnstile_, std::defer_lock);
    std::unique_lock steps(steps_, std::try_to_lock);
    if (!steps.owns_lock()) {
        if (seen != State::half_placed && ++n_refused_ < refusals_max) return;
        turn.lock();
        steps.lock();
    }
    n_refused_ = 0;
    if (state_ == State::landed) {
        try {
            if (!landed_.done()) return;
        } catch (const Error& error) {
            return give_up(error.what());
        }
    } else if (state_ != State::half_placed) {
        return;  // another step was faster
    }
    const std::lock_guard lock(mutex_);
    const bool any_lost = std::any_of(members_.begin(), members_.end(),
                                      [](const Member* member) { return member->is_lost_; });
    if (any_lost && state_ == State::half_placed)
        fail(QI_DEVICE,
             "neurons cannot be placed on the GPU beside steps that nobody knows the "
             "end of, since the GPU has failed");
    if (any_lost) return;
    place(stream);
    changed_.notify_all();
}

// Everything here can be done again after a failure in the middle of it.
void NeuronMover::place(const Stream& stream) {
    state_ = State::half_placed;
    for (const Member* member : members_)
        if (member->has_run_) stream.wait(member->done_);
    stream.wait(landed_);
    for (const Change& change : changes_) {
        const DeviceFfn& kept = *change.network->kept;
        kernels_->place_records(stream, landing_ + change.landing_at,
                                landing_slots_ + change.first_slot * sizeof(int32_t),
                                int64_t(change.swaps.size()), kept.weights);
        stream.copy_to_device(kept.slot_of_neuron, tables_.data() + change.network->tables_at,
                              kept.table_bytes());
    }
    placed_.record(stream);
    uint64_t n_moved = 0;
    for (Change& change : changes_) {
        change.network->kept->resident = std::move(change.resident);
        change.network->kept->rest = std::move(change.rest);
        change.network->neuron_of_slot = std::move(change.neuron_of_slot);
        n_moved += change.swaps.size();
    }
    n_moved_ += n_moved;
    ++n_placed_;
    state_ = State::placed;
}

void NeuronMover::give_up(const char* why) {
    log(LogLevel::warning,
        format("neurons stay where they are from now on, because moving them failed: %s", why));
    {
        const std::lock_guard lock(mutex_);
        state_ = State::given_up;
    }
    changed_.notify_all();
}

std::vector<int32_t> NeuronMover::neurons(const DeviceFfn& kept) {
    const std::shared_lock lock(steps_);
    const auto ids = kept.resident.neurons();
    return {ids.begin(), ids.end()};
}

// ---- the thread ----

void NeuronMover::work() {
    try {
        const Current current(*gpu_);
        while (wait_for_counts()) {
            make_plan();
            if (changes_.empty() && policy_->plans_once()) {
                log(LogLevel::info,
                    format("neurons on the GPU were chosen anew by the first %lld tokens: %llu of "
                           "them were exchanged",
                           (long long)tokens_first_, (unsigned long long)n_moved()));
                state_ = State::given_up;
                return;
            }
            if (changes_.empty()) continue;
            bring();
            state_ = State::landed;
            if (!wait_until_placed()) return;
        }
    } catch (const std::exception& error) {
        give_up(error.what());
    }
}

// False: no more.
bool NeuronMover::wait_for_counts() {
    std::unique_lock lock(mutex_);
    if (has_planned_ && policy_->plans_once()) return !stopping_;
    for (int64_t n_tokens = 0; n_tokens < tokens_first_;) {
        changed_.wait(lock, [&] { return stopping_ || !handed_.empty(); });
        if (stopping_) return false;
        n_tokens += std::exchange(tokens_handed_, 0);
        std::vector<std::vector<uint64_t>> handed = std::exchange(handed_, {});
        lock.unlock();
        for (std::vector<uint64_t>& counts : handed)
            add_counts(counts);
        lock.lock();
        for (std::vector<uint64_t>& counts : handed)
            zeroed_.push_back(std::move(counts));
    }
    return true;
}

// What a context has counted, which is set to zero.
void NeuronMover::add_counts(std::vector<uint64_t>& counts) {
    for (size_t i = 0; i < networks_.size(); ++i)
        for (size_t j = 0; j < n_ff_; ++j)
            networks_[i].counts[j] += uint32_t(counts[i * n_ff_ + j]);
    std::fill(counts.begin(), counts.end(), 0);
}

// As many swaps as there is room for; networks take turns in being first.
void NeuronMover::make_plan() {
    changes_.clear();
    has_planned_ = true;
    size_t used = 0, n_slots = 0;
    const size_t n_networks =
        policy_->plans_once() ? networks_.size() : std::min(networks_.size(), networks_at_once);
    for (size_t i = 0; i < n_networks; ++i) {
        Network& network = networks_[(next_ + i) % networks_.size()];
        const size_t stride = network.kept->weights.layout.stride;
        const size_t budget = std::min({policy_->swaps_at_once(), (landing_bytes_ - used) / stride,
                                        n_landing_slots_ - n_slots});
        if (budget == 0) {
            next_ = (next_ + i) % networks_.size();
            return;
        }
        Change change{&network,
                      policy_->plan(network.kept->index, network.counts, network.neuron_of_slot,
                                    speeds_, budget),
                      network.neuron_of_slot,
                      {},
                      {},
                      used,
                      n_slots};
        std::fill(network.counts.begin(), network.counts.end(), 0);
        if (change.swaps.empty()) continue;
        used += change.swaps.size() * stride;
        n_slots += change.swaps.size();
        for (const Swap& swap : change.swaps)
            change.neuron_of_slot[size_t(swap.slot)] = swap.neuron;
        std::vector<int32_t> resident = change.neuron_of_slot, rest;
        std::sort(resident.begin(), resident.end());
        auto next = resident.begin();
        for (int32_t j = 0; j < int32_t(n_ff_); ++j) {
            if (next != resident.end() && *next == j)
                ++next;
            else
                rest.push_back(j);
        }
        change.resident = NeuronShard(std::move(resident), int64_t(n_ff_));
        change.rest = NeuronShard(std::move(rest), int64_t(n_ff_));
        changes_.push_back(std::move(change));
    }
    next_ = (next_ + n_networks) % networks_.size();
}

// Records into the landing room, tables to where they will be copied from.
void NeuronMover::bring() {
    size_t side = 0, n_slots = 0;
    auto* const slots = reinterpret_cast<int32_t*>(slots_.data());
    for (Change& change : changes_) {
        send_records(change, side);
        for (const Swap& swap : change.swaps)
            slots[n_slots++] = swap.slot;
        change.network->kept->write_tables(change.neuron_of_slot,
                                           tables_.data() + change.network->tables_at);
    }
    stream_.copy_to_device(landing_slots_, slots, n_slots * sizeof(int32_t));
    landed_.record(stream_);
}

void NeuronMover::send_records(Change& change, size_t& side) {
    const FeedForward& ffn = *change.network->ffn;
    const NeuronLayout& layout = change.network->kept->weights.layout;
    const size_t together = std::max<size_t>(chunk_bytes / layout.stride, 1);
    for (size_t first = 0; first < change.swaps.size(); first += together, side ^= 1) {
        const size_t n = std::min(together, change.swaps.size() - first);
        wait_for(sent_[side]);
        std::byte* const out = staging_[side].data();
        for (size_t i = 0; i < n; ++i)
            write_record(ffn, layout, change.swaps[first + i].neuron, out + i * layout.stride);
        stream_.copy_to_device(landing_ + change.landing_at + first * layout.stride, out,
                               n * layout.stride);
        sent_[side].record(stream_);
    }
}

// False: no more. Afterwards the landing room and the pinned tables can be used again.
bool NeuronMover::wait_until_placed() {
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] {
            return stopping_ || state_ == State::placed || state_ == State::given_up;
        });
        if (stopping_ || state_ == State::given_up) return false;
    }
    wait_for(placed_);
    state_ = State::counting;
    return true;
}

// The driver's own waiting would keep a core busy.
void NeuronMover::wait_for(const Event& event) const {
    while (!event.done())
        std::this_thread::sleep_for(std::chrono::microseconds(100));
}

}  // namespace qi::cuda
