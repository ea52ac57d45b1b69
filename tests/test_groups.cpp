// test_groups.cpp - weights in q8 and q4: what rounding costs, the bytes, the products, whole models, and files that lie.
#include <doctest/doctest.h>
#include <omp.h>
#include "cuda_case.h"
#include "group_case.h"
#include "random_weights.h"
#include "temp_files.h"

namespace reference {
void matmul(float *y, const float *x, Matrix W, int N, int in, int out);
}

// ---- rounding -------------------------------------------------------------------------------------------------------

TEST_CASE("q8: no weight is off by more than half a scale, and the scale is the smallest f16 that reaches the largest") {
    std::vector<float> w = random_floats(4096 * GROUP, 1, 0.05f);
    for (int i = 0; i < GROUP; i++) w[i] = 0, w[GROUP + i] = 1e-7f * i, w[2 * GROUP + i] = i == 7 ? -300.0f : 0.01f * i;
    w[3 * GROUP] = 127 * 65504.0f;
    std::vector<int8_t> code(w.size());
    std::vector<f16> scale(w.size() / GROUP);
    quantize_groups(code.data(), scale.data(), DType::q8, w.data(), (int64_t)w.size());
    bool near = true, small = true;
    for (size_t g = 0; g < scale.size(); g++) {
        const double s = to_f32(scale[g]), below = scale[g].bits ? to_f32(f16{(uint16_t)(scale[g].bits - 1)}) : -1;
        double largest = 0;
        for (int i = 0; i < GROUP; i++) {
            largest = std::max(largest, std::fabs((double)w[g * GROUP + i]));
            near = near && std::fabs(w[g * GROUP + i] - s * code[g * GROUP + i]) <= s / 2 * (1 + 1e-5);    // w / s is rounded to f32 first
        }
        small = small && s * 127 >= largest && below * 127 < largest;
    }
    CHECK(near);
    CHECK(small);
    CHECK(scale[0].bits == 0);
    CHECK(code[3 * GROUP] == 127);
    w[0] = 127 * 65520.0f;    // beyond
    quantize_groups(code.data(), scale.data(), DType::q8, w.data(), GROUP);
    CHECK(scale[0].bits == 0x7c00);
}

TEST_CASE("q4: less squared error than any one rule for the scale, and every weight is an f16 number") {
    const std::vector<float> w = random_floats(8192 * GROUP, 2, 0.05f);
    std::vector<uint8_t> code(w.size() / 2);
    std::vector<f16> scale(w.size() / GROUP);
    quantize_groups(code.data(), scale.data(), DType::q4, w.data(), (int64_t)w.size());
    const Matrix m = {code.data(), DType::q4, scale.data()};
    double error = 0, squares = 0, plain = 0;
    bool f16_numbers = true, never_worse = true;
    for (size_t g = 0; g < scale.size(); g++) {
        float largest = 0;
        for (int i = 0; i < GROUP; i++)
            if (std::fabs(w[g * GROUP + i]) > std::fabs(largest)) largest = w[g * GROUP + i];
        double mine = 0, other = 0;
        for (int i = 0; i < GROUP; i++) {
            const double x = w[g * GROUP + i], y = weight_at(m, g * GROUP + i), z = std::min(7.0, std::round(x / largest * -8)) * largest / -8;
            mine += (x - y) * (x - y), other += (x - z) * (x - z), squares += x * x;
            f16_numbers = f16_numbers && to_f32(to_f16((float)y)) == (float)y;
        }
        never_worse = never_worse && mine <= other * 1.01;    // the rule is between two of the tries
        error += mine, plain += other;
    }
    MESSAGE("squared error over sum of squares: ", error / squares, ", with the largest at -8: ", plain / squares);
    CHECK(error < 0.0067 * squares);    // of normal numbers, by another program: 0.00656
    CHECK(error < 0.9 * plain);
    CHECK(never_worse);
    CHECK(f16_numbers);
}

TEST_CASE("q4: groups of zeros, tiny and huge numbers") {
    std::vector<float> w(4 * GROUP, 0.0f);
    for (int i = 0; i < GROUP; i++) w[GROUP + i] = i * 1e-30f, w[2 * GROUP + i] = (i % 2 ? -1 : 1) * 1e-6f, w[3 * GROUP + i] = 1e6f;
    uint8_t code[4 * GROUP / 2];
    f16 scale[4];
    quantize_groups(code, scale, DType::q4, w.data(), (int64_t)w.size());
    for (int i = 0; i < 2 * GROUP; i++) CHECK(weight_at({code, DType::q4, scale}, i) == 0.0f);
    CHECK(std::isinf(to_f32(scale[3])));    // 8 x 65504 = 524,032
    for (int i = 2 * GROUP; i < 3 * GROUP; i++) CHECK(std::fabs(weight_at({code, DType::q4, scale}, i) - w[i]) <= 0x1p-25f * 7.5f);
}

