// test_cuda_decode.cpp - decode attention on the GPU (attention_decode.cu) against the f64 reference, on the CPU's codes.
#include <algorithm>
#include "cuda_case.h"

#if WITH_CUDA
namespace cuda {
bool attention_decode(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
}
#endif
static int n_served;
// The GPU, with attention_decode wherever it can serve, however short the context.
static const Ops *find_decode() {
    static Ops ops;
    const Ops *gpu = find_gpu();
    if (!gpu) return nullptr;
    ops = *gpu;
#if WITH_CUDA
    ops.attention = [](float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
        if (cuda::attention_decode(y, q, kv, layer, k16, v16, b, Hq)) n_served++;
        else find_gpu()->attention(y, q, kv, layer, k16, v16, b, Hq);
    };
#endif
    return &ops;
}

static bool served(KvFormat k, KvFormat v) { return (k == KvFormat::f16) == (v == KvFormat::f16); }

TEST_CASE("cuda decode: every format, head shape and length against the f64 reference") {
    const Ops *gpu = find_decode();
    if (!gpu) return;
    for (int d : {64, 128})
        for (int k = 0; k <= (int)KvFormat::nsn4b; k++)
            for (int v = 0; v <= (int)KvFormat::nsn4b; v++) {
                if (!served((KvFormat)k, (KvFormat)v)) continue;
                double worst = 0;
                for (int G : {1, 2, 3, 4, 5, 8})
                    for (int blocks : {0, 1}) {
                        if ((k != v && (G != 3 || blocks)) || !taken()) continue;
                        KvOptions o;
                        o.k_format = (KvFormat)k, o.v_format = (KvFormat)v;
                        o.sink = blocks * KV_BLOCK, o.recent = 2 * blocks * KV_BLOCK;
                        BothCaches s(*gpu, attention_config(G == 1 ? 3 : 1, G, d, 1 + G % 3), {1, 63, 65, 66, 82, 87, 127, 128, 129, 137, G == 4 && k == v ? 1000 : 330}, o,
                                     d + k + G);    // turns 0, 16, 21
                        std::vector<float> want;
                        s.step(s.ends(2), nullptr);
                        n_served = 0;
                        for (int back : {1, 0}) {
                            const std::vector<float> got = s.step(s.ends(back), &want, true, true);
                            const double error = relative_l2(got, want);
                            INFO("d ", d, " K ", kv_format_name((KvFormat)k), " V ", kv_format_name((KvFormat)v), " G ", G, " sink ", o.sink);
                            CHECK(error < DECODE_BOUND);
                            worst = std::max(worst, error);
                        }
                        CHECK(n_served == 2);
                    }
                MESSAGE("d ", d, " K ", std::string(kv_format_name((KvFormat)k)), " V ", std::string(kv_format_name((KvFormat)v)), ": largest relative error ",
                        worst);
            }
}

TEST_CASE("cuda decode: teams of every size, and thread blocks with several parts, short rows first") {
    const Ops *gpu = find_decode();
    if (!gpu) return;
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b})
        for (const auto &[rows, heads, G] :
             {std::tuple(8, 8, 1), {8, 8, 4}, {9, 2, 4}, {20, 3, 4}, {40, 8, 1}, {40, 8, 2}, {33, 16, 1}, {70, 8, 1}, {160, 8, 1}, {96, 2, 5},
              {20, 3, 8}, {9, 2, 6}, {12, 1, 12}, {12, 2, 16}}) {    // G 12: three sets; 16: twice two
            if (f != KvFormat::f16 && f != KvFormat::nsn2b && rows != 20 && rows != 33) continue;    // the time it takes
            if (!taken()) continue;
            KvOptions o;
            o.k_format = o.v_format = f;
            const int longest = rows == 8 ? 1100 : rows < 50 ? 400 : 170, d = rows == 9 || G == 2 ? 64 : 128;
            std::vector<int> lengths;
            for (int i = 0; i < rows; i++) lengths.push_back(i < rows / 2 ? 2 + i * 7 % longest : longest - i);
            BothCaches s(*gpu, attention_config(heads, G, d, 1 + G % 2), lengths, o, rows + G);
            std::vector<float> want;
            s.step(s.ends(1), nullptr);
            n_served = 0;
            const std::vector<float> got = s.step(s.ends(0), &want, true, true);
            CHECK(n_served == 1);
            INFO(std::string(kv_format_name(f)), " rows ", rows, " heads ", heads, " G ", G, " d ", d);
            CHECK(relative_l2(got, want) < DECODE_BOUND);
        }
}

TEST_CASE("cuda decode: same bits again, alone and among up to 8 rows") {
    const Ops *gpu = find_decode();
    if (!gpu) return;
    for (const auto &[f, G] :
         {std::pair(KvFormat::f16, 4), {KvFormat::f16, 1}, {KvFormat::nsn2b, 4}, {KvFormat::nsn2b, 1}, {KvFormat::nsn2, 4}, {KvFormat::nsn2, 1}, {KvFormat::nsn2b, 8}}) {
        if (!taken()) continue;
        KvOptions o;
        o.k_format = o.v_format = f;
        const Config c = attention_config(2, G, 128);
        const std::vector<int> lengths = {1089, 5, 200, 64, 129, 700, 1, 333};
        auto run = [&](const std::vector<int> &which) {
            std::vector<int> of;
            for (int w : which) of.push_back(lengths[w]);
            BothCaches s(*gpu, c, of, o);
            for (size_t i = 0; i < which.size(); i++) {
                s.q[i] = random_floats((size_t)of[i] * c.n_heads * 128, 100 + which[i], 2.0f);
                s.k[i] = random_floats((size_t)of[i] * c.n_kv_heads * 128, 200 + which[i]);
                s.v[i] = random_floats((size_t)of[i] * c.n_kv_heads * 128, 300 + which[i]);
            }
            s.step(s.ends(1), nullptr, false);
            return s.step(s.ends(0), nullptr, false);
        };
        const std::vector<float> all = run({0, 1, 2, 3, 4, 5, 6, 7});
        CHECK(run({0, 1, 2, 3, 4, 5, 6, 7}) == all);
        const size_t row = (size_t)c.n_heads * 128;
        for (int w = 0; w < 8; w++) CHECK(same_bits(run({w}).data(), &all[w * row], row));
    }
}

