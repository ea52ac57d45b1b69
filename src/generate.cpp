#include "generate.h"
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <unistd.h>
#include "report.h"

constexpr int PREFILL_ROWS = 512;    // rows of a prefill step: weights are read once for that many tokens

// Text must reach whoever reads it while it is written.
static void print_text(const std::string &s) {
    if (fwrite(s.data(), 1, s.size(), stdout) != s.size() || fflush(stdout) != 0) fail("stdout: cannot write (%s)", strerror(errno));
}

static std::vector<int> encode_prompt(const Model &m, const Options &o) {
    const Tokenizer &t = m.tokenizer;
    std::vector<int> ids = tokenizer_encode(t, o.prompt, o.parse_special);
    const int bos = m.config.bos.empty() ? t.bos : m.config.bos[0];
    if (bos >= 0 && (t.add_bos || ids.empty()) && (ids.empty() || ids[0] != bos)) ids.insert(ids.begin(), bos);
    if (ids.empty()) fail("%s: the prompt is empty and the model has no BOS token to start from", o.model.c_str());
    return ids;
}

void generate(const Model &m, const Ops &ops, const Options &o) {
    const Config &c = m.config;
    const std::vector<int> prompt = encode_prompt(m, o);
    const int n_prompt = (int)prompt.size(), context = o.context > 0 ? o.context : c.max_len;
    if (n_prompt > context) fail("prompt: %d tokens, the context holds %d; raise -c or shorten it", n_prompt, context);
    if (context > c.max_len) fprintf(stderr, "note: -c %d is beyond the %d positions the model was trained for\n", context, c.max_len);
    const int wanted = o.n_predict < 0 ? context - n_prompt : std::min(o.n_predict, context - n_prompt);
    const int slot_len = n_prompt + wanted;    // the cache holds what this run can use, no more
    const int rows = o.kv.exact_prefill ? n_prompt : std::min(n_prompt, PREFILL_ROWS);

    announce_memory(m, ops, o.kv, 1, slot_len, rows, 1, false);
    KvCache cache;
    kv_cache_open(cache, ops, c, o.kv, 1, slot_len);
    Activations a;
    activations_open(a, ops, c, rows, 1);
    std::vector<float> logits(c.vocab);
    Sampler sampler = o.sampler;
    Decoder decoder{&m.tokenizer};
    Rows step;

    auto run_step = [&](int last) {
        kv_cache_reserve(cache, 0, last + 1);
        forward(m, cache.view, a, step.batch(), ops);
        if (!step.out.empty()) ops.download(logits.data(), a.logits, logits.size() * sizeof(float));
    };

    Closing r;
    r.prompt_tokens = n_prompt;

    // the prompt
    auto start = std::chrono::steady_clock::now();
    for (int n = 0; n < n_prompt; n += rows) {
        step.clear();
        const int end = std::min(n + rows, n_prompt);
        for (int i = n; i < end; i++) step.add(prompt[i], 0, i, i == n_prompt - 1);
        run_step(end - 1);
    }
    r.prefill_s = seconds_since(start);
    r.first_token_s = seconds_running();
    for (int id : prompt) {
        const std::string text = decoder_next(decoder, id);
        if (o.echo) print_text(text);
    }

    // one token at a time
    start = std::chrono::steady_clock::now();
    int pos = n_prompt, made = 0;
    const char *stop = o.n_predict >= 0 && wanted == o.n_predict ? "length" : "context";
    for (; made < wanted; made++) {
        const int id = sample(sampler, logits.data(), c.vocab);
        if (id < 0) fail("%s: logits at position %d are not numbers: the weights hold NaN or infinity (build/show %s checks them)", o.model.c_str(), pos - 1, o.model.c_str());
        if (std::find(c.eos.begin(), c.eos.end(), id) != c.eos.end()) {
            stop = "eos";
            break;
        }
        print_text(decoder_next(decoder, id));
        if (made + 1 == wanted) {    // its logits would not be used
            made++;
            break;
        }
        step.clear();
        step.add(id, 0, pos, true);
        run_step(pos);
        r.decode_bytes += step_bytes(m, cache.view, 1, pos++);
    }
    r.decode_s = seconds_since(start);
    r.decode_steps = pos - n_prompt;
    r.tokens = made;
    r.stop = stop;
    r.logits_hash = hash_bytes(logits.data(), logits.size() * sizeof(float));
    print_text(decoder_flush(decoder));
    if (isatty(STDOUT_FILENO)) print_text("\n");

    if (stop == std::string("context")) fprintf(stderr, "stopped: the context of %d tokens is full (-c)\n", context);
    if (stop == std::string("eos")) fprintf(stderr, "stopped: end of text\n");
    print_closing(r, m, cache, a);
}
