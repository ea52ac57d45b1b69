// The committed codebooks: the bytes the generator wrote, the order and signs the kernels rely on, and what they are
// for: how well they code normal tokens, drawn by another generator and in another arithmetic than in training.
#include <doctest/doctest.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>
#include "nsn_codebook.inc"

namespace {

struct Book {
    std::string name;
    int D;
    bool magnitude;                  // entries of |x|, signs apart
    float delta;
    const int8_t *index;             // (256, D)
    double min_cosine, max_mse;      // the gates
};
const Book books[] = {
    {"nsn1", 8, false, NSN1_DELTA, &NSN1_INDEX[0][0], 0.8246, 0.3206},
    {"nsn2", 8, true, NSN2_DELTA, &NSN2_INDEX[0][0], 0.9521, 0.0941},
    {"nsn2b", 4, false, NSN2B_DELTA, &NSN2B_INDEX[0][0], 0.9511, 0.0958},
    {"nsn4b", 2, false, NSN4B_DELTA, &NSN4B_INDEX[0][0], 0.9961, 0.0078},
};

double value(const Book &b, int k, int c) { return (b.index[k * b.D + c] + 0.5) * b.delta; }

}  // namespace

TEST_CASE("codebook: the committed bytes are those the generator wrote") {
    uint64_t h = 14695981039346656037u;
    const auto eat = [&](const void *p, size_t n) {
        for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)p)[i]) * 1099511628211u;
    };
    for (const Book &b : books) {
        eat(b.index, 256 * b.D);
        eat(&b.delta, 4);    // little-endian, as everywhere in this program
    }
    CHECK(h == NSN_CODEBOOK_CHECKSUM);
    static_assert(sizeof NSN1_INDEX == 256 * 8 && sizeof NSN2_INDEX == 256 * 8, "(256, D) int8");
    static_assert(sizeof NSN2B_INDEX == 256 * 4 && sizeof NSN4B_INDEX == 256 * 2, "(256, D) int8");
}

TEST_CASE("codebook: grid, order, signs") {
    for (const Book &b : books) {
        CAPTURE(b.name);
        // delta is a small multiple of 2^-8, so (i + 1/2) delta is exact in f32, in bf16 products and in f16 (11 bits).
        CHECK(b.delta * 256 == std::floor(b.delta * 256));
        std::set<std::string> seen;
        double previous = 0;
        for (int k = 0; k < 256; k++) {
            CAPTURE(k);
            CHECK(seen.insert(std::string((const char *)b.index + k * b.D, b.D)).second);
            double norm = 0;
            for (int c = 0; c < b.D; c++) {
                norm += value(b, k, c) * value(b, k, c);
                if (b.magnitude) CHECK(b.index[k * b.D + c] >= 0);
            }
            CHECK(norm >= previous);    // shortest first
            previous = norm;
        }
    }
}

// A token's cosine has a standard deviation of 0.0119, 0.0044, 0.0050 and 0.0006, the mean of 8,192 one 90 times
// smaller.  The margins to the gates are 30, 12, 9 and 17 of those: a failure is not chance.
TEST_CASE("codebook: cosine and squared error on fresh normal tokens") {
    constexpr int TOKENS = 8192, d = 128;
    std::mt19937_64 random(20250518);
    std::normal_distribution<double> normal;
    for (const Book &b : books) {
        CAPTURE(b.name);
        std::vector<double> entry(256 * b.D), half_norm(256, 0.0);
        for (int k = 0; k < 256; k++)
            for (int c = 0; c < b.D; c++) {
                entry[k * b.D + c] = value(b, k, c);
                half_norm[k] += value(b, k, c) * value(b, k, c) / 2;
            }
        double cosines = 0, errors = 0;
        std::vector<int> used(256, 0);
        for (int t = 0; t < TOKENS; t++) {
            double x[d], squares = 0;
            for (double &v : x) { v = normal(random); squares += v * v; }
            for (double &v : x) v *= std::sqrt(d / squares);
            double xq = 0, qq = 0;
            for (int c = 0; c < d; c += b.D) {
                double best = -1e30;
                int nearest = 0;
                for (int k = 0; k < 256; k++) {
                    const double *e = &entry[k * b.D];
                    double score = -half_norm[k];
                    for (int i = 0; i < b.D; i++) score += (b.magnitude ? std::fabs(x[c + i]) : x[c + i]) * e[i];
                    if (score > best) { best = score; nearest = k; }
                }
                used[nearest]++;
                xq += best + half_norm[nearest];
                qq += 2 * half_norm[nearest];
            }
            cosines += xq / std::sqrt(d * qq);
            errors += (d - 2 * xq + qq) / d;
        }
        CAPTURE(cosines / TOKENS);
        CAPTURE(errors / TOKENS);
        CHECK(cosines / TOKENS >= b.min_cosine);
        CHECK(errors / TOKENS <= b.max_mse);
        CHECK(*std::min_element(used.begin(), used.end()) > 0);
    }
}
