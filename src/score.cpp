#include "score.h"
#include <algorithm>

static double log_sum_exp(const float *x, int V) {
    const double top = *std::max_element(x, x + V);
    double sum = 0;
    for (int i = 0; i < V; i++) sum += std::exp(x[i] - top);
    return top + std::log(sum);
}

Score score_row(const float *logits, const float *against, int V, int token) {
    Score s;
    const double q_log_sum = log_sum_exp(logits, V);
    s.nll = q_log_sum - logits[token];
    if (!against) return s;

    const double p_log_sum = log_sum_exp(against, V);
    s.against_nll = p_log_sum - against[token];
    double kl = 0;
    for (int i = 0; i < V; i++) {
        const double ln_p = against[i] - p_log_sum, ln_q = logits[i] - q_log_sum;
        kl += std::exp(ln_p) * (ln_p - ln_q);
    }
    s.kl = (float)std::max(0.0, kl);    // below 0 only by rounding
    s.same_top = std::max_element(logits, logits + V) - logits == std::max_element(against, against + V) - against;
    return s;
}

Estimate estimate_share(int64_t hits, int64_t n) {
    const double share = (double)hits / n;
    return {share, std::sqrt(share * (1 - share) / n)};
}

double percentile(const std::vector<float> &sorted, double share) {
    const double at = share * (sorted.size() - 1);
    const size_t below = (size_t)at, above = std::min(below + 1, sorted.size() - 1);
    return sorted[below] + (at - below) * ((double)sorted[above] - sorted[below]);
}

Summary summarize(const std::vector<Score> &scores, bool against) {
    Summary f;
    f.n = (int64_t)scores.size();
    if (f.n == 0) return f;
    f.nll = estimate(scores, [](const Score &s) { return s.nll; });
    f.ppl = {std::exp(f.nll.mean), std::exp(f.nll.mean) * f.nll.error};
    if (!against) return f;

    f.against_nll = estimate(scores, [](const Score &s) { return s.against_nll; });
    f.against_ppl = {std::exp(f.against_nll.mean), std::exp(f.against_nll.mean) * f.against_nll.error};
    f.ln_ratio = estimate(scores, [](const Score &s) { return s.nll - s.against_nll; });
    // PPL_q - PPL_p = e^a - e^b, a and b the mean losses over the same tokens.  To first order it moves by e^a da - e^b db,
    // the mean of e^a nll - e^b against_nll over the tokens, so its error is that mean's: what a token costs both cancels.
    // Written as e^a (nll - against_nll) + (e^a - e^b) against_nll, it is 0 when the two are the same.
    const double a = f.ppl.mean, b = f.against_ppl.mean;
    f.delta_ppl = {a - b, estimate(scores, [&](const Score &s) { return a * (s.nll - s.against_nll) + (a - b) * s.against_nll; }).error};

    f.kl = estimate(scores, [](const Score &s) { return s.kl; });
    std::vector<float> kl;
    int64_t same = 0;
    for (const Score &s : scores) kl.push_back(s.kl), same += s.same_top;
    std::sort(kl.begin(), kl.end());
    f.kl_median = percentile(kl, 0.5), f.kl_p99 = percentile(kl, 0.99);
    f.same_top = estimate_share(same, f.n);
    return f;
}

std::vector<Bucket> split_by_position(const std::vector<Score> &scores) {
    std::vector<Bucket> buckets;
    for (const Score &s : scores) {
        size_t i = 0;
        for (int to = 63; s.pos > to; to = 2 * to + 1) i++;
        while (buckets.size() <= i) {
            const int from = buckets.empty() ? 0 : buckets.back().to + 1;
            buckets.push_back({from, from ? 2 * from - 1 : 63, {}});
        }
        buckets[i].scores.push_back(s);
    }
    return buckets;
}

std::vector<Window> cut_windows(int64_t n, int length, int stride, int max_windows) {
    std::vector<Window> windows;
    for (int64_t begin = 0, scored = 0; scored < n; begin += stride) {
        const int64_t end = std::min(n, begin + length);
        windows.push_back({begin, end, scored});
        scored = end;
        if (max_windows && (int)windows.size() == max_windows) break;
    }
    return windows;
}
