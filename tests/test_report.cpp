// test_report.cpp - memory: what is announced is what is taken, and what is said to fit does fit; bytes that a step reads;
// weights without a file.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <doctest/doctest.h>
#include "bench.h"
#include "cases.h"
#include "random_weights.h"
#include "report.h"
#include "shapes.h"
#include "temp_files.h"

static int64_t can_give;    // of the fake device below
static Ops small_device(const char *name = "cpu") {
    Ops ops = cpu_ops;
    ops.name = name;
    ops.available = [] { return can_give; };
    return ops;
}

static Model model_of(const Config &c) {
    Model m;
    m.config = c;
    m.weights_bytes = 12 << 20;
    return m;
}

// The number in front of `after` in a line, 0 if it is not there.
static int number_before(const std::string &line, const std::string &after) {
    size_t end = line.find(after), begin = end;
    if (end == std::string::npos) return 0;
    while (begin > 0 && isdigit((unsigned char)line[begin - 1])) begin--;
    return atoi(line.c_str() + begin);
}

static bool fits(const Model &m, const Ops &ops, const MemoryPlan &plan) { return memory_need(m, ops, plan).total() <= can_give; }

TEST_CASE("memory: exactly enough is enough, a byte less is one line with exit code 1") {
    const Ops ops = small_device();
    const Model m = model_of(attention_config(2, 4, 128, 4));
    const MemoryPlan plan = {{}, 8, 2048, 64, 8};
    const int64_t need = memory_need(m, ops, plan).total();
    can_give = need;
    CHECK(memory_problem(m, ops, plan) == "");
    can_give = need - 1;
    const Outcome o = outcome_of([&] { announce_memory(m, ops, plan, true); });
    CHECK(o.code == 1);
    CHECK(o.line.find('\n') == std::string::npos);
    for (const char *part : {"memory: ", "MiB needed beside weights of 12.0 MiB", "cache 65.1 MiB", "8 x 2048 tokens, f16/f16", "activations",
                             "would fit: up to 1984 tokens a sequence", "up to 7 sequences at once"})
        CHECK_MESSAGE(contains(o.line, part), part << " is not in: " << o.line);
    can_give = -1;    // nobody says: not our reason to stop
    CHECK(memory_problem(m, ops, plan) == "");
}

TEST_CASE("memory: prefill steps have many rows on a device with room for them, few otherwise and on the CPU") {
    const Model m = model_of(attention_config(2, 4, 128, 4));
    auto plan_of = [](int rows) { return MemoryPlan{{}, 2, 2048, rows, 2}; };
    auto rows = [&](const char *device, int64_t bytes) {
        can_give = bytes;
        return prefill_plan(m, small_device(device), plan_of).rows;
    };
    const int64_t many = memory_need(m, cpu_ops, plan_of(DEVICE_PREFILL_ROWS)).total();
    CHECK(rows("device", many) == DEVICE_PREFILL_ROWS);
    CHECK(rows("device", many - 1) == PREFILL_ROWS);
    CHECK(rows("device", 0) == PREFILL_ROWS);    // whoever announces it says what is missing
    CHECK(rows("cpu", many) == PREFILL_ROWS);
}

TEST_CASE("memory: what would fit does, and no more would") {
    const Model m = model_of(attention_config(2, 4, 128, 4));
    KvOptions against;
    against.k_format = against.v_format = KvFormat::q8;
    for (const char *device : {"cpu", "cuda"})
        for (KvFormat format : {KvFormat::f16, KvFormat::nsn2b})
            for (bool second : {false, true})
                for (double share : {0.9, 0.5, 0.1, 0.03}) {
                    const Ops ops = small_device(device);
                    MemoryPlan plan = {{}, 32, 5000, 64, 32, second ? &against : nullptr};
                    plan.kv.k_format = plan.kv.v_format = format;
                    plan.kv.sink = 64;
                    can_give = (int64_t)(share * memory_need(m, ops, plan).total());
                    const std::string line = memory_problem(m, ops, plan);
                    INFO(line);
                    MemoryPlan other = plan;
                    const char *slots_text = contains(line, " sequences at once") ? " sequences at once" : " sequence at once";
                    const int tokens = number_before(line, " tokens a sequence"), slots = number_before(line, slots_text);
                    if (tokens > 0) CHECK(fits(m, ops, (other.context = tokens, other)));
                    CHECK(!fits(m, ops, (other.context = tokens + KV_BLOCK, other)));
                    other = plan;
                    if (slots > 0) CHECK(fits(m, ops, (other.slots = other.rows_out = slots, other)));
                    CHECK(!fits(m, ops, (other.slots = other.rows_out = slots + 1, other)));
                    const std::string formats = line.find("--kv ") == std::string::npos ? "|" : "|" + line.substr(line.find("--kv ") + 5) + "|";
                    for (int f = 0; f < (int)KvFormat::count; f++) {
                        other = plan;
                        other.kv.k_format = other.kv.v_format = (KvFormat)f;
                        CHECK(contains(formats, std::string("|") + kv_format_name((KvFormat)f) + "|") == fits(m, ops, other));
                    }
                }
}

