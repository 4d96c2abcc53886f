#include "gpu_streams.h"

#include <chrono>
#include <cstring>
#include <ctime>
#include <thread>

#include "cuda_types.h"

namespace standin {
namespace {

template <class T>
T read_as(const std::byte* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

void fill(const Fill& fill) {
    if (fill.width == 1) {
        std::memset(pointer<void>(fill.to), static_cast<int>(fill.value), fill.count);
    } else {
        for (uint64_t i = 0; i < fill.count; i++)
            pointer<uint32_t>(fill.to)[i] = fill.value;
    }
}

}  // namespace

void Streams::configure(const Configuration& configuration) {
    std::lock_guard lock(mutex_);
    configuration_ = configuration;
    set_clock_rate(configuration.clock_rate);
}

void Streams::watch() {
    for (;;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        std::lock_guard lock(mutex_);
        const uint64_t limit = configuration_.watchdog_ms * 1000000u;
        for (const auto& [index, stream] : streams_) {
            if (stream->launched && now() - stream->launched > limit)
                fail(CUDA_ERROR_LAUNCH_TIMEOUT, "a kernel ran longer than the watchdog allows");
        }
    }
}

void Streams::submit(const Header& header, std::vector<std::byte> payload) {
    std::lock_guard lock(mutex_);
    std::unique_ptr<Stream>& stream = streams_[header.stream];
    if (!stream) {
        stream = std::make_unique<Stream>();
        std::thread([this, index = header.stream, &s = *stream] { loop(index, s); }).detach();
    }
    stream->queue.push_back({header, std::move(payload)});
    stream->arrived.notify_one();
}

void Streams::loop(uint32_t index, Stream& stream) {
    install_signal_stack();
    std::minstd_rand random;
    std::unique_lock lock(mutex_);
    random.seed(static_cast<unsigned>(configuration_.seed * 31 + index + 1));
    for (;;) {
        stream.arrived.wait(lock, [&] { return !stream.queue.empty(); });
        Operation operation = std::move(stream.queue.front());
        stream.queue.pop_front();
        const uint64_t delay = configuration_.delay_us;
        lock.unlock();
        if (delay) std::this_thread::sleep_for(std::chrono::microseconds(random() % (delay + 1)));
        run(stream, operation.header.kind, operation.payload.data(), operation.payload.size(),
            random);
        lock.lock();
        control_.done[index].store(operation.header.sequence);
        completed_.notify_all();
        wake_host_();
    }
}

void Streams::wait_for(const Point& point) {
    std::unique_lock lock(mutex_);
    completed_.wait(lock, [&] { return control_.done[point.stream].load() >= point.sequence; });
}

void Streams::wait_value(const Value& value) {
    for (;;) {
        const uint32_t seen = __atomic_load_n(pointer<uint32_t>(value.address), __ATOMIC_ACQUIRE);
        bool met = false;
        switch (value.flags & 3u) {
            case CU_STREAM_WAIT_VALUE_GEQ:
                met = static_cast<int32_t>(seen - value.value) >= 0;
                break;
            case CU_STREAM_WAIT_VALUE_EQ:
                met = seen == value.value;
                break;
            case CU_STREAM_WAIT_VALUE_AND:
                met = (seen & value.value) != 0;
                break;
            default:
                met = ~(seen | value.value) != 0;
                break;
        }
        if (met) return;
        std::this_thread::sleep_for(std::chrono::microseconds(5));
    }
}

void Streams::launch(Stream& stream, const std::byte* payload, uint64_t seed) {
    const auto launch = read_as<Launch>(payload);
    Configuration configuration;
    {
        std::lock_guard lock(mutex_);
        configuration = configuration_;
        stream.launched = now();
    }
    const Module& module = module_by_id(launch.module);
    const Grid grid = {&module,
                       &module.kernels[launch.kernel],
                       launch.grid,
                       launch.block,
                       launch.dynamic_shared,
                       reinterpret_cast<const unsigned char*>(payload + sizeof launch)};
    run_grid(grid, configuration, configuration.seed ? configuration.seed + seed : 0);
    std::lock_guard lock(mutex_);
    stream.launched = 0;
}

void Streams::run_batch(Stream& stream, const std::byte* payload, uint64_t size,
                        std::minstd_rand& random) {
    const std::byte* end = payload + size;
    while (payload != end) {
        const auto header = read_as<Header>(payload);
        payload += sizeof header;
        run(stream, header.kind, payload, header.size, random);
        payload += header.size;
    }
}

void Streams::run(Stream& stream, Kind kind, const std::byte* payload, uint64_t size,
                  std::minstd_rand& random) {
    switch (kind) {
        case Kind::copy: {
            const auto copy = read_as<Copy>(payload);
            std::memmove(pointer<void>(copy.to), pointer<void>(copy.from), copy.bytes);
            break;
        }
        case Kind::write:
            std::memcpy(pointer<void>(read_as<uint64_t>(payload)), payload + 8, size - 8);
            break;
        case Kind::fill:
            fill(read_as<Fill>(payload));
            break;
        case Kind::launch:
            launch(stream, payload, random());
            break;
        case Kind::gemm:
            run_gemm(read_as<Gemm>(payload));
            break;
        case Kind::wait:
            for (uint64_t i = 0; i < size / sizeof(Point); i++)
                wait_for(read_as<Point>(payload + i * sizeof(Point)));
            break;
        case Kind::record:
            control_.event_time[read_as<uint64_t>(payload)].store(now());
            break;
        case Kind::wait_value:
            wait_value(read_as<Value>(payload));
            break;
        case Kind::write_value: {
            const auto value = read_as<Value>(payload);
            __atomic_store_n(pointer<uint32_t>(value.address), value.value, __ATOMIC_RELEASE);
            break;
        }
        case Kind::batch:
            run_batch(stream, payload, size, random);
            break;
        default:
            fail(CUDA_ERROR_UNKNOWN, "a message of no known kind");
    }
}

}  // namespace standin
