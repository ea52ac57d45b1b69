// test_cuda_batch.cpp - products of a batch's rows on the GPU (gemm_batch.cu).  Skips, and says so, without CUDA, without a device, or on
// one with too little shared memory a thread block.
#include <cfloat>
#include <memory>
#include "product_case.h"

namespace {
// Weights of a type, and what the kernel multiplies with: q8 times its scale, rounded to f16.
struct Weights {
    std::vector<float> f;
    std::unique_ptr<DeviceMatrix> on;
    Weights(const Ops &gpu, size_t n, DType type, uint64_t seed) {
        if (type == DType::f16) {
            const HostMatrix W(n, type, seed);
            f = W.f, on = std::make_unique<DeviceMatrix>(gpu, W);
        } else {
            const GroupMatrix W(n, type, seed);
            f = W.f, on = std::make_unique<DeviceMatrix>(gpu, W);
        }
        for (float &w : f) w = to_f32(to_f16(w));
    }
};
}    // namespace

TEST_CASE("cuda: products of 5 to 32 rows against f64, and a row's bits in any of them") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    if (through_cublas(DType::f16, BATCH_ROWS, 8)) {
        MESSAGE("SKIPPED: this device has too little shared memory a thread block");
        return;
    }
    struct Case { DType type; int in, out; };
    std::vector<Case> cases;
    for (const auto &[in, out] : {std::pair(8, 20), {200, 100}, {1032, 1000}, {72, 6001}, {72, 12005}, {72, 16005}, {136, 23400}, {72, 34100}})
        cases.push_back({DType::f16, in, out});
    for (DType type : GROUPED)
        for (const auto &[in, out] : {std::pair(256, 20), {512, 100}, {4352, 300}, {1280, 1000}, {256, 6001}, {256, 12005}, {256, 34100}}) cases.push_back({type, in, out});
    for (const Case &c : cases) {
        if (!taken()) continue;
        INFO("in ", c.in, " out ", c.out, " dtype ", (int)c.type);
        const int N = BATCH_ROWS, n_out = c.out / 2, kv_out = n_out / 2;
        const Weights W(*gpu, (size_t)c.in * c.out, c.type, 2);
        const Matrix all = W.on->m, up = W.on->behind((int64_t)n_out * c.in);
        REQUIRE(through_batch(c.type, N, c.in));
        std::vector<float> host = random_floats((size_t)N * c.in, 1);
        for (float &e : host) e = HostMatrix::round_to(e, DType::f16);    // as the GPU does where there is no norm
        const std::vector<float> old = random_floats((size_t)N * c.out, 5);
        const OnDevice<float> x(*gpu, host), gain(*gpu, random_floats(c.in, 6)), xn(*gpu, host.size()), y(*gpu, old.size()), gate(*gpu, (size_t)N * n_out),
            room(*gpu, (size_t)N * n_out), q(*gpu, (size_t)N * n_out), k(*gpu, (size_t)N * kv_out), v(*gpu, (size_t)N * kv_out);
        const StepOn step(*gpu, plain_rows(N), 1, 8, c.in);
        const NormedProducts normed(host, N, c.in, true, true, false, 1e-5f);
        auto run = [&](int n, int rows) {
            gpu->upload(y.p, old.data() + (size_t)n * c.out, (size_t)rows * c.out * 4);
            gpu->matmul_add(y.p, x.p + (size_t)n * c.in, all, rows, c.in, c.out, {});
            gpu->gated(gate.p, room.p, xn.p, x.p + (size_t)n * c.in, {gain.p, 1e-5f}, all, up, rows, c.in, n_out);
            // thread blocks with tiles of two of these, or of all
            gpu->qkv(q.p, k.p, v.p, xn.p, x.p + (size_t)n * c.in, {gain.p, 1e-5f}, all, up, up, rows, c.in, n_out, kv_out);
            return std::vector<std::vector<float>>{y.host(), gate.host(), q.host(), k.host(), v.host()};
        };
        const auto want = run(0, N);
        CHECK(want[3] == want[4]);
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
                within = within && std::fabs(want[2][(size_t)r * n_out + o] - g) <= normed.bound * size;
                if (o < kv_out) within = within && std::fabs(want[3][(size_t)r * kv_out + o] - u) <= normed.bound * up_size;
            }
        }
        CHECK(within);
        for (int rows : {5, 7, 8, 9, 15, 16, 17, 24, 31, 32})
            for (int n : {0, N - rows}) {
                const auto got = run(n, rows);
                for (size_t i = 0; i < got.size(); i++) {
                    const size_t outs = want[i].size() / N;
                    CHECK(same_bits(got[i].data(), &want[i][n * outs], rows * outs));
                }
            }
    }
}

TEST_CASE("cuda: a product of 5 to 32 rows takes over what the one before made of its x, with the same bits") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    struct Case { DType type, then; int in, mid, out; };    // mid: what is taken over; in a multiple of 64 only, codes of 256
    const DType f16 = DType::f16, q8 = DType::q8, q4 = DType::q4;
    for (const Case c : {Case{f16, f16, 64, 64, 33}, {f16, f16, 200, 128, 100}, {f16, f16, 328, 4160, 72}, {f16, f16, 72, 9024, 136}, {f16, f16, 136, 100, 40},
                         {q8, q8, 256, 256, 33}, {q8, q4, 512, 4352, 72}, {q8, q8, 256, 1088, 40}, {q4, q4, 256, 9216, 136}, {f16, q4, 200, 512, 33}, {q4, f16, 256, 512, 33}})
        for (int N : {5, 8, 9, 16, 17, 32}) {
            if (!taken()) continue;
            INFO("in ", c.in, " mid ", c.mid, " out ", c.out, " N ", N, " dtype ", (int)c.type, " then ", (int)c.then);
            const Weights A(*gpu, (size_t)c.in * c.mid, c.type, 1), B(*gpu, (size_t)c.mid * c.out, c.then, 2);
            const Matrix wa = A.on->m, wb = B.on->m;
            const std::vector<float> old = random_floats((size_t)N * c.mid, 3), other = random_floats((size_t)N * c.mid, 4);
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
