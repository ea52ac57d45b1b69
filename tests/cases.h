// cases.h - shapes and random numbers that tests and benches share.
//
// For every block, tile or unroll constant X of a kernel there are sizes X-1, X and X+1: LANES 16, DOT_OUT and FEW_ROWS 4,
// ROW_TILE 16, TILE_OUT 32, GROUP 32 (16 groups share a conversion of scales), KV_BLOCK 64, SEGMENT 1,024 tokens.
#pragma once
#include <cmath>
#include <cstring>
#include <random>
#include <vector>
#include "forward.h"

inline std::vector<float> random_floats(size_t n, uint64_t seed, float scale = 1.0f) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> x(n);
    for (float &e : x) e = normal(rng);
    return x;
}

// ||a - b|| / ||b||; NaN never passes a comparison with a bound.
inline double relative_l2(const std::vector<float> &a, const std::vector<float> &b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < b.size(); i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return a.size() == b.size() ? std::sqrt(difference / norm) : NAN;
}

inline bool same_bits(const float *a, const float *b, size_t n) { return memcmp(a, b, n * sizeof(float)) == 0; }

constexpr int CASE_LENGTHS[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 1000, 1023, 1024, 1025, 1089};
constexpr int CASE_HEAD_DIMS[] = {8, 16, 24, 48, 64, 80, 96, 128, 256};
constexpr int CASE_GQA[] = {1, 2, 3, 4, 5, 8, 16};

// A cache of one layer for attention tests.
inline Config attention_config(int Hkv, int G, int d, int layers = 1) {
    Config c;
    c.dim = 16, c.ffn_dim = 16, c.vocab = 16, c.max_len = 4096;
    c.n_layers = layers, c.n_kv_heads = Hkv, c.n_heads = Hkv * G, c.head_dim = d;
    return c;
}

// Logits (ids.size(), V) of a sequence fed rows_each tokens a step.
inline std::vector<float> logits_of(const Model &m, const std::vector<int> &ids, int rows_each, const Ops &ops, const KvOptions &kv = {}) {
    const int T = (int)ids.size(), V = m.config.vocab;
    KvCache cache;
    kv_cache_open(cache, ops, m.config, kv, 1, T);
    Activations a;
    activations_open(a, ops, m.config, std::min(rows_each, T), std::min(rows_each, T));
    std::vector<float> logits((size_t)T * V);
    Rows rows;
    for (int p0 = 0; p0 < T; p0 += rows_each) {
        rows.clear();
        const int end = std::min(T, p0 + rows_each);
        for (int p = p0; p < end; p++) rows.add(ids[p], 0, p, true);
        kv_cache_reserve(cache, 0, end);
        forward(m, cache.view, a, rows.batch(), ops);
        ops.download(&logits[(size_t)p0 * V], a.logits, (size_t)(end - p0) * V * sizeof(float));
    }
    return logits;
}
