// make_codebook.cpp - trains the four codebooks of the NSN cache formats and writes them as C++ constants.
//
//   nsn1   256 entries of 8 channels, signed         1 bit a value
//   nsn2   256 entries of 8 channels of |x|          2: the encoder stores 8 sign bits beside the index
//   nsn2b  256 entries of 4 channels, signed         2
//   nsn4b  256 entries of 2 channels, signed         4
//
// Grid      A component is (i + 1/2) delta, i an int8: fast kernels multiply the i, and a sign flip is a bitwise NOT.
// Source    Independent N(0,1) channels: what normalised, Hadamard-rotated keys and values look like.
// Training  k-means with noise (stochastic relaxation; Zeger, Vaisey, Gersho 1992): each pass draws fresh samples,
//           gives them to their nearest entries and moves an entry to the mean of its samples plus noise, which dies
//           out quadratically.  It shakes the codebook out of the poor optima where plain k-means stops.  Then the
//           components settle on the grid, a twentieth a pass, while the others still move to make up for rounding.
// nsn1      starts from a pattern, without noise: the 240 shortest vectors of the lattice E8, the best packing of
//           directions in 8 dimensions, and 16 short ones along the axes.  No random start comes near.
//
// Same seed, same bytes: on any machine, with any number of threads, with or without FMA.
//   * A sample is a function of seed, codebook, pass and index, not of the thread that asks for it.
//   * Normal samples come from a table of 32-bit integers, computed and searched in integers (struct Normal).
//   * Coordinates are integers in units of 2^-9.  The search runs in f32, which vectorises everywhere, but each product
//     and each partial sum is an integer below 2^24 (checked): f32 is exact, so neither order nor contraction matters.
//   * Sums over samples, means and noise are integers.  The figures need a root and a quotient, which IEEE 754 rounds
//     correctly; they are summed as integers too.
// Checked on a shortened training: SSE2, AVX2 with -ffast-math, AVX-512 with and without contraction, ASan and UBSan;
// 1 to 7 threads: one file.  The full training takes 88 s of CPU time with AVX-512, 113 s on two busy cores.
//
// Token cosines, before rounding to the grid unless said:
// Tried: plain k-means, 60 passes: nsn1 0.82530, nsn2 0.95239, nsn2b 0.95127, nsn4b 0.99615.
// Tried: nsn1 from a random start with noise, 1,000 passes: 0.82594; from E8 with noise of 0.2: 0.82563.
// Tried: nsn1, the 16 as long as the 240: 0.82794; at random points 0.82843; as rows of +-H 0.82850; axes: 0.82852.
// Tried: nsn1 with E8's symmetry imposed (three trained lengths): on the grid 0.82859 for 0.82856, and 40 more lines.
// Tried: nsn2 from the 256 shortest points of a checkerboard in the orthant 0.95244; from orbits of ten permutation
//        groups 0.95239 at best; 2,000 passes with noise as good as 1,000.
// Tried: nsn2b from two copies of the 600-cell and 16 short vectors 0.95152; 3,000 passes with noise 0.95162.
// Tried: nsn4b rounded to the grid at once: MSE 0.00767; settling 0.00765; no grid 0.00764.
// Tried: delta of 5 and 7 / 256 for nsn2: 0.95251, 0.95265; 5 and 6 / 256 for nsn4b: 0.99565, 0.99620 (on the grid).
// Tried: training on tokens scaled to |x|^2 = 128, as the cache sees them: nsn1 0.82848.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>
#include "command.h"
#include "simd.h"

