// test_tokenizer_files.cpp - tokenizer files that lie or ask for what we do not do: each gives one line and its exit code.
// The files are made here by hand, byte by byte, and share no code with the readers.
#include <doctest/doctest.h>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include "temp_files.h"
#include "tokenizer.h"

using nlohmann::json;
using JsonEdit = std::function<void(json &)>;

static void check_outcome(const Outcome &o, const std::string &file, const std::string &part, int code) {
    INFO("line: ", o.line);
    CHECK(o.code == code);
    CHECK(contains(o.line, file));
    CHECK(contains(o.line, part));
    CHECK(o.line.size() < 600);
    for (const char c : o.line) CHECK((unsigned char)c >= 32);
}

static std::string f32_bytes(float f) { return std::string((const char *)&f, 4); }
static std::string u32_bytes(uint32_t u) { return std::string((const char *)&u, 4); }
static std::string byte_name(int b) { return strf("<0x%02X>", b); }

// ---------------------------------------------------------------------------------------------------- our JSON

static json small_json() {
    Tokenizer t;
    t.byte_level = true;
    t.merge_by = MergeBy::MERGES;
    t.split = SplitRule::GPT2;
    t.pieces = {"a", "b", "ab", "<s>"};
    t.types = {TokenType::NORMAL, TokenType::NORMAL, TokenType::NORMAL, TokenType::CONTROL};
    t.merges = {{0, 1, 2}};
    AddedToken s;
    s.id = 3, s.text = "<s>";
    t.added = {s};
    t.bos = 3, t.eos = {3}, t.add_bos = true;
    return json::parse(tokenizer_to_json(t));
}

