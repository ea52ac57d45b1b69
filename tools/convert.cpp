// convert.cpp - the command line of convert (checkpoint.h): a checkpoint of others becomes model.bin.
#include "checkpoint.h"
#include "command.h"

static const char *USAGE =
    "usage: convert SRC -o model.bin [--dtype f32|f16|bf16|q8|q4] [--tokenizer FILE]\n"
    "\n"
    "  SRC               a Hugging Face folder (config.json, *.safetensors, tokenizer.json or tokenizer.model)\n"
    "                    or a llama2.c checkpoint (legacy or version 1)\n"
    "  -o FILE           the model to write; FORMAT.md describes it\n"
    "  --dtype T         of the matrices; default: as in the checkpoint; q8 and q4: 8.5 and 4.5 bits a weight\n"
    "  --tokenizer FILE  default: the tokenizer beside the weights\n";

static void run(Arguments arguments) {
    ConvertOptions options;
    for (std::string word; arguments.next(&word);) {
        if (word == "-h" || word == "--help") { printf("%s", USAGE); return; }
        else if (word == "-o") options.output = arguments.value();
        else if (word == "--dtype") options.dtype = arguments.value();
        else if (word == "--tokenizer") options.tokenizer = arguments.value();
        else if (word[0] == '-') refuse("unknown option '%s' (convert --help lists them)", word.c_str());
        else if (options.source.empty()) options.source = word;
        else refuse("expected one source, found '%s' and '%s'", options.source.c_str(), word.c_str());
    }
    if (options.source.empty() || options.output.empty()) {
        refuse("expected convert SRC -o model.bin (convert --help says more)");
    }
    std::string note;
    {
        ProgressLine progress;
        options.progress = std::ref(progress);
        note = convert(options);
    }
    report_written(options.output, note);
}

int main(int argc, char **argv) { return run_command("convert", argc, argv, run); }
