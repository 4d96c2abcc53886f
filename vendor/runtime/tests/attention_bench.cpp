// Speed of attention and of the vector operators, one thread, every instruction set of this
// machine.
#include <time.h>

#include <algorithm>
#include <functional>

#include "kernel_checks.h"
#include "kernels/attention_table.h"
#include "kernels/vector_ops_table.h"

using namespace qi;
using namespace qi::kernels;
using namespace qi::test;

namespace {

double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// Best of several passes, in seconds of CPU time per call.
double best_time(const std::function<void()>& call) {
    int64_t n = 1;
    const auto pass = [&] {
        const double start = cpu_seconds();
        for (int64_t i = 0; i < n; ++i)
            call();
        return cpu_seconds() - start;
    };
    while (pass() < 0.01)
        n *= 2;  // long against reading the clock
    double best = pass();
    for (int i = 0; i < 8; ++i)
        best = std::min(best, pass());
    return best / double(n);
}

// Cycles per second, from a chain of dependent operations of one cycle each.
double clock_rate() {
    constexpr int n = 1 << 20;
    uint64_t x = 1;
    const double seconds = best_time([&x] {
        for (int i = 0; i < n; ++i) {
            x += x;
            __asm__ volatile("" : "+r"(x));
        }
    });
    return n / seconds;
}

const char* type_name(Type type) {
    return type == Type::f16 ? "F16" : "Q8_0";
}

// KV heads of one sequence, each with its own pages.
class Heads {
  public:
    Heads(const AttentionOps& ops, Type type, int64_t head_dim, int64_t n_heads,
          int64_t n_positions)
        : ops_(ops), type_(type), dim_(head_dim), n_heads_(n_heads), n_positions_(n_positions) {
        const size_t bytes = kv_head_bytes(type, head_dim);
        const int64_t n_pages = (n_positions + page_size - 1) / page_size;
        memory_.resize(bytes * size_t(n_pages * n_heads) + 64);
        std::byte* base = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64);
        for (int64_t i = 0; i < n_heads * n_pages; ++i)
            pages_.push_back(base + size_t(i) * bytes);
        std::mt19937 random(1);
        const std::vector<float> rows = random_normal(random, 4096 + 2 * head_dim);
        for (int64_t i = 0; i < n_heads * n_pages * page_size; ++i)
            ops.kv_store(type, head_dim, int(i % page_size), rows.data() + i % 4096,
                         rows.data() + i * 7 % 4096,
                         const_cast<std::byte*>(pages_[size_t(i / page_size)]));
        q_ = random_normal(random, 4096 + head_dim);
    }

    // Every head in turn attends with `group` queries at each of the positions [begin, end).
    double seconds(int64_t group, int64_t begin, int64_t end) {
        std::vector<AttentionQuery> queries;
        out_.resize(size_t((end - begin) * group * dim_));
        for (int64_t i = begin; i < end; ++i)
            for (int64_t g = 0; g < group; ++g)
                queries.push_back({q_.data() + (i * group + g) * 5 % 4096,
                                   out_.data() + int64_t(queries.size()) * dim_, i});
        const auto n = int64_t(queries.size());
        scratch_.resize(attention_scratch_bytes(dim_, n));
        const int64_t n_pages = int64_t(pages_.size()) / n_heads_;
        return best_time([&] {
            for (int64_t h = 0; h < n_heads_; ++h) {
                const AttentionArgs args{type_,          dim_, 0.1f, 0, pages_.data() + h * n_pages,
                                         queries.data(), n};
                ops_.attend(args, scratch_.data());
            }
        });
    }
    int64_t n_positions() const { return n_positions_; }
    double bytes() const {
        return double(kv_head_bytes(type_, dim_)) / page_size * double(n_heads_ * n_positions_);
    }

  private:
    const AttentionOps& ops_;
    Type type_;
    int64_t dim_, n_heads_, n_positions_;
    std::vector<std::byte> memory_, scratch_;
    std::vector<const std::byte*> pages_;
    std::vector<float> q_, out_;
};

