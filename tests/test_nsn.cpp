// test_nsn.cpp - the NSN formats against golden blocks of an independent program, and the proof that codes are the cache.
#include <doctest/doctest.h>
#include <cfloat>
#include "cases.h"
#include "files.h"
#include "../kernels/nsn_seal.h"

namespace reference {
void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
}
namespace cpu {
void seal_block(KvFormat format, int d, uint8_t *block, const f16 *rows, const SealPlace &place);
}

enum Kind { RANDOM, ZERO, CONSTANT, ONE_HOT, HUGE_VALUES, TINY, ONE_ZERO_TOKEN };
constexpr int POS = 192;    // where the golden blocks stand

// The inputs of tests/golden/make_nsn_golden.py: exact in fp16.
static std::vector<f16> golden_input(int d, int kind) {
    std::vector<f16> x(KV_BLOCK * d);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) {
            uint32_t u = (uint32_t)(t * d + c + 1) * 2654435761u;
            u = (u ^ u >> 15) * 2246822519u;
            u ^= u >> 13;
            const int n = (int)(u & 255) + (u >> 8 & 255) + (u >> 16 & 255) + (u >> 24) - 510 + (c * 37 % 17 - 8) * 24;
            float v = std::ldexp((float)n, t % 5 - 8);
            if (kind == ZERO || (kind == ONE_ZERO_TOKEN && t == 5)) v = 0;
            if (kind == CONSTANT && t > 0) v = to_f32(x[c]);
            if (kind == ONE_HOT) v = c == t % d ? 3.0f : 0.0f;
            if (kind == HUGE_VALUES) v = v > 0 ? 65504.0f : v < 0 ? -65504.0f : 0;
            if (kind == TINY) v = v > 0 ? 0x1p-24f : v < 0 ? -0x1p-24f : 0;
            x[t * d + c] = to_f16(v);
        }
    return x;
}

// RoPE tables for head dimension d, theta 10000.
struct Tables {
    std::vector<float> base, step;
    explicit Tables(int d) {
        auto fill = [&](std::vector<float> &t, int rows, int tokens) {
            for (int r = 0; r < rows; r++)
                for (int half = 0; half < 2; half++)
                    for (int j = 0; j < d / 2; j++) {
                        const double a = r * tokens * std::pow(10000.0, -2.0 * j / d);
                        t.push_back((float)(half ? std::sin(a) : std::cos(a)));
                    }
        };
        fill(base, 8, KV_BLOCK), fill(step, KV_BLOCK, 1);
    }
    RopeTable view() const { return {base.data(), step.data(), nullptr}; }
};

// Row t of a block as the formula of kv_block.h says, through load_code and load_plain, in f64.
static std::vector<double> decode_row(KvFormat format, const uint8_t *block, int d, bool key, int t, RopeTable rope) {
    std::vector<double> code(d), plain(d), x(d);
    with_format(format, d, [&](auto f) {
        using Format = decltype(f);
        const auto &b = *(const typename Format::Block *)block;
        for (int c = 0; c < d; c++) {
            float a[1];
            Format::load_code(a, b, kv_codebook(format), t, c), code[c] = a[0];
            Format::load_plain(a, b, t, c), plain[c] = a[0];
        }
    });
    const int p = d & -d;
    for (int r = 0; r < d; r++)
        for (int c = r / p * p; c < r / p * p + p; c++) x[r] += (__builtin_popcount(r & c & (p - 1)) % 2 ? -code[c] : code[c]) / std::sqrt(p);
    for (int j = 0; j < d / 2; j++) {
        float c = 1, s = 0;
        if (key) rope_angle(c, s, rope, POS + t, j, d);
        x[j] += plain[j] * c - plain[j + d / 2] * s;
        x[j + d / 2] += plain[j] * s + plain[j + d / 2] * c;
    }
    return x;
}

