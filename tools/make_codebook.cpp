// make_codebook - trains the four NSN codebooks and writes them as C++ constants.
//
//   make_codebook [-o kernels/nsn_codebook.inc] [--seed N]
//
//   name    entries  of                          bits a value
//   nsn1    256      8 channels, signed          1
//   nsn2    256      8 channels of |x|, + signs  2      all entries positive; the encoder stores 8 sign bits
//   nsn2b   256      4 channels, signed          2
//   nsn4b   256      2 channels, signed          4
//
// Grid     A component is (i + 1/2) delta with i an int8: a sign flip is then a bitwise NOT (decode_attention.cu).
// Source   Independent N(0,1) channels: what normalised, Hadamard-rotated keys and values look like.
// Training Each pass draws fresh samples, gives them to their nearest entries and moves an entry to the mean of its
//          samples plus noise.  The noise starts large and dies out (stochastic relaxation, Zeger, Vaisey, Gersho 1992): it
//          shakes the codebook out of the poor local optima in which plain k-means ends.  In the last passes the components
//          are rounded to the grid a few at a time and stay there, so that their neighbours can adapt.
// nsn1     starts at a known structure instead and needs no noise: the 240 shortest vectors of the lattice E8, the best
//          packing of directions in 8 dimensions, and 16 short vectors on the axes that fill the middle.
//
// Same seed, same bytes, on any machine, with any number of threads, with or without FMA or -ffast-math:
//   * a sample is a function of (seed, codebook, pass, index), not of the order in which threads ask for it;
//   * normal samples come from a table of 31-bit integers, computed and searched with integers (struct Normal);
//   * coordinates are integers in units of 2^-9.  The search for the nearest entry runs in f32 because that vectorises
//     everywhere, but each product and each partial sum is an integer below 2^24 (checked), so f32 is exact and neither
//     order nor contraction can matter;
//   * sums over samples, means and noise are int64.  Floating point appears only in the printed figures.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <string>
#include <vector>
#include "base.h"

constexpr int ENTRIES = 256;
constexpr int UNIT = 512;      // coordinates are integers: x = X / UNIT
constexpr int BLOCK = 1024;    // samples drawn and searched together; x[8][BLOCK] stays in the first-level cache
constexpr int TOKEN = 128;     // channels of a token when the figures are measured

struct Recipe {
    const char *name, *what;
    bool magnitude;             // entries of |x|
    bool from_e8;
    int half_delta;             // delta / 2 in units; delta = half_delta / 256 must let 127.5 delta reach the largest entry
    int heat;                   // noise of the first pass, in units
    int passes, samples[2];     // annealing: passes, samples a pass at the start and at the end
    int settling;               // then passes that move the components to the grid, SETTLE_SAMPLES each
};
constexpr int SETTLE_SAMPLES = 1 << 20;

