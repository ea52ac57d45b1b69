#include "sampler.h"
#include <algorithm>
#include <cmath>

int argmax(const float *logits, int V) {
    int best = 0;
    for (int i = 0; i < V; i++) {
        if (std::isnan(logits[i])) return -1;
        if (logits[i] > logits[best]) best = i;
    }
    return best;
}

// Uniform in [0, 1): bit mixer of splitmix64 (Steele et al., Fast Splittable Pseudorandom Number Generators, 2014).
static double uniform(uint64_t seed, uint64_t n) {
    uint64_t z = seed + (n + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

int sample(Sampler &s, const float *logits, int V) {
    const int best = argmax(logits, V);
    if (s.temperature == 0.0f || best < 0) return best;

    // the candidates, most likely first, ties by id, so that the result does not depend on the sort
    int n = s.top_k > 0 ? std::min(s.top_k, V) : V;
    s.order.resize(V);
    for (int i = 0; i < V; i++) s.order[i] = i;
    auto before = [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    std::partial_sort(s.order.begin(), s.order.begin() + n, s.order.end(), before);

    s.p.resize(V);
    auto weigh = [&](float temperature) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += s.p[i] = std::exp((logits[s.order[i]] - logits[best]) / temperature);
        return sum;
    };
    double sum = weigh(1.0f);
    if (s.top_p < 1.0f) {
        double reached = 0;
        int keep = 0;
        while (keep < n && reached < s.top_p * sum) reached += s.p[keep++];
        n = std::max(keep, 1);
    }
    while (n > 1 && s.p[n - 1] < s.min_p) n--;    // p[0] is 1

    sum = weigh(s.temperature);
    double left = uniform(s.seed, s.drawn++) * sum;
    for (int i = 0; i < n; i++)
        if ((left -= s.p[i]) < 0) return s.order[i];
    return s.order[n - 1];
}
