// Speed of kernels over a tenth of a matrix's rows, picked at random: row_sums_bench [type ...].
// QINFER_ISA chooses the level.
//
// Per type, for one thread and one token, in GB of the weights picked per second: products with
// listed rows and sums of listed rows, out of L2 and from memory. Best of several passes by the
// thread's own processor time.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/cpu.h"
#include "kernels/matmul.h"
#include "kernels/row_sums.h"

using namespace qi;
using namespace qi::kernels;

namespace {

constexpr int64_t n_cols = 2048;
constexpr size_t l2_bytes = 3 * 1024 * 1024;         // of which a tenth is read
constexpr size_t memory_bytes = size_t(1024) << 20;  // a tenth of it is several times L3

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

double best_rate(int n_passes, double work, const std::function<void()>& body) {
    double best = 1e30;
    for (int pass = 0; pass < n_passes; ++pass) {
        const double begin = thread_seconds();
        body();
        best = std::min(best, thread_seconds() - begin);
    }
    return work / best;
}

}  // namespace

int main(int n_arguments, char** arguments) {
    const std::vector<std::string> wanted(arguments + 1, arguments + n_arguments);
    AlignedBuffer<uint16_t> memory;
    std::mt19937 random(2);
    uint16_t* words = memory.reserve(memory_bytes / 2);
    for (size_t i = 0; i < memory_bytes / 2; ++i)
        words[i] = uint16_t(random() & 0xbbff);  // an f16 below 1 wherever it lies
    std::normal_distribution<float> normal;
    std::vector<float> x(n_cols), sums(n_cols);
    for (float& value : x)
        value = normal(random);

    std::printf("%s, 1 thread, a tenth of the rows, GB/s\n", isa_name(active_isa()));
    std::printf("%6s %12s %12s %12s %12s\n", "", "products L2", "DRAM", "sums L2", "DRAM");
    for (const TypeTraits& type : all_types()) {
        if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), type.name) == wanted.end())
            continue;
        const size_t bytes = row_bytes(type.type, n_cols);
        const ActivationForm form = activation_form(type.type);
        AlignedBuffer<std::byte> prepared, scratch;
        prepared.reserve(activation_bytes(form, n_cols, 1));
        prepare_activations(form, x.data(), n_cols, n_cols, 1, 0, 1, prepared.data());
        scratch.reserve(row_sums_scratch_bytes());
        double rates[4];
        for (int place = 0; place < 2; ++place) {
            const auto n_rows = int64_t((place == 0 ? l2_bytes : memory_bytes) / bytes);
            const Weight w = {type.type, reinterpret_cast<std::byte*>(words), n_rows, n_cols,
                              bytes};
            std::vector<int32_t> list;
            for (int64_t r = 0; r < n_rows; ++r)
                if (random() % 10 == 0) list.push_back(int32_t(r));
            std::vector<float> y(list.size()), factors(list.size(), 0.5f);
            const auto n = int64_t(list.size());
            const int repeats = place == 0 ? 50 : 1;
            const double work = double(repeats) * double(list.size()) * double(bytes) * 1e-9;
            rates[place] = best_rate(7, work, [&] {
                for (int i = 0; i < repeats; ++i)
                    matmul_listed(w, list.data(), n, prepared.data(), 1, y.data(), n);
            });
            rates[2 + place] = best_rate(7, work, [&] {
                for (int i = 0; i < repeats; ++i)
                    add_row_sums({w, list.data(), n, factors.data(), n, false, 1, 0, n_cols,
                                  sums.data(), n_cols},
                                 scratch.data());
            });
        }
        std::printf("%6s %12.1f %12.1f %12.1f %12.1f\n", type.name, rates[0], rates[1], rates[2],
                    rates[3]);
    }
    return 0;
}
