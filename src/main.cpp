// main.cpp - options in, a mode out: the only file that prints usage and the only one that catches errors.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include "bench.h"
#include "device.h"
#include "files.h"
#include "generate.h"
#include "needle.h"
#include "perplexity.h"
#include "random_weights.h"
#include "report.h"
#include "shapes.h"

static const char usage[] =
    "usage: run MODEL.bin -p \"Once upon a time\" [options]     tell a story\n"
    "       run MODEL.bin -f FILE --batch N [options]         a story for every line of FILE, N at once\n"
    "       run MODEL.bin --ppl FILE [options]                measure how well the model predicts a text\n"
    "       run MODEL.bin --bench [options]                   measure speed against what the machine allows\n"
    "\n"
    "text      -p TEXT          the prompt (-i is the same); \"\" starts from the model's BOS token alone\n"
    "          -f FILE          the prompt from a file; a lone - reads stdin\n"
    "          --batch N        every line of the prompt is a prompt of its own (an empty line: BOS alone), N sequences at once;\n"
    "                           results in order, each followed by a line \"---\"; line i has the seed -s + i, from 0\n"
    "          --json           results as JSON objects, one a line, without the prompt in \"text\"\n"
    "          -n N             tokens to make; default: until the end of text or of the context\n"
    "          -c N             context, in tokens; default: what the model was trained for\n"
    "          --no-echo        print only what follows the prompt\n"
    "          --plain-prompt   control tokens written out in the prompt are plain text\n"
    "sampling  --temp X         0 (default) takes the likeliest token; with the options below the order is\n"
    "          --top-k N        top-k, top-p, min-p, then temperature\n"
    "          --top-p X  --min-p X\n"
    "          -s N             seed (default 0); the same command prints the same text\n"
    "cache     --kv F           format of the KV cache; -ctk F and -ctv F set keys and values apart: %s\n"
    "          --prefill M      coded (default): a row reads sealed blocks as codes; exact: the rows of a prompt read it in fp16\n"
    "          --sink N         the first N tokens stay fp16 (a multiple of 64)\n"
    "          --recent N       so do the N tokens behind the open block\n"
    "          --scale-exponent A[,B]   of NSN's scale correction for keys and values, for study; default: the format's\n"
    "          --ablate LIST    leave out steps of NSN, for study: first-norm,shift,hadamard,pre-rope,scale\n"
    "machine   -d cpu|cuda      device (default cpu)        -t N   threads (default all)\n"
    "--ppl     -b N             sequences at once (default 4; changes the speed, not the result)\n"
    "          --stride N       tokens a window advances (default: windows do not overlap)\n"
    "          --no-bos         no BOS token before each window         --windows N   only the first N\n"
    "          --against F      a second cache beside it, of format F: KL divergence, difference of PPL, same top token\n"
    "          --against-model M   beside it the weights of M, to compare dtypes; its cache is of --against, or like the first\n"
    "          --by-position    figures by position in the window\n"
    "          --decode         one token at a time, held against coded prefill\n"
    "          --needle         find a name inside sealed blocks: --windows N trials (default 20), -s seed\n"
    "--bench   -d 0,4096        depths: tokens in the cache when decoding starts      -b 1,8   sequences at once; max: as fit\n"
    "          --kv f16,nsn2b   formats to compare\n"
    "          --prompt-tokens N   prefill length (default 512)         -n N   tokens to decode (default 64)\n"
    "          --shape S        no MODEL.bin: random weights of %s   --dtype f32|f16|bf16|q8|q4 (default bf16)\n"
    "          --json           figures of --ppl and --bench as JSON\n"
    "The text goes to stdout, everything else to stderr; the last line there is JSON.  Exit code: 0, 1 bad data, 2 usage.\n";

static std::string format_list() {
    std::string list;
    for (int f = 0; f < (int)KvFormat::count; f++) list += std::string(f ? " " : "") + kv_format_name((KvFormat)f);
    return list;
}

