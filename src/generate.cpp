#include "generate.h"
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <unistd.h>
#include "json.h"
#include "report.h"

// A prompt and the text that it becomes.
struct Story {
    std::string name;                // for errors: "prompt", or "prompt, line 3"
    std::string prompt;
    std::vector<int> ids;            // the prompt's tokens, then those that were made
    int n_prompt = 0, wanted = 0;    // tokens of the prompt; tokens to make at most
    int fed = 0;                     // of ids, how many are in the cache
    Decoder decoder{nullptr};
    std::string text;                // not yet printed
    const char *stop = nullptr;      // why it ended: "eos", "length", "context"
    uint64_t logits_hash = 0;        // of its last logits
    int made() const { return (int)ids.size() - n_prompt; }
};

// Text must reach whoever reads it while it is written.
static void print_text(const std::string &s) {
    if (fwrite(s.data(), 1, s.size(), stdout) != s.size() || fflush(stdout) != 0) fail("stdout: cannot write (%s)", strerror(errno));
}

static std::vector<std::string> split_lines(const std::string &text) {
    std::vector<std::string> lines;
    for (size_t at = 0; at < text.size();) {
        const size_t end = std::min(text.find('\n', at), text.size());
        const bool cr = end > at && text[end - 1] == '\r';
        lines.push_back(text.substr(at, end - at - cr));
        at = end + 1;
    }
    return lines;
}

static std::vector<int> encode_prompt(const Model &m, const Options &o, const Story &story) {
    const Tokenizer &t = m.tokenizer;
    std::vector<int> ids = tokenizer_encode(t, story.prompt, o.parse_special);
    const int bos = m.config.bos.empty() ? t.bos : m.config.bos[0];
    if (bos >= 0 && (t.add_bos || ids.empty()) && (ids.empty() || ids[0] != bos)) ids.insert(ids.begin(), bos);
    if (ids.empty()) fail("%s: empty, and %s has no BOS token to start from", story.name.c_str(), o.model.c_str());
    return ids;
}

static std::vector<Story> make_stories(const Model &m, const Options &o, int context) {
    const std::vector<std::string> prompts = o.prompt_lines ? split_lines(o.prompt) : std::vector<std::string>{o.prompt};
    if (prompts.empty()) fail("prompt: empty; --batch takes a prompt a line");
    std::vector<Story> stories(prompts.size());
    for (size_t i = 0; i < prompts.size(); i++) {
        Story &s = stories[i];
        s.name = o.prompt_lines ? strf("prompt, line %zu", i + 1) : "prompt";
        s.prompt = prompts[i];
        s.ids = encode_prompt(m, o, s);
        s.n_prompt = (int)s.ids.size();
        if (s.n_prompt > context) fail("%s: %d tokens, the context holds %d; raise -c or shorten it", s.name.c_str(), s.n_prompt, context);
        s.wanted = o.n_predict < 0 ? context - s.n_prompt : std::min(o.n_predict, context - s.n_prompt);
        s.decoder.tokenizer = &m.tokenizer;
    }
    return stories;
}

// The logits (V) behind everything in s.ids, and the token id that was sampled from them: one token more, or the end.
static void continue_story(Story &s, int id, const std::vector<int> &eos, const Options &o, const float *logits, int V) {
    auto end = [&](const char *why) {
        s.stop = why;
        s.text += decoder_flush(s.decoder);
        s.logits_hash = hash_bytes(logits, (size_t)V * sizeof(float));
    };
    const char *enough = s.wanted == o.n_predict ? "length" : "context";
    if (s.made() == 0) {
        for (int prompt_id : s.ids) {
            const std::string text = decoder_next(s.decoder, prompt_id);
            if (o.echo && !o.json) s.text += text;
        }
        if (s.wanted == 0) return end(enough);
    }
    if (id < 0)
        fail("%s: logits at position %d are not numbers: the weights hold NaN or infinity (build/show %s checks them)", s.name.c_str(), s.fed - 1,
             o.model.c_str());
    if (std::find(eos.begin(), eos.end(), id) != eos.end()) return end("eos");
    s.text += decoder_next(s.decoder, id);
    s.ids.push_back(id);
    if (s.made() == s.wanted) end(enough);
}

static void print_json(const Story &s, int line) {
    OrderedJson j;
    if (line) j["line"] = line;
    j.update({{"prompt", s.prompt}, {"text", s.text}, {"prompt_tokens", s.n_prompt}, {"tokens", s.made()}, {"stop", s.stop},
              {"logits_hash", hash_text(s.logits_hash)}});
    print_text(j.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) + "\n");
}

