// test_attention.cpp - attention over the cache against its f64 reference, and the promise that prefill, single decode,
// batched decode and any thread count are one function.
#include <doctest/doctest.h>
#include <omp.h>
#include "cases.h"
#include "forward.h"

namespace reference {
void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
}

// Sequences with random queries, keys and values, fed through kv_write, attention and kv_keep of the last layer in steps of any size.
struct Sequences {
    Config c;
    int Hq, d, layer;
    std::vector<int> lengths;
    std::vector<std::vector<float>> q, k, v, y;    // of each sequence: (length, H, d)
    KvCache cache;

    Sequences(const Config &c, const std::vector<int> &lengths, const KvOptions &o, uint64_t seed = 1) : c(c), Hq(c.n_heads), d(c.head_dim), layer(c.n_layers - 1), lengths(lengths) {
        int longest = 1;
        for (size_t s = 0; s < lengths.size(); s++) {
            const int n = lengths[s];
            longest = std::max(longest, n);
            q.push_back(random_floats((size_t)n * Hq * d, seed + 3 * s, 2.0f));
            k.push_back(random_floats((size_t)n * c.n_kv_heads * d, seed + 3 * s + 1));
            v.push_back(random_floats((size_t)n * c.n_kv_heads * d, seed + 3 * s + 2));
            y.emplace_back((size_t)n * Hq * d, NAN);
        }
        kv_cache_open(cache, cpu_ops, c, o, (int)lengths.size(), longest);
    }
    // One step: the next rows_each tokens of every sequence that has any left; results go to y, the reference's to ref.
    bool step(std::vector<int> &done, int rows_each, std::vector<std::vector<float>> *ref = nullptr) {
        Rows rows;
        std::vector<float> qs, ks, vs;
        auto append = [](std::vector<float> &to, const std::vector<float> &from, int p, int n) {
            to.insert(to.end(), from.begin() + (size_t)p * n, from.begin() + (size_t)(p + 1) * n);
        };
        for (size_t s = 0; s < lengths.size(); s++) {
            const int end = std::min(lengths[s], done[s] + rows_each);
            if (end > done[s]) kv_cache_reserve(cache, (int)s, end);
            for (int p = done[s]; p < end; p++) {
                rows.add(0, (int)s, p, false);
                append(qs, q[s], p, Hq * d), append(ks, k[s], p, c.n_kv_heads * d), append(vs, v[s], p, c.n_kv_heads * d);
            }
        }
        const Batch b = rows.batch();
        if (b.N == 0) return false;
        std::vector<f16> k16(ks.size()), v16(vs.size());
        std::vector<float> out(qs.size(), NAN), want(ref ? qs.size() : 0);
        cpu::kv_write(cache.view, layer, k16.data(), v16.data(), ks.data(), vs.data(), b);
        cpu::attention(out.data(), qs.data(), cache.view, layer, k16.data(), v16.data(), b, Hq);
        if (ref) reference::attention(want.data(), qs.data(), cache.view, layer, k16.data(), v16.data(), b, Hq);
        cpu::kv_keep(cache.view, layer, k16.data(), v16.data(), b);
        for (int n = 0; n < b.N; n++) {
            const size_t to = (size_t)b.pos[n] * Hq * d, from = (size_t)n * Hq * d;
            std::copy(&out[from], &out[from] + Hq * d, &y[b.slot[n]][to]);
            if (ref) std::copy(&want[from], &want[from] + Hq * d, &(*ref)[b.slot[n]][to]);
            done[b.slot[n]] = b.pos[n] + 1;
        }
        return true;
    }
    void run(int rows_each) {
        std::vector<int> done(lengths.size(), 0);
        while (step(done, rows_each)) {}
    }
};

TEST_CASE("attention against the f64 reference: every head shape, lengths at every edge") {
    int cases = 0;
    for (int d : CASE_HEAD_DIMS)
        for (int G : CASE_GQA) {
            const Config c = attention_config(2, G, d, 1 + G % 3);
            Sequences s(c, {1, 63, 64, 65, d > 128 ? 66 : 130}, {}, d * 100 + G);
            std::vector<std::vector<float>> ref = s.y;
            std::vector<int> done(s.lengths.size(), 0);
            while (s.step(done, 48, &ref)) {}
            for (size_t i = 0; i < s.lengths.size(); i++) {
                INFO("d ", d, " G ", G, " length ", s.lengths[i]);
                CHECK(relative_l2(s.y[i], ref[i]) < 2e-6);    // a few dozen roundings of 2^-24, softmax amplifies by |score| ~ 10
                cases++;
            }
        }
    for (int length : CASE_LENGTHS) {
        Sequences s(attention_config(1, 2, 16), {length}, {}, length);
        std::vector<std::vector<float>> ref = s.y;
        std::vector<int> done = {std::max(0, length - 70)};
        s.lengths[0] = done[0];
        s.run(512);
        s.lengths[0] = length;
        s.step(done, 512, &ref);
        for (int p = std::max(0, length - 70); p < length; p++)
            for (int i = 0; i < 32; i++) CHECK(s.y[0][p * 32 + i] == doctest::Approx(ref[0][p * 32 + i]).epsilon(1e-4));
        cases++;
    }
    MESSAGE(cases, " cases");
}