TEST_CASE("tokenizer files: the JSON of a model file, field by field") {
    CHECK_NOTHROW(tokenizer_from_json(small_json().dump(), "x"));
    struct Case {
        std::string what;
        JsonEdit edit;
        const char *part;
    };
    auto set = [](const char *field, json value) -> JsonEdit { return [=](json &j) { j[field] = value; }; };
    auto drop = [](const char *field) -> JsonEdit { return [=](json &j) { j.erase(field); }; };
    auto scores = [](const char *text) -> JsonEdit {
        return [=](json &j) { j["merge_by"] = "scores", j["merges"] = "", j["scores"] = text; };
    };
    const std::vector<Case> cases = {
        {"no kind", drop("kind"), "kind: expected this field"},
        {"no pieces", drop("pieces"), "pieces: expected this field"},
        {"one field more", set("colour", 1), "colour: no field of this name"},
        {"kind unknown", set("kind", "wordpiece"), "kind: expected one of spm, byte_level, found \"wordpiece\""},
        {"kind a number", set("kind", 7), "kind: expected a string, found 7"},
        {"merge_by unknown", set("merge_by", "luck"), "merge_by: expected one of"},
        {"split unknown", set("split", "gpt9"), "split: expected one of"},
        {"prefix in byte_level", set("prefix", "every"), "prefix, squeeze_spaces: expected none"},
        {"bool as string", set("nfc", "yes"), "nfc: expected true or false, found \"yes\""},
        {"bos -2", set("bos", -2), "bos: expected an id in [-1, 4), found -2"},
        {"bos too high", set("bos", 4), "bos: expected an id in [-1, 4), found 4"},
        {"bos huge", set("bos", 1e10), "bos: expected an integer of 32 bits"},
        {"bos beyond 64 bits", set("bos", 18446744073709551615u), "bos: expected an integer of 32 bits"},
        {"bos 1.5", set("bos", 1.5), "bos: expected an integer of 32 bits, found 1.5"},
        {"add_bos without bos", set("bos", -1), "add_bos: expected false"},
        {"eos a number", set("eos", 3), "eos: expected an array"},
        {"eos negative", set("eos", {-1}), "eos: expected ids in [0, 4), found -1"},
        {"eos twice", set("eos", {3, 3}), "eos: id 3 is listed twice"},
        {"pieces a list", set("pieces", json::array({"a"})), "pieces: expected a string, found array"},
        {"pieces empty", set("pieces", ""), "types: expected 1 letters, found 4"},
        {"pieces no letters", set("pieces", "a b a\u4e00 <s>"), "pieces: entry 2: expected byte letters"},
        {"pieces one less", set("pieces", "a b ab"), "types: expected 3 letters, found 4"},
        {"pieces twice the same", set("pieces", "a a ab <s>"), "pieces: ids 0 and 1 are the same piece"},
        {"a normal piece is empty", set("pieces", "a  ab <s>"), "pieces: id 1: expected some bytes"},
        {"types unknown letter", set("types", "nnqc"), "types: id 2: expected one of the letters nucdbx"},
        {"types with a zero", set("types", std::string("nn\0c", 4)), "types: id 2: expected one of the letters"},
        {"unused with bytes", set("types", "nnxc"), "unused id 2: expected no bytes"},
        {"unknown in byte_level", set("types", "nnnu"), "id 3 is unknown, expected none"},
        {"byte of two bytes", set("types", "nnbc"), "byte token 2: expected 1 byte, found 2"},
        {"merges a list", set("merges", {0, 1}), "merges: expected a string"},
        {"merges odd", set("merges", "0 1 2"), "merges: expected pairs of ids, found 3"},
        {"merges no number", set("merges", "0 x"), "merges: entry 1: expected an id, found \"x\""},
        {"merges two spaces", set("merges", "0  1"), "merges: entry 1: expected an id, found \"\""},
        {"merges negative", set("merges", "-1 0"), "merges: entry 0: expected ids in [0, 4), found -1"},
        {"merges too high", set("merges", "0 4"), "merges: entry 0: expected ids in [0, 4), found 4"},
        {"merges beyond 32 bits", set("merges", "0 4294967297"), "merges: entry 1: expected an id"},
        {"merges that make nothing", set("merges", "0 0"), "merges: entry 0: ids 0 and 0 make no piece"},
        {"merges twice", set("merges", "0 1 0 1"), "merges: entries 0 and 1 are the same pair"},
        {"merges where ranks count", set("merge_by", "ids"), "merges: expected none"},
        {"scores missing", scores(""), "scores: expected 4, found 0"},
        {"scores one less", scores("0 1 2"), "scores: expected 4, found 3"},
        {"scores nan", scores("0 nan 1 2"), "scores: id 1: expected a finite number"},
        {"scores infinite", scores("0 1 inf 2"), "scores: id 2: expected a finite number"},
        {"scores too large", scores("0 1 1e99 2"), "scores: entry 2: expected a number, found \"1e99\""},
        {"added no list", set("added", json::array({1})), "added: entry 0: expected [id, text, flags]"},
        {"added negative", set("added", json::array({json::array({-5, "x", ""})})),
         "added: entry 0: expected an id in [0, 4), found -5"},
        {"added normal", set("added", json::array({json::array({0, "x", ""})})), "added: id 0: expected type u, c or d"},
        {"added no text", set("added", json::array({json::array({3, "", ""})})), "added: id 3: expected a text"},
        {"added flag twice", set("added", json::array({json::array({3, "x", "ll"})})), "flags: expected n, l, r"},
        {"added flag unknown", set("added", json::array({json::array({3, "x", "z"})})), "flags: expected n, l, r"},
        {"added the same text", set("added", json::array({json::array({3, "x", ""}), json::array({3, "x", ""})})),
         "the same text"},
        {"template a number", set("chat_template", 3), "chat_template: expected a string, found 3"},
        {"spm without unknown", [](json &j) { j["kind"] = "spm", j["split"] = "none"; }, "expected one unknown token"},
        {"spm with a split rule", [](json &j) { j["kind"] = "spm", j["types"] = "nnnu"; },
         "split, nfc, ignore_merges: expected none"},
        {"spm with one byte", [](json &j) { j["kind"] = "spm", j["split"] = "none", j["types"] = "nbnu"; },
         "0 or 256 byte tokens"},
    };
    for (const Case &c : cases) {
        INFO(c.what);
        json j = small_json();
        c.edit(j);
        check_outcome(outcome_of([&] { tokenizer_from_json(j.dump(), "model.bin: tokenizer"); }),
                      "model.bin: tokenizer: ", c.part, 1);
    }
    for (const char *text : {"", "{", "[]", "3", "null", "{\"kind\":\"spm\"}", "\xff", "{\"kind\":\"spm\"} x"})
        check_outcome(outcome_of([&] { tokenizer_from_json(text, "model.bin"); }), "model.bin: ", "expected", 1);
    check_outcome(outcome_of([&] { tokenizer_from_json(std::string(200000, '['), "x"); }), "x: ", "100 levels, found 200000",
                  1);
}

