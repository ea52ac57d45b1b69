// test_cuda_prefill.cpp - attention of many rows on tensor cores against f64: formats, head shapes, steps of any size at any
// position, windows.  Skips, and says so, without CUDA or without a device.
#include <algorithm>
#include "cuda_case.h"
#include "hadamard.h"
#include "kv_cache.h"

#if WITH_CUDA
namespace cuda {
bool attention_prefill(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
}
#endif

namespace {
// Rows from .. until-1 of a sequence.
struct Span { int from, until; };

// Random sequences whose earlier rows are in the cache of the last layer; a step brings the rows of a span each.
struct Sequences {
    Config c;
    KvCache on_cpu, on_gpu;
    std::vector<std::vector<float>> q, k, v;    // of a sequence: (T, Hq|Hkv|Hkv, d)

    Sequences(const Ops &gpu, const Config &c, const std::vector<int> &lengths, const KvOptions &o) : c(c) {
        for (size_t s = 0; s < lengths.size(); s++) {
            const size_t T = lengths[s], d = c.head_dim;
            q.push_back(random_floats(T * c.n_heads * d, 3 * s + 1, 2.0f));
            k.push_back(random_floats(T * c.n_kv_heads * d, 3 * s + 2));
            v.push_back(random_floats(T * c.n_kv_heads * d, 3 * s + 3));
            for (size_t i = 0; i < k[s].size(); i++) k[s][i] += 2 * std::sin((float)(i % d)), v[s][i] += std::cos((float)(i % d));    // means to code
        }
        kv_cache_open(on_cpu, cpu_ops, c, o, (int)lengths.size(), *std::max_element(lengths.begin(), lengths.end()));
        kv_cache_open(on_gpu, gpu, c, o, (int)lengths.size(), on_cpu.context);
    }
    int layer() const { return c.n_layers - 1; }
    static Rows rows_of(const std::vector<Span> &spans) {
        Rows rows;
        for (size_t s = 0; s < spans.size(); s++)
            for (int p = spans[s].from; p < spans[s].until; p++) rows.add(0, (int)s, p, false);
        return rows;
    }
    static std::vector<float> gather(const std::vector<std::vector<float>> &from, const std::vector<Span> &spans, int n) {
        std::vector<float> x;
        for (size_t s = 0; s < spans.size(); s++)
            x.insert(x.end(), from[s].begin() + (size_t)spans[s].from * n, from[s].begin() + (size_t)spans[s].until * n);
        return x;
    }
    // The CPU's cache after these rows; k16, v16: the rows themselves.
    void write(const std::vector<Span> &spans, std::vector<f16> &k16, std::vector<f16> &v16) {
        const int n = c.n_kv_heads * c.head_dim;
        const std::vector<float> ks = gather(k, spans, n), vs = gather(v, spans, n);
        for (size_t s = 0; s < spans.size(); s++)
            if (spans[s].until > spans[s].from) kv_cache_reserve(on_cpu, (int)s, spans[s].until), kv_cache_reserve(on_gpu, (int)s, spans[s].until);
        k16.resize(ks.size()), v16.resize(vs.size());
        const Rows rows = rows_of(spans);
        cpu::kv_write(on_cpu.view, layer(), k16.data(), v16.data(), ks.data(), vs.data(), rows.batch());
    }
    void feed(const std::vector<Span> &spans) {
        std::vector<f16> k16, v16;
        write(spans, k16, v16);
        const Rows rows = rows_of(spans);
        cpu::kv_keep(on_cpu.view, layer(), k16.data(), v16.data(), rows.batch());
    }
    // The GPU's attention over the CPU's cache; by ops.attention, or the prefill kernels alone.
    std::vector<float> attend(const Ops &gpu, const std::vector<Span> &spans, const std::vector<f16> &k16, const std::vector<f16> &v16,
                              bool *served) const {
        const KvView &a = on_cpu.view, &g = on_gpu.view;
        const int64_t blocks = (int64_t)a.L * a.n_blocks * a.Hkv, exact = (int64_t)a.L * a.B * a.Hkv * a.n_exact() * a.d * 2;
        gpu.upload(g.k_sealed, a.k_sealed, blocks * a.k_block_bytes), gpu.upload(g.v_sealed, a.v_sealed, blocks * a.v_block_bytes);
        gpu.upload(g.k_exact, a.k_exact, exact), gpu.upload(g.v_exact, a.v_exact, exact);
        const Rows rows = rows_of(spans);
        const int Hq = c.n_heads, nq = Hq * c.head_dim;
        const std::vector<uint8_t> poison(gpu.scratch_bytes({(int)rows.token.size(), Hq, c.head_dim, nq}), 0xff);    // NaN
        const OnDevice<uint8_t> scratch(gpu, poison);
        const Batch b = gpu.begin(rows.batch(), scratch.p);
        const std::vector<float> qs = gather(q, spans, nq);
        const OnDevice<float> x(gpu, qs), y(gpu, std::vector<float>(qs.size(), NAN));
        const OnDevice<f16> kd(gpu, k16), vd(gpu, v16);
        if (!served) gpu.attention(y.p, x.p, g, layer(), kd.p, vd.p, b, Hq);
#if WITH_CUDA
        else *served = cuda::attention_prefill(y.p, x.p, g, layer(), kd.p, vd.p, b, Hq);
#endif
        return y.host();
    }