TEST_CASE("golden blocks: our decoder reads them as the independent one does, our encoder writes them") {
    const std::string file = read_file("tests/golden/nsn.bin");
    const KvFormat formats[] = {KvFormat::f16, KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b};
    size_t at = 0;
    int cases = 0, bytes = 0, different = 0;
    while (at < file.size()) {
        uint32_t head[5];
        memcpy(head, &file[at], sizeof head);
        const KvFormat format = formats[head[0]];
        const int d = head[1], key = head[2], kind = head[3];
        INFO(std::string(kv_format_name(format)), " d ", d, " key ", key, " kind ", kind);
        REQUIRE((int64_t)head[4] == kv_block_bytes(format, d));
        std::vector<uint8_t> golden(head[4]), ours(head[4], 0xAA);
        memcpy(golden.data(), &file[at + sizeof head], golden.size());
        std::vector<double> rows(4 * d);
        memcpy(rows.data(), &file[at + sizeof head + golden.size()], rows.size() * 8);
        at += sizeof head + golden.size() + rows.size() * 8;

        const Tables tables(d);
        const int picked[] = {0, 1, 31, 63};
        double worst = 0, size = 1e-30;
        for (int i = 0; i < 4; i++) {
            const std::vector<double> row = decode_row(format, golden.data(), d, key, picked[i], tables.view());
            for (int c = 0; c < d; c++) worst = std::max(worst, std::fabs(row[c] - rows[i * d + c])), size = std::max(size, std::fabs(rows[i * d + c]));
        }
        CHECK(worst <= 2e-6 * size);    // f32 products of three stored factors

        const std::vector<f16> x = golden_input(d, kind);
        cpu::seal_block(format, d, ours.data(), x.data(), {(bool)key, POS, tables.view(), 0, 1.0f});
        // f32 against f64 may fall on the other side of a tie between codewords or roundings: counted below, and never worse.
        double ours_error = 0, golden_error = 0;
        for (int t = 0; t < KV_BLOCK; t++) {
            const std::vector<double> a = decode_row(format, ours.data(), d, key, t, tables.view()),
                                      b = decode_row(format, golden.data(), d, key, t, tables.view());
            for (int c = 0; c < d; c++) {
                double want = to_f32(x[t * d + c]);
                if (key) {
                    float co, si;
                    const int j = c % (d / 2);
                    rope_angle(co, si, tables.view(), POS + t, j, d);
                    const double lo = to_f32(x[t * d + j]), hi = to_f32(x[t * d + j + d / 2]);
                    want = c < d / 2 ? lo * co - hi * si : lo * si + hi * co;
                }
                ours_error += (a[c] - want) * (a[c] - want), golden_error += (b[c] - want) * (b[c] - want);
            }
        }
        CHECK(ours_error <= golden_error * 1.002 + 1e-9);
        if (kind == RANDOM)
            for (size_t i = 0; i < golden.size(); i++) bytes++, different += golden[i] != ours[i];
        if (kind == ZERO) CHECK(ours == golden);
        cases++;
    }
    MESSAGE(cases, " blocks; of ", bytes, " bytes of random ones ", different, " differ");
    CHECK(cases == 96);
    CHECK(different * 1000 < bytes);
}

TEST_CASE("a block with NaN or infinity reads as NaN everywhere: the logits will tell") {
    for (KvFormat format : {KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b})
        for (float bad : {NAN, INFINITY, -INFINITY}) {
            std::vector<f16> x = golden_input(64, RANDOM);
            x[70] = to_f16(bad);
            std::vector<uint8_t> block(kv_block_bytes(format, 64));
            const Tables tables(64);
            cpu::seal_block(format, 64, block.data(), x.data(), {true, POS, tables.view(), 0, 1.0f});
            for (int t : {0, 1, 63}) CHECK(std::isnan(decode_row(format, block.data(), 64, true, t, tables.view())[5]));
        }
}

