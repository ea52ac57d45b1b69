// test_cuda.cpp - the GPU's ops but products against the CPU's and against the f64 references, and the promise that a row does
// not depend on its neighbours.  Skips, and says so, without CUDA or without a device.
#include <doctest/doctest.h>
#include "cuda_case.h"
#include "device.h"
#include "files.h"
#include "temp_files.h"

TEST_CASE("cuda: embed, gather, rmsnorm, rope against the CPU") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (int D : {1, 7, 16, 255, 256, 257, 300, 4096})
        for (int N : {1, 5}) {
            INFO("D ", D, " N ", N);
            const int V = 9;
            Rows rows;
            for (int n = 0; n < N; n++) rows.add((n * 5 + 8) % V, n, n * 70, true);
            const StepOn step(*gpu, rows, 1, 8, D);
            for (DType type : DTYPES) {
                const HostMatrix W((size_t)V * D, type, 5);
                const OnDevice<uint8_t> w(*gpu, W.bytes);
                const OnDevice<float> x(*gpu, (size_t)N * D);
                gpu->embed(x.p, {w.p, type}, step.b, D);
                std::vector<float> want((size_t)N * D);
                cpu::embed(want.data(), {W.bytes.data(), type}, rows.batch(), D);
                CHECK(x.host() == want);
            }
            const std::vector<float> x = random_floats((size_t)N * D, D), gain = random_floats(D, 3);
            std::vector<float> want(x.size());
            const OnDevice<float> xs(*gpu, x), w(*gpu, gain), y(*gpu, x.size());
            gpu->gather(y.p, xs.p, step.b.out, N, D);
            CHECK(y.host() == x);
            gpu->rmsnorm(y.p, xs.p, w.p, 1e-3f, N, D);
            cpu::rmsnorm(want.data(), x.data(), gain.data(), 1e-3f, N, D);
            std::vector<float> got = y.host();
            for (size_t i = 0; i < x.size(); i++) CHECK(std::fabs(got[i] - want[i]) <= 4e-7 * std::fabs(want[i]));
            gpu->rmsnorm(xs.p, xs.p, w.p, 1e-3f, N, D);    // in place
            CHECK(xs.host() == got);
        }
    for (int d : CASE_HEAD_DIMS) {
        KvCache on_cpu, on_gpu;
        const Config c = attention_config(1, 2, d);
        kv_cache_open(on_cpu, cpu_ops, c, {}, 1, 4096);
        kv_cache_open(on_gpu, *gpu, c, {}, 1, 4096);
        Rows rows;
        for (int p : {0, 1, 63, 64, 65, 4095}) rows.add(0, 0, p, false);
        const StepOn step(*gpu, rows, 2, d, d);
        std::vector<float> q = random_floats(rows.pos.size() * 2 * d, d);
        const OnDevice<float> y(*gpu, q);
        gpu->rope(y.p, step.b, on_gpu.view.rope, 2, d);
        cpu::rope(q.data(), rows.batch(), on_cpu.view.rope, 2, d);
        CHECK(relative_l2(y.host(), q) < 2e-7);
    }
}

// A few hundred roundings of 2^-24; softmax amplifies by |score| ~ 10.
constexpr double ATTENTION_BOUND = 4e-6;
// Tensor cores take the larger steps of these head dimensions: test_cuda_prefill.cpp, whose bound this is for q = 2, k = v = 1.
static bool on_tensor_cores(int rows, int d) { return rows > 8 && (d == 64 || d == 128); }
static double attention_bound(size_t rows, int d) { return on_tensor_cores((int)rows, d) ? 0.9e-3 : ATTENTION_BOUND; }

