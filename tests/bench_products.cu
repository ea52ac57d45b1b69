// bench_products.cu - the products of a decode step of Llama-3-8B on the GPU, without attention between them: weights in f16, q8 and q4.
//
//   build/bench_products [--json]        --json: one object, a line for build/plot table
//
// us a call: median of 9 replays of a CUDA graph.  One product: its calls in all 32 layers, back to back, so that weights come from
// memory and not from L2.  `all`: those of a step in their order, 32 layers and the logits.  GB/s counts the weights; the share is of
// what read_gb_s measures here.
#ifdef __CUDACC__
#include <cstdio>
#include <cstring>
#include "bench_cuda.cuh"
#include "cases.h"
#include "forward.h"
#include "groups.h"
#include "random_weights.h"
#include "shapes.h"

constexpr int BATCHES[] = {1, 4, 8, 32};
constexpr const char *PARTS[] = {"q, k, v", "wo", "gate, up", "down", "logits", "all"};
constexpr int LOGITS = 4, ALL = 5;

int main(int argc, char **argv) {
    const bool json = argc > 1 && strcmp(argv[1], "--json") == 0;
    std::string why_not, rows;
    const Ops *const gpu = cuda_ops(&why_not);
    if (!gpu) return fprintf(json ? stderr : stdout, "SKIPPED: %s\n", why_not.c_str()), json;
    const double read = measured_read_gb_s(*gpu);
    if (!json) printf("read bandwidth %.0f GB/s\n%7s %5s  %-8s %9s %8s %6s\n", read, "weights", "batch", "product", "us", "GB/s", "share");
    Config c;
    if (!shape_from_name("llama-3-8b", &c)) return 1;
    const int D = c.dim, F = c.ffn_dim, q_out = c.n_heads * c.head_dim, kv_out = c.n_kv_heads * c.head_dim, L = c.n_layers;
    for (DType type : {DType::f16, DType::q8, DType::q4}) {
        const Model m = random_weights(c, type, *gpu);
        auto bytes_of = [](const Matrix &w, int64_t n) { return (double)(code_bytes(w.type, n) + scale_bytes(w.type, n)); };
        const LayerWeights &w0 = m.layers[0];
        double bytes[6] = {bytes_of(w0.wq, (int64_t)(q_out + 2 * kv_out) * D), bytes_of(w0.wo, (int64_t)q_out * D), bytes_of(w0.w_gate, 2LL * F * D),
                           bytes_of(w0.w_down, (int64_t)F * D), bytes_of(m.unembed, (int64_t)c.vocab * D), 0};
        bytes[ALL] = L * (bytes[0] + bytes[1] + bytes[2] + bytes[3]) + bytes[LOGITS];
        for (int N : BATCHES) {
            Activations a;
            activations_open(a, *gpu, c, N, N);
            const std::vector<float> x = random_floats((size_t)N * std::max(F, q_out), 1);
            gpu->upload(a.x, x.data(), (size_t)N * D * 4), gpu->upload(a.att, x.data(), (size_t)N * q_out * 4);
            Rows step;
            for (int n = 0; n < N; n++) step.add(0, n, 0, true);
            const Batch b = gpu->begin(step.batch(), a.scratch);
            auto call = [&](int part, int l) {
                const LayerWeights &w = m.layers[l];
                const float *const next = l + 1 < L ? m.layers[l + 1].attn_norm : m.out_norm;
                if (part == 0) gpu->qkv(a.q, a.k, a.v, a.xn, a.x, {w.attn_norm, c.norm_eps}, w.wq, w.wk, w.wv, b.N, D, q_out, kv_out);
                if (part == 1) gpu->matmul_add(a.x, a.att, w.wo, b.N, q_out, D, {w.ffn_norm, c.norm_eps});
                if (part == 2) gpu->gated(a.gate, a.up, a.xn, a.x, {w.ffn_norm, c.norm_eps}, w.w_gate, w.w_up, b.N, D, F);
                if (part == 3) gpu->matmul_add(a.x, a.gate, w.w_down, b.N, F, D, {next, c.norm_eps});
                if (part == LOGITS) gpu->unembed(a.logits, a.xn, a.x, {m.out_norm, c.norm_eps}, m.unembed, b.N, D, c.vocab);
            };
            for (int part = N == 1 ? 0 : ALL; part <= ALL; part++) {
                const double us = part == ALL ? median_us(1, [&](int) {
                    for (int l = 0; l < L; l++)
                        for (int i = 0; i < LOGITS; i++) call(i, l);
                    call(LOGITS, 0);
                }) : median_us(L, [&](int l) { call(part, l); });
                const double gb_s = bytes[part] / us / 1e3;
                if (json)
                    rows += strf("%s{\"shape\":\"Llama-3-8B, %s\",\"b\":%d,\"weights\":\"%s\",\"us\":%.3f,\"gb_s\":%.2f,\"share\":%.4f,\"limit_us\":%.3f}",
                                 rows.empty() ? "" : ",", PARTS[part], N, dtype_option(type), us, gb_s, gb_s / read, bytes[part] / read / 1e3);
                else printf("%7s %5d  %-8s %9.1f %8.0f %6.2f\n", dtype_option(type), N, PARTS[part], us, gb_s, gb_s / read), fflush(stdout);
            }
        }
    }
    if (json) printf("{\"what\":\"products\",\"device\":\"%s\",\"read_gb_s\":%.2f,\"rows\":[%s]}\n", gpu->name, read, rows.c_str());
}
#endif
