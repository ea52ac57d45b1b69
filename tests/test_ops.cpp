// test_ops.cpp - every small op against its reference, and the promise that a row does not depend on its neighbours.
#include <doctest/doctest.h>
#include <cfloat>
#include <omp.h>
#include "cases.h"
#include "../kernels/simd.h"

namespace reference {
void matmul(float *y, const float *x, Matrix W, int N, int in, int out);
void swiglu(float *gate, const float *up, int64_t n);
}

// A random matrix in one of the dtypes.
struct TestMatrix {
    std::vector<float> f;
    std::vector<uint16_t> h;
    Matrix m;
    TestMatrix(size_t n, DType type, uint64_t seed) : f(random_floats(n, seed, 0.1f)), h(n) {
        for (size_t i = 0; i < n; i++) h[i] = type == DType::f16 ? to_f16(f[i]).bits : to_bf16(f[i]).bits;
        m = {type == DType::f32 ? (const void *)f.data() : h.data(), type};
    }
};

TEST_CASE("f16 and bf16 round to nearest even and survive the way back") {
    for (int i = 0; i < 65536; i++) {
        const f16 h{(uint16_t)i};
        const bf16 b{(uint16_t)i};
        if ((i & 0x7fff) <= 0x7c00) CHECK(to_f16(to_f32(h)).bits == i);
        if ((i & 0x7fff) <= 0x7f80) CHECK(to_bf16(to_f32(b)).bits == i);
    }
    CHECK(to_f16(1.0f + 0x1p-11f).bits == 0x3c00);    // a tie goes to even
    CHECK(to_f16(1.0f + 0x3p-11f).bits == 0x3c02);
    CHECK(to_f16(65519.0f).bits == 0x7bff);
    CHECK(to_f16(65520.0f).bits == 0x7c00);
    CHECK(to_f16(0x1p-25f).bits == 0);
    CHECK(to_f16(0x1.8p-25f).bits == 1);
    CHECK(to_bf16(1.0f + 0x1p-8f).bits == 0x3f80);
    CHECK(to_bf16(1.0f + 0x3p-8f).bits == 0x3f82);
    CHECK(std::isnan(to_f32(to_f16(NAN))));
    CHECK(std::isnan(to_f32(to_bf16(NAN))));
}

TEST_CASE("every f16 and bf16 among sixteen is widened as alone") {
    for (int first = 0; first < 65536; first += LANES) {
        uint16_t bits[LANES];
        for (int i = 0; i < LANES; i++) bits[i] = (uint16_t)(first + i);
        float halves[LANES], bfs[LANES];
        store16(halves, load16((const f16 *)bits)), store16(bfs, load16((const bf16 *)bits));
        for (int i = 0; i < LANES; i++) {
            const float h = to_f32(f16{bits[i]}), b = to_f32(bf16{bits[i]});
            CHECK((f32_to_bits(halves[i]) == f32_to_bits(h) || (std::isnan(halves[i]) && std::isnan(h))));
            CHECK((f32_to_bits(bfs[i]) == f32_to_bits(b) || (std::isnan(bfs[i]) && std::isnan(b))));
        }
    }
}

TEST_CASE("exp16 against exp") {
    double worst = 0;
    for (float x = 0; x > -87.0f; x -= 0.00137f) {
        float e[LANES];
        store16(e, exp16(splat16(x)));
        worst = std::max(worst, std::fabs(e[7] - std::exp((double)x)) / std::exp((double)x));
    }
    CHECK(worst < 2e-7);
    float e[LANES];
    store16(e, exp16(splat16(-INFINITY)));
    CHECK(e[0] == 0.0f);
    store16(e, exp16(splat16(0.0f)));
    CHECK(e[0] == 1.0f);
}

