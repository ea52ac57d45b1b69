// convert.cpp - the command line of convert (checkpoint.h): a checkpoint of others becomes model.bin.
#include <sys/stat.h>
#include "checkpoint.h"
#include "progress.h"

static const char *USAGE =
    "usage: convert SRC -o model.bin [--dtype f32|f16|bf16] [--tokenizer FILE]\n"
    "\n"
    "  SRC               a Hugging Face folder (config.json, *.safetensors, tokenizer.json or tokenizer.model)\n"
    "                    or a llama2.c checkpoint (legacy or version 1)\n"
    "  -o FILE           the model to write; FORMAT.md describes it\n"
    "  --dtype T         of the matrices; default: as in the checkpoint\n"
    "  --tokenizer FILE  default: the tokenizer beside the weights\n";

static int run(int argc, char **argv) {
    ConvertOptions options;
    for (int i = 1; i < argc; i++) {
        const std::string arg = argv[i];
        auto value = [&]() -> std::string {
            if (i + 1 == argc) refuse("%s: needs a value", arg.c_str());
            return argv[++i];
        };
        if (arg == "-h" || arg == "--help") return printf("%s", USAGE), 0;
        if (arg == "-o") options.output = value();
        else if (arg == "--dtype") options.dtype = value();
        else if (arg == "--tokenizer") options.tokenizer = value();
        else if (arg[0] == '-' && arg.size() > 1) refuse("unknown option '%s' (convert --help lists them)", arg.c_str());
        else if (options.source.empty()) options.source = arg;
        else refuse("expected one source, found '%s' and '%s'", options.source.c_str(), arg.c_str());
    }
    if (options.source.empty() || options.output.empty()) refuse("expected convert SRC -o model.bin (convert --help says more)");
    ProgressLine progress;
    options.progress = std::ref(progress);
    try {
        convert(options);
    } catch (...) {
        progress.clear();
        throw;
    }
    progress.clear();
    struct stat info;
    stat(options.output.c_str(), &info);
    fprintf(stderr, "wrote %s (%.1f MB)\n", options.output.c_str(), info.st_size / 1e6);
    return 0;
}

int main(int argc, char **argv) {
    try {
        return run(argc, argv);
    } catch (const Error &e) {
        fprintf(stderr, "convert: %s\n", e.what());
        return e.exit_code;
    } catch (const std::bad_alloc &) {
        fprintf(stderr, "convert: out of memory\n");
        return 1;
    }
}
