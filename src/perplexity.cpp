#include "perplexity.h"
#include <algorithm>
#include <cstdio>
#include <unistd.h>
#include "files.h"
#include "json.h"
#include "report.h"

std::vector<KvOptions> caches_of(const Options &o) {
    std::vector<KvOptions> kv = {o.kv};
    if (o.has_against) {
        if (o.against_same_kv) return {o.kv, o.kv};
        KvOptions against;
        against.k_format = against.v_format = o.against;
        against.exact_prefill = o.kv.exact_prefill;
        kv.push_back(against);
    }
    return kv;
}

std::string ablation_text(unsigned ablate) {
    std::string text;
    for (const Ablation &a : ABLATIONS)
        if (ablate & a.flag) text += (text.empty() ? "" : ",") + std::string(a.name);
    return text;
}

int bos_of(const Model &m, const Options &o) { return !o.ppl_bos ? -1 : m.config.bos.empty() ? m.tokenizer.bos : m.config.bos[0]; }

Protocol make_protocol(const Model &m, const Options &o) {
    Protocol p;
    p.ids = tokenizer_encode(m.tokenizer, read_file(o.ppl_file), false);
    p.bos = bos_of(m, o);
    const int with_bos = p.bos >= 0;
    p.context = o.context ? o.context : m.config.max_len;
    const int length = p.context - with_bos;
    p.stride = o.stride ? o.stride : length;
    if (length < 1 + !with_bos) refuse("-c %d: too short to score a token", p.context);
    if (p.stride > length) refuse("--stride %d: longer than a window of %d tokens", p.stride, length);
    if (o.kv.exact_prefill && p.stride == length)
        refuse("--prefill exact: needs a --stride below %d; the head of a window that is not scored is its prompt", length);
    if ((int)p.ids.size() < 1 + !with_bos) fail("%s: %zu tokens, nothing to score", o.ppl_file.c_str(), p.ids.size());
    p.windows = cut_windows((int64_t)p.ids.size(), length, p.stride, o.max_windows);
    p.longest = (int)(p.windows[0].end - p.windows[0].begin) + with_bos;
    p.prompt = p.windows.size() > 1 ? length - p.stride + with_bos : 0;
    return p;
}

std::vector<Score> score_text(Meter &t, const Protocol &p, bool quiet) {
    const int with_bos = p.bos >= 0, V = t.m->config.vocab;
    const bool progress = !quiet && isatty(STDERR_FILENO);
    std::vector<Score> scores;
    std::vector<Sequence> batch;
    std::vector<size_t> first;    // score of a sequence's ids[from]
    for (size_t w = 0; w < p.windows.size();) {
        batch.clear(), first.clear();
        size_t n = scores.size();
        for (; w < p.windows.size() && (int)batch.size() < t.slots; w++) {
            const Window &window = p.windows[w];
            Sequence s;
            if (with_bos) s.ids.push_back(p.bos);
            s.ids.insert(s.ids.end(), p.ids.begin() + window.begin, p.ids.begin() + window.end);
            s.from = std::max(1, (int)(window.score_from - window.begin) + with_bos);
            first.push_back(n);
            n += s.ids.size() - std::min(s.ids.size(), (size_t)s.from);
            batch.push_back(s);
        }
        scores.resize(n);
        meter_run(t, batch, [&](int s, int pos, const float *logits, const float *against) {
            Score &score = scores[first[s] + (pos + 1 - batch[s].from)];
            score = score_row(logits, against, V, batch[s].ids[pos + 1]);
            score.pos = pos;
        });
        for (size_t i = first[0]; i < n; i++)
            if (!std::isfinite(scores[i].nll + scores[i].against_nll)) {
                if (progress) fprintf(stderr, "\r\033[K");
                fail("%s: logits are not numbers: the weights hold NaN or infinity (build/show checks them)", t.m->file->path.c_str());
            }
        if (progress) fprintf(stderr, "\r%zu of %zu windows, PPL %.4f ", w, p.windows.size(), summarize(scores, false).ppl.mean);
    }
    if (progress) fprintf(stderr, "\r\033[K");
    return scores;
}

// ---- the figures ------------------------------------------------------------------------------------------
struct Figures {
    Summary all;
    std::vector<Bucket> buckets;
    double tok_s[2] = {};
    int64_t cache_bytes[2] = {};
    // --decode: the same tokens by coded prefill
    double prefill_nll = 0, difference = 0, mean_distance = 0, largest = 0;
};

