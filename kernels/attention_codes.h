// attention_codes.h - scores and weighted sums over the codes of a sealed NSN block on the CPU, in exact integers.
//
//   score[m,t]  = (R q_m) . code_t + q_m . RoPE_t(s1[t] mean)          M queries, the 64 tokens of a block
//   o[m,:]     += sum_t p[m,t] code_t,   sum_t p[m,t] s1[t] mean       two halves: the first is still to be turned by R
//
// Codewords are (x + 1/2) delta with an 8-bit x, so they need not be widened to be multiplied.  What meets them is rounded to
// integers: R q to 16 bits of one unit a query, the weights p s1 s2 delta to 16 bits of one unit a query and block.  Sums of
// their products fit 32 bits, so their order does not matter, and these two give the same bits on any machine:
//
//   portable    codewords become rows of 16-bit numbers, a look-up a code; two channels of a key, or two tokens of a channel of values,
//               are multiplied and added at once (pair_products: PMADDWD)
//   avx512      (VBMI and VNNI; d = 64, 128, 256)
//     look up   64 code bytes at once: plane c is byte c of all 256 entries, four registers; a byte permute of each, the last
//               three under a mask.  nsn2: a sign bit flips all bits of x, ~x + 1/2 = -(x + 1/2); signs come into the order of the
//               codes first.
//     keys      codes are dealt out so that a 32-bit lane is four codes of one token; vpdpbusd multiplies their channels c by the
//               query's, a byte at a time, and adds: lanes are tokens and nothing is added across them.  It wants one side
//               unsigned, so x is offset by 128 and 128 sum q is taken off again.
//     values    codes are turned so that a lane is one code position of four tokens: lanes are channels.
//
// Mean of keys: it is turned to the block's token 32 once; with A_j = q_lo m_lo + q_hi m_hi, B_j = q_hi m_lo - q_lo m_hi of pair j
//     q . RoPE_{32+u}(mean) = P(u) + Q(u),  q . RoPE_{32-u}(mean) = P(u) - Q(u),  P = sum_j A_j cos(u f_j), Q = sum_j B_j sin(u f_j)
// so 64 tokens take d/2 x 64 multiply-adds a query, half of what row by row takes.
//
// Error   q to 2^-16 of its largest channel, weights to 2^-17 of the block's largest; everything between is exact.
// Work    64 tokens, d = 128, 4 queries: 1,024 byte permutes to look up, 100 to 300 to arrange codes, 2,048 vpdpbusd and, for
//         means, 1,024 multiply-adds of 16 lanes; fp16 rows take 4,096 of those, 1,024 conversions and 512 turns of keys.
//         A decode step looks keys up while it multiplies; more than 4 queries share codewords that are looked up once.
//         Portable: 64 d / C look-ups for keys and as many for values, 64 d numbers in pair products a query, for values once more.
// Cost    nsn2b, that block: 2.4 us on one core at 2.4 GHz, 5,800 clocks, where fp16 rows take 6.5 us; permutes and multiply-adds
//         need 2,050 on two ports.  Scores of means and all else that makes a score 20%, keys' codes 20%, values' codes 25%, softmax
//         12%, rounding of weights and adding sums 8%, scales 5%.
//         16,384 tokens, 8 query heads over 2, 2 threads of an EPYC, us (f16 with the same flags): portable with AVX2 1,030 (1,510), with
//         AVX-512 but no VBMI 840 (1,110), with SSE2 alone 1,370 (3,180).  10,600, 9,640 and 9,660 when a channel was looked up at a time.
// Limits  d a multiple of 16 from 32 on; other dimensions are widened (attention_tile.h).
//         Tried: AMX tiles for both products (12% slower for 4 queries: 16 rows take as long as 8, and tile loads meet codewords
//         that were just stored), or for values alone (11%).
//         Tried, portable: VPDPWSSD for PMADDWD and an addition (2% with AVX-VNNI, nothing to 8% with AVX-512 VNNI).
//         Tried: codewords in token order, lanes of a token folded afterwards (84 more instructions a query).
//         Tried: loops over sums unrolled by templates, so that GCC 12 copies no sum to another register and back (5% at best, the
//         machine's own noise), and the codebook kept out of registers beside it (nothing).
//
// Sums over values stand plane by plane until codes_in_order(), where avx512 makes them.
// Tested by tests/test_attention_codes.cpp and test_attention.cpp                  Timed by tests/bench_attention.cpp
#pragma once
#include <vector>
#include "kv_block.h"