// ---- random numbers --------------------------------------------------------------------------------------------------
// splitmix64: the i-th number of a stream is a hash of key + i * odd, so that any of them can be had at any time.
static uint64_t random64(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

// The normal distribution on the integers, P(X = j) ~ exp(-j^2 / (2 UNIT^2)): mean, variance and all that matters here
// agree with N(0, UNIT^2) to far below a part in 10^15 (Poisson summation: the error is exp(-2 pi^2 UNIT^2)).
// edge[j] = 2^31 P(|X| <= j) inverts it.  Weights follow w[j+1] = w[j] r[j], r[j+1] = r[j] q in 64-bit fixed point with
// r[0] = exp(-2^-19), q = exp(-2^-18), given by their power series.
struct Normal {
    std::vector<uint32_t> edge;
    std::array<uint16_t, 4096> first;    // by the upper 12 bits of v: the lowest j that can have edge[j] > v

    Normal() {
        static_assert(UNIT == 512, "r and q are those of 512");
        __extension__ typedef unsigned __int128 u128;
        const uint64_t q = -(1ull << 46) + (1ull << 27) - 171;    // 2^64 (1 - a + a^2/2 - a^3/6), a = 2^-18
        uint64_t r = -(1ull << 45) + (1ull << 25) - 21, w = 1ull << 52, total = 0;
        std::vector<uint64_t> sum;                                 // of the weights of |X| <= j
        for (int j = 0; j < 7 * UNIT; j++) {
            total += j == 0 ? w : 2 * w;
            sum.push_back(total);
            w = (u128)w * r >> 64;
            r = (u128)r * q >> 64;
        }
        for (uint64_t s : sum) edge.push_back(((u128)s << 31) / total);
        for (uint32_t i = 0, j = 0; i < first.size(); i++) {
            while (edge[j] <= i << 19) j++;
            first[i] = j;
        }
    }
    int operator()(uint32_t bits) const {
        const uint32_t v = bits >> 1;
        int j = first[v >> 19];
        while (edge[j] <= v) j++;
        return bits & 1 ? -j : j;
    }
};
static const Normal normal;

template <int D> struct Samples {
    float x[D][BLOCK];       // integers
    int32_t norm[BLOCK];     // |x|^2

    void draw(uint64_t key, bool magnitude) {
        for (int j = 0; j < BLOCK; j++) {
            norm[j] = 0;
            for (int c = 0; c < D; c += 2) {
                const uint64_t bits = random64(key, j * (D / 2) + c / 2);
                const int a = normal((uint32_t)bits), b = normal((uint32_t)(bits >> 32));
                x[c][j] = magnitude ? abs(a) : a;
                x[c + 1][j] = magnitude ? abs(b) : b;
                norm[j] += a * a + b * b;
            }
        }
    }
    // Scale each run of TOKEN channels to |x|^2 = TOKEN, as the cache does before it looks for codes.
    void normalise() {
        constexpr int PER = TOKEN / D;
        for (int j = 0; j < BLOCK; j += PER) {
            int64_t squares = 0;
            for (int i = j; i < j + PER; i++) squares += norm[i];
            const double scale = sqrt((double)TOKEN * UNIT * UNIT / squares);
            for (int i = j; i < j + PER; i++) {
                norm[i] = 0;
                for (int c = 0; c < D; c++) {
                    x[c][i] = rint(x[c][i] * scale);
                    norm[i] += (int)x[c][i] * (int)x[c][i];
                }
            }
        }
    }
};

// ---- nearest entry ---------------------------------------------------------------------------------------------------
// One machine register of samples.  (Tried: plain loops over float[16], which gcc 12 leaves scalar: 1,112 ns a sample of 8
// channels against 64; a 16-lane vector type without AVX-512: 926 ns.)
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));

template <int D> struct Codebook {
    float entry[ENTRIES][D];    // integers
    float half_norm[ENTRIES];   // floor(|entry|^2 / 2)
    int64_t largest_norm;       // of |entry|^2

    void update_norms() {
        largest_norm = 0;
        for (int k = 0; k < ENTRIES; k++) {
            int64_t s = 0;
            for (int c = 0; c < D; c++) s += (int64_t)entry[k][c] * (int64_t)entry[k][c];
            half_norm[k] = s / 2;
            largest_norm = std::max(largest_norm, s);
        }
    }
    // argmin |x - e|^2 = argmax <x,e> - |e|^2/2; ties go to the lowest index.
    void nearest(const Samples<D> &s, int32_t *index) const {
        for (int j = 0; j < BLOCK; j += LANES) {
            vec x[D], best = vec{} - 1e30f;
            ivec where = {};
            for (int c = 0; c < D; c++) memcpy(&x[c], &s.x[c][j], sizeof(vec));
            for (int k = 0; k < ENTRIES; k++) {
                vec score = vec{} - half_norm[k];
                for (int c = 0; c < D; c++) score += x[c] * entry[k][c];
                const ivec better = score > best;
                where = better ? ivec{} + k : where;
                best = better ? score : best;
            }
            memcpy(index + j, &where, sizeof where);
        }
    }
};

// ---- training --------------------------------------------------------------------------------------------------------
template <int D> struct Moments {
    int64_t count[ENTRIES], error[ENTRIES], sum[ENTRIES][D];    // of the samples nearest to an entry; error = sum |x - e|^2
    int64_t largest_norm;                                       // of |x|^2
};