// Formats on either side, sinks and recents; every pair of formats that share no code.
static const std::vector<KvOptions> CACHES = {
    {KvFormat::f16, KvFormat::f16}, {KvFormat::f16, KvFormat::f16, 64, 0}, {KvFormat::f16, KvFormat::f16, 0, 128}, {KvFormat::nsn2, KvFormat::nsn2},
    {KvFormat::nsn1, KvFormat::nsn4b}, {KvFormat::nsn2b, KvFormat::nsn2b, 64, 64}, {KvFormat::nsn4b, KvFormat::f16}, {KvFormat::f16, KvFormat::nsn1, 128, 64},
};

// Queries and weights of the integer kernels have 16 bits: scores of |s| <= 20 are off by up to 20 2^-16 = 3e-4 in the worst
// channel and a tenth of that over 64 channels, weights by 2^-17 of the largest.
constexpr double CODES_BOUND = 5e-5;

TEST_CASE("attention over codes against rows rebuilt in f64: formats, G, lengths, unequal batches") {
    for (KvOptions o : CACHES)
        for (int G : CASE_GQA)
            for (int d : {24, 64, 80, 96, 128}) {
                if (d > 24 && G != 3 && (G != 4 || d == 80 || d == 96)) continue;    // the reference rebuilds every row for every query: it takes its time
                Sequences s(attention_config(1, G, d, 1 + G % 3), {1, 63, 64, 65, 129}, o, d + G);    // turns 0, 16, 21
                std::vector<std::vector<float>> ref = s.y;
                std::vector<int> done(s.lengths.size(), 0);
                while (s.step(done, 100, &ref)) {}
                for (size_t i = 0; i < s.lengths.size(); i++) {
                    INFO(std::string(kv_format_name(o.k_format)), "/", std::string(kv_format_name(o.v_format)), " G ", G, " d ", d, " length ", s.lengths[i]);
                    CHECK(relative_l2(s.y[i], ref[i]) < CODES_BOUND);
                }
            }
    for (KvFormat f : {KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b})
        for (int length : {127, 128, 1000, 1025, 4096}) {
            Sequences s(attention_config(1, 1, 16), {length}, {f, f}, length);
            std::vector<std::vector<float>> ref = s.y;
            std::vector<int> done = {length - 3};
            s.lengths[0] = done[0];
            s.run(512);
            s.lengths[0] = length;
            s.step(done, 512, &ref);
            const std::vector<float> got(s.y[0].end() - 3 * 16, s.y[0].end()), want(ref[0].end() - 3 * 16, ref[0].end());
            CHECK(relative_l2(got, want) < CODES_BOUND);
        }
}

TEST_CASE("attention over codes: keys and values with means, every G, the head dimensions of the integer kernels") {
    const KvFormat formats[] = {KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b};
    for (int f = 0; f < 4; f++)
        for (int d : {32, 48, 64, 80, 96, 128, 256})
            for (int G : {1, 2, 5, 8}) {
                if (d == 256 ? G != 5 : (G + f) % 2 == d / 64 % 2) continue;    // the reference takes its time
                const int length = 195;
                Sequences s(attention_config(1, G, d), {length}, {formats[f], formats[(f + G) % 4]}, d + G);
                for (int t = 0; t < length; t++)
                    for (int c = 0; c < d; c++) s.k[0][t * d + c] += 2.0f * std::sin(0.7f * c), s.v[0][t * d + c] += std::cos(0.3f * c);
                std::vector<std::vector<float>> ref = s.y;
                std::vector<int> done = {length - 4};
                s.lengths[0] = done[0];
                s.run(128);
                s.lengths[0] = length;
                s.step(done, 1, &ref);      // decode
                s.step(done, 512, &ref);    // prefill
                INFO(std::string(kv_format_name(formats[f])), "/", std::string(kv_format_name(formats[(f + G) % 4])), " G ", G, " d ", d);
                const std::vector<float> got(s.y[0].end() - 4 * G * d, s.y[0].end()), want(ref[0].end() - 4 * G * d, ref[0].end());
                CHECK(relative_l2(got, want) < CODES_BOUND);
            }
}

