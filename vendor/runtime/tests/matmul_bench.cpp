// Speed of the matrix kernels beside that of plain reading: matmul_bench [threads] [type ...].
// QINFER_ISA chooses the level.
//
// Per type: one token with weights in L2 and with weights in memory, in GB of weights per second;
// of weights in memory every other group of columns, in GB of those weights per second; how many
// times longer four tokens take from memory; and 128 tokens in thousand million multiply-adds per
// second. Best of several passes by the threads' own processor time, summed over threads.
#include <time.h>

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/cpu.h"
#include "kernels/matmul.h"
#include "quant/half.h"

using namespace qi;
using namespace qi::kernels;

namespace {

constexpr int64_t n_cols = 2048;
constexpr size_t l2_bytes = 384 * 1024;
constexpr size_t memory_bytes = 160 * 1024 * 1024;  // several times L3
constexpr int64_t chunk_rows = 64;
constexpr int64_t n_neurons = 8192;  // columns of which groups are picked

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Work per second of all threads, each of which does `work` at once with the others; the best of
// several passes.
double rate(int n_threads, int n_passes, double work, const std::function<void(int)>& body) {
    std::vector<double> best(size_t(n_threads), 1e30);
    std::barrier together(n_threads);
    std::vector<std::thread> threads;
    for (int thread = 0; thread < n_threads; ++thread)
        threads.emplace_back([&, thread] {
            for (int pass = 0; pass < n_passes; ++pass) {
                together.arrive_and_wait();
                const double begin = thread_seconds();
                body(thread);
                best[size_t(thread)] = std::min(best[size_t(thread)], thread_seconds() - begin);
            }
        });
    double sum = 0;
    for (int thread = 0; thread < n_threads; ++thread) {
        threads[size_t(thread)].join();
        sum += work / best[size_t(thread)];
    }
    return sum;
}

// What one thread works on.
struct Bench {
    Weight w;
    int64_t n_tokens;
    AlignedBuffer<std::byte> prepared, scratch;
    AlignedBuffer<float> y;
    std::vector<int32_t> groups;  // of columns; empty: all

    Bench(const Weight& weight, int64_t tokens) : w(weight), n_tokens(tokens) {
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        std::vector<float> x(size_t(tokens * w.n_cols));
        for (float& value : x)
            value = normal(random);
        const ActivationForm form = activation_form(w.type);
        prepared.reserve(activation_bytes(form, w.n_cols, tokens));
        prepare_activations(form, x.data(), w.n_cols, w.n_cols, tokens, 0, tokens, prepared.data());
        scratch.reserve(matmul_scratch_bytes(w, tokens) + 1);
        y.reserve(size_t(tokens * w.n_rows));
    }
    void run() {
        for (int64_t row = 0; row < w.n_rows; row += chunk_rows) {
            const int64_t end = std::min(w.n_rows, row + chunk_rows);
            if (groups.empty())
                matmul_rows(w, row, end, prepared.data(), n_tokens, y.data(), w.n_rows,
                            scratch.data());
            else
                matmul_groups(w, row, end, groups.data(), int64_t(groups.size()), prepared.data(),
                              n_tokens, y.data(), w.n_rows);
        }
    }
};

double rate_of(int n_threads, int n_passes, int repeats, const std::vector<Weight>& weights,
               int64_t n_tokens, double work, const std::vector<int32_t>& groups = {}) {
    std::vector<Bench> benches;
    for (const Weight& w : weights)
        benches.emplace_back(w, n_tokens).groups = groups;
    return rate(n_threads, n_passes, work * repeats, [&](int thread) {
        for (int i = 0; i < repeats; ++i)
            benches[size_t(thread)].run();
    });
}

}  // namespace

int main(int n_arguments, char** arguments) {
    const int n_threads = n_arguments > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
    const std::vector<std::string> wanted(arguments + std::min(2, n_arguments),
                                          arguments + n_arguments);

    // Random codes with small scales: one 16-bit pattern fits every place a scale can be at.
    AlignedBuffer<uint16_t> memory[64];
    std::mt19937 random(2);
    for (int thread = 0; thread < n_threads; ++thread) {
        uint16_t* out = memory[thread].reserve(memory_bytes / 2);
        for (size_t i = 0; i < memory_bytes / 2; ++i)
            out[i] = uint16_t(random() & 0xbbff);  // an f16 below 1 wherever it lies
    }
    const auto read = [&](size_t n_bytes, int repeats) {
        return rate(n_threads, 7, double(n_bytes) * repeats, [&](int thread) {
            uint64_t sums[8] = {};
            const auto* words = reinterpret_cast<const uint64_t*>(memory[thread].data());
            for (int repeat = 0; repeat < repeats; ++repeat)
                for (size_t i = 0; i < n_bytes / 8; i += 8)
                    for (size_t j = 0; j < 8; ++j)
                        sums[j] += words[i + j];
            volatile uint64_t sink =
                sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
            (void)sink;
        });
    };
    std::printf("%s, %d threads; reading: %.1f GB/s from L2, %.1f from memory\n",
                isa_name(active_isa()), n_threads, read(l2_bytes, 400) * 1e-9,
                read(memory_bytes, 1) * 1e-9);
    std::printf("%6s %10s %10s %10s %10s %10s\n", "", "L2 GB/s", "DRAM GB/s", "half GB/s",
                "4 tokens x", "GMAC/s");
    for (const TypeTraits& type : all_types()) {
        if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), type.name) == wanted.end())
            continue;
        const size_t bytes = row_bytes(type.type, n_cols);
        const auto weights = [&](size_t n_bytes, int64_t n_cols = ::n_cols) {
            std::vector<Weight> result;
            const size_t bytes = row_bytes(type.type, n_cols);
            const auto n_rows = int64_t(n_bytes / bytes) / row_granularity * row_granularity;
            for (int thread = 0; thread < n_threads; ++thread)
                result.push_back({type.type, reinterpret_cast<std::byte*>(memory[thread].data()),
                                  n_rows, n_cols, bytes});
            return result;
        };
        const auto in_l2 = weights(l2_bytes), in_memory = weights(memory_bytes);
        const double l2 = double(in_l2[0].n_rows) * double(bytes) * 1e-9;
        const double all = double(in_memory[0].n_rows) * double(bytes) * 1e-9;
        const auto panel = weights(512 * bytes);
        const double from_l2 = rate_of(n_threads, 7, 200, in_l2, 1, l2);
        const double from_memory = rate_of(n_threads, 7, 1, in_memory, 1, all);
        std::vector<int32_t> groups;
        for (int64_t group = 0; group < n_neurons / column_group(type.type); group += 2)
            groups.push_back(int32_t(group));
        const double half =
            rate_of(n_threads, 7, 1, weights(memory_bytes, n_neurons), 1, all / 2, groups);
        const double four = rate_of(n_threads, 5, 1, in_memory, 4, all);
        const double macs = rate_of(n_threads, 7, 2, panel, 128, 512.0 * n_cols * 128 * 1e-9);
        std::printf("%6s %10.1f %10.1f %10.1f %10.2f %10.1f\n", type.name, from_l2, from_memory,
                    half, from_memory / four, macs);
    }
    return 0;
}