    // ---- reference: rows are rebuilt once a block, then the formula in f64 ----
    template <int D> static void rebuild(double *x, KvFormat format, const uint8_t *block, const int8_t *beside, RopeTable rope, int t, bool key) {
        double plain[D];
        with_format_at<D>(format, [&](auto f) {
            using Format = decltype(f);
            float code[D], mean[D];
            Format::load_code(code, *(const typename Format::Block *)block, beside, t % KV_BLOCK, 0);
            Format::load_plain(mean, *(const typename Format::Block *)block, t % KV_BLOCK, 0);
            for (int i = 0; i < D; i++) x[i] = code[i], plain[i] = mean[i];
            if (Format::rotated) hadamard(x, D);
        });
        for (int j = 0; j < D / 2; j++) {
            double cosine = 1, sine = 0;
            if (key) rope_angle(cosine, sine, rope, t, j, D);
            x[j] += plain[j] * cosine - plain[j + D / 2] * sine;
            x[j + D / 2] += plain[j] * sine + plain[j + D / 2] * cosine;
        }
    }
    std::vector<float> want(const std::vector<Span> &spans, const std::vector<f16> &k16, const std::vector<f16> &v16) const {
        const KvView &kv = on_cpu.view;
        const int d = c.head_dim, Hq = c.n_heads, Hkv = c.n_kv_heads, G = Hq / Hkv;
        const std::vector<float> qs = gather(q, spans, Hq * d);
        std::vector<float> y(qs.size());
        size_t row0 = 0;
        for (int s = 0; s < (int)spans.size(); row0 += spans[s].until - spans[s].from, s++)
            for (int h = 0; h < Hkv; h++) {
                const int p0 = spans[s].from, T = spans[s].until;
                if (p0 == T) continue;
                const int first_end = kv.coded_end(p0, layer()), last_end = kv.coded_end(kv.exact_prefill ? p0 : T - 1, layer());
                std::vector<double> rows[2][2];    // [coded][key]  (T, d); NaN where no row of the step looks
                for (bool coded : {false, true})
                    for (bool key : {false, true}) {
                        std::vector<double> &x = rows[coded][key];
                        x.assign((size_t)T * d, NAN);
                        for (int t = 0; t < T; t++) {
                            const int i = t / KV_BLOCK;
                            if (coded ? i < kv.sink || i >= last_end : i >= kv.sink && i < first_end) continue;
                            std::vector<f16> one((size_t)KV_BLOCK * d);
                            const f16 *ring = (key ? kv.k_exact : kv.v_exact) + kv.exact_at(layer(), s, h, t);
                            const f16 *from = t < p0 ? ring : (key ? k16 : v16).data() + ((row0 + t - p0) * Hkv + h) * d;
                            if (!coded) memcpy(&one[t % KV_BLOCK * d], from, d * sizeof(f16));
                            const uint8_t *block = !coded ? (const uint8_t *)one.data() : key ? kv.k_block(layer(), s, h, i) : kv.v_block(layer(), s, h, i);
                            const KvFormat format = !coded ? KvFormat::f16 : key ? kv.k_format : kv.v_format;
                            const int8_t *beside = coded ? kv.beside(key, layer(), s, h, i) : nullptr;
                            if (d == 64) rebuild<64>(&x[t * d], format, block, beside, kv.rope, t, key);
                            else rebuild<128>(&x[t * d], format, block, beside, kv.rope, t, key);
                        }
                    }
                std::vector<double> p(T), out(d);
                for (int pos = p0; pos < T; pos++)
                    for (int g = 0; g < G; g++) {
                        const size_t at = ((row0 + pos - p0) * Hq + h * G + g) * d;
                        const int end = kv.coded_end(kv.exact_prefill ? p0 : pos, layer());
                        auto row = [&](int t, bool key) { return &rows[t / KV_BLOCK >= kv.sink && t / KV_BLOCK < end][key][(size_t)t * d]; };
                        double sum = 0, max = -INFINITY;
                        for (int t = 0; t <= pos; t++) {
                            const double *x = row(t, true);
                            p[t] = 0;
                            for (int e = 0; e < d; e++) p[t] += qs[at + e] * x[e];
                            max = std::max(max, p[t]);
                        }
                        for (int t = 0; t <= pos; t++) sum += p[t] = std::exp((p[t] - max) / std::sqrt((double)d));
                        out.assign(d, 0.0);
                        for (int t = 0; t <= pos; t++) {
                            const double *x = row(t, false);
                            for (int e = 0; e < d; e++) out[e] += p[t] * x[e];
                        }
                        for (int e = 0; e < d; e++) y[at + e] = (float)(out[e] / sum);
                    }
            }
        return y;
    }
};

// Rounding to f16 is off by at most 2^-11 of the value, hence by at most e = sqrt(2/3) 2^-11 = 4.0e-4 at the root of the mean square for a
// product of two rounded factors.  A score sums d products of q = 2 and k = sqrt(3) (a unit and a mean; root mean squares), over
// sqrt(d): it is off by 2 sqrt(3) e = 1.38e-3, which is the relative error of a weight.  Rounding the weight and the value adds e.
// Errors of different tokens are independent, so that of y is no larger than sqrt(1.38^2 + 0.4^2) 1e-3.
constexpr double PREFILL_BOUND = 1.44e-3;

double check_step(const Ops &gpu, Sequences &s, const std::vector<Span> &spans) {
    std::vector<f16> k16, v16;
    s.write(spans, k16, v16);
    bool served = false;
    const std::vector<float> got = s.attend(gpu, spans, k16, v16, &served), want = s.want(spans, k16, v16);
    CHECK(served);
    const double error = relative_l2(got, want);
    CHECK(error < PREFILL_BOUND);
    return error;
}
}    // namespace

TEST_CASE("cuda prefill: the f64 of this page is the reference's") {
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn2, KvFormat::nsn2b})
        for (bool exact : {false, true}) {
            KvOptions o;
            o.k_format = o.v_format = f, o.sink = o.recent = 64, o.exact_prefill = exact;
            Sequences s(cpu_ops, attention_config(1, 2, 64, 3), {270, 140}, o);
            s.feed({{0, 230}, {0, 30}});
            const std::vector<Span> spans = {{230, 270}, {30, 140}};
            std::vector<f16> k16, v16;
            s.write(spans, k16, v16);
            const std::vector<float> q = s.gather(s.q, spans, 2 * 64), want = s.want(spans, k16, v16);
            std::vector<float> y(q.size());
            const Rows rows = s.rows_of(spans);
            reference::attention(y.data(), q.data(), s.on_cpu.view, s.layer(), k16.data(), v16.data(), rows.batch(), 2);
            CHECK(relative_l2(y, want) < 1e-6);
        }
}

