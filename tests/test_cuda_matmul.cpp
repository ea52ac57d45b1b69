// test_cuda_matmul.cpp - the GPU's products against the f64 reference, and the promise that a row does not depend on its
// neighbours.  Skips, and says so, without CUDA or without a device.
#include <cfloat>
#include "cuda_case.h"

namespace reference {
void matmul(float *y, const float *x, Matrix W, int N, int in, int out);
}

constexpr int GEMV_ROWS = 8, BATCH_ROWS = 32;    // of gemv.cuh
#if WITH_CUDA
namespace cuda {
bool gemm_batch_serves(DType type, int N, int in);
}
static bool through_cublas(DType type, int N, int in) { return N > GEMV_ROWS && !cuda::gemm_batch_serves(type, N, in); }
#else
static bool through_cublas(DType, int, int) { return false; }
#endif

constexpr int MANY_OUTS = 40000;    // 19 tiles of 16 for each of 132 thread blocks: more than are added up at a time

TEST_CASE("cuda: matmul against the reference in f64") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    for (DType type : DTYPES)
        for (int in : {1, 7, 8, 9, 64, 100, 504, 520, 1016, 1024, 1032, 2080})
            for (int out : {1, 3, 4, 5, 33, 128, MANY_OUTS})
                for (int N : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33}) {
                    if (out == MANY_OUTS && (in != 64 || type != DType::f16)) continue;
                    if (!taken()) continue;
                    const HostMatrix W((size_t)in * out, type, in * 1000 + out);
                    std::vector<float> x = random_floats((size_t)N * in, N), want((size_t)N * out);
                    const StepOn step(*gpu, plain_rows(N), 1, 8, in);
                    const OnDevice<uint8_t> w(*gpu, W.bytes);
                    const OnDevice<float> xs(*gpu, x), y(*gpu, (size_t)N * out);
                    gpu->matmul(y.p, xs.p, {w.p, type}, N, in, out);
                    const std::vector<float> got = y.host();
                    if (N > GEMV_ROWS && type == DType::f16)
                        for (float &e : x) e = HostMatrix::round_to(e, type);    // as the GPU does
                    reference::matmul(want.data(), x.data(), {W.f.data(), DType::f32}, N, in, out);
                    INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type);
                    // `in` additions, each off by at most 2^-23 of a partial sum (tensor cores cut off), none exceeds sum |x||w|;
                    // with bf16 weights cuBLAS is given x as two numbers, together off by 2^-16 |x|, and adds twice
                    const double bound = N > GEMV_ROWS && type == DType::bf16 ? 2 * (in + 8) * 0x1p-23 + 0x1p-16 : (in + 8) * 0x1p-23;
                    bool within = true;
                    for (int n = 0; n < N; n++)
                        for (int o = 0; o < out; o++) {
                            double size = 0;
                            for (int i = 0; i < in; i++) size += std::fabs((double)x[n * in + i] * W.f[o * in + i]);
                            const double error = std::fabs(got[n * out + o] - want[n * out + o]) / size;
                            worst = std::max(worst, error);
                            within = within && error <= bound;
                        }
                    CHECK(within);
                }
    MESSAGE("largest error over sum |x||w|: ", worst);
}

TEST_CASE("cuda: matmul of up to 8 rows gives a row the same bits alone, among others, and again") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (int in : {100, 520, 1032, 4096, 4616, 14336})    // from 4,616 on more of 8 rows than shared memory holds
        for (DType type : DTYPES) {
            const int out = in == 520 ? MANY_OUTS : 70, N = GEMV_ROWS;
            if ((in == 520 && type != DType::f16) || !taken()) continue;
            const HostMatrix W((size_t)in * out, type, 2);
            const OnDevice<uint8_t> w(*gpu, W.bytes);
            const OnDevice<float> x(*gpu, random_floats((size_t)N * in, 1)), all(*gpu, (size_t)N * out), some(*gpu, (size_t)N * out);
            const StepOn step(*gpu, plain_rows(N), 1, 8, in);
            gpu->matmul(all.p, x.p, {w.p, type}, N, in, out);
            const std::vector<float> want = all.host();
            for (int rows = 1; rows <= N; rows++)
                for (int n = 0; n + rows <= N; n += rows) {
                    gpu->matmul(some.p, x.p + (size_t)n * in, {w.p, type}, rows, in, out);
                    CHECK(same_bits(some.host().data(), &want[(size_t)n * out], (size_t)rows * out));
                }
        }
}

