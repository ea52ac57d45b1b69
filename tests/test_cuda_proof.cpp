// test_cuda_proof.cpp - on the GPU, too, the codes are the cache: everything else is poisoned, one bit is flipped, bytes are counted.
#include <cmath>
#include "cuda_case.h"
#include "device.h"

// x of the device, n of them, is NaN.
template <class T> static void poison(const Ops &gpu, T *x, size_t n) {
    const std::vector<uint8_t> ones(n * sizeof(T), 0xff);
    gpu.upload(x, ones.data(), ones.size());
}

TEST_CASE("cuda: codes are the cache: everything else poisoned, one bit flipped, bytes counted") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    const Model on_cpu = model_open("tests/models/books-5m.bin");
    Model m = model_open("tests/models/books-5m.bin");
    model_upload(m, *gpu);
    const Config &c = m.config;
    const int T = 300, V = c.vocab, heads = c.n_layers * c.n_kv_heads, d = c.head_dim;    // four sealed blocks and 44 exact tokens
    std::vector<int> ids;
    for (int i = 0; i <= T; i++) ids.push_back((i * 37 + i / 7) % V);
    for (KvFormat format : {KvFormat::nsn1, KvFormat::nsn2, KvFormat::nsn2b, KvFormat::nsn4b}) {
        if (!taken()) continue;
        INFO(std::string(kv_format_name(format)));
        const KvOptions o = {format, format};
        KvCache cache, copy;
        kv_cache_open(cache, *gpu, c, o, 1, T + 1);
        kv_cache_open(copy, cpu_ops, c, o, 1, T + 1);
        const KvView &v = cache.view;
        const int64_t codes = (int64_t)heads * 4 * kv_block_stride(format, d), exact = (int64_t)heads * v.n_exact() * d;
        CHECK(cache.bytes == copy.bytes);    // test_nsn.cpp says which
        Activations a;
        activations_open(a, *gpu, c, T, 1);
        Rows rows;
        kv_cache_reserve(cache, 0, T + 1), kv_cache_reserve(copy, 0, T + 1);
        for (int from = 0; from < T; from += step_rows(T)) {
            rows.clear();
            for (int p = from; p < std::min(T, from + step_rows(T)); p++) rows.add(ids[p], 0, p, p == T - 1);
            forward(m, v, a, rows.batch(), *gpu);
        }
        gpu->download(copy.view.k_sealed, v.k_sealed, codes), gpu->download(copy.view.v_sealed, v.v_sealed, codes);
        std::vector<f16> k_exact(exact), v_exact(exact);
        gpu->download(k_exact.data(), v.k_exact, exact * 2), gpu->download(v_exact.data(), v.v_exact, exact * 2);
        std::vector<f16> k_rows = k_exact, v_rows = v_exact;    // with NaN where rows are sealed
        for (std::vector<f16> *x : {&k_rows, &v_rows})
            for (int l = 0; l < c.n_layers; l++)
                for (int h = 0; h < c.n_kv_heads; h++)
                    for (int t = 4 * KV_BLOCK - (v.n_exact() - 44); t < 4 * KV_BLOCK; t++) std::fill_n(x->begin() + v.exact_at(l, 0, h, t), d, to_f16(NAN));

        rows.clear();
        rows.add(ids[T], 0, T, true);
        auto next = [&](bool poisoned) {
            gpu->upload(v.k_exact, (poisoned ? k_rows : k_exact).data(), exact * 2), gpu->upload(v.v_exact, (poisoned ? v_rows : v_exact).data(), exact * 2);
            if (poisoned) {
                for (const auto &x : {std::make_pair(a.x, c.dim),
                                      {a.xn, c.dim},
                                      {a.q, c.n_heads * d},
                                      {a.k, c.n_kv_heads * d},
                                      {a.v, c.n_kv_heads * d},
                                      {a.att, c.n_heads * d},
                                      {a.gate, c.ffn_dim},
                                      {a.up, c.ffn_dim}})
                    poison(*gpu, x.first, (size_t)T * x.second);
                for (f16 *x : {a.k16, a.v16}) poison(*gpu, x, (size_t)T * c.n_kv_heads * d);
                poison(*gpu, (uint8_t *)a.scratch, (size_t)gpu->scratch_bytes({T, c.n_heads, d, std::max(c.ffn_dim, c.n_heads * d)}));
            }
            forward(m, v, a, rows.batch(), *gpu);
            std::vector<float> logits(V);
            gpu->download(logits.data(), a.logits, V * sizeof(float));
            return logits;
        };
        Ops f64 = cpu_ops;    // rebuilds every row from the same bytes in f64
        f64.attention = reference::attention;
        Activations on_host;
        activations_open(on_host, f64, c, 1, 1);
        auto next_f64 = [&] {
            std::copy(k_exact.begin(), k_exact.end(), copy.view.k_exact), std::copy(v_exact.begin(), v_exact.end(), copy.view.v_exact);
            forward(on_cpu, copy.view, on_host, rows.batch(), f64);
            return std::vector<float>(on_host.logits, on_host.logits + V);
        };
        const std::vector<float> before = next(false), before_f64 = next_f64();
        for (int again = 0; again < 3; again++) CHECK(next(true) == before);    // run, recorded, replayed
        CHECK(relative_l2(before, before_f64) < DECODE_BOUND);

        const int64_t token_bytes = d / (format == KvFormat::nsn4b ? 2 : format == KvFormat::nsn2b ? 4 : 8);
        for (bool key : {true, false}) {    // of a recent token, in the last layer, as in test_nsn.cpp
            uint8_t *const code = (key ? copy.view.k_block(c.n_layers - 1, 0, 0, 3) : copy.view.v_block(c.n_layers - 1, 0, 0, 3)) + 60 * token_bytes + 1;
            uint8_t *const on_gpu = (key ? v.k_sealed : v.v_sealed) + (code - (key ? copy.view.k_sealed : copy.view.v_sealed));
            auto flip = [&] { *code ^= 0x80, gpu->upload(on_gpu, code, 1); };
            flip();
            const std::vector<float> after = next(true), after_f64 = next_f64();
            flip();
            std::vector<float> change(V), change_f64(V);
            for (int i = 0; i < V; i++) change[i] = after[i] - before[i], change_f64[i] = after_f64[i] - before_f64[i];
            INFO("key ", key, ": the change is ", relative_l2(after, before), " of the logits");
            CHECK(after != before);
            CHECK(relative_l2(change, change_f64) < 0.1);
        }
        CHECK(next(true) == before);
    }
}
