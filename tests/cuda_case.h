// cuda_case.h - what the tests of the CUDA backend share: the device, arrays and steps on it, the same sequences through the
// caches of both backends.
#pragma once
#include <doctest/doctest.h>
#include "cases.h"

namespace reference {
void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
}

inline const Ops *find_gpu() {
    static std::string why_not;
    static const Ops *ops = cuda_ops(&why_not);
    if (!ops) MESSAGE("SKIPPED: ", why_not);
    return ops;
}

// Under a sanitizer kernels take 10 to 10,000 times as long: with EVERY=n in the environment, loops over cases take every n-th, with
// LENGTH=n the longest sequences have n tokens (73: one block is read as codes).  With ROWS=8, steps of whole models leave all
// products to kernels of ours: initcheck does not see what cuBLAS writes.
inline int environment(const char *name, int otherwise) { return getenv(name) ? std::max(1, atoi(getenv(name))) : otherwise; }
inline int every() { return environment("EVERY", 1); }
inline bool taken() {
    static int seen = 0;
    return seen++ % every() == 0;
}
inline int length(int n) { return std::min(n, environment("LENGTH", n)); }
inline int step_rows(int n) { return std::min(n, environment("ROWS", n)); }

// What attention_decode.cu takes, and how far codes are off there: 16-bit queries and weights, f16 cosines (the design's bound).
constexpr double DECODE_BOUND = 1e-3;
inline bool decodes_codes(KvFormat k, KvFormat v, int d) {
    return (d == 64 || d == 128) && k != KvFormat::f16 && v != KvFormat::f16 && !kv_is_scalar(k) && !kv_is_scalar(v);
}

// N sequences of one token.
inline Rows plain_rows(int N) {
    Rows rows;
    for (int n = 0; n < N; n++) rows.add(n, n, 0, true);
    return rows;
}

// Weights in a type of 16 or 32 bits.
struct HostMatrix {
    DType type;
    std::vector<float> f;      // what the matrix holds, exactly
    std::vector<uint8_t> bytes;
    HostMatrix(size_t n, DType type, uint64_t seed) : type(type), f(random_floats(n, seed, 0.1f)), bytes(n * dtype_size(type)) {
        for (size_t i = 0; i < n; i++) {
            const uint16_t h = type == DType::f16 ? to_f16(f[i]).bits : to_bf16(f[i]).bits;
            if (type == DType::f32) memcpy(&bytes[4 * i], &f[i], 4);
            else memcpy(&bytes[2 * i], &h, 2), f[i] = round_to(f[i], type);
        }
    }
    static float round_to(float x, DType type) { return type == DType::f16 ? to_f32(to_f16(x)) : type == DType::bf16 ? to_f32(to_bf16(x)) : x; }
};
inline constexpr DType DTYPES[] = {DType::f32, DType::f16, DType::bf16};

// n values on the device.
template <class T> struct OnDevice {
    const Ops &ops;
    size_t n;
    T *p;
    OnDevice(const Ops &ops, size_t n) : ops(ops), n(n), p((T *)ops.alloc(n * sizeof(T))) {
        const std::vector<uint8_t> poison(n * sizeof(T), 0xff);    // NaN: what an op leaves out is seen
        ops.upload(p, poison.data(), poison.size());
    }
    OnDevice(const Ops &ops, const std::vector<T> &host) : ops(ops), n(host.size()), p((T *)ops.alloc(n * sizeof(T))) {
        ops.upload(p, host.data(), n * sizeof(T));
    }
    OnDevice(const OnDevice &) = delete;
    ~OnDevice() { ops.release(p); }
    std::vector<T> host() const {
        std::vector<T> x(n);
        ops.download(x.data(), p, n * sizeof(T));
        return x;
    }
};

// Announces a step and keeps its scratch.
struct StepOn {
    const Ops &ops;
    void *scratch = nullptr;
    Batch b;
    StepOn(const Ops &ops, const Rows &rows, int Hq, int d, int widest) : ops(ops) {
        scratch = ops.alloc(ops.scratch_bytes({(int)rows.token.size(), Hq, d, widest}));
        b = ops.begin(rows.batch(), scratch);
    }
    ~StepOn() { ops.release(scratch); }
};

// Sequences of random queries, keys and values through the last layer's caches of both, in the same steps.
struct BothCaches {
    Config c;
    const Ops &gpu;
    const int layer;
    std::vector<int> lengths, done;
    std::vector<std::vector<float>> q, k, v;
    KvCache on_cpu, on_gpu;

