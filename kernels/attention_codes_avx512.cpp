// attention_codes_avx512.cpp - the integer kernels of attention_codes.h with VBMI and VNNI.
#include <algorithm>
#include "attention_codes.h"
#include "simd.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
namespace cpu {
namespace avx512 {

// Bytes k of the codebook, for keys with 128 added.
static const CodePlanes &planes_of(KvFormat format, bool offset) {
    auto make = [](KvFormat f, int C, uint8_t flip) {
        CodePlanes p{};
        for (int k = 0; k < 256; k++)
            for (int c = 0; c < C; c++) p.byte[c][k] = (uint8_t)kv_codebook(f)[k * C + c] ^ flip;
        return p;
    };
    static const CodePlanes planes[4][2] = {{make(KvFormat::nsn1, 8, 0), make(KvFormat::nsn1, 8, 0x80)},
                                            {make(KvFormat::nsn2, 8, 0), make(KvFormat::nsn2, 8, 0x80)},
                                            {make(KvFormat::nsn2b, 4, 0), make(KvFormat::nsn2b, 4, 0x80)},
                                            {make(KvFormat::nsn4b, 2, 0), make(KvFormat::nsn4b, 2, 0x80)}};
    return planes[(int)format - (int)KvFormat::nsn1][offset];
}

// 64 codes: where they are in the second, third and fourth quarter of the codebook.
struct Codes {
    __m512i code;
    __mmask64 second, third, fourth;
};
LANE_FUNCTION Codes load_codes(const uint8_t *p) {
    const __m512i code = _mm512_load_si512(p);
    const __mmask64 upper = _mm512_movepi8_mask(code), odd = _mm512_test_epi8_mask(code, _mm512_set1_epi8(64));
    return {code, _kandn_mask64(upper, odd), _kandn_mask64(odd, upper), _kand_mask64(upper, odd)};
}
// Their channel c; bit c of a sign flips it.
template <bool SIGN> LANE_FUNCTION __m512i look_up(const Codes &k, const CodePlanes &planes, int c, const uint8_t *sign) {
    const __m512i *plane = (const __m512i *)planes.byte[c];
    __m512i x = _mm512_permutexvar_epi8(k.code, plane[0]);
    x = _mm512_mask_permutexvar_epi8(x, k.second, k.code, plane[1]);
    x = _mm512_mask_permutexvar_epi8(x, k.third, k.code, plane[2]);
    x = _mm512_mask_permutexvar_epi8(x, k.fourth, k.code, plane[3]);
    if (!SIGN) return x;
    const __mmask64 flip = _mm512_test_epi8_mask(_mm512_load_si512(sign), _mm512_set1_epi8((char)(1 << c)));
    return _mm512_mask_sub_epi8(x, flip, _mm512_set1_epi8(-1), x);    // -1 - x = ~x
}
// Channels 0..C-1 of n registers of codes: those of register r to to + r / inner * C * inner * 64 + r % inner * 64, inner * 64 apart.
template <int C, bool SIGN> static void look_up_all(uint8_t *to, const uint8_t *code, const uint8_t *sign, const CodePlanes &planes, int n, int inner) {
    for (int r = 0; r < n; r++) {
        const Codes k = load_codes(code + r * 64);
        uint8_t *y = to + (r / inner * C * inner + r % inner) * 64;
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) _mm512_store_si512(y + c * inner * 64, look_up<SIGN>(k, planes, c, sign + r * 64));
    }
}
static void look_up_block(CodeScratch &s, const CodePlanes &planes, const NsnFields &f, int inner) {
    const int n = f.d / f.channels;    // registers: 64 tokens of n codes
    if (f.sign) look_up_all<8, true>(s.x, s.codes, s.signs, planes, n, inner);
    else if (f.channels == 8) look_up_all<8, false>(s.x, s.codes, s.signs, planes, n, inner);
    else if (f.channels == 4) look_up_all<4, false>(s.x, s.codes, s.signs, planes, n, inner);
    else look_up_all<2, false>(s.x, s.codes, s.signs, planes, n, inner);
}

// Codes (KV_BLOCK, W, 4) to (W, KV_BLOCK, 4): the even lanes of the whole, then the odd ones, log2 W times.
static void deal(uint8_t *to, uint8_t *other, const uint8_t *from, int W) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    const int registers = 4 * W, stages = __builtin_ctz(W);
    if (!stages) memcpy(to, from, registers * 64);
    for (int stage = stages; stage > 0; stage--) {
        uint8_t *y = stage % 2 ? to : other;    // the last is stage 1
        for (int r = 0; r < registers / 2; r++) {
            const __m512i a = _mm512_loadu_si512(from + r * 128), b = _mm512_loadu_si512(from + r * 128 + 64);
            _mm512_store_si512(y + r * 64, _mm512_permutex2var_epi32(a, even, b));
            _mm512_store_si512(y + (registers / 2 + r) * 64, _mm512_permutex2var_epi32(a, odd, b));
        }
        from = y;
    }
}