static Figures measure(const Model &m, const Model *against, const Ops &ops, const Options &o, const Protocol &p) {
    const std::vector<KvOptions> kv = caches_of(o);
    const int slots = (int)std::min<size_t>(o.batch ? o.batch : 4, p.windows.size());
    Figures f;
    std::vector<Score> scores;
    {
        Meter t;
        meter_open(t, m, ops, kv, slots, p.longest, p.prompt, o.decode, o.json);
        if (against) t.weights[1] = against;
        scores = score_text(t, p, o.json);
        for (int i = 0; i < t.n_caches; i++) f.tok_s[i] = t.fed / t.seconds[i], f.cache_bytes[i] = t.cache[i].bytes;
    }
    if (scores.empty()) fail("%s: nothing to score", o.ppl_file.c_str());
    f.all = summarize(scores, o.has_against);
    if (o.by_position) f.buckets = split_by_position(scores);
    if (!o.decode) return f;

    Meter t;
    meter_open(t, m, ops, {o.kv}, slots, p.longest, p.prompt, false, o.json);
    const std::vector<Score> prefill = score_text(t, p, o.json);
    for (size_t i = 0; i < scores.size(); i++) {
        const double distance = std::fabs(scores[i].nll - prefill[i].nll);
        f.mean_distance += distance / scores.size();
        f.largest = std::max(f.largest, distance);
    }
    f.prefill_nll = summarize(prefill, false).nll.mean;
    f.difference = f.all.nll.mean - f.prefill_nll;
    return f;
}

// Bits a value of a full context in which sinks and recents count as the fp16 they are.  The open block is left out: it is
// fp16 in every format and its share vanishes as the context grows.
static double bits_with_exact(const KvOptions &kv, const Config &c, int context) {
    const double exact = std::min(1.0, (double)(kv.sink + kv.recent) / context);
    return exact * 16 + (1 - exact) * kv_pair_bits(kv, c);
}

static OrderedJson figures_json(const Figures &f, const Model &m, const Options &o, const Protocol &p) {
    const Summary &a = f.all;
    OrderedJson j = {{"model", o.model}, {"text", o.ppl_file}, {"ppl", a.ppl.mean}, {"error", a.ppl.error}, {"nll", a.nll.mean}, {"nll_error", a.nll.error},
                     {"scored", a.n}, {"context", p.context}, {"stride", p.stride}, {"bos", p.bos >= 0}, {"windows", p.windows.size()},
                     {"mode", o.decode ? "decode" : "prefill"}, {"prefill", o.kv.exact_prefill ? "exact" : "coded"}, {"kv", kv_pair_name(o.kv)},
                     {"bits", kv_pair_bits(o.kv, m.config)}, {"bits_with_exact", bits_with_exact(o.kv, m.config, p.context)}, {"sink", o.kv.sink},
                     {"recent", o.kv.recent}, {"ablate", ablation_text(o.kv.ablate)},
                     {"exponents", o.kv.k_exponent < 0 ? std::string() : strf("%g/%g", o.kv.k_exponent, o.kv.v_exponent)},
                     {"cache_bytes", f.cache_bytes[0]}, {"kv_bytes_per_token", kv_bytes_per_token(m.config, o.kv)}, {"tok_s", f.tok_s[0]}};
    if (o.has_against) {
        const KvOptions against = caches_of(o)[1];
        j["against"] = {{"model", o.against_model.empty() ? o.model : o.against_model}, {"kv", kv_pair_name(against)},
                        {"bits", kv_pair_bits(against, m.config)}, {"cache_bytes", f.cache_bytes[1]}, {"tok_s", f.tok_s[1]},
                        {"ppl", a.against_ppl.mean}, {"error", a.against_ppl.error}, {"nll", a.against_nll.mean}, {"nll_error", a.against_nll.error},
                        {"kl", a.kl.mean}, {"kl_error", a.kl.error}, {"kl_median", a.kl_median}, {"kl_p99", a.kl_p99},
                        {"ln_ratio", a.ln_ratio.mean}, {"ln_ratio_error", a.ln_ratio.error}, {"delta_ppl", a.delta_ppl.mean}, {"delta_ppl_error", a.delta_ppl.error},
                        {"same_top", a.same_top.mean}, {"same_top_error", a.same_top.error}};
    }
    for (const Bucket &b : f.buckets) {
        const Summary s = summarize(b.scores, o.has_against);
        OrderedJson row = {{"from", b.from}, {"to", b.to}, {"scored", s.n}};
        if (s.n) row["nll"] = s.nll.mean, row["nll_error"] = s.nll.error, row["ppl"] = s.ppl.mean;
        if (s.n && o.has_against) row["kl"] = s.kl.mean, row["kl_error"] = s.kl.error;
        j["positions"].push_back(row);
    }
    if (o.decode)
        j["decode"] = {{"nll", a.nll.mean}, {"prefill_nll", f.prefill_nll}, {"difference", f.difference}, {"mean_distance", f.mean_distance},
                       {"largest", f.largest}, {"tolerance", DECODE_TOLERANCE}};
    return j;
}