TEST_CASE("cuda: attention against the f64 reference: every head shape, prefill and decode, lengths at every edge") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    for (int d : CASE_HEAD_DIMS)
        for (int G : CASE_GQA) {
            if (!taken()) continue;
            BothCaches s(*gpu, attention_config(2, G, d, 1 + G % 3), {1, 63, 64, 65, 73, 127, 128, 129, 140, 1000}, {}, d * 100 + G);
            std::vector<float> want;
            INFO("d ", d, " G ", G);
            s.step(s.ends(12), nullptr);
            const std::vector<float> prefill = s.step(s.ends(1), &want);
            CHECK(relative_l2(prefill, want) < attention_bound(prefill.size() / (2 * G * d), d));
            const std::vector<float> decode = s.step(s.ends(0), &want);
            CHECK(relative_l2(decode, want) < ATTENTION_BOUND);
            worst = std::max(worst, relative_l2(decode, want));
        }
    MESSAGE("largest relative error: ", worst);
}

TEST_CASE("cuda: attention over every pair of formats, the CPU's codes") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    for (int k = 0; !kv_is_scalar((KvFormat)k); k++)
        for (int v = 0; !kv_is_scalar((KvFormat)v); v++)
            for (int d : {24, 64, 128, 256}) {
                if ((d == 256 && k != v) || !taken()) continue;    // the reference's Hadamard product costs d^2 a row
                KvOptions o;
                o.k_format = (KvFormat)k, o.v_format = (KvFormat)v;
                if (k == v) o.sink = 64, o.recent = 64;
                o.exact_prefill = k > v;
                BothCaches s(*gpu, attention_config(1, 3, d, 1 + v % 2), {1, 64, 129, 330}, o, d + k);
                std::vector<float> want;
                INFO("d ", d, " K ", kv_format_name(o.k_format), " V ", kv_format_name(o.v_format));
                s.step(s.ends(5), nullptr);
                for (int back : {1, 0}) {
                    const std::vector<float> got = s.step(s.ends(back), &want, true, true);
                    const double bound = decodes_codes(o.k_format, o.v_format, d) ? DECODE_BOUND : attention_bound(got.size() / (3 * d), d);
                    CHECK(relative_l2(got, want) < bound);
                    if (bound == ATTENTION_BOUND) worst = std::max(worst, relative_l2(got, want));
                }
            }
    MESSAGE("largest relative error: ", worst);
}

TEST_CASE("cuda: sealing gives the reference's bytes, up to ties") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    int64_t total = 0;
    for (int f = 0; !kv_is_scalar((KvFormat)f); f++)
        for (int d : CASE_HEAD_DIMS)
            for (unsigned ablate : {0u, (unsigned)NO_HADAMARD, (unsigned)NO_PRE_ROPE, (unsigned)(NO_SHIFT | NO_FIRST_NORM | NO_SCALE)}) {
                if ((ablate && d != 64) || !taken()) continue;
                KvOptions o;
                o.k_format = o.v_format = (KvFormat)f, o.ablate = ablate;
                BothCaches s(*gpu, attention_config(2, 1, d), {321, 70}, o, d);
                for (const auto &[to, bytes] :
                     {std::pair(s.on_gpu.view.k_sealed, s.on_gpu.view.k_block_bytes), {s.on_gpu.view.v_sealed, s.on_gpu.view.v_block_bytes}}) {
                    const std::vector<uint8_t> poison(s.on_gpu.view.n_blocks * 2 * bytes, 0xff);    // all of it is read below
                    gpu->upload(to, poison.data(), poison.size());
                }
                s.step({60, 0}, nullptr);
                s.step({257, 70}, nullptr);    // blocks from the ring, from both, from this step
                s.step(s.ends(0), nullptr);
                const KvView &a = s.on_cpu.view, &b = s.on_gpu.view;
                for (bool key : {true, false}) {
                    const int64_t block = key ? a.k_block_bytes : a.v_block_bytes, bytes = a.n_blocks * a.Hkv * block;
                    std::vector<uint8_t> got(bytes);
                    gpu->download(got.data(), key ? b.k_sealed : b.v_sealed, bytes);
                    int64_t different = 0, sealed = 0;
                    for (int slot = 0; slot < 2; slot++)
                        for (int i = 0; i < (slot ? 1 : 5); i++)
                            for (int h = 0; h < a.Hkv; h++) {
                                const int64_t at = a.sealed_at(0, slot, h, i) * block;
                                const uint8_t *want = key ? a.k_sealed : a.v_sealed;
                                for (int64_t j = 0; j < block; j++) different += got[at + j] != want[at + j];
                                sealed += block;
                            }
                    INFO(kv_format_name((KvFormat)f), " d ", d, key ? " K " : " V ", "ablate ", ablate, ": ", different, " of ", sealed, " bytes differ");
                    if (f == 0) CHECK(different == 0);
                    CHECK(different <= sealed / 1000 + 2);    // an input within 2^-23 of the border between two codes
                    total += different;
                }
            }
    MESSAGE(total, " bytes differ in all");
}