// Draw `samples` fresh samples and give each to its nearest entry.
template <int D> static Moments<D> assign(Codebook<D> &book, int64_t samples, uint64_t key, bool magnitude) {
    book.update_norms();
    Moments<D> all = {};
    #pragma omp parallel
    {
        Moments<D> mine = {};
        Samples<D> s;
        int32_t nearest[BLOCK];
        #pragma omp for
        for (int64_t b = 0; b < samples / BLOCK; b++) {
            s.draw(random64(key, b), magnitude);
            book.nearest(s, nearest);
            for (int j = 0; j < BLOCK; j++) {
                const int k = nearest[j];
                int32_t dot = 0, norm = 0;
                for (int c = 0; c < D; c++) {
                    const int x = s.x[c][j], e = book.entry[k][c];
                    dot += x * e;
                    norm += e * e;
                    mine.sum[k][c] += x;
                }
                mine.count[k]++;
                mine.error[k] += s.norm[j] - 2 * dot + norm;
                mine.largest_norm = std::max<int64_t>(mine.largest_norm, s.norm[j]);
            }
        }
        #pragma omp critical
        {
            for (int k = 0; k < ENTRIES; k++) {
                all.count[k] += mine.count[k];
                all.error[k] += mine.error[k];
                for (int c = 0; c < D; c++) all.sum[k][c] += mine.sum[k][c];
            }
            all.largest_norm = std::max(all.largest_norm, mine.largest_norm);
        }
    }
    // |every partial sum of <x,e> - |e|^2/2| <= |x| |e| + |e|^2/2: below 2^24 f32 was exact.
    const double bound = sqrt((double)all.largest_norm * book.largest_norm) + book.largest_norm / 2;
    if (bound >= 1 << 24) fail("make_codebook: a score reached %.0f, beyond the integers of f32; lower UNIT", bound);
    return all;
}

static int64_t divide_round(int64_t a, int64_t b) {
    return a >= 0 ? (a + b / 2) / b : -((-a + b / 2) / b);
}

// x = (2 i + 1) half_delta + rest; the nearest i that an entry can hold.
static int grid_index(int x, const Recipe &r) {
    const int i = (x + 128 * 2 * r.half_delta) / (2 * r.half_delta) - 128;    // floor, as x > -128 delta
    return std::min(std::max(i, r.magnitude ? 0 : -128), 127);
}

// The 240 shortest vectors of E8 and 16 short ones; 1.68, 0.84 and 1.17 are where training puts them, to 2%.
static void start_e8(Codebook<8> &book) {
    constexpr int a = 860, inner = 600;
    int k = 0;
    for (int minus = 0; minus < 256; minus++)    // (+-a/2)^8 with an even number of minuses: 128
        if (__builtin_popcount(minus) % 2 == 0) {
            for (int c = 0; c < 8; c++) book.entry[k][c] = minus >> c & 1 ? -a / 2 : a / 2;
            k++;
        }
    for (int i = 0; i < 8; i++)                  // +-a on two axes: 112; +-inner on one: 16
        for (int j = i; j < 8; j++)
            for (int minus = 0; minus < (i == j ? 2 : 4); minus++) {
                for (int c = 0; c < 8; c++) book.entry[k][c] = 0;
                book.entry[k][j] = minus & 2 ? -a : a;
                book.entry[k][i] = (minus & 1 ? -1 : 1) * (i == j ? inner : a);
                k++;
            }
}

template <int D> static Codebook<D> train(const Recipe &r, uint64_t seed) {
    Codebook<D> book;
    for (int i = 0; i < ENTRIES * D; i++) {
        const int x = normal((uint32_t)random64(random64(seed, 0), i));
        book.entry[i / D][i % D] = r.magnitude ? abs(x) : x;
    }
    if constexpr (D == 8)
        if (r.from_e8) start_e8(book);
    for (int pass = 0; pass < r.passes + r.settling; pass++) {
        const uint64_t key = random64(seed, 1 + pass);
        const int64_t left = std::max(r.passes - pass, 0), settle = pass - r.passes;
        const int64_t samples = left ? r.samples[1] + (r.samples[0] - r.samples[1]) * left / r.passes : SETTLE_SAMPLES;
        const int64_t heat = r.heat * left * left / ((int64_t)r.passes * r.passes);
        const Moments<D> m = assign(book, samples, random64(key, 0), r.magnitude);
        const int worst = std::max_element(m.error, m.error + ENTRIES) - m.error;
        for (int k = 0; k < ENTRIES; k++) {
            // An entry that nobody wants moves next to the one with the largest error and takes half of its samples.
            const int from = m.count[k] ? k : worst;
            for (int c = 0; c < D; c++) {
                const uint64_t bits = random64(key, 1 + k * D + c);
                // Component (k, c) goes to the grid in settling pass `bits of its own` and stays.
                const int turn = random64(seed, ~(uint64_t)(k * D + c)) % std::max(r.settling, 1);
                if (settle > turn) continue;
                int x = divide_round(m.sum[from][c], m.count[from]) + heat * normal((uint32_t)bits) / UNIT;
                if (from != k) x += normal((uint32_t)(bits >> 32)) / 16;
                if (r.magnitude) x = abs(x);
                if (settle == turn) x = (2 * grid_index(x, r) + 1) * r.half_delta;
                book.entry[k][c] = x;
            }
        }
    }
    return book;
}

