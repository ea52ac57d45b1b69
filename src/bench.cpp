#include "bench.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include "json.h"
#include "report.h"

constexpr int64_t BANDWIDTH_BYTES = (int64_t)1 << 30, BANDWIDTH_PIECE = 1 << 24;    // far more than any cache

static double measure_bandwidth(const Ops &ops, int64_t bytes) {
    void *buffer = ops.alloc(bytes);
    const std::vector<uint8_t> ones(BANDWIDTH_PIECE, 1);    // written, so that every page is there
    for (int64_t at = 0; at < bytes; at += BANDWIDTH_PIECE) ops.upload((uint8_t *)buffer + at, ones.data(), BANDWIDTH_PIECE);
    const double gb_s = ops.read_gb_s(buffer, bytes, 5);
    ops.release(buffer);
    return gb_s;
}

// Sequences of equal length in one cache.
struct Bench {
    const Model &m;
    const Ops &ops;
    int slots, rows;
    KvCache cache;
    Activations a;
    Rows step;
    int len = 0;    // of every sequence

    Bench(const Model &m, const Ops &ops, const MemoryPlan &plan) : m(m), ops(ops), slots(plan.slots), rows(plan.rows) {
        kv_cache_open(cache, ops, m.config, plan.kv, slots, plan.context);
        activations_open(a, ops, m.config, plan.rows, plan.rows_out);
    }
    void clear() {
        for (int s = 0; s < slots; s++) kv_cache_clear(cache, s);
        len = 0;
    }
    void add_row(int slot, int pos, bool want_logits) { step.add((1 + pos) % m.config.vocab, slot, pos, want_logits); }
    void run_step() {
        forward(m, cache.view, a, step.batch(), ops);
        step.clear();
    }
    void wait() {    // the logits are there when they can be read
        float x;
        ops.download(&x, a.logits, sizeof x);
    }
    // Every sequence grows to `end`, one after the other, the last row of each giving logits.  Returns the seconds.
    double prefill(int end) {
        const auto start = std::chrono::steady_clock::now();
        for (int s = 0; s < slots; s++)
            for (int from = len; from < end;) {
                const int to = std::min(end, from + rows);
                kv_cache_reserve(cache, s, to);
                for (; from < to; from++) add_row(s, from, from == end - 1);
                run_step();
            }
        len = std::max(len, end);
        wait();
        return seconds_since(start);
    }
    // The same, not measured: the others get what the first has.
    void fill(int end) {
        const int all = slots;
        slots = 1;
        prefill(end);
        slots = all;
        kv_cache_repeat(cache, end);
    }
    // The seconds of each step; nothing is between them.
    std::vector<double> decode(int steps) {
        std::vector<double> seconds(steps);
        auto start = std::chrono::steady_clock::now();
        for (double &x : seconds) {
            for (int s = 0; s < slots; s++) kv_cache_reserve(cache, s, len + 1), add_row(s, len, true);
            run_step();
            wait();
            const auto end = std::chrono::steady_clock::now();
            x = std::chrono::duration<double>(end - start).count(), start = end, len++;
        }
        return seconds;
    }
};

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}
// Of decode steps from position `depth` on, see bench.h; NAN if there is none.
static double seal_stall(const KvView &kv, int depth, const std::vector<double> &seconds) {
    std::vector<double> sealing, others;
    for (int i = 0; i < (int)seconds.size(); i++) (kv.most_seals(depth + i, depth + i) > 0 ? sealing : others).push_back(seconds[i]);
    if (sealing.size() < 3 || others.empty() || (kv.k_format == KvFormat::f16 && kv.v_format == KvFormat::f16)) return NAN;
    sealing.erase(sealing.begin(), sealing.begin() + 2);
    return median(sealing) / median(others) - 1;
}