static double number(const std::string &name, const std::string &text, double min, double max) {
    char *end;
    const double x = strtod(text.c_str(), &end);
    if (text.empty() || *end || !(x >= min && x <= max)) {
        if (max == INFINITY) refuse("%s '%s': expected a number of at least %g", name.c_str(), text.c_str(), min);
        refuse("%s '%s': expected a number from %g to %g", name.c_str(), text.c_str(), min, max);
    }
    return x;
}
static int integer(const std::string &name, const std::string &text, int min, int max = 1 << 30) {
    char *end;
    const double x = strtod(text.c_str(), &end);
    if (!text.empty() && !*end && x != std::floor(x)) {    // before the range: 0.8 is no thread count, but perhaps a temperature
        const char *hint = name == "-t" ? "; -t is threads, did you mean --temp?" : "";
        refuse("%s '%s': expected a whole number%s", name.c_str(), text.c_str(), hint);
    }
    return (int)number(name, text, min, max);
}

static bool looks_like_number(const std::string &s) {
    char *end;
    strtod(s.c_str(), &end);
    return !s.empty() && !*end && s.find('.') != std::string::npos;
}

// "a,b" -> "a" "b"; an empty word stays one.
static std::vector<std::string> split_words(const std::string &list) {
    std::vector<std::string> words;
    for (size_t at = 0; at <= list.size(); at = std::min(list.find(',', at), list.size()) + 1) words.push_back(list.substr(at, list.find(',', at) - at));
    return words;
}
static std::vector<int> integers(const std::string &name, const std::string &list, int min, int max = 1 << 30) {
    std::vector<int> numbers;
    for (const std::string &word : split_words(list)) numbers.push_back(integer(name, word, min, max));
    return numbers;
}

static unsigned ablation_flags(const std::string &option, const std::string &list) {
    unsigned flags = 0;
    for (const std::string &word : split_words(list)) {
        const Ablation *found = std::find_if(std::begin(ABLATIONS), std::end(ABLATIONS), [&](const Ablation &a) { return a.name == word; });
        if (found == std::end(ABLATIONS)) refuse("%s '%s': expected words of first-norm,shift,hadamard,pre-rope,scale", option.c_str(), word.c_str());
        flags |= found->flag;
    }
    return flags;
}

// What cannot be asked for together.
static void check_measuring(const Options &o) {
    const bool with_file = !o.ppl_file.empty();
    if (!with_file && (o.has_against || o.by_position || o.decode || o.needle))
        refuse("--against, --against-model, --by-position, --decode and --needle need --ppl FILE");
    if (o.needle && !o.against_model.empty()) refuse("--against-model: for --ppl without --needle");
    if (o.needle && (o.by_position || o.decode || o.stride)) refuse("--needle: --by-position, --decode and --stride have no meaning for it");
    if (o.decode && o.kv.exact_prefill) refuse("--decode: a token at a time reads sealed blocks as codes; only --prefill coded can agree with it");
    if (o.kv.ablate && !kv_is_nsn(o.kv.k_format) && !kv_is_nsn(o.kv.v_format))
        refuse("--ablate: --kv %s has no steps to leave out; it needs an nsn format", kv_format_name(o.kv.k_format));
}