TEST_CASE("q8 and q4: golden bytes") {
    // FORMAT.md's example, w = -4 -3.5 ... 3.5 3.5 3 ... -4 in q4, -31.75 -29.75 ... 30.25 in q8
    float w[2 * GROUP];
    for (int i = 0; i < GROUP; i++) w[i] = 0.5f * (i < 16 ? i - 8 : 23 - i), w[GROUP + i] = 0.25f * (8 * i - 127);
    uint8_t q4[16];
    int8_t q8[GROUP];
    f16 scale[2];
    quantize_groups(q4, scale, DType::q4, w, GROUP);
    quantize_groups(q8, scale + 1, DType::q8, w + GROUP, GROUP);
    const uint8_t want[] = {0xf0, 0xe1, 0xd2, 0xc3, 0xb4, 0xa5, 0x96, 0x87, 0x78, 0x69, 0x5a, 0x4b, 0x3c, 0x2d, 0x1e, 0x0f};
    for (int j = 0; j < 16; j++) CHECK(q4[j] == want[j]);
    for (int i = 0; i < GROUP; i++) CHECK(q8[i] == 8 * i - 127);
    CHECK(scale[0].bits == 0x3800);
    CHECK(scale[1].bits == 0x3400);
}

// ---- products -------------------------------------------------------------------------------------------------------

TEST_CASE("matmul of q8 and q4: against the reference in f64, and to the bit that of the same weights in f32") {
    for (DType type : GROUPED)
        for (int in : {32, 64, 480, 512, 544, 1056, 1408})
            for (int out : {1, 3, 4, 5, 31, 32, 33, 67})
                for (int N : {1, 2, 4, 5, 33}) {
                    const GroupMatrix W((size_t)in * out, type, in * 1000 + out);
                    const std::vector<float> x = random_floats((size_t)N * in, N);
                    std::vector<float> y((size_t)N * out, NAN), z(y), plain(y);
                    cpu::matmul(y.data(), x.data(), W.m, N, in, out);
                    reference::matmul(z.data(), x.data(), W.m, N, in, out);
                    cpu::matmul(plain.data(), x.data(), {W.f.data(), DType::f32}, N, in, out);
                    INFO("in ", in, " out ", out, " N ", N, " dtype ", (int)type);
                    bool within = true;    // the bound of test_ops.cpp
                    for (int n = 0; n < N; n++)
                        for (int o = 0; o < out; o++) {
                            double size = 0;
                            for (int i = 0; i < in; i++) size += std::fabs(x[n * in + i] * W.f[o * in + i]);
                            within = within && std::fabs(y[n * out + o] - z[n * out + o]) <= (in / 16 + 8) * 0x1p-24 * size;
                        }
                    CHECK(within);
                    CHECK(same_bits(y.data(), plain.data(), y.size()));
                }
}

TEST_CASE("matmul of q8 and q4: any number of threads and any neighbours, the ops made of it, embed") {
    const int in = 544, out = 300, N = 9;
    const std::vector<float> x = random_floats((size_t)N * in, 1), old = random_floats((size_t)N * out, 5);
    for (DType type : GROUPED) {
        const GroupMatrix W((size_t)in * out, type, 2);
        std::vector<float> all((size_t)N * out), some(all.size());
        cpu::matmul(all.data(), x.data(), W.m, N, in, out);
        const int threads = omp_get_max_threads();
        for (int t : {1, 2, 3}) {
            omp_set_num_threads(t);
            for (int rows : {1, 2, 3, 4, 5})
                for (int n = 0; n + rows <= N; n += rows) {
                    cpu::matmul(some.data(), &x[(size_t)n * in], W.m, rows, in, out);
                    CHECK(same_bits(some.data(), &all[(size_t)n * out], (size_t)rows * out));
                }
        }
        omp_set_num_threads(threads);
        some = old;
        cpu::matmul_add(some.data(), x.data(), W.m, N, in, out, {});
        for (size_t i = 0; i < some.size(); i++) CHECK(some[i] == old[i] + all[i]);

        Rows rows;
        for (int id : {299, 0, 3}) rows.add(id, id, 0, true);
        std::vector<float> e(3 * in);
        cpu::embed(e.data(), W.m, rows.batch(), in);
        for (int n = 0; n < 3; n++) CHECK(same_bits(&e[n * in], &W.f[(size_t)rows.token[n] * in], in));
    }
}

