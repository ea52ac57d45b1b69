#include "bench.h"
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include "report.h"

constexpr int64_t BANDWIDTH_BYTES = (int64_t)1 << 30, BANDWIDTH_PIECE = 1 << 24;    // far more than any cache
constexpr int BENCH_ROWS = 512;

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

void bench(const Model &m, const Ops &ops, const Options &o) {
    const Config &c = m.config;
    void *buffer = ops.alloc(BANDWIDTH_BYTES);
    const std::vector<uint8_t> ones(BANDWIDTH_PIECE, 1);    // written, so that every page is there
    for (int64_t at = 0; at < BANDWIDTH_BYTES; at += BANDWIDTH_PIECE) ops.upload((uint8_t *)buffer + at, ones.data(), BANDWIDTH_PIECE);
    const double bandwidth = ops.read_gb_s(buffer, BANDWIDTH_BYTES, 5);
    ops.release(buffer);
    const WeightsRange weights = model_weights(m);
    const double weights_speed = ops.read_gb_s(weights.data, weights.bytes, 5);
    const int B = std::max(1, o.batch), T = o.bench_tokens, P = o.bench_prompt;
    const int deepest = *std::max_element(o.depths.begin(), o.depths.end());
    const int context = std::max(deepest, P) + T, rows = std::max(B, std::min(BENCH_ROWS, context));

    announce_memory(m, ops, o.kv, B, context, rows, B, o.json);
    KvCache cache;
    kv_cache_open(cache, ops, c, o.kv, B, context);
    Activations a;
    activations_open(a, ops, c, rows, B);
    Rows step;
    const int token = 1 % c.vocab;
    // Positions [from, to) of slots [0, slots); logits of the last one only.
    auto feed = [&](int slots, int from, int to) {
        for (int s = 0; s < slots; s++)
            for (int p0 = from; p0 < to; p0 += rows) {
                step.clear();
                const int end = std::min(to, p0 + rows);
                for (int p = p0; p < end; p++) step.add((token + p) % c.vocab, s, p, p == to - 1);
                kv_cache_reserve(cache, s, end);
                forward(m, cache.view, a, step.batch(), ops);
            }
    };
    auto wait = [&] {    // the logits are there when they can be read
        float x;
        ops.download(&x, a.logits, sizeof x);
    };

    nlohmann::ordered_json table = nlohmann::ordered_json::array();
    if (!o.json) {
        printf("read bandwidth %.1f GB/s (1 GiB on the %s, best of 5); this model's weights alone %.1f GB/s\n", bandwidth, ops.name, weights_speed);
        printf("%6s %4s %8s %12s %12s %12s %8s %7s %9s\n", "depth", "b", "kv", "prefill t/s", "decode t/s", "MB a step", "GB/s", "share", "limit t/s");
    }
    for (const int depth : o.depths) {
        for (int s = 0; s < B; s++) kv_cache_clear(cache, s);
        feed(1, 0, std::min(P, 16));    // warm: first touch of the weights
        auto start = std::chrono::steady_clock::now();
        feed(1, 0, P);
        wait();
        const double prefill = P / seconds_since(start);

        feed(B, 0, depth);
        std::vector<double> times;
        int64_t bytes = 0;
        for (int i = 0; i < T; i++) {
            const int pos = depth + i;
            start = std::chrono::steady_clock::now();
            step.clear();
            for (int s = 0; s < B; s++) step.add((token + pos) % c.vocab, s, pos, true), kv_cache_reserve(cache, s, pos + 1);
            forward(m, cache.view, a, step.batch(), ops);
            wait();
            times.push_back(seconds_since(start));
            bytes += step_bytes(m, cache.view, B, pos);
        }
        const double seconds = median(times), per_step = (double)bytes / T, gb_s = per_step / seconds / 1e9;
        const std::string kv = std::string(kv_format_name(o.kv.k_format)) + "/" + kv_format_name(o.kv.v_format);
        if (o.json)
            table.push_back({{"depth", depth}, {"b", B}, {"kv", kv}, {"prefill_tok_s", prefill}, {"decode_tok_s", B / seconds}, {"bytes_per_step", per_step},
                             {"gb_s", gb_s}, {"share", gb_s / bandwidth}, {"limit_tok_s", B * bandwidth * 1e9 / per_step}});
        else
            printf("%6d %4d %8s %12.1f %12.1f %12.2f %8.2f %6.0f%% %9.1f\n", depth, B, kv.c_str(), prefill, B / seconds, per_step / 1e6, gb_s,
                   100 * gb_s / bandwidth, B * bandwidth * 1e9 / per_step);
        fflush(stdout);
    }
    if (o.json)
        printf("%s\n", nlohmann::ordered_json{{"read_gb_s", bandwidth}, {"model_read_gb_s", weights_speed}, {"rows", table}}.dump().c_str());
}
