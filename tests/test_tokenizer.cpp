// test_tokenizer.cpp - text to ids and back.  The tests that need other people's vocabularies look for them in ../shared and
// say so loudly when they are not there.  tokenizer_vs_packages.py compares with the packages themselves.
#include <chrono>
#include <doctest/doctest.h>
#include <fstream>
#include <random>
#include <set>
#include <sstream>
#include "split.h"
#include "temp_files.h"
#include "tokenizer.h"
#include "unicode.h"

static const std::string SHARED = "../shared/";

static bool shared_is_here(const char *what) {
    struct stat s;
    if (stat((SHARED + "tokenizers").c_str(), &s) == 0) return true;
    MESSAGE("SKIPPED: ", std::string(what), ": no folder ", SHARED);
    return false;
}

static std::string slurp(const std::string &path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    REQUIRE_MESSAGE(!text.str().empty(), path);
    return text.str();
}

namespace {
struct Source {
    std::string path, kind;
    int vocab, bos;
    std::vector<int> eos;
    bool add_bos, has_chat;
    SplitRule split;
};
}    // namespace
static const std::vector<Source> SOURCES = {
    {"models/books-5m/tokenizer.model", "spm", 4096, 1, {2}, true, false, SplitRule::NONE},
    {"models/books-46m/tokenizer.model", "spm", 8192, 1, {2}, true, false, SplitRule::NONE},
    {"models/stories260K/tok512.bin", "spm", 512, 1, {2}, true, false, SplitRule::NONE},
    {"models/stories260K/tok512.model", "spm", 512, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/llama2", "spm", 32000, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/llama2/tokenizer.json", "spm", 32000, 1, {}, true, false, SplitRule::NONE},
    {"tokenizers/llama2/tokenizer.model", "spm", 32000, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/llama2/tokenizer.bin", "spm", 32000, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/mistral/tokenizer.model.v1", "spm", 32000, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/mistral/mistral_instruct_tokenizer_240216.model.v2", "spm", 32768, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3", "spm", 32768, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7", "spm", 32768, 1, {2}, true, false, SplitRule::NONE},
    {"tokenizers/phi3_mini", "spm", 32011, 1, {32000}, false, true, SplitRule::NONE},
    {"tokenizers/gpt2", "byte_level", 50257, -1, {}, false, false, SplitRule::GPT2},
    {"tokenizers/smollm2", "byte_level", 49152, 1, {2}, false, false, SplitRule::DIGITS_GPT2},
    {"tokenizers/qwen2.5", "byte_level", 151665, -1, {151645}, false, true, SplitRule::QWEN2},
    {"tokenizers/llama3", "byte_level", 128256, 128000, {128009}, true, true, SplitRule::LLAMA3},
    {"tokenizers/llama3/tokenizer.model", "byte_level", 128256, 128000, {128001, 128009}, true, false, SplitRule::LLAMA3},
    {"tokenizers/llama3/tokenizer_l3.bin", "byte_level", 128256, 128000, {128001, 128009}, true, false, SplitRule::LLAMA3},
    {"tokenizers/llama3.2_bpe", "byte_level", 128256, 128000, {128001, 128009}, true, false, SplitRule::LLAMA3},
};

// Each source once for all tests: reading them again and again would take most of the time.
static const Tokenizer &source(const std::string &path) {
    static std::map<std::string, Tokenizer> known;
    if (!known.count(path)) known[path] = tokenizer_import(SHARED + path);
    return known[path];
}

// ---------------------------------------------------------------------------------------------------- by hand

// A vocabulary small enough to do by hand: 0 <unk>, 1 <s>, 2 </s>, 3-258 the bytes, then pieces in the order they merge.
static Tokenizer small_spm(const std::vector<std::string> &pieces) {
    Tokenizer t;
    for (const char *name : {"<unk>", "<s>", "</s>"}) {
        AddedToken a;
        a.id = tokenizer_vocab(t), a.text = name;
        t.added.push_back(a);
        t.pieces.push_back(name);
        t.types.push_back(a.id == 0 ? TokenType::UNKNOWN : TokenType::CONTROL);
    }
    for (int b = 0; b < 256; b++) t.pieces.push_back(std::string(1, (char)b)), t.types.push_back(TokenType::BYTE);
    for (const std::string &piece : pieces) t.pieces.push_back(piece), t.types.push_back(TokenType::NORMAL);
    for (int id = 0; id < tokenizer_vocab(t); id++) t.scores.push_back(259.0f - id);
    t.prefix = Prefix::EVERY;
    t.bos = 1, t.eos = {2}, t.add_bos = true;
    tokenizer_index(t, "small");
    return t;
}

static std::vector<std::string> pieces_of(const Tokenizer &t, const std::vector<int> &ids) {
    std::vector<std::string> pieces;
    for (const int id : ids) pieces.push_back(tokenizer_piece(t, id));
    return pieces;
}
using Strings = std::vector<std::string>;

TEST_CASE("tokenizer: SentencePiece merges by hand") {
    const Tokenizer t = small_spm({"ab", "bc", " a", "aa", " ", "a", "b", "c"});
    auto encode = [&](const char *text) { return pieces_of(t, tokenizer_encode(t, text, false)); };
    CHECK(encode("").empty());
    CHECK(encode("a") == Strings{" a"});
    CHECK(encode("abc") == Strings{" ", "ab", "c"});    // ab scores better than bc and " a"
    CHECK(encode("bc") == Strings{" ", "bc"});
    CHECK(encode("aaa") == Strings{" a", "aa"});
    CHECK(encode("baaa") == Strings{" ", "b", "aa", "a"});    // equal scores: the left one first
    CHECK(encode("\u2581") == Strings{" ", " "});             // the mark of a space is a space
    CHECK(encode("c\u00e9") == Strings{" ", "c", "\xc3", "\xa9"});
    CHECK(tokenizer_encode(t, "<s>", true) == std::vector<int>{1});
    CHECK(tokenizer_encode(t, "<s>", false).size() == 4);    // " <" ... as bytes: space and three letters
    CHECK(tokenizer_encode(t, "a</s>a", true) == std::vector<int>{261, 2, 261});
    CHECK(tokenizer_find(t, "</s>") == 2);
    CHECK(tokenizer_find(t, "ab") == -1);
    CHECK(tokenizer_piece(t, -1) == "");
    CHECK(tokenizer_piece(t, 1 << 30) == "");
}

TEST_CASE("tokenizer: byte-level merges by hand") {
    Tokenizer t;
    t.byte_level = true;
    t.merge_by = MergeBy::MERGES;
    t.split = SplitRule::GPT2;
    for (int b = 0; b < 256; b++) t.pieces.push_back(std::string(1, (char)b));
    for (const char *piece : {"he", "ll", "hell", " h", "llo"}) t.pieces.push_back(piece);
    t.types.assign(t.pieces.size(), TokenType::NORMAL);
    t.merges = {{'h', 'e', 0}, {'l', 'l', 0}, {256, 257, 0}, {' ', 'h', 0}, {257, 'o', 0}};
    tokenizer_index(t, "small");
    auto encode = [&](const char *text) { return pieces_of(t, tokenizer_encode(t, text, false)); };
    CHECK(encode("hello") == Strings{"hell", "o"});
    CHECK(encode(" hello") == Strings{" ", "hell", "o"});
    CHECK(encode("x hello") == Strings{"x", " ", "hell", "o"});
    CHECK(encode("hhllo") == Strings{"h", "h", "llo"});
    CHECK(encode("\xff\xfe") == Strings{"\xff", "\xfe"});    // not UTF-8: the bytes stay
    CHECK(tokenizer_decode(t, tokenizer_encode(t, "a\xc3", false)) == "a\ufffd");
}

TEST_CASE("tokenizer: split rules") {
    auto split = [](SplitRule rule, std::string_view text) {
        Strings parts;
        while (!text.empty()) {
            const size_t n = split_next(rule, text);
            REQUIRE(n > 0);
            REQUIRE(n <= text.size());
            parts.push_back(std::string(text.substr(0, n)));
            text.remove_prefix(n);
        }
        return parts;
    };
    const char *text = "I'll  pay 1234\n\n now";
    CHECK(split(SplitRule::GPT2, text) == Strings{"I", "'ll", " ", " pay", " 1234", "\n\n", " now"});
    CHECK(split(SplitRule::DIGITS_GPT2, text) == Strings{"I", "'ll", " ", " pay", " ", "1", "2", "3", "4", "\n\n", " now"});
    CHECK(split(SplitRule::LLAMA3, text) == Strings{"I", "'ll", " ", " pay", " ", "123", "4", "\n\n", " now"});
    CHECK(split(SplitRule::QWEN2, text) == Strings{"I", "'ll", " ", " pay", " ", "1", "2", "3", "4", "\n\n", " now"});
    CHECK(split(SplitRule::NONE, text) == Strings{text});
    CHECK(split(SplitRule::GPT2, "DON'T") == Strings{"DON", "'", "T"});
    CHECK(split(SplitRule::LLAMA3, "DON'T") == Strings{"DON", "'T"});
    CHECK(split(SplitRule::LLAMA3, "'\u017f") == Strings{"'\u017f"});
    CHECK(split(SplitRule::LLAMA3, "a \r\n \n  b") == Strings{"a", " \r\n \n", " ", " b"});
    CHECK(split(SplitRule::LLAMA3, "!?\n\n#") == Strings{"!?\n\n", "#"});
    CHECK(split(SplitRule::LLAMA3, "(word -x") == Strings{"(word", " -", "x"});
    CHECK(split(SplitRule::LLAMA3, "\xffword") == Strings{"\xffword"});    // a bad byte is a character of no class
    CHECK(split(SplitRule::GPT2, "a\xff\xfe b") == Strings{"a", "\xff\xfe", " b"});
    CHECK(split(SplitRule::GPT2, "x   ") == Strings{"x", "   "});
    CHECK(split(SplitRule::GPT2, "\u0661\u00bd\u2167") == Strings{"\u0661\u00bd\u2167"});
    CHECK(split(SplitRule::DIGITS_GPT2, "a  7") == Strings{"a", "  ", "7"});
    CHECK(split(SplitRule::GPT2, "a  7") == Strings{"a", " ", " 7"});
}

TEST_CASE("tokenizer: UTF-8 and composition") {
    struct Case {
        const char *bytes;
        int length;
    };
    for (const Case &c : {Case{"a", 1},
                          {"\xc3\xa9", 2},
                          {"\xe2\x82\xac", 3},
                          {"\xf0\x9f\xa6\x99", 4},    // whole
                          {"\xc3", 0},
                          {"\xe2\x82", 0},
                          {"\xf0\x9f\xa6", 0},    // cut short
                          {"\xc0\x80", -1},
                          {"\xc1\xbf", -1},
                          {"\xe0\x9f\xbf", -1},
                          {"\xf0\x8f\xbf\xbf", -1},    // too long
                          {"\xe0\xa0\x80", 3},
                          {"\xed\x9f\xbf", 3},
                          {"\xed\xa0\x80", -1},    // surrogates
                          {"\xf4\x8f\xbf\xbf", 4},
                          {"\xf4\x90\x80\x80", -1},
                          {"\xf5", -1},    // 10ffff is last
                          {"\x80", -1},
                          {"\xff", -1},
                          {"\xe2x", -1},
                          {"\xe2\x82x", -1}})
        CHECK_MESSAGE(utf8_length(c.bytes) == c.length, std::string(c.bytes));
    CHECK(normalize_nfc("e\u0301") == "\u00e9");
    CHECK(normalize_nfc("a\u0323\u0302") == "\u1ead");         // in two steps
    CHECK(normalize_nfc("a\u0302\u0323") == "\u1ead");         // sorted first: below before above
    CHECK(normalize_nfc("\u1112\u1161\u11ab") == "\ud55c");    // Hangul
    CHECK(normalize_nfc("\uac00\u11a8") == "\uac01");
    CHECK(normalize_nfc("\u212b\u2126") == "\u00c5\u03a9");    // Angstrom and Ohm signs
    CHECK(normalize_nfc("\u0958") == "\u0915\u093c");          // excluded from composition
    CHECK(normalize_nfc("\u0301e") == "\u0301e");
    CHECK(normalize_nfc("e\xff\u0301") == "e\xff\u0301");    // a bad byte is no starter of a mark
}

TEST_CASE("tokenizer: the decoder gives whole characters") {
    const Tokenizer t = small_spm({" ", "a", " a"});
    Decoder d{&t};
    auto bytes = [](int b) { return 3 + b; };
    CHECK(decoder_next(d, 1) == "");
    CHECK(decoder_next(d, 261) == "a");    // the space in front of a text is not part of it
    CHECK(decoder_next(d, 261) == " a");
    CHECK(decoder_next(d, bytes(0xf0)) == "");
    CHECK(decoder_next(d, bytes(0x9f)) == "");
    CHECK(decoder_next(d, bytes(0xa6)) == "");
    CHECK(decoder_next(d, bytes(0x99)) == "\U0001f999");
    CHECK(decoder_next(d, bytes(0xe2)) == "");
    CHECK(decoder_next(d, bytes(0x82)) == "");
    CHECK(decoder_next(d, 260) == "\ufffd\ufffda");    // they can no longer become a character
    CHECK(decoder_next(d, bytes(0xff)) == "\ufffd");
    CHECK(decoder_next(d, bytes(0xc3)) == "");
    CHECK(decoder_flush(d) == "\ufffd");
    CHECK(decoder_flush(d) == "");
    CHECK(decoder_next(d, 0) == " \u2047 ");
    CHECK(decoder_next(d, 2) == "");
    CHECK(decoder_next(d, 99999) == "");
    d.show_control = true;
    CHECK(decoder_next(d, 2) == "</s>");
    Decoder rest{&t};
    rest.at_start = false;
    CHECK(decoder_next(rest, 261) == " a");
}

// ---------------------------------------------------------------------------------------------------- vocabularies of
// others

TEST_CASE("tokenizer: every source is read, and its JSON form is the same tokenizer") {
    if (!shared_is_here("every source")) return;
    const std::string text = slurp(SHARED + "text/wikitext2/wiki.test.raw").substr(0, 20000) +
                             slurp(SHARED + "text/japanese/wagahaiwa_nekodearu_ja.txt").substr(0, 6000) +
                             "<s> <|im_end|>  </s>[INST]\n<|end|>\n 12345";
    for (const Source &s : SOURCES) {
        INFO(s.path);
        const Tokenizer &t = source(s.path);
        CHECK(tokenizer_kind(t) == s.kind);
        CHECK(tokenizer_vocab(t) == s.vocab);
        CHECK(t.bos == s.bos);
        CHECK(t.eos == s.eos);
        CHECK(t.add_bos == s.add_bos);
        CHECK(t.chat_template.empty() == !s.has_chat);
        CHECK(t.split == s.split);
        const std::string json = tokenizer_to_json(t);
        const Tokenizer again = tokenizer_from_json(json, "model.bin");
        CHECK(tokenizer_to_json(again) == json);
        CHECK(again.pieces == t.pieces);
        CHECK(again.types == t.types);
        CHECK(again.scores == t.scores);
        for (const bool special : {false, true})
            CHECK(tokenizer_encode(again, text, special) == tokenizer_encode(t, text, special));
    }
}

TEST_CASE("tokenizer: llama.cpp's golden ids") {
    if (!shared_is_here("llama.cpp's golden ids")) return;
    struct Golden {
        const char *name;
        Strings sources;
    };
    const std::vector<Golden> goldens = {
        {"llama-spm", {"tokenizers/llama2", "tokenizers/llama2/tokenizer.model", "tokenizers/llama2/tokenizer.bin"}},
        {"llama-bpe", {"tokenizers/llama3", "tokenizers/llama3/tokenizer_l3.bin", "tokenizers/llama3.2_bpe"}},
        {"phi-3", {"tokenizers/phi3_mini"}},
        {"gpt-2", {"tokenizers/gpt2"}},
        {"qwen2", {"tokenizers/qwen2.5"}}};
    int cases = 0;
    for (const Golden &golden : goldens) {
        const std::string base = SHARED + "golden/llama.cpp_vocab/ggml-vocab-" + golden.name + ".gguf";
        const std::string mark = "\n__ggml_vocab_test__\n", inputs = slurp(base + ".inp");
        std::istringstream outputs(slurp(base + ".out"));
        size_t at = 0;
        for (std::string line; std::getline(outputs, line) && at < inputs.size(); cases++) {
            const size_t end = std::min(inputs.find(mark, at), inputs.size());
            const std::string text = inputs.substr(at, end - at);
            at = end + mark.size();
            std::istringstream numbers(line);
            const std::vector<int> expected{std::istream_iterator<int>(numbers), {}};
            for (const std::string &path : golden.sources)
                CHECK_MESSAGE(tokenizer_encode(source(path), text, false) == expected, path, ": ", text);
        }
        CHECK(at >= inputs.size());
    }
    CHECK(cases == 5 * 46);
}

#ifdef __SANITIZE_ADDRESS__
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif
constexpr size_t ROUND_TRIP_BYTES = SANITIZED ? 60000 : 250000;    // of each corpus with each tokenizer

TEST_CASE("tokenizer: every corpus comes back") {
    if (!shared_is_here("every corpus")) return;
    for (const char *name :
         {"books/val.txt", "books/war-and-peace.txt", "wikitext2/wiki.test.raw", "japanese/wagahaiwa_nekodearu_ja.txt"}) {
        const std::string whole = slurp(SHARED + "text/" + name);
        std::string text = whole.substr(0, ROUND_TRIP_BYTES);
        while (!text.empty() && utf8_length(whole.substr(text.size(), 4)) < 0) text.pop_back();    // end between characters
        for (const Source &s : SOURCES) {
            const Tokenizer &t = source(s.path);
            if (t.squeeze_spaces) continue;    // runs of spaces do not come back from this one
            const std::vector<int> ids = tokenizer_encode(t, text, false);
            CHECK_MESSAGE(tokenizer_decode(t, ids) == text, s.path, " ", std::string(name));
            CHECK(ids.size() < text.size());
        }
    }
}

TEST_CASE("tokenizer: files of one vocabulary agree") {
    if (!shared_is_here("files of one vocabulary")) return;
    const Tokenizer &a = source("models/stories260K/tok512.bin"), &b = source("models/stories260K/tok512.model");
    CHECK(a.pieces == b.pieces);
    CHECK(a.scores == b.scores);
    CHECK(a.types == b.types);
    // The .model squeezes spaces; the .bin does not say so, and llama2.c does not.
    std::string text;
    for (const char c : slurp(SHARED + "text/books/val.txt").substr(0, 100000))
        if (!(c == ' ' && (text.empty() || text.back() == ' '))) text += c;
    while (text.back() == ' ') text.pop_back();
    CHECK(tokenizer_encode(a, text, false) == tokenizer_encode(b, text, false));
    CHECK(tokenizer_encode(b, "  a  b ", false) == tokenizer_encode(a, "a b", false));
    CHECK(tokenizer_encode(b, "   ", false).empty());
    CHECK(source("tokenizers/llama2/tokenizer.bin").pieces == source("tokenizers/llama2/tokenizer.model").pieces);
    CHECK(source("tokenizers/llama2").pieces == source("tokenizers/llama2/tokenizer.model").pieces);
    CHECK(source("tokenizers/llama3/tokenizer_l3.bin").pieces == source("tokenizers/llama3").pieces);
    CHECK(source("tokenizers/llama3.2_bpe").pieces == source("tokenizers/llama3").pieces);
    const TempFolder gpt2("gpt2");    // without the tokenizer.json beside them
    for (const char *name : {"vocab.json", "merges.txt"})
        write_file(gpt2.path + name, slurp(SHARED + "tokenizers/gpt2/" + name));
    const Tokenizer pair = tokenizer_import(gpt2.path);
    CHECK(pair.pieces == source("tokenizers/gpt2").pieces);
    CHECK(tokenizer_encode(pair, text, true) == tokenizer_encode(source("tokenizers/gpt2"), text, true));
}

TEST_CASE("tokenizer: added tokens") {
    if (!shared_is_here("added tokens")) return;
    const Tokenizer &phi = source("tokenizers/phi3_mini"), &qwen = source("tokenizers/qwen2.5");
    const Tokenizer &llama = source("tokenizers/llama2");
    using Ids = std::vector<int>;
    CHECK(tokenizer_encode(phi, "<|user|>\n  Hello<|end|>\n", true) == Ids{32010, 15043, 32007});    // rstrip
    CHECK(tokenizer_encode(phi, "<|user|>", false).size() > 1);
    CHECK(tokenizer_encode(phi, "</s>", false) == Ids{2});    // user-defined: always
    CHECK(tokenizer_encode(qwen, "<|im_start|>user\nhi<|im_end|>", true) == Ids{151644, 872, 198, 6023, 151645});
    CHECK(tokenizer_encode(qwen, "<tool_call>", false) == Ids{151657});
    CHECK(tokenizer_encode(llama, "<s>Hello", true) == Ids{1, 10994});    // found with the space in front of the text
    CHECK(tokenizer_encode(llama, "a<s>", true).size() == 4);             // and so not here: what the file asks for
    CHECK(tokenizer_encode(source("tokenizers/llama2/tokenizer.model"), "a<s>b", true) == Ids{263, 1, 289});
    CHECK(tokenizer_find(source("tokenizers/llama3"), "<|eot_id|>") == 128009);
    CHECK(tokenizer_find(source("tokenizers/llama3"), "<|reserved_special_token_250|>") == 128255);
    CHECK(tokenizer_encode(source("models/books-46m/tokenizer.model"), "", true).empty());
    const Tokenizer &v7 = source("tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7");
    CHECK(tokenizer_encode(v7, "[REF]", false) == Ids{29473, tokenizer_find(v7, "[REF]")});
}

TEST_CASE("tokenizer: streamed text is always whole characters") {
    if (!shared_is_here("streamed text")) return;
    std::mt19937 rng(7);
    for (const Source &s : SOURCES) {
        const Tokenizer &t = source(s.path);
        Decoder d{&t};
        std::vector<int> ids;
        std::string text;
        for (int i = 0; i < 3000; i++) {
            // half of them bytes: those are where characters fall apart
            const int byte = t.index.byte_id[rng() % 256];
            ids.push_back(rng() % 2 && byte >= 0 ? byte : (int)(rng() % (t.pieces.size() + 10)));
            const std::string part = decoder_next(d, ids.back());
            for (size_t at = 0; at < part.size();) {
                const int n = utf8_length(std::string_view(part).substr(at));
                REQUIRE_MESSAGE(n > 0, s.path);
                at += n;
            }
            REQUIRE(d.pending.size() <= 3);
            text += part;
        }
        CHECK(text + decoder_flush(d) == tokenizer_decode(t, ids));
    }
}

TEST_CASE("tokenizer: no input is slow") {
    if (!shared_is_here("adversarial inputs")) return;
    auto repeat = [](const std::string &s, size_t bytes) {
        std::string out;
        while (out.size() < bytes) out += s;
        return out;
    };
    const size_t n = SANITIZED ? 50000 : 1000000;
    for (const std::string path : {"tokenizers/llama2/tokenizer.model", "tokenizers/llama3", "tokenizers/qwen2.5"}) {
        const Tokenizer &t = source(path);
        for (const std::string unit : {"a", " ", "\n", "ab", "\u00e9", "e\u0301\u0323", "7", "<|im_start|", "\xff", "=-"}) {
            const bool long_one = unit.size() == 1;
            const std::string text = repeat(unit, long_one ? n : n / 8);
            const auto start = std::chrono::steady_clock::now();
            const std::vector<int> ids = tokenizer_encode(t, text, true);
            const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            CHECK_MESSAGE(seconds < 5, path, " ", unit);
            if (unit == "\xff") continue;
            CHECK_MESSAGE(tokenizer_decode(t, ids) == (t.nfc ? normalize_nfc(text) : text), path, " ", unit);
        }
    }
    const Tokenizer &llama = source("tokenizers/llama2/tokenizer.model"), &qwen = source("tokenizers/qwen2.5");
    CHECK(tokenizer_decode(llama, tokenizer_encode(llama, "a\xff\xe2\x82z", true)) == "a\ufffd\ufffd\ufffdz");
    CHECK(pieces_of(qwen, tokenizer_encode(qwen, "a\xff\xe2\x82z", true)) == Strings{"a", "\xff", "\xe2\x82", "z"});
}
