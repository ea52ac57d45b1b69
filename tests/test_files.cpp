// test_files.cpp - files that lie: truncated and edited safetensors, model.bin, llama2.c, index and tokenizer files.
// Each must give one line that names the file and the thing that is wrong, with its exit code, and touch no byte outside
// the file (the sanitizer build watches that).
#include <cmath>
#include <doctest/doctest.h>
#include "temp_files.h"

static void check_line(const Outcome &o, const std::string &file, const std::string &part, int code) {
    INFO("line: ", o.line);
    CHECK(o.code == code);
    CHECK(contains(o.line, file));
    CHECK(contains(o.line, part));
    CHECK(o.line.size() < 500);
    for (const char c : o.line) CHECK((unsigned char)c >= 32);
}

TEST_CASE("safetensors: headers that lie") {
    const TempFolder folder("headers");
    const std::string path = folder.path + "x.safetensors";
    auto entry = [](const char *shape, const char *offsets, const char *dtype = "\"F32\"") {
        return std::string("{\"a\":{\"dtype\":") + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}}";
    };
    const std::string a = "{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}", data(64, '\0');
    struct Case { const char *what; std::string header; std::string part; };
    const Case cases[] = {
        {"not JSON",             "{\"a\":",                                       "not valid JSON"},
        {"a byte behind JSON",   "{}x",                                           "not valid JSON"},
        {"not UTF-8",            "{\"\xff\":1}",                                  "not valid JSON"},
        {"a list",               "[]",                                            "expected an object"},
        {"a key twice",          "{\"a\":" + a + ",\"a\":" + a + "}",             "occurs twice"},
        {"dtype twice",          "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F16\"}}", "occurs twice"},
        {"nested deep",          "{\"a\":" + std::string(100000, '[') + "}",      "nested deeper"},
        {"entry is a number",    "{\"a\":1}",                                     "tensor 'a': expected an object, found 1"},
        {"no dtype",             "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", "dtype: missing"},
        {"no shape",             "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", "shape: missing"},
        {"no offsets",           "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}",     "data_offsets: missing"},
        {"dtype is a number",    entry("[16]", "[0,64]", "32"),                   "dtype: expected a string, found 32"},
        {"shape is a number",    entry("16", "[0,64]"),                           "shape: expected a list"},
        {"shape is long",        entry("[1,1,1,1,1,1,1,1,16]", "[0,64]"),         "at most 8, found a list of 9"},
        {"negative shape",       entry("[-16]", "[0,64]"),                        "whole number"},
        {"two negatives",        entry("[-4,-4]", "[0,64]"),                      "found -4"},
        {"float shape",          entry("[16.0]", "[0,64]"),                       "found 16.0"},
        {"shape beyond 64 bit",  entry("[99999999999999999999]", "[0,64]"),       "whole number"},
        {"shape 2^64 - 1",       entry("[18446744073709551615]", "[0,64]"),       "found 18446744073709551615"},
        {"elements overflow",    entry("[4294967296,4294967296]", "[0,64]"),      "64 bits"},
        {"overflow to 16",       entry("[4611686018427387905,16]", "[0,64]"),     "64 bits"},
        {"bytes overflow",       entry("[4611686018427387920]", "[0,64]"),        "expected (4611686018427387920) of F32"},
        {"bytes differ",         entry("[15]", "[0,64]"),                         "expected (15) of F32 in data_offsets, found 64"},
        {"empty and overflow",   entry("[0,4294967296,4294967296]", "[0,64]"),    "found 64 bytes"},
        {"one offset",           entry("[16]", "[64]"),                           "expected [begin, end], found [64]"},
        {"three offsets",        entry("[16]", "[0,64,64]"),                      "expected [begin, end]"},
        {"negative offset",      entry("[16]", "[-64,0]"),                        "found -64"},
        {"float offset",         entry("[16]", "[0,6.4e1]"),                      "found 64.0"},
        {"end before begin",     entry("[16]", "[64,0]"),                         "begin <= end"},
        {"end behind the file",  entry("[32]", "[0,128]"),                        "truncated"},
        {"end far behind",       entry("[16]", "[0,9223372036854775807]"),        "truncated"},
        {"a gap in front",       entry("[15]", "[4,64]"),                         "gap"},
        {"data left over",       entry("[15]", "[0,60]"),                         "expected 60 bytes of data"},
        {"data without tensors", "{}",                                            "expected 0 bytes of data"},
        {"overlap", "{\"a\":{\"dtype\":\"U8\",\"shape\":[40],\"data_offsets\":[0,40]},"
                    "\"b\":{\"dtype\":\"U8\",\"shape\":[32],\"data_offsets\":[32,64]}}", "overlap"},
        {"the same bytes twice", "{\"a\":{\"dtype\":\"U8\",\"shape\":[64],\"data_offsets\":[0,64]},"
                                 "\"b\":{\"dtype\":\"U8\",\"shape\":[64],\"data_offsets\":[0,64]}}", "overlap"},
        {"metadata is a list",   "{\"__metadata__\":[]}",                         "__metadata__: expected an object"},
        {"metadata number",      "{\"__metadata__\":{\"k\":1}}",                  "__metadata__: k: expected a string, found 1"},
        {"a line feed in a name", "{\"a\\nb\":1}",                                "tensor 'a?b'"},
        {"a long name",          "{\"" + std::string(5000, 'n') + "\":1}",        "nnn...': expected"},
    };
    for (const Case &c : cases) {
        SUBCASE(c.what) {
            write_file(path, container(c.header, data));
            check_line(outcome_of([&] { safetensors_open(path); }), path, c.part, 1);
        }
    }
    SUBCASE("a dtype we do not know is only a name") {
        write_file(path, container(entry("[3,7]", "[0,64]", "\"F4\""), data));
        CHECK(safetensors_open(path).find("a")->dtype == "F4");
    }
    SUBCASE("empty tensors and no metadata are fine") {
        write_file(path, container("{\"a\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[0,0]},"
                                   "\"b\":{\"dtype\":\"U8\",\"shape\":[8,8],\"data_offsets\":[0,64]}}", data));
        const Safetensors file = safetensors_open(path);
        CHECK(file.find("a")->elements() == 0);
        CHECK(file.find("b")->elements() == 64);
        CHECK(file.find("c") == nullptr);
    }
}

