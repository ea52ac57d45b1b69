// bench_attention.cpp - decode attention of one layer on the CPU: each format against our own fp16 cache.
//
//   build/bench_attention [T [threads]]        8 query heads over 2 kv heads of 128 (books-46m), one sequence of T tokens
//
// Median of 15 calls; the formats take turns, so that a drift of the machine meets all of them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <omp.h>
#include "cases.h"

struct Contender {
    KvFormat format;
    KvCache cache;
    std::vector<double> us;
};

int main(int argc, char **argv) {
    const int T = argc > 1 ? atoi(argv[1]) : 16384, Hq = 8, Hkv = 2, d = 128;
    if (argc > 2) omp_set_num_threads(atoi(argv[2]));
    const Config c = attention_config(Hkv, Hq / Hkv, d);
    std::vector<Contender> all((size_t)KvFormat::count);
    const std::vector<float> k = random_floats((size_t)512 * Hkv * d, 1), v = random_floats(k.size(), 2), q = random_floats((size_t)Hq * d, 3);
    std::vector<f16> k16(k.size()), v16(k.size());
    std::vector<float> y(q.size());
    Rows last;
    last.add(0, 0, T, false);
    for (int f = 0; f < (int)all.size(); f++) {
        Contender &a = all[f];
        a.format = (KvFormat)f;
        kv_cache_open(a.cache, cpu_ops, c, {a.format, a.format}, 1, T + 1);
        kv_cache_reserve(a.cache, 0, T + 1);
        for (int p = 0; p < T; p += 512) {
            Rows rows;
            for (int i = p; i < std::min(T, p + 512); i++) rows.add(0, 0, i, false);
            cpu::kv_write(a.cache.view, 0, k16.data(), v16.data(), k.data(), v.data(), rows.batch());
            cpu::kv_keep(a.cache.view, 0, k16.data(), v16.data(), rows.batch());
        }
        cpu::kv_write(a.cache.view, 0, k16.data(), v16.data(), k.data(), v.data(), last.batch());
    }
    for (int i = 0; i < 16; i++)
        for (Contender &a : all) {
            const auto start = std::chrono::steady_clock::now();
            cpu::attention(y.data(), q.data(), a.cache.view, 0, k16.data(), v16.data(), last.batch(), Hq);
            if (i > 0) a.us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
        }
    printf("decode attention, T %d, %d/%d heads x %d, %d threads\n%8s %8s %10s %9s %8s\n", T, Hq, Hkv, d, omp_get_max_threads(), "format", "bits", "us", "GB/s",
           "x f16");
    double f16_us = 0;
    for (Contender &a : all) {
        std::sort(a.us.begin(), a.us.end());
        const double us = a.us[a.us.size() / 2], bits = kv_bits(a.format, d);
        if (a.format == KvFormat::f16) f16_us = us;
        printf("%8s %8.4f %10.1f %9.2f %8.2f\n", kv_format_name(a.format), bits, us, 2.0 * Hkv * T * d * bits / 8 / us / 1e3, f16_us / us);
    }
}