// ---- figures ---------------------------------------------------------------------------------------------------------
struct Figures { double cosine, mse; };

// Mean cosine of token and coded token, mean squared error of a channel, over fresh tokens.  Each cosine is one division
// and one root of integers, correctly rounded by IEEE 754, and is summed as an integer: the printed digits are exact too.
template <int D> static Figures measure(Codebook<D> &book, int tokens, uint64_t key, bool magnitude) {
    constexpr int PER = TOKEN / D, TOKENS = BLOCK / PER;    // samples a token, tokens a block
    book.update_norms();
    int64_t cosines = 0, errors = 0;
    #pragma omp parallel for reduction(+ : cosines, errors)
    for (int b = 0; b < tokens / TOKENS; b++) {
        Samples<D> s;
        int32_t nearest[BLOCK];
        s.draw(random64(key, b), magnitude);
        s.normalise();
        book.nearest(s, nearest);
        for (int j = 0; j < BLOCK; j += PER) {
            int64_t xx = 0, xq = 0, qq = 0;
            for (int i = j; i < j + PER; i++) {
                xx += s.norm[i];
                for (int c = 0; c < D; c++) {
                    const int64_t x = s.x[c][i], q = book.entry[nearest[i]][c];
                    xq += x * q;
                    qq += q * q;
                }
            }
            cosines += (int64_t)(xq / (sqrt((double)xx) * sqrt((double)qq)) * (1ll << 40));
            errors += xx - 2 * xq + qq;
        }
    }
    const double n = tokens / TOKENS * TOKENS;
    return {cosines / (n * (1ll << 40)), errors / (n * TOKEN * UNIT * UNIT)};
}

// ---- the file --------------------------------------------------------------------------------------------------------
struct Result {
    const Recipe *recipe;
    int D;
    std::vector<int8_t> index;    // (ENTRIES, D)
    Figures figures;
    float delta() const { return recipe->half_delta / 256.0f; }
};

template <int D> static Result make(const Recipe &r, uint64_t seed) {
    const auto begin = std::chrono::steady_clock::now();
    Codebook<D> book = train<D>(r, random64(seed, 0));
    const Figures f = measure(book, 1 << 18, random64(seed, 1), r.magnitude);

    // Shortest first, then by components: ties of the encoder go to the shorter entry.
    std::array<std::array<int, D + 1>, ENTRIES> rows;
    for (int k = 0; k < ENTRIES; k++) {
        rows[k][0] = 0;
        for (int c = 0; c < D; c++) {
            rows[k][c + 1] = grid_index((int)book.entry[k][c], r);
            rows[k][0] += (2 * rows[k][c + 1] + 1) * (2 * rows[k][c + 1] + 1);
        }
    }
    std::sort(rows.begin(), rows.end());
    Result result = {&r, D, {}, f};
    for (const auto &row : rows) result.index.insert(result.index.end(), row.begin() + 1, row.end());

    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    printf("%-6s %d  %8.5f  %8.5f  %9.5f  %6.1f\n", r.name, D, f.cosine, f.mse, result.delta(), seconds);
    fflush(stdout);
    return result;
}

// FNV-1a over the indices and then the four bytes of delta, of one codebook after the other.
static uint64_t checksum(const std::vector<Result> &all) {
    uint64_t h = 0xcbf29ce484222325;
    for (const Result &r : all) {
        for (int8_t i : r.index) h = (h ^ (uint8_t)i) * 0x100000001b3;
        for (int byte = 0; byte < 4; byte++) h = (h ^ (f32_to_bits(r.delta()) >> 8 * byte & 255)) * 0x100000001b3;
    }
    return h;
}

