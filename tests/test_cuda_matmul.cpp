// test_cuda_matmul.cpp - the GPU's products against the f64 reference, and the promise that a row does not depend on its
// neighbours.  Skips, and says so, without CUDA or without a device.
#include <cfloat>
#include "product_case.h"

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
                    if (!through_few(type, N, in) && type == DType::f16)
                        for (float &e : x) e = HostMatrix::round_to(e, type);    // as the GPU does
                    reference::matmul(want.data(), x.data(), {W.f.data(), DType::f32}, N, in, out);
                    INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type);
                    // `in` additions, each off by at most 2^-23 of a partial sum (tensor cores cut off), none exceeds sum |x||w|;
                    // with bf16 weights cuBLAS is given x as two numbers, together off by 2^-16 |x|, and adds twice
                    const double bound = N > FEW_ROWS && type == DType::bf16 ? 2 * (in + 8) * 0x1p-23 + 0x1p-16 : (in + 8) * 0x1p-23;
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

TEST_CASE("cuda: matmul of few rows gives a row the same bits alone, among others, and again") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (int in : {100, 520, 1032, 4096, 4616, 14336})    // from 4,616 on more of 8 rows than shared memory holds
        for (DType type : DTYPES) {
            const int out = in == 520 ? MANY_OUTS : 70, N = rows_as_alone(type, in);
            CHECK(N >= 4);
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

TEST_CASE("cuda: qkv, unembed and gated against the norm and the products in f64, matmul_add against matmul") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    for (DType type : DTYPES)
        for (DType up_type : {type, DType::f32})
            for (int in : {7, 8, 40, 288, 1032, 4096, 14336})
                for (int out : {1, 3, 6, 33, 100, 4400, 9000})
                    for (int N : {1, 3, 4, 5, 8, 9, 17}) {
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
                        const NormedProducts normed(host, N, in, type == DType::f16 && up_type == type, any_f16 && !through_few(DType::f16, N, in), any_bf16, eps);
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

TEST_CASE("cuda: qkv and gated of few rows give a row the same bits alone, among others, and again") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (int in : {8, 100, 1032, 4096, 4616})
        for (DType type : DTYPES) {
            if (!taken()) continue;
            const int out = 70, kv_out = 20, N = rows_as_alone(type, in);
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
