// random_model.cpp - a model.bin of a real shape with random weights: for benchmarks, where only sizes matter.
//
// Weights are near-normal with deviation 1/sqrt(in), so that a row of unit rms stays one; wo and w_down, which add to
// the residual stream 2L times, have 1/sqrt(2 L in).  Norms are 1.  A value depends on seed, tensor and element alone:
//
//   z = splitmix64(key + element)   w = (sum of the four 16-bit parts of z - mean) / deviation
//
// The sum of four uniform numbers is close enough to normal here, and costs no logarithm or cosine: 8 billion weights
// take about a minute.
#include <cerrno>
#include <cmath>
#include "checkpoint.h"
#include "command.h"

static const char *USAGE =
    "usage: random_model SHAPE -o model.bin [--dtype f32|f16|bf16] [--seed N]\n"
    "\n"
    "  SHAPE      llama-2-7b, llama-3-8b, llama-3.2-1b or the path of a Hugging Face config.json\n"
    "  --dtype T  of the matrices; default bf16\n"
    "  --seed N   default 0; the same seed gives the same bytes\n";

static Config named_shape(const std::string &name) {
    Config c;
    c.dialect = "random " + name;
    auto shape = [&](int dim, int ffn_dim, int layers, int heads, int kv_heads, int head_dim, int vocab, int max_len) {
        c.dim = dim, c.ffn_dim = ffn_dim, c.n_layers = layers, c.n_heads = heads, c.n_kv_heads = kv_heads;
        c.head_dim = head_dim, c.vocab = vocab, c.max_len = max_len;
    };
    if (name == "llama-2-7b") {
        shape(4096, 11008, 32, 32, 32, 128, 32000, 4096);
    } else if (name == "llama-3-8b") {
        shape(4096, 14336, 32, 32, 8, 128, 128256, 8192);
        c.rope_theta = 500000.0f;
    } else if (name == "llama-3.2-1b") {
        shape(2048, 8192, 16, 32, 8, 64, 128256, 131072);
        c.rope_theta = 500000.0f;
        c.rope_factor = 32.0f;
        c.tied = true;
    } else if (path_exists(name)) {
        c = read_hf_config(name);
        c.dialect = "random " + c.dialect;
    } else {
        refuse("shape: expected llama-2-7b, llama-3-8b, llama-3.2-1b or a config.json, found '%s'", name.c_str());
    }
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

static uint64_t splitmix64(uint64_t z) {
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
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
    // The variance of a uniform 16-bit number is (2^32 - 1) / 12.
    const double deviation = std::sqrt(4 * (0x1p32 - 1) / 12);
    const float scale = (float)(1.0 / (deviation * std::sqrt((double)cols * (residual ? 2 * c.n_layers : 1))));
    const float mean = 4 * 32767.5f;
    for (int64_t i = 0; i < n * cols; i++) {
        const uint64_t z = splitmix64(key + (uint64_t)(first * cols + i));
        const uint64_t sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
        rows[i] = ((float)sum - mean) * scale;
    }
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
    report_written(output);
}

int main(int argc, char **argv) { return run_command("random_model", argc, argv, run); }