// ---------------------------------------------------------------------------------------------------- sentencepiece

static std::string varint(uint64_t v) {
    std::string s;
    for (; v >= 128; v >>= 7) s += (char)(v | 128);
    return s + (char)v;
}
static std::string field(int number, const std::string &bytes) {
    return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
}
static std::string field(int number, uint64_t v) { return varint(number << 3) + varint(v); }

static std::string sentence_piece(const std::string &name, float score, int type) {
    return field(1, field(1, name) + varint(2 << 3 | 5) + f32_bytes(score) + field(3, (uint64_t)type));
}

namespace {
struct SpmFile {
    std::string pieces, trainer = field(3, (uint64_t)2) + field(35, (uint64_t)1),
                        normalizer = field(1, "identity") + field(4, (uint64_t)0);
    std::string bytes() const { return pieces + field(2, trainer) + field(3, normalizer); }
    SpmFile() {
        pieces = sentence_piece("<unk>", 0, 2) + sentence_piece("<s>", 0, 3) + sentence_piece("</s>", 0, 3);
        for (int b = 0; b < 256; b++) pieces += sentence_piece(byte_name(b), 0, 6);
        pieces += sentence_piece("\u2581a", -1, 1) + sentence_piece("\u2581", -2, 1) + sentence_piece("a", -3, 1);
    }
};
}    // namespace