TEST_CASE("cuda prefill: steps of any size at any position, every number of heads") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    int n = 0;
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn2b})
        for (int d : {64, 128})
            for (int from : {0, 1, 63, 64, 65, 80, 200, 1000})
                for (int rows : {9, 64, 65, 300}) {
                    const int G = CASE_GQA[n++ % 7], Hkv = G > 4 ? 1 : 2;
                    if (!taken()) continue;
                    KvOptions o;
                    o.k_format = o.v_format = f;
                    Sequences s(*gpu, attention_config(Hkv, G, d, 1 + n % 3), {from + rows}, o);    // turns 0, 16, 21
                    INFO(std::string(kv_format_name(f)), " d ", d, " from ", from, " rows ", rows, " G ", G);
                    s.feed({{0, from}});
                    worst = std::max(worst, check_step(*gpu, s, {{from, from + rows}}));
                }
    MESSAGE("largest relative error: ", worst);
}

TEST_CASE("cuda prefill: every pair of formats, sinks, recents, exact prefill, several slots") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    for (int k = 0; !kv_is_scalar((KvFormat)k); k++)
        for (int v = 0; !kv_is_scalar((KvFormat)v); v++)
            for (int d : {64, 128})
                for (int kept : {0, 1, 2})
                    for (bool exact : {false, true}) {
                        if ((k != v && (kept != (k + v) % 3 || exact != (k > v))) || !taken()) continue;
                        KvOptions o;
                        o.k_format = (KvFormat)k, o.v_format = (KvFormat)v;
                        o.sink = kept * 64, o.recent = kept % 2 * 128, o.exact_prefill = exact;
                        Sequences s(*gpu, attention_config(2, 2 + kept, d, 1 + v % 2), {420, 64, 200, 9}, o);
                        INFO("K ", std::string(kv_format_name(o.k_format)), " V ", std::string(kv_format_name(o.v_format)),
                             " d ", d, " kept ", kept, " exact ", exact);
                        s.feed({{0, 290}, {0, 1}, {0, 199}, {0, 0}});
                        worst = std::max(worst, check_step(*gpu, s, {{290, 420}, {1, 64}, {199, 200}, {0, 9}}));
                    }
    MESSAGE("largest relative error: ", worst);
}

