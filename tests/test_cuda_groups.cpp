// test_cuda_groups.cpp - weights in q8 and q4 on the GPU against the f64 reference.  Skips, and says so, without CUDA or a device.
#include <cfloat>
#include <doctest/doctest.h>
#include "device.h"
#include "product_case.h"
#include "temp_files.h"

namespace {
// `in` additions, each off by at most 2^-23 of a partial sum (tensor cores cut off), none exceeds sum |x||w|; few rows are
// integers of 24 bits of a group's largest |x|, off by one at most: half of it and what the division loses.
double product_bound(const float *x, const float *w, int in, bool few) {
    double bound = 0;
    for (int k = 0; k < in; k += GROUP) {
        double size = 0, sum = 0, top = 0;
        for (int i = k; i < k + GROUP; i++) size += std::fabs((double)x[i] * w[i]), sum += std::fabs(w[i]), top = std::max(top, std::fabs((double)x[i]));
        bound += (in + 8) * 0x1p-23 * size + (few ? top / (127 * 65536) * sum : 0);
    }
    return bound;
}
}    // namespace

TEST_CASE("cuda: matmul of q8 and q4 against the reference in f64") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    // 64 and 128: what the fast kernel takes a multiple of; 1,024 and 2,048: a stage; 4,224 x 8: more of x than shared memory holds
    for (DType type : GROUPED)
        for (int in : {32, 64, 96, 128, 192, 896, 1024, 1088, 1152, 1920, 2048, 2176, 4096, 4224, 8320})
            for (int out : {1, 15, 16, 17, 33, 300})
                for (int N : {1, 2, 3, 4, 5, 7, 8, 9, 33}) {
                    if (in > 4096 && (out == 300 || N == 33)) continue;
                    if (!taken()) continue;
                    const GroupMatrix W((size_t)in * out, type, in * 1000 + out);
                    std::vector<float> x = random_floats((size_t)N * in, N), want((size_t)N * out), w = W.f;
                    const StepOn step(*gpu, plain_rows(N), 1, 8, in);
                    const DeviceMatrix d(*gpu, W);
                    const OnDevice<float> xs(*gpu, x), y(*gpu, (size_t)N * out);
                    gpu->matmul(y.p, xs.p, d.m, N, in, out);
                    const std::vector<float> got = y.host();
                    const bool few = through_few(type, N, in);
                    if (!few) {    // what the tensor cores are given
                        for (float &e : x) e = to_f32(to_f16(e));
                        for (float &e : w) e = to_f32(to_f16(e));
                    }
                    reference::matmul(want.data(), x.data(), {w.data(), DType::f32}, N, in, out);
                    INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type);
                    bool within = true;
                    for (int n = 0; n < N; n++)
                        for (int o = 0; o < out; o++) {
                            const double bound = product_bound(&x[(size_t)n * in], &w[(size_t)o * in], in, few),
                                         error = std::fabs(got[(size_t)n * out + o] - want[(size_t)n * out + o]);
                            worst = std::max(worst, error / bound);
                            within = within && error <= bound;
                        }
                    CHECK(within);
                }
    MESSAGE("largest error over its bound: ", worst);
}

TEST_CASE("cuda: matmul of q8 and q4: one of few rows has the same bits alone, among others, and again") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (DType type : GROUPED)
        for (int in : {96, 896, 2176, 4096, 8320, 14336}) {
            if (!taken()) continue;
            // the last two: more of x than shared memory holds, and several tiles for a thread block of 132
            const int out = in == 8320 ? 2200 : in == 14336 ? 4400 : 70, N = rows_as_alone(type, in);
            const GroupMatrix W((size_t)in * out, type, 2);
            const DeviceMatrix d(*gpu, W);
            const OnDevice<float> x(*gpu, random_floats((size_t)N * in, 1)), all(*gpu, (size_t)N * out), some(*gpu, (size_t)N * out);
            const StepOn step(*gpu, plain_rows(N), 1, 8, in);
            gpu->matmul(all.p, x.p, d.m, N, in, out);
            const std::vector<float> want = all.host();
            for (int rows = 1; rows <= N; rows++)
                for (int n = 0; n + rows <= N; n += rows) {
                    gpu->matmul(some.p, x.p + (size_t)n * in, d.m, rows, in, out);
                    CHECK(same_bits(some.host().data(), &want[(size_t)n * out], (size_t)rows * out));
                }
        }
}