namespace {

const char *USAGE =
    "usage: make_codebook [-o FILE] [--seed N]\n"
    "\n"
    "  -o FILE    default kernels/nsn_codebook.inc\n"
    "  --seed N   default 1; the same seed gives the same bytes\n";

constexpr int ENTRIES = 256;
constexpr int UNIT = 512;      // coordinates are integers: x = X / UNIT
constexpr int BLOCK = 1024;    // samples drawn and searched together; x[8][BLOCK] stays in the first-level cache
constexpr int TOKEN = 128, FIGURE_TOKENS = 1 << 18;    // the figures: channels of a token, tokens

struct Recipe {
    const char *name, *what;
    bool magnitude, from_e8;    // entries of |x|; start from E8
    int half_delta;             // in units, so delta = half_delta / 256; 127.5 delta must reach the largest entry
    int heat;                   // deviation of the first noise, in units
    int passes, samples[2];     // passes with noise; samples of the first and of the last one
};
constexpr int SETTLE_PASSES = 20, SETTLE_SAMPLES = 1 << 20;

// ---- random numbers -----------------------------------------------------------------------------------------------
// splitmix64: the i-th number of a stream is a hash of key + i * odd, so that any of them can be had at any time.
uint64_t random64(uint64_t key, uint64_t i) {
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
const Normal normal;

template <int D> struct Samples {
    float x[D][BLOCK];    // integers

    void draw(uint64_t key, bool magnitude) {
        for (int j = 0; j < BLOCK; j++)
            for (int c = 0; c < D; c += 2) {
                const uint64_t bits = random64(key, j * (D / 2) + c / 2);
                const int a = normal((uint32_t)bits), b = normal((uint32_t)(bits >> 32));
                x[c][j] = magnitude ? abs(a) : a;
                x[c + 1][j] = magnitude ? abs(b) : b;
            }
    }
    int norm(int j) const {    // |x|^2
        int s = 0;
        for (int c = 0; c < D; c++) s += (int)x[c][j] * (int)x[c][j];
        return s;
    }
    // Scales each run of TOKEN channels to |x|^2 = TOKEN, as the cache does before it looks for codes.
    void normalise() {
        for (int first = 0, n = TOKEN / D; first < BLOCK; first += n) {
            int64_t squares = 0;
            for (int j = first; j < first + n; j++) squares += norm(j);
            const double scale = sqrt((double)TOKEN * UNIT * UNIT / squares);
            for (int j = first; j < first + n; j++)
                for (int c = 0; c < D; c++) x[c][j] = rint(x[c][j] * scale);
        }
    }
};

// ---- nearest entry ------------------------------------------------------------------------------------------------
// A register vn (simd.h) holds NATIVE samples.  Tried: loops over float[16], which gcc 12 leaves scalar: 1,112 ns for a
// sample of 8 channels, not 49.
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
        for (int j = 0; j < BLOCK; j += NATIVE) {
            vn x[D], best = vn{} - 1e30f;
            vni where = {};
            for (int c = 0; c < D; c++) memcpy(&x[c], &s.x[c][j], sizeof(vn));
            for (int k = 0; k < ENTRIES; k++) {
                vn score = vn{} - half_norm[k];
                for (int c = 0; c < D; c++) score += x[c] * entry[k][c];
                const vni better = score > best;
                where = better ? vni{} + k : where;
                best = better ? score : best;
            }
            memcpy(index + j, &where, sizeof where);
        }
    }
};

// ---- training -----------------------------------------------------------------------------------------------------
// What a pass learns about the samples nearest to an entry.  error = sum |x - e|^2
template <int D> struct Cell { int64_t count, error, sum[D]; };

template <int D>
std::vector<Cell<D>> assign(Codebook<D> &book, int64_t samples, uint64_t key, bool magnitude) {
    constexpr int WORDS = sizeof(Cell<D>) / sizeof(int64_t);
    std::vector<Cell<D>> cells(ENTRIES);
    int64_t *sums = &cells[0].count, largest = 0;    // a reduction wants plain numbers: (ENTRIES, WORDS)
    book.update_norms();
    #pragma omp parallel for reduction(+ : sums[:ENTRIES * WORDS]) reduction(max : largest)
    for (int64_t b = 0; b < samples / BLOCK; b++) {
        Samples<D> s;
        int32_t nearest[BLOCK];
        s.draw(random64(key, b), magnitude);
        book.nearest(s, nearest);
        for (int j = 0; j < BLOCK; j++) {
            int64_t *cell = sums + nearest[j] * WORDS;
            cell[0]++;
            for (int c = 0; c < D; c++) {
                const int x = s.x[c][j], e = book.entry[nearest[j]][c];
                cell[1] += (x - e) * (x - e);
                cell[2 + c] += x;
            }
            largest = std::max<int64_t>(largest, s.norm(j));
        }
    }
    // Every partial sum of <x,e> - |e|^2/2 is at most |x| |e| + |e|^2/2: below 2^24 f32 was exact.
    const double bound = sqrt((double)largest * book.largest_norm) + book.largest_norm / 2;
    if (bound >= 1 << 24) fail("a score reached %.0f, beyond the integers of f32; lower UNIT", bound);
    return cells;
}

int64_t divide_round(int64_t a, int64_t b) {
    return a >= 0 ? (a + b / 2) / b : -((-a + b / 2) / b);
}

// x = (2 i + 1) half_delta + rest; the nearest i that an entry can hold.
int grid_index(int x, const Recipe &r) {
    const int i = (x + 128 * 2 * r.half_delta) / (2 * r.half_delta) - 128;    // floor, as x > -128 delta
    return std::min(std::max(i, r.magnitude ? 0 : -128), 127);
}