static std::string source(const std::vector<Result> &all, uint64_t seed) {
    std::string s =
        "// nsn_codebook.inc - the codebooks of the NSN cache formats.  Generated; do not edit.\n"
        "//\n";
    s += strf("//   make_codebook --seed %llu -o kernels/nsn_codebook.inc\n//\n", (unsigned long long)seed);
    s += "// Component c of entry k is (index[k][c] + 1/2) delta.  Entries are sorted by length; ties of the encoder go to the\n"
         "// lowest index.  Cosine of token and coded token, and squared error of a channel, over 262,144 fresh normal tokens of\n"
         "// 128 channels, scaled to |x|^2 = 128:\n//\n"
         "//          cosine   MSE      largest  a byte names\n";
    for (const Result &r : all) {
        int largest = 0;
        for (int i : r.index) largest = std::max(largest, abs(2 * i + 1));
        s += strf("//   %-6s %.5f  %.5f  %.3f    %s\n", r.recipe->name, r.figures.cosine, r.figures.mse, largest * r.delta() / 2, r.recipe->what);
    }
    s += "#pragma once\n#include <cstdint>\n\n";
    s += strf("inline constexpr uint64_t NSN_CODEBOOK_CHECKSUM = 0x%016llx;    // FNV-1a of indices and deltas, in this order\n",
              (unsigned long long)checksum(all));
    for (const Result &r : all) {
        std::string upper = r.recipe->name;
        for (char &c : upper) c = c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c;
        s += strf("\ninline constexpr float %s_DELTA = %d / 256.0f;\n", upper.c_str(), r.recipe->half_delta);
        s += strf("alignas(16) inline constexpr int8_t %s_INDEX[256][%d] = {\n", upper.c_str(), r.D);
        const int per_line = 16 / r.D;
        for (int k = 0; k < ENTRIES; k++) {
            s += k % per_line ? " {" : "    {";
            for (int c = 0; c < r.D; c++) s += strf("%s%d", c ? "," : "", r.index[k * r.D + c]);
            s += k % per_line == per_line - 1 ? "},\n" : "},";
        }
        s += "};\n";
    }
    return s;
}

static const Recipe recipes[] = {
    //name     what                                             |x|    E8    delta/2 heat  passes  samples a pass   settling
    {"nsn1",  "8 channels, signed",                            false, true,  4,       0,   20, {1 << 20, 1 << 20}, 20},
    {"nsn2",  "8 channels of |x|; 8 sign bits go with it",      true,  false, 6,     100, 1000, {1 << 16, 1 << 18}, 20},
    {"nsn2b", "4 channels, signed",                            false, false, 6,     150, 2000, {1 << 16, 1 << 18}, 20},
    {"nsn4b", "2 channels, signed",                            false, false, 7,      25, 1000, {1 << 16, 1 << 18}, 20},
};

static int run(int argc, char **argv) {
    std::string path = "kernels/nsn_codebook.inc";
    uint64_t seed = 1;
    for (int i = 1; i < argc; i++) {
        const std::string option = argv[i];
        if (i + 1 == argc || (option != "-o" && option != "--seed"))
            refuse("make_codebook: '%s' is not understood; usage: make_codebook [-o FILE] [--seed N]", argv[i]);
        if (option == "-o") path = argv[++i];
        else {
            char *end;
            seed = strtoull(argv[++i], &end, 10);
            if (end == argv[i] || *end) refuse("make_codebook: --seed %s: expected a number", argv[i]);
        }
    }
    printf("name   D    cosine       MSE      delta   seconds\n");
    const std::vector<Result> all = {make<8>(recipes[0], random64(seed, 0)), make<8>(recipes[1], random64(seed, 1)),
                                     make<4>(recipes[2], random64(seed, 2)), make<2>(recipes[3], random64(seed, 3))};
    const std::string text = source(all, seed), temporary = path + ".tmp";
    FILE *f = fopen(temporary.c_str(), "wb");
    if (!f) fail("%s: cannot be opened for writing", temporary.c_str());
    const bool written = fwrite(text.data(), 1, text.size(), f) == text.size();
    if (fclose(f) != 0 || !written || rename(temporary.c_str(), path.c_str()) != 0) {
        remove(temporary.c_str());
        fail("%s: cannot be written", path.c_str());
    }
    printf("wrote %s, checksum %016llx\n", path.c_str(), (unsigned long long)checksum(all));
    return 0;
}

int main(int argc, char **argv) {
    try {
        return run(argc, argv);
    } catch (const Error &e) {
        fprintf(stderr, "%s\n", e.what());
        return e.exit_code;
    }
}
