// attention_codes.cpp - see attention_codes.h.
#include <algorithm>
#include "attention_codes.h"
#include "simd.h"

namespace cpu {

int code_channels(KvFormat format, int d) {
    const int C = format == KvFormat::nsn1 || format == KvFormat::nsn2 ? 8 : format == KvFormat::nsn2b ? 4 : format == KvFormat::nsn4b ? 2 : 0;
    return d >= 64 && (d & (d - 1)) == 0 ? C : 0;
}

static float delta_of(KvFormat format) {
    return format == KvFormat::nsn1 ? NSN1_DELTA : format == KvFormat::nsn2 ? NSN2_DELTA : format == KvFormat::nsn2b ? NSN2B_DELTA : NSN4B_DELTA;
}

// Where sum i of code_weighted belongs.  From 64 codes a token on, 16 neighbouring lanes are four codes of each quarter of 64.
int code_channel(int i, int d, int C) {
    const int n_codes = d / C, j = i % n_codes;
    return C * (n_codes < 64 ? j : j / 64 * 64 + j % 16 / 4 * 16 + j % 64 / 16 * 4 + j % 4) + i / n_codes;
}

void codes_in_order(float *x, int d, int C) {
    float y[MAX_HEAD_DIM];
    for (int i = 0; i < d; i++) y[code_channel(i, d, C)] = x[i];
    std::copy(y, y + d, x);
}

// ---- integers, portable -------------------------------------------------------------------------------
namespace portable {

// The 8-bit codewords of token t.
static void codewords(int16_t *x, KvFormat format, const NsnFields &f, int t) {
    const int8_t *codebook = kv_codebook(format);
    const int C = f.channels, n_codes = f.d / C;
    for (int j = 0; j < n_codes; j++) {
        const int8_t *entry = codebook + f.code[t * n_codes + j] * C;
        const int sign = f.sign ? f.sign[t * n_codes + j] : 0;
        for (int c = 0; c < C; c++) x[C * j + c] = (int16_t)(entry[c] ^ -(sign >> c & 1));
    }
}

void code_dots(int *dots, CodeScratch &s, int M, KvFormat format, const NsnFields &f) {
    for (int t = 0; t < KV_BLOCK; t++) {
        int16_t x[MAX_HEAD_DIM];
        codewords(x, format, f, t);
        for (int m = 0; m < M; m++) {
            const int16_t *q = &s.queries.value[(size_t)m * f.d];
            int sum = 0;
            for (int c = 0; c < f.d; c++) sum += q[c] * x[c];
            dots[m * KV_BLOCK + t] = sum;
        }
    }
}

void code_weighted(int *sums, CodeScratch &, const uint8_t *w, int M, KvFormat format, const NsnFields &f) {
    int channel[MAX_HEAD_DIM];
    for (int i = 0; i < f.d; i++) channel[i] = code_channel(i, f.d, f.channels);
    std::fill(sums, sums + (size_t)M * f.d, 0);
    for (int t = 0; t < KV_BLOCK; t++) {
        int16_t x[MAX_HEAD_DIM], y[MAX_HEAD_DIM];
        codewords(x, format, f, t);
        for (int i = 0; i < f.d; i++) y[i] = x[channel[i]];
        for (int m = 0; m < M; m++) {
            const int weight = w[m * 2 * KV_BLOCK + t] * 256 + w[(m * 2 + 1) * KV_BLOCK + t];
            for (int i = 0; i < f.d; i++) sums[(size_t)m * f.d + i] += weight * y[i];
        }
    }
}
}    // namespace portable

// ---- integers, AVX-512 --------------------------------------------------------------------------------
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
namespace avx512 {

// Bytes k of the codebook, for keys with 128 added.
static const CodePlanes &planes_of(KvFormat format, bool offset) {
    auto make = [](KvFormat f, int C, uint8_t flip) {
        CodePlanes p{};
        for (int k = 0; k < 256; k++)
            for (int c = 0; c < C; c++) p.byte[c][k] = (uint8_t)kv_codebook(f)[k * C + c] ^ flip;
        return p;
    };
    static const CodePlanes planes[4][2] = {{make(KvFormat::nsn1, 8, 0), make(KvFormat::nsn1, 8, 0x80)}, {make(KvFormat::nsn2, 8, 0), make(KvFormat::nsn2, 8, 0x80)},
                                            {make(KvFormat::nsn2b, 4, 0), make(KvFormat::nsn2b, 4, 0x80)}, {make(KvFormat::nsn4b, 2, 0), make(KvFormat::nsn4b, 2, 0x80)}};
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
    if (f.sign) deal(s.signs, s.other, f.sign, f.d / f.channels / 4);
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
                _mm512_store_si512(to + (k * 16 + g) * 64, _mm512_permutex2var_epi8(_mm512_loadu_si512(from + g * 128), p[k], _mm512_loadu_si512(from + g * 128 + 64)));
    } else
        for (int k = 0; k < n_codes / 64; k++)
            for (int g = 0; g < 16; g++) {
                __m512i x[4];
                for (int i = 0; i < 4; i++) x[i] = _mm512_loadu_si512(from + (g * 4 + i) * n_codes + k * 64);
                const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]), c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
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
    if (f.sign) turn(s.signs, f.sign, n_codes);
    look_up_block(s, planes_of(format, false), f, groups);
    int m = 0;
    for (; m + 4 <= M; m += 4) weighted<4>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
    if (M - m == 3) weighted<3>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
    if (M - m == 2) weighted<2>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
    if (M - m == 1) weighted<1>(sums + (size_t)m * d, s.x, w + m * 2 * KV_BLOCK, d, C);
}
}    // namespace avx512
namespace fastest = avx512;
#else
namespace fastest = portable;
#endif

