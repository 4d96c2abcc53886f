// Attention of every instruction set: against float64, and bitwise under any grouping of queries.
#include "kernels/attention.h"

#include <algorithm>

#include "kernel_checks.h"
#include "kernels/attention_table.h"
#include "quant/half.h"

using namespace qi;
using namespace qi::kernels;
using namespace qi::test;

namespace {

Checks checks;

struct Level {
    Isa isa;
    const AttentionOps& ops;
    const char* name() const { return isa_name(isa); }
};

const char* type_name(Type type) {
    return type == Type::f16 ? "F16" : "Q8_0";
}

// Pages of one KV head. All slots begin as bytes 0xff: NaN in both types, so that a slot read too
// many shows.
struct Cache {
    Type type;
    int64_t head_dim, n_positions;
    std::vector<std::vector<std::byte>> memory;
    std::vector<const std::byte*> pages;

    Cache(Type kv_type, int64_t dim, int64_t n)
        : type(kv_type),
          head_dim(dim),
          n_positions(n),
          memory(size_t((n + page_size - 1) / page_size),
                 std::vector<std::byte>(kv_head_bytes(kv_type, dim), std::byte{0xff})) {
        for (const auto& page : memory)
            pages.push_back(page.data());
    }

    void fill(const Level& level, std::mt19937& random) {
        for (int64_t position = 0; position < n_positions; ++position) {
            const std::vector<float> key = random_normal(random, head_dim);
            const std::vector<float> value = random_normal(random, head_dim);
            level.ops.kv_store(type, head_dim, int(position % page_size), key.data(), value.data(),
                               memory[size_t(position / page_size)].data());
        }
    }

    double code(const std::byte* head_page, int64_t codes_at, int64_t i, int64_t scale_i) const {
        const int64_t n = head_dim * page_size;
        uint16_t bits;
        if (type == Type::f16) {
            std::memcpy(&bits, head_page + codes_at + 2 * i, 2);
            return f16_to_f32(bits);
        }
        std::memcpy(&bits, head_page + codes_at + n + 2 * scale_i, 2);
        return double(int8_t(head_page[codes_at + i])) * f16_to_f32(bits);
    }
    double key(int64_t position, int64_t d) const {
        const int64_t slot = position % page_size;
        return code(pages[position / page_size], 0, d * page_size + slot,
                    d / 32 * page_size + slot);
    }
    double value(int64_t position, int64_t d) const {
        const int64_t slot = position % page_size, n = head_dim * page_size;
        return code(pages[position / page_size], type == Type::f16 ? 2 * n : n + n / 32 * 2,
                    slot * head_dim + d, slot * (head_dim / 32) + d / 32);
    }
};

// Queries of one call with their inputs and outputs.
struct Queries {
    int64_t head_dim;
    std::vector<int64_t> positions;
    std::vector<float> q, out;

    Queries(std::mt19937& random, int64_t dim, std::vector<int64_t> at)
        : head_dim(dim), positions(std::move(at)) {
        q = random_normal(random, int64_t(positions.size()) * dim);
        out.assign(q.size(), std::nanf(""));
    }