static Options parse(int argc, char **argv) {
    Options o;
    bool tokens_given = false, one_side = false, batch_option = false, dtype_given = false;
    std::vector<KvFormat> formats;    // of --kv
    int i = 1;
    auto value = [&](const std::string &name) -> std::string {
        if (i + 1 >= argc) refuse("%s: needs a value (run --help)", name.c_str());
        return argv[++i];
    };
    auto prompt = [&](const std::string &text) {
        if (o.has_prompt) refuse("two prompts: only one of -p, -i, -f and - can be given");
        o.has_prompt = true, o.prompt = text;
    };
    for (; i < argc; i++) {
        const std::string a = argv[i];
        if (a == "-h" || a == "--help") {
            printf(usage, format_list().c_str(), SHAPE_NAMES);
            exit(0);
        }
        else if (a == "-p" || a == "-i") prompt(value(a));
        else if (a == "-f") prompt(read_file(value(a)));
        else if (a == "-") prompt(read_file("-"));
        else if (a == "-n") o.n_predict = integer(a, value(a), -1), tokens_given = true;
        else if (a == "-c") o.context = integer(a, value(a), 1);
        else if (a == "-s" || a == "--seed") {
            const std::string text = value(a);
            char *end;
            errno = 0;
            o.sampler.seed = strtoull(text.c_str(), &end, 10);
            if (text.empty() || *end || errno || text[0] == '-') refuse("%s '%s': expected a whole number from 0 to 2^64 - 1", a.c_str(), text.c_str());
        }
        else if (a == "-t" || a == "--threads") o.threads = integer("-t", value(a), 1, 4096);
        else if (a == "--temp") o.sampler.temperature = (float)number(a, value(a), 0, INFINITY);
        else if (a == "--top-k") o.sampler.top_k = integer(a, value(a), 0);
        else if (a == "--top-p") o.sampler.top_p = (float)number(a, value(a), 0, 1);
        else if (a == "--min-p") o.sampler.min_p = (float)number(a, value(a), 0, 1);
        else if (a == "--no-echo") o.echo = false;
        else if (a == "--plain-prompt") o.parse_special = false;
        else if (a == "--kv") {
            formats.clear();
            for (const std::string &word : split_words(value(a))) formats.push_back(kv_format_from_name(word));
            o.kv.k_format = o.kv.v_format = formats[0];
        }
        else if (a == "-ctk") o.kv.k_format = kv_format_from_name(value(a)), one_side = true;
        else if (a == "-ctv") o.kv.v_format = kv_format_from_name(value(a)), one_side = true;
        else if (a == "--sink") o.kv.sink = integer(a, value(a), 0);
        else if (a == "--recent") o.kv.recent = integer(a, value(a), 0);
        else if (a == "--prefill") {
            const std::string mode = value(a);
            if (mode != "coded" && mode != "exact") refuse("--prefill '%s': expected coded or exact", mode.c_str());
            o.kv.exact_prefill = mode == "exact";
        }
        else if (a == "-d" || a == "--device" || a == "--depth") {
            const std::string text = value(a);
            if (text == "cpu" || text == "cuda") o.device = text;
            else if (text.find_first_not_of("0123456789,") == std::string::npos && !text.empty()) o.depths = integers(a, text, 0, 1 << 28);
            else refuse("-d '%s': expected cpu, cuda, or depths such as 0,4096 with --bench", text.c_str());
        }
        else if (a == "--scale-exponent") {
            const std::string text = value(a);
            const size_t comma = text.find(',');
            o.kv.k_exponent = (float)number(a, text.substr(0, comma), 0, 2);
            o.kv.v_exponent = comma == std::string::npos ? o.kv.k_exponent : (float)number(a, text.substr(comma + 1), 0, 2);
        }
        else if (a == "--ablate") o.kv.ablate = ablation_flags(a, value(a));
        else if (a == "--ppl") o.ppl_file = value(a);
        else if (a == "--against") o.has_against = true, o.against = kv_format_from_name(value(a));
        else if (a == "--against-model") o.against_model = value(a);
        else if (a == "--by-position") o.by_position = true;
        else if (a == "--decode") o.decode = true;
        else if (a == "--needle") o.needle = true;
        else if (a == "-b") {
            const std::string text = value(a);
            o.batches = text == "max" ? std::vector<int>{LARGEST_BATCH} : integers(a, text, 1, MOST_BATCH);
            o.batch = o.batches[0], batch_option = true;
        }
        else if (a == "--batch") o.batches = {o.batch = integer(a, value(a), 1, MOST_BATCH)}, o.prompt_lines = true;
        else if (a == "--stride") o.stride = integer(a, value(a), 1);
        else if (a == "--no-bos") o.ppl_bos = false;
        else if (a == "--windows") o.max_windows = integer(a, value(a), 1);
        else if (a == "--bench") o.bench = true;
        else if (a == "--shape") o.shape = value(a);
        else if (a == "--dtype") o.dtype = parse_dtype(value(a)), dtype_given = true;
        else if (a == "--prompt-tokens") o.bench_prompt = integer(a, value(a), 1, 1 << 28);
        else if (a == "--json") o.json = true;
        else if (a == "-ngl") refuse("-ngl: there is no split by layers; -d cuda runs the whole model on the GPU");
        else if (a == "-z") refuse("-z: the tokenizer is part of the model file (build/convert SRC -o model.bin --tokenizer FILE)");
        else if (a == "-o") refuse("-o: results are a table, or JSON with --json");
        else if (a[0] == '-') refuse("%s: unknown option (run --help)", a.c_str());
        else if (o.model.empty()) o.model = a;
        else refuse("'%s': a second model? the first is '%s' (a prompt needs -p)", a.c_str(), o.model.c_str());
    }
    if ((!o.shape.empty() || dtype_given) && !(o.bench && !o.shape.empty()))
        refuse("--shape and --dtype: only for --bench --shape S; a prompt needs a MODEL.bin (build/random_model makes one)");
    if (!o.shape.empty() && !o.model.empty()) refuse("--shape %s: takes no model, and '%s' is one", o.shape.c_str(), o.model.c_str());
    if (!o.shape.empty()) o.model = o.shape;
    if (o.model.empty()) refuse("no model given: run MODEL.bin -p \"Once upon a time\" (run --help)");
    if (o.bench + !o.ppl_file.empty() + o.has_prompt > 1) refuse("only one of a prompt, --ppl and --bench can be given");
    if (!o.bench && o.ppl_file.empty() && !o.has_prompt) refuse("nothing to do: give -p TEXT, -f FILE, --ppl FILE or --bench (run --help)");
    if (!o.bench && o.batches[0] == LARGEST_BATCH) refuse("-b max: only for --bench");
    if (!o.bench && (formats.size() > 1 || o.batches.size() > 1)) refuse("%s: a list is for --bench", formats.size() > 1 ? "--kv" : "-b");
    if (formats.size() > 1 && one_side) refuse("-ctk, -ctv: --kv names %zu formats for both", formats.size());
    if (o.has_prompt && batch_option) refuse("-b: for --ppl and --bench; --batch N takes a prompt a line, N at once");
    if (o.has_prompt && !o.prompt_lines && looks_like_number(o.prompt))
        fprintf(stderr, "note: the prompt is '%s'; did you mean --top-p %s?\n", o.prompt.c_str(), o.prompt.c_str());
    if (!o.against_model.empty() && !o.has_against) o.has_against = o.against_same_kv = true;
    check_measuring(o);
    for (size_t i = 0; i < std::max<size_t>(1, formats.size()); i++) {
        o.kvs.push_back(o.kv);
        if (formats.size() > 1) o.kvs[i].k_format = o.kvs[i].v_format = formats[i];
    }
    if (o.bench && tokens_given) o.bench_tokens = std::max(1, o.n_predict);
    return o;
}