// ---- what is not integer ------------------------------------------------------------------------------
constexpr float TINY = 1e-30f;    // below this the largest number of a row counts as zero: its unit could not be inverted

void code_queries(CodeScratch &s, const float *Rq, int M, int d, int C, int stride) {
    CodeQueries &q = s.queries;
    q.value.resize((size_t)M * d), q.hi.resize((size_t)M * d), q.lo.resize((size_t)M * d), q.unit.resize(M), q.sum.resize(M);
    s.sums.resize((size_t)M * std::max(d, KV_BLOCK)), s.weights.resize((size_t)M * 2 * KV_BLOCK), s.factors.resize(M);
    s.z.resize((size_t)M * d), s.mean_score.resize((size_t)M * KV_BLOCK);
    for (int m = 0; m < M; m++) {
        const float *x = Rq + (int64_t)m * stride;
        float largest = 0;
        bool finite = true;
        for (int c = 0; c < d; c++) largest = std::max(largest, std::fabs(x[c])), finite &= std::isfinite(x[c]);
        const float inverse = finite && largest > TINY ? 32512.0f / largest : 0.0f;    // 32512 = 127 256: hi stays within a byte
        q.unit[m] = !finite ? NAN : inverse > 0 ? largest / 32512.0f : 0.0f;           // a NaN or infinity: all scores are NaN
        q.sum[m] = 0;
        for (int c = 0; c < d; c++) {
            const int v = finite ? (int)std::nearbyint(x[c] * inverse) : 0, hi = (v + 128) >> 8, j = c / C;
            const size_t at = (size_t)m * d + (j / 4 * C + c % C) * 4 + j % 4;
            q.value[(size_t)m * d + c] = (int16_t)v, q.hi[at] = (int8_t)hi, q.lo[at] = (int8_t)(v - hi * 256);
            q.sum[m] += v;
        }
    }
}