TEST_CASE("safetensors: files that are none") {
    const TempFolder folder("none");
    const std::string path = folder.path + "x.safetensors";
    auto open_with = [&](const std::string &bytes) {
        write_file(path, bytes);
        return outcome_of([&] { safetensors_open(path); });
    };
    check_line(outcome_of([&] { safetensors_open(path); }), path, "No such file", 1);
    check_line(outcome_of([&] { safetensors_open(folder.path); }), folder.path, "found a folder", 1);
    check_line(outcome_of([&] { safetensors_open("/dev/null"); }), "/dev/null", "not a regular file", 1);
    check_line(open_with(""), path, "at least 8 bytes, found 0", 1);
    check_line(open_with("1234567"), path, "found 7", 1);
    check_line(open_with(le64(0)), path, "header_bytes", 1);
    check_line(open_with(le64(2) + "{"), path, "expected 2 to 1, found 2", 1);
    check_line(open_with(le64(~0ull) + "{}"), path, "found 18446744073709551615", 1);
    check_line(open_with(le64(~0ull - 7) + "{}"), path, "header_bytes", 1);    // + 8 would be 0
    check_line(open_with(le64(100'000'001) + "{}"), path, "header_bytes", 1);
}

// ---- model.bin ----

static const std::string &tiny_model_bytes() {    // written once: the writer waits for the disk
    static const std::string bytes = [] {
        const TempFolder folder("tiny");
        write_tiny_model(folder.path + "model.bin", tiny_config(), DType::bf16);
        return read_file(folder.path + "model.bin");
    }();
    return bytes;
}

