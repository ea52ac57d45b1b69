// exact_cache.h - the CPU's op table with the cache replaced by one that keeps every key and value in f32 and attends in
// f64.  It separates what the cache's fp16 rows cost from errors of the runtime: with it, logits must match f64 goldens.
#pragma once
#include <map>
#include "cases.h"

struct ExactRow { std::vector<float> k, v; };    // (Hkv, d), keys after RoPE
inline std::map<std::pair<int, int>, std::vector<ExactRow>> exact_rows;    // by (layer, slot)

inline void exact_write(const KvView &kv, int layer, f16 *, f16 *, const float *k, const float *v, const Batch &b) {
    const int n = kv.Hkv * kv.d;
    for (int i = 0; i < b.N; i++) {
        auto &rows = exact_rows[{layer, b.slot[i]}];
        rows.resize(b.pos[i]);    // a slot that starts again
        ExactRow row = {std::vector<float>(k + (size_t)i * n, k + (size_t)(i + 1) * n), std::vector<float>(v + (size_t)i * n, v + (size_t)(i + 1) * n)};
        for (int h = 0; h < kv.Hkv; h++)
            for (int j = 0; j < kv.d / 2; j++) {
                float c, s, &lo = row.k[h * kv.d + j], &hi = row.k[h * kv.d + j + kv.d / 2];
                rope_angle(c, s, kv.rope, b.pos[i], j, kv.d);
                const float x = lo, y = hi;
                lo = x * c - y * s, hi = x * s + y * c;
            }
        rows.push_back(row);
    }
}

inline void exact_attention(float *y, const float *q, const KvView &kv, int layer, const f16 *, const f16 *, const Batch &b, int Hq) {
    const int d = kv.d, G = Hq / kv.Hkv;
    for (int n = 0; n < b.N; n++)
        for (int hq = 0; hq < Hq; hq++) {
            const auto &rows = exact_rows[{layer, b.slot[n]}];
            const float *qn = q + ((size_t)n * Hq + hq) * d;
            std::vector<double> p(b.pos[n] + 1), out(d);
            double top = -INFINITY, sum = 0;
            for (int t = 0; t <= b.pos[n]; t++) {
                for (int c = 0; c < d; c++) p[t] += (double)qn[c] * rows[t].k[hq / G * d + c] / std::sqrt(d);
                top = std::max(top, p[t]);
            }
            for (double &e : p) sum += e = std::exp(e - top);
            for (int t = 0; t <= b.pos[n]; t++)
                for (int c = 0; c < d; c++) out[c] += p[t] / sum * rows[t].v[hq / G * d + c];
            for (int c = 0; c < d; c++) y[((size_t)n * Hq + hq) * d + c] = (float)out[c];
        }
}

inline Ops exact_ops() {
    Ops ops = cpu_ops;
    ops.kv_write = exact_write, ops.attention = exact_attention;
    ops.kv_keep = [](const KvView &, int, const f16 *, const f16 *, const Batch &) {};
    exact_rows.clear();
    return ops;
}
