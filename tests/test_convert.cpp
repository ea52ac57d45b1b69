// test_convert.cpp - Hugging Face folders become model.bin: every value arrives in its place, what does not fit is
// refused by name, a failure loses nothing, and memory stays small.
#include <cmath>
#include <csignal>
#include <doctest/doctest.h>
#include <sstream>
#include <sys/resource.h>
#include <sys/wait.h>
#include "temp_files.h"

// ---- Hugging Face ---------------------------------------------------------------------------------------------------

TEST_CASE("convert: books-5m keeps its bytes") {
    const std::string source = "../shared/models/books-5m/";
    if (!have(source)) return;
    const TempFolder folder("books");
    REQUIRE(convert_to(source, folder.path + "m.bin").line == "");
    const Model m = model_open(folder.path + "m.bin");
    const Config &c = m.config;
    CHECK(c.dim == 256);
    CHECK(c.ffn_dim == 704);
    CHECK(c.n_layers == 6);
    CHECK(c.n_heads == 4);
    CHECK(c.n_kv_heads == 2);
    CHECK(c.head_dim == 64);
    CHECK(c.vocab == 4096);
    CHECK(c.max_len == 1024);
    CHECK(c.tied);
    CHECK(m.embed.type == DType::bf16);
    const Safetensors theirs = safetensors_open(source + "model.safetensors");
    const std::pair<const char *, const char *> names[] = {
        {"embed", "model.embed_tokens.weight"}, {"layers.0.wq", "model.layers.0.self_attn.q_proj.weight"},
        {"layers.1.wk", "model.layers.1.self_attn.k_proj.weight"}, {"layers.2.wv", "model.layers.2.self_attn.v_proj.weight"},
        {"layers.3.wo", "model.layers.3.self_attn.o_proj.weight"}, {"layers.4.w_gate", "model.layers.4.mlp.gate_proj.weight"},
        {"layers.5.w_up", "model.layers.5.mlp.up_proj.weight"}, {"layers.0.w_down", "model.layers.0.mlp.down_proj.weight"}};
    for (const auto &n : names) {
        const TensorView *a = m.file->find(n.first), *b = theirs.find(n.second);
        REQUIRE(a->bytes == b->bytes);
        CHECK(memcmp(a->data, b->data, a->bytes) == 0);
    }
    const bf16 *norm = (const bf16 *)theirs.find("model.layers.3.post_attention_layernorm.weight")->data;
    for (int i = 0; i < c.dim; i++) CHECK(m.layers[3].ffn_norm[i] == to_f32(norm[i]));
}

// A folder as save_pretrained writes it, of which the tests below spoil one thing at a time.
struct HfFolder {
    const TempFolder folder;
    const std::string out;
    Json config = Json::parse(R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "vocab_size": 68, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1})");
    struct Tensor { std::string dtype; std::vector<int64_t> shape; std::string bytes; };
    std::map<std::string, Tensor> tensors;

    explicit HfFolder(const std::string &name) : folder(name), out(folder.path + "m.bin") {
        add("model.embed_tokens.weight", {68, 16}), add("model.norm.weight", {16}), add("lm_head.weight", {68, 16});
        for (const char *layer : {"model.layers.0.", "model.layers.1."}) {
            const std::string l = layer;
            add(l + "input_layernorm.weight", {16}), add(l + "post_attention_layernorm.weight", {16});
            add(l + "self_attn.q_proj.weight", {32, 16}), add(l + "self_attn.k_proj.weight", {16, 16});
            add(l + "self_attn.v_proj.weight", {16, 16}), add(l + "self_attn.o_proj.weight", {16, 32});
            add(l + "mlp.gate_proj.weight", {24, 16}), add(l + "mlp.up_proj.weight", {24, 16});
            add(l + "mlp.down_proj.weight", {16, 24});
        }
    }
    void add(const std::string &name, const std::vector<int64_t> &shape, const std::string &dtype = "F32") {
        int64_t n = 1;
        for (const int64_t s : shape) n *= s;
        std::string bytes;
        for (int64_t i = 0; i < n; i++) {
            const float x = tiny_value(name, i);
            const f16 h = to_f16(x);
            const bf16 b = to_bf16(x);
            bytes.append(dtype == "F32" ? (const char *)&x : dtype == "F16" ? (const char *)&h : (const char *)&b,
                         dtype_bytes(dtype));
        }
        tensors[name] = {dtype, shape, bytes};
    }
    void write_weights(const std::string &file, const std::function<bool(const std::string &)> &wanted) const {
        OrderedJson header;
        std::string data;
        for (const auto &t : tensors) {
            if (!wanted(t.first)) continue;
            header[t.first] = {{"dtype", t.second.dtype}, {"shape", t.second.shape},
                               {"data_offsets", {data.size(), data.size() + t.second.bytes.size()}}};
            data += t.second.bytes;
        }
        // No padding, so that the data of theirs start anywhere, as they do in the wild.
        const std::string text = header.dump() + (header.dump().size() % 2 ? "" : " ");
        write_file(folder.path + file, le64(text.size()) + text + data);
    }
    void write_config() const { write_file(folder.path + "config.json", config.dump()); }
    Outcome convert(const std::string &dtype = "") const {
        write_config();
        write_weights("model.safetensors", [](const std::string &) { return true; });
        return convert_to(folder.path, out, dtype, HF_TOKENIZER);
    }
};