// s1[t], and s1[t] s2[t] delta, of the 64 tokens.
static void token_scales(float *s1, float *scale, const NsnFields &f, float delta) {
    const f32x16 step = splat16(f.s1->step), min = splat16(f.s1->min);
    for (int t = 0; t < KV_BLOCK; t += LANES) {
        const f32x16 first = min + step * load16_nibbles(f.s1->code + t / 2);
        f32x16 second;
        if (f.s2_f16) second = load16(f.s2_f16->value + t);
        else {
            const f32x16 code = load16(f.s2_log8->code + t), x = (splat16(f.s2_log8->min) + splat16(f.s2_log8->step) * (code + splat16(-1.0f))) * splat16(0.69314718f);
            second = exp16(x);
            for (int i = 0; i < PARTS; i++) second.part[i] = (vn)((vni)second.part[i] & (code.part[i] > 0.0f));    // code 0: a row of zeros
        }
        store16(s1 + t, first), store16(scale + t, first * second * splat16(delta));
    }
}

static void load_mean(float *mean, const NsnFields &f) {
    for (int g = 0; g < (f.d + 31) / 32; g++) {
        const f32x16 step = splat16(f.mean_step[g]), min = splat16(f.mean_min[g]);
        for (int c = 0; c < 32; c += LANES) store16(mean + g * 32 + c, min + step * load16_nibbles(f.mean + (g * 32 + c) / 2));
    }
}

// mean_score (M, KV_BLOCK) from z (M, d) = A, B as seen from token 32 of the block.
template <int R> LANE_FUNCTION void mean_scores_of(float *score, const float *z, RopeTable rope, int d) {
    const int half = d / 2;
    f32x16 P[R][2], Q[R][2];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2; i++) P[r][i] = Q[r][i] = splat16(0.0f);
    for (int j = 0; j < half; j++) {
        const float *cosine = rope.step_turned + j * KV_BLOCK, *sine = cosine + half * KV_BLOCK;
        for (int i = 0; i < 2; i++) {
            const f32x16 c = load16(cosine + i * LANES), s = load16(sine + i * LANES);
            for (int r = 0; r < R; r++) add_product(P[r][i], c, splat16(z[r * d + j])), add_product(Q[r][i], s, splat16(z[r * d + half + j]));
        }
    }
    for (int r = 0; r < R; r++) {
        const f32x16 minus = splat16(-1.0f);
        const float *angle = rope.step + 32 * d;
        f32x16 cosines = splat16(0.0f), sines = cosines;    // token 0, u = 32
        for (int j = 0; j < half; j += LANES) add_product(cosines, load16(angle + j), load16(z + r * d + j)), add_product(sines, load16(angle + half + j), load16(z + r * d + half + j));
        float *to = score + r * KV_BLOCK;
        to[0] = sum16(cosines + minus * sines);
        for (int i = 0; i < 2; i++) store16(to + 17 - i * LANES, reverse16(P[r][i] + minus * Q[r][i]));    // of token 32 - u; token 32 comes again
        for (int i = 0; i < 2; i++) store16(to + 32 + i * LANES, P[r][i] + Q[r][i]);
    }
}

static void mean_scores(CodeScratch &s, const float *q, int M, int stride, const NsnFields &f, RopeTable rope, int i) {
    constexpr int R = PARTS == 1 ? 4 : 1;
    const int d = f.d, half = d / 2;
    float mean[MAX_HEAD_DIM];
    load_mean(mean, f);
    const float *base = rope.base + (int64_t)i * d, *step = rope.step + 32 * d;
    const f32x16 minus = splat16(-1.0f);
    for (int j = 0; j < half; j += LANES) {
        const f32x16 cb = load16(base + j), sb = load16(base + half + j), cs = load16(step + j), ss = load16(step + half + j);
        const f32x16 c = cb * cs + minus * sb * ss, sn = sb * cs + cb * ss, lo = load16(mean + j), hi = load16(mean + half + j);
        const f32x16 turned_lo = lo * c + minus * hi * sn, turned_hi = lo * sn + hi * c;
        for (int m = 0; m < M; m++) {
            const f32x16 q_lo = load16(q + (int64_t)m * stride + j), q_hi = load16(q + (int64_t)m * stride + half + j);
            store16(&s.z[(size_t)m * d + j], q_lo * turned_lo + q_hi * turned_hi);
            store16(&s.z[(size_t)m * d + half + j], q_hi * turned_lo + minus * q_lo * turned_hi);
        }
    }
    int m = 0;
    for (; m + R <= M; m += R) mean_scores_of<R>(&s.mean_score[m * KV_BLOCK], &s.z[(size_t)m * d], rope, d);
    for (; m < M; m++) mean_scores_of<1>(&s.mean_score[m * KV_BLOCK], &s.z[(size_t)m * d], rope, d);
}

