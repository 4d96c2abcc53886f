// Neurons that move while threads compute: what a step sees, that steps which always overlap let
// neurons be placed all the same, and who gets the process's signals. For the thread sanitizer.
#include "device/cuda/neuron_mover.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <thread>

#include "fake_driver.h"
#include "kernel_checks.h"

using namespace qi;
using namespace qi::cuda;
using namespace qi::test;

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int64_t n_networks = 3, n_ff = 96, n_embd = 8, n_kept = 24;

std::atomic<int> n_wrong{0};  // steps that saw a mixture

// Networks of rows that hold their neuron's number, every fourth of which begins on the GPU.
class Bench {
  public:
    Bench() {
        for (int64_t j = 0; j < n_ff; ++j)
            std::fill_n(rows_.begin() + j * n_embd, n_embd, float(j));
        weights_->reserve(size_t(1) << 20);
        for (FeedForward& ffn : ffns_) {
            ffn.up.weight.type = ffn.down.weight.type = Type::f32;
            for (Weight* w : {&ffn.up.weight, &ffn.down.weight}) {
                w->data = reinterpret_cast<const std::byte*>(rows_.data());
                w->n_rows = n_ff;
                w->n_cols = n_embd;
                w->row_bytes = size_t(n_embd) * sizeof(float);
            }
            ffn.down_by_neuron = true;
            std::vector<int32_t> resident, rest;
            for (int32_t j = 0; j < n_ff; ++j)
                (j % (n_ff / n_kept) == 0 ? resident : rest).push_back(j);
            weights_->keep(ffn, {std::move(resident), n_ff}, {std::move(rest), n_ff});
        }
        mover_ = std::make_shared<NeuronMover>(
            gpu_, kernels_, weights_,
            Moving{NeuronCache::frequency, {}, NeuronMover::room_bytes(ffns_[0], 32)});
    }

    NeuronMover& mover() { return *mover_; }
    std::shared_ptr<NeuronMover> shared_mover() { return mover_; }
    const std::shared_ptr<Gpu>& gpu() { return gpu_; }
    const DeviceFfn& kept(size_t i) const { return weights_->find(ffns_[i]); }

    // Inside a step: tables, records and both shards speak of the same neurons.
    void look() const {
        for (int64_t i = 0; i < n_networks; ++i) {
            const DeviceFfn& network = kept(size_t(i));
            const auto* of_slot =
                static_cast<const int32_t*>(fake::pointer(network.neuron_of_slot));
            const auto* of_neuron =
                static_cast<const int32_t*>(fake::pointer(network.slot_of_neuron));
            bool right = true;
            for (int64_t slot = 0; slot < n_kept; ++slot) {
                const auto* record = static_cast<const float*>(fake::pointer(
                    network.weights.records + size_t(slot) * network.weights.layout.stride));
                right &= record[0] == float(of_slot[slot]) && of_neuron[of_slot[slot]] == slot;
            }
            for (const int32_t j : network.resident.neurons())
                right &= of_neuron[j] >= 0;
            for (const int32_t j : network.rest.neurons())
                right &= of_neuron[j] < 0;
            right &= network.resident.neurons().size() == size_t(n_kept);
            if (!right) ++n_wrong;
        }
    }

    // A token for which a run of neurons was active, another one each time.
    void count(NeuronMover::Member& member, int64_t token) const {
        std::array<uint32_t, n_ff / 32> names{};
        for (int64_t j = 0; j < 20; ++j) {
            const int64_t neuron = (token / 16 * 37 + j) % n_ff;
            names[size_t(neuron / 32)] |= 1u << (neuron % 32);
        }
        const std::array rules{NeuronRule::predict};
        for (int64_t i = 0; i < n_networks; ++i)
            member.count(kept(size_t(i)), names.data(), rules);
    }

  private:
    std::vector<float> rows_ = std::vector<float>(size_t(n_ff * n_embd));
    std::array<FeedForward, n_networks> ffns_;
    std::shared_ptr<Gpu> gpu_ = Gpu::open(0);
    std::shared_ptr<Kernels> kernels_ = std::make_shared<Kernels>(gpu_);
    std::shared_ptr<Weights> weights_ =
        std::make_shared<Weights>(gpu_, std::make_shared<Budget>(Budget::unlimited));
    std::shared_ptr<NeuronMover> mover_;
};