// The products of n = rmsnorm(x), in f64, and the bound on what a result may be off by.
struct NormedProducts {
    int in;
    std::vector<float> gain;
    std::vector<double> n;     // (N,in)
    double bound;              // of an error, over sum |n||w| and what `least` adds
    std::vector<double> least; // (N) what a small |n| is off by where g x is rounded to f16 before it is divided by rms(x)
    NormedProducts(const std::vector<float> &x, int N, int in, bool fused, bool rounds, bool bf16, float eps) : in(in), gain(random_floats(in, 6)) {
        for (int r = 0; r < N; r++) {
            double squares = 0;
            for (int i = 0; i < in; i++) squares += (double)x[(size_t)r * in + i] * x[(size_t)r * in + i];
            for (int i = 0; i < in; i++) n.push_back(gain[i] * x[(size_t)r * in + i] / std::sqrt(squares / in + eps));
            least.push_back(rounds && fused ? 0x1p-25 / std::sqrt(squares / in + eps) : 0);
        }
        // additions as in matmul alone.  In n: a few roundings of f32; fused, 2^-21 of the squares and x in 22 bits; many rows: of
        // f16, or to two bf16 numbers
        bound = (in + 16) * 0x1p-23 + (fused ? 0x1p-20 : 0);
        if (rounds) bound += 0x1.01p-11;
        if (N > GEMV_ROWS && bf16) bound += in * 0x1p-23 + 0x1p-16;
    }
    // Output o of row r, and the size that the bound is of.
    double operator()(const HostMatrix &W, int r, int o, double *size) const {
        double sum = 0;
        *size = 0;
        for (int i = 0; i < in; i++) {
            const double p = n[(size_t)r * in + i] * W.f[(size_t)o * in + i];
            sum += p, *size += std::fabs(p) + least[r] / bound * std::fabs(W.f[(size_t)o * in + i]);
        }
        return sum;
    }
};