static Model weights_of_file(const std::string &path, const Ops &ops) {
    Model m = model_open(path);
    if (&ops != &cpu_ops) check_weights_fit(m.weights_bytes, ops);    // the CPU reads the mapped file
    model_upload(m, ops);
    return m;
}
static Model weights_of(const Options &o, const Ops &ops) {
    Config c;
    if (o.shape.empty()) return weights_of_file(o.model, ops);
    if (!shape_from_name(o.shape, &c)) refuse("--shape '%s': expected one of %s", o.shape.c_str(), SHAPE_NAMES);
    return random_weights(c, o.dtype, ops);
}

int main(int argc, char **argv) {
    try {
        const Options o = parse(argc, argv);
        const Ops *ops = device_open(o.device);
        if (o.threads) omp_set_num_threads(o.threads);
        const int64_t memory_before = memory_taken(*ops);
        const Model m = weights_of(o, *ops);
        if (o.bench) bench(m, *ops, o, memory_before);
        else if (o.needle) needle(m, *ops, o);
        else if (!o.ppl_file.empty() && o.against_model.empty()) perplexity(m, nullptr, *ops, o);
        else if (!o.ppl_file.empty()) {
            const Model against = weights_of_file(o.against_model, *ops);
            perplexity(m, &against, *ops, o);
        }
        else generate(m, *ops, o);
        return 0;
    } catch (const Error &e) {
        fprintf(stderr, "run: %s\n", e.what());
        return e.exit_code;
    } catch (const std::bad_alloc &) {
        fprintf(stderr, "run: out of memory\n");
        return 1;
    }
}