// Three contexts compute, a fourth thread asks what is kept.
void test_threads(Checks& checks) {
    Bench bench;
    std::atomic<int> n_busy{3};
    const auto compute = [&](int64_t first) {
        NeuronMover::Member member(bench.shared_mover());
        const Stream stream(bench.gpu());
        const auto start = Clock::now();
        for (int64_t i = 0;
             i < 300 || (bench.mover().n_moved() < 200 && Clock::now() - start < seconds(20));
             ++i) {
            const NeuronMover::Step step(member, stream, i % 3 != 0);
            bench.look();
            bench.count(member, first + i);
        }
        --n_busy;
    };
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < 3; ++i)
        threads.emplace_back(compute, 7 * i);
    uint64_t n_moved = 0;
    bool is_rising = true, is_whole = true;
    while (n_busy > 0) {
        const uint64_t now = bench.mover().n_moved();
        is_rising &= now >= n_moved;
        n_moved = now;
        is_whole &= bench.mover().neurons(bench.kept(0)).size() == size_t(n_kept);
    }
    for (std::thread& thread : threads)
        thread.join();
    checks.expect(n_wrong == 0, "%d steps saw a mixture", n_wrong.load());
    checks.expect(bench.mover().n_moved() >= 200, "%d neurons moved", int(bench.mover().n_moved()));
    checks.expect(is_rising && is_whole, "what is told of moving neurons");
}

// Two contexts of which one ends a step only when the other has begun one, or would not for long.
void test_steps_that_overlap(Checks& checks) {
    Bench bench;
    std::array<std::atomic<int64_t>, 2> n_begun{};
    std::atomic<bool> stop{false};
    const auto compute = [&](size_t me) {
        NeuronMover::Member member(bench.shared_mover());
        const Stream stream(bench.gpu());
        for (int64_t i = 0; !stop; ++i) {
            const NeuronMover::Step step(member, stream, true);
            const int64_t others = n_begun[1 - me];
            ++n_begun[me];
            bench.count(member, i);
            const auto start = Clock::now();
            while (n_begun[1 - me] == others && Clock::now() - start < milliseconds(50) && !stop)
                std::this_thread::yield();
        }
    };
    std::thread one([&] { compute(0); }), other([&] { compute(1); });
    const auto start = Clock::now();
    while (bench.mover().n_moved() == 0 && Clock::now() - start < seconds(5))
        std::this_thread::sleep_for(milliseconds(1));
    stop = true;
    one.join();
    other.join();
    checks.expect(bench.mover().n_moved() > 0, "no neuron moved in %lld steps",
                  (long long)(n_begun[0] + n_begun[1]));
}

void compute_until_one_moves(Bench& bench) {
    NeuronMover::Member member(bench.shared_mover());
    const Stream stream(bench.gpu());
    const auto start = Clock::now();
    for (int64_t i = 0; bench.mover().n_moved() == 0 && Clock::now() - start < seconds(5); ++i) {
        const NeuronMover::Step step(member, stream, true);
        bench.count(member, i);
    }
}

std::atomic<bool> was_interrupted{false};

// With this thread's blocked, a signal to the process stays with the process.
void test_signals(Checks& checks) {
    struct sigaction action = {}, before = {};
    action.sa_handler = [](int) { was_interrupted = true; };
    sigaction(SIGUSR1, &action, &before);
    {
        Bench bench;
        compute_until_one_moves(bench);
        std::this_thread::sleep_for(milliseconds(10));  // the mover's thread waits by then
        sigset_t usr1, mask;
        sigemptyset(&usr1);
        sigaddset(&usr1, SIGUSR1);
        pthread_sigmask(SIG_BLOCK, &usr1, &mask);
        kill(getpid(), SIGUSR1);
        const timespec limit = {5, 0};
        const int got = sigtimedwait(&usr1, nullptr, &limit);
        checks.expect(got == SIGUSR1 && !was_interrupted, "another thread got the signal");
        pthread_sigmask(SIG_SETMASK, &mask, nullptr);
    }
    sigaction(SIGUSR1, &before, nullptr);
}

}  // namespace

int main() {
    Checks checks;
    test_signals(checks);
    test_threads(checks);
    test_steps_that_overlap(checks);
    return checks.status();
}
