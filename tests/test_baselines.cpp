// test_baselines.cpp - the scalar formats: golden blocks of an independent program, read back by a second reader that
// knows byte offsets only, and attention over them.
#include <doctest/doctest.h>
#include "cases.h"
#include "files.h"
#include "../kernels/attention_tile.h"
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
const KvFormat SCALARS[] = {KvFormat::kivi2, KvFormat::q8, KvFormat::q4, KvFormat::tq2, KvFormat::nqkv, KvFormat::deco4, KvFormat::xquant};

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
                for (int half = 0; half < 2; half++)
                    for (int j = 0; j < d / 2; j++) {
                        const double a = r * tokens * std::pow(10000.0, -2.0 * j / d);
                        to.push_back((float)(half ? std::sin(a) : std::cos(a)));
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
double read_value(const uint8_t *b, const uint8_t *beside, KvFormat format, int d, bool key, int t, int c) {
    const int row = 64 * d, short_rows = (d + 31) / 32;    // values of a block; groups of 32 channels in a row
    auto two_bits = [&] { return b[(t * d + c) / 4] >> (c % 4 * 2) & 3; };    // not every block holds codes
    switch (format) {
    case KvFormat::kivi2: {
        const int groups = key ? 2 * d : 64 * short_rows, g = key ? t / 32 * d + c : t * short_rows + c / 32;
        return read_f16(b + row / 4 + 2 * groups + 2 * g) + two_bits() * read_f16(b + row / 4 + 2 * g);
    }
    case KvFormat::q8: return (b[t * d + c] - 128) * read_f16(b + row + 2 * (t * short_rows + c / 32));
    case KvFormat::q4: return ((b[(t * d + c) / 2] >> (c % 2 * 4) & 15) - 8) * read_f16(b + row / 2 + 2 * (t * short_rows + c / 32));
    case KvFormat::tq2: return (two_bits() < 2 ? -1 : 1) * (two_bits() == 0 || two_bits() == 3 ? 1.5104 : 0.4528) * read_f16(b + row / 4 + 2 * t);
    case KvFormat::nqkv: {
        static const double nf4[] = {-1,        -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
                                     0.0795803, 0.1609302,  0.2461123,  0.3379152,  0.4407098,  0.5626170,  0.7229568,  1};
        const int tokens = d > 128 ? 1 : d > 64 ? 2 : d > 32 ? 4 : d > 16 ? 8 : d > 8 ? 16 : 32;
        return nf4[b[(t * d + c) / 2] >> (c % 2 * 4) & 15] * read_f16(b + row / 2 + 2 * (t / tokens));
    }
    case KvFormat::deco4: {
        const int w = d % 16 ? 8 : 16;
        double sum = 0;
        for (int i = 0; i < w; i++) {
            const int u = c / w * w + i;
            sum += ((b[(t * d + u) / 2] >> (u % 2 * 4) & 15) - 8) * read_f16(beside + 2 * (i * w + c % w));
        }
        return sum * read_f16(b + row / 2 + 2 * t);
    }
    case KvFormat::xquant: {
        const int across = (d + 127) / 128, groups = key ? d : 64 * across, g = key ? c : t * across + c / 128, at = t * d + c;
        return read_f16(b + 2 * groups + 2 * g) + (key ? beside[at / 4] >> (at % 4 * 2) & 3 : beside[at / 8] >> at % 8 & 1) * read_f16(b + 2 * g);
    }
    default: return NAN;
    }
}

// One sequence through cpu::kv_write, attention and kv_keep in steps of `rows`; the results, and the f64 reference's.
struct Walk { std::vector<float> y, want; int64_t bytes; std::vector<uint8_t> sealed; };
Walk walk(const Config &c, const KvOptions &o, int length, int rows, bool reference) {
    const int d = c.head_dim, Hq = c.n_heads, Hkv = c.n_kv_heads;
    const std::vector<float> q = random_floats((size_t)length * Hq * d, 1, 2.0f), k = random_floats((size_t)length * Hkv * d, 2),
                             v = random_floats((size_t)length * Hkv * d, 3);
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
    for (bool key : {true, false}) {
        const uint8_t *blocks = key ? view.k_sealed : view.v_sealed, *beside = key ? view.k_beside : view.v_beside;
        const int64_t n = view.n_blocks * Hkv * (key ? view.k_block_bytes : view.v_block_bytes), record = key ? view.k_beside_bytes : view.v_beside_bytes;
        w.sealed.insert(w.sealed.end(), blocks, blocks + n);
        if (beside)
            w.sealed.insert(w.sealed.end(), beside, beside + record * ((key ? view.k_format : view.v_format) == KvFormat::deco4 ? 1 : view.n_blocks * Hkv));
    }
    return w;
}
}    // namespace

