#include "needle.h"
#include <algorithm>
#include <cstdio>
#include <random>
#include "files.h"
#include "json.h"
#include "perplexity.h"
#include "report.h"

constexpr int DEFAULT_TRIALS = 20;

static bool is_name(const std::string &piece) {
    if (piece.size() < 5 || piece.size() > 11 || piece[0] != ' ' || piece[1] < 'A' || piece[1] > 'Z') return false;
    return std::all_of(piece.begin() + 2, piece.end(), [](char c) { return c >= 'a' && c <= 'z'; });
}

std::vector<int> needle_words(const Tokenizer &t) {
    std::vector<int> words;
    for (int id = 0; id < (int)t.pieces.size(); id++)
        if (t.types[id] == TokenType::NORMAL && is_name(t.pieces[id])) words.push_back(id);
    return words;
}

std::vector<NeedleTrial> make_trials(const Model &m, const std::vector<int> &text, int bos, const KvView &kv, int context, int n, uint64_t seed) {
    const std::vector<int> words = needle_words(m.tokenizer);
    if ((int)words.size() < 100) fail("--needle: the vocabulary has %zu names of 4 to 10 letters, 100 are needed to draw from", words.size());
    // A space in front, once, whatever the tokenizer adds by itself.
    const std::string space = m.tokenizer.prefix == Prefix::NONE ? " " : "";
    const std::vector<int> question = tokenizer_encode(m.tokenizer, space + "The name of the king was", false);
    const std::vector<int> stop = {tokenizer_encode(m.tokenizer, "a.", false).back()};
    const int n_question = (int)question.size(), n_needle = n_question + NEEDLE_WORDS + (int)stop.size();
    const int asked = context - NEEDLE_WORDS - n_question;    // where the question begins
    const int sealed_from = kv.sink * KV_BLOCK, sealed_to = asked < 0 ? 0 : kv.coded_end(asked, kv.L - 1) * KV_BLOCK;
    if (sealed_to - sealed_from < n_needle) refuse("--needle: a context of %d tokens has no sealed block to hide a needle in; raise -c", context);
    if ((int)text.size() < context) fail("--needle: a text of %zu tokens is too short for contexts of %d", text.size(), context);

    std::mt19937_64 random(seed);
    auto below = [&](size_t n) { return (int)(random() % n); };
    std::vector<NeedleTrial> trials(n);
    for (NeedleTrial &t : trials) {
        std::vector<int> key;
        for (int i = 0; i < NEEDLE_WORDS; i++) {
            key.push_back(words[below(words.size())]);
            for (int &other : t.others[i])
                do other = words[below(words.size())];
                while (other == key[i]);
        }
        std::vector<int> hidden = question;
        hidden.insert(hidden.end(), key.begin(), key.end());
        hidden.insert(hidden.end(), stop.begin(), stop.end());

        const int from = below(text.size() - context + 1);
        t.begin = std::max((int)(bos >= 0), sealed_from + below(sealed_to - sealed_from - n_needle + 1));
        t.end = t.begin + n_needle;
        if (bos >= 0) t.without.push_back(bos);
        t.without.insert(t.without.end(), text.begin() + from, text.begin() + from + asked - t.without.size());
        t.ids = t.without;
        t.ids.insert(t.ids.begin() + t.begin, hidden.begin(), hidden.end());
        t.ids.resize(asked);
        for (std::vector<int> *ids : {&t.ids, &t.without}) {
            ids->insert(ids->end(), question.begin(), question.end());
            ids->insert(ids->end(), key.begin(), key.end());
        }
    }
    return trials;
}

// ---- the figures ------------------------------------------------------------------------------------------
struct Retrieval { Estimate keys, words, loss; };    // share of keys and words found, nats a word

struct Answer { double nll = 0; bool found = false; };

static Retrieval summarize_answers(const std::vector<Answer> &answers) {    // (trials, NEEDLE_WORDS)
    std::vector<Score> losses;    // of a trial: its words are not independent of each other
    int64_t keys = 0, words = 0;
    for (size_t i = 0; i < answers.size(); i += NEEDLE_WORDS) {
        Score s;
        int found = 0;
        for (int w = 0; w < NEEDLE_WORDS; w++) s.nll += answers[i + w].nll / NEEDLE_WORDS, found += answers[i + w].found;
        losses.push_back(s);
        words += found, keys += found == NEEDLE_WORDS;
    }
    const int64_t n = (int64_t)losses.size();
    return {estimate_share(keys, n), estimate_share(words, n * NEEDLE_WORDS), estimate(losses, [](const Score &s) { return s.nll; })};
}

