// test_baselines.cpp - the scalar formats: golden blocks of an independent program, read back by a second reader that
// knows byte offsets only, and attention over them.
#include <doctest/doctest.h>
#include "cases.h"
#include "files.h"
#include "../kernels/scalar_seal.h"

namespace reference {
void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
}
namespace cpu {
void seal_block(KvFormat format, int d, uint8_t *block, const f16 *rows, const SealPlace &place);
}

namespace {
enum Kind { RANDOM, ZERO, CONSTANT, ONE_HOT, HUGE_VALUES, TINY, NOT_A_NUMBER };
constexpr int POS = 192;    // where the golden blocks stand
const KvFormat SCALARS[] = {KvFormat::kivi2, KvFormat::q8, KvFormat::q4, KvFormat::tq2};

// The inputs of tests/golden/make_baseline_golden.py: exact in fp16.
std::vector<f16> golden_input(int d, int kind) {
    std::vector<f16> x(KV_BLOCK * d);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) {
            uint32_t u = (uint32_t)(t * d + c + 1) * 2654435761u;
            u = (u ^ u >> 15) * 2246822519u;
            u ^= u >> 13;
            const int n = (int)(u & 255) + (u >> 8 & 255) + (u >> 16 & 255) + (u >> 24) - 510 + (c * 37 % 17 - 8) * 24;
            float v = std::ldexp((float)n, t % 5 - 8);
            if (kind == ZERO) v = 0;
            if (kind == CONSTANT && t > 0) v = to_f32(x[c]);
            if (kind == ONE_HOT) v = c == t % d ? 3.0f : 0.0f;
            if (kind == HUGE_VALUES) v = v > 0 ? 65504.0f : v < 0 ? -65504.0f : 0;
            if (kind == TINY) v = v > 0 ? 0x1p-24f : v < 0 ? -0x1p-24f : 0;
            if (kind == NOT_A_NUMBER && t == 17 && c == d - 1) v = NAN;
            x[t * d + c] = to_f16(v);
        }
    return x;
}

// RoPE tables for head dimension d, theta 10000, 512 positions.
struct Angles {
    std::vector<float> base, step;
    explicit Angles(int d) {
        auto fill = [&](std::vector<float> &to, int rows, int tokens) {
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < d; i++) {    // cosines, then sines
                    const double a = r * tokens * std::pow(10000.0, -2.0 * (i % (d / 2)) / d);
                    to.push_back((float)(i < d / 2 ? std::cos(a) : std::sin(a)));
                }
        };
        fill(base, 8, KV_BLOCK), fill(step, KV_BLOCK, 1);
    }
};

// ---- a second reader: byte offsets, nothing of kv_baselines.h ---------------------------------------------
double read_f16(const uint8_t *p) {
    const int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double x = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -x : x;
}
double read_value(const uint8_t *b, KvFormat format, int d, bool key, int t, int c) {
    const int row = 64 * d, short_rows = (d + 31) / 32;    // values of a block; groups of 32 channels in a row
    const int two_bits = b[(t * d + c) / 4] >> (c % 4 * 2) & 3;
    switch (format) {
    case KvFormat::kivi2: {
        const int groups = key ? 2 * d : 64 * short_rows, g = key ? t / 32 * d + c : t * short_rows + c / 32;
        return read_f16(b + row / 4 + 2 * groups + 2 * g) + two_bits * read_f16(b + row / 4 + 2 * g);
    }
    case KvFormat::q8: return (b[t * d + c] - 128) * read_f16(b + row + 2 * (t * short_rows + c / 32));
    case KvFormat::q4: return ((b[(t * d + c) / 2] >> (c % 2 * 4) & 15) - 8) * read_f16(b + row / 2 + 2 * (t * short_rows + c / 32));
    case KvFormat::tq2: return (two_bits < 2 ? -1 : 1) * (two_bits == 0 || two_bits == 3 ? 1.5104 : 0.4528) * read_f16(b + row / 4 + 2 * t);
    default: return NAN;
    }
}

// One sequence through cpu::kv_write, attention and kv_keep in steps of `rows`; the results, and the f64 reference's.
struct Walk { std::vector<float> y, want; int64_t bytes; std::vector<uint8_t> sealed; };
Walk walk(const Config &c, const KvOptions &o, int length, int rows, bool reference) {
    const int d = c.head_dim, Hq = c.n_heads, Hkv = c.n_kv_heads;
    const std::vector<float> q = random_floats((size_t)length * Hq * d, 1, 2.0f), k = random_floats((size_t)length * Hkv * d, 2), v = random_floats((size_t)length * Hkv * d, 3);
    KvCache cache;
    kv_cache_open(cache, cpu_ops, c, o, 1, length);
    Walk w = {std::vector<float>(q.size(), NAN), std::vector<float>(q.size(), NAN), cache.bytes, {}};
    for (int p = 0; p < length; p += rows) {
        const int n = std::min(rows, length - p);
        kv_cache_reserve(cache, 0, p + n);
        Rows step;
        for (int i = 0; i < n; i++) step.add(0, 0, p + i, false);
        const Batch b = step.batch();
        std::vector<f16> k16((size_t)n * Hkv * d), v16(k16.size());
        cpu::kv_write(cache.view, 0, k16.data(), v16.data(), &k[(size_t)p * Hkv * d], &v[(size_t)p * Hkv * d], b);
        cpu::attention(&w.y[(size_t)p * Hq * d], &q[(size_t)p * Hq * d], cache.view, 0, k16.data(), v16.data(), b, Hq);
        if (reference) reference::attention(&w.want[(size_t)p * Hq * d], &q[(size_t)p * Hq * d], cache.view, 0, k16.data(), v16.data(), b, Hq);
        cpu::kv_keep(cache.view, 0, k16.data(), v16.data(), b);
    }
    const KvView &view = cache.view;
    w.sealed.assign(view.k_sealed, view.k_sealed + view.n_blocks * Hkv * view.k_block_bytes);
    w.sealed.insert(w.sealed.end(), view.v_sealed, view.v_sealed + view.n_blocks * Hkv * view.v_block_bytes);
    return w;
}
}    // namespace