TEST_CASE("memory: less than the buffers of a step, and less than the weights") {
    const Ops ops = small_device();
    can_give = 1000;
    const std::string line = memory_problem(model_of(attention_config(2, 4, 128)), ops, {{}, 4, 512, 64, 4});
    CHECK_MESSAGE(contains(line, "nothing shorter or smaller fits"), line);
    can_give = 10 << 20;
    CHECK(outcome_of([&] { check_weights_fit(10 << 20, ops); }).code == 0);
    const Outcome o = outcome_of([&] { check_weights_fit(11 << 20, ops); });
    CHECK(o.code == 1);
    CHECK_MESSAGE(contains(o.line, "11.0 MiB needed for the weights alone, 10.0 MiB available"), o.line);
}

TEST_CASE("memory: announced is what is allocated") {
    static int64_t allocated;
    Ops ops = cpu_ops;
    ops.alloc = [](size_t bytes) { return allocated += (int64_t)bytes, cpu_ops.alloc(bytes); };
    const Model m = model_of(attention_config(2, 2, 64, 3));
    for (KvFormat format : {KvFormat::f16, KvFormat::nsn2, KvFormat::q4, KvFormat::deco4, KvFormat::xquant}) {
        MemoryPlan plan = {{}, 3, 700, 100, 3};
        plan.kv.k_format = plan.kv.v_format = format;
        allocated = 0;
        KvCache cache;
        kv_cache_open(cache, ops, m.config, plan.kv, plan.slots, plan.context);
        CHECK(allocated == memory_need(m, ops, plan).cache);
        Activations a;
        activations_open(a, ops, m.config, plan.rows, plan.rows_out);
        CHECK(allocated == memory_need(m, ops, plan).total());
    }
}

TEST_CASE("bytes that a row reads of its cache") {
    const Config c = attention_config(2, 2, 128, 3);    // 3 layers x 2 heads
    KvOptions kv;
    kv.k_format = KvFormat::nsn2b, kv.v_format = KvFormat::nsn1;
    kv.sink = 64, kv.recent = 128;
    KvCache cache;
    kv_cache_open(cache, cpu_ops, c, kv, 1, 1000);
    CHECK(cache_bytes_read(cache.view, 0).coded == 0);
    CHECK(cache_bytes_read(cache.view, 0).exact == 6 * 2 * 256);    // K and V of one token, 128 fp16 numbers each
    CHECK(cache_bytes_read(cache.view, 4 * 64 - 1).coded == 0);     // sink, 2 recents, open
    // position 22 of block 7: blocks 1 to 4 are codes; 0, 5, 6 and 23 rows of 7 are exact.  A token earlier the last layer, whose
    // turn is 21 tokens behind a block, still reads block 4 exactly.
    CHECK(cache_bytes_read(cache.view, 7 * 64 + 22).coded == 6 * 4 * (2240 + 1280));
    CHECK(cache_bytes_read(cache.view, 7 * 64 + 22).exact == 6 * (3 * 64 + 23) * 2 * 256);
    CHECK(cache_bytes_read(cache.view, 7 * 64 + 21).coded == (4 * 4 + 2 * 3) * (2240 + 1280));
    CHECK(cache_bytes_read(cache.view, 7 * 64 + 21).exact == (4 * (3 * 64 + 22) + 2 * (4 * 64 + 22)) * 2 * 256);
}

