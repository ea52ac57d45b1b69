// test_model.cpp - the whole model against other people's programs: golden logits of Hugging Face transformers and of a
// f64 forward pass, greedy texts, and rows against batches.
#include <doctest/doctest.h>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <omp.h>
#include <sstream>
#include <sys/stat.h>
#include "../tools/checkpoint.h"
#include "exact_cache.h"
#include "files.h"
#include "sampler.h"

static const std::string shared = "../shared/models/";
static bool exists(const std::string &path) {
    struct stat s;
    return stat(path.c_str(), &s) == 0;
}
static bool have(const std::string &path) {
    if (exists(path)) return true;
    MESSAGE("SKIPPED: ", path, " is not here");
    return false;
}

// The checkpoint as model.bin, converted by our own converter.
static Model converted(const std::string &source, const std::string &tokenizer = "") {
    std::string name = source;
    for (char &ch : name)
        if (ch == '/' || ch == '.') ch = '_';
    mkdir("build", 0777), mkdir("build/tests", 0777);
    ConvertOptions o;
    o.source = source, o.output = "build/tests/" + name + ".bin", o.tokenizer = tokenizer;
    convert(o);
    return model_open(o.output);
}

template <class T> static std::vector<T> read_binary(const std::string &path) {
    const std::string bytes = read_file(path);
    std::vector<T> x(bytes.size() / sizeof(T));
    memcpy(x.data(), bytes.data(), x.size() * sizeof(T));
    return x;
}
static std::vector<int> read_ids(const std::string &path) {
    std::istringstream in(read_file(path));
    std::vector<int> ids;
    for (int id; in >> id;) ids.push_back(id);
    return ids;
}

TEST_CASE("golden logits of transformers: GQA 1-8, head_dim 8-128, every dtype, llama3 scaling, untied, head_dim apart") {
    for (const char *name :
         {"gqa1_d8", "gqa2_d48", "gqa3_d64", "gqa4_d96", "gqa8_d128", "gqa8_d8", "llama31_scaling", "llama31_v5", "untied", "f16", "bf16", "head_dim_apart"}) {
        const std::string folder = std::string("tests/golden/hf/") + name;
        REQUIRE(exists(folder));
        const Model m = converted(folder, "tests/golden/hf/tokenizer.json");
        const std::vector<int> ids = read_binary<int>(folder + "/tokens.bin");
        const std::vector<float> want = read_binary<float>(folder + "/logits.bin");
        INFO(std::string(name));
        // Exact cache: what is left is f32 rounding, ours and that of RoPE and norms inside transformers (3e-5 with its README).
        CHECK(relative_l2(logits_of(m, ids, 7, exact_ops()), want) < 4e-5);
        // fp16 rows: 7.2e-4 on paper for the worst case (tests/golden/README.md); the weakest fault it must catch gives 2.5e-2.
        CHECK(relative_l2(logits_of(m, ids, 80, cpu_ops), want) < 2e-3);
        CHECK(relative_l2(logits_of(m, ids, 1, cpu_ops), want) < 2e-3);
    }
}

TEST_CASE("stories260K (legacy, v1) and llama2xs: f64 golden logits and greedy ids") {
    if (!have(shared)) return;
    const std::string tok = shared + "stories260K/tok512.bin";
    for (const char *file : {"stories260K/stories260K.bin", "stories260K/stories260K_v1.bin", "llama2xs/model.bin"}) {
        const Model m = converted(shared + file, tok);
        const std::string folder = shared + std::string(file).substr(0, std::string(file).find('/'));
        const std::vector<int> greedy = read_ids(folder + "/golden_greedy_ids.txt");
        const std::vector<float> want = read_binary<float>(folder + "/golden_logits_f32.bin");
        const int V = m.config.vocab, T = (int)(want.size() / V);
        std::vector<int> ids = {1};
        for (int i = 0; i + 1 < T; i++) ids.push_back(greedy[i]);
        INFO(std::string(file));
        const std::vector<float> exact = logits_of(m, ids, 64, exact_ops()), f16_cache = logits_of(m, ids, 64, cpu_ops);
        double worst = 0, worst_f16 = 0;
        for (size_t i = 0; i < want.size(); i++) {
            worst = std::max(worst, (double)std::fabs(exact[i] - want[i]));
            worst_f16 = std::max(worst_f16, (double)std::fabs(f16_cache[i] - want[i]));
        }
        MESSAGE(std::string(file), ": largest logit difference ", worst, " with an f32 cache, ", worst_f16, " with fp16 rows");
        CHECK(worst < 1e-4);
        CHECK(relative_l2(f16_cache, want) < 2e-3);
        for (int i = 0; i < T && i < (int)greedy.size(); i++) {
            CHECK(argmax(&exact[(size_t)i * V], V) == greedy[i]);
            CHECK(argmax(&f16_cache[(size_t)i * V], V) == greedy[i]);
        }
    }
}