TEST_CASE("cuda: qkv, unembed and gated against the norm and the products in f64, matmul_add against matmul") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    for (DType type : DTYPES)
        for (DType up_type : {type, DType::f32})
            for (int in : {7, 8, 40, 288, 1032, 4096, 14336})
                for (int out : {1, 3, 6, 33, 100, 4400, 9000})
                    for (int N : {1, 3, 8, 9, 17}) {
                        if (in > 2000 && (out != 33 || up_type != type)) continue;    // the time it takes
                        // thread blocks of several tiles, and of more than are added up at a time
                        if ((out == 4400 && !(in == 1032 && type == DType::f16)) || (out == 9000 && in != 40)) continue;
                        if (!taken()) continue;
                        INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type, " ", (int)up_type);
                        const int kv_out = out / 2 + 1;
                        const float eps = 1e-5f;
                        const HostMatrix A((size_t)in * out, type, 1), B((size_t)in * out, up_type, 2);
                        std::vector<float> host = random_floats((size_t)N * in, 4);
                        for (int r = 0; r < N; r++)    // a row of large values, of small ones, and one in between
                            for (int i = 0; i < in; i++) host[(size_t)r * in + i] *= r % 3 == 0 ? 3.0f : r % 3 == 1 ? 1000.0f : 0.01f;
                        const bool any_f16 = type == DType::f16 || up_type == DType::f16, any_bf16 = type == DType::bf16 || up_type == DType::bf16;
                        const NormedProducts normed(host, N, in, type == DType::f16 && up_type == type, any_f16 && N > GEMV_ROWS, any_bf16, eps);
                        const OnDevice<uint8_t> wa(*gpu, A.bytes), wb(*gpu, B.bytes);
                        const OnDevice<float> x(*gpu, host), gain(*gpu, normed.gain), xn(*gpu, host.size());
                        const Norm norm = {gain.p, eps};
                        const StepOn step(*gpu, plain_rows(N), 1, 8, in);
                        const size_t n_out = (size_t)N * out, n_kv = (size_t)N * kv_out;
                        const OnDevice<float> q(*gpu, n_out), k(*gpu, n_kv), v(*gpu, n_kv), gate(*gpu, n_out), up(*gpu, n_out), y(*gpu, n_out);
                        gpu->qkv(q.p, k.p, v.p, xn.p, x.p, norm, {wa.p, type}, {wb.p, up_type}, {wb.p, up_type}, N, in, out, kv_out);
                        gpu->gated(gate.p, up.p, xn.p, x.p, norm, {wa.p, type}, {wb.p, up_type}, N, in, out);
                        gpu->unembed(y.p, xn.p, x.p, norm, {wa.p, type}, N, in, out);
                        const std::vector<float> qs = q.host(), ks = k.host(), vs = v.host(), gates = gate.host(), logits = y.host();
                        bool within = true;
                        for (int r = 0; r < N; r++)
                            for (int o = 0; o < out; o++) {
                                double size, up_size;
                                const double want = normed(A, r, o, &size), want_up = normed(B, r, o, &up_size), e = 1.0 + std::exp(-want);
                                const double error = std::fabs(qs[r * out + o] - want) / size;
                                worst = std::max(worst, error / normed.bound);
                                within = within && error <= normed.bound;
                                if (up_type == type) within = within && std::fabs(logits[r * out + o] - want) <= normed.bound * size;
                                if (o < kv_out) within = within && std::fabs(ks[r * kv_out + o] - want_up) <= normed.bound * up_size;
                                // silu is no steeper than 1.1
                                const double slack =
                                    normed.bound * (1.1 * size * (std::fabs(want_up) + normed.bound * up_size) + std::fabs(want / e) * up_size);
                                within = within && std::fabs(gates[r * out + o] - want / e * want_up) <= slack + 1e-6 * std::fabs(want / e * want_up) + FLT_MIN;
                            }
                        CHECK(within);
                        CHECK(ks == vs);

                        const std::vector<float> old = random_floats(n_out, 5);
                        const OnDevice<float> sum(*gpu, old);
                        gpu->matmul(y.p, x.p, {wa.p, type}, N, in, out);
                        gpu->matmul_add(sum.p, x.p, {wa.p, type}, N, in, out, {});
                        const std::vector<float> sums = sum.host(), products = y.host();
                        bool added = true;
                        for (size_t i = 0; i < n_out; i++) {
                            // cuBLAS may add old first: its sum is off by a rounding of each partial sum
                            const int r = (int)i / out, o = (int)i % out;
                            double size = 0;
                            for (int j = 0; j < in; j++) size += std::fabs((double)host[(size_t)r * in + j] * A.f[(size_t)o * in + j]);
                            const double slack = through_cublas(type, N, in) ? in * 0x1p-22 * (std::fabs(old[i]) + size)
                                                                             : 0x1p-24 * (std::fabs(old[i]) + std::fabs(products[i]));
                            added = added && std::fabs(sums[i] - ((double)old[i] + products[i])) <= slack;
                        }
                        CHECK(added);
                    }
    MESSAGE("largest error of q over its bound: ", worst);
}

TEST_CASE("cuda: qkv and gated of up to 8 rows give a row the same bits alone, among others, and again") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (int in : {8, 100, 1032, 4096, 4616})
        for (DType type : DTYPES) {
            if (!taken()) continue;
            const int out = 70, kv_out = 20, N = GEMV_ROWS;
            const HostMatrix W((size_t)2 * in * out, type, 2);
            const OnDevice<uint8_t> w(*gpu, W.bytes);
            const Matrix first = {w.p, type}, second = {w.p + W.bytes.size() / 2, type};
            const OnDevice<float> x(*gpu, random_floats((size_t)N * in, 1)), gain(*gpu, random_floats(in, 3)), xn(*gpu, (size_t)N * in);
            const OnDevice<float> q(*gpu, (size_t)N * out), k(*gpu, (size_t)N * kv_out), v(*gpu, (size_t)N * kv_out), gate(*gpu, (size_t)N * out),
                up(*gpu, (size_t)N * out);
            const StepOn step(*gpu, plain_rows(N), 1, 8, in);
            auto run = [&](int n, int rows) {    // everything, one after the other
                const float *at = x.p + (size_t)n * in;
                gpu->qkv(q.p, k.p, v.p, xn.p, at, {gain.p, 1e-5f}, first, second, second, rows, in, out, kv_out);
                gpu->gated(gate.p, up.p, xn.p, at, {gain.p, 1e-5f}, first, second, rows, in, out);
                return std::vector<std::vector<float>>{q.host(), k.host(), v.host(), gate.host()};
            };
            const auto want = run(0, N);
            for (int rows = 1; rows <= N; rows++)
                for (int n = 0; n + rows <= N; n += rows) {
                    const auto got = run(n, rows);
                    for (size_t i = 0; i < got.size(); i++) {
                        const size_t outs = want[i].size() / N;
                        CHECK(same_bits(got[i].data(), &want[i][n * outs], rows * outs));
                    }
                }
        }
}

