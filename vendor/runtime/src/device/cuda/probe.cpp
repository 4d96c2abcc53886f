// Memory, streams, an event, a kernel, a graph: each used once, the result checked on the host.
#include "device/cuda/probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "base/median.h"
#include "device/cuda/gpu.h"

namespace qi::cuda {

namespace {

constexpr int n_checked = 1000;  // elements; not a multiple of the block size
constexpr int block_size = 256;

float input_of(int i) {
    return 0.25f * float(i % 64);
}

void check_output(const float* out, float scale, const char* how) {
    for (int i = 0; i < n_checked; i++) {
        const float expected = scale * input_of(i) + float(i);  // exact: few bits are set
        if (out[i] != expected)
            fail(QI_DEVICE, "the GPU computes wrongly: element %d of a kernel %s is %g, not %g", i,
                 how, double(out[i]), double(expected));
    }
}

}  // namespace

ProbeReport probe(int ordinal, size_t n_bytes, size_t budget_bytes) {
    const auto begin = std::chrono::steady_clock::now();
    const std::shared_ptr<Gpu> gpu = Gpu::open(ordinal);
    ProbeReport report;
    report.free_bytes = gpu->free_bytes();
    const auto budget = std::make_shared<Budget>(budget_bytes);
    constexpr size_t used_bytes = n_checked * sizeof(float);
    const DeviceMemory in(gpu, budget, std::max(n_bytes / 2, used_bytes), "a probe's input");
    const DeviceMemory out(gpu, budget, std::max(n_bytes - n_bytes / 2, used_bytes),
                           "a probe's output");
    const PinnedMemory staging(gpu, 2 * used_bytes, "a probe");
    const std::shared_ptr<Module> module = gpu->module("probe.cu");
    report.origin = module->origin();
    report.compile_seconds = module->compile_seconds();
    const Function kernel = module->function("probe");
    const Stream compute(gpu);
    const Stream copy(gpu, Stream::last_priority);
    const Event copied(gpu);
    const Current current(*gpu);

    auto* const host_in = reinterpret_cast<float*>(staging.data());
    auto* const host_out = host_in + n_checked;
    for (int i = 0; i < n_checked; i++)
        host_in[i] = input_of(i);
    copy.copy_to_device(in.address(), host_in, used_bytes);
    copied.record(copy);
    compute.wait(copied);
    const auto run = [&](float scale) {
        const Size3 grid{unsigned((n_checked + block_size - 1) / block_size)};
        kernel.launch(compute, grid, {unsigned(block_size)}, 0, in.address(), out.address(), scale,
                      n_checked);
        compute.copy_to_host(host_out, out.address(), used_bytes);
    };
    run(2.0f);
    compute.synchronize();
    check_output(host_out, 2.0f, "launched by itself");
    const Graph graph(compute, [&] { run(4.0f); });
    std::memset(host_out, 0, used_bytes);
    graph.launch(compute);
    compute.synchronize();
    check_output(host_out, 4.0f, "replayed from a graph");
    report.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return report;
}

namespace {

// The median over several replays, by the GPU's clock; the first one warms up.
double replay_seconds(const Stream& stream, const Graph& graph) {
    constexpr int n_rounds = 9;
    const Event begin(stream.gpu(), true), end(stream.gpu(), true);
    std::vector<double> seconds;
    for (int round = 0; round <= n_rounds; ++round) {
        begin.record(stream);
        graph.launch(stream);
        end.record(stream);
        stream.synchronize();
        if (round > 0) seconds.push_back(Event::seconds_between(begin, end));
    }
    return median(std::move(seconds));
}

}  // namespace

double measure_read_bandwidth(const std::shared_ptr<Gpu>& gpu, size_t n_bytes) {
    constexpr int n_reads = 4;  // a replay, so that launching does not count
    const auto budget = std::make_shared<Budget>(Budget::unlimited);
    const DeviceMemory from(gpu, budget, n_bytes, "a measurement's source");
    const DeviceMemory out(gpu, budget, sizeof(uint32_t), "a measurement's result");
    const Stream stream(gpu);
    const Current current(*gpu);
    const std::shared_ptr<Module> module = gpu->module("probe.cu");
    const Function kernel = module->function("probe_read");
    stream.fill(from.address(), 1, n_bytes);
    // As many threads as are resident at one time, if registers allow it.
    constexpr int n_threads = 512;
    const Gpu::Attributes& card = gpu->attributes();
    const Size3 grid{unsigned(card.n_sm * card.max_threads_per_sm / n_threads)};
    const auto read = [&] {
        kernel.launch(stream, grid, {n_threads}, 0, from.address(), (long long)(n_bytes / 16),
                      out.address());
    };
    const Graph reads(stream, [&] {
        for (int i = 0; i < n_reads; ++i)
            read();
    });
    return n_reads * double(n_bytes) / replay_seconds(stream, reads);
}

double measure_launch_seconds(const std::shared_ptr<Gpu>& gpu) {
    constexpr int n_launches = 1000;
    const Stream stream(gpu);
    const Current current(*gpu);
    const std::shared_ptr<Module> module = gpu->module("probe.cu");
    const Function kernel = module->function("probe_nothing");
    const Graph launches(stream, [&] {
        for (int i = 0; i < n_launches; ++i)
            kernel.launch(stream, {1}, {32}, 0);
    });
    return replay_seconds(stream, launches) / n_launches;
}

}  // namespace qi::cuda