// (+-a/2)^8 with an even number of minuses, 128; +-a on two axes, 112; +-b on one, 16.  Lengths near the optimum.
void start_e8(Codebook<8> &book) {
    constexpr int a = 880, b = 600;
    int k = 0;
    for (int minus = 0; minus < 256; minus++)
        if (__builtin_popcount(minus) % 2 == 0) {
            for (int c = 0; c < 8; c++) book.entry[k][c] = minus >> c & 1 ? -a / 2 : a / 2;
            k++;
        }
    for (int i = 0; i < 8; i++)
        for (int j = i; j < 8; j++)
            for (int minus = 0; minus < (i == j ? 2 : 4); minus++) {
                for (int c = 0; c < 8; c++) book.entry[k][c] = 0;
                book.entry[k][j] = minus & 2 ? -a : a;
                book.entry[k][i] = (minus & 1 ? -1 : 1) * (i == j ? b : a);
                k++;
            }
}

template <int D> Codebook<D> train(const Recipe &r, uint64_t seed) {
    Codebook<D> book;
    for (int i = 0; i < ENTRIES * D; i++) {
        const int x = normal((uint32_t)random64(random64(seed, 0), i));
        book.entry[i / D][i % D] = r.magnitude ? abs(x) : x;
    }
    if constexpr (D == 8)
        if (r.from_e8) start_e8(book);
    for (int pass = 0; pass < r.passes + SETTLE_PASSES; pass++) {
        const uint64_t key = random64(seed, 1 + pass);
        const int64_t left = std::max(r.passes - pass, 0), settle = pass - r.passes;
        const int64_t samples = left ? r.samples[1] + (r.samples[0] - r.samples[1]) * left / r.passes : SETTLE_SAMPLES;
        const int64_t heat = r.heat * left * left / ((int64_t)r.passes * r.passes);
        const std::vector<Cell<D>> cells = assign(book, samples, random64(key, 0), r.magnitude);
        const Cell<D> &worst = *std::max_element(cells.begin(), cells.end(), [](const Cell<D> &a, const Cell<D> &b) {
            return a.error < b.error;
        });
        for (int k = 0; k < ENTRIES; k++) {
            // An entry that nobody wants moves next to the one with the largest error and takes some of its samples.
            const bool unused = cells[k].count == 0;
            const Cell<D> &from = unused ? worst : cells[k];
            for (int c = 0; c < D; c++) {
                const int turn = random64(seed, ~(uint64_t)(k * D + c)) % SETTLE_PASSES;    // when (k, c) settles
                if (settle > turn) continue;
                const uint64_t bits = random64(key, 1 + k * D + c);
                int x = divide_round(from.sum[c], from.count) + heat * normal((uint32_t)bits) / UNIT;
                if (unused) x += normal((uint32_t)(bits >> 32)) / 16;
                if (r.magnitude) x = abs(x);
                if (settle == turn) x = (2 * grid_index(x, r) + 1) * r.half_delta;
                book.entry[k][c] = x;
            }
        }
    }
    return book;
}

// ---- figures ------------------------------------------------------------------------------------------------------
struct Result {
    const Recipe *recipe;
    int D;
    double cosine, mse;
    std::vector<int8_t> index;    // (ENTRIES, D)
    float delta() const { return recipe->half_delta / 256.0f; }
};