TEST_CASE("matmul against the reference in f64") {
    for (DType type : {DType::f32, DType::f16, DType::bf16})
        for (int in : {1, 8, 15, 16, 17, 31, 32, 33, 100, 512})
            for (int out : {1, 3, 4, 5, 31, 32, 33, 67})
                for (int N : {1, 2, 3, 4, 5, 8, 9, 33}) {
                    const TestMatrix W((size_t)in * out, type, in * 1000 + out);
                    const std::vector<float> x = random_floats((size_t)N * in, N);
                    std::vector<float> y((size_t)N * out, NAN), z(y);
                    cpu::matmul(y.data(), x.data(), W.m, N, in, out);
                    reference::matmul(z.data(), x.data(), W.m, N, in, out);
                    INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type);
                    // in/16 + 4 additions, each off by at most 2^-24 of a partial sum, and none exceeds sum |x||w|
                    bool within = true;
                    for (int n = 0; n < N; n++)
                        for (int o = 0; o < out; o++) {
                            double size = 0;
                            for (int i = 0; i < in; i++) size += std::fabs(x[n * in + i] * W.f[o * in + i]);
                            within = within && std::fabs(y[n * out + o] - z[n * out + o]) <= (in / 16 + 8) * 0x1p-24 * size;
                        }
                    CHECK(within);
                }
}

TEST_CASE("matmul: a row alone and among others, and any number of threads, give the same bits") {
    const int in = 333, out = 70, N = 40;
    const std::vector<float> x = random_floats((size_t)N * in, 1);
    for (DType type : {DType::f32, DType::f16, DType::bf16}) {
        const TestMatrix W((size_t)in * out, type, 2);
        std::vector<float> all((size_t)N * out), one(out);
        cpu::matmul(all.data(), x.data(), W.m, N, in, out);
        const int threads = omp_get_max_threads();
        for (int t : {1, 2, 3}) {
            omp_set_num_threads(t);
            for (int rows : {1, 2, 3, 4, 5, 7})
                for (int n = 0; n + rows <= N; n += rows) {
                    one.resize((size_t)rows * out);
                    cpu::matmul(one.data(), &x[(size_t)n * in], W.m, rows, in, out);
                    CHECK(same_bits(one.data(), &all[(size_t)n * out], one.size()));
                }
        }
        omp_set_num_threads(threads);
    }
}

TEST_CASE("swiglu against the reference") {
    for (int n : {1, 15, 16, 17, 1000}) {
        std::vector<float> gate = random_floats(n, n, 10.0f), up = random_floats(n, n + 1), want = gate;
        gate[0] = want[0] = -200.0f;    // e^200 is beyond f32
        cpu::swiglu(gate.data(), up.data(), n);
        reference::swiglu(want.data(), up.data(), n);
        for (int i = 0; i < n; i++) CHECK(std::fabs(gate[i] - want[i]) <= 5e-7 * std::fabs(want[i]) + FLT_MIN);
    }
}

TEST_CASE("matmul_add, unembed, qkv and gated are made of rmsnorm, matmul and swiglu, bit for bit") {
    for (int in : {8, 40, 288})
        for (int N : {1, 3, 8, 9}) {
            const int out = 24, kv_out = 17;
            const TestMatrix A((size_t)in * out, DType::bf16, 1), B((size_t)in * out, DType::f32, 2), C((size_t)in * kv_out, DType::f16, 3);
            const std::vector<float> x = random_floats((size_t)N * in, 4, 3.0f), gain = random_floats(in, 6), old = random_floats((size_t)N * out, 5);
            const Norm norm = {gain.data(), 1e-5f};
            std::vector<float> n(x.size()), xn(x.size(), NAN);
            cpu::rmsnorm(n.data(), x.data(), norm.weight, norm.eps, N, in);
            auto product = [&](const std::vector<float> &of, const TestMatrix &W, int outs) {
                std::vector<float> y((size_t)N * outs);
                cpu::matmul(y.data(), of.data(), W.m, N, in, outs);
                return y;
            };
            std::vector<float> sum = old, added = product(x, A, out), a = product(n, A, out), b = product(n, B, out), c = product(n, C, kv_out);
            cpu::matmul_add(sum.data(), x.data(), A.m, N, in, out, {});
            for (size_t i = 0; i < sum.size(); i++) CHECK(sum[i] == old[i] + added[i]);
            std::vector<float> q(a.size()), k(c.size()), v(c.size()), up(a.size());
            cpu::qkv(q.data(), k.data(), v.data(), xn.data(), x.data(), norm, A.m, C.m, C.m, N, in, out, kv_out);
            CHECK(q == a);
            CHECK(k == c);
            CHECK(v == c);
            cpu::unembed(q.data(), xn.data(), x.data(), norm, B.m, N, in, out);
            CHECK(q == b);
            cpu::gated(q.data(), up.data(), xn.data(), x.data(), norm, A.m, B.m, N, in, out);
            cpu::swiglu(a.data(), b.data(), (int64_t)a.size());
            CHECK(q == a);
        }
}

