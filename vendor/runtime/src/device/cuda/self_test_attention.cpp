// Self-tests of rotation, the pages of keys and values, and attention.
#include <algorithm>
#include <functional>

#include "base/error.h"
#include "device/cuda/self_test_bench.h"
#include "kernels/attention.h"
#include "kernels/vector_ops.h"
#include "quant/half.h"

namespace qi::cuda {

namespace {

constexpr int64_t page = kernels::page_size;

struct CacheShape {
    Type type;
    int64_t n_head, n_head_kv, head_dim;
};

// Pages of two layers, of which the second is used, on both sides; sequences' pages lie anywhere.
struct Cache {
    CacheShape shape;
    size_t head_bytes, layer_offset, page_stride;
    std::vector<std::byte> host;  // [n_pages][page_stride]
    std::vector<int32_t> pages;   // tables of all sequences
    KvArgs device;

    Cache(Bench& bench, const CacheShape& of, int64_t n_pages)
        : shape(of), head_bytes(kernels::kv_head_bytes(of.type, of.head_dim)) {
        layer_offset = size_t(of.n_head_kv) * head_bytes;
        page_stride = 2 * layer_offset + 256;
        // Places that are not written are NaN: reading one shows.
        host.assign(size_t(n_pages) * page_stride, std::byte(0xff));
        for (int32_t i = 0; i < int32_t(n_pages); ++i)
            pages.push_back(i);
        std::shuffle(pages.begin(), pages.end(), bench.random);
        device.type = of.type;
        device.page_stride = page_stride;
        device.layer_offset = layer_offset;
        device.head_bytes = head_bytes;
        device.n_head_kv = of.n_head_kv;
        device.head_dim = of.head_dim;
        device.pages = bench.upload(pages);
    }
    std::byte* head(int64_t table, int64_t position, int64_t kv_head) {
        return host.data() + size_t(pages[size_t(table + position / page)]) * page_stride +
               layer_offset + size_t(kv_head) * head_bytes;
    }
    void store(int64_t table, int64_t position, int64_t kv_head, const float* k, const float* v) {
        kernels::kv_store(shape.type, shape.head_dim, int(position % page), k, v,
                          head(table, position, kv_head));
    }
    void upload(Bench& bench) { device.pool = bench.upload(host); }
};

struct TestToken {
    int64_t table, position;  // below 0: none
};

void upload_tokens(Bench& bench, Cache& cache, const std::vector<TestToken>& tokens) {
    std::vector<int32_t> positions, tables;
    for (const TestToken& token : tokens) {
        positions.push_back(int32_t(token.position));
        tables.push_back(int32_t(token.table));
    }
    cache.device.positions = bench.upload(positions);
    cache.device.tables = bench.upload(tables);
}

// ---- rotation and storing ----

void test_append(Bench& bench, const CacheShape& shape, int64_t n_rot, bool neox) {
    const std::vector<TestToken> tokens = {{0, 0}, {0, 1}, {0, -1}, {3, 63}, {3, 64}, {3, 130}};
    const auto n = int64_t(tokens.size()), head_dim = shape.head_dim;
    Cache cache(bench, shape, 6);
    cache.upload(bench);
    upload_tokens(bench, cache, tokens);
    const int64_t q_width = shape.n_head * head_dim, kv_width = shape.n_head_kv * head_dim;
    const int64_t stride = q_width + 2 * kv_width;  // fused
    std::vector<float> qkv = bench.normal(size_t(n * stride));
    // A block of Q8_0 that has an infinity, and one of zeros.
    qkv[size_t(q_width + 3)] = HUGE_VALF;
    std::fill_n(&qkv[size_t(stride + q_width)], std::min<int64_t>(32, head_dim), 0.0f);
    std::vector<float> cos_sin(size_t(n * n_rot));
    for (size_t i = 0; i < cos_sin.size(); i += 2) {
        const float angle = float(bench.below(1000));
        cos_sin[i] = std::cos(angle);
        cos_sin[i + 1] = std::sin(angle);
    }
    AppendArgs args;
    args.kv = cache.device;
    args.q = bench.upload(qkv);
    args.k = args.q + size_t(q_width) * sizeof(float);
    args.v = args.k + size_t(kv_width) * sizeof(float);
    args.q_stride = args.kv_stride = stride;
    args.n_head = shape.n_head;
    args.cos_sin = n_rot > 0 ? bench.upload(cos_sin) : 0;
    args.n_rot = n_rot;
    args.neox = neox;
    args.n_tokens = n;
    bench.kernels.append(bench.stream, args);
    const auto got = bench.download<float>(args.q, qkv.size());
    const auto pool = bench.download<std::byte>(cache.device.pool, cache.host.size());

    std::vector<float> want = qkv;
    for (int64_t t = 0; t < n; ++t) {
        float* row = &want[size_t(t * stride)];
        const float* angles = n_rot > 0 ? &cos_sin[size_t(t * n_rot)] : nullptr;
        for (int64_t h = 0; h < shape.n_head && n_rot > 0; ++h)
            kernels::rope(row + h * head_dim, angles, n_rot, neox);
        const TestToken& token = tokens[size_t(t)];
        for (int64_t h = 0; h < shape.n_head_kv && token.position >= 0; ++h) {
            std::vector<float> key(row + q_width + h * head_dim,
                                   row + q_width + (h + 1) * head_dim);
            if (n_rot > 0) kernels::rope(key.data(), angles, n_rot, neox);
            cache.store(token.table, token.position, h, key.data(),
                        row + q_width + kv_width + h * head_dim);
        }
    }
    // Both sides round alike in every step of a rotation; NaN need not have the same bits.
    for (size_t i = 0; i < got.size(); ++i)
        if (!(int64_t(i) % stride >= q_width && std::isnan(want[i])))
            bench.compare(double(got[i]), double(want[i]), 0.0);
    for (size_t i = 0; i < pool.size(); i += 2) {
        uint16_t stored, wanted;
        std::memcpy(&stored, &pool[i], 2);
        std::memcpy(&wanted, &cache.host[i], 2);
        const auto nan = [](uint16_t half) { return (half & 0x7fffu) > 0x7c00u; };
        bench.expect(stored == wanted || (nan(stored) && nan(wanted)));
    }
}

// ---- attention ----

struct Wanted {
    std::vector<double> out, tolerance;  // [head_dim]
};

// One query's attention in double, over the stored keys and values, and what float may differ by.
Wanted attend_slowly(const std::vector<float>& keys, const std::vector<float>& values,
                     const float* q, int64_t head_dim, int64_t first, int64_t last, double scale,
                     int64_t n_parts) {
    std::vector<double> scores;
    double maximum = -HUGE_VAL, error = 0;
    for (int64_t i = first; i <= last; ++i) {
        double dot = 0, size = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
            const double product = double(q[d]) * double(keys[size_t(i * head_dim + d)]);
            dot += product;
            size += std::fabs(product);
        }
        scores.push_back(dot * scale);
        maximum = std::max(maximum, scores.back());
        // A chain of head_dim terms and the scaling (twice, and 4 for two halves of 22 bits, where
        // tensor cores cut instead of rounding), then its difference from the maximum.
        error = std::max(error, (2.0 * double(head_dim) + 8.0) * float_rounding * size * scale +
                                    2 * float_rounding * std::fabs(dot * scale));
    }
    double total = 0;
    for (double& score : scores)
        total += score = std::exp(score - maximum);
    Wanted wanted{std::vector<double>(size_t(head_dim)), std::vector<double>(size_t(head_dim))};
    // Exponentials: their arguments' errors (score and maximum), 4 ulp of the function. Sums: 64
    // terms of a page (twice, as above), then some roundings for each page or part that is merged;
    // the division.
    const double n_pages = double(last / page - first / page + n_parts);
    const double relative = 2 * (2 * error + 4 * float_rounding) +
                            (2 * 64.0 + 8.0 * n_pages + 12.0) * 2 * float_rounding;
    for (int64_t d = 0; d < head_dim; ++d) {
        double sum = 0, size = 0;
        for (int64_t i = first; i <= last; ++i) {
            const double term =
                scores[size_t(i - first)] / total * double(values[size_t(i * head_dim + d)]);
            sum += term;
            size += std::fabs(term);
        }
        wanted.out[size_t(d)] = sum;
        wanted.tolerance[size_t(d)] = relative * size;
    }
    return wanted;
}

// Keys and values as they can be read back from the pages, [n_positions][head_dim].
void read_back(Cache& cache, int64_t table, int64_t kv_head, int64_t n, std::vector<float>& keys,
               std::vector<float>& values) {
    const int64_t head_dim = cache.shape.head_dim, n_blocks = head_dim / 32;
    keys.resize(size_t(n * head_dim));
    values.resize(keys.size());
    for (int64_t i = 0; i < n; ++i) {
        const auto* at = reinterpret_cast<const uint8_t*>(cache.head(table, i, kv_head));
        const int64_t slot = i % page;
        const auto half = [&](int64_t offset, int64_t index) {
            uint16_t bits;
            std::memcpy(&bits, at + offset + 2 * index, 2);
            return f16_to_f32(bits);
        };
        for (int64_t d = 0; d < head_dim; ++d) {
            float& key = keys[size_t(i * head_dim + d)];
            float& value = values[size_t(i * head_dim + d)];
            if (cache.shape.type == Type::f16) {
                key = half(0, d * page + slot);
                value = half(head_dim * page * 2, slot * head_dim + d);
                continue;
            }
            const int64_t codes = head_dim * page, scales = n_blocks * page * 2;
            key = float(int8_t(at[d * page + slot])) * half(codes, d / 32 * page + slot);
            value = float(int8_t(at[codes + scales + slot * head_dim + d])) *
                    half(2 * codes + scales, slot * n_blocks + d / 32);
        }
    }
}

struct AttendCase {
    CacheShape shape;
    std::vector<int64_t> positions;  // of tokens of one sequence, then again of another
    int64_t window;
    bool tiled;
    int64_t bound = -1;  // pages that the device attends to, the host to the rest; below 0: to all
};

// Attention in two parts: the device's in args.out and terms, the host's by the kernels of this
// processor. Where the host has nothing to do the result is that of the device alone, bit by bit.
void attend_in_parts(Bench& bench, const AttendCase& c, Cache& cache,
                     const std::vector<TestToken>& tokens, const std::vector<float>& q,
                     const AttendArgs& args, const std::function<void(const AttendArgs&)>& attend) {
    const int64_t head_dim = c.shape.head_dim, n_head = c.shape.n_head, n = args.n_tokens;
    const int64_t group = n_head / c.shape.n_head_kv, width = n_head * head_dim;
    attend(args);
    const auto whole = bench.download<float>(args.out, size_t(n * width));
    const std::vector<int32_t> bounds(size_t(n), int32_t(c.bound));
    AttendArgs part = args;
    part.q8 = {};
    part.kv.bounds = bench.upload(bounds);
    part.terms = bench.room(size_t(n * n_head * 2) * sizeof(float));
    attend(part);
    std::vector<float> other(size_t(n * width)), terms(size_t(n * n_head * 2));
    std::vector<std::byte> scratch(kernels::attention_scratch_bytes(head_dim, 1) + 64);
    for (int64_t t = 0; t < n; ++t) {
        const TestToken& token = tokens[size_t(t)];
        if (token.position < 0) continue;
        for (int64_t head = 0; head < n_head; ++head) {
            std::vector<const std::byte*> pages;
            for (int64_t p = 0; p <= token.position / page; ++p)
                pages.push_back(cache.head(token.table, p * page, head / group));
            const int64_t at = t * n_head + head;
            const kernels::AttentionQuery asked{&q[size_t(t * args.q_stride + head * head_dim)],
                                                &other[size_t(at * head_dim)], token.position,
                                                &terms[size_t(2 * at)]};
            kernels::attend({c.shape.type, head_dim, args.scale, c.window, pages.data(), &asked, 1,
                             c.bound * page},
                            scratch.data());
        }
    }
    bench.kernels.attend_merge(bench.stream, part, bench.upload(other), bench.upload(terms));
    const auto merged = bench.download<float>(args.out, size_t(n * width));
    for (size_t i = 0; i < merged.size(); ++i) {
        const int64_t position = tokens[i / size_t(width)].position;
        if (position >= 0 && position < c.bound * page) bench.expect(merged[i] == whole[i]);
    }
}

void test_attend(Bench& bench, const AttendCase& c) {
    const CacheShape& shape = c.shape;
    const int64_t head_dim = shape.head_dim, group = shape.n_head / shape.n_head_kv;
    const int64_t n_stored = *std::max_element(c.positions.begin(), c.positions.end()) + 1;
    const int64_t n_pages = (n_stored + page - 1) / page;
    Cache cache(bench, shape, 2 * n_pages);
    std::vector<TestToken> tokens;
    for (const int64_t table : {int64_t(0), n_pages}) {
        for (int64_t i = 0; i < n_stored; ++i)
            for (int64_t h = 0; h < shape.n_head_kv; ++h)
                cache.store(table, i, h, bench.normal(size_t(head_dim)).data(),
                            bench.normal(size_t(head_dim)).data());
        for (const int64_t position : c.positions)
            tokens.push_back({table, position});
        if (!c.tiled) tokens.push_back({table, -1});
    }
    cache.upload(bench);
    upload_tokens(bench, cache, tokens);
    const auto n = int64_t(tokens.size());
    const int64_t width = shape.n_head * head_dim, stride = width + 8;
    const std::vector<float> q = bench.normal(size_t(n * stride));

    AttendArgs args;
    args.kv = cache.device;
    args.q = bench.upload(q);
    args.q_stride = stride;
    args.n_head = shape.n_head;
    args.scale = 1.0f / std::sqrt(float(head_dim));
    args.window = c.window;
    args.out = bench.room(size_t(n * width) * sizeof(float));
    args.n_tokens = n;
    if (c.tiled) {
        std::vector<int32_t> tiles;
        const auto half = n / 2, step = Kernels::attend_tile_tokens(args);
        for (const int64_t begin : {int64_t(0), half})
            for (int64_t i = 0; i < half; i += step) {
                tiles.push_back(int32_t(begin + i));
                tiles.push_back(int32_t(std::min(step, half - i)));
            }
        args.tiles = bench.upload(tiles);
        args.n_tiles = int64_t(tiles.size() / 2);
    } else {
        args.max_positions = n_stored;
        args.room = bench.room(Kernels::attend_room_bytes(args));
        args.tickets = bench.zeros(Kernels::attend_ticket_bytes(args));
        if (head_dim % 32 == 0) args.q8 = Q8::at(bench.room(Q8::n_bytes(n, width)), n, width);
    }
    const auto attend = [&](const AttendArgs& asked) {
        if (c.tiled)
            bench.kernels.attend_tiles(bench.stream, asked);
        else
            bench.kernels.attend(bench.stream, asked);
    };
    if (c.bound >= 0) {
        args.q8 = {};
        attend_in_parts(bench, c, cache, tokens, q, args, attend);
    } else {
        // Twice, and fewer tokens between: tickets must be as they were.
        attend(args);
        if (!c.tiled) {
            AttendArgs fewer = args;
            fewer.n_tokens = 1;
            fewer.q8 = {};
            attend(fewer);
        }
        bench.stream.fill(args.out, 0xff, size_t(n * width) * sizeof(float));
        attend(args);
    }
    const auto got = bench.download<float>(args.out, size_t(n * width));
    if (args.q8) {
        // Rows of tokens that are none stay as they were.
        const TestInput q8(bench, got, n, width);
        const auto codes = bench.download<int8_t>(args.q8.codes, q8.codes.size());
        const auto scales = bench.download<float>(args.q8.scales, q8.scales.size());
        const auto sums = bench.download<float>(args.q8.sums, q8.sums.size());
        for (size_t i = 0; i < codes.size(); ++i) {
            if (tokens[i / size_t(width)].position < 0) continue;
            bench.expect(codes[i] == q8.codes[i]);
            bench.compare(double(scales[i / 32]), double(q8.scales[i / 32]), 0.0);
            bench.compare(double(sums[i / 16]), double(q8.sums[i / 16]), 0.0);
        }
    }

    std::vector<std::byte> scratch(kernels::attention_scratch_bytes(head_dim, 1) + 64);
    std::vector<float> keys, values;
    for (int64_t kv_head = 0; kv_head < shape.n_head_kv; ++kv_head) {
        int64_t table = -1;
        for (int64_t t = 0; t < n; ++t) {
            const TestToken& token = tokens[size_t(t)];
            if (token.position < 0) continue;
            if (token.table != table) {
                table = token.table;
                read_back(cache, table, kv_head, n_stored, keys, values);
            }
            std::vector<const std::byte*> pages;
            for (int64_t p = 0; p < n_pages; ++p)
                pages.push_back(cache.head(token.table, p * page, kv_head));
            const int64_t first =
                c.window > 0 ? std::max<int64_t>(token.position - c.window + 1, 0) : 0;
            for (int64_t g = 0; g < group; ++g) {
                const int64_t head = kv_head * group + g;
                const float* query = &q[size_t(t * stride + head * head_dim)];
                std::vector<float> twin(size_t(head_dim), 0.0f);
                const kernels::AttentionQuery asked{query, twin.data(), token.position};
                kernels::attend(
                    {shape.type, head_dim, args.scale, c.window, pages.data(), &asked, 1},
                    scratch.data());
                const Wanted wanted =
                    attend_slowly(keys, values, query, head_dim, first, token.position,
                                  double(args.scale), c.bound < 0 ? 1 : 2);
                for (int64_t d = 0; d < head_dim; ++d) {
                    const double value =
                        double(got[size_t((t * shape.n_head + head) * head_dim + d)]);
                    bench.compare(value, wanted.out[size_t(d)], wanted.tolerance[size_t(d)]);
                    bench.compare(value, double(twin[size_t(d)]), 2 * wanted.tolerance[size_t(d)]);
                }
            }
        }
    }
}

}  // namespace