// Mean cosine of token and coded token, mean squared error of a channel, over fresh tokens.
template <int D> void measure(Codebook<D> &book, int tokens, uint64_t key, Result *result) {
    constexpr int PER = TOKEN / D, TOKENS = BLOCK / PER;    // samples a token, tokens a block
    book.update_norms();
    int64_t cosines = 0, errors = 0;
    #pragma omp parallel for reduction(+ : cosines, errors)
    for (int b = 0; b < tokens / TOKENS; b++) {
        Samples<D> s;
        int32_t nearest[BLOCK];
        s.draw(random64(key, b), result->recipe->magnitude);
        s.normalise();
        book.nearest(s, nearest);
        for (int j = 0; j < BLOCK; j += PER) {
            int64_t xx = 0, xq = 0, qq = 0;
            for (int i = j; i < j + PER; i++) {
                xx += s.norm(i);
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
    result->cosine = cosines / (n * (1ll << 40));
    result->mse = errors / (n * TOKEN * UNIT * UNIT);
}

// ---- the file -----------------------------------------------------------------------------------------------------
template <int D> Result make(const Recipe &r, uint64_t seed) {
    const auto begin = std::chrono::steady_clock::now();
    Codebook<D> book = train<D>(r, random64(seed, 0));
    Result result = {&r, D, 0, 0, {}};
    measure(book, FIGURE_TOKENS, random64(seed, 1), &result);

    // Shortest first, then by components: ties of the encoder go to the shorter entry.
    std::array<std::array<int, D + 1>, ENTRIES> rows = {};
    for (int k = 0; k < ENTRIES; k++)
        for (int c = 0; c < D; c++) {
            const int i = rows[k][c + 1] = grid_index((int)book.entry[k][c], r);
            rows[k][0] += (2 * i + 1) * (2 * i + 1);
        }
    std::sort(rows.begin(), rows.end());
    for (const auto &row : rows) result.index.insert(result.index.end(), row.begin() + 1, row.end());

    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    printf("%-6s %d   %.5f   %.5f    %.5f   %6.1f\n", r.name, D, result.cosine, result.mse, result.delta(), seconds);
    fflush(stdout);
    return result;
}

// FNV-1a over the indices and then the four bytes of delta, of one codebook after the other.
uint64_t checksum(const std::vector<Result> &all) {
    uint64_t h = 0xcbf29ce484222325;
    for (const Result &r : all) {
        for (int8_t i : r.index) h = (h ^ (uint8_t)i) * 0x100000001b3;
        for (int byte = 0; byte < 4; byte++) h = (h ^ (f32_to_bits(r.delta()) >> 8 * byte & 255)) * 0x100000001b3;
    }
    return h;
}

std::string source(const std::vector<Result> &all, uint64_t seed) {
    std::string s = strf(
        "// nsn_codebook.inc - the codebooks of the NSN cache formats.  Generated; do not edit.\n//\n"
        "//   build/make_codebook --seed %llu -o kernels/nsn_codebook.inc\n//\n"
        "// Component c of entry k is (index[k][c] + 1/2) delta.  Entries are sorted by length; ties of the encoder go\n"
        "// to the lowest index.  Cosine of token and coded token, and squared error of a channel, over %d normal tokens\n"
        "// of %d channels, scaled to |x|^2 = %d, that training has not seen:\n//\n"
        "//          cosine   MSE      largest  a byte names\n", (unsigned long long)seed, FIGURE_TOKENS, TOKEN, TOKEN);
    for (const Result &r : all) {
        int largest = 0;
        for (int i : r.index) largest = std::max(largest, abs(2 * i + 1));
        s += strf("//   %-6s %.5f  %.5f  %.3f    %s\n", r.recipe->name, r.cosine, r.mse, largest * r.delta() / 2,
                  r.recipe->what);
    }
    s += strf("#pragma once\n#include <cstdint>\n\n// FNV-1a 64 of each codebook's indices and then its delta, in order.\n"
              "inline constexpr uint64_t NSN_CODEBOOK_CHECKSUM = 0x%016llx;\n", (unsigned long long)checksum(all));
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

const Recipe recipes[] = {
    // name    a byte names                                |x|   E8     delta/2  heat  passes  samples a pass
    {"nsn1",  "8 channels, signed",                       false, true,     4,     0,     20,  {1 << 20, 1 << 20}},
    {"nsn2",  "8 channels of |x|; 8 sign bits go with it", true, false,    6,   100,   1000,  {1 << 16, 1 << 18}},
    {"nsn2b", "4 channels, signed",                       false, false,    6,   150,   2000,  {1 << 16, 1 << 18}},
    {"nsn4b", "2 channels, signed",                       false, false,    7,    25,   1000,  {1 << 16, 1 << 18}},
};

void run(Arguments arguments) {
    std::string path = "kernels/nsn_codebook.inc";
    uint64_t seed = 1;
    for (std::string word; arguments.next(&word);) {
        if (word == "-h" || word == "--help") { printf("%s", USAGE); return; }
        else if (word == "-o") path = arguments.value();
        else if (word == "--seed") {
            const std::string digits = arguments.value();
            if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos)
                refuse("--seed %s: expected a whole number below 10^18", digits.c_str());
            seed = std::stoull(digits);
        } else refuse("unknown option '%s' (make_codebook --help lists them)", word.c_str());
    }
    printf("name   D   cosine    MSE        delta     seconds\n");
    const std::vector<Result> all = {make<8>(recipes[0], random64(seed, 0)), make<8>(recipes[1], random64(seed, 1)),
                                     make<4>(recipes[2], random64(seed, 2)), make<2>(recipes[3], random64(seed, 3))};
    const std::string temporary = path + ".tmp";
    std::ofstream file(temporary, std::ios::binary);
    file << source(all, seed);
    file.close();
    if (!file || rename(temporary.c_str(), path.c_str()) != 0) {
        remove(temporary.c_str());
        fail("%s: cannot be written", path.c_str());
    }
    printf("wrote %s, checksum %016llx\n", path.c_str(), (unsigned long long)checksum(all));
}

}  // namespace

int main(int argc, char **argv) { return run_command("make_codebook", argc, argv, run); }