// ---- models and files -----------------------------------------------------------------------------------------------

static Config group_config() {
    Config c = tiny_config();
    c.dim = 32, c.ffn_dim = 64;    // n_heads x head_dim is 32, too
    return c;
}

TEST_CASE("model.bin in q8 and q4: each matrix in its type, the weights of the source, sizes") {
    const TempFolder folder("groups");
    const std::string path = folder.path + "m.bin";
    for (DType type : GROUPED) {
        const Config c = group_config();
        write_tiny_model(path, c, type);
        const Model m = model_open(path);
        CHECK(m.layers[1].w_down.type == type);
        CHECK(m.embed.type == DType::q8);
        CHECK(m.unembed.type == DType::q8);
        CHECK(m.layers[0].ffn_norm[3] == tiny_value("layers.0.ffn_norm", 3));
        int64_t weights = 0, vocabulary = (int64_t)c.vocab * c.dim, norms = 5 * c.dim;
        for (const TensorSpec &s : config_tensors(c)) weights += s.is_norm || s.shape[0] == c.vocab ? 0 : s.shape[0] * s.shape[1];
        CHECK(m.weights_bytes == 4 * norms + (2 * vocabulary * 17 + weights * (type == DType::q8 ? 17 : 9)) / 16);
        CHECK(m.step_bytes == m.weights_bytes - vocabulary * 17 / 16);
        for (int i = 0; i < c.dim * c.ffn_dim; i++) {
            const float want = tiny_value("layers.1.w_down", i), got = weight_at(m.layers[1].w_down, i);
            CHECK(std::fabs(got - want) <= (type == DType::q8 ? 2.0 / 254 * 1.001 : 2.0 / 8));    // of numbers from 0 to 127/64
        }
        const Model random = random_weights(c, type, cpu_ops);
        CHECK(random.weights_bytes == m.weights_bytes);
        CHECK(random.step_bytes == m.step_bytes);
        const std::vector<int> ids = {1, 2, 3, 4, 5};
        for (float logit : logits_of(random, ids, 5, cpu_ops)) CHECK(std::isfinite(logit));
        for (float logit : logits_of(m, ids, 5, cpu_ops)) CHECK(std::isfinite(logit));
    }
    Config c = group_config();
    CHECK(left_in_bf16(c, DType::q4) == "");
    c.ffn_dim = 48;    // rows of w_down are no groups
    write_tiny_model(path, c, DType::q4);
    CHECK(model_open(path).layers[0].w_down.type == DType::bf16);
    CHECK(model_open(path).layers[0].w_up.type == DType::q4);
    CHECK(contains(left_in_bf16(c, DType::q4), "2 of 16 matrices stay in bf16"));
    CHECK(contains(left_in_bf16(c, DType::q4), "layers.0.w_down: rows of 48"));
}

TEST_CASE("model.bin in q8 and q4: edited") {
    const TempFolder folder("groupfiles");
    const std::string path = folder.path + "m.bin";
    write_tiny_model(path, group_config(), DType::q4);
    const std::string good = read_file(path);
    auto field = [](const char *tensor, const char *key, const OrderedJson &value) -> Edit {
        return [=](OrderedJson &h, std::string &) { h[tensor][key] = value; };
    };
    struct Case { const char *what; Edit edit; std::string part; };
    const Case cases[] = {
        {"no scales",        [](OrderedJson &h, std::string &) { h["x"] = h["layers.0.wq.scale"]; h.erase("layers.0.wq.scale"); }, "tensor 'layers.0.wq.scale': missing"},
        {"scales in BF16",   field("layers.0.wq.scale", "dtype", "BF16"),      "tensor 'layers.0.wq.scale': dtype: expected F16, found BF16"},
        {"scales flattened", field("layers.0.wq.scale", "shape", {32}),        "tensor 'layers.0.wq.scale': shape: expected (32, 1), found (32)"},
        {"codes as q8",      field("layers.0.wq", "dtype", "I8"),              "tensor 'layers.0.wq': shape: expected (32, 32), found (32, 16)"},
        {"codes flattened",  field("layers.0.wq", "shape", {512}),             "tensor 'layers.0.wq': shape: expected (32, 16), found (512)"},
        {"norm in U8",       [](OrderedJson &h, std::string &) { h["out_norm"]["dtype"] = "U8"; h["out_norm"]["shape"] = {128}; }, "tensor 'out_norm': dtype: expected F32, found U8"},
        {"cut by a byte",    [](OrderedJson &, std::string &data) { data.pop_back(); }, "truncated"},
        {"scales of a matrix that needs none", [](OrderedJson &h, std::string &) {
             h["layers.0.w_down"]["dtype"] = "F16", h["layers.0.w_down"]["shape"] = {32, 16};
         }, "tensor 'layers.0.w_down': shape: expected (32, 64), found (32, 16)"},
    };
    for (const Case &k : cases) {
        INFO(k.what);
        write_file(path, edit_container(good, k.edit));
        const Outcome o = outcome_of([&] { model_open(path); });
        INFO(o.line);
        CHECK(o.code == 1);
        CHECK(contains(o.line, path));
        CHECK(contains(o.line, k.part));
    }
    // rows that are no whole groups cannot be codes, whatever else fits
    write_tiny_model(path, tiny_config(), DType::bf16);
    write_file(path, edit_container(read_file(path), [](OrderedJson &h, std::string &) { h["layers.0.wq"]["dtype"] = "I8", h["layers.0.wq"]["shape"] = {32, 32}; }));
    CHECK(contains(outcome_of([&] { model_open(path); }).line, "tensor 'layers.0.wq': dtype: I8 is for rows of a multiple of 32, found rows of 16"));

    // a scale that is no number: opening does not read it, the check of show does
    write_file(path, edit_container(good, [](OrderedJson &h, std::string &data) { data.replace((size_t)h["layers.1.wv.scale"]["data_offsets"][0] + 4, 2, std::string("\x00\x7e", 2)); }));
    const Model m = model_open(path);
    CHECK(find_nonfinite(m.layers[1].wv, 16 * 32) == 2 * GROUP);
    CHECK(find_nonfinite(m.layers[1].wk, 16 * 32) == -1);
}