void code_scores(float *score, CodeScratch &s, const float *q, int M, int stride, KvFormat format, int d, const uint8_t *block, RopeTable rope, int i) {
    const NsnFields f = nsn_fields(format, d, block);
    float s1[KV_BLOCK], scale[KV_BLOCK];
    token_scales(s1, scale, f, delta_of(format));
    fastest::code_dots(s.sums.data(), s, M, format, f);
    mean_scores(s, q, M, stride, f, rope, i);
    for (int m = 0; m < M; m++) {
        const f32x16 unit = splat16(s.queries.unit[m]), half = splat16(0.5f * s.queries.sum[m]);
        for (int t = m * KV_BLOCK, u = 0; u < KV_BLOCK; t += LANES, u += LANES) {
            f32x16 x = (load16(&s.sums[t]) + half) * unit * load16(scale + u);
            add_product(x, load16(s1 + u), load16(&s.mean_score[t]));
            store16(score + t, x);
        }
    }
}

void code_sums(float *o, CodeScratch &s, const float *p, int M, int stride, KvFormat format, int d, const uint8_t *block) {
    const NsnFields f = nsn_fields(format, d, block);
    float s1[KV_BLOCK], scale[KV_BLOCK], mean[MAX_HEAD_DIM];
    token_scales(s1, scale, f, delta_of(format));
    load_mean(mean, f);
    for (int m = 0; m < M; m++) {
        f32x16 w[KV_BLOCK / LANES], largest = splat16(0.0f), of_mean = largest, sum = largest;
        for (int i = 0; i < KV_BLOCK / LANES; i++) {
            const f32x16 pt = load16(p + m * KV_BLOCK + i * LANES);
            w[i] = pt * load16(scale + i * LANES), largest = max16(largest, w[i]);
            add_product(of_mean, pt, load16(s1 + i * LANES));
        }
        const float top = largest16(largest);
        const f32x16 inverse = splat16(top > TINY ? 65535.0f / top : 0.0f);
        for (int i = 0; i < KV_BLOCK / LANES; i++) {
            const f32x16 x = truncate16(w[i] * inverse + splat16(0.5f));
            store16(&s.weights[m * 2 * KV_BLOCK + i * LANES], &s.weights[(m * 2 + 1) * KV_BLOCK + i * LANES], x), sum = sum + x;
        }
        s.factors[m] = {top > TINY ? top / 65535.0f : 0.0f, 0.5f * sum16(sum), sum16(of_mean)};    // sum: whole numbers below 2^22, exact
    }
    fastest::code_weighted(s.sums.data(), s, s.weights.data(), M, format, f);
    for (int m = 0; m < M; m++) {
        float *code = o + (int64_t)m * 2 * stride, *plain = code + stride;
        const f32x16 unit = splat16(s.factors[m].unit), half = splat16(s.factors[m].half), w = splat16(s.factors[m].mean);
        for (int c = 0; c < d; c += LANES) {
            f32x16 x = load16(code + c), y = load16(plain + c);
            add_product(x, load16(&s.sums[(size_t)m * d + c]) + half, unit), add_product(y, w, load16(mean + c));
            store16(code + c, x), store16(plain + c, y);
        }
    }
}
}    // namespace cpu
