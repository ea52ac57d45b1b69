// test_llama2c.cpp - checkpoints of llama2.c become model.bin: every value arrives in its place.  The places are computed
// here, from the layout as run.c and export.py document it, not with the converter's code.
#include <doctest/doctest.h>
#include "temp_files.h"

// Values of a llama2.c file read front to back, as its run.c does.
struct Cursor {
    const std::string &bytes;
    size_t at;
    std::vector<float> take(int64_t n) {
        std::vector<float> x(n);
        REQUIRE(at + n * 4 <= bytes.size());
        memcpy(x.data(), &bytes[at], n * 4);
        at += n * 4;
        return x;
    }
};

// Undo the half layout: channels (j, j + d/2) of a head are 2j and 2j + 1 in llama2.c.
static std::vector<float> interleave(const std::vector<float> &ours, int heads, int d, int dim) {
    std::vector<float> x(ours.size());
    for (int h = 0; h < heads; h++) {
        for (int j = 0; j < d / 2; j++) {
            for (int i = 0; i < dim; i++) {
                x[(h * d + 2 * j) * dim + i] = ours[(h * d + j) * dim + i];
                x[(h * d + 2 * j + 1) * dim + i] = ours[(h * d + d / 2 + j) * dim + i];
            }
        }
    }
    return x;
}

static void check_llama2c(const Model &m, const std::string &bytes, bool legacy) {
    const Config &c = m.config;
    const int D = c.dim, F = c.ffn_dim, d = c.head_dim, q = c.n_heads * d, kv = c.n_kv_heads * d;
    Cursor file{bytes, legacy ? 28u : 256u};
    auto each_layer = [&](const char *name, int64_t n, int heads = 0) {
        for (int l = 0; l < c.n_layers; l++) {
            const std::string full = "layers." + std::to_string(l) + "." + name;
            INFO(full);
            const std::vector<float> ours = values_of(m, full);
            CHECK(file.take(n) == (heads ? interleave(ours, heads, d, D) : ours));
        }
    };
    auto norms = [&] { each_layer("attn_norm", D); };
    auto attention = [&] {
        each_layer("wq", q * D, c.n_heads);
        each_layer("wk", kv * D, c.n_kv_heads);
        each_layer("wv", kv * D);
        each_layer("wo", D * q);
    };
    auto ffn = [&] {
        each_layer("w_gate", F * D);
        each_layer("w_down", D * F);
        each_layer("w_up", F * D);
    };
    auto one = [&](const char *name, int64_t n) { CHECK(file.take(n) == values_of(m, name)); };
    if (legacy) {
        one("embed", (int64_t)c.vocab * D), norms(), attention(), each_layer("ffn_norm", D), ffn(), one("out_norm", D);
        file.take((int64_t)c.max_len * d);    // cos and sin
    } else {
        norms(), each_layer("ffn_norm", D), one("out_norm", D), one("embed", (int64_t)c.vocab * D), attention(), ffn();
    }
    if (!c.tied) one("unembed", (int64_t)c.vocab * D);
    CHECK(file.at == bytes.size());
}

TEST_CASE("convert: llama2.c") {
    const TempFolder folder("llama2c");
    const std::string models = "../shared/models/", tok = models + "stories260K/tok512.";
    struct Case { const char *file; const char *tokenizer; int ffn_dim, max_len; bool legacy; };
    for (const Case &k : {Case{"stories260K/stories260K.bin", "bin", 172, 512, true},
                          Case{"stories260K/stories260K_v1.bin", "model", 172, 512, false},
                          Case{"llama2xs/model.bin", "model", 192, 256, true}}) {
        if (!have(models + k.file)) continue;
        INFO(k.file);
        REQUIRE(convert_to(models + k.file, folder.path + "m.bin", "", tok + k.tokenizer).line == "");
        const Model m = model_open(folder.path + "m.bin");
        const Config &c = m.config;
        CHECK(c.dim == 64);
        CHECK(c.ffn_dim == k.ffn_dim);
        CHECK(c.n_layers == 5);
        CHECK(c.n_heads == 8);
        CHECK(c.n_kv_heads == 4);
        CHECK(c.head_dim == 8);
        CHECK(c.vocab == 512);
        CHECK(c.max_len == k.max_len);
        CHECK(c.tied);
        CHECK(c.norm_eps == 1e-5f);
        CHECK(c.rope_theta == 10000.0f);
        CHECK(c.bos == std::vector<int>{1});
        CHECK(c.eos == std::vector<int>{2});
        CHECK(m.embed.type == DType::f32);
        CHECK(m.unembed.data == m.embed.data);
        CHECK(m.step_bytes == m.weights_bytes);
        check_llama2c(m, read_file(models + k.file), k.legacy);
    }
}

// A small llama2.c file with every value different.
static std::string llama2c_bytes(std::vector<int32_t> head, int64_t floats) {
    std::string bytes((const char *)head.data(), head.size() * 4);
    for (int64_t i = 0; i < floats; i++) {
        const float x = (float)(i % 1000) / 1024.0f;
        bytes.append((const char *)&x, 4);
    }
    return bytes;
}