TEST_CASE("writing q8 and q4: values that do not fit") {
    const TempFolder folder("groupvalues");
    const Config c = group_config();
    auto write = [&](DType type, float x) {
        return outcome_of([&] {
            model_write(folder.path + "m.bin", c, tiny_tokenizer(), type, [&](const TensorSpec &spec, int64_t first, int64_t n, float *rows) {
                const int64_t cols = spec.shape.back();
                for (int64_t i = 0; i < n * cols; i++) rows[i] = spec.name == "layers.1.wo" && first * cols + i == 70 ? x : 0.5f;
            }, [](const std::string &, uint64_t, uint64_t) {});
        });
    };
    for (DType type : GROUPED) {
        CHECK(contains(write(type, NAN).line, "tensor 'layers.1.wo': element 70 is nan, expected a finite number"));
        CHECK(contains(write(type, -INFINITY).line, "element 70 is -inf"));
        CHECK(contains(write(type, 1e7f).line, "element 70 is 1e+07, beyond the range of a scale (f16); use --dtype bf16"));
        CHECK(folder.list().empty());
    }
    CHECK(write(DType::q8, 8e6f).line == "");
    CHECK(write(DType::q4, 4e5f).line == "");
}

TEST_CASE("books-5m in q8 and q4: logits near those of bf16, the same greedy text in q8") {
    const std::string source = "../shared/models/books-5m/";
    if (!have(source)) return;
    const TempFolder folder("groupmodel");
    auto converted = [&](const std::string &dtype) {
        REQUIRE(convert_to(source, folder.path + dtype, dtype).line == "");
        return model_open(folder.path + dtype);
    };
    const Model bf16_model = converted("bf16"), q8 = converted("q8"), q4 = converted("q4");
    std::vector<int> ids = tokenizer_encode(bf16_model.tokenizer, "Once upon a time, there was a little girl who lived in a house by the sea", false);
    const int V = bf16_model.config.vocab;
    auto likeliest = [&](const std::vector<float> &logits) { return (int)(std::max_element(logits.end() - V, logits.end()) - (logits.end() - V)); };
    const std::vector<float> want = logits_of(bf16_model, ids, 8, cpu_ops);
    const double off8 = relative_l2(logits_of(q8, ids, 8, cpu_ops), want), off4 = relative_l2(logits_of(q4, ids, 8, cpu_ops), want);
    MESSAGE("relative error of logits: q8 ", off8, ", q4 ", off4);
    CHECK(off8 < 0.01);    // weights are off by 2^-8 / sqrt(3) of the largest of a group, which is 0.7% of their size; errors of a row add like noise
    CHECK(off4 < 0.12);    // by 8% of their size
    for (int i = 0; i < 20; i++) {
        const int next = likeliest(logits_of(bf16_model, ids, 8, cpu_ops));
        CHECK(likeliest(logits_of(q8, ids, 8, cpu_ops)) == next);
        ids.push_back(next);
    }
}
