// show.cpp - prints what is in a model.bin: config, tokenizer, tensors with their statistics; reads every value.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include "command.h"
#include "groups.h"
#include "json.h"
#include "model.h"

static const char *USAGE =
    "usage: show model.bin\n"
    "\n"
    "  Prints config, tokenizer and tensors of a model and checks all of it, values too.\n"
    "  Exit code 0: the file is whole; 1: it is not, the line on stderr says where.\n";

struct Stats { double rms = 0, max = 0; };

static int64_t count_of(const TensorSpec &spec) {
    int64_t n = 1;
    for (const int64_t size : spec.shape) n *= size;
    return n;
}

static Stats scan(const Model &m, const TensorSpec &spec, const Matrix &w) {
    const int64_t n = count_of(spec);
    const int64_t bad = find_nonfinite(w, n);
    if (bad >= 0) {
        fail("%s: tensor '%s': element %" PRId64 ": expected a finite number, found NaN or infinity%s",
             m.file->path.c_str(), spec.name.c_str(), bad, w.scale ? " as its scale" : "");
    }
    Stats s;
    for (int64_t i = 0; i < n; i++) {
        const double x = weight_at(w, i);
        s.rms += x * x;
        s.max = std::max(s.max, std::fabs(x));
    }
    s.rms = std::sqrt(s.rms / n);
    return s;
}

static std::string id_list(const std::vector<int> &ids) {
    std::string text;
    for (const int id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
    return text.empty() ? "none" : text;
}

static void show(const std::string &path) {
    const Model m = model_open(path);
    const Config &c = m.config;
    int64_t parameters = 0;
    for (const TensorSpec &spec : config_tensors(c)) parameters += count_of(spec);
    printf("%s\n", path.c_str());
    printf("  file       %.1f MB, format version %d, from %s\n", m.file->file_bytes / 1e6, MODEL_FORMAT_VERSION,
           printable(c.dialect).c_str());
    printf("  shape      dim %d, ffn_dim %d, %d layers, %d heads x %d, %d kv heads, vocab %d%s\n", c.dim, c.ffn_dim,
           c.n_layers, c.n_heads, c.head_dim, c.n_kv_heads, c.vocab, c.tied ? ", tied" : "");
    printf("  positions  %d, rope_theta %g", c.max_len, c.rope_theta);
    if (c.rope_factor != 0.0f) {
        printf(", llama3 scaling: factor %g, %g to %g turns of %d", c.rope_factor, c.rope_low_freq, c.rope_high_freq,
               c.rope_original_len);
    }
    printf("\n  norm_eps   %g\n", c.norm_eps);
    printf("  ids        bos %s, eos %s\n", id_list(c.bos).c_str(), id_list(c.eos).c_str());
    printf("  tokenizer  %s, %d tokens, %s bos in front, chat template: %zu bytes\n", tokenizer_kind(m.tokenizer),
           tokenizer_vocab(m.tokenizer), m.tokenizer.add_bos ? "a" : "no", m.tokenizer.chat_template.size());
    printf("  size       %.3f M parameters, %" PRId64 " bytes, of which a decode step reads %" PRId64 "\n",
           parameters / 1e6, m.weights_bytes, m.step_bytes);
    printf("  kv cache   %d bytes a token as f16\n", c.n_layers * 2 * c.n_kv_heads * c.head_dim * 2);

    printf("\n  %-22s %-5s %-16s %14s %14s %10s %10s\n", "tensor", "dtype", "shape", "offset", "bytes", "rms",
           "max |x|");
    size_t tensors = 0;
    for (const TensorSpec &spec : config_tensors(c)) {
        const Matrix w = model_tensor(*m.file, spec);
        const Stats s = scan(m, spec, w);    // of the weights, which codes and scales are together
        for (const StoredTensor &stored : stored_tensors(spec, w.type)) {
            const TensorView &t = *m.file->find(stored.name);
            printf("  %-22s %-5s %-16s %14" PRIu64 " %14" PRIu64, t.name.c_str(), t.dtype.c_str(),
                   shape_text(t.shape).c_str(), m.file->data_offset() + t.begin, t.bytes);
            if (stored.name == spec.name) printf(" %10.4g %10.4g", s.rms, s.max);
            printf("\n");
            tensors++;
        }
    }
    printf("\n  checks     %zu tensors, all there, in shape, aligned to %d bytes, every value finite\n",
           tensors, (int)TENSOR_ALIGN);
}

static void run(Arguments arguments) {
    std::string path, more;
    if (!arguments.next(&path) || arguments.next(&more)) refuse("expected show model.bin");
    if (path == "-h" || path == "--help") { printf("%s", USAGE); return; }
    if (path[0] == '-') refuse("unknown option '%s' (show --help says more)", path.c_str());
    show(path);
}

int main(int argc, char **argv) { return run_command("show", argc, argv, run); }