TEST_CASE("cuda prefill: a row's bits do not depend on the step, the window, or the run") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (KvFormat f : {KvFormat::f16, KvFormat::nsn2})
        for (int d : {64, 128}) {
            if ((f == KvFormat::f16) != (d == 64)) continue;
            KvOptions o;
            o.k_format = o.v_format = f;
            const int n = 3 * d;    // numbers of a row of y
            auto run = [&](int slots, int rows) {    // y of slot 0, rows at a time; the other slots, of the same length, fill the window
                Sequences s(*gpu, attention_config(1, 3, d, 2), std::vector<int>(slots, 260), o);
                std::vector<float> y;
                for (int p = 0; p < 260; p += rows) {
                    const std::vector<Span> spans(slots, Span{p, std::min(260, p + rows)});
                    std::vector<f16> k16, v16;
                    s.write(spans, k16, v16);
                    bool served = false;
                    const std::vector<float> all = s.attend(*gpu, spans, k16, v16, &served);
                    CHECK(served);
                    y.insert(y.end(), all.begin(), all.begin() + (spans[0].until - p) * n);
                    const Rows of = s.rows_of(spans);
                    cpu::kv_keep(s.on_cpu.view, s.layer(), k16.data(), v16.data(), of.batch());
                }
                return y;
            };
            const std::vector<float> want = run(1, 260);
            CHECK(std::count_if(want.begin(), want.end(), [](float x) { return !std::isfinite(x); }) == 0);
            CHECK(run(1, 260) == want);
            for (int rows : {10, 26, 65, 130}) CHECK(run(1, rows) == want);
            CHECK(run(40, 260) == want);     // windows of 6 blocks, or 3 where there are two versions
            CHECK(run(128, 130) == want);    // of 2, or 1
        }
}

TEST_CASE("cuda prefill: more slots than a window has blocks, few rows, and ablated caches go to the general kernel") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    auto served_by = [&](int slots, int rows, unsigned ablate) {
        KvOptions o;
        o.ablate = ablate;
        Sequences s(*gpu, attention_config(1, 1, 64), std::vector<int>(slots, 70), o);
        const std::vector<Span> spans(slots, Span{0, rows});
        std::vector<f16> k16, v16;
        s.write(spans, k16, v16);
        bool served = false;
        s.attend(*gpu, spans, k16, v16, &served);
        CHECK(relative_l2(s.attend(*gpu, spans, k16, v16, nullptr), s.want(spans, k16, v16)) < PREFILL_BOUND);
        return served;
    };
    CHECK(served_by(1, 9, 0));
    CHECK(!served_by(1, 8, 0));
    CHECK(!served_by(20, 1, 0));
    CHECK(served_by(256, 2, 0));
    CHECK(!served_by(300, 2, 0));
    CHECK(!served_by(1, 70, NO_HADAMARD));
}
