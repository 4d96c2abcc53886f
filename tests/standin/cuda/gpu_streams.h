// The GPU process's streams: each a thread that runs its operations in order, and late if asked to.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "executor.h"
#include "protocol.h"

namespace standin {

const Module& module_by_id(uint64_t id);

class Streams {
  public:
    Streams(Control& control, void (*wake_host)()) : control_(control), wake_host_(wake_host) {}

    void configure(const Configuration& configuration);
    void watch();  // ends a kernel that takes longer than the watchdog allows; never comes back
    void submit(const Header& header, std::vector<std::byte> payload);

  private:
    struct Operation {
        Header header;
        std::vector<std::byte> payload;
    };
    struct Stream {
        std::deque<Operation> queue;
        std::condition_variable arrived;
        uint64_t launched = 0;  // when its running kernel began, or 0
    };

    void loop(uint32_t index, Stream& stream);
    void run(Stream& stream, Kind kind, const std::byte* payload, uint64_t size,
             std::minstd_rand& random);
    void run_batch(Stream& stream, const std::byte* payload, uint64_t size,
                   std::minstd_rand& random);
    void launch(Stream& stream, const std::byte* payload, uint64_t seed);
    void wait_for(const Point& point);
    void wait_value(const Value& value);

    Control& control_;
    void (*wake_host_)();
    std::mutex mutex_;
    std::condition_variable completed_;
    std::map<uint32_t, std::unique_ptr<Stream>> streams_;
    Configuration configuration_{0, 0, 120000, 8, 2048};
};

// y = alpha · op(a)·op(b) + beta · c
void run_gemm(const Gemm& gemm);

}  // namespace standin
