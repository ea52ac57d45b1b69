// test_cuda_baselines.cpp - the scalar formats on the GPU: sealed bytes against the CPU's, attention over the CPU's codes
// against the f64 reference, a row's bits, and whole forward passes.  Skips, and says so, without CUDA or without a device.
#include "cuda_case.h"
#include "device.h"

namespace {
const KvFormat SCALARS[] = {KvFormat::kivi2, KvFormat::q8, KvFormat::q4, KvFormat::tq2, KvFormat::nqkv, KvFormat::deco4, KvFormat::xquant};
constexpr int HEAD_DIMS[] = {8, 48, 64, 96, 128, 256};

// What sealing writes: the pools of K and V, then what is beside them.
struct Piece { uint8_t *at; int64_t bytes; };
std::vector<Piece> sealed_pieces(const KvView &v) {
    const int64_t blocks = (int64_t)v.L * v.n_blocks * v.Hkv;
    return {{v.k_sealed, blocks * v.k_block_bytes},
            {v.v_sealed, blocks * v.v_block_bytes},
            {v.k_beside, BothCaches::beside_bytes(v, true)},
            {v.v_beside, BothCaches::beside_bytes(v, false)}};
}
std::vector<uint8_t> sealed_bytes(const KvView &v, const Ops &ops) {
    std::vector<uint8_t> all;
    for (const Piece &p : sealed_pieces(v)) {
        if (p.bytes == 0) continue;
        all.resize(all.size() + p.bytes);
        ops.download(&all[all.size() - p.bytes], p.at, p.bytes);
    }
    return all;
}

// A value of a special block: zeros, small integers that repeat, one NaN, both ends of f16, subnormals.
float special(float x, int pos, int channel, int d) {
    switch (pos / KV_BLOCK) {
    case 1: return 0;
    case 2: return (float)(channel % 7 - 3);
    case 3: return pos % KV_BLOCK == 17 && channel == d - 1 ? NAN : x;
    case 4: return x > 0 ? 65504.0f : -65504.0f;
    case 5: return x * 0x1p-23f;
    default: return x;
    }
}
}    // namespace

TEST_CASE("cuda baselines: sealing gives the reference's bytes") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    int64_t total = 0, compared = 0;
    for (KvFormat f : SCALARS)
        for (int d : HEAD_DIMS) {
            if (!taken()) continue;
            const int Hkv = 2, n = Hkv * d, layers = f == KvFormat::xquant ? 4 : 1, T = 8 * KV_BLOCK + SEAL_STEPS;
            Config c = attention_config(Hkv, 1, d, layers);
            KvCache caches[2];
            const Ops *ops[] = {&cpu_ops, gpu};
            for (int side = 0; side < 2; side++) {
                kv_cache_open(caches[side], *ops[side], c, {f, f}, 2, T);
                for (const Piece &p : sealed_pieces(caches[side].view)) {    // blocks that nobody seals are equal
                    const std::vector<uint8_t> zero(p.bytes);
                    if (p.bytes) ops[side]->upload(p.at, zero.data(), p.bytes);
                }
            }
            // Slot 0: eight blocks, from the ring, from both, from this step.  Slot 1: one, whose first head has an infinity.
            int done[2] = {};
            for (const std::vector<int> &until : {std::vector<int>{60, 0}, {4 * KV_BLOCK + 1, 70}, {4 * KV_BLOCK + 2, 70}, {T, 70}}) {
                Rows rows;
                for (int s = 0; s < 2; s++) {
                    for (KvCache &cache : caches) kv_cache_reserve(cache, s, until[s]);
                    for (; done[s] < until[s]; done[s]++) rows.add(0, s, done[s], false);
                }
                const size_t N = rows.pos.size();
                const Batch b = rows.batch();
                const StepOn on(*gpu, rows, Hkv, d, n);
                for (int layer = 0; layer < layers; layer++) {
                    std::vector<float> x[2];
                    for (int side = 0; side < 2; side++) {
                        x[side] = random_floats(N * n, 1000 * layer + 10 * d + side + rows.pos[0]);
                        for (size_t i = 0; i < N; i++)
                            for (int j = 0; j < n; j++) {
                                float &e = x[side][i * n + j];
                                if (rows.slot[i] == 0) e = special(e, rows.pos[i], j, d);
                                else if (rows.pos[i] == 33 && j == 3) e = INFINITY;
                            }
                    }
                    std::vector<f16> k16(N * n), v16(N * n);
                    cpu::kv_write(caches[0].view, layer, k16.data(), v16.data(), x[0].data(), x[1].data(), b);
                    cpu::kv_keep(caches[0].view, layer, k16.data(), v16.data(), b);
                    const OnDevice<float> gk(*gpu, x[0]), gv(*gpu, x[1]);
                    const OnDevice<f16> gk16(*gpu, N * n), gv16(*gpu, N * n);
                    gpu->kv_write(caches[1].view, layer, gk16.p, gv16.p, gk.p, gv.p, on.b);
                    gpu->kv_keep(caches[1].view, layer, gk16.p, gv16.p, on.b);
                }
            }
            const std::vector<uint8_t> want = sealed_bytes(caches[0].view, cpu_ops), got = sealed_bytes(caches[1].view, *gpu);
            REQUIRE(got.size() == want.size());
            int64_t different = 0, nonzero = 0;
            for (size_t i = 0; i < want.size(); i++) different += got[i] != want[i], nonzero += want[i] != 0;
            INFO(std::string(kv_format_name(f)), " d ", d, ": ", different, " of ", want.size(), " bytes differ");
            CHECK(nonzero > (int64_t)want.size() / 4);
            CHECK(different <= 2);    // both are f64: an input within 1e-15 of the border between two codes, or of a matrix's f16
            total += different, compared += (int64_t)want.size();
        }
    MESSAGE(total, " of ", compared, " bytes differ in all");
}