    // Attends with queries [begin, end) in one call; scratch is exactly as large as asked for,
    // between canaries.
    // With `terms`, [n][2], what is left is a part: of positions from `first` on.
    void attend(const Level& level, const Cache& cache, int64_t window, int64_t begin, int64_t end,
                int64_t first = 0, float* terms = nullptr) {
        std::vector<AttentionQuery> list;
        for (int64_t i = begin; i < end; ++i)
            list.push_back({q.data() + i * head_dim, out.data() + i * head_dim, positions[i],
                            terms ? terms + 2 * i : nullptr});
        const AttentionArgs args{cache.type,
                                 head_dim,
                                 1.0f / std::sqrt(float(head_dim)),
                                 window,
                                 cache.pages.data(),
                                 list.data(),
                                 end - begin,
                                 first};
        const size_t bytes = attention_scratch_bytes(head_dim, end - begin);
        constexpr size_t guard = 64;
        std::vector<std::byte> scratch(bytes + 2 * guard, std::byte{0x5a});
        level.ops.attend(args, scratch.data() + guard);
        for (size_t i = 0; i < guard; ++i)
            checks.expect(
                scratch[i] == std::byte{0x5a} && scratch[bytes + guard + i] == std::byte{0x5a},
                "%s: attend writes outside of its scratch (head_dim %lld, %lld queries)",
                level.name(), (long long)head_dim, (long long)(end - begin));
    }
};

std::vector<double> exact_output(const Cache& cache, const float* q, int64_t position,
                                 int64_t window) {
    const int64_t first = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
    std::vector<double> scores;
    for (int64_t p = first; p <= position; ++p) {
        double score = 0.0;
        for (int64_t d = 0; d < cache.head_dim; ++d)
            score += q[d] * cache.key(p, d);
        scores.push_back(score / std::sqrt(double(cache.head_dim)));
    }
    const double largest = *std::max_element(scores.begin(), scores.end());
    std::vector<double> out(size_t(cache.head_dim), 0.0);
    double total = 0.0;
    for (int64_t p = first; p <= position; ++p) {
        const double weight = std::exp(scores[size_t(p - first)] - largest);
        total += weight;
        for (int64_t d = 0; d < cache.head_dim; ++d)
            out[d] += weight * cache.value(p, d);
    }
    for (double& value : out)
        value /= total;
    return out;
}

void expect_exact(const Level& level, const Cache& cache, const Queries& queries, int64_t window,
                  const char* what) {
    for (size_t i = 0; i < queries.positions.size(); ++i) {
        const int64_t dim = cache.head_dim;
        const std::vector<double> exact =
            exact_output(cache, queries.q.data() + int64_t(i) * dim, queries.positions[i], window);
        double worst = 0.0;
        for (int64_t d = 0; d < dim; ++d) {
            const double error = std::fabs(queries.out[i * size_t(dim) + size_t(d)] - exact[d]);
            worst = error <= worst ? worst : error;  // a NaN is kept
        }
        checks.expect(worst <= 2e-6,
                      "%s %s: %s: position %lld, head_dim %lld, window %lld: off by %g",
                      level.name(), type_name(cache.type), what, (long long)queries.positions[i],
                      (long long)dim, (long long)window, worst);
    }
}

std::vector<int64_t> head_dims(Type type) {
    if (type == Type::q8_0) return {32, 64, 96, 128, 160, 256};
    return {2, 6, 8, 10, 36, 64, 80, 96, 100, 128, 160, 256};
}

constexpr int64_t windows[] = {0, 1, 5, 63, 64, 65, 130, 1000};

// Single queries at the borders of pages; the slots after each position still hold garbage.
void test_borders(const Level& level, Type type) {
    std::mt19937 random(1);
    for (int64_t dim : head_dims(type)) {
        for (int64_t n : {1, 2, 17, 63, 64, 65, 128, 129, 200}) {
            Cache cache(type, dim, n);
            cache.fill(level, random);
            for (int64_t window : windows) {
                Queries queries(random, dim, {n - 1});
                queries.attend(level, cache, window, 0, 1);
                expect_exact(level, cache, queries, window, "last position");
            }
        }
    }
}

// Any grouping of the same queries gives the same bits, and the right ones.
void test_grouping(const Level& level, Type type, int64_t dim,
                   const std::vector<int64_t>& positions, const char* what) {
    std::mt19937 random(2);
    const int64_t last = *std::max_element(positions.begin(), positions.end());
    Cache cache(type, dim, last + 1);
    cache.fill(level, random);
    const auto n = int64_t(positions.size());
    for (int64_t window : windows) {
        Queries together(random, dim, positions);
        together.attend(level, cache, window, 0, n);
        expect_exact(level, cache, together, window, what);
        for (int64_t group : {1, 2, 3, 4, 5, 6, 7, 13}) {
            Queries apart = together;
            for (int64_t begin = 0; begin < n; begin += group)
                apart.attend(level, cache, window, begin, std::min(n, begin + group));
            checks.expect(same_bits(apart.out.data(), together.out.data(), n * dim),
                          "%s %s: %s, head_dim %lld, window %lld: %lld at a time differ",
                          level.name(), type_name(type), what, (long long)dim, (long long)window,
                          (long long)group);
        }
    }
}

void test_groupings(const Level& level, Type type) {
    std::mt19937 random(3);
    for (int64_t dim : head_dims(type)) {
        std::vector<int64_t> prompt, grouped, scattered;
        for (int64_t i = 0; i < 75; ++i)
            prompt.push_back(i);
        for (int64_t i = 120; i < 132; ++i)
            grouped.insert(grouped.end(), 3, i);
        for (int64_t i = 0; i < 20; ++i)
            scattered.push_back(int64_t(random() % 300));
        test_grouping(level, type, dim, prompt, "a prompt");
        test_grouping(level, type, dim, grouped, "query heads by threes");
        test_grouping(level, type, dim, std::vector<int64_t>(8, 150), "eight query heads");
        test_grouping(level, type, dim, scattered, "scattered positions");
    }
}

// Pages wholly before the window are not read; later positions do not reach earlier queries even
// when their keys and values are NaN.
void test_unseen(const Level& level, Type type) {
    std::mt19937 random(4);
    const int64_t dim = 64, n = 300;
    Cache cache(type, dim, n);
    cache.fill(level, random);
    Queries clean(random, dim, {201, 200, 199, 198, 197, 196, 195, 194, 193, 192});
    clean.attend(level, cache, 50, 0, 10);

    const std::vector<float> nans(size_t(dim), std::nanf(""));
    for (int64_t position = 202; position < n; ++position)
        level.ops.kv_store(type, dim, int(position % page_size), nans.data(), nans.data(),
                           cache.memory[size_t(position / page_size)].data());
    cache.pages[0] = cache.pages[1] = nullptr;
    Queries again = clean;
    // A query that does see the NaN shares a block with those that must not.
    again.positions.push_back(202);
    again.q.insert(again.q.end(), clean.q.begin(), clean.q.begin() + dim);
    again.out.resize(again.q.size());
    again.attend(level, cache, 50, 0, 11);
    checks.expect(same_bits(again.out.data(), clean.out.data(), 10 * dim),
                  "%s %s: a NaN of a later position leaks", level.name(), type_name(type));
    checks.expect(std::isnan(again.out.back()), "%s %s: a NaN that is seen is lost", level.name(),
                  type_name(type));
}

// A part is the positions from its first on, whatever lies in pages before; normalised, one of all
// positions is the whole, bit by bit; of none, it is zeros.
void test_parts(const Level& level, Type type) {
    std::mt19937 random(11);
    const int64_t dim = 96, n = 300;
    Cache cache(type, dim, n);
    cache.fill(level, random);
    const std::vector<int64_t> positions = {0, 5, 63, 64, 127, 130, 191, 192, 200, 299};
    const auto n_queries = int64_t(positions.size());
    for (const int64_t window : windows) {
        Queries whole(random, dim, positions);
        whole.attend(level, cache, window, 0, n_queries);
        for (const int64_t first : {0, 64, 128, 192, 256}) {
            Queries part = whole;
            std::vector<float> terms(size_t(2 * n_queries), std::nanf(""));
            Cache later = cache;
            std::fill_n(later.pages.begin(), first / page_size, nullptr);
            part.attend(level, later, window, 0, n_queries, first, terms.data());
            for (int64_t i = 0; i < n_queries; ++i) {
                const float maximum = terms[size_t(2 * i)], sum = terms[size_t(2 * i + 1)];
                float* out = &part.out[size_t(i * dim)];
                const int64_t position = positions[size_t(i)];
                if (position < first) {
                    const bool nothing =
                        std::all_of(out, out + dim, [](float x) { return x == 0; });
                    checks.expect(nothing && sum == 0 && maximum == -__FLT_MAX__,
                                  "%s %s: a part that sees nothing is something", level.name(),
                                  type_name(type));
                    continue;
                }
                const float inverse = 1.0f / sum;
                for (int64_t d = 0; d < dim; ++d)
                    out[d] *= inverse;
                // What a window of no other position than the part's would give.
                const int64_t visible = position - first + 1;
                const int64_t seen = window > 0 ? std::min(window, visible) : visible;
                const std::vector<double> exact =
                    exact_output(cache, part.q.data() + i * dim, position, seen);
                double worst = 0.0;
                for (int64_t d = 0; d < dim; ++d) {
                    const double error = std::fabs(double(out[d]) - exact[size_t(d)]);
                    worst = error <= worst ? worst : error;
                }
                checks.expect(worst <= 2e-6, "%s %s: a part from %lld, window %lld: off by %g",
                              level.name(), type_name(type), (long long)first, (long long)window,
                              worst);
                checks.expect(first > 0 || same_bits(out, whole.out.data() + i * dim, dim),
                              "%s %s: a part of all positions is not the whole", level.name(),
                              type_name(type));
            }
        }
    }
}

// Two parts merged are the whole but for rounding: each term is rounded once more in the merge, as
// it is between pages.
void test_merge(const Level& level, Type type) {
    std::mt19937 random(12);
    const int64_t dim = 64, n = 400;
    Cache cache(type, dim, n);
    cache.fill(level, random);
    for (const int64_t boundary : {64, 192, 384}) {
        Queries whole(random, dim, {n - 1}), last = whole;
        Queries first(random, dim, {boundary - 1});
        first.q = whole.q;
        float terms[2][2];
        whole.attend(level, cache, 0, 0, 1);
        first.attend(level, cache, 0, 0, 1, 0, terms[0]);
        last.attend(level, cache, 0, 0, 1, boundary, terms[1]);
        const float top = std::max(terms[0][0], terms[1][0]);
        const float a = std::exp(terms[0][0] - top), b = std::exp(terms[1][0] - top);
        const float total = a * terms[0][1] + b * terms[1][1];
        double worst = 0.0;
        for (size_t d = 0; d < size_t(dim); ++d) {
            const float merged = (a * first.out[d] + b * last.out[d]) / total;
            worst = std::max(worst, double(std::fabs(merged - whole.out[d])));
        }
        checks.expect(worst <= 1e-6, "%s %s: parts merged at %lld are off by %g", level.name(),
                      type_name(type), (long long)boundary, worst);
    }
}

// One score far above the others, or all far below zero (first positions see one key each).
void test_extreme_scores(const Level& level, Type type) {
    std::mt19937 random(5);
    const int64_t dim = 32, n = 130;
    for (float size : {1e-30f, 1e4f, 1e30f}) {
        Cache cache(type, dim, n);
        cache.fill(level, random);
        Queries queries(random, dim, {n - 1, n - 1, 0, 0, 0, 0, 0, 0});
        for (float& value : queries.q)
            value *= size;
        queries.attend(level, cache, 0, 0, 8);
        expect_exact(level, cache, queries, 0, "extreme scores");
    }
}

void test_store_f16(const Level& level) {
    std::mt19937 random(6);
    for (int64_t dim : head_dims(Type::f16)) {
        const int64_t n = dim * page_size;
        std::vector<std::byte> page(kv_head_bytes(Type::f16, dim), std::byte{0});
        std::vector<uint16_t> expected(size_t(2 * n), 0);
        for (int slot : {0, 17, 63}) {
            std::vector<float> key = random_normal(random, dim, 100.0f);
            const std::vector<float> value = random_normal(random, dim, 1e-5f);
            key[0] = 1e6f;  // becomes infinity
            key[1] = std::nanf("");
            for (int64_t d = 0; d < dim; ++d) {
                expected[size_t(d * page_size + slot)] = f32_to_f16(key[d]);
                expected[size_t(n + slot * dim + d)] = f32_to_f16(value[d]);
            }
            level.ops.kv_store(Type::f16, dim, slot, key.data(), value.data(), page.data());
        }
        checks.expect(std::memcmp(page.data(), expected.data(), size_t(4 * n)) == 0,
                      "%s: F16 store of %lld dimensions is wrong", level.name(), (long long)dim);
    }
}

void test_store_q8(const Level& level) {
    std::mt19937 random(7);
    const int64_t dim = 96;
    Cache cache(Type::q8_0, dim, page_size);
    for (int slot = 0; slot < page_size; ++slot) {
        const float size = std::ldexp(1.0f, slot / 2 - 12);
        std::vector<float> key = random_normal(random, dim, size);
        std::vector<float> value = random_normal(random, dim, size);
        std::fill_n(value.begin() + 32, 32, 0.0f);
        key[5] = std::nanf("");
        key[64] = -HUGE_VALF;
        level.ops.kv_store(Type::q8_0, dim, slot, key.data(), value.data(), cache.memory[0].data());
        for (int64_t d = 0; d < dim; ++d) {
            float block_max = 0.0f;
            for (int64_t i = d / 32 * 32; i < d / 32 * 32 + 32; ++i)
                block_max = std::max(block_max, std::fabs(value[i]));
            // Half a step, and the rounding of the scale, which is subnormal for small blocks.
            const double limit = block_max / 127.0 * 0.502 + 127.0 * 0x1p-25;
            checks.expect(std::fabs(cache.value(slot, d) - value[d]) <= limit,
                          "%s: Q8_0 keeps %g as %g", level.name(), value[d], cache.value(slot, d));
            const bool spoilt = d / 32 != 1;
            checks.expect(std::isnan(cache.key(slot, d)) == spoilt,
                          "%s: Q8_0 key %lld of a block that %s a NaN or infinity is %g",
                          level.name(), (long long)d, spoilt ? "has" : "lacks", cache.key(slot, d));
        }
    }
    const auto* codes = reinterpret_cast<const int8_t*>(cache.memory[0].data());
    for (int64_t i = 0; i < dim * page_size; ++i)
        checks.expect(codes[i] != -128, "%s: Q8_0 uses code -128", level.name());
}

// Q8_0 approximates F16 as well as 8 bits can.
void test_types_agree(const Level& level) {
    const int64_t dim = 128, n = 190;
    std::vector<float> outputs[2];
    for (Type type : {Type::f16, Type::q8_0}) {
        std::mt19937 random(8);
        Cache cache(type, dim, n);
        cache.fill(level, random);
        Queries queries(random, dim, {n - 1, 100, 63});
        queries.attend(level, cache, 0, 0, 3);
        outputs[type == Type::q8_0] = queries.out;
    }
    double worst = 0.0;
    for (size_t i = 0; i < outputs[0].size(); ++i)
        worst = std::max(worst, double(std::fabs(outputs[0][i] - outputs[1][i])));
    checks.expect(worst > 0.0 && worst < 0.01, "%s: Q8_0 is %g away from F16", level.name(), worst);
}

void test_dispatch() {
    const Level level{active_isa(), *attention_ops_for(active_isa())};
    std::mt19937 random(9);
    Cache cache(Type::f16, 64, 70);
    cache.fill(level, random);
    Queries direct(random, 64, {69}), dispatched = direct;
    direct.attend(level, cache, 0, 0, 1);
    const AttentionQuery query{dispatched.q.data(), dispatched.out.data(), 69};
    const AttentionArgs args{Type::f16, 64, 1.0f / 8.0f, 0, cache.pages.data(), &query, 1};
    std::vector<std::byte> scratch(attention_scratch_bytes(64, 1));
    attend(args, scratch.data());
    checks.expect(same_bits(direct.out.data(), dispatched.out.data(), 64),
                  "attend is not the active level's");
}

}  // namespace

int main() {
    for (Isa isa : supported_levels()) {
        const AttentionOps* ops = attention_ops_for(isa);
        checks.expect(ops != nullptr, "no attention for %s", isa_name(isa));
        if (!ops) continue;
        const Level level{isa, *ops};
        for (Type type : {Type::f16, Type::q8_0}) {
            test_borders(level, type);
            test_groupings(level, type);
            test_unseen(level, type);
            test_parts(level, type);
            test_merge(level, type);
            test_extreme_scores(level, type);
        }
        test_store_f16(level);
        test_store_q8(level);
        test_types_agree(level);
    }
    test_dispatch();
    return checks.status();
}
