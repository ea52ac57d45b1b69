// options.h - what the user asked for, as main() read it.
#pragma once
#include <string>
#include <vector>
#include "kv_cache.h"
#include "sampler.h"

// Words of --ablate.
struct Ablation { const char *name; unsigned flag; };
constexpr Ablation ABLATIONS[] = {
    {"first-norm", NO_FIRST_NORM}, {"shift", NO_SHIFT}, {"hadamard", NO_HADAMARD}, {"pre-rope", NO_PRE_ROPE}, {"scale", NO_SCALE}};

constexpr int LARGEST_BATCH = 0, MOST_BATCH = 1 << 16;

struct Options {
    std::string model;               // a file, or the name of a shape when shape is set
    std::string shape;               // --shape: random weights instead of a file, for --bench
    DType dtype = DType::bf16;       // --dtype, of those
    // text
    bool has_prompt = false;
    std::string prompt;              // -p, -f, -
    bool prompt_lines = false;       // --batch: every line of it is a prompt
    bool parse_special = true;       // control tokens written out in the prompt count as such
    bool echo = true;                // the prompt is part of the text
    int n_predict = -1;              // -n; -1 until the end of text or of the context
    int context = 0;                 // -c; 0 what the model was trained for
    Sampler sampler;
    // the machine
    std::string device = "cpu";
    int threads = 0;                 // -t; 0 all
    KvOptions kv;
    bool json = false;
    // modes
    std::string ppl_file;
    int batch = 0;                   // --batch, -b: sequences at once; 0 the mode's own choice
    int stride = 0;                  // --stride; 0 disjoint windows
    bool ppl_bos = true;             // --no-bos
    int max_windows = 0;             // --windows; 0 all
    bool has_against = false;
    KvFormat against = KvFormat::f16;    // --against, for keys and values
    std::string against_model;           // --against-model: other weights for that second cache
    bool against_same_kv = false;        // of these alone: the second cache is like the first
    bool by_position = false, decode = false, needle = false;
    bool bench = false;
    std::vector<int> depths = {0};   // --bench -d
    std::vector<int> batches = {1};  // --bench -b; LARGEST_BATCH: max
    std::vector<KvOptions> kvs;      // --bench --kv; every other mode takes kv
    int bench_prompt = 512, bench_tokens = 64;    // --bench -p, -n
};