TEST_CASE("tokenizer files: sentencepiece models") {
    const TempFolder folder("spm");
    const std::string path = folder.path + "t.model";
    auto outcome = [&](const std::string &bytes) {
        write_file(path, bytes);
        return outcome_of([&] { tokenizer_import(path); });
    };
    const SpmFile good;
    CHECK(outcome(good.bytes()).line == "");
    CHECK(tokenizer_encode(tokenizer_import(path), "aa", false) == std::vector<int>{259, 261});

    struct Case {
        std::string what;
        std::function<void(SpmFile &)> edit;
        const char *part;
        int code;
    };
    auto add = [](const std::string &bytes) { return [=](SpmFile &f) { f.pieces += bytes; }; };
    auto train = [](const std::string &bytes) { return [=](SpmFile &f) { f.trainer += bytes; }; };
    auto norm = [](const std::string &bytes) { return [=](SpmFile &f) { f.normalizer += bytes; }; };
    for (const Case &c : std::vector<Case>{
             {"unigram", train(field(3, (uint64_t)1)), "model type Unigram: only BPE", 2},
             {"word", train(field(3, (uint64_t)3)), "model type Word: only BPE", 2},
             {"no trainer", [](SpmFile &f) { f.trainer = ""; }, "model type Unigram: only BPE", 2},
             {"whitespace as suffix", train(field(24, (uint64_t)1)), "treat_whitespace_as_suffix", 2},
             {"character map", norm(field(1, "nmt_nfkc") + field(2, "xyz")), "normaliser nmt_nfkc: only identity", 2},
             {"no escaping", norm(field(5, (uint64_t)0)), "escape_whitespaces", 2},
             {"unused piece", add(sentence_piece("zz", 0, 5)), "unused pieces are not supported", 2},
             {"type 9", add(sentence_piece("zz", 0, 9)), "piece 262: expected a type from 1 to 6, found 9", 1},
             {"the same piece", add(sentence_piece("a", -9, 1)), "ids 261 and 262 are the same piece", 1},
             {"the same byte", add(sentence_piece("<0x41>", 0, 6)), "are the same byte token", 1},
             {"byte of another name", add(sentence_piece("<0xZZ>", 0, 6)),
              "piece 262: expected a byte from <0x00> to <0xFF>", 1},
             {"a line feed in a name", add(sentence_piece("\n\n", 0, 6)), "found \"??\"", 1},
             {"NaN score", add(sentence_piece("zz", bits_to_f32(0x7fc00000), 1)), "scores: id 262: expected a finite number",
              1},
             {"infinite score", add(sentence_piece("zz", bits_to_f32(0x7f800000), 1)),
              "scores: id 262: expected a finite number", 1},
             {"empty piece", add(sentence_piece("", 0, 1)), "id 262: expected some bytes", 1},
             {"two unknown", add(sentence_piece("<u>", 0, 2)), "are both unknown", 1},
             {"bos beyond", train(field(41, (uint64_t)99999)), "bos, eos: expected ids below 262", 1},
             {"length beyond the file", add("\x0a\xff\xff\xff\x7f"), "expected 268435455 bytes", 1},
             {"length of 64 bits", add("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
              "expected 18446744073709551615 bytes", 1},
             {"a number without an end", add("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "ends inside a number",
              1},
             {"wire type 3", add("\x0b"), "expected wire type", 1}}) {
        INFO(c.what);
        SpmFile f;
        c.edit(f);
        check_outcome(outcome(f.bytes()), path, c.part, c.code);
    }
    SpmFile no_bos;
    no_bos.trainer += field(41, (uint64_t)-1);
    CHECK(outcome(no_bos.bytes()).line == "");
    CHECK(tokenizer_import(path).bos == -1);
    SpmFile no_bytes;
    no_bytes.pieces = sentence_piece("<unk>", 0, 2) + sentence_piece("<s>", 0, 3) + sentence_piece("</s>", 0, 3) +
                      sentence_piece("a", 0, 1);
    check_outcome(outcome(no_bytes.bytes()), path, "byte_fallback: expected 256 byte pieces, found none", 1);
    no_bytes.trainer = field(3, (uint64_t)2);    // without fallback, what is unknown in a row is one token
    CHECK(outcome(no_bytes.bytes()).line == "");
    CHECK(tokenizer_encode(tokenizer_import(path), "xyazz", false) == std::vector<int>{0, 3, 0});

    const std::string whole = good.bytes();
    for (size_t n = 0; n < whole.size(); n += n < 40 ? 1 : 37) {
        INFO("first bytes of the file: ", n);
        const Outcome o = outcome(whole.substr(0, n));
        CHECK(o.code != 0);
        CHECK(contains(o.line, path));
    }
}

// ---------------------------------------------------------------------------------------------------- llama2.c, tiktoken

static std::string llama2c_token(const std::string &bytes, float score) {
    return f32_bytes(score) + u32_bytes((uint32_t)bytes.size()) + bytes;
}

static std::string llama2c_file(int skip = -1) {    // without one of the tokens
    std::string s = u32_bytes(9);
    for (int id = 0; id < 262; id++) {
        const std::string name = id == 0    ? "<unk>"
                                 : id == 1  ? "\n<s>\n"
                                 : id == 2  ? "\n</s>\n"
                                 : id < 259 ? byte_name(id - 3)
                                            : std::string(id - 258, 'a');
        if (id != skip) s += llama2c_token(name, -(float)id);
    }
    return s;
}

TEST_CASE("tokenizer files: llama2.c and tiktoken") {
    const TempFolder folder("llama2c");
    const std::string path = folder.path + "tokenizer.bin", whole = llama2c_file();
    auto outcome = [&](const std::string &bytes) {
        write_file(path, bytes);
        return outcome_of([&] { tokenizer_import(path); });
    };
    CHECK(outcome(whole).line == "");
    CHECK(tokenizer_piece(tokenizer_import(path), 1) == "<s>");
    struct Case {
        std::string what;
        std::string bytes;
        const char *part;
        int code;
    };
    for (const Case &c : std::vector<Case>{
             {"empty", "", "found 0 bytes", 1},
             {"negative length", whole + f32_bytes(0) + u32_bytes(0xffffffff),
              "token 262: expected a length from 0 to 9 within the file, found -1", 1},
             {"huge length", whole + f32_bytes(0) + u32_bytes(0x7fffffff), "token 262: expected a length", 1},
             {"longer than the longest", whole + llama2c_token("0123456789", 0), "found 10", 1},
             {"no text", whole + llama2c_token("", 0), "id 262: expected some bytes", 1},
             {"half a score", whole + "ab", "expected 8 bytes of score and length, found 2", 1},
             {"cut short", whole.substr(0, whole.size() - 1), "token 261: expected a length", 1},
             {"NaN score", whole + llama2c_token("zz", bits_to_f32(0x7fc00000)), "scores: id 262: expected a finite number",
              1},
             {"the same twice", whole + llama2c_token("aa", 0), "are the same piece", 1},
             {"a byte is missing", llama2c_file(7), "token 7: expected <0x04>, found \"<0x05>\"", 1},
             {"few tokens", whole.substr(0, 4 + 13 + 13), "expected at least 259 tokens", 1},
             {"another kind of file", std::string("PK\3\4 something else"), "not a tokenizer that is supported", 2},
             {"GGUF", std::string("GGUF\3\0\0\0\0\0\0\0\0\0", 14), "not a tokenizer that is supported", 2},
             {"ranks of another model", "IQ== 0\nIg== 1\n", "a rank file of 2 tokens: only that of Llama 3", 2},
             {"ranks not in order", "IQ== 0\nIg== 7\n", "line 2: expected rank 1, found \"7\"", 1},
             {"ranks negative", "IQ== -1\nIg== 1\n", "line 1: expected rank 0, found \"-1\"", 1},
             {"ranks without a number", "IQ== 0\nIg==\n", "line 2: expected rank 1, found \"\"", 1},
             {"ranks of no base64", "IQ== 0\n!!!! 1\n", "line 2: expected base64 and a rank", 1}}) {
        INFO(c.what);
        check_outcome(outcome(c.bytes), path, c.part, c.code);
    }
    check_outcome(outcome_of([&] { tokenizer_import(folder.path + "nothing"); }), "nothing", "no such file or folder", 1);
    unlink(path.c_str());
    check_outcome(outcome_of([&] { tokenizer_import(folder.path); }), folder.path,
                  "expected tokenizer.json, tokenizer.model or", 1);
}

// ---------------------------------------------------------------------------------------------------- Hugging Face

static json hf_json() {
    return json::parse(R"({
        "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": ["a b"]}})");
}