TEST_CASE("cuda: attention: prefill of any step size, decode and batch neighbours give the same bits") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn2})
        for (int d : {24, 128, 256}) {
            if (!taken()) continue;
            KvOptions o;
            o.k_format = o.v_format = f;
            if (d == 24) o.sink = 64, o.recent = 128;
            const Config c = attention_config(2, 3, d, 3);
            const std::vector<int> lengths = {length(1089), 5, length(200), 64, length(129)};
            auto run = [&](const std::vector<int> &which, int rows) {    // results by sequence
                std::vector<int> of;
                for (int w : which) of.push_back(lengths[w]);
                BothCaches s(*gpu, c, of, o);
                for (size_t i = 0; i < which.size(); i++) {
                    s.q[i] = random_floats((size_t)of[i] * c.n_heads * d, 100 + which[i], 2.0f);
                    s.k[i] = random_floats((size_t)of[i] * c.n_kv_heads * d, 200 + which[i]);
                    s.v[i] = random_floats((size_t)of[i] * c.n_kv_heads * d, 300 + which[i]);
                }
                std::vector<std::vector<float>> y(which.size());
                while (s.done != of) {
                    std::vector<int> until;
                    for (size_t i = 0; i < of.size(); i++) until.push_back(std::min(of[i], s.done[i] + rows));
                    const std::vector<int> before = s.done;
                    const std::vector<float> out = s.step(until, nullptr, false);
                    const float *at = out.data();
                    for (size_t i = 0; i < of.size(); i++) {
                        const size_t n = (size_t)(until[i] - before[i]) * c.n_heads * d;
                        y[i].insert(y[i].end(), at, at + n);
                        at += n;
                    }
                }
                return y;
            };
            if (on_tensor_cores(9, d)) {    // one row a slot, few rows of a slot, and many (test_cuda_prefill.cpp) are three orders of adding up
                const auto want = run({0, 1, 2, 3, 4}, 1);
                CHECK(run({0, 1, 2, 3, 4}, 1) == want);
                for (int w = 0; w < 5; w++) {
                    CHECK(run({w}, 1)[0] == want[w]);
                    const auto few = run({w}, 8);
                    CHECK(run({w}, 8) == few);
                    CHECK(relative_l2(few[0], want[w]) < 1e-3);
                }
                continue;
            }
            const auto want = run({0, 1, 2, 3, 4}, 512);
            CHECK(run({0, 1, 2, 3, 4}, 512) == want);
            for (int rows : {1, 7, 64, 65, 2000}) {
                if (!taken()) continue;
                INFO("d ", d, " rows ", rows, " format ", (int)f);
                CHECK(run({0, 1, 2, 3, 4}, rows) == want);
            }
            for (int w = 0; w < 5; w++) CHECK(run({w}, 100)[0] == want[w]);
        }
}