void bench_attention(Isa isa, double hertz) {
    const AttentionOps& ops = *attention_ops_for(isa);
    const int lanes = isa == Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
    for (Type type : {Type::f16, Type::q8_0}) {
        for (int64_t dim : {64, 128}) {
            constexpr int64_t n = 512;
            const double seconds = Heads(ops, type, dim, 1, n).seconds(1, 0, n);
            const double fma = double(n * (n + 1) / 2 * 2 * dim) / seconds;
            std::printf("%-8s %-4s prefill  512 tokens, head_dim %3lld: %6.1f GFMA/s, %3.0f %%\n",
                        isa_name(isa), type_name(type), (long long)dim, fma * 1e-9,
                        100.0 * fma / (hertz * 2 * lanes));
            for (int64_t group : {1, 4, 8}) {
                Heads small(ops, type, dim, 1, 512), large(ops, type, dim, 64, 4096);
                const double cached = small.bytes() / small.seconds(group, 511, 512);
                const double streamed = large.bytes() / large.seconds(group, 4095, 4096);
                std::printf(
                    "%-8s %-4s decode   %lld queries per head, head_dim %3lld: %5.1f GB/s cached, "
                    "%5.1f streamed\n",
                    isa_name(isa), type_name(type), (long long)group, (long long)dim, cached * 1e-9,
                    streamed * 1e-9);
            }
        }
    }
}

void bench_vector_ops(Isa isa, double hertz) {
    const VectorOps& ops = *vector_ops_for(isa);
    std::mt19937 random(1);
    constexpr int64_t n = 2048;
    const std::vector<float> x = random_normal(random, n), weight = random_normal(random, n);
    std::vector<float> y(n);
    const auto report = [&](const char* name, const std::function<void()>& call) {
        const double seconds = best_time(call);
        std::printf("%-8s %-16s n = %lld: %7.1f ns, %5.2f cycles per element\n", isa_name(isa),
                    name, (long long)n, seconds * 1e9, seconds * hertz / double(n));
    };
    report("rms_norm", [&] { ops.rms_norm(x.data(), weight.data(), 1e-5f, n, y.data()); });
    report("layer_norm",
           [&] { ops.layer_norm(x.data(), weight.data(), x.data(), 1e-5f, n, y.data()); });
    report("add", [&] { ops.add(x.data(), weight.data(), n, y.data()); });
    constexpr std::pair<const char*, Activation> activations[] = {
        {"silu", Activation::silu},
        {"relu", Activation::relu},
        {"gelu_erf", Activation::gelu_erf},
        {"gelu_tanh", Activation::gelu_tanh}};
    for (const auto& [name, act] : activations) {
        y = x;
        report(name, [&, act = act] { ops.activate(act, 0.0f, y.data(), n); });
    }
    y = x;
    std::vector<float> cos_sin(n);
    for (int64_t i = 0; i < n; i += 2)
        cos_sin[size_t(i)] = 1.0f;
    for (bool neox : {false, true})
        report(neox ? "rope neox" : "rope", [&] { ops.rope(y.data(), cos_sin.data(), n, neox); });
    report("max_and_sum_exp", [&] {
        float max;
        double sum;
        ops.max_and_sum_exp(x.data(), n, &max, &sum);
    });
}

}  // namespace

int main() {
    const double hertz = clock_rate();
    std::printf("%s, %.2f GHz, one thread reads %.1f GB/s; %% of two vector FMA per cycle\n",
                cpu_info().brand.c_str(), hertz * 1e-9,
                1e-9 * measure_read_bandwidth(1, size_t{256} << 20));
    std::vector<Isa> levels = supported_levels();
    std::reverse(levels.begin(), levels.end());
    for (Isa isa : levels) {
        bench_vector_ops(isa, hertz);
        bench_attention(isa, hertz);
    }
}