struct Row {
    int depth, slots;
    KvOptions kv;
    double prefill_tok_s, decode_s;         // tokens a second; seconds a step
    double weights, coded, exact;           // bytes a step must read, the mean over its steps
    int64_t announced, taken;               // bytes of memory
    double seal_stall;                      // NAN: none
    double bytes() const { return weights + coded + exact; }
    double gb_s() const { return bytes() / decode_s / 1e9; }
    double limit_tok_s(double bandwidth) const { return slots * bandwidth * 1e9 / bytes(); }
};

// All depths of one cache; visit gets every row.
template <class Visit>
static void bench_cache(const Model &m, const Ops &ops, const Options &o, const MemoryPlan &plan, const std::vector<int> &depths, int64_t memory_before,
                        Visit visit) {
    const int P = o.bench_prompt, T = o.bench_tokens, B = plan.slots;
    Bench b(m, ops, plan);
    // Not measured: the first touch of weights and buffers, and what a device loads or records when it first sees a step.
    b.fill(strcmp(ops.name, cpu_ops.name) == 0 ? std::min(P, 16) : P);
    b.decode(std::min(T, 4));
    b.clear();
    for (const int depth : depths) {
        Row r = {depth, B, plan.kv, 0, 0, (double)m.step_bytes, 0, 0, 0, 0, NAN};
        if (depth < P) {
            b.clear();
            r.prefill_tok_s = (double)B * P / b.prefill(P);
            b.clear();
            b.fill(depth);
        } else {
            if (b.len > depth - P) b.clear();
            b.fill(depth - P);
            r.prefill_tok_s = (double)B * P / b.prefill(depth);
        }
        const std::vector<double> seconds = b.decode(T);
        r.decode_s = std::accumulate(seconds.begin(), seconds.end(), 0.0) / T;
        r.seal_stall = seal_stall(b.cache.view, depth, seconds);
        for (int pos = depth; pos < depth + T; pos++) {
            const CacheBytes bytes = cache_bytes_read(b.cache.view, pos);
            r.coded += (double)B * bytes.coded / T, r.exact += (double)B * bytes.exact / T;
        }
        r.announced = (m.memory ? m.weights_bytes : 0) + memory_need(m, ops, plan).total();
        r.taken = memory_taken(ops) - memory_before;
        visit(r);
    }
}

static MemoryPlan bench_plan(const Options &o, const KvOptions &kv, int B, int depth, int most_rows) {
    const int context = std::max(depth, o.bench_prompt) + o.bench_tokens;
    return {kv, B, context, std::max(B, std::min(most_rows, context)), B};
}

int largest_batch(const Model &m, const Ops &ops, const Options &o, const KvOptions &kv, int depth) {
    const int64_t available = ops.available(), room = available - available / 50;    // memory comes in pieces
    if (available < 0) fail("-b max: nobody says how much memory there is (%s)", ops.name);
    int fits = 0, too_many = MOST_BATCH + 1;
    while (too_many - fits > 1) {
        const int B = fits + (too_many - fits) / 2;
        (memory_need(m, ops, bench_plan(o, kv, B, depth, PREFILL_ROWS)).total() <= room ? fits : too_many) = B;
    }
    return fits;
}