static void print_figures(const Figures &f, const Model &m, const Options &o, const Protocol &p) {
    const Summary &a = f.all;
    const std::string ablated = o.kv.ablate ? " without " + ablation_text(o.kv.ablate) : "";
    const std::string name = kv_pair_name(o.kv), mode = o.decode ? "decode" : o.kv.exact_prefill ? "prefill exact" : "prefill coded";
    printf("Final estimate: PPL = %.4f +/- %.4f | nll %.6f, context %d, stride %d, %lld tokens scored, %s, %s, kv %s%s, %.4f bits, sink %d, recent %d, cache %lld bytes, %.0f tok/s\n",
           a.ppl.mean, a.ppl.error, a.nll.mean, p.context, p.stride, (long long)a.n, p.bos >= 0 ? "BOS before each window" : "no BOS", mode.c_str(), name.c_str(),
           ablated.c_str(), kv_pair_bits(o.kv, m.config), o.kv.sink, o.kv.recent, (long long)f.cache_bytes[0], f.tok_s[0]);
    if (o.has_against) {
        const KvOptions against = caches_of(o)[1];
        const std::string other = (o.against_model.empty() ? "" : o.against_model + " ") + kv_pair_name(against);
        printf("against %s: PPL = %.4f +/- %.4f | nll %.6f, %.4f bits, cache %lld bytes, %.0f tok/s\n", other.c_str(), a.against_ppl.mean, a.against_ppl.error,
               a.against_nll.mean, kv_pair_bits(against, m.config), (long long)f.cache_bytes[1], f.tok_s[1]);
        const std::string own = (o.against_model.empty() ? "" : o.model + " ") + name;
        printf("KL(%s || %s) = %.6f +/- %.6f nats a token | median %.6f, 99%% %.6f\n", other.c_str(), own.c_str(), a.kl.mean, a.kl.error, a.kl_median, a.kl_p99);
        printf("delta PPL = %.4f +/- %.4f | ln(PPL ratio) %.6f +/- %.6f\n", a.delta_ppl.mean, a.delta_ppl.error, a.ln_ratio.mean, a.ln_ratio.error);
        printf("same top-1 = %.3f +/- %.3f %%\n", 100 * a.same_top.mean, 100 * a.same_top.error);
    }
    if (o.by_position) {
        printf("%13s %9s %10s %10s %10s%s\n", "position", "scored", "nll", "+/-", "PPL", o.has_against ? "         KL        +/-" : "");
        for (const Bucket &b : f.buckets) {
            const Summary s = summarize(b.scores, o.has_against);
            if (!s.n) continue;
            printf("%13s %9lld %10.4f %10.4f %10.4f", strf("%d-%d", b.from, b.to).c_str(), (long long)s.n, s.nll.mean, s.nll.error, s.ppl.mean);
            if (o.has_against) printf(" %10.6f %10.6f", s.kl.mean, s.kl.error);
            printf("\n");
        }
    }
    if (o.decode)
        printf("decode nll %.6f, coded prefill nll %.6f | difference %.6f, mean distance a token %.6f, largest %.6f\n", a.nll.mean, f.prefill_nll, f.difference,
               f.mean_distance, f.largest);
}

// The same tokens must mean the same, and both share the activations.
static void check_same_shape(const Model &m, const Model &against, const Options &o) {
    auto shape = [](const Config &c) { return std::vector<int>{c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab}; };
    if (shape(m.config) != shape(against.config) || m.tokenizer.pieces != against.tokenizer.pieces)
        refuse("--against-model %s: expected the shape and the tokenizer of %s", o.against_model.c_str(), o.model.c_str());
}

void perplexity(const Model &m, const Model *against, const Ops &ops, const Options &o) {
    if (against) check_same_shape(m, *against, o);
    const Protocol p = make_protocol(m, o);
    if (p.context > m.config.max_len) fprintf(stderr, "note: -c %d is beyond the %d positions the model was trained for\n", p.context, m.config.max_len);
    const Figures f = measure(m, against, ops, o, p);
    if (o.json) printf("%s\n", figures_json(f, m, o, p).dump().c_str());
    else print_figures(f, m, o, p);
    if (fflush(stdout) != 0) fail("stdout: cannot write");
    if (o.decode && !(std::fabs(f.difference) <= DECODE_TOLERANCE))
        fail("--decode: decoding and coded prefill differ by %.6f nats a token, at most %g are promised: a bug in one of the two", f.difference, DECODE_TOLERANCE);
}