void add_attention_tests(std::vector<SelfTest>& tests) {
    for (const CacheShape& shape :
         {CacheShape{Type::f16, 4, 2, 64}, CacheShape{Type::f16, 3, 1, 20},
          CacheShape{Type::q8_0, 4, 2, 64}, CacheShape{Type::q8_0, 2, 2, 160}})
        for (const bool neox : {false, true})
            for (const int64_t n_rot : {int64_t(0), shape.head_dim / 2 / 2 * 2, shape.head_dim}) {
                if (neox && n_rot == 0) continue;
                tests.push_back(
                    {format("append %s, head_dim %lld, n_rot %lld%s", traits(shape.type).name,
                            (long long)shape.head_dim, (long long)n_rot, neox ? ", neox" : ""),
                     [=](Bench& bench) { test_append(bench, shape, n_rot, neox); }});
            }

    const auto add = [&](const AttendCase& c) {
        tests.push_back(
            {format("attend%s %s, %lld heads over %lld of %lld, to %lld, window %lld%s",
                    c.tiled ? " tiles" : "", traits(c.shape.type).name, (long long)c.shape.n_head,
                    (long long)c.shape.n_head_kv, (long long)c.shape.head_dim,
                    (long long)c.positions.back(), (long long)c.window,
                    c.bound < 0 ? "" : format(", %lld pages", (long long)c.bound).c_str()),
             [=](Bench& bench) { test_attend(bench, c); }});
    };
    const std::vector<int64_t> few = {0, 1, 63, 64, 65, 700};
    std::vector<int64_t> run;
    for (int64_t i = 50; i < 50 + 45; ++i)
        run.push_back(i);
    for (const Type type : {Type::f16, Type::q8_0}) {
        for (const int64_t group : {1, 3, 4, 8, 11})
            for (const int64_t window : {0, 5, 100}) {
                if (window == 100 && group != 1 && group != 4) continue;
                add({{type, 2 * group, 2, 64}, few, window, false});
                add({{type, 2 * group, 2, 64}, run, window, true});
            }
        for (const int64_t head_dim : {32, 96, 128, 160, 256}) {
            add({{type, 4, 2, head_dim}, run, 20, true});
            add({{type, 2, 1, head_dim}, {3, 129}, 0, false});
            add({{type, 2, 1, head_dim}, {3, 4, 5, 129}, 70, true});
        }
        add({{type, 1, 1, 32}, {2047, 2048, 2500}, 0, false});  // a page per run, then four
        add({{type, 1, 1, 32}, {8191, 8192, 9000}, 0, false});  // then sixteen
        add({{type, 1, 1, 32}, {2600}, 2100, false});
        add({{type, 6, 1, 32}, {2047, 2100}, 2040, false});   // 33 runs: more than a warp has lanes
        add({{type, 40, 1, 32}, run, 0, true});               // a group larger than a tile
        add({{type, 32, 32, 32}, {70, 129, 130}, 0, false});  // as many tickets as a step has
        // Parts: of nothing, of one page, of all; one beyond all that a window sees.
        for (const int64_t bound : {0, 1, 3, 11}) {
            add({{type, 4, 2, 64}, few, 0, false, bound});
            add({{type, 4, 2, 64}, few, 100, false, bound});
            add({{type, 4, 2, bound % 2 ? 64 : 160}, run, bound % 3 ? 0 : 20, true, bound});
        }
        add({{type, 1, 1, 32}, {2047, 2500, 9000}, 0, false, 40});
    }
    add({{Type::f16, 100, 1, 16}, run, 0, true});  // a group larger than a tile, again
    for (const int64_t head_dim : {1, 7, 16, 20, 48, 112}) {
        add({{Type::f16, 2, 1, head_dim}, few, 0, false});
        add({{Type::f16, 2, 1, head_dim}, run, 0, true});
    }
}

}  // namespace qi::cuda