TEST_CASE("baselines: golden blocks, byte for byte, and a second reader agrees with load_code and with a tile") {
    int cases = 0;
    for (KvFormat name : SCALARS) {
        const std::string file = read_file(std::string("tests/golden/baselines/") + kv_format_name(name) + ".bin");
        for (size_t at = 0; at < file.size(); cases++) {
            uint32_t head[5];
            memcpy(head, &file[at], sizeof head);
            const int d = head[0], key = head[1], kind = head[2];
            const KvFormat format = kv_side_format(name, key);
            INFO(std::string(kv_format_name(name)), " d ", d, " key ", key, " kind ", kind);
            REQUIRE(kv_block_bytes(format, d) == (int64_t)head[3]);
            REQUIRE(kv_beside_bytes(format, d) == (int64_t)head[4]);
            const uint8_t *from = (const uint8_t *)&file[at + sizeof head];
            const std::vector<uint8_t> golden(from, from + head[3]), golden_beside(from + head[3], from + head[3] + head[4]);
            at += sizeof head + head[3] + head[4];

            std::vector<uint8_t> ours(golden.size(), 0xAA), beside(golden_beside.size(), 0xAA);
            const Angles angles(d);
            const std::vector<f16> x = golden_input(d, kind);
            const SealPlace place = {(bool)key, POS, {angles.base.data(), angles.step.data(), nullptr}, 0, 1.0f, (int8_t *)beside.data()};
            if (name == KvFormat::deco4) learn_basis((f16 *)beside.data(), x.data(), 1, d, place);
            cpu::seal_block(format, d, ours.data(), x.data(), place);
            CHECK(ours == golden);
            CHECK(beside == golden_beside);

            cpu::Tile tile;    // a block widened at once
            const int stride = d + 3;
            tile.code.resize(KV_BLOCK * stride);
            cpu::load_sealed(tile, format, golden.data(), (const int8_t *)golden_beside.data(), 0, d, stride);
            int wrong = 0, tile_wrong = 0;
            with_format(format, d, [&](auto f) {
                using Format = decltype(f);
                for (int t = 0; t < KV_BLOCK; t++)
                    for (int c = 0; c < d; c++) {
                        float x[1];
                        Format::load_code(x, *(const typename Format::Block *)golden.data(), (const int8_t *)golden_beside.data(), t, c);
                        const double y = read_value(golden.data(), golden_beside.data(), name, d, key, t, c);
                        auto is_y = [&](float x) {
                            if (kind == NOT_A_NUMBER) return std::isnan(x) && std::isnan(y);
                            return std::fabs(x - y) <= 1e-6 * std::fabs(y) + 1e-6 * (kind == HUGE_VALUES ? 65504 : 16);
                        };
                        wrong += !is_y(x[0]), tile_wrong += !is_y(tile.code[t * stride + c]);
                    }
            });
            CHECK(wrong == 0);
            CHECK(tile_wrong == 0);
        }
    }
    CHECK(cases == 7 * 20 - 4);
}

TEST_CASE("baselines: bits a value at d = 128, everything counted") {
    auto bits = [](KvFormat f, bool key) { return kv_bits(kv_side_format(f, key), 128); };
    for (bool key : {true, false}) {
        CHECK(bits(KvFormat::kivi2, key) == 3.0);
        CHECK(bits(KvFormat::q8, key) == 8.5);
        CHECK(bits(KvFormat::q4, key) == 4.5);
        CHECK(bits(KvFormat::tq2, key) == 2.125);
        CHECK(bits(KvFormat::nqkv, key) == 4.0625);
        CHECK(bits(KvFormat::deco4, key) == 4.125);
    }
    Config c = attention_config(2, 2, 128);
    auto both = [&](KvFormat f, int layers) {
        c.n_layers = layers;
        return 8 * kv_bytes_per_token(c, {f, f}) / (2.0 * c.n_layers * c.n_kv_heads * c.head_dim);
    };
    CHECK(both(KvFormat::deco4, 3) == 4.125);
    CHECK(both(KvFormat::xquant, 8) == (2 + 0.5 + 0.75 + 0.25) / 2);      // values: layers 0..4 and 6 keep codes
    CHECK(both(KvFormat::xquant, 32) == 1.75);
    CHECK(both(KvFormat::xquant, 1) == (2.5 + 1.25) / 2);
    CHECK(kv_bits(KvFormat::kivi2, 8) == 2 + 8 * 2 * 4 * 8.0 / 512);          // K: 2 groups a channel
    CHECK(kv_bits(KvFormat::kivi2_values, 8) == 2 + 64 * 4 * 8.0 / 512);      // V: one a token
}