TEST_CASE("convert: dtypes round to nearest even, and the checkpoint's is the default") {
    HfFolder hf("dtypes");
    auto &wq = hf.tensors["model.layers.1.self_attn.q_proj.weight"];
    // Halfway between two bf16 (1 and 1 + 2^-7), the odd one below; the same for f16 (2^-10); a value below f16's range.
    const float in[] = {1.00390625f, 1.01171875f, 1.00048828125f, 1.00146484375f, 1e-9f, -0.0f};
    memcpy(&wq.bytes[0], in, sizeof in);
    struct Case { const char *dtype; DType type; float out[6]; };
    for (const Case &k : {Case{"f32", DType::f32, {in[0], in[1], in[2], in[3], in[4], in[5]}},
                          Case{"f16", DType::f16, {in[0], in[1], 1.0f, 1.001953125f, 0.0f, -0.0f}},
                          Case{"bf16", DType::bf16, {1.0f, 1.015625f, 1.0f, 1.0f, 0x1.12p-30f, -0.0f}},
                          Case{"", DType::f32, {in[0], in[1], in[2], in[3], in[4], in[5]}}}) {
        INFO("dtype ", k.dtype);
        REQUIRE(hf.convert(k.dtype).line == "");
        const Model m = model_open(hf.out);
        CHECK(m.layers[1].wq.type == k.type);
        const std::vector<float> x = values_of(m, "layers.1.wq");
        for (int i = 0; i < 6; i++) CHECK(x[i] == k.out[i]);
        CHECK(std::signbit(x[5]));
        for (int i = 6; i < 512; i++) CHECK(x[i] == tiny_value("model.layers.1.self_attn.q_proj.weight", i));
        CHECK(m.layers[0].attn_norm[3] == tiny_value("model.layers.0.input_layernorm.weight", 3));
    }
    CHECK(contains(hf.convert("int8").line, "--dtype 'int8': expected f32, f16, bf16, q8 or q4"));
    for (auto &t : hf.tensors) hf.add(t.first, t.second.shape, "F16");
    REQUIRE(hf.convert().line == "");
    CHECK(model_open(hf.out).embed.type == DType::f16);
    hf.add("lm_head.weight", {68, 16}, "BF16");
    REQUIRE(hf.convert().line == "");
    CHECK(model_open(hf.out).embed.type == DType::f32);    // the one type that holds both
}

TEST_CASE("convert: shards") {
    HfFolder hf("shards");
    REQUIRE(hf.convert().line == "");
    const std::string whole = read_file(hf.out);
    const std::string dir = hf.folder.path, index = dir + "model.safetensors.index.json";
    unlink((dir + "model.safetensors").c_str());
    Json map;
    for (const auto &t : hf.tensors) map[t.first] = contains(t.first, "layers.0") ? "a.safetensors" : "b.safetensors";
    hf.write_weights("a.safetensors", [&](const std::string &n) { return map[n] == "a.safetensors"; });
    hf.write_weights("b.safetensors", [&](const std::string &n) { return map[n] == "b.safetensors"; });
    auto attempt = [&](const Json &j) {
        write_file(index, j.dump());
        return convert_to(dir, hf.out, "", HF_TOKENIZER);
    };
    REQUIRE(attempt({{"weight_map", map}}).line == "");
    CHECK(read_file(hf.out) == whole);
    struct Case { const char *what; Json index; const char *part; };
    auto moved = [&](const char *shard) { Json m = map; m["lm_head.weight"] = shard; return Json{{"weight_map", m}}; };
    for (const Case &k : {Case{"no map", Json::object(), "weight_map: missing"}, Case{"a list", Json::array({1}), "expected an object"},
                          Case{"a number", {{"weight_map", {{"x", 1}}}}, "expected a string, found 1"},
                          Case{"not there", moved("c.safetensors"), "shard 'c.safetensors' of tensor 'lm_head.weight' is missing"},
                          Case{"outside", moved("../b.safetensors"), "expected a file name"},
                          Case{"empty", {{"weight_map", Json::object()}}, "no *.safetensors"}}) {
        INFO(k.what);
        const Outcome o = attempt(k.index);
        INFO(o.line);
        CHECK(o.code == 1);
        CHECK(contains(o.line, k.part));
    }
    hf.write_weights("b.safetensors", [&](const std::string &) { return true; });
    CHECK(contains(attempt({{"weight_map", map}}).line, "also in"));
    unlink(index.c_str());
    hf.write_weights("b.safetensors", [&](const std::string &n) { return map[n] == "b.safetensors"; });
    REQUIRE(convert_to(dir, hf.out, "", HF_TOKENIZER).line == "");    // shards without an index
    unlink((dir + "a.safetensors").c_str()), unlink((dir + "b.safetensors").c_str());
    CHECK(contains(convert_to(dir, hf.out, "", HF_TOKENIZER).line, "no *.safetensors"));
    write_file(dir + "pytorch_model.bin", "x");
    CHECK(contains(convert_to(dir, hf.out, "", HF_TOKENIZER).line, "PyTorch"));
    CHECK(read_file(hf.out) == whole);
}