TEST_CASE("baselines: golden blocks, byte for byte, and a second reader agrees with load_code") {
    int cases = 0;
    for (KvFormat name : SCALARS) {
        const std::string file = read_file(std::string("tests/golden/baselines/") + kv_format_name(name) + ".bin");
        for (size_t at = 0; at < file.size(); cases++) {
            uint32_t head[4];
            memcpy(head, &file[at], sizeof head);
            const int d = head[0], key = head[1], kind = head[2];
            const KvFormat format = kv_side_format(name, key);
            INFO(std::string(kv_format_name(name)), " d ", d, " key ", key, " kind ", kind);
            REQUIRE(kv_block_bytes(format, d) == (int64_t)head[3]);
            const std::vector<uint8_t> golden(&file[at + sizeof head], &file[at + sizeof head] + head[3]);
            at += sizeof head + head[3];

            std::vector<uint8_t> ours(golden.size(), 0xAA);
            const Angles angles(d);
            cpu::seal_block(format, d, ours.data(), golden_input(d, kind).data(), {(bool)key, POS, {angles.base.data(), angles.step.data(), nullptr}, 0, 1.0f});
            CHECK(ours == golden);

            int wrong = 0;
            with_format(format, d, [&](auto f) {
                using Format = decltype(f);
                for (int t = 0; t < KV_BLOCK; t++)
                    for (int c = 0; c < d; c++) {
                        float x[1];
                        Format::load_code(x, *(const typename Format::Block *)golden.data(), nullptr, t, c);
                        const double y = read_value(golden.data(), name, d, key, t, c);
                        wrong += kind == NOT_A_NUMBER ? !std::isnan(x[0]) || !std::isnan(y) : !(std::fabs(x[0] - y) <= 1e-6 * std::fabs(y) + 1e-6 * (kind == HUGE_VALUES ? 65504 : 16));
                    }
            });
            CHECK(wrong == 0);
        }
    }
    CHECK(cases == 4 * 20);
}

TEST_CASE("baselines: bits a value at d = 128, everything counted") {
    auto bits = [](KvFormat f, bool key) { return kv_bits(kv_side_format(f, key), 128); };
    for (bool key : {true, false}) {
        CHECK(bits(KvFormat::kivi2, key) == 3.0);
        CHECK(bits(KvFormat::q8, key) == 8.5);
        CHECK(bits(KvFormat::q4, key) == 4.5);
        CHECK(bits(KvFormat::tq2, key) == 2.125);
    }
    CHECK(kv_bits(KvFormat::kivi2, 8) == 2 + 8 * 2 * 4 * 8.0 / 512);          // K: 2 groups a channel
    CHECK(kv_bits(KvFormat::kivi2_values, 8) == 2 + 64 * 4 * 8.0 / 512);      // V: one a token
}

TEST_CASE("baselines: attention against rows rebuilt in f64, K and V apart, any head dimension") {
    const KvOptions pairs[] = {{KvFormat::kivi2, KvFormat::kivi2}, {KvFormat::q8, KvFormat::q4}, {KvFormat::q4, KvFormat::tq2}, {KvFormat::tq2, KvFormat::q8},
                               {KvFormat::kivi2, KvFormat::f16, 64, 64}, {KvFormat::f16, KvFormat::kivi2}, {KvFormat::nsn2, KvFormat::kivi2}, {KvFormat::kivi2, KvFormat::nsn1}};
    for (const KvOptions &o : pairs)
        for (int d : {8, 24, 48, 64, 128}) {
            const Walk w = walk(attention_config(2, 2, d), o, 200, 48, true);
            INFO(std::string(kv_format_name(o.k_format)), "/", std::string(kv_format_name(o.v_format)), " d ", d);
            CHECK(relative_l2(w.y, w.want) < 5e-6);
        }
}

TEST_CASE("baselines: prefill and decode give the same blocks and the same bits") {
    for (KvFormat f : SCALARS) {
        const Config c = attention_config(2, 3, 24);
        const Walk want = walk(c, {f, f}, 300, 300, false);
        CHECK(want.bytes == kv_cache_bytes(c, {f, f}, 1, 300));
        for (int rows : {1, 7, 64, 65}) {
            const Walk w = walk(c, {f, f}, 300, rows, false);
            INFO(std::string(kv_format_name(f)), " rows ", rows);
            CHECK(w.sealed == want.sealed);
            CHECK(same_bits(w.y.data(), want.y.data(), want.y.size()));
        }
    }
}
