// Rounds with the host: every value arrives on either side, done at once and replayed.
#include "base/error.h"
#include "device/cuda/exchange.h"
#include "device/cuda/self_test_bench.h"

namespace qi::cuda {

namespace {

// A step has three rounds, in each of which the host is sent what the last one left.
constexpr int n_rounds = 3;

class Step {
  public:
    Step(Bench& bench, int64_t n, std::chrono::nanoseconds wait_limit)
        : bench_(bench),
          n_(n),
          exchange_(bench.stream.gpu(), bench.stream, bench.room(Exchange::room_bytes(n_rounds)),
                    n_rounds, wait_limit),
          x_(bench.stream.gpu(), size_t(n) * sizeof(float), "a self-test"),
          marks_(bench.stream.gpu(), sizeof(uint32_t), "a self-test"),
          answer_(bench.stream.gpu(), size_t(n) * sizeof(float), "a self-test"),
          base_(bench.zeros(sizeof(uint32_t))),
          mark_(bench.upload(std::vector<uint32_t>{0xabcdef01u})) {
        for (int64_t i = 0; i < n; ++i)
            values_.push_back(float(bench.below(8)));
        y_ = bench.upload(values_);
    }

    void compute() {
        begin();
        enqueue();
        check();
    }
    void replay() {
        const bool is_new = !graph_;
        begin();
        if (is_new) {
            exchange_.begin_recording();
            graph_ = Graph(bench_.stream, [&] { enqueue(); });
            answers_ = exchange_.end_recording();
        }
        graph_.launch(bench_.stream);
        exchange_.replay(bench_.stream, answers_);
        bench_.stream.synchronize();
        exchange_.check();
        check();
    }
    // The host fails in its second round; the GPU comes to rest all the same.
    void give_up() {
        begin();
        graph_.launch(bench_.stream);
        Exchange::Answers answers = answers_;
        answers[1].work = [] { fail(QI_CANCELLED, "cancelled"); };
        bool has_failed = false;
        try {
            exchange_.replay(bench_.stream, answers);
        } catch (const Error& error) {
            has_failed = error.status() == QI_CANCELLED;
        }
        bench_.expect(has_failed && bench_.stream.idle());
        values_ = bench_.download<float>(y_, size_t(n_));
    }
    // The host takes longer than the GPU waits; the GPU comes to rest before it has answered.
    void be_late() {
        begin();
        exchange_.begin_recording();
        graph_ = Graph(bench_.stream, [&] { enqueue(); });
        Exchange::Answers answers = exchange_.end_recording();
        graph_.launch(bench_.stream);
        for (Exchange::Answer& answer : answers)
            answer.work = [&] { bench_.stream.synchronize(); };
        exchange_.replay(bench_.stream, answers);
        bench_.stream.synchronize();
        bool has_failed = false;
        try {
            exchange_.check();
        } catch (const Error& error) {
            has_failed = error.status() == QI_DEVICE;
        }
        bench_.expect(has_failed && !can_be_recorded());
        exchange_.check();
        values_ = bench_.download<float>(y_, size_t(n_));
    }
    bool can_be_recorded() const { return exchange_.can_be_recorded(); }
    void check_times() {
        for (const Exchange::Times& times : exchange_.take_times(bench_.stream))
            bench_.expect(times.device_seconds >= 0 && times.device_seconds < 60 &&
                          times.wait_seconds >= 0 && times.wait_seconds < 60);
    }

  private:
    void begin() {
        n_afterwards_ = 0;
        const uint32_t base = exchange_.begin();
        bench_.stream.copy_to_device(base_, &base, sizeof base);
        bench_.stream.synchronize();
    }
    void enqueue() {
        for (int i = 0; i < n_rounds; ++i) {
            const Exchange::Rows rows[] = {{y_, x_.device_address(), n_},
                                           {mark_, marks_.device_address(), 1}};
            const auto round = exchange_.send(bench_.stream, base_, i, rows);
            exchange_.answer(bench_.stream, round, [this, i] { answer(i); });
            exchange_.receive(bench_.stream, base_, round, answer_.device_address(), n_, i != 1,
                              y_);
            exchange_.afterwards([this] { ++n_afterwards_; });
        }
    }
    void answer(int round) {
        const auto* x = reinterpret_cast<const float*>(x_.data());
        auto* y = reinterpret_cast<float*>(answer_.data());
        uint32_t mark = 0;
        std::memcpy(&mark, marks_.data(), sizeof mark);
        bench_.expect(mark == 0xabcdef01u);
        std::memset(marks_.data(), 0, sizeof mark);
        for (int64_t i = 0; i < n_; ++i)
            y[i] = float(round + 1) - 0.5f * x[i];
    }
    void check() {
        bench_.expect(n_afterwards_ == n_rounds);
        for (int i = 0; i < n_rounds; ++i)
            for (float& v : values_)
                v = (i != 1 ? v : 0.0f) + (float(i + 1) - 0.5f * v);
        const auto got = bench_.download<float>(y_, size_t(n_));
        for (int64_t i = 0; i < n_; ++i)
            bench_.compare(double(got[size_t(i)]), double(values_[size_t(i)]), 0.0);
    }

    Bench& bench_;
    int64_t n_;
    std::vector<float> values_;
    Exchange exchange_;
    PinnedMemory x_, marks_, answer_;
    CUdeviceptr base_, mark_, y_ = 0;
    int n_afterwards_ = 0;
    Exchange::Answers answers_;
    Graph graph_;
};

void test_exchange(Bench& bench, int64_t n) {
    Step step(bench, n, std::chrono::seconds(60));
    step.compute();
    step.compute();
    if (step.can_be_recorded()) {
        step.replay();
        step.replay();
        step.give_up();
        step.replay();
        step.compute();
    }
    step.check_times();
}

void test_limit(Bench& bench) {
    Step step(bench, 67, std::chrono::milliseconds(100));
    if (step.can_be_recorded()) step.be_late();
    step.compute();
}

}  // namespace

void add_exchange_tests(std::vector<SelfTest>& tests) {
    for (const int64_t n : {1, 67, 4096, 40000})
        tests.push_back({format("rounds with the host, %lld values", (long long)n),
                         [=](Bench& bench) { test_exchange(bench, n); }});
    tests.push_back({"rounds with a host that is late", test_limit});
}

}  // namespace qi::cuda