TEST_CASE("model.bin: edited") {
    const TempFolder folder("edited");
    const std::string path = folder.path + "model.bin";
    const std::string good = tiny_model_bytes();
    write_file(path, good);
    REQUIRE(outcome_of([&] { model_open(path); }).line == "");

    // Replaces one field of the config, or of the tokenizer, inside its string in the metadata.
    auto set = [](const char *part, const char *field, const Json &value) -> Edit {
        return [=](OrderedJson &h, std::string &) {
            Json j = Json::parse(h["__metadata__"][part].get<std::string>());
            if (value.is_discarded()) j.erase(field); else j[field] = value;
            h["__metadata__"][part] = j.dump();
        };
    };
    const Json gone(Json::value_t::discarded);
    auto metadata = [](const char *key, const std::string &text) -> Edit {
        return [=](OrderedJson &h, std::string &) { h["__metadata__"][key] = text; };
    };
    auto poke = [](const char *tensor, size_t byte, const std::string &bytes) -> Edit {
        return [=](OrderedJson &h, std::string &data) {
            data.replace((size_t)h[tensor]["data_offsets"][0] + byte, bytes.size(), bytes);
        };
    };
    struct Case { const char *what; Edit edit; std::string part; int code; };
    const Case cases[] = {
        {"no metadata",        [](OrderedJson &h, std::string &) { h.erase("__metadata__"); }, "build/convert", 1},
        {"no version",         [](OrderedJson &h, std::string &) { h["__metadata__"].erase("format_version"); }, "format_version: missing", 1},
        {"version 2",          metadata("format_version", "2"),      "format_version: expected 1, found 2", 2},
        {"config is no JSON",  metadata("config", "{"),              "config: not valid JSON", 1},
        {"config is a list",   metadata("config", "[]"),             "config: expected an object", 1},
        {"config key twice",   metadata("config", "{\"dim\":1,\"dim\":2}"), "occurs twice", 1},
        {"unknown field",      set("config", "window", 512),         "unknown field 'window'", 1},
        {"no dim",             set("config", "dim", gone),           "dim: missing", 1},
        {"dim 0",              set("config", "dim", 0),              "dim: expected a whole number from 1", 1},
        {"dim -16",            set("config", "dim", -16),            "found -16", 1},
        {"dim 2^32 + 16",      set("config", "dim", 4294967312),     "found 4294967312", 1},
        {"dim 16.5",           set("config", "dim", 16.5),           "found 16.5", 1},
        {"dim a string",       set("config", "dim", "16"),           "found \"16\"", 1},
        {"dim true",           set("config", "dim", true),           "found true", 1},
        {"dim 24",             set("config", "dim", 24),             "tensor 'embed': shape: expected (260, 24), found (260, 16)", 1},
        {"a billion layers",   set("config", "n_layers", 1000000000), "n_layers: expected", 1},
        {"a layer more",       set("config", "n_layers", 3),         "tensor 'layers.2.attn_norm': missing", 1},
        {"a layer less",       set("config", "n_layers", 1),         "tensor 'layers.1.attn_norm': not expected", 1},
        {"3 kv heads",         set("config", "n_kv_heads", 3),       "n_kv_heads: expected a divisor of n_heads = 4, found 3", 1},
        {"0 kv heads",         set("config", "n_kv_heads", 0),       "n_kv_heads", 1},
        {"more kv heads",      set("config", "n_kv_heads", 8),       "n_kv_heads", 1},
        {"head_dim 12",        set("config", "head_dim", 12),        "head_dim: expected a multiple of 8", 1},
        {"head_dim 264",       set("config", "head_dim", 264),       "head_dim: expected a whole number from 1 to 256", 1},
        {"max_len 0",          set("config", "max_len", 0),          "max_len", 1},
        {"eps -1",             set("config", "norm_eps", -1),        "norm_eps", 1},
        {"eps 0",              set("config", "norm_eps", 0),         "norm_eps", 1},
        {"eps null",           set("config", "norm_eps", nullptr),   "norm_eps", 1},
        {"theta 0",            set("config", "rope_theta", 0),       "rope_theta", 1},
        {"theta 1e300",        set("config", "rope_theta", 1e300),   "rope_theta", 1},
        {"scaling is a name",  set("config", "rope_scaling", "yarn"), "rope_scaling: expected an object", 1},
        {"scaling is empty",   set("config", "rope_scaling", Json::object()), "rope_scaling: factor: missing", 1},
        {"tied is 1",          set("config", "tied", 1),             "tied: expected true or false, found 1", 1},
        {"tied",               set("config", "tied", true),          "tensor 'unembed': not expected", 1},
        {"eos beyond vocab",   set("config", "eos", {260}),          "eos: expected ids from 0 to 259, found 260", 1},
        {"eos -1",             set("config", "eos", {-1}),           "eos", 1},
        {"two bos",            set("config", "bos", {1, 2}),         "bos: expected at most one", 1},
        {"vocab below the tokenizer's", [](OrderedJson &h, std::string &) {
                                   Json j = Json::parse(h["__metadata__"]["config"].get<std::string>());
                                   j["vocab"] = 257, j["bos"] = Json::array(), j["eos"] = Json::array();
                                   h["__metadata__"]["config"] = j.dump();
                               }, "tokenizer: expected at most vocab = 257 tokens, found 258", 1},
        {"tokenizer is empty", metadata("tokenizer", ""),            "tokenizer", 1},
        {"tokenizer has no pieces", set("tokenizer", "pieces", gone), "tokenizer", 1},
        {"piece is a number",  set("tokenizer", "pieces", {1}),      "tokenizer", 1},
        {"tokenizer bos 9999", set("tokenizer", "bos", 9999),        "tokenizer", 1},
        {"tokenizer bos -2",   set("tokenizer", "bos", -2),          "tokenizer", 1},
        {"tokenizer eos -1",   set("tokenizer", "eos", {-1}),        "tokenizer", 1},
        {"added id -5",        set("tokenizer", "added", {{-5, "x", ""}}), "tokenizer", 1},
        {"merges of -1",       set("tokenizer", "merges", {-1, -1}), "tokenizer", 1},
        {"unknown kind",       set("tokenizer", "kind", "wordpiece"), "tokenizer", 1},
        {"types too short",    set("tokenizer", "types", "n"),       "tokenizer", 1},
        {"a tensor renamed",   [](OrderedJson &h, std::string &) { h["wq"] = h["layers.1.wq"]; h.erase("layers.1.wq"); },
                               "tensor 'layers.1.wq': missing", 1},
        {"norm in f16",        [](OrderedJson &h, std::string &) { h["out_norm"]["dtype"] = "F16"; h["out_norm"]["shape"] = {32}; },
                               "tensor 'out_norm': dtype: expected F32, found F16", 1},
        {"matrix of I16",      [](OrderedJson &h, std::string &) { h["layers.0.wk"]["dtype"] = "I16"; },
                               "tensor 'layers.0.wk': dtype: expected F32, F16, BF16, I8 (q8) or U8 (q4), found I16", 1},
        {"matrix transposed",  [](OrderedJson &h, std::string &) { h["layers.0.wo"]["shape"] = {32, 16}; },
                               "tensor 'layers.0.wo': shape: expected (16, 32), found (32, 16)", 1},
        {"matrix flattened",   [](OrderedJson &h, std::string &) { h["layers.0.wo"]["shape"] = {512}; }, "found (512)", 1},
        {"one tensor more",    [](OrderedJson &h, std::string &data) {
                                   h["bias"] = {{"dtype", "U8"}, {"shape", {1}}, {"data_offsets", {data.size(), data.size() + 1}}};
                                   data += 'x';
                               }, "tensor 'bias': not expected", 1},
        {"a pad of 64 bytes",  [](OrderedJson &h, std::string &data) {
                                   h["pad.99"] = {{"dtype", "U8"}, {"shape", {64}}, {"data_offsets", {data.size(), data.size() + 64}}};
                                   data += std::string(64, 'x');
                               }, "tensor 'pad.99': not expected", 1},
        {"data cut by a byte", [](OrderedJson &, std::string &data) { data.pop_back(); }, "truncated", 1},
        {"a byte more",        [](OrderedJson &, std::string &data) { data += 'x'; }, "bytes of data", 1},
        {"NaN in a norm",      poke("layers.1.ffn_norm", 20, std::string("\x00\x00\xc0\x7f", 4)),
                               "tensor 'layers.1.ffn_norm': element 5: expected a finite number, found nan", 1},
        {"infinity in a norm", poke("out_norm", 0, std::string("\x00\x00\x80\xff", 4)), "element 0", 1},
    };
    for (const Case &c : cases) {
        SUBCASE(c.what) {
            write_file(path, edit_container(good, c.edit));
            check_line(outcome_of([&] { model_open(path); }), path, c.part, c.code);
        }
    }
    SUBCASE("data not aligned") {    // the header without its padding and one byte more
        uint64_t n = 0;
        for (int i = 7; i >= 0; i--) n = n << 8 | (uint8_t)good[i];
        write_file(path, le64(n + 1) + good.substr(8, n) + " " + good.substr(8 + n));
        check_line(outcome_of([&] { model_open(path); }), path, "tensor 'embed': expected to start on a multiple of 64 bytes", 1);
    }
}