TEST_CASE("attention over codes: a NaN in a query stays in its row and head") {
    const int d = 64, G = 2, length = 200;
    Sequences clean(attention_config(1, G, d), {length}, {KvFormat::nsn2b, KvFormat::nsn2b}),
        s(attention_config(1, G, d), {length}, {KvFormat::nsn2b, KvFormat::nsn2b});
    s.q[0][(150 * G + 1) * d + 3] = NAN;
    for (int c = 0; c < d; c++) clean.q[0][160 * G * d + c] = s.q[0][160 * G * d + c] = 0.0f;    // and a row of zeros: the mean of what it sees
    clean.run(64), s.run(64);
    for (int n = 0; n < length; n++)
        for (int h = 0; h < G; h++) {
            const float *got = &s.y[0][(n * G + h) * d];
            if (n == 150 && h == 1) CHECK(std::isnan(got[0]));
            else CHECK(same_bits(got, &clean.y[0][(n * G + h) * d], d));
        }
    CHECK(std::isfinite(s.y[0][160 * G * d]));
}

TEST_CASE("attention: prefill of any step size, decode, batch neighbours and threads give the same bits") {
    for (int d : {24, 64, 80, 96, 128})
    for (KvOptions o : CACHES) {
        const bool integers = o.k_format != KvFormat::f16 && o.v_format != KvFormat::f16;
        if (d > 24 && (!integers || (d > 64 && o.sink == 0))) continue;    // what the integer kernels take
        const Config c = attention_config(d == 24 ? 2 : 1, 3, d, d == 64 ? 1 : 4);
        const std::vector<int> lengths = d == 24 ? std::vector<int>{1089, 5, 200, 64, 129} : std::vector<int>{200, 5};
        Sequences want(c, lengths, o);
        want.run(512);
        const int threads = omp_get_max_threads();
        for (int rows : {1, 64, 65, 2000})
            for (int t : {1, 3}) {
                if (t == 3 && rows < 65) continue;
                omp_set_num_threads(t);
                Sequences batch(c, lengths, o);
                batch.run(rows);
                INFO("rows ", rows, " sink ", o.sink, " recent ", o.recent, " threads ", t);
                for (size_t i = 0; i < lengths.size(); i++) CHECK(same_bits(batch.y[i].data(), want.y[i].data(), want.y[i].size()));
            }
        omp_set_num_threads(threads);
        for (size_t i = 0; i < lengths.size(); i++) {    // alone
            Sequences one(c, {lengths[i]}, o, 1 + 3 * i);
            one.run(100);
            CHECK(same_bits(one.y[0].data(), want.y[i].data(), want.y[i].size()));
        }
    }
}

TEST_CASE("coded_end: layers read a block as codes from the token on that follows their turn, sinks never, recents later still") {
    KvView v{};
    v.L = 4;    // turns 0, 8, 16, 24
    for (int l = 0; l < 4; l++) {
        CHECK(v.turn(l) == 8 * l);
        for (int p = 0; p < 300; p++) CHECK(v.coded_end(p, l) == (p <= 8 * l ? 0 : (p - 1 - 8 * l) / 64));
        CHECK(v.coded_end(-1, l) == 0);
        CHECK((v.coded_end(64 + 8 * l, l) == 0 && v.coded_end(65 + 8 * l, l) == 1));
    }
    v.sink = 1, v.recent = 2;
    CHECK(v.coded_end(0, 1) == 1);
    CHECK(v.coded_end(64 * 4 + 8, 1) == 1);
    CHECK(v.coded_end(64 * 4 + 9, 1) == 2);
    v.L = 32;
    CHECK((v.turn(0) == 0 && v.turn(31) == 31));
    v.L = 80;
    CHECK((v.turn(0) == 0 && v.turn(2) == 0 && v.turn(3) == 1 && v.turn(79) == 31));
    CHECK((v.layer_in_turn(128, 2) == 2 && v.layer_in_turn(128, 3) == 80 && v.layer_in_turn(129, 0) == 3 && v.layer_in_turn(160, 0) == 80));
}