namespace cpu {

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
constexpr bool HAVE_AVX512_CODES = true;
#else
constexpr bool HAVE_AVX512_CODES = false;
#endif

// M queries R q in 16 bits.
struct CodeQueries {
    std::vector<int16_t> value;           // (M, d), rows a multiple of 32 apart, zeros between them
    std::vector<int8_t> hi, lo;           // (M, d/C/4, C, 4), as far apart: value = 256 hi + lo; channels c of four codes side by side
    std::vector<float> unit;              // (M)
    std::vector<int> sum;                 // (M) of value
};

// A codebook's bytes c side by side.
struct CodePlanes { alignas(64) uint8_t byte[8][256]; };

// What a thread needs; vectors grow to the largest task once.
struct CodeScratch {
    CodeQueries queries;
    std::vector<int> sums;                // (M, KV_BLOCK) scores or (M, d) values
    std::vector<uint8_t> weights;         // (M, 2, KV_BLOCK), high bytes and low bytes
    struct Factors { float unit, half, mean; };
    std::vector<Factors> factors;         // (M) of the weights: their unit, half their sum, sum_t p[t] s1[t]
    std::vector<float> z, mean_score;     // (M, d), (M, KV_BLOCK)
    alignas(64) uint8_t x[2 * KV_BLOCK * MAX_HEAD_DIM];                                  // codewords of a block, arranged; portable: in 16 bits
    alignas(64) uint8_t codes[KV_BLOCK * MAX_HEAD_DIM / 2], signs[KV_BLOCK * MAX_HEAD_DIM / 2];
    alignas(64) uint8_t other[KV_BLOCK * MAX_HEAD_DIM / 2], row_signs[KV_BLOCK * MAX_HEAD_DIM / 8];
};

// Channels a code byte names in the formats and head dimensions that are served here, else 0.
int code_channels(KvFormat format, int d);
float code_delta(KvFormat format);
// The signs of a block (kv_block.h), a byte a code: to (KV_BLOCK, f.d / 8).
void signs_by_code(uint8_t *to, const NsnFields &f);
// The 8-bit codewords of a block, x (KV_BLOCK, f.d), rows `stride` apart; d a multiple of 8.
void codewords(int16_t *x, int stride, KvFormat format, const NsnFields &f);

// Queries q and Rq (M, stride) of a task, for code_scores; what it needs for M queries is made.
void code_queries(CodeScratch &s, const float *Rq, int M, int d, int C, int stride);
// score (M, KV_BLOCK) of keys in block i of a sequence.
void code_scores(float *score, CodeScratch &s, const float *q, int M, int stride, KvFormat format, int d, const uint8_t *block, RopeTable rope, int i);
// o (M, 2, stride) += weights p (M, KV_BLOCK) times values: of the codes, as code_channel() has them, and of the mean.
void code_sums(float *o, CodeScratch &s, const float *p, int M, int stride, KvFormat format, int d, const uint8_t *block);
// To channel order, in place.
void codes_in_order(float *x, int d, int C);

// The integers.  dots[m,t] = sum_c value[m,c] x_t[c];  sums[m,i] = sum_t w[m,t] x_t[c], w (M, 2, KV_BLOCK) in bytes: c is i for
// portable and code_channel(i) for avx512.  Where portable serves d, code_channel(i) is i.
int code_channel(int i, int d, int C);
namespace portable {
void code_dots(int *dots, CodeScratch &s, int M, KvFormat format, const NsnFields &f);
void code_weighted(int *sums, CodeScratch &s, const uint8_t *w, int M, KvFormat format, const NsnFields &f);
}    // namespace portable
namespace avx512 {    // attention_codes_avx512.cpp, where HAVE_AVX512_CODES
void code_dots(int *dots, CodeScratch &s, int M, KvFormat format, const NsnFields &f);
void code_weighted(int *sums, CodeScratch &s, const uint8_t *w, int M, KvFormat format, const NsnFields &f);
}    // namespace avx512
}    // namespace cpu
