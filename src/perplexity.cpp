#include "perplexity.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include "files.h"
#include "report.h"

constexpr int STEP_ROWS = 512;    // rows of a step over all sequences

// -log p(target) under softmax(logits), in f64.
static double nll_of(const float *logits, int V, int target) {
    const double top = *std::max_element(logits, logits + V);
    double sum = 0;
    for (int i = 0; i < V; i++) sum += std::exp(logits[i] - top);
    return top + std::log(sum) - logits[target];
}

struct Window { int64_t begin, end, score_from; };    // tokens of the text

static std::vector<Window> cut_windows(int64_t n, int length, int stride, int max_windows) {
    std::vector<Window> windows;
    for (int64_t begin = 0, scored = 0; scored < n; begin += stride) {
        const int64_t end = std::min(n, begin + length);
        windows.push_back({begin, end, scored});
        scored = end;
        if (max_windows && (int)windows.size() == max_windows) break;
    }
    return windows;
}

void perplexity(const Model &m, const Ops &ops, const Options &o) {
    const Config &c = m.config;
    const std::string text = read_file(o.ppl_file);
    const std::vector<int> ids = tokenizer_encode(m.tokenizer, text, false);
    const int bos = c.bos.empty() ? m.tokenizer.bos : c.bos[0];
    const bool with_bos = o.ppl_bos && bos >= 0;
    const int context = o.context ? o.context : c.max_len, length = context - with_bos;
    const int stride = o.stride ? o.stride : length;
    if (length < 1 + !with_bos) refuse("-c %d: too short to score a token", context);
    if (stride > length) refuse("--stride %d: longer than a window of %d tokens", stride, length);
    if ((int)ids.size() < 1 + !with_bos) fail("%s: %zu tokens, nothing to score", o.ppl_file.c_str(), ids.size());

    const std::vector<Window> windows = cut_windows((int64_t)ids.size(), length, stride, o.max_windows);
    const int B = std::min<int64_t>(o.batch ? o.batch : 4, windows.size());
    const int longest = (int)(windows[0].end - windows[0].begin) + with_bos;
    const int rows_each = o.kv.exact_prefill ? longest : std::max(1, std::min(longest, STEP_ROWS / B)), rows = rows_each * B;
    announce_memory(m, ops, o.kv, B, longest, rows, rows, o.json);
    KvCache cache;
    kv_cache_open(cache, ops, c, o.kv, B, longest);
    Activations a;
    activations_open(a, ops, c, rows, rows);
    std::vector<float> logits((size_t)rows * c.vocab);

    const auto start = std::chrono::steady_clock::now();
    double sum = 0, sum2 = 0;
    int64_t scored = 0, fed = 0;
    Rows step;
    std::vector<int> target;    // of every row that gives logits
    std::vector<double> nll;
    for (size_t w0 = 0; w0 < windows.size(); w0 += B) {
        const int n_slots = (int)std::min<size_t>(B, windows.size() - w0);
        for (int s = 0; s < n_slots; s++) kv_cache_clear(cache, s);
        for (int p0 = 0; p0 < longest; p0 += rows_each) {
            step.clear();
            target.clear();
            for (int s = 0; s < n_slots; s++) {
                const Window &w = windows[w0 + s];
                const int len = (int)(w.end - w.begin) + with_bos, end = std::min(len - 1, p0 + rows_each);    // the last token predicts nothing
                if (end > p0) kv_cache_reserve(cache, s, end);
                for (int p = p0; p < end; p++) {
                    const int64_t next = w.begin + p + 1 - with_bos;
                    step.add(p == 0 && with_bos ? bos : ids[next - 1], s, p, next >= w.score_from);
                    if (next >= w.score_from) target.push_back(ids[next]);
                }
            }
            if (step.token.empty()) break;
            forward(m, cache.view, a, step.batch(), ops);
            fed += step.token.size();
            const int n = (int)target.size();
            ops.download(logits.data(), a.logits, (size_t)n * c.vocab * sizeof(float));
            nll.resize(n);
#pragma omp parallel for
            for (int i = 0; i < n; i++) nll[i] = nll_of(&logits[(size_t)i * c.vocab], c.vocab, target[i]);
            for (int i = 0; i < n; i++) {
                if (!std::isfinite(nll[i])) fail("%s: logits are not numbers: the weights hold NaN or infinity (build/show checks them)", o.model.c_str());
                sum += nll[i], sum2 += nll[i] * nll[i];
            }
            scored += n;
        }
        if (!o.json) fprintf(stderr, "\r%lld of %zu tokens, PPL %.4f ", (long long)scored, ids.size(), std::exp(sum / scored));
    }
    const double s = seconds_since(start);
    if (!o.json) fprintf(stderr, "\n");

    const double mean = sum / scored, variance = std::max(0.0, sum2 / scored - mean * mean);
    const double ppl = std::exp(mean), error = scored > 1 ? ppl * std::sqrt(variance / (scored - 1)) : 0;
    const double bits = (kv_bits(o.kv.k_format, c.head_dim) + kv_bits(o.kv.v_format, c.head_dim)) / 2;
    const std::string kv = std::string(kv_format_name(o.kv.k_format)) + "/" + kv_format_name(o.kv.v_format);
    const char *prefill = o.kv.exact_prefill ? "exact" : "coded";
    if (o.json) {
        const nlohmann::ordered_json j = {{"ppl", ppl}, {"error", error}, {"nll", mean}, {"scored", scored}, {"context", context}, {"stride", stride},
            {"bos", with_bos}, {"windows", windows.size()}, {"prefill", prefill}, {"kv", kv}, {"bits", bits}, {"sink", o.kv.sink}, {"recent", o.kv.recent},
            {"cache_bytes", cache.bytes}, {"tok_s", fed / s}};
        printf("%s\n", j.dump().c_str());
    } else
        printf("Final estimate: PPL = %.4f +/- %.4f | nll %.6f, context %d, stride %d, %lld tokens scored, %s, prefill %s, kv %s, %.4f bits, sink %d, recent %d, cache %lld bytes, %.0f tok/s\n",
               ppl, error, mean, context, stride, (long long)scored, with_bos ? "BOS before each window" : "no BOS", prefill, kv.c_str(), bits,
               o.kv.sink, o.kv.recent, (long long)cache.bytes, fed / s);
    if (fflush(stdout) != 0) fail("stdout: cannot write");
}