// Clusters of 4, 2 and 1 thread blocks, and several rounds of tiles, with a last one that is not full.
TEST_CASE("cuda: products of 9 to 32 rows against f64, and a row's bits in any of them") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    if (through_cublas(DType::f16, BATCH_ROWS, 8)) {
        MESSAGE("SKIPPED: this device has too little shared memory a thread block");
        return;
    }
    struct Case { int in, out; };
    for (const Case c : {Case{8, 20}, {200, 100}, {1032, 1000}, {72, 6001}, {72, 12005}, {72, 16005}, {136, 23400}, {72, 34100}}) {
        if (!taken()) continue;
        INFO("in ", c.in, " out ", c.out);
        const int N = BATCH_ROWS, n_out = c.out / 2;
        const HostMatrix W((size_t)c.in * c.out, DType::f16, 2);
        const OnDevice<uint8_t> w(*gpu, W.bytes);
        const Matrix all = {w.p, DType::f16}, up = {w.p + (size_t)n_out * c.in * 2, DType::f16};
        std::vector<float> host = random_floats((size_t)N * c.in, 1);
        for (float &e : host) e = HostMatrix::round_to(e, DType::f16);    // as the GPU does where there is no norm
        const std::vector<float> old = random_floats((size_t)N * c.out, 5);
        const OnDevice<float> x(*gpu, host), gain(*gpu, random_floats(c.in, 6)), xn(*gpu, host.size()), y(*gpu, old.size()), gate(*gpu, (size_t)N * n_out),
            room(*gpu, (size_t)N * n_out);
        const StepOn step(*gpu, plain_rows(N), 1, 8, c.in);
        const NormedProducts normed(host, N, c.in, true, true, false, 1e-5f);
        auto run = [&](int n, int rows) {
            gpu->upload(y.p, old.data() + (size_t)n * c.out, (size_t)rows * c.out * 4);
            gpu->matmul_add(y.p, x.p + (size_t)n * c.in, all, rows, c.in, c.out, {});
            gpu->gated(gate.p, room.p, xn.p, x.p + (size_t)n * c.in, {gain.p, 1e-5f}, all, up, rows, c.in, n_out);
            return std::vector<std::vector<float>>{y.host(), gate.host()};
        };
        const auto want = run(0, N);
        bool within = true;
        for (int r = 0; r < N; r++) {
            for (int o = 0; o < c.out; o++) {
                double sum = old[(size_t)r * c.out + o], size = std::fabs(sum);
                for (int i = 0; i < c.in; i++) {
                    const double product = (double)host[(size_t)r * c.in + i] * W.f[(size_t)o * c.in + i];
                    sum += product, size += std::fabs(product);
                }
                within = within && std::fabs(want[0][(size_t)r * c.out + o] - sum) <= (c.in + 8) * 0x1p-23 * size;
            }
            for (int o = 0; o < n_out; o++) {
                double size, up_size;
                const double g = normed(W, r, o, &size), u = normed(W, r, n_out + o, &up_size), e = 1.0 + std::exp(-g);
                const double slack = normed.bound * (1.1 * size * (std::fabs(u) + normed.bound * up_size) + std::fabs(g / e) * up_size);
                within = within && std::fabs(want[1][(size_t)r * n_out + o] - g / e * u) <= slack + 1e-6 * std::fabs(g / e * u) + FLT_MIN;
            }
        }
        CHECK(within);
        for (int rows : {9, 15, 16, 17, 24, 31, 32})
            for (int n : {0, N - rows}) {
                const auto got = run(n, rows);
                CHECK(same_bits(got[0].data(), &want[0][(size_t)n * c.out], (size_t)rows * c.out));
                CHECK(same_bits(got[1].data(), &want[1][(size_t)n * n_out], (size_t)rows * n_out));
            }
    }
}

