// sampler.h - from the logits of one row to the next token.
#pragma once
#include <cstdint>
#include <vector>

struct Sampler {
    float temperature = 0.0f;    // 0: greedy
    int top_k = 0;               // 0: all
    float top_p = 1.0f, min_p = 0.0f;
    uint64_t seed = 0;
    uint64_t drawn = 0;          // tokens drawn so far: draw n of a seed is the same whatever happened before
    std::vector<int> order;      // scratch (V)
    std::vector<float> p;        // scratch (V)
};

// The highest logit, the lowest id among equals.  -1 when a logit is NaN.
int argmax(const float *logits, int V);

// In this order, each on what the one before left over: the top_k most likely; the fewest whose probabilities reach
// top_p; those at least min_p times as likely as the first; then one of them by e^(logit / temperature).
// Temperature 0 is argmax.
int sample(Sampler &s, const float *logits, int V);