TEST_CASE("cuda: golden logits of transformers, every dtype, decode and prefill") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    const TempFolder folder("cuda");
    for (const char *name :
         {"gqa1_d8", "gqa2_d48", "gqa3_d64", "gqa4_d96", "gqa8_d128", "gqa8_d8", "llama31_scaling", "untied", "f16", "bf16", "head_dim_apart"}) {
        if (!taken()) continue;
        INFO(std::string(name));
        const std::string source = std::string("tests/golden/hf/") + name, path = folder.path + name + ".bin";
        REQUIRE(convert_to(source, path, "", HF_TOKENIZER).code == 0);
        Model m = model_open(path);
        model_upload(m, *gpu);
        const std::string tokens = read_file(source + "/tokens.bin"), bytes = read_file(source + "/logits.bin");
        std::vector<int> ids(tokens.size() / 4);
        std::vector<float> want(bytes.size() / 4);
        memcpy(ids.data(), tokens.data(), tokens.size()), memcpy(want.data(), bytes.data(), bytes.size());
        CHECK(relative_l2(logits_of(m, ids, 1, *gpu), want) < 2e-3);      // as on the CPU: fp16 rows of the cache
        CHECK(relative_l2(logits_of(m, ids, 7, *gpu), want) < 2e-3);
        // Many rows: beside the keys and values, queries, weights of attention and (f16 models) activations are rounded to f16,
        // twice as many roundings of the same size.
        CHECK(relative_l2(logits_of(m, ids, step_rows(80), *gpu), want) < 4e-3);
    }
}

TEST_CASE("cuda: the bundled model: logits as on the CPU, a row's bits, repeated runs") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    const Model on_cpu = model_open("tests/models/books-5m.bin");
    Model m = model_open("tests/models/books-5m.bin");
    model_upload(m, *gpu);
    const int V = m.config.vocab;
    std::vector<int> ids;
    for (int i = 0; i < length(300); i++) ids.push_back((i * 37 + i / 7) % V);
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn2b}) {
        if (!taken()) continue;
        KvOptions o;
        o.k_format = o.v_format = f;
        const std::vector<float> cpu_side = logits_of(on_cpu, ids, 64, cpu_ops, o);
        const std::vector<float> one = logits_of(m, ids, 1, *gpu, o), eight = logits_of(m, ids, 8, *gpu, o), many = logits_of(m, ids, step_rows(150), *gpu, o);
        MESSAGE(std::string(kv_format_name(f)), ": relative error of logits, decode ", relative_l2(one, cpu_side), ", prefill ", relative_l2(many, cpu_side));
        CHECK(eight == logits_of(m, ids, 8, *gpu, o));
        CHECK(logits_of(m, ids, 1, *gpu, o) == one);
        Ops eager = *gpu;    // no step is recorded
        eager.replay = [](const void *, const KvView &) { return false; };
        CHECK(logits_of(m, ids, 1, eager, o) == one);
        CHECK(logits_of(m, ids, step_rows(150), *gpu, o) == many);
        if (f != KvFormat::f16) continue;    // a code that flips on a tie moves more than rounding does
        for (const auto *logits : {&one, &eight, &many}) CHECK(relative_l2(*logits, cpu_side) < 2e-3);
    }
    // three sequences of unequal lengths, decoded together
    const std::vector<float> want = logits_of(m, ids, 1, *gpu);
    const std::vector<int> lengths = {(int)ids.size(), 70, 3};
    KvCache cache;
    kv_cache_open(cache, *gpu, m.config, {}, 3, lengths[0]);
    Activations a;
    activations_open(a, *gpu, m.config, 3, 3);
    Rows rows;
    std::vector<float> got(3 * V);
    for (int p = 0; p < lengths[0]; p++) {
        rows.clear();
        for (int s = 0; s < 3; s++)
            if (p < lengths[s]) rows.add(ids[p], s, p, true), kv_cache_reserve(cache, s, p + 1);
        forward(m, cache.view, a, rows.batch(), *gpu);
        gpu->download(got.data(), a.logits, rows.out.size() * V * sizeof(float));
        for (size_t i = 0; i < rows.out.size(); i++) CHECK(same_bits(&got[i * V], &want[(size_t)p * V], V));
    }
}

TEST_CASE("cuda: too little memory says how much was asked and how much there is") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    const Outcome o = outcome_of([&] { gpu->alloc((size_t)1 << 50); });
    CHECK(o.code == 1);
    CHECK(contains(o.line, "1073741824.0 MiB could not be allocated"));
    CHECK(contains(o.line, "are free"));
    gpu->release(gpu->alloc(1));    // the error does not stick
}