TEST_CASE("baselines: attention against rows rebuilt in f64, K and V apart, any head dimension") {
    const KvOptions pairs[] = {{KvFormat::kivi2, KvFormat::kivi2},
                               {KvFormat::q8, KvFormat::q4},
                               {KvFormat::q4, KvFormat::tq2},
                               {KvFormat::tq2, KvFormat::q8},
                               {KvFormat::kivi2, KvFormat::f16, 64, 64},
                               {KvFormat::f16, KvFormat::kivi2},
                               {KvFormat::nsn2, KvFormat::kivi2},
                               {KvFormat::kivi2, KvFormat::nsn1},
                               {KvFormat::nqkv, KvFormat::deco4},
                               {KvFormat::deco4, KvFormat::xquant},
                               {KvFormat::xquant, KvFormat::nqkv},
                               {KvFormat::xquant, KvFormat::xquant, 64, 64}};
    for (const KvOptions &o : pairs)
        for (int d : {8, 24, 48, 64, 128}) {
            const Walk w = walk(attention_config(2, 2, d), o, 200, 48, true);
            INFO(std::string(kv_format_name(o.k_format)), "/", std::string(kv_format_name(o.v_format)), " d ", d);
            const bool integers = o.k_format == KvFormat::nsn2 || o.v_format == KvFormat::nsn1;    // CODES_BOUND of test_attention.cpp
            CHECK(relative_l2(w.y, w.want) < (integers ? 5e-5 : 5e-6));
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

TEST_CASE("xquant: odd layers from the middle on read the codes of the layer below, with their own zero and scale") {
    CHECK(kv_share(KvFormat::xquant_values, 8) == 4);
    CHECK(kv_share(KvFormat::xquant, 8) == 8);
    CHECK(code_layers(4, 8) == 6);
    KvCache cache;
    const Config c = attention_config(1, 1, 16, 8);
    kv_cache_open(cache, cpu_ops, c, {KvFormat::f16, KvFormat::xquant}, 1, 128);
    const KvView &v = cache.view;
    CHECK(cache.bytes == kv_cache_bytes(c, {KvFormat::f16, KvFormat::xquant}, 1, 128));
    kv_cache_reserve(cache, 0, 128);
    for (int layer = 0; layer < 8; layer++) {
        const bool shares = layer == 5 || layer == 7;
        INFO("layer ", layer);
        CHECK((layer > 0 && v.beside(false, layer, 0, 0, 0) == v.beside(false, layer - 1, 0, 0, 0)) == shares);
    }
    const int T = KV_BLOCK + SEAL_STEPS;    // all layers have sealed the block
    auto rows = [&](int layer, const std::vector<float> &x) {
        std::vector<f16> k16(T * 16), v16(T * 16);
        Rows step;
        for (int i = 0; i < T; i++) step.add(0, 0, i, false);
        cpu::kv_write(v, layer, k16.data(), v16.data(), x.data(), x.data(), step.batch());
    };
    std::vector<float> a = random_floats(T * 16, 1), b(a.size());
    for (size_t i = 0; i < a.size(); i++) b[i] = 3 * a[i] + 1;    // the codes of a fit b, with b's own zero and scale
    rows(4, a), rows(5, b);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int ch = 0; ch < 16; ch++) {
            float x[1], y[1];
            XquantValues<16>::load_code(x, *(const XquantValues<16>::Block *)v.v_block(4, 0, 0, 0), v.beside(false, 4, 0, 0, 0), t, ch);
            XquantValues<16>::load_code(y, *(const XquantValues<16>::Block *)v.v_block(5, 0, 0, 0), v.beside(false, 5, 0, 0, 0), t, ch);
            CHECK(y[0] == doctest::Approx(3 * x[0] + 1).epsilon(0.01));
        }
}

TEST_CASE("deco4: rows of unlike directions come back but for 4 bits a value in every direction") {
    const int d = 64;
    const std::vector<float> mix = random_floats(16 * 16, 5);
    std::vector<float> x = random_floats(KV_BLOCK * d, 6);
    for (int r = 0; r < KV_BLOCK * d; r += 16) {    // 16 channels of sixteen directions, the last a fifteenth of the first
        float y[16] = {};
        for (int i = 0; i < 16; i++)
            for (int c = 0; c < 16; c++) y[c] += x[r + i] * mix[i * 16 + c] / (1 + i);
        std::copy(y, y + 16, &x[r]);
    }
    std::vector<f16> rows(x.size());
    for (size_t i = 0; i < x.size(); i++) rows[i] = to_f16(x[i]);
    f16 basis[256];
    Deco4<d>::Block block;
    const SealPlace place = {false, 0, {}, 0, 1.0f, (int8_t *)basis};
    learn_basis(basis, rows.data(), 1, d, place);
    cpu::seal_block(KvFormat::deco4, d, (uint8_t *)&block, rows.data(), place);
    std::vector<float> back(x.size());
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) {
            float y[1];
            Deco4<d>::load_code(y, block, (const int8_t *)basis, t, c);
            back[t * d + c] = y[0];
        }
    CHECK(relative_l2(back, x) < 0.15);    // U is normal, its largest of 64 about 2.5 to 3.5: steps of 0.36 to 0.5, errors of 0.10 to 0.14
}