TEST_CASE("cuda baselines: attention over every format, alone and mixed, the CPU's codes") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    double worst = 0;
    auto check = [&](const KvOptions &o, int d, int G) {
        if (!taken()) return;
        BothCaches s(*gpu, attention_config(d == 256 ? 1 : 2, G, d), {1, 64, 129, 330}, o, d);
        std::vector<float> want;
        INFO("d ", d, " K ", std::string(kv_format_name(o.k_format)), " V ", std::string(kv_format_name(o.v_format)));
        s.step(s.ends(4), nullptr);
        for (int back : {1, 0}) {
            const std::vector<float> got = s.step(s.ends(back), &want, true, true);
            CHECK(relative_l2(got, want) < 5e-6);
            worst = std::max(worst, relative_l2(got, want));
        }
    };
    for (KvFormat f : SCALARS)
        for (int d : HEAD_DIMS) check({f, f}, d, d == 256 ? 1 : 2);
    const KvOptions mixed[] = {{KvFormat::kivi2, KvFormat::nsn2, 64, 64}, {KvFormat::nsn4b, KvFormat::q4},
                               {KvFormat::q8, KvFormat::f16, 0, 64},      {KvFormat::f16, KvFormat::deco4},
                               {KvFormat::xquant, KvFormat::tq2, 64, 0, true}, {KvFormat::deco4, KvFormat::xquant},
                               {KvFormat::q4, KvFormat::q8, 0, 0, false, NO_HADAMARD}};
    for (const KvOptions &o : mixed) check(o, 64, 3);
    MESSAGE("largest relative error: ", worst);
}

TEST_CASE("cuda baselines: prefill of any step size and decode give the same bits") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    for (KvFormat f : SCALARS)
        for (int d : {24, 128}) {
            if (!taken()) continue;
            auto run = [&](int rows) {
                BothCaches s(*gpu, attention_config(2, 2, d), {length(300), 70}, {f, f}, 7);
                std::vector<std::vector<float>> y(2);
                while (s.done != s.lengths) {
                    const std::vector<int> before = s.done;
                    std::vector<int> until;
                    for (int i = 0; i < 2; i++) until.push_back(std::min(s.lengths[i], before[i] + rows));
                    const std::vector<float> out = s.step(until, nullptr, false);
                    const float *at = out.data();
                    for (int i = 0; i < 2; i++) {
                        const size_t n = (size_t)(until[i] - before[i]) * s.c.n_heads * d;
                        y[i].insert(y[i].end(), at, at + n);
                        at += n;
                    }
                }
                return y;
            };
            const auto want = run(512);
            for (int rows : {512, 1, 7, 65}) {
                INFO(std::string(kv_format_name(f)), " d ", d, " rows ", rows);
                CHECK(run(rows) == want);
            }
        }
}

TEST_CASE("cuda baselines: the bundled model: logits as on the CPU") {
    const Ops *gpu = find_gpu();
    if (!gpu) return;
    const Model on_cpu = model_open("tests/models/books-5m.bin");
    Model m = model_open("tests/models/books-5m.bin");
    model_upload(m, *gpu);
    std::vector<int> ids;
    for (int i = 0; i < length(200); i++) ids.push_back((i * 37 + i / 7) % m.config.vocab);
    for (KvFormat f : SCALARS) {
        if (!taken()) continue;
        const KvOptions o = {f, f};
        const std::vector<float> want = logits_of(on_cpu, ids, 64, cpu_ops, o);
        const std::vector<float> one = logits_of(m, ids, 1, *gpu, o), eight = logits_of(m, ids, 8, *gpu, o);
        MESSAGE(std::string(kv_format_name(f)), ": relative error of logits, one row a step ", relative_l2(one, want), ", eight ", relative_l2(eight, want));
        // Steps of up to 8 rows have f32 activations (matmul.cu).  Rows differ in their last bits, so some round to another fp16
        // number, and a code that follows moves by a whole step.  Codes of the wrong layer or block move logits by tenths.
        CHECK(relative_l2(one, want) < 1e-2);
        CHECK(relative_l2(eight, want) < 1e-2);
    }
}