TEST_CASE("cuda decode: attend is rope, kv_write, attention and kv_keep") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (int d : {64, 128})
        for (KvFormat f : {KvFormat::f16, KvFormat::nsn2b, KvFormat::nsn1}) {
            KvOptions o;
            o.k_format = o.v_format = f, o.sink = KV_BLOCK;
            const Config c = attention_config(2, 4, d, 40);
            const std::vector<int> layers = {0, 1, 4, 19, 39};    // turns 0, 0, 3, 15, 31
            const std::vector<int> lengths = {1, 64, 65, 129, 132, 144, 160, 224, 320};    // 64 i + 0, 0, 3, 15, 31, 31 tokens behind a row: some layer seals
            const int longest = 320, n = 2 * d, nq = 8 * d;
            KvCache apart, together;
            for (KvCache *cache : {&apart, &together}) kv_cache_open(*cache, *gpu, c, o, (int)lengths.size(), longest);
            const KvView &view = apart.view;
            const size_t sealed_bytes = (size_t)view.n_blocks * 2 * view.k_block_bytes, ring_bytes = lengths.size() * 2 * view.n_exact() * d * sizeof(f16);
            auto bytes_of = [&](const uint8_t *from, size_t bytes, int layer) {
                std::vector<uint8_t> x(bytes);
                gpu->download(x.data(), from + layer * bytes, bytes);
                return x;
            };
            const std::vector<uint8_t> zero(c.n_layers * std::max(sealed_bytes, ring_bytes));
            for (KvCache *cache : {&apart, &together}) {
                gpu->upload(cache->view.k_sealed, zero.data(), c.n_layers * sealed_bytes);
                gpu->upload(cache->view.v_exact, zero.data(), c.n_layers * ring_bytes);
            }
            auto step = [&](bool last) {    // prefill of all but the last row, then that one
                Rows rows;
                for (size_t s = 0; s < lengths.size(); s++) {
                    kv_cache_reserve(apart, (int)s, lengths[s]), kv_cache_reserve(together, (int)s, lengths[s]);
                    for (int p = last ? lengths[s] - 1 : 0; p < (last ? lengths[s] : lengths[s] - 1); p++) rows.add(0, (int)s, p, false);
                }
                const int N = (int)rows.token.size();
                const StepOn on(*gpu, rows, 8, d, nq);
                for (int layer : layers) {
                    const int seed = 10 * layer + last;
                    const OnDevice<float> q(*gpu, random_floats((size_t)N * nq, seed + 1, 2.0f)), k(*gpu, random_floats((size_t)N * n, seed + 3)),
                        v(*gpu, random_floats((size_t)N * n, seed + 5));
                    const OnDevice<float> turned(*gpu, q.host()), y(*gpu, q.n), y2(*gpu, q.n);
                    const OnDevice<f16> k16(*gpu, k.n), v16(*gpu, k.n);
                    CHECK(gpu->attend(y2.p, q.p, k.p, v.p, k16.p, v16.p, together.view, layer, on.b, 8) == last);
                    gpu->rope(turned.p, on.b, view.rope, 8, d);
                    for (KvCache *cache : {&apart, &together}) {
                        if (last && cache == &together) continue;
                        gpu->kv_write(cache->view, layer, k16.p, v16.p, k.p, v.p, on.b);
                        gpu->attention(y.p, turned.p, cache->view, layer, k16.p, v16.p, on.b, 8);
                        gpu->kv_keep(cache->view, layer, k16.p, v16.p, on.b);
                    }
                    if (last) CHECK(relative_l2(y2.host(), y.host()) < 1e-5);    // a last bit of RoPE; queries are rounded to 2^-16
                }
            };
            auto written = [&](int layer) {
                const std::vector<uint8_t> x = bytes_of(view.k_sealed, sealed_bytes, layer);
                return (int64_t)x.size() - std::count(x.begin(), x.end(), 0);
            };
            step(false);
            std::vector<int64_t> earlier;
            for (int layer : layers) earlier.push_back(written(layer));
            step(true);
            for (size_t i = 0; i < layers.size(); i++) {
                INFO(std::string(kv_format_name(f)), " d ", d, " layer ", layers[i]);
                CHECK(written(layers[i]) > earlier[i]);    // each has sealed something in its turn
                CHECK(bytes_of(view.k_sealed, sealed_bytes, layers[i]) == bytes_of(together.view.k_sealed, sealed_bytes, layers[i]));
                CHECK(bytes_of((const uint8_t *)view.v_exact, ring_bytes, layers[i]) == bytes_of((const uint8_t *)together.view.v_exact, ring_bytes, layers[i]));
            }
        }
}