TEST_CASE("books models: greedy ids and top logits of transformers") {
    const nlohmann::json golden = nlohmann::json::parse(read_file("tests/golden/books.json"));
    // "Once upon a time, there was a little" and what transformers adds to it (the models' SOURCE.txt)
    const std::vector<int> greedy_5m = {1,   914, 360, 655, 261, 600,  4033, 530, 312, 261, 587, 983, 4033,
                                        471, 312, 261, 587, 983, 4033, 282,  312, 261, 587, 983, 4033};
    const std::vector<int> greedy_46m = {1,   5058, 655,  261, 600, 8129, 530,  312, 261, 587, 983, 8129, 471, 312, 261, 983, 285, 585,
                                         4190, 8129, 282, 370, 261, 587, 2059, 8129, 471, 312, 261, 620, 774, 983, 8131, 13,  13};
    for (const char *name : {"books-5m", "books-46m"}) {
        if (!have(shared + name)) continue;
        const Model m = converted(shared + name);
        const std::vector<int> &greedy = name == std::string("books-5m") ? greedy_5m : greedy_46m;
        const int V = m.config.vocab;
        std::vector<int> ids = tokenizer_encode(m.tokenizer, "Once upon a time, there was a little", true);
        ids.insert(ids.begin(), m.config.bos[0]);
        const std::vector<int> prompt = ids;
        CHECK(std::equal(ids.begin(), ids.end(), greedy.begin()));
        INFO(std::string(name));
        const std::vector<float> logits = logits_of(m, greedy, 64, cpu_ops);
        for (size_t i = prompt.size() - 1; i + 1 < greedy.size(); i++) CHECK(argmax(&logits[i * V], V) == greedy[i + 1]);

        const std::vector<int> text = golden[name]["prompt"];
        const std::vector<float> at = logits_of(m, text, 96, exact_ops()), f16_cache = logits_of(m, text, 96, cpu_ops);
        for (const auto &top : golden[name]["top5"])
            for (int i = 0; i < 5; i++) {
                const size_t k = top["position"].get<size_t>() * V + top["ids"][i].get<size_t>();
                CHECK(std::fabs(at[k] - top["logits"][i].get<float>()) < 1e-4);    // two f32 programs
                CHECK(std::fabs(f16_cache[k] - top["logits"][i].get<float>()) < 2e-2);
            }
    }
}

TEST_CASE("a row's logits: alone, among others, in prefill, and with any thread count, bit for bit") {
    const Model m = model_open("tests/models/books-5m.bin");
    const int V = m.config.vocab;
    const std::vector<int> ids = tokenizer_encode(m.tokenizer, read_file("README.md").substr(0, 700), false);
    const std::vector<float> want = logits_of(m, ids, 512, cpu_ops);
    for (int rows : {1, 5, 64}) CHECK(logits_of(m, ids, rows, cpu_ops) == want);
    const int threads = omp_get_max_threads();
    omp_set_num_threads(threads + 2);
    CHECK(logits_of(m, ids, 33, cpu_ops) == want);
    omp_set_num_threads(1);
    CHECK(logits_of(m, ids, 33, cpu_ops) == want);
    omp_set_num_threads(threads);

    // three sequences of unequal lengths, decoded together
    const std::vector<int> lengths = {(int)ids.size(), 70, 3};
    KvCache cache;
    kv_cache_open(cache, cpu_ops, m.config, {}, 3, lengths[0]);
    Activations a;
    activations_open(a, cpu_ops, m.config, 3, 3);
    Rows rows;
    for (int p = 0; p < lengths[0]; p++) {
        rows.clear();
        for (int s = 0; s < 3; s++)
            if (p < lengths[s]) rows.add(ids[p], s, p, true), kv_cache_reserve(cache, s, p + 1);
        forward(m, cache.view, a, rows.batch(), cpu_ops);
        for (size_t i = 0; i < rows.out.size(); i++) CHECK(same_bits(a.logits + i * V, &want[(size_t)p * V], V));
    }
}

TEST_CASE("exact prefill of an f16 cache is the same as coded") {
    const Model m = model_open("tests/models/books-5m.bin");
    const std::vector<int> ids = tokenizer_encode(m.tokenizer, read_file("README.md").substr(0, 700), false);
    KvOptions exact;
    exact.exact_prefill = true;
    CHECK(logits_of(m, ids, (int)ids.size(), cpu_ops, exact) == logits_of(m, ids, (int)ids.size(), cpu_ops));
}

TEST_CASE("sampler: greedy, filters, and a seed that repeats") {
    const std::vector<float> logits = {1.0f, 3.0f, 3.0f, 2.0f, -INFINITY};
    Sampler s;
    CHECK(sample(s, logits.data(), 5) == 1);    // the lowest id among equals
    CHECK(argmax(std::vector<float>{0.0f, NAN}.data(), 2) == -1);
    s.temperature = 1.0f, s.top_k = 1;
    for (int i = 0; i < 20; i++) CHECK(sample(s, logits.data(), 5) == 1);
    s.top_k = 0, s.min_p = 0.5f;    // e^-1 of the best falls out
    for (int i = 0; i < 100; i++) CHECK((sample(s, logits.data(), 5) - 1) / 2 == 0);
    s.min_p = 0.0f, s.top_p = 0.85f;    // e^3, e^3, e^2, e^1 of their sum: .39 .39 .14 .05: three reach .85
    for (int i = 0; i < 200; i++) CHECK(sample(s, logits.data(), 5) != 0);
    // frequencies follow the softmax; 100,000 draws, 4 standard deviations
    s.top_p = 1.0f, s.temperature = 2.0f, s.drawn = 0;
    std::vector<int> count(5);
    for (int i = 0; i < 100000; i++) count[sample(s, logits.data(), 5)]++;
    double sum = 0;
    for (float l : logits) sum += std::exp(l / 2);
    for (int i = 0; i < 5; i++) {
        const double p = std::exp(logits[i] / 2) / sum;
        CHECK(std::fabs(count[i] - 100000 * p) <= 4 * std::sqrt(100000 * p * (1 - p)));
    }
    Sampler a, b;
    a.temperature = b.temperature = 1.0f;
    a.seed = b.seed = 7;
    for (int i = 0; i < 50; i++) CHECK(sample(a, logits.data(), 5) == sample(b, logits.data(), 5));
}
