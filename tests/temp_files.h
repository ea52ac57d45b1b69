// temp_files.h - what the tests of files share: a scratch folder, files as strings, a tiny model, its header to edit.
#pragma once
#include <cstdlib>
#include <dirent.h>
#include <doctest/doctest.h>
#include <functional>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>
#include "checkpoint.h"
#include "files.h"
#include "json.h"

// An empty folder build/test_<name>.<pid>/ that goes with the object.
struct TempFolder {
    std::string path;
    explicit TempFolder(const std::string &name) {
        mkdir("build", 0777);
        path = "build/test_" + name + strf(".%d/", (int)getpid());
        mkdir(path.c_str(), 0777);
    }
    ~TempFolder() {
        for (const std::string &name : list()) {
            if (unlink((path + name).c_str()) != 0) rmdir((path + name).c_str());
        }
        rmdir(path.c_str());
    }
    std::vector<std::string> list() const {
        std::vector<std::string> names;
        if (DIR *dir = opendir(path.c_str())) {
            while (const dirent *entry = readdir(dir)) {
                const std::string name = entry->d_name;
                if (name != "." && name != "..") names.push_back(name);
            }
            closedir(dir);
        }
        return names;
    }
};

inline void write_file(const std::string &path, const std::string &bytes) {
    unlink(path.c_str());    // ext4 waits for the disk when a file is truncated and written again
    FILE *f = fopen(path.c_str(), "wb");
    const bool written = f && fwrite(bytes.data(), 1, bytes.size(), f) == bytes.size();
    if (!written || fclose(f)) fail("test: cannot write %s", path.c_str());
}

struct Outcome { int code; std::string line; };    // 0 and "" when nothing was thrown
inline Outcome outcome_of(const std::function<void()> &f) {
    try {
        f();
        return {0, ""};
    } catch (const Error &e) {
        return {e.exit_code, e.what()};
    }
}
inline bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

// ---- safetensors by hand: this shares no code with the writer ----

inline std::string le64(uint64_t x) {
    std::string s;
    for (int i = 0; i < 8; i++) s += (char)(x >> 8 * i & 255);
    return s;
}
inline std::string container(std::string header, const std::string &data) {
    while ((8 + header.size()) % 64) header += ' ';
    return le64(header.size()) + header + data;
}
// The same file with an edited header and, if wanted, edited data.
using Edit = std::function<void(OrderedJson &, std::string &)>;
inline std::string edit_container(const std::string &bytes, const Edit &edit) {
    uint64_t n = 0;
    for (int i = 7; i >= 0; i--) n = n << 8 | (uint8_t)bytes[i];
    OrderedJson header = OrderedJson::parse(bytes.substr(8, n));
    std::string data = bytes.substr(8 + n);
    edit(header, data);
    return container(header.dump(), data);
}

// ---- a tiny model ----

inline Config tiny_config() {
    Config c;
    c.dim = 16, c.ffn_dim = 24, c.n_layers = 2, c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 8;
    c.vocab = 260, c.max_len = 32;
    c.bos = {256};
    c.eos = {257, 258};
    c.dialect = "test";
    return c;
}

inline Tokenizer tiny_tokenizer() {
    Tokenizer t;
    t.byte_level = true;
    t.merge_by = MergeBy::IDS;
    t.split = SplitRule::GPT2;
    for (int id = 0; id < 256; id++) t.pieces.push_back(std::string(1, (char)id));
    t.types.assign(256, TokenType::NORMAL);
    for (const char *name : {"<s>", "</s>"}) {
        AddedToken added;
        added.id = (int)t.pieces.size();
        added.text = name;
        t.added.push_back(added);
        t.pieces.push_back(name);
        t.types.push_back(TokenType::CONTROL);
    }
    t.bos = 256;
    t.eos = {257};
    return t;
}

// Distinct small values that every dtype holds exactly: -127/64 ... 127/64.
inline float tiny_value(const std::string &name, int64_t i) {
    int64_t h = 0;
    for (const char c : name) h = (h * 31 + c) % 1000003;
    return (float)((h + i * 37) % 128) / 64.0f;
}

inline void write_tiny_model(const std::string &path, const Config &c, DType type) {
    model_write(path, c, tiny_tokenizer(), type, [](const TensorSpec &spec, int64_t first, int64_t n, float *rows) {
        const int64_t cols = spec.shape.back();
        for (int64_t i = 0; i < n * cols; i++) rows[i] = tiny_value(spec.name, first * cols + i);
    }, [](const std::string &, uint64_t, uint64_t) {});
}

// ---- conversions ----

inline const char *const HF_TOKENIZER = "tests/golden/hf/tokenizer.json";    // 64 tokens

inline Outcome convert_to(const std::string &source, const std::string &output, const std::string &dtype = "",
                          const std::string &tokenizer = "") {
    ConvertOptions o;
    o.source = source, o.output = output, o.dtype = dtype, o.tokenizer = tokenizer;
    return outcome_of([&] { convert(o); });
}

inline std::vector<float> values_of(const Model &m, const std::string &name) {
    const TensorView *t = m.file->find(name);
    REQUIRE(t != nullptr);
    std::vector<float> x(t->elements());
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = t->dtype == "F32"   ? ((const float *)t->data)[i]
               : t->dtype == "F16" ? to_f32(((const f16 *)t->data)[i])
                                   : to_f32(((const bf16 *)t->data)[i]);
    }
    return x;
}

// Material that the repository does not carry.
inline bool have(const std::string &path) {
    if (path_exists(path)) return true;
    MESSAGE("SKIPPED: ", path, " is not here");
    return false;
}