static OrderedJson retrieval_json(const Retrieval &with, const Retrieval &without, const KvOptions &kv, const KvCache &cache, const Config &c) {
    return {{"kv", kv_pair_name(kv)}, {"bits", kv_pair_bits(kv, c)}, {"sink", kv.sink}, {"recent", kv.recent}, {"ablate", ablation_text(kv.ablate)},
            {"cache_bytes", cache.bytes}, {"keys", with.keys.mean}, {"keys_error", with.keys.error}, {"words", with.words.mean},
            {"words_error", with.words.error}, {"loss", with.loss.mean}, {"loss_error", with.loss.error}, {"keys_without", without.keys.mean}, {"words_without", without.words.mean},
            {"loss_without", without.loss.mean}, {"loss_without_error", without.loss.error}};
}

static void print_retrieval(const Retrieval &with, const Retrieval &without, int trials, const KvOptions &kv, const Config &c) {
    printf("%s: %.1f +/- %.1f %% of %d keys retrieved, %.1f +/- %.1f %% of words (%.1f %% without the needle) | loss a word %.4f +/- %.4f, "
           "without the needle %.4f +/- %.4f, %.4f bits, sink %d, recent %d%s\n",
           kv_pair_name(kv).c_str(), 100 * with.keys.mean, 100 * with.keys.error, trials, 100 * with.words.mean, 100 * with.words.error,
           100 * without.words.mean, with.loss.mean, with.loss.error, without.loss.mean, without.loss.error, kv_pair_bits(kv, c), kv.sink, kv.recent,
           kv.ablate ? (", without " + ablation_text(kv.ablate)).c_str() : "");
}

void needle(const Model &m, const Ops &ops, const Options &o) {
    const Config &c = m.config;
    const int context = o.context ? o.context : c.max_len, n = o.max_windows ? o.max_windows : DEFAULT_TRIALS;
    const std::vector<int> text = tokenizer_encode(m.tokenizer, read_file(o.ppl_file), false);
    const std::vector<KvOptions> kv = caches_of(o);
    const int slots = std::min(o.batch ? o.batch : 4, 2 * n);
    Meter t;
    meter_open(t, m, ops, kv, slots, context, context, false, o.json);
    const std::vector<NeedleTrial> trials = make_trials(m, text, bos_of(m, o), t.cache[0].view, context, n, o.sampler.seed);

    std::vector<Answer> answers[2][2];    // [cache][0 with the needle, 1 without]
    for (auto &of_cache : answers)
        for (auto &a : of_cache) a.resize((size_t)n * NEEDLE_WORDS);
    std::vector<Sequence> batch;
    for (int i = 0; i < 2 * n; i += slots) {
        batch.clear();
        for (int j = i; j < std::min(2 * n, i + slots); j++) batch.push_back({j % 2 ? trials[j / 2].without : trials[j / 2].ids, context - NEEDLE_WORDS});
        meter_run(t, batch, [&](int s, int pos, const float *logits, const float *against) {
            const NeedleTrial &trial = trials[(i + s) / 2];
            const int word = pos + 1 - batch[s].from, id = batch[s].ids[pos + 1];
            const float *rows[2] = {logits, against};
            for (int k = 0; k < t.n_caches; k++) {
                Answer &a = answers[k][(i + s) % 2][(size_t)(i + s) / 2 * NEEDLE_WORDS + word];
                a.nll = score_row(rows[k], nullptr, c.vocab, id).nll;
                a.found = std::all_of(trial.others[word], trial.others[word] + NEEDLE_OTHERS, [&](int other) { return rows[k][id] > rows[k][other]; });
            }
        });
    }

    OrderedJson j = {{"model", o.model}, {"text", o.ppl_file}, {"context", context}, {"trials", n}, {"seed", o.sampler.seed}, {"words_a_key", NEEDLE_WORDS},
                     {"other_words", NEEDLE_OTHERS}, {"prefill", o.kv.exact_prefill ? "exact" : "coded"}};
    if (!o.json)
        printf("needle: context %d, keys of %d words, each against %d others, seed %llu, prefill %s\n", context, NEEDLE_WORDS, NEEDLE_OTHERS,
               (unsigned long long)o.sampler.seed, o.kv.exact_prefill ? "exact" : "coded");
    for (int k = 0; k < t.n_caches; k++) {
        const Retrieval with = summarize_answers(answers[k][0]), without = summarize_answers(answers[k][1]);
        if (!std::isfinite(with.loss.mean + without.loss.mean))
            fail("%s: logits are not numbers: the weights hold NaN or infinity (build/show checks them)", o.model.c_str());
        if (!o.json) print_retrieval(with, without, n, kv[k], c);
        else if (k == 0) j.update(retrieval_json(with, without, kv[k], t.cache[k], c));
        else j["against"] = retrieval_json(with, without, kv[k], t.cache[k], c);
    }
    if (o.json) printf("%s\n", j.dump().c_str());
    if (fflush(stdout) != 0) fail("stdout: cannot write");
}
