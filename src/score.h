// score.h - what rows of logits say about a text: losses, divergences, and their statistics.  Arithmetic only.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

// One predicted token, as the cache that is measured (q) and the one it is held against (p) saw it.
struct Score {
    double nll = 0;           // -ln q(token)
    double against_nll = 0;   // -ln p(token)
    float kl = 0;             // KL(p || q) = sum over the vocabulary of p (ln p - ln q)
    bool same_top = true;     // p and q have the same likeliest token
    int pos = 0;              // position of the row that predicts: pos + 1 tokens are in the cache
};

// Rows of logits (V), softmax in f64; without `against` only nll is set.
Score score_row(const float *logits, const float *against, int V, int token);

// A mean and its standard error: sqrt(sum (x - mean)^2 / (n (n - 1))), 0 for n = 1.  Tokens count as independent, as in
// every tool that prints PPL +/- something.
struct Estimate { double mean = 0, error = 0; };
template <class Value> Estimate estimate(const std::vector<Score> &scores, Value value) {
    Estimate e;
    const double n = (double)scores.size();
    for (const Score &s : scores) e.mean += value(s);
    e.mean /= n;
    double squares = 0;
    for (const Score &s : scores) squares += (value(s) - e.mean) * (value(s) - e.mean);
    if (n > 1) e.error = std::sqrt(squares / (n * (n - 1)));
    return e;
}

// A share of n trials, with the standard error of a binomial: sqrt(share (1 - share) / n).
Estimate estimate_share(int64_t hits, int64_t n);

// The value below which `share` of the sorted values lie: straight lines between x[0] at 0, x[1] at 1/(n-1), ..., x[n-1] at
// 1, which is what numpy.percentile and llama.cpp compute.
double percentile(const std::vector<float> &sorted, double share);

// All of a text's scores in a few figures; those with p are 0 unless there is one.
struct Summary {
    int64_t n = 0;
    Estimate nll, against_nll;
    Estimate ppl, against_ppl;        // e^nll, error to first order: e^nll times the error of nll
    Estimate kl;
    double kl_median = 0, kl_p99 = 0;
    Estimate ln_ratio;                // ln (PPL_q / PPL_p): the mean of nll - against_nll, token by token
    Estimate delta_ppl;               // PPL_q - PPL_p
    Estimate same_top;
};
Summary summarize(const std::vector<Score> &scores, bool against);

// Scores by position in the window: 0-63 (where no row reads a code), 64-127, 128-255, ... doubling.
struct Bucket { int from, to; std::vector<Score> scores; };
std::vector<Bucket> split_by_position(const std::vector<Score> &scores);

// Tokens [begin, end) of a text, of which those from score_from on are scored.
struct Window { int64_t begin, end, score_from; };

// Windows of `length` tokens, each `stride` after the one before, the last one shorter, until every token is in one; each
// scores what no window before it has scored.  max_windows 0: all.
std::vector<Window> cut_windows(int64_t n, int length, int stride, int max_windows);