    BothCaches(const Ops &gpu, const Config &c, const std::vector<int> &lengths, const KvOptions &o, uint64_t seed = 1)
        : c(c), gpu(gpu), layer(c.n_layers - 1), lengths(lengths), done(lengths.size(), 0) {
        int longest = 1;
        for (size_t s = 0; s < lengths.size(); s++) {
            const int n = lengths[s];
            longest = std::max(longest, n);
            q.push_back(random_floats((size_t)n * c.n_heads * c.head_dim, seed + 3 * s, 2.0f));
            k.push_back(random_floats((size_t)n * c.n_kv_heads * c.head_dim, seed + 3 * s + 1));
            v.push_back(random_floats((size_t)n * c.n_kv_heads * c.head_dim, seed + 3 * s + 2));
        }
        kv_cache_open(on_cpu, cpu_ops, c, o, (int)lengths.size(), longest);
        kv_cache_open(on_gpu, gpu, c, o, (int)lengths.size(), longest);
    }
    static int64_t beside_bytes(const KvView &v, bool key) {
        const int64_t records =
            (key ? v.k_format : v.v_format) == KvFormat::deco4 ? v.L * v.B : (int64_t)code_layers(key ? v.k_share : v.v_share, v.L) * v.n_blocks * v.Hkv;
        return (key ? v.k_beside : v.v_beside) ? records * (key ? v.k_beside_bytes : v.v_beside_bytes) : 0;
    }
    // The CPU's cache, byte for byte.  Both pools hand out blocks in the same order.
    void copy_cache() {
        const KvView &a = on_cpu.view, &b = on_gpu.view;
        const int64_t blocks = (int64_t)a.L * a.n_blocks * a.Hkv, exact = (int64_t)a.L * a.B * a.Hkv * a.n_exact() * a.d * 2;
        gpu.upload(b.k_sealed, a.k_sealed, blocks * a.k_block_bytes);
        gpu.upload(b.v_sealed, a.v_sealed, blocks * a.v_block_bytes);
        gpu.upload(b.k_exact, a.k_exact, exact);
        gpu.upload(b.v_exact, a.v_exact, exact);
        if (a.k_beside) gpu.upload(b.k_beside, a.k_beside, beside_bytes(a, true));
        if (a.v_beside) gpu.upload(b.v_beside, a.v_beside, beside_bytes(a, false));
    }
    // The next rows of every sequence: to position until[s].  Results of the GPU, and of the reference if wanted; the CPU's
    // cache is written when the reference is wanted or cpu_too.
    std::vector<float> step(const std::vector<int> &until, std::vector<float> *want, bool cpu_too = true, bool copy = false) {
        const int Hq = c.n_heads, n = c.n_kv_heads * c.head_dim, nq = Hq * c.head_dim;
        Rows rows;
        std::vector<float> qs, ks, vs;
        auto append = [](std::vector<float> &to, const std::vector<float> &from, int p, int n) {
            to.insert(to.end(), from.begin() + (size_t)p * n, from.begin() + (size_t)(p + 1) * n);
        };
        for (size_t s = 0; s < lengths.size(); s++) {
            if (until[s] > done[s]) kv_cache_reserve(on_cpu, (int)s, until[s]), kv_cache_reserve(on_gpu, (int)s, until[s]);
            for (; done[s] < until[s]; done[s]++) {
                rows.add(0, (int)s, done[s], false);
                append(qs, q[s], done[s], nq), append(ks, k[s], done[s], n), append(vs, v[s], done[s], n);
            }
        }
        const Batch b = rows.batch();
        if (b.N == 0) return {};
        std::vector<f16> k16(ks.size()), v16(vs.size());
        if (cpu_too || want) cpu::kv_write(on_cpu.view, layer, k16.data(), v16.data(), ks.data(), vs.data(), b);
        if (want) {
            want->assign(qs.size(), NAN);
            reference::attention(want->data(), qs.data(), on_cpu.view, layer, k16.data(), v16.data(), b, Hq);
        }
        const StepOn on(gpu, rows, Hq, c.head_dim, nq);
        const OnDevice<float> gq(gpu, qs), gk(gpu, ks), gv(gpu, vs), y(gpu, qs.size());
        const OnDevice<f16> gk16(gpu, ks.size()), gv16(gpu, vs.size());
        gpu.kv_write(on_gpu.view, layer, gk16.p, gv16.p, gk.p, gv.p, on.b);
        if (copy) copy_cache();
        gpu.attention(y.p, gq.p, on_gpu.view, layer, gk16.p, gv16.p, on.b, Hq);
        gpu.kv_keep(on_gpu.view, layer, gk16.p, gv16.p, on.b);
        if (cpu_too || want) cpu::kv_keep(on_cpu.view, layer, k16.data(), v16.data(), b);
        return y.host();
    }
    std::vector<int> ends(int back) const {
        std::vector<int> e;
        for (int n : lengths) e.push_back(std::max(0, n - back));
        return e;
    }
};