TEST_CASE("a block made of codewords comes back with its codes") {
    for (KvFormat format : {KvFormat::nsn1, KvFormat::nsn2b, KvFormat::nsn4b}) {
        const int d = 64, C = format == KvFormat::nsn1 ? 8 : format == KvFormat::nsn2b ? 4 : 2;
        const SearchBook &book = search_book(C, false);
        for (int k0 = 0; k0 < 256; k0 += KV_BLOCK) {
            std::vector<float> w;
            for (int c = 0; c < C; c++) w.insert(w.end(), book.w[c] + k0, book.w[c] + k0 + KV_BLOCK);
            uint8_t code[KV_BLOCK];
            nearest(code, book, w.data());
            for (int i = 0; i < KV_BLOCK; i++) CHECK(code[i] == k0 + i);
        }
        CHECK(d % C == 0);
    }
    // nearest() against the plain loop over f64 distances
    for (int C : {8, 4, 2})
        for (int i = 0; i < 32; i++) {
            const std::vector<float> x = random_floats((size_t)C * KV_BLOCK, i * 10 + C);
            const SearchBook &book = search_book(C, false);
            uint8_t code[KV_BLOCK];
            nearest(code, book, x.data());
            for (int t = 0; t < KV_BLOCK; t++) {
                auto distance = [&](int k) {
                    double sum = 0;
                    for (int c = 0; c < C; c++) sum += ((double)x[c * KV_BLOCK + t] - book.w[c][k]) * ((double)x[c * KV_BLOCK + t] - book.w[c][k]);
                    return sum;
                };
                double least = INFINITY;
                for (int k = 0; k < 256; k++) least = std::min(least, distance(k));
                CHECK(distance(code[t]) - least < 1e-5);
            }
        }
}

TEST_CASE("of codewords that are equally near the first is taken, by every lane") {
    int8_t index[256][4] = {};
    for (int k = 0; k < 256; k++) index[k][0] = (int8_t)(k % 100);    // k, k + 100 and k + 200 are the same
    const SearchBook book(index, 1.0f);
    std::vector<float> x(4 * KV_BLOCK, 0.5f);
    for (int t = 0; t < KV_BLOCK; t++) x[t] = t + 0.5f;
    uint8_t code[KV_BLOCK];
    nearest(code, book, x.data());
    for (int t = 0; t < KV_BLOCK; t++) CHECK(code[t] == t);
}

TEST_CASE("bits a value, everything counted") {
    CHECK(kv_bits(KvFormat::nsn2, 128) == doctest::Approx(35.8125 * 8 / 128));
    CHECK(kv_bits(KvFormat::nsn1, 128) == doctest::Approx(19.8125 * 8 / 128));
    CHECK(kv_bits(KvFormat::nsn2, 64) == doctest::Approx(2.398).epsilon(1e-3));
    CHECK(kv_bits(KvFormat::nsn1, 64) == doctest::Approx(1.398).epsilon(1e-3));
    CHECK(kv_bits(KvFormat::nsn2b, 128) == doctest::Approx(2.1797).epsilon(1e-4));
    CHECK(kv_bits(KvFormat::nsn4b, 128) == doctest::Approx(4.1797).epsilon(1e-4));
    CHECK(kv_bits(KvFormat::f16, 64) == 16.0);
}