TEST_CASE("model.bin: cut anywhere, or a byte changed anywhere in the header") {
    const TempFolder folder("cut");
    const std::string path = folder.path + "model.bin";
    const std::string good = tiny_model_bytes();
    auto judge = [&](const std::string &bytes, bool may_open) {
        write_file(path, bytes);
        const Outcome o = outcome_of([&] { model_open(path); });
        INFO("line: ", o.line);
        if (!may_open) CHECK(o.code == 1);
        if (o.code != 0) CHECK(contains(o.line, path));
        for (const char c : o.line) if ((unsigned char)c < 32) FAIL("a control byte in the line");
    };
    for (size_t n = 0; n < good.size(); n += n < 200 ? 1 : 61) judge(good.substr(0, n), false);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | (uint8_t)good[i];
    // 0 and 255 are never legal in JSON, the digits and signs often are.
    for (size_t i = 0; i < 8 + header; i += i < 16 ? 1 : 5) {
        for (const char c : {'\0', '\xff', '9', '-', '"'}) {
            std::string bytes = good;
            bytes[i] = c;
            judge(bytes, true);
        }
    }
}

TEST_CASE("writing: values that do not fit, and nothing left behind") {
    const TempFolder folder("writing");
    const std::string path = folder.path + "model.bin";
    const Config c = tiny_config();
    auto write = [&](DType type, const std::string &name, int64_t at, float x) {
        return outcome_of([&] {
            model_write(path, c, tiny_tokenizer(), type, [&](const TensorSpec &spec, int64_t first, int64_t n, float *rows) {
                const int64_t cols = spec.shape.back();
                for (int64_t i = 0; i < n * cols; i++) rows[i] = spec.name == name && first * cols + i == at ? x : 0.5f;
            }, [](const std::string &, uint64_t, uint64_t) {});
        });
    };
    check_line(write(DType::bf16, "layers.1.w_down", 7, NAN), "layers.1.w_down", "element 7 is nan, expected a finite number", 1);
    check_line(write(DType::f32, "unembed", 4159, INFINITY), "unembed", "element 4159 is inf", 1);
    check_line(write(DType::f16, "embed", 0, 65520.0f), "embed", "use --dtype bf16", 1);
    check_line(write(DType::bf16, "embed", 1, 3.4e38f), "embed", "use --dtype f32", 1);
    check_line(write(DType::f16, "out_norm", 15, -NAN), "out_norm", "element 15", 1);
    CHECK(folder.list().empty());
    CHECK(write(DType::f16, "embed", 0, 65519.0f).line == "");
    CHECK(write(DType::f16, "out_norm", 0, 1e6f).line == "");    // norms stay f32
    const std::string before = read_file(path);
    CHECK(write(DType::f32, "embed", 3, NAN).code == 1);
    CHECK(read_file(path) == before);    // a failure leaves the old file alone
    CHECK(folder.list().size() == 1);
    check_line(outcome_of([&] { write_tiny_model(folder.path + "no/model.bin", c, DType::f32); }), "no/", "No such file", 1);
    check_line(outcome_of([&] { write_tiny_model(folder.path, c, DType::f32); }), folder.path, "not a regular file", 2);
}