TEST_CASE("convert: tensors that are not as the config says") {
    struct Case { const char *what; std::function<void(HfFolder &)> spoil; const char *part; int code; };
    const std::string k_proj = "model.layers.1.self_attn.k_proj.weight";
    const Case cases[] = {
        {"missing",     [&](HfFolder &f) { f.tensors.erase(k_proj); },            "k_proj.weight': missing", 1},
        {"shape",       [&](HfFolder &f) { f.add(k_proj, {32, 16}); },            "k_proj.weight': shape: expected (16, 16), found (32, 16)", 1},
        {"bias",        [](HfFolder &f) { f.add("model.layers.0.self_attn.q_proj.bias", {32}); }, "q_proj.bias': not supported", 2},
        {"experts",     [](HfFolder &f) { f.add("model.layers.0.block_sparse_moe.gate.weight", {8, 16}); }, "block_sparse_moe", 2},
        {"a layer more", [](HfFolder &f) { f.add("model.layers.2.mlp.up_proj.weight", {24, 16}); }, "model.layers.2", 2},
        {"int32",       [&](HfFolder &f) { f.tensors[k_proj].dtype = "I32"; },    "dtype: not supported: expected F32, F16 or BF16, found I32", 2},
        {"NaN",         [&](HfFolder &f) { f.tensors[k_proj].bytes.replace(40, 4, std::string("\0\0\xc0\x7f", 4)); },
                                                                                  "tensor 'layers.1.wk': element 10 is nan", 1},
        {"no lm_head",  [](HfFolder &f) { f.tensors.erase("lm_head.weight"); },   "lm_head.weight': missing", 1},
        {"tied lm_head", [](HfFolder &f) { f.config["tie_word_embeddings"] = true; }, "", 0},
        {"RoPE tables", [](HfFolder &f) { f.add("model.layers.0.self_attn.rotary_emb.inv_freq", {4}); }, "", 0},
        {"vocab below the tokenizer", [](HfFolder &f) {
             f.config["vocab_size"] = 63;
             f.add("model.embed_tokens.weight", {63, 16}), f.add("lm_head.weight", {63, 16});
         }, "the tokenizer has 64 tokens, expected at most vocab = 63", 1},
    };
    for (const Case &k : cases) {
        SUBCASE(k.what) {
            HfFolder hf("tensors");
            k.spoil(hf);
            const Outcome o = hf.convert();
            INFO(o.line);
            CHECK(o.code == k.code);
            CHECK(contains(o.line, k.part));
            CHECK(path_exists(hf.out) == (k.code == 0));
            CHECK(hf.folder.list().size() == (k.code == 0 ? 3 : 2));    // no temporary file stays
        }
    }
}

// ---- promises -------------------------------------------------------------------------------------------------------

TEST_CASE("convert: neither its source nor a good file is lost") {
    HfFolder hf("promises");
    REQUIRE(hf.convert().line == "");
    const std::string source = hf.folder.path + "model.safetensors", before = read_file(source);
    CHECK(contains(convert_to(hf.folder.path, source, "", HF_TOKENIZER).line, "is the source"));
    REQUIRE(link(source.c_str(), (hf.folder.path + "other").c_str()) == 0);
    CHECK(contains(convert_to(hf.folder.path, hf.folder.path + "other", "", HF_TOKENIZER).line, "is the source"));
    CHECK(read_file(source) == before);
    CHECK(convert_to("no/such/folder", hf.out).code == 1);

    const std::string model = read_file(hf.out);
    ConvertOptions o;
    o.source = hf.folder.path, o.output = hf.out, o.tokenizer = HF_TOKENIZER;
    for (const uint64_t stop : {1, 20, 40}) {    // while writing, and while verifying
        uint64_t calls = 0;
        o.progress = [&](const std::string &, uint64_t, uint64_t) { if (++calls == stop) fail("stopped"); };
        CHECK(outcome_of([&] { convert(o); }).line == "stopped");
    }
    CHECK(read_file(hf.out) == model);
    CHECK(hf.folder.list().size() == 4);
}