TEST_CASE("tokenizer files: tokenizer.json") {
    const TempFolder folder("hf");
    const std::string path = folder.path + "tokenizer.json";
    auto outcome = [&](const std::string &text) {
        write_file(path, text);
        return outcome_of([&] { tokenizer_import(path); });
    };
    CHECK(outcome(hf_json().dump()).line == "");
    CHECK(tokenizer_encode(tokenizer_import(path), "ab<s>b", true) == std::vector<int>{2, 3, 1});
    struct Case {
        std::string what;
        JsonEdit edit;
        const char *part;
        int code;
    };
    auto set = [](const char *where, json value) -> JsonEdit {
        return [=](json &j) { j[json::json_pointer(where)] = value; };
    };
    const json split = {{"type", "Split"}, {"pattern", {{"Regex", "\\w+"}}}, {"behavior", "Isolated"}, {"invert", false}};
    for (const Case &c : std::vector<Case>{
             {"WordPiece", set("/model/type", "WordPiece"), "model type \"WordPiece\": only BPE", 2},
             {"Unigram", set("/model/type", "Unigram"), "model type \"Unigram\": only BPE", 2},
             {"no model", [](json &j) { j.erase("model"); }, "no tokenizer.json", 2},
             {"dropout", set("/model/dropout", 0.1), "dropout 0.1 is not supported", 2},
             {"suffix", set("/model/end_of_word_suffix", "</w>"), "end_of_word_suffix", 2},
             {"unknown with bytes", set("/model/unk_token", "a"), "unk_token with ByteLevel", 2},
             {"lower case", set("/normalizer", {{"type", "Lowercase"}}),
              "normalizer is not supported: {\"type\":\"Lowercase\"}", 2},
             {"NFKC", set("/normalizer", {{"type", "NFKC"}}), "normalizer is not supported: {\"type\":\"NFKC\"}", 2},
             {"another regex", set("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split}}}),
              "this regular expression is not supported: \"\\\\w+\"", 2},
             {"white space", set("/pre_tokenizer", {{"type", "Whitespace"}}),
              "pre_tokenizer is not supported: {\"type\":\"Whitespace\"}", 2},
             {"prefix space", set("/pre_tokenizer/add_prefix_space", true), "pre_tokenizer is not supported", 2},
             {"no bytes, no marks", set("/pre_tokenizer", nullptr), "expected ByteLevel, or spaces made U+2581", 2},
             {"Metaspace that splits", set("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "\u2581"}}),
              "pre_tokenizer is not supported", 2},
             {"a template", set("/post_processor", {{"type", "BertProcessing"}}), "post_processor BertProcessing", 2},
             {"single word", set("/added_tokens/0/single_word", true), "single_word is not supported", 2},
             {"vocab a list", set("/model/vocab", json::array()), "vocab: expected an object", 1},
             {"id negative", set("/model/vocab/b", -1), "vocab: \"b\": expected an id in [0, ", 1},
             {"id huge", set("/model/vocab/b", 2000000000), "vocab: \"b\": expected an id in [0, ", 1},
             {"id twice", set("/model/vocab/b", 0), "vocab: id 0 is given twice", 1},
             {"id a string", set("/model/vocab/b", "1"), "vocab: id: expected an integer", 1},
             {"piece no letters", set("/model/vocab/\u4e00", 4), "expected byte letters", 1},
             {"merge of the unknown", set("/model/merges", {"a q"}), "merges: entry 0: \"q\" is not in the vocabulary", 1},
             {"merge that makes nothing", set("/model/merges", {"b a"}), "merges: entry 0: ids 1 and 0 make no piece", 1},
             {"merge twice", set("/model/merges", {"a b", "a b"}), "entries 0 and 1 are the same pair", 1},
             {"merge of three", set("/model/merges", {"a b a"}), "expected two pieces, found \"a b a\"", 1},
             {"merge of a number", set("/model/merges", {3}), "merges: expected a string, found 3", 1},
             {"merges missing", [](json &j) { j["model"].erase("merges"); }, "merges: expected this field", 1},
             {"added id far away", set("/added_tokens/0/id", 90000000), "expected an id in [0, ", 1},
             {"added id negative", set("/added_tokens/0/id", -3), "expected an id in [0, ", 1}}) {
        INFO(c.what);
        json j = hf_json();
        c.edit(j);
        check_outcome(outcome(j.dump()), path, c.part, c.code);
    }
    for (const std::string &text :
         {std::string("{\"model\": {\"type\""), std::string("{ not JSON at all"), hf_json().dump().substr(0, 300)})
        check_outcome(outcome(text), path, "expected JSON, found something else at byte", 1);
}

TEST_CASE("tokenizer files: the configs of a folder") {
    const TempFolder folder("configs");
    const std::string &path = folder.path;
    write_file(path + "vocab.json", R"({"a":0,"b":1,"ab":2,"<|endoftext|>":3})");
    write_file(path + "merges.txt", "#version: 0.2\na b\n");
    check_outcome(outcome_of([&] { tokenizer_import(path); }), path, "4 pieces and no tokenizer_class that is known", 2);
    write_file(path + "tokenizer_config.json",
               R"({"tokenizer_class": "Qwen2Tokenizer", "bos_token": null, "add_bos_token": false,
        "eos_token": {"content": "<|im_end|>"}, "added_tokens_decoder": {"5": {"content": "<|im_end|>", "special": true}},
        "chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]})");
    write_file(path + "generation_config.json", R"({"eos_token_id": [5, 3], "bos_token_id": 3})");
    const Tokenizer t = tokenizer_import(path);
    CHECK(t.nfc);
    CHECK(t.split == SplitRule::QWEN2);
    CHECK(tokenizer_vocab(t) == 6);
    CHECK(tokenizer_piece(t, 4) == "");    // nobody names it
    CHECK(t.eos == std::vector<int>{5, 3});
    CHECK(t.bos == 3);
    CHECK(!t.add_bos);
    CHECK(t.chat_template == "D");
    CHECK(tokenizer_encode(t, "ab<|im_end|>", true) == std::vector<int>{2, 5});
    write_file(path + "chat_template.jinja", "J");
    CHECK(tokenizer_import(path).chat_template == "J");
    const Tokenizer again = tokenizer_from_json(tokenizer_to_json(t), "x");
    CHECK(again.types[4] == TokenType::UNUSED);

    struct Case {
        const char *file, *text, *part;
    };
    for (const Case &c :
         {Case{"config.json", R"({"eos_token_id": 77})", "eos: expected ids in [0, 6), found 77"},
          {"config.json", R"({"eos_token_id": -1})", "eos: expected ids in [0, 6), found -1"},
          {"config.json", R"({"eos_token_id": "x"})", "eos_token_id: expected an integer"},
          {"config.json", "{", "config.json: expected JSON"},
          {"special_tokens_map.json", R"({"bos_token": "<none>"})", "bos_token: \"<none>\" is no added token"},
          {"special_tokens_map.json", R"({"added_tokens_decoder": {"x": {}}})", "expected an id, found \"x\""},
          {"merges.txt", "a b\nc\n", "merges: entry 1: expected two pieces"},
          {"merges.txt", "a c\n", "\"c\" is not in the vocabulary"}}) {
        INFO(std::string(c.text));
        const std::string before = contains(c.file, "merges") ? "a b\n" : "{}";
        write_file(path + c.file, c.text);
        check_outcome(outcome_of([&] { tokenizer_import(path); }), path, c.part, 1);
        write_file(path + c.file, before);
    }
}

TEST_CASE("tokenizer files: any damage gives a tokenizer or one line") {
    const TempFolder folder("damage");
    const std::string path = folder.path + "t", hf = hf_json().dump(), ours = small_json().dump();
    std::mt19937 rng(3);
    for (const std::string &whole : {SpmFile().bytes(), llama2c_file(), hf, ours}) {
        for (int i = 0; i < 400; i++) {
            std::string bytes = whole;
            for (int n = 1 + rng() % 3; n > 0; n--) bytes[rng() % bytes.size()] = (char)(rng() % 3 ? rng() : 255);
            if (rng() % 4 == 0) bytes.resize(rng() % bytes.size());
            write_file(path, bytes);
            const Outcome o = outcome_of([&] {
                const Tokenizer t = whole == ours ? tokenizer_from_json(bytes, path) : tokenizer_import(path);
                tokenizer_decode(t, tokenizer_encode(t, "ab <s> \xff\u00e9", true));
                tokenizer_from_json(tokenizer_to_json(t), "again");
            });
            CHECK_MESSAGE((o.code == 0 || contains(o.line, path)), o.line);
            CHECK(!contains(o.line, "\n"));
        }
    }
}
