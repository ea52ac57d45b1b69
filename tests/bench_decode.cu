// bench_decode.cu - decode attention of one layer on the GPU: every format over the shapes of Llama-2-7B, Llama-3-8B and
// Llama-3.2-1B.
//
//   build/bench_decode [--json] [format [shape]]        --json: one object, a line for build/plot table
//
// us a call: median of 9 replays of a CUDA graph of back-to-back calls, one a layer; the layers hold more than 200 MB, so codes
// come from memory and not from L2.  The row sees T tokens in full blocks, 8 that are exact, and itself; `us open` is with the 48 that a
// layer has in the mean, whose fp16 rows are as many bytes as 5.5 blocks of nsn2b.  GB/s counts the bytes of full blocks; the share is
// of what read_gb_s measures here.
#ifdef __CUDACC__
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "bench_cuda.cuh"
#include "cases.h"

struct Shape { int Hq, Hkv, d, B, T; };
constexpr Shape SHAPES[] = {{32, 32, 128, 1, 4096}, {32, 32, 128, 1, 32768}, {32, 32, 128, 32, 4096}, {32, 8, 128, 1, 8192}, {32, 8, 128, 1, 131072},
                            {32, 8, 128, 32, 8192}, {64, 8, 128, 16, 8192},  {32, 8, 64, 1, 131072},  {32, 8, 64, 32, 8192}};

// n bytes on the device: those of `some`, again and again.
static void fill_with(const Ops &gpu, void *to, int64_t n, const std::vector<uint8_t> &some) {
    for (int64_t i = 0; i < n; i += (int64_t)some.size()) gpu.upload((uint8_t *)to + i, some.data(), std::min<int64_t>(n - i, some.size()));
}

constexpr int OPEN_ROWS[] = {8, 48};    // exact tokens beside the row itself
struct Timed {
    double us[2];           // a call, with OPEN_ROWS
    double sealed_bytes;    // of a call
};
static Timed time_calls(const Ops &gpu, const Shape &s, KvFormat f) {
    KvOptions o;
    o.k_format = o.v_format = f;
    // 128 blocks a head, sealed by the GPU from random rows
    const int rows_each = 65 * KV_BLOCK;
    Config c = attention_config(s.Hkv, s.Hq / s.Hkv, s.d);
    KvCache seed;
    kv_cache_open(seed, gpu, c, o, 1, rows_each);
    kv_cache_reserve(seed, 0, rows_each);
    Rows rows;
    for (int p = 0; p < rows_each; p++) rows.add(0, 0, p, false);
    const std::vector<float> x = random_floats((size_t)rows_each * s.Hkv * s.d, 1);
    auto device = [&](int64_t bytes) { return gpu.alloc(bytes); };
    float *k = (float *)device(x.size() * 4);
    f16 *k16 = (f16 *)device(x.size() * 2), *v16 = (f16 *)device(x.size() * 2);
    gpu.upload(k, x.data(), x.size() * 4);
    void *scratch = device(gpu.scratch_bytes({rows_each, 1, s.d, 16}));
    const Batch b = gpu.begin(rows.batch(), scratch);
    gpu.kv_write(seed.view, 0, k16, v16, k, k, b);
    std::vector<uint8_t> kb((size_t)64 * s.Hkv * seed.view.k_block_bytes), vb((size_t)64 * s.Hkv * seed.view.v_block_bytes), exact((size_t)KV_BLOCK * s.Hkv * s.d * 2);
    gpu.download(kb.data(), seed.view.k_sealed, kb.size());
    gpu.download(vb.data(), seed.view.v_sealed, vb.size());
    gpu.download(exact.data(), k16, exact.size());

    const double layer_bytes = (double)s.B * (s.T / KV_BLOCK) * s.Hkv * (seed.view.k_block_bytes + seed.view.v_block_bytes);
    const int L = (int)std::max(2.0, std::min(40.0, std::ceil(200e6 / layer_bytes)));
    c = attention_config(s.Hkv, s.Hq / s.Hkv, s.d, L);
    KvCache cache;
    kv_cache_open(cache, gpu, c, o, s.B, s.T + KV_BLOCK);
    for (int slot = 0; slot < s.B; slot++) kv_cache_reserve(cache, slot, s.T + KV_BLOCK);
    KvView kv = cache.view;
    kv.L *= SEAL_STEPS;    // as of a model so deep that all of these seal in the first turn and read T / KV_BLOCK blocks as codes
    fill_with(gpu, kv.k_sealed, (int64_t)L * kv.n_blocks * s.Hkv * kv.k_block_bytes, kb);
    fill_with(gpu, kv.v_sealed, (int64_t)L * kv.n_blocks * s.Hkv * kv.v_block_bytes, vb);
    const int64_t exact_bytes = (int64_t)L * s.B * s.Hkv * kv.n_exact() * s.d * 2;
    fill_with(gpu, kv.k_exact, exact_bytes, exact), fill_with(gpu, kv.v_exact, exact_bytes, exact);
    const std::vector<float> q = random_floats((size_t)s.B * s.Hq * s.d, 2);
    float *on_q = (float *)device(q.size() * 4), *y = (float *)device(q.size() * 4);
    gpu.upload(on_q, q.data(), q.size() * 4);
    void *work = device(gpu.scratch_bytes({s.B, s.Hq, s.d, 16}));
    const int calls = std::max(L, 20) / L * L;
    Timed timed = {{}, layer_bytes};
    for (int i = 0; i < 2; i++) {
        Rows last;
        for (int slot = 0; slot < s.B; slot++) last.add(0, slot, s.T + OPEN_ROWS[i], false);
        const Batch step = gpu.begin(last.batch(), work);
        timed.us[i] = median_us(calls, [&](int call) { gpu.attention(y, on_q, kv, call % L, k16, v16, step, s.Hq); });
    }
    for (void *p : {(void *)k, (void *)k16, (void *)v16, scratch, (void *)on_q, (void *)y, work}) gpu.release(p);
    return timed;
}