TEST_CASE("cuda: matmul_add, unembed, qkv, gated and embed of q8 and q4") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (DType type : GROUPED)
        for (DType other : {type, DType::q8})
            for (int in : {96, 128, 896, 4096})
                for (int out : {1, 8, 9, 33})
                    for (int N : {1, 3, 8, 9}) {
                        if (!taken()) continue;
                        INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type, " ", (int)other);
                        const int kv_out = out / 2 + 1;
                        const GroupMatrix A((size_t)in * out, type, 1), B((size_t)in * out, other, 2);
                        const DeviceMatrix a(*gpu, A), b(*gpu, B);
                        const OnDevice<float> raw(*gpu, random_floats((size_t)N * in, 4)), gain(*gpu, random_floats(in, 6)), x(*gpu, raw.n), room(*gpu, raw.n);
                        const StepOn step(*gpu, plain_rows(N), 1, 8, in);
                        const Norm norm = {gain.p, 1e-5f};
                        gpu->rmsnorm(x.p, raw.p, gain.p, norm.eps, N, in);
                        auto product = [&](const Matrix &w, int outs) {
                            const OnDevice<float> y(*gpu, (size_t)N * outs);
                            gpu->matmul(y.p, x.p, w, N, in, outs);
                            return y.host();
                        };
                        const std::vector<float> of_a = product(a.m, out), of_b = product(b.m, out), of_k = product(b.m, kv_out),
                                                 old = random_floats(of_a.size(), 5);
                        const OnDevice<float> sum(*gpu, old), q(*gpu, of_a.size()), k(*gpu, of_k.size()), v(*gpu, of_k.size()), gate(*gpu, of_a.size()),
                            up(*gpu, of_a.size());
                        gpu->qkv(q.p, k.p, v.p, room.p, raw.p, norm, a.m, b.m, b.m, N, in, out, kv_out);
                        // Where the norm is part of the product, g x is what becomes integers, and s is off by 2^-21.
                        const std::vector<float> xs = x.host();
                        const bool batch = through_batch(type, N, in);    // g x, and the x of `product`, are rounded to f16
                        auto slack = [&](const GroupMatrix &W, size_t i, int outs) {
                            const float *row = &xs[i / outs * in], *w = &W.f[i % outs * in];
                            double size = 0;
                            for (int j = 0; j < in; j++) size += std::fabs((double)row[j] * w[j]);
                            return 2 * product_bound(row, w, in, through_few(type, N, in)) + (batch ? 0x1.01p-10 : 0x1p-20) * size;
                        };
                        auto agree = [&](const std::vector<float> &got, const std::vector<float> &want, const GroupMatrix &W, int outs) {
                            if (through_cublas(type, N, in) || type != other || in == 96) return same_bits(got.data(), want.data(), want.size());
                            for (size_t i = 0; i < got.size(); i++)
                                if (!(std::fabs(got[i] - want[i]) <= slack(W, i, outs))) return false;
                            return true;
                        };
                        CHECK(agree(q.host(), of_a, A, out));
                        CHECK(agree(k.host(), of_k, B, kv_out));
                        CHECK(agree(v.host(), of_k, B, kv_out));
                        gpu->unembed(q.p, room.p, raw.p, norm, a.m, N, in, out);
                        if (type == other) CHECK(agree(q.host(), of_a, A, out));
                        gpu->matmul_add(sum.p, x.p, a.m, N, in, out, {});
                        gpu->gated(gate.p, up.p, room.p, raw.p, norm, a.m, b.m, N, in, out);
                        const std::vector<float> sums = sum.host(), gates = gate.host();
                        bool added = true, within = true;
                        for (size_t i = 0; i < of_a.size(); i++) {
                            // cuBLAS may add old first: its sum is off by a rounding of each partial sum
                            const double silu = of_a[i] / (1.0 + std::exp(-(double)of_a[i])), want = silu * of_b[i],
                                         rounding = N > FEW_ROWS ? in * 0x1p-22 : 0x1p-24;
                            added = added && std::fabs(sums[i] - ((double)old[i] + of_a[i])) <= rounding * (std::fabs(old[i]) + std::fabs(of_a[i]) + in * 0.3);
                            const double of_gate = slack(A, i, out), of_up = slack(B, i, out);    // silu is no steeper than 1.1
                            within = within && std::fabs(gates[i] - want) <=
                                                   1e-6 * std::fabs(want) + 1.1 * of_gate * (std::fabs(of_b[i]) + of_up) + std::fabs(silu) * of_up + FLT_MIN;
                        }
                        CHECK(added);
                        CHECK(within);
                    }
    for (DType type : GROUPED) {
        const GroupMatrix W(9 * 160, type, 3);
        const DeviceMatrix d(*gpu, W);
        const Rows rows = plain_rows(9);
        const StepOn step(*gpu, rows, 1, 8, 160);
        const OnDevice<float> x(*gpu, 9 * 160);
        gpu->embed(x.p, d.m, step.b, 160);
        CHECK(x.host() == W.f);
    }
}

TEST_CASE("cuda: books-5m in q8 and q4: logits as on the CPU") {
    const Ops *gpu = find_gpu();
    if (!gpu || !have("../shared/models/books-5m")) return;
    const TempFolder folder("cudagroups");
    std::vector<int> ids;
    for (int i = 0; i < 100; i++) ids.push_back((i * 37 + i / 7) % 4096);
    for (const char *dtype : {"q8", "q4"}) {
        REQUIRE(convert_to("../shared/models/books-5m", folder.path + dtype, dtype).code == 0);
        const Model on_cpu = model_open(folder.path + dtype);
        Model m = model_open(folder.path + dtype);
        model_upload(m, *gpu);
        const std::vector<float> want = logits_of(on_cpu, ids, 64, cpu_ops);
        for (int rows : {1, 8, 100}) CHECK(relative_l2(logits_of(m, ids, rows, *gpu), want) < 2e-3);    // test_cuda.cpp
    }
}