// The proof: after a text the model's next logits depend on codes, on the exact rows, on the weights, and on nothing else.
TEST_CASE("codes are the cache: everything else poisoned, one bit flipped, bytes counted") {
    const Model m = model_open("tests/models/books-5m.bin");
    const Config &c = m.config;
    const std::vector<int> ids = tokenizer_encode(m.tokenizer, read_file("README.md").substr(0, 2500), false);
    const int T = 300, V = c.vocab, d = c.head_dim, heads = c.n_layers * c.n_kv_heads;    // four sealed blocks and 44 exact tokens
    REQUIRE((int)ids.size() > T);
    for (KvFormat format : {KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b}) {
        INFO(std::string(kv_format_name(format)));
        const KvOptions o = {format, format};
        KvCache cache;
        kv_cache_open(cache, cpu_ops, c, o, 1, T + 1);
        const KvView &v = cache.view;
        const int64_t blocks = 5 - 1, block = kv_block_stride(format, c.head_dim);    // 301 tokens touch five blocks, one stays open
        CHECK(cache.bytes == 2 * heads * (blocks * block + (KV_BLOCK + 32) * d * 2)    // codes; fp16: one open block, and until all layers have sealed it
                                 + 5 * 4 + 5 * c.head_dim * 4 + 2 * KV_BLOCK * c.head_dim * 4 + 2 * KV_CODEBOOK_BYTES);    // block table, RoPE, codebooks
        Activations a;
        activations_open(a, cpu_ops, c, T, 1);
        Rows rows;
        for (int p = 0; p < T; p++) rows.add(ids[p], 0, p, p == T - 1);
        kv_cache_reserve(cache, 0, T + 1);
        forward(m, v, a, rows.batch(), cpu_ops);

        rows.clear();
        rows.add(ids[T], 0, T, true);
        const std::vector<uint8_t> k_codes(v.k_sealed, v.k_sealed + c.n_layers * blocks * c.n_kv_heads * block);
        const std::vector<f16> k_exact(v.k_exact, v.k_exact + (size_t)heads * v.n_exact() * d), v_exact(v.v_exact, v.v_exact + k_exact.size());
        auto next = [&](const Ops &ops, bool poison) {
            std::copy(k_exact.begin(), k_exact.end(), v.k_exact), std::copy(v_exact.begin(), v_exact.end(), v.v_exact);
            if (poison) {
                for (const auto &x : {std::make_pair(a.x, c.dim),
                                      {a.xn, c.dim},
                                      {a.q, c.n_heads * c.head_dim},
                                      {a.k, c.n_kv_heads * c.head_dim},
                                      {a.v, c.n_kv_heads * c.head_dim},
                                      {a.att, c.n_heads * c.head_dim},
                                      {a.gate, c.ffn_dim},
                                      {a.up, c.ffn_dim}})
                    std::fill(x.first, x.first + (size_t)T * x.second, NAN);
                for (f16 *x : {a.k16, a.v16}) std::fill(x, x + (size_t)T * c.n_kv_heads * c.head_dim, to_f16(NAN));
                for (int64_t l = 0; l < c.n_layers; l++)    // rows of the ring that are sealed
                    for (int h = 0; h < c.n_kv_heads; h++)
                        for (int t = 4 * KV_BLOCK - (v.n_exact() - 44); t < 4 * KV_BLOCK; t++)
                            for (f16 *x : {v.k_exact, v.v_exact}) std::fill_n(x + v.exact_at(l, 0, h, t), d, to_f16(NAN));
            }
            forward(m, v, a, rows.batch(), ops);
            return std::vector<float>(a.logits, a.logits + V);
        };
        Ops f64 = cpu_ops;    // rebuilds every row from the same bytes in f64
        f64.attention = reference::attention;
        const std::vector<float> before = next(cpu_ops, false), poisoned = next(cpu_ops, true), before_f64 = next(f64, true);
        CHECK(before == poisoned);
        CHECK(relative_l2(before, before_f64) < 1e-5);

        // One bit of one code, K then V: in the last layer, so that no fp16 row between it and the logits rounds the change
        // away, and of a recent token.
        const int64_t token_bytes = c.head_dim / (format == KvFormat::nsn4b ? 2 : format == KvFormat::nsn2b ? 4 : 8);
        for (bool key : {true, false}) {
            uint8_t *code = (key ? v.k_block(c.n_layers - 1, 0, 0, 3) : v.v_block(c.n_layers - 1, 0, 0, 3)) + 60 * token_bytes + 1;
            *code ^= 0x80;
            const std::vector<float> after = next(cpu_ops, true), after_f64 = next(f64, true);
            *code ^= 0x80;
            std::vector<float> change(V), change_f64(V);
            for (int i = 0; i < V; i++) change[i] = after[i] - before[i], change_f64[i] = after_f64[i] - before_f64[i];
            INFO("key ", key, ": the change is ", relative_l2(after, before), " of the logits");
            CHECK(after != before);
            CHECK(relative_l2(change, change_f64) * relative_l2(after, before) < 1e-6);    // exact to the rounding of f32 logits
            CHECK(relative_l2(change, change_f64) < 0.1);
        }
        std::copy(k_codes.begin(), k_codes.end(), v.k_sealed);
        CHECK(next(cpu_ops, true) == before);
    }
}