TEST_CASE("rmsnorm against the formula") {
    for (int D : {1, 7, 16, 300})
        for (int N : {1, 5}) {
            const std::vector<float> x = random_floats((size_t)N * D, D), w = random_floats(D, 3);
            std::vector<float> y(x.size());
            cpu::rmsnorm(y.data(), x.data(), w.data(), 1e-3f, N, D);
            for (int n = 0; n < N; n++) {
                long double sum = 0;
                for (int i = 0; i < D; i++) sum += (long double)x[n * D + i] * x[n * D + i];
                for (int i = 0; i < D; i++) {
                    const double want = w[i] * x[n * D + i] / sqrtl(sum / D + (long double)1e-3f);
                    CHECK(std::fabs(y[n * D + i] - want) <= 4e-7 * std::fabs(want));
                }
            }
        }
}

TEST_CASE("rope turns pairs (j, j + d/2) by pos * freq[j]") {
    for (int d : CASE_HEAD_DIMS) {
        Config c = attention_config(1, 2, d);
        c.rope_theta = 500000.0f;
        KvCache cache;
        kv_cache_open(cache, cpu_ops, c, {}, 1, 4096);
        const std::vector<double> freq = rope_frequencies(c);
        Rows rows;
        for (int p : {0, 1, 63, 64, 65, 4095}) rows.add(0, 0, p, false);
        const std::vector<float> q = random_floats(rows.pos.size() * 2 * d, d);
        std::vector<float> y = q;
        cpu::rope(y.data(), rows.batch(), cache.view.rope, 2, d);
        for (size_t n = 0; n < rows.pos.size(); n++)
            for (int h = 0; h < 2; h++)
                for (int j = 0; j < d / 2; j++) {
                    const size_t lo = (n * 2 + h) * d + j, hi = lo + d / 2;
                    const double a = rows.pos[n] * freq[j], scale = std::hypot(q[lo], q[hi]);
                    CHECK(std::fabs(y[lo] - (q[lo] * cos(a) - q[hi] * sin(a))) < 4e-7 * scale);
                    CHECK(std::fabs(y[hi] - (q[lo] * sin(a) + q[hi] * cos(a))) < 4e-7 * scale);
                }
    }
}

TEST_CASE("embed and gather pick rows") {
    const int V = 9, D = 20;
    for (DType type : {DType::f32, DType::f16, DType::bf16}) {
        const TestMatrix W(V * D, type, 5);
        const std::vector<float> &f = W.f;
        Rows rows;
        for (int id : {8, 0, 3}) rows.add(id, id, 0, true);
        std::vector<float> x(3 * D), y(2 * D);
        cpu::embed(x.data(), W.m, rows.batch(), D);
        for (int n = 0; n < 3; n++)
            for (int i = 0; i < D; i++) {
                const int at = rows.token[n] * D + i;
                const float want = type == DType::f32 ? f[at] : type == DType::f16 ? to_f32(to_f16(f[at])) : to_f32(to_bf16(f[at]));
                CHECK(x[n * D + i] == want);
            }
        const int pick[] = {2, 0};
        cpu::gather(y.data(), x.data(), pick, 2, D);
        CHECK(same_bits(&y[0], &x[2 * D], D));
        CHECK(same_bits(&y[D], &x[0], D));
    }
}