TEST_CASE("sealing: every layer in its turn, before a row reads the codes and while the rows are in the ring") {
    for (int layers : {1, 3, 8, 32, 45})
        for (int sink : {0, 1})
            for (int recent : {0, 2}) {
                KvView v{};
                v.L = layers, v.B = 2, v.Hkv = 3, v.d = 8, v.sink = sink, v.recent = recent;
                std::vector<int> sealed(layers, sink);    // blocks, of a sequence that grows by a row a step
                std::vector<std::vector<int>> ring(layers, std::vector<int>(v.n_exact(), -1));
                for (int pos = 0; pos < 700; pos++) {
                    int at_once = 0;
                    for (int l = 0; l < layers; l++) {
                        auto row = [&](int t) { return (v.exact_at(l, 1, 2, t) - v.exact_at(l, 1, 2, 0)) / v.d; };
                        const int begin = v.sealed_end(pos - 1, l), end = v.sealed_end(pos, l);
                        CHECK(begin == sealed[l]);
                        const int coded = v.coded_end(pos, l), stretch = v.stretch(pos, l), before = v.stretch(std::max(0, pos - 1), l);
                        CHECK(coded == begin);    // of earlier steps
                        bool there = true, together = true;
                        for (int t = begin * 64; t < end * 64; t++) there = there && ring[l][row(t)] == t;
                        for (int t = coded * 64; t < pos; t++) there = there && ring[l][row(t)] == t;    // attention reads them
                        for (int t = 0; t < std::min(pos, sink * 64); t++) there = there && ring[l][row(t)] == t;
                        for (int t = pos / 8 * 8; t < pos; t++) together = together && row(t) == row(pos / 8 * 8) + t % 8;
                        CHECK(there);
                        CHECK(together);
                        CHECK((v.stretch_begin(stretch, l) <= pos && pos < v.stretch_begin(stretch + 1, l)));
                        CHECK((stretch == before || coded > v.coded_end(pos - 1, l) || pos <= 64 * (sink + recent) + 32));
                        CHECK((stretch > before || pos == 0 || coded == v.coded_end(pos - 1, l)));
                        ring[l][row(pos)] = pos;
                        at_once += end - begin, sealed[l] = end;
                    }
                    int in_turn = 0;    // what one launch for all layers finds (kernels/kv_seal.cu): a block of each
                    for (int i = 0; i < (layers + 31) / 32; i++) {
                        const int l = v.layer_in_turn(pos, i);
                        if (l < layers) in_turn += v.sealed_end(pos, l) > v.sealed_end(pos - 1, l);
                    }
                    CHECK(in_turn == at_once);
                    CHECK(at_once <= (layers + 31) / 32);
                    CHECK((v.most_seals(pos, pos) > 0) == (at_once > 0));
                    CHECK(v.most_seals(std::max(0, pos - 5), pos) >= v.most_seals(pos, pos));
                }
            }
}

TEST_CASE("the cache hands out blocks, takes them back, and counts its bytes") {
    const Config c = attention_config(2, 2, 64, 3);
    KvCache cache;
    kv_cache_open(cache, cpu_ops, c, {}, 2, 300);
    CHECK(cache.bytes == kv_cache_bytes(c, {}, 2, 300));
    const size_t all = cache.free_blocks.size();
    CHECK(all == 8);    // 300 tokens are 5 blocks, the last is never sealed
    kv_cache_reserve(cache, 0, 300);
    kv_cache_reserve(cache, 1, 129);
    CHECK(cache.free_blocks.size() == all - 4 - 2);
    kv_cache_clear(cache, 0);
    CHECK(cache.free_blocks.size() == all - 2);
    CHECK_THROWS_WITH_AS(kv_cache_reserve(cache, 0, 301), "KV cache: 301 tokens in slot 0, room for 300 (-c)", Error);
    CHECK_THROWS_AS(kv_cache_open(cache, cpu_ops, c, {KvFormat::f16, KvFormat::f16, 63, 0}, 1, 64), Error);
}

TEST_CASE("a repeated cache is what the same tokens leave in every slot") {
    const Model m = model_open("tests/models/books-5m.bin");
    const int slots = 3, T = 200, rows_each = 70;
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn2b, KvFormat::deco4, KvFormat::xquant}) {
        INFO(std::string(kv_format_name(f)));
        KvOptions o;
        o.k_format = o.v_format = f, o.sink = KV_BLOCK;
        std::vector<std::vector<float>> logits;
        for (bool repeat : {false, true}) {
            KvCache cache;
            kv_cache_open(cache, cpu_ops, m.config, o, slots, T + 1);
            Activations a;
            activations_open(a, cpu_ops, m.config, rows_each, slots);
            Rows rows;
            for (int s = 0; s < (repeat ? 1 : slots); s++)
                for (int p = 0; p < T;) {
                    const int end = std::min(T, p + rows_each);
                    kv_cache_reserve(cache, s, end);
                    for (; p < end; p++) rows.add((p * 37 + 5) % m.config.vocab, s, p, p == T - 1);
                    forward(m, cache.view, a, rows.batch(), cpu_ops);
                    rows.clear();
                }
            if (repeat) {
                kv_cache_reserve(cache, 2, 130);    // its blocks are taken back
                kv_cache_repeat(cache, T);
            }
            for (int s = 0; s < slots; s++) kv_cache_reserve(cache, s, T + 1), rows.add(9, s, T, true);
            forward(m, cache.view, a, rows.batch(), cpu_ops);
            logits.emplace_back(a.logits, a.logits + (size_t)slots * m.config.vocab);
        }
        CHECK(same_bits(logits[0].data(), logits[1].data(), logits[0].size()));
    }
}