TEST_CASE("convert: llama2.c files that lie, and untied ones") {
    const TempFolder folder("llama2c_bad");
    const std::string path = folder.path + "x.bin", out = folder.path + "m.bin";
    // dim 16, ffn 8, 2 layers, 2 heads, 1 kv head, vocab 64, max_len 4: head_dim 8
    const std::vector<int32_t> head = {16, 8, 2, 2, 1, 64, 4};
    const int64_t tied = 64 * 16 + 2 * (16 + 2 * 256 + 2 * 128 + 16 + 3 * 128) + 16 + 4 * 8, untied = tied + 64 * 16;
    auto with = [&](int field, int32_t value) {
        std::vector<int32_t> h = head;
        h[field] = value;
        return h;
    };
    for (const bool is_tied : {true, false}) {
        write_file(path, llama2c_bytes(with(5, is_tied ? 64 : -64), is_tied ? tied : untied));
        REQUIRE(convert_to(path, out, "", HF_TOKENIZER).line == "");
        const Model m = model_open(out);
        CHECK(m.config.tied == is_tied);
        check_llama2c(m, read_file(path), true);
        CHECK(m.weights_bytes - m.step_bytes == (is_tied ? 0 : 64 * 16 * 4));
    }
    const int32_t magic = 0x616b3432, big = 1 << 30;
    struct Case { const char *what; std::string bytes; const char *part; int code; };
    const Case cases[] = {
        {"empty",            "",                                         "found 0 bytes", 1},
        {"27 bytes",         std::string(27, 'x'),                       "found 27 bytes", 1},
        {"header alone",     llama2c_bytes(head, 0),                     "found 28", 1},
        {"a float short",    llama2c_bytes(head, tied - 1),              "bytes, found", 1},
        {"a float more",     llama2c_bytes(head, tied + 1),              "bytes, found", 1},
        {"dim 0",            llama2c_bytes(with(0, 0), tied),            "dim: expected 1 to", 1},
        {"dim < 0",          llama2c_bytes(with(0, -16), tied),          "dim", 1},
        {"dim 2^30",         llama2c_bytes(with(0, big), tied),          "dim: expected 1 to 131072, found 1073741824", 1},
        {"dim 18",           llama2c_bytes(with(0, 18), tied),           "head_dim: expected a multiple of 8, found 9", 1},
        {"dim 17",           llama2c_bytes(with(0, 17), tied),           "n_heads to divide dim", 1},
        {"0 heads",          llama2c_bytes(with(3, 0), tied),            "n_heads", 1},
        {"-2 heads",         llama2c_bytes(with(3, -2), tied),           "n_heads", 1},
        {"0 kv heads",       llama2c_bytes(with(4, 0), tied),            "n_kv_heads", 1},
        {"4 kv heads",       llama2c_bytes(with(4, 4), tied),            "n_kv_heads", 1},
        {"2^30 layers",      llama2c_bytes(with(2, big), tied),          "n_layers", 1},
        {"vocab 0",          llama2c_bytes(with(5, 0), tied),            "vocab", 1},
        {"vocab -2^31",      llama2c_bytes(with(5, INT32_MIN), tied),    "vocab", 1},
        {"max_len 0",        llama2c_bytes(with(6, 0), tied),            "max_len", 1},
        {"max_len 2^30",     llama2c_bytes(with(6, big), tied),          "max_len", 1},
        {"version 2",        llama2c_bytes({magic, 2, 16, 8, 2, 2, 1, 64, 4}, 100), "legacy or 1, found 2 (int8)", 2},
        {"version 1, no 0/1", llama2c_bytes({magic, 1, 16, 8, 2, 2, 1, 64, 4, 7}, 100), "shared_classifier: expected 0 or 1, found 7", 1},
        {"version 1, short", llama2c_bytes({magic, 1, 16, 8, 2, 2, 1, 64, 4, 1}, 100), "(version 1)", 1},
        {"GGUF",             "GGUF" + std::string(100, '\0'),            "GGUF is not supported", 2},
        {"PyTorch",          "PK\3\4" + std::string(100, '\0'),          "PyTorch", 2},
        {"safetensors",      container("{}", ""),                        "give the folder", 2},
        {"NaN",              llama2c_bytes(head, tied - 1) + std::string("\0\0\xc0\x7f", 4), "", 0},    // in the sin table
    };
    for (const Case &k : cases) {
        INFO(k.what);
        write_file(path, k.bytes);
        const Outcome o = convert_to(path, out, "", HF_TOKENIZER);
        INFO(o.line);
        CHECK(o.code == k.code);
        CHECK(contains(o.line, k.part));
        CHECK((o.code == 0 || contains(o.line, path)));
    }
    std::string nan = llama2c_bytes(head, tied);
    nan.replace(28 + 5 * 4, 4, std::string("\0\0\xc0\x7f", 4));
    write_file(path, nan);
    CHECK(contains(convert_to(path, out, "", HF_TOKENIZER).line, "tensor 'embed': element 5 is nan"));
    write_file(path, llama2c_bytes(head, tied));
    CHECK(contains(convert_to(path, out).line, "--tokenizer"));
    CHECK(folder.list().size() == 2);
}