TEST_CASE("random weights without a file: every tensor in its place, numbers of the right size, finite logits") {
    for (DType type : {DType::f32, DType::f16, DType::bf16})
        for (bool tied : {false, true}) {
            Config c = tiny_config();
            c.tied = tied;
            const Model m = random_weights(c, type, cpu_ops);
            const WeightsRange all = model_weights(m);
            CHECK(all.data == m.memory.get());
            int64_t bytes = 0;
            for (const TensorSpec &s : config_tensors(c)) {
                int64_t n = s.is_norm ? 4 : dtype_size(type);
                for (int64_t size : s.shape) n *= size;
                bytes += n;
            }
            CHECK(m.weights_bytes == bytes);
            CHECK(m.step_bytes == bytes - (tied ? 0 : (int64_t)c.vocab * c.dim * dtype_size(type)));
            CHECK((m.embed.data == m.unembed.data) == tied);
            for (const LayerWeights &l : m.layers)
                for (int i = 0; i < c.dim; i++) CHECK(l.attn_norm[i] * l.ffn_norm[i] * m.out_norm[i] == 1.0f);
            double sum = 0, squares = 0;
            const int64_t n = (int64_t)c.vocab * c.dim;
            for (int64_t i = 0; i < n; i++) {
                const double w = type == DType::f32   ? ((const float *)m.embed.data)[i]
                                 : type == DType::f16 ? to_f32(((const f16 *)m.embed.data)[i])
                                                      : to_f32(((const bf16 *)m.embed.data)[i]);
                sum += w, squares += w * w;
            }
            CHECK(std::fabs(sum / n) < 0.01);                                        // 4,160 numbers of deviation 1/4
            CHECK(std::fabs(std::sqrt(squares / n) * std::sqrt(c.dim) - 1) < 0.05);

            KvCache cache;
            kv_cache_open(cache, cpu_ops, c, {}, 1, 8);
            Activations a;
            activations_open(a, cpu_ops, c, 8, 1);
            Rows step;
            for (int p = 0; p < 8; p++) step.add(p, 0, p, p == 7);
            kv_cache_reserve(cache, 0, 8);
            forward(m, cache.view, a, step.batch(), cpu_ops);
            for (int i = 0; i < c.vocab; i++) CHECK(std::isfinite(a.logits[i]));
        }
}

TEST_CASE("shapes by name") {
    Config c;
    CHECK(!shape_from_name("llama-9", &c));
    for (const char *name : {"llama-2-7b", "llama-3-8b", "llama-3.2-1b"}) {
        REQUIRE(shape_from_name(name, &c));
        config_check(c, name);
        CHECK(contains(SHAPE_NAMES, name));
    }
    shape_from_name("llama-3-8b", &c);
    int64_t parameters = 0;
    for (const TensorSpec &s : config_tensors(c)) parameters += s.shape[0] * (s.shape.size() > 1 ? s.shape[1] : 1);
    CHECK(parameters == 8030261248);    // as Meta counts them
}

TEST_CASE("--bench -b max: so many sequences fit, one more does not") {
    const Ops ops = small_device();
    const Model m = model_of(attention_config(2, 4, 128, 4));
    Options o;
    o.bench_prompt = 64, o.bench_tokens = 8;
    KvOptions f16, nsn2b;
    nsn2b.k_format = nsn2b.v_format = KvFormat::nsn2b;
    can_give = (int64_t)1 << 30;
    int few = 0;
    for (const KvOptions &kv : {f16, nsn2b}) {
        const int most = largest_batch(m, ops, o, kv, 4000);
        auto need = [&](int B) { return memory_need(m, ops, {kv, B, 4008, std::max(B, 512), B}).total(); };
        CHECK(need(most) <= can_give - can_give / 50);
        CHECK(need(most + 1) > can_give - can_give / 50);
        if (few) CHECK(most > 4 * few);
        few = most;
    }
    can_give = 1 << 20;
    CHECK(largest_batch(m, ops, o, f16, 4000) == 0);
}