void generate(const Model &m, const Ops &ops, const Options &o) {
    const Config &c = m.config;
    const int context = o.context > 0 ? o.context : c.max_len;
    std::vector<Story> stories = make_stories(m, o, context);

    // the cache holds what this run can use, no more
    int slot_len = 0, longest = 0;
    for (const Story &s : stories) slot_len = std::max(slot_len, s.n_prompt + s.wanted), longest = std::max(longest, s.n_prompt);
    const int slots = (int)std::min<size_t>(std::max(1, o.batch), stories.size());
    // An exact prompt is one step (kv_block.h); every other sequence has its row in that step too.
    const MemoryPlan plan = prefill_plan(m, ops, [&](int rows) {
        if (o.kv.exact_prefill) rows = longest + slots - 1;
        else rows = (int)std::min<int64_t>(std::max(rows, slots), (int64_t)slots * longest);
        return MemoryPlan{o.kv, slots, slot_len, rows, slots};
    });
    announce_memory(m, ops, plan, false);
    if (context > c.max_len) fprintf(stderr, "note: -c %d is beyond the %d positions the model was trained for\n", context, c.max_len);
    KvCache cache;
    kv_cache_open(cache, ops, c, o.kv, slots, slot_len);
    Activations a;
    activations_open(a, ops, c, plan.rows, slots);
    std::vector<float> logits((size_t)slots * c.vocab);

    std::vector<Story *> running(slots, nullptr);        // by slot
    std::vector<Sampler> sampler(slots, o.sampler);
    std::vector<int> sampled(slots);
    Rows step;
    size_t next = 0, printed = 0;                        // stories that have begun; stories that are on stdout whole
    Closing r;
    r.many = o.prompt_lines, r.prompts = (int)stories.size(), r.slots = slots;
    std::vector<uint64_t> hashes;
    while (printed < stories.size()) {
        const auto start = std::chrono::steady_clock::now();
        int spare = plan.rows;
        for (int s = 0; s < slots; s++) {
            if (!running[s] && next < stories.size()) {
                kv_cache_clear(cache, s);
                sampler[s].seed = o.sampler.seed + next, sampler[s].drawn = 0;
                running[s] = &stories[next++];
            }
            spare -= running[s] != nullptr;
        }

        // the step: a row of every sequence, and as many more of prompts as there is room for
        step.clear();
        bool reads_prompts = false;
        int64_t bytes = m.step_bytes;
        for (int s = 0; s < slots; s++) {
            if (!running[s]) continue;
            Story &t = *running[s];
            const int left = (int)t.ids.size() - t.fed, n = 1 + std::min(left - 1, spare);
            if (o.kv.exact_prefill && n < left) continue;
            spare -= n - 1;
            reads_prompts |= t.fed < t.n_prompt;
            bytes += cache_bytes_read(cache.view, t.fed).total();
            kv_cache_reserve(cache, s, t.fed + n);
            for (const int end = t.fed + n; t.fed < end; t.fed++) step.add(t.ids[t.fed], s, t.fed, t.fed + 1 == (int)t.ids.size());
        }
        forward(m, cache.view, a, step.batch(), ops);
        const int n_out = (int)step.out.size();
        if (n_out > 0) ops.download(logits.data(), a.logits, (size_t)n_out * c.vocab * sizeof(float));

        // a token of every sequence whose last row gave logits
#pragma omp parallel for if (n_out > 1)
        for (int i = 0; i < n_out; i++) sampled[i] = sample(sampler[step.slot[step.out[i]]], &logits[(size_t)i * c.vocab], c.vocab);
        if (n_out > 0 && r.first_token_s == 0) r.first_token_s = seconds_running();
        for (int i = 0; i < n_out; i++) {
            const int s = step.slot[step.out[i]];
            continue_story(*running[s], sampled[i], c.eos, o, &logits[(size_t)i * c.vocab], c.vocab);
            if (running[s]->stop) running[s] = nullptr;
        }

        // the text: of the first story that has not ended, as far as it goes
        for (; printed < next; printed++) {
            Story &t = stories[printed];
            if (!o.json && !t.text.empty()) print_text(t.text), t.text.clear();
            if (!t.stop) break;
            if (o.json) print_json(t, o.prompt_lines ? (int)printed + 1 : 0);
            else if (o.prompt_lines) print_text("\n---\n");
            else if (isatty(STDOUT_FILENO)) print_text("\n");
            r.prompt_tokens += t.n_prompt, r.tokens += t.made(), r.stops[t.stop]++;
            hashes.push_back(t.logits_hash);
        }
        (reads_prompts ? r.prefill_s : r.decode_s) += seconds_since(start);
        if (!reads_prompts) r.decode_rows += n_out, r.decode_bytes += bytes;
    }

    r.logits_hash = o.prompt_lines ? hash_bytes(hashes.data(), hashes.size() * sizeof hashes[0]) : hashes[0];
    const int cut = r.stops.count("context") ? r.stops["context"] : 0;
    if (cut > 0) fprintf(stderr, "%sstopped: the context of %d tokens is full (-c)\n", r.many ? strf("%d of %d ", cut, r.prompts).c_str() : "", context);
    if (!r.many && r.stops.count("eos")) fprintf(stderr, "stopped: end of text\n");
    print_closing(r, m, cache, a);
}