LANE_FUNCTION __m512i four_channels(const CodeQueries &q, int m, int part, int d, int w) {
    int x;
    memcpy(&x, &(part ? q.lo : q.hi)[(size_t)m * d + 4 * w], 4);
    return _mm512_set1_epi32(x);
}
LANE_FUNCTION void store_dots(int *dots, const CodeQueries &q, int m, int t, __m512i hi, __m512i lo) {
    _mm512_storeu_si512(dots + m * KV_BLOCK + t * 16, _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo), _mm512_set1_epi32(128 * q.sum[m])));
}

// Q queries against x (d/4, KV_BLOCK, 4).
template <int Q> static void dots_of(int *dots, const uint8_t *x, const CodeQueries &q, int m0, int d) {
    __m512i hi[Q][4], lo[Q][4];
    for (int i = 0; i < Q; i++)
        for (int t = 0; t < 4; t++) hi[i][t] = lo[i][t] = _mm512_setzero_si512();
    for (int w = 0; w < d / 4; w++)
        for (int i = 0; i < Q; i++) {
            const __m512i h = four_channels(q, m0 + i, 0, d, w), l = four_channels(q, m0 + i, 1, d, w);
            for (int t = 0; t < 4; t++) {
                const __m512i xt = _mm512_load_si512(x + w * 256 + t * 64);
                hi[i][t] = _mm512_dpbusd_epi32(hi[i][t], xt, h), lo[i][t] = _mm512_dpbusd_epi32(lo[i][t], xt, l);
            }
        }
    for (int i = 0; i < Q; i++)
        for (int t = 0; t < 4; t++) store_dots(dots, q, m0 + i, t, hi[i][t], lo[i][t]);
}

// The same for the M <= 4 queries of a decode step while codes are looked up: permutes have one port, and vpdpbusd two.
template <int C, bool SIGN, int M> static void dots_of_few(int *dots, const CodeScratch &s, const CodePlanes &planes, int d) {
    constexpr int T = M > 2 ? 2 : 4;    // registers of tokens at a time: as many sums as registers hold
    for (int t0 = 0; t0 < 4; t0 += T) {
        __m512i hi[M][T], lo[M][T];
        for (int m = 0; m < M; m++)
            for (int t = 0; t < T; t++) hi[m][t] = lo[m][t] = _mm512_setzero_si512();
        for (int w = 0; w < d / C / 4; w++) {
            Codes k[T];
            for (int t = 0; t < T; t++) k[t] = load_codes(s.codes + (w * 4 + t0 + t) * 64);
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                __m512i x[T];
                for (int t = 0; t < T; t++) x[t] = look_up<SIGN>(k[t], planes, c, s.signs + (w * 4 + t0 + t) * 64);
                for (int m = 0; m < M; m++) {
                    const __m512i h = four_channels(s.queries, m, 0, d, w * C + c), l = four_channels(s.queries, m, 1, d, w * C + c);
                    for (int t = 0; t < T; t++) hi[m][t] = _mm512_dpbusd_epi32(hi[m][t], x[t], h), lo[m][t] = _mm512_dpbusd_epi32(lo[m][t], x[t], l);
                }
            }
        }
        for (int m = 0; m < M; m++)
            for (int t = 0; t < T; t++) store_dots(dots, s.queries, m, t0 + t, hi[m][t], lo[m][t]);
    }
}
template <int C, bool SIGN> static void dots_of_few(int *dots, const CodeScratch &s, const CodePlanes &planes, int d, int M) {
    if (M == 1) dots_of_few<C, SIGN, 1>(dots, s, planes, d);
    if (M == 2) dots_of_few<C, SIGN, 2>(dots, s, planes, d);
    if (M == 3) dots_of_few<C, SIGN, 3>(dots, s, planes, d);
    if (M == 4) dots_of_few<C, SIGN, 4>(dots, s, planes, d);
}

void code_dots(int *dots, CodeScratch &s, int M, KvFormat format, const NsnFields &f) {
    const CodePlanes &planes = planes_of(format, true);
    deal(s.codes, s.other, f.code, f.d / f.channels / 4);
    if (f.sign) signs_by_code(s.row_signs, f), deal(s.signs, s.other, s.row_signs, f.d / f.channels / 4);
    if (M <= 4) {
        if (f.sign) dots_of_few<8, true>(dots, s, planes, f.d, M);
        else if (f.channels == 8) dots_of_few<8, false>(dots, s, planes, f.d, M);
        else if (f.channels == 4) dots_of_few<4, false>(dots, s, planes, f.d, M);
        else dots_of_few<2, false>(dots, s, planes, f.d, M);
        return;
    }
    look_up_block(s, planes, f, 4);
    int m = 0;
    for (; m + 2 <= M; m += 2) dots_of<2>(dots, s.x, s.queries, m, f.d);
    if (m < M) dots_of<1>(dots, s.x, s.queries, m, f.d);
}