static int64_t status_bytes(const char *key) {    // VmRSS, VmHWM: resident now, resident at most
    std::istringstream in(read_file("/proc/self/status"));
    for (std::string line; std::getline(in, line);)
        if (line.compare(0, strlen(key), key) == 0) return atoll(line.c_str() + strlen(key) + 1) * 1024;
    return -1;
}

// Runs f in a child process and returns its exit code; *grown_bytes: its largest resident set beyond what it was born with,
// which is this program's and depends on the tests before.
static int run_child(const std::function<int()> &f, int64_t *grown_bytes) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    const pid_t pid = fork();
    if (pid == 0) {
        if (FILE *reset = fopen("/proc/self/clear_refs", "w")) fputs("5", reset), fclose(reset);    // VmHWM starts again
        const int64_t born = status_bytes("VmRSS");
        const int code = f();
        const int64_t grown = status_bytes("VmHWM") - born;
        _exit(write(ends[1], &grown, sizeof grown) == sizeof grown ? code : -1);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    *grown_bytes = -1;
    if (read(ends[0], grown_bytes, sizeof *grown_bytes) != sizeof *grown_bytes) *grown_bytes = -1;
    close(ends[0]), close(ends[1]);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_CASE("convert: a disk that is full") {
    HfFolder hf("full");
    REQUIRE(hf.convert().line == "");
    const std::string before = read_file(hf.out);
    int64_t grown;
    const int code = run_child([&] {
        signal(SIGXFSZ, SIG_IGN);
        const rlimit limit = {8192, 8192};    // a write beyond it fails, like one on a full disk
        setrlimit(RLIMIT_FSIZE, &limit);
        const Outcome o = convert_to(hf.folder.path, hf.out, "", HF_TOKENIZER);
        return o.code == 1 && contains(o.line, "cannot write") ? 0 : 1;
    }, &grown);
    CHECK(code == 0);
    CHECK(read_file(hf.out) == before);
    CHECK(hf.folder.list().size() == 3);
}

#ifndef __SANITIZE_ADDRESS__    // its shadow memory is not the converter's
TEST_CASE("convert: memory is below the largest tensor + 64 MiB") {
    // 192 MiB of f32 zeros in a file with holes; the largest tensor has 32 MiB.
    HfFolder hf("memory");
    const int64_t D = 1024, F = 2048, V = 8192, L = 4;
    hf.config.update({{"hidden_size", D}, {"intermediate_size", F}, {"num_hidden_layers", L}, {"num_attention_heads", 8},
                      {"num_key_value_heads", 8}, {"head_dim", 128}, {"vocab_size", V}, {"tie_word_embeddings", true}});
    OrderedJson header;
    uint64_t position = 0;
    auto add = [&](const std::string &name, std::vector<int64_t> shape) {
        const uint64_t bytes = 4 * shape[0] * (shape.size() > 1 ? shape[1] : 1);
        header[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {position, position + bytes}}};
        position += bytes;
    };
    add("model.embed_tokens.weight", {V, D}), add("model.norm.weight", {D});
    for (int i = 0; i < L; i++) {
        const std::string l = "model.layers." + std::to_string(i) + ".";
        for (const char *n : {"q", "k", "v", "o"}) add(l + "self_attn." + n + "_proj.weight", {D, D});
        add(l + "mlp.gate_proj.weight", {F, D}), add(l + "mlp.up_proj.weight", {F, D}), add(l + "mlp.down_proj.weight", {D, F});
        add(l + "input_layernorm.weight", {D}), add(l + "post_attention_layernorm.weight", {D});
    }
    const std::string head = container(header.dump(), ""), file = hf.folder.path + "model.safetensors";
    write_file(file, head);
    REQUIRE(truncate(file.c_str(), head.size() + position) == 0);
    hf.write_config();
    int64_t grown;
    CHECK(run_child([&] { return convert_to(hf.folder.path, hf.out, "bf16", HF_TOKENIZER).code; }, &grown) == 0);
    MESSAGE("memory of converting ", position / 1e6, " MB: ", grown / 1e6, " MB");
    CHECK(grown > 0);
    CHECK(grown < 4 * V * D + (64 << 20));
}
#endif