void bench(const Model &m, const Ops &ops, const Options &o, int64_t memory_before) {
    const int P = o.bench_prompt, T = o.bench_tokens;
    const int64_t available = ops.available();
    const int64_t buffer = available < 0 ? BANDWIDTH_BYTES : std::min(BANDWIDTH_BYTES, available / 2 / BANDWIDTH_PIECE * BANDWIDTH_PIECE);
    if (buffer <= 0) fail("memory: %.1f MiB available (%s), too little to measure anything", available / 1048576.0, ops.name);
    const double bandwidth = measure_bandwidth(ops, buffer);
    const WeightsRange weights = model_weights(m);
    const double weights_speed = ops.read_gb_s(weights.data, weights.bytes, 5);

    std::vector<int> depths = o.depths;
    std::sort(depths.begin(), depths.end());
    depths.erase(std::unique(depths.begin(), depths.end()), depths.end());

    OrderedJson rows = OrderedJson::array(), too_large = OrderedJson::array();
    if (!o.json) {
        printf("read bandwidth %.1f GB/s (%lld MiB on the %s, best of 5); this model's weights alone %.1f GB/s\n", bandwidth,
               (long long)(buffer >> 20), ops.name, weights_speed);
        printf("%6s %4s %11s %11s %11s   %-32s %8s %6s %10s %7s   %s\n", "depth", "b", "kv", "prefill t/s", "decode t/s", "MB a step = weights+codes+fp16",
               "GB/s", "share", "limit t/s", "seal", "MiB announced, taken");
    }
    auto print_row = [&](const Row &r) {
        const std::string kv = kv_pair_name(r.kv);
        const double decode = r.slots / r.decode_s, share = r.gb_s() / bandwidth, limit = r.limit_tok_s(bandwidth);
        rows.push_back({{"depth", r.depth}, {"b", r.slots}, {"kv", kv}, {"prefill_tok_s", r.prefill_tok_s}, {"decode_tok_s", decode},
                        {"bytes_per_step", r.bytes()}, {"weights_bytes_per_step", r.weights}, {"coded_bytes_per_step", r.coded},
                        {"exact_bytes_per_step", r.exact}, {"gb_s", r.gb_s()}, {"share", share}, {"limit_tok_s", limit},
                        {"announced_bytes", r.announced}, {"taken_bytes", r.taken}});
        const bool seals = !std::isnan(r.seal_stall);
        if (seals) rows.back()["seal_stall"] = r.seal_stall;
        if (o.json) return;
        const std::string bytes = strf("%.2f = %.2f+%.2f+%.2f", r.bytes() / 1e6, r.weights / 1e6, r.coded / 1e6, r.exact / 1e6);
        printf("%6d %4d %11s %11.1f %11.1f   %-32s %8.2f %5.0f%% %10.1f %7s   %.1f, %.1f\n", r.depth, r.slots, kv.c_str(), r.prefill_tok_s, decode,
               bytes.c_str(), r.gb_s(), 100 * share, limit, seals ? strf("%+.1f%%", 100 * r.seal_stall).c_str() : "-", r.announced / 1048576.0,
               r.taken / 1048576.0);
        fflush(stdout);
    };

    auto measure = [&](const KvOptions &kv, int B, const std::vector<int> &depths) {
        std::vector<int> fitting;
        for (const int depth : depths) {
            const MemoryPlan plan = bench_plan(o, kv, B, depth, PREFILL_ROWS);
            const std::string line = memory_problem(m, ops, plan);
            if (line.empty()) fitting.push_back(depth);
            else {
                fprintf(stderr, "left out: depth %d: %s\n", depth, line.c_str());
                too_large.push_back({{"depth", depth}, {"b", B}, {"kv", kv_pair_name(kv)}, {"needed_bytes", memory_need(m, ops, plan).total()},
                                     {"available_bytes", ops.available()}});
            }
        }
        if (fitting.empty()) return;
        const MemoryPlan plan = prefill_plan(m, ops, [&](int rows) { return bench_plan(o, kv, B, fitting.back(), rows); });
        bench_cache(m, ops, o, plan, fitting, memory_before, print_row);
    };
    for (const KvOptions &kv : o.kvs)
        for (const int B : o.batches)
            if (B != LARGEST_BATCH) measure(kv, B, depths);
            else
                for (const int depth : depths) measure(kv, std::max(1, largest_batch(m, ops, o, kv, depth)), {depth});
    if (rows.empty()) fail("--bench: no depth fits in memory");
    if (o.json) {
        OrderedJson all = {{"model", o.model}, {"weights", dtype_option(m.layers[0].w_gate.type)}, {"device", ops.name}, {"read_gb_s", bandwidth},
                           {"model_read_gb_s", weights_speed}, {"prompt_tokens", P}, {"decode_steps", T}, {"rows", rows}};
        if (!too_large.empty()) all["too_large"] = too_large;
        printf("%s\n", all.dump().c_str());
    }
}