// Codes (KV_BLOCK, n_codes) to (chunks, groups, 64): a lane is one code of four neighbouring tokens, a chunk 16 codes (8 codes: two
// groups of tokens share a register, in neighbouring lanes).
static void turn(uint8_t *to, const uint8_t *from, int n_codes) {
    alignas(64) uint8_t at[64];
    auto permutation = [&](int k) {
        for (int b = 0; b < 64; b++) at[b] = (uint8_t)(n_codes == 8 ? (b / 4 % 2 * 4 + b % 4) * 8 + b / 8 : b % 4 * n_codes + 16 * k + b / 4);
        return _mm512_load_si512(at);
    };
    if (n_codes <= 16) {
        const __m512i p = permutation(0);
        for (int g = 0; g < n_codes; g++) _mm512_store_si512(to + g * 64, _mm512_permutexvar_epi8(p, _mm512_loadu_si512(from + g * 64)));
    } else if (n_codes == 32) {
        const __m512i p[2] = {permutation(0), permutation(1)};
        for (int g = 0; g < 16; g++)
            for (int k = 0; k < 2; k++)
                _mm512_store_si512(to + (k * 16 + g) * 64,
                                   _mm512_permutex2var_epi8(_mm512_loadu_si512(from + g * 128), p[k], _mm512_loadu_si512(from + g * 128 + 64)));
    } else
        for (int k = 0; k < n_codes / 64; k++)
            for (int g = 0; g < 16; g++) {
                __m512i x[4];
                for (int i = 0; i < 4; i++) x[i] = _mm512_loadu_si512(from + (g * 4 + i) * n_codes + k * 64);
                const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]), c = _mm512_unpacklo_epi8(x[2], x[3]),
                              d = _mm512_unpackhi_epi8(x[2], x[3]);
                uint8_t *y = to + (k * 64 + g) * 64;
                _mm512_store_si512(y, _mm512_unpacklo_epi16(a, c)), _mm512_store_si512(y + 1024, _mm512_unpackhi_epi16(a, c));
                _mm512_store_si512(y + 2048, _mm512_unpacklo_epi16(b, d)), _mm512_store_si512(y + 3072, _mm512_unpackhi_epi16(b, d));
            }
}

// Sums of Q queries and P rows of x (P, groups, 64); row r's go to to[r].
template <int Q, int P> LANE_FUNCTION void weighted_of(int *sums, int64_t stride, int (&to)[P], const uint8_t *x, const uint8_t *w, int groups) {
    __m512i hi[Q][P], lo[Q][P];
    for (int i = 0; i < Q; i++)
        for (int r = 0; r < P; r++) hi[i][r] = lo[i][r] = _mm512_setzero_si512();
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < Q; i++) {
            auto four_tokens = [&](const uint8_t *w) {
                int64_t x = 0;
                if (groups == 8) return memcpy(&x, w + 8 * g, 8), _mm512_set1_epi64(x);
                return memcpy(&x, w + 4 * g, 4), _mm512_set1_epi32((int)x);
            };
            const __m512i h = four_tokens(w + i * 2 * KV_BLOCK), l = four_tokens(w + (i * 2 + 1) * KV_BLOCK);
            for (int r = 0; r < P; r++) {
                const __m512i xr = _mm512_load_si512(x + (r * groups + g) * 64);
                hi[i][r] = _mm512_dpbusd_epi32(hi[i][r], h, xr), lo[i][r] = _mm512_dpbusd_epi32(lo[i][r], l, xr);
            }
        }
    for (int i = 0; i < Q; i++)
        for (int r = 0; r < P; r++) {
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(hi[i][r], 8), lo[i][r]);
            if (groups == 16) _mm512_storeu_si512(sums + i * stride + to[r], sum);
            else _mm256_storeu_si256((__m256i *)(sums + i * stride + to[r]), _mm512_cvtepi64_epi32(_mm512_add_epi32(sum, _mm512_srli_epi64(sum, 32))));
        }
}

template <int Q> static void weighted(int *sums, const uint8_t *x, const uint8_t *w, int d, int C) {
    const int n_codes = d / C, lanes = std::min(16, n_codes), groups = n_codes == 8 ? 8 : 16;
    constexpr int P = Q > 2 ? 2 : 4;    // enough sums that none waits for itself, few enough for 32 registers
    for (int r = 0; r < d / lanes; r += P) {    // row r: chunk r / C, channel r % C
        int to[P];
        for (int i = 0; i < P; i++) to[i] = (r + i) % C * n_codes + (r + i) / C * lanes;
        if (groups == 16) weighted_of<Q>(sums, d, to, x + r * 1024, w, 16); else weighted_of<Q>(sums, d, to, x + r * 512, w, 8);
    }
}

void code_weighted(int *sums, CodeScratch &s, const uint8_t *w, int M, KvFormat format, const NsnFields &f) {
    const int d = f.d, C = f.channels, n_codes = d / C, groups = n_codes == 8 ? 8 : 16;
    turn(s.codes, f.code, n_codes);
    if (f.sign) signs_by_code(s.row_signs, f), turn(s.signs, s.row_signs, n_codes);
    look_up_block(s, planes_of(format, false), f, groups);
    int m = 0;
    for (; m + 4 <= M; m += 4) weighted<4>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
    if (M - m == 3) weighted<3>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
    if (M - m == 2) weighted<2>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
    if (M - m == 1) weighted<1>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
}
}    // namespace avx512
}    // namespace cpu
#endif
