// tokenize_main.cpp - a filter for tokenizer_vs_packages.py: strings in, ids out (or the other way round).
//
//   tokenize TOKENIZER encode [special]    stdin: (u32 bytes, the string)*     stdout: (u32 count, i32 ids)*
//   tokenize TOKENIZER decode              stdin: (u32 count, i32 ids)*        stdout: (u32 bytes, the text)*
//   tokenize TOKENIZER time FILE           encode a file once, print seconds, tokens and whether decoding gives it back
#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include "tokenizer.h"

static bool read_u32(uint32_t *v) { return fread(v, 4, 1, stdin) == 1; }
static void write_all(const void *data, size_t size, size_t count) {
    const uint32_t n = (uint32_t)count;
    fwrite(&n, 4, 1, stdout);
    fwrite(data, size, count, stdout);
}

static int run(int argc, char **argv) {
    if (argc < 3) refuse("usage: tokenize TOKENIZER encode|decode [special] | time FILE");
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); };
    auto start = Clock::now();
    const Tokenizer t = tokenizer_import(argv[1]);
    const std::string mode = argv[2];
    uint32_t n;
    if (mode == "time") {
        printf("import %.3f s", seconds(start));
        const std::string json = tokenizer_to_json(t);
        start = Clock::now();
        const Tokenizer same = tokenizer_from_json(json, "json");
        printf(", json %zu bytes read in %.3f s", json.size(), seconds(start));
        std::stringstream text;
        text << std::ifstream(argv[3], std::ios::binary).rdbuf();
        start = Clock::now();
        const std::vector<int> ids = tokenizer_encode(t, text.str(), true);
        printf(", %zu bytes -> %zu tokens in %.3f s", text.str().size(), ids.size(), seconds(start));
        start = Clock::now();
        const bool equal = tokenizer_decode(t, ids) == text.str();
        printf(", decoded in %.3f s, %s\n", seconds(start), equal ? "equal" : "different");
    } else if (mode == "encode") {
        while (read_u32(&n)) {
            std::string text(n, '\0');
            if (fread(&text[0], 1, n, stdin) != n) fail("stdin: the last string is cut short");
            const std::vector<int> ids = tokenizer_encode(t, text, argc > 3);
            write_all(ids.data(), 4, ids.size());
        }
    } else {
        while (read_u32(&n)) {
            std::vector<int> ids(n);
            if (fread(ids.data(), 4, n, stdin) != n) fail("stdin: the last row of ids is cut short");
            const std::string text = tokenizer_decode(t, ids);
            write_all(text.data(), 1, text.size());
        }
    }
    return 0;
}

int main(int argc, char **argv) {
    try {
        return run(argc, argv);
    } catch (const Error &e) {
        fprintf(stderr, "%s\n", e.what());
        return e.exit_code;
    }
}