int main(int argc, char **argv) {
    const bool json = argc > 1 && strcmp(argv[1], "--json") == 0;
    if (json) argc--, argv++;
    std::string why_not, rows;
    const Ops *gpu = cuda_ops(&why_not);
    if (!gpu) return fprintf(json ? stderr : stdout, "SKIPPED: %s\n", why_not.c_str()), json;
    const double read = measured_read_gb_s(*gpu);
    if (!json) printf("read bandwidth %.0f GB/s\n%6s %4s %3s %7s %7s %9s %8s %6s %7s %9s\n", read, "heads", "d", "B", "T", "format", "us", "GB/s", "share", "x f16", "us open");
    for (const Shape &s : SHAPES) {
        double f16_us = 0;
        for (KvFormat f : {KvFormat::f16, KvFormat::nsn4b, KvFormat::nsn2b, KvFormat::nsn2, KvFormat::nsn1}) {
            if (argc > 1 && f != kv_format_from_name(argv[1])) continue;
            if (argc > 2 && &s - SHAPES != atoi(argv[2])) continue;
            const Timed t = time_calls(*gpu, s, f);
            const double us = t.us[0], gb_s = t.sealed_bytes / us / 1e3;
            if (json) {
                rows += strf("%s{\"shape\":\"%d/%d heads of %d\",\"b\":%d,\"tokens\":%d,\"kv\":\"%s\",\"us\":%.3f,\"us_open\":%.3f,\"gb_s\":%.2f,\"share\":%.4f,\"limit_us\":%.3f}",
                             rows.empty() ? "" : ",", s.Hq, s.Hkv, s.d, s.B, s.T, kv_format_name(f), us, t.us[1], gb_s, gb_s / read, t.sealed_bytes / read / 1e3);
                continue;
            }
            if (f == KvFormat::f16) f16_us = us;
            printf("%3d/%-2d %4d %3d %7d %7s %9.1f %8.0f %6.2f", s.Hq, s.Hkv, s.d, s.B, s.T, kv_format_name(f), us, gb_s, gb_s / read);
            f16_us > 0 ? printf(" %7.2f", f16_us / us) : printf(" %7s", "");
            printf(" %9.1f\n", t.us[1]);
            fflush(stdout);
        }
    }
    if (json) printf("{\"what\":\"attention\",\"device\":\"%s\",\"read_gb_s\":%.2f,\"rows\":[%s]}\n", gpu->name, read, rows.c_str());
}
#endif
