// random_model.cpp - a model.bin of a real shape with random weights: for benchmarks, where only sizes matter.
//
// Weights are near-normal with deviation 1/sqrt(in), so that a row of unit rms stays one; wo and w_down, which add to
// the residual stream 2L times, have 1/sqrt(2L in).  Norms are 1.  A value depends on seed, tensor and element alone:
// near_normal() of random_weights.h, with a key made of seed and tensor name.  8 billion weights take about a minute.
#include <cerrno>
#include <cmath>
#include "checkpoint.h"
#include "command.h"
#include "random_weights.h"
#include "shapes.h"

static const char *USAGE =
    "usage: random_model SHAPE -o model.bin [--dtype f32|f16|bf16|q8|q4] [--seed N]\n"
    "\n"
    "  SHAPE      llama-2-7b, llama-3-8b, llama-3.2-1b or the path of a Hugging Face config.json\n"
    "  --dtype T  of the matrices; default bf16\n"
    "  --seed N   default 0; the same seed gives the same bytes\n";

static Config named_shape(const std::string &name) {
    Config c;
    if (shape_from_name(name, &c)) return c;
    if (!path_exists(name)) refuse("shape: expected %s or a config.json, found '%s'", SHAPE_NAMES, name.c_str());
    c = read_hf_config(name);
    c.dialect = "random " + c.dialect;
    return c;
}

// Byte-level with no merges: text goes in byte by byte, and an id beyond the bytes prints as "[id]".
static Tokenizer plain_tokenizer(int vocab) {
    const int bos = 256, eos = 257;
    if (vocab <= eos) refuse("vocab: expected at least %d, found %d", eos + 1, vocab);
    Tokenizer t;
    t.byte_level = true;
    t.merge_by = MergeBy::IDS;
    t.split = SplitRule::LLAMA3;
    t.bos = bos;
    t.add_bos = true;
    for (int id = 0; id < vocab; id++) {
        t.pieces.push_back(id < 256 ? std::string(1, (char)id) : strf("[%d]", id));
        t.types.push_back(TokenType::NORMAL);
    }
    for (const int id : {bos, eos}) {
        t.pieces[id] = id == bos ? "<s>" : "</s>";
        t.types[id] = TokenType::CONTROL;
        AddedToken added;
        added.id = id;
        added.text = t.pieces[id];
        t.added.push_back(added);
    }
    return t;
}

static void random_rows(const Config &c, uint64_t seed, const TensorSpec &spec, int64_t first, int64_t n, float *rows) {
    const int64_t cols = spec.shape.back();
    if (spec.is_norm) {
        for (int64_t i = 0; i < cols; i++) rows[i] = 1.0f;
        return;
    }
    uint64_t key = splitmix64(seed);
    for (const char letter : spec.name) key = splitmix64(key ^ (uint64_t)letter);
    const std::string last = spec.name.substr(spec.name.rfind('.') + 1);
    const bool residual = last == "wo" || last == "w_down";
    const float scale = (float)(1.0 / (NEAR_NORMAL_DEVIATION * std::sqrt((double)cols * (residual ? 2 * c.n_layers : 1))));
    for (int64_t i = 0; i < n * cols; i++) rows[i] = near_normal(key, (uint64_t)(first * cols + i)) * scale;
}

static uint64_t parse_seed(const std::string &text) {
    char *end = nullptr;
    errno = 0;
    const uint64_t seed = strtoull(text.c_str(), &end, 10);
    const bool digits = !text.empty() && text[0] >= '0' && text[0] <= '9' && *end == 0;
    if (!digits || errno) refuse("--seed: expected a number from 0 to 2^64 - 1, found '%s'", text.c_str());
    return seed;
}

static void run(Arguments arguments) {
    std::string shape, output;
    DType type = DType::bf16;
    uint64_t seed = 0;
    for (std::string word; arguments.next(&word);) {
        if (word == "-h" || word == "--help") { printf("%s", USAGE); return; }
        else if (word == "-o") output = arguments.value();
        else if (word == "--dtype") type = parse_dtype(arguments.value());
        else if (word == "--seed") seed = parse_seed(arguments.value());
        else if (word[0] == '-') refuse("unknown option '%s' (random_model --help lists them)", word.c_str());
        else if (shape.empty()) shape = word;
        else refuse("expected one shape, found '%s' and '%s'", shape.c_str(), word.c_str());
    }
    if (shape.empty() || output.empty()) {
        refuse("expected random_model SHAPE -o model.bin (random_model --help says more)");
    }
    Config c = named_shape(shape);
    const Tokenizer tokenizer = plain_tokenizer(c.vocab);
    c.bos = {tokenizer.bos};
    c.eos = {};    // a benchmark must not stop early
    auto rows = [&](const TensorSpec &spec, int64_t first, int64_t n, float *out) {
        random_rows(c, seed, spec, first, n, out);
    };
    {
        ProgressLine progress;
        model_write(output, c, tokenizer, type, rows, std::ref(progress));
    }
    report_written(output, left_in_bf16(c, type));
}

int main(int argc, char **argv) { return run_command("random_model", argc, argv, run); }