TEST_CASE("cuda: a product of 9 to 32 rows takes over what the one before made of its x, with the same bits") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    struct Case { int in, mid, out; };    // mid: what is taken over; in a multiple of 64 only
    for (const Case c : {Case{64, 64, 33}, {200, 128, 100}, {328, 4160, 72}, {72, 9024, 136}, {136, 100, 40}})
        for (int N : {9, 16, 17, 32}) {
            if (!taken()) continue;
            INFO("in ", c.in, " mid ", c.mid, " out ", c.out, " N ", N);
            const HostMatrix A((size_t)c.in * c.mid, DType::f16, 1), B((size_t)c.mid * c.out, DType::f16, 2);
            const std::vector<float> old = random_floats((size_t)N * c.mid, 3), other = random_floats((size_t)N * c.mid, 4);
            const OnDevice<uint8_t> a(*gpu, A.bytes), b(*gpu, B.bytes);
            const Matrix wa = {a.p, DType::f16}, wb = {b.p, DType::f16};
            const OnDevice<float> x(*gpu, random_floats((size_t)N * c.in, 5)), gain(*gpu, random_floats(c.mid, 6)), in_gain(*gpu, random_floats(c.in, 7));
            const OnDevice<float> y(*gpu, old.size()), room(*gpu, old.size()), xn(*gpu, old.size() + (size_t)N * c.in);
            const OnDevice<float> q(*gpu, (size_t)N * c.out), k(*gpu, (size_t)N * c.out), v(*gpu, (size_t)N * c.out);
            const Norm norm = {gain.p, 1e-5f};
            const StepOn step(*gpu, plain_rows(N), 1, 8, std::max(c.in, c.mid));
            enum Way { TAKEN_OVER, NOT_SAID, WRITTEN_BETWEEN };
            auto added = [&](Way way) {    // y += A x, then the products of the normalised y
                gpu->upload(y.p, old.data(), old.size() * 4);
                gpu->matmul_add(y.p, x.p, wa, N, c.in, c.mid, way == NOT_SAID ? Norm{} : norm);
                if (way == WRITTEN_BETWEEN) gpu->upload(y.p, other.data(), other.size() * 4);
                gpu->qkv(q.p, k.p, v.p, xn.p, y.p, norm, wb, wb, wb, N, c.mid, c.out, c.out);
                return q.host();
            };
            auto gated = [&](Way way) {    // y = gated(x), then its product
                gpu->gated(y.p, room.p, xn.p, x.p, {in_gain.p, 1e-5f}, wa, wa, N, c.in, c.mid);
                if (way == NOT_SAID) {     // the same y, but nobody knows
                    const std::vector<float> same = y.host();
                    gpu->upload(y.p, same.data(), same.size() * 4);
                }
                if (way == WRITTEN_BETWEEN) gpu->upload(y.p, other.data(), other.size() * 4);
                gpu->matmul(q.p, y.p, wb, N, c.mid, c.out);
                return q.host();
            };
            auto fresh = [&](bool normed) {    // of rows that nobody has made anything of
                const OnDevice<float> z(*gpu, other);
                if (normed) gpu->qkv(q.p, k.p, v.p, xn.p, z.p, norm, wb, wb, wb, N, c.mid, c.out, c.out);
                else gpu->matmul(q.p, z.p, wb, N, c.mid, c.out);
                return q.host();
            };
            CHECK(same_bits(added(TAKEN_OVER).data(), added(NOT_SAID).data(), q.n));
            CHECK(same_bits(added(WRITTEN_BETWEEN).data(), fresh(true).data(), q.n));
            CHECK(same_bits(gated(TAKEN_OVER).data(), gated(NOT_SAID).data(), q.n));
            CHECK(same_bits(gated(WRITTEN_BETWEEN).data(), fresh(false).data(), q.n));
        }
}
