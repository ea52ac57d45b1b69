// attention_codes.cpp - attention_codes.h but for what needs AVX-512: queries, scales, means, weights, and the integers in loops.
#include <algorithm>
#include "attention_codes.h"
#include "simd.h"

namespace cpu {

int code_channels(KvFormat format, int d) {
    const int C = format == KvFormat::nsn1 || format == KvFormat::nsn2 ? 8 : format == KvFormat::nsn2b ? 4 : format == KvFormat::nsn4b ? 2 : 0;
    return d >= 32 && d % 16 == 0 ? C : 0;
}
// Rows of 16-bit numbers are so long that vectors of any machine divide them: zeros behind d.
static int wide(int d) { return (d + 31) / 32 * 32; }
static bool by_avx512(int d) { return HAVE_AVX512_CODES && d >= 64 && (d & (d - 1)) == 0; }

float code_delta(KvFormat format) {
    return format == KvFormat::nsn1 ? NSN1_DELTA : format == KvFormat::nsn2 ? NSN2_DELTA : format == KvFormat::nsn2b ? NSN2B_DELTA : NSN4B_DELTA;
}

// avx512: plane by plane; from 64 codes a token on, 16 neighbouring lanes are four codes of each quarter of 64.
int code_channel(int i, int d, int C) {
    if (!by_avx512(d)) return i;
    const int n_codes = d / C, j = i % n_codes;
    return C * (n_codes < 64 ? j : j / 64 * 64 + j % 16 / 4 * 16 + j % 64 / 16 * 4 + j % 4) + i / n_codes;
}

void codes_in_order(float *x, int d, int C) {
    float y[MAX_HEAD_DIM];
    for (int i = 0; i < d; i++) y[code_channel(i, d, C)] = x[i];
    std::copy(y, y + d, x);
}

// ---- codewords ----------------------------------------------------------------------------------------
// A codebook's bytes, and what the eight bits of a sign do to them (xor), in 16 bits.
struct WideBook { alignas(64) int16_t entry[256 * 8], flip[256 * 8]; };    // entry (256, C)
static const WideBook &wide_book(KvFormat format) {
    auto make = [](KvFormat f, int C) {
        WideBook b = {};
        for (int i = 0; i < 256 * C; i++) b.entry[i] = kv_codebook(f)[i];
        for (int i = 0; i < 256 * 8; i++) b.flip[i] = (int16_t)-(i / 8 >> i % 8 & 1);
        return b;
    };
    static const WideBook books[] = {make(KvFormat::nsn1, 8), make(KvFormat::nsn2, 8), make(KvFormat::nsn2b, 4), make(KvFormat::nsn4b, 2)};
    return books[(int)format - (int)KvFormat::nsn1];
}
void signs_by_code(uint8_t *to, const NsnFields &f) {
    const int words = f.d / 32, rest = f.d % 32 / 8;
    const uint8_t *from = f.sign;
    auto change = [&](int n) {    // words
        for (int i = 0; i < n; i++) {
            uint32_t x;
            memcpy(&x, from + 4 * i, 4);
            x = ::signs_by_code(x);
            memcpy(to + 4 * i, &x, 4);
        }
        from += 4 * n, to += 4 * n;
    };
    if (rest == 0) return change(KV_BLOCK * words);
    for (int t = 0; t < KV_BLOCK; t++, from += rest, to += rest) change(words), memcpy(to, from, rest);
}
// Eight channels at a time: a look-up a code, one store.  sign: a byte a code.
template <int C, bool SIGN> static void codewords_of(int16_t *x, const WideBook &book, const NsnFields &f, const uint8_t *sign) {
    typedef int64_t eight __attribute__((vector_size(16), aligned(2), may_alias));
    typedef int32_t eight_by_twos __attribute__((vector_size(16), aligned(2), may_alias));
    typedef int64_t four __attribute__((aligned(2), may_alias));
    typedef int32_t two __attribute__((aligned(2), may_alias));
    const uint8_t *code = f.code, *const end = code + KV_BLOCK * f.d / C;
    auto entry = [&](int i) { return book.entry + code[i] * C; };
    for (; code < end; code += 8 / C, x += 8)
        if constexpr (C == 8) {
            eight y = *(const eight *)entry(0);
            if (SIGN) y ^= *(const eight *)(book.flip + *sign++ * 8);
            *(eight *)x = y;
        } else if constexpr (C == 4) *(eight *)x = eight{*(const four *)entry(0), *(const four *)entry(1)};
        else *(eight_by_twos *)x = eight_by_twos{*(const two *)entry(0), *(const two *)entry(1), *(const two *)entry(2), *(const two *)entry(3)};
}
void codewords(int16_t *x, int stride, KvFormat format, const NsnFields &f) {
    const WideBook &book = wide_book(format);
    alignas(64) uint8_t sign[KV_BLOCK * MAX_HEAD_DIM / 8];
    if (f.sign) signs_by_code(sign, f), codewords_of<8, true>(x, book, f, sign);
    else if (f.channels == 8) codewords_of<8, false>(x, book, f, nullptr);
    else if (f.channels == 4) codewords_of<4, false>(x, book, f, nullptr);
    else codewords_of<2, false>(x, book, f, nullptr);
    for (int t = KV_BLOCK - 1; stride > f.d && t >= 0; t--) {    // rows move apart, the last one first
        if (t > 0) std::copy_backward(x + t * f.d, x + (t + 1) * f.d, x + t * stride + f.d);
        std::fill(x + t * stride + f.d, x + (t + 1) * stride, (int16_t)0);
    }
}

// ---- integers, portable -------------------------------------------------------------------------------
namespace portable {

constexpr int HALVES = 2 * NATIVE;    // of a register
typedef int16_t vnh_in_memory __attribute__((vector_size(NATIVE * 4), aligned(2), may_alias));

template <int Q> static void dots_of(int *dots, const int16_t *x, const int16_t *q, int d) {    // d: of rows, with what is behind
    for (int t = 0; t < KV_BLOCK; t++) {
        vni sum[4] = {};
        for (int c = 0; c < d; c += HALVES)
            for (int i = 0; i < Q; i++) sum[i] += pair_products(*(const vnh_in_memory *)(x + t * d + c), *(const vnh_in_memory *)(q + i * d + c));
        const v4i all = sum4(fold4(sum[0]), fold4(sum[1]), fold4(sum[2]), fold4(sum[3]));
        for (int i = 0; i < Q; i++) dots[i * KV_BLOCK + t] = all[i];
    }
}
void code_dots(int *dots, CodeScratch &s, int M, KvFormat format, const NsnFields &f) {
    int16_t *x = (int16_t *)s.x;
    const int d = wide(f.d);
    codewords(x, d, format, f);
    int m = 0;
    for (; m + 4 <= M; m += 4) dots_of<4>(dots + m * KV_BLOCK, x, &s.queries.value[(size_t)m * d], d);
    for (; m < M; m++) dots_of<1>(dots + m * KV_BLOCK, x, &s.queries.value[(size_t)m * d], d);
}

// Weights are 16 bits without a sign, the products' are with one: 2^15 is taken off and the sum of x is added so many times.
template <int Q> static void weighted_of(int *sums, const int16_t *x, const uint8_t *w, int d) {
    const int stride = wide(d);
    int32_t pairs[Q][KV_BLOCK / 2];    // of tokens
    for (int i = 0; i < Q; i++) {
        int16_t weight[KV_BLOCK];
        for (int t = 0; t < KV_BLOCK; t++) weight[t] = (int16_t)((w[i * 2 * KV_BLOCK + t] ^ 0x80) << 8 | w[(i * 2 + 1) * KV_BLOCK + t]);
        memcpy(pairs[i], weight, sizeof weight);
    }
    vnh low, high;    // where in two registers the pairs of channels are, 8 by 8: the first four, the others
    for (int i = 0; i < HALVES; i++) low[i] = (int16_t)(i / 8 * 8 + i % 8 / 2 + i % 2 * HALVES), high[i] = low[i] + 4;
    const vnh ones = 1 - vnh{};
    for (int c = 0; c < d; c += HALVES) {
        vni sum[Q][2] = {}, of_x[2] = {};
        for (int u = 0; u < KV_BLOCK / 2; u++) {
            const vnh even = *(const vnh_in_memory *)(x + 2 * u * stride + c), odd = *(const vnh_in_memory *)(x + (2 * u + 1) * stride + c);
            const vnh pair[2] = {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, high)};
            for (int h = 0; h < 2; h++) {
                of_x[h] += pair_products(pair[h], ones);
                for (int i = 0; i < Q; i++) sum[i][h] += pair_products(pair[h], (vnh)(pairs[i][u] - vni{}));
            }
        }
        for (int i = 0; i < Q; i++)
            for (int h = 0; h < 2; h++) {
                const vni all = sum[i][h] + (of_x[h] << 15);
                for (int l = 0; l < NATIVE && c + l / 4 * 8 < d; l++) sums[i * d + c + l / 4 * 8 + h * 4 + l % 4] = all[l];
            }
    }
}
void code_weighted(int *sums, CodeScratch &s, const uint8_t *w, int M, KvFormat format, const NsnFields &f) {
    int16_t *x = (int16_t *)s.x;
    codewords(x, wide(f.d), format, f);
    int m = 0;
    for (; m + 4 <= M; m += 4) weighted_of<4>(sums + (size_t)m * f.d, x, w + m * 2 * KV_BLOCK, f.d);
    for (; m < M; m++) weighted_of<1>(sums + (size_t)m * f.d, x, w + m * 2 * KV_BLOCK, f.d);
}
}    // namespace portable

static void code_dots(int *dots, CodeScratch &s, int M, KvFormat format, const NsnFields &f) {
    if constexpr (HAVE_AVX512_CODES)
        if (by_avx512(f.d)) return avx512::code_dots(dots, s, M, format, f);
    portable::code_dots(dots, s, M, format, f);
}
static void code_weighted(int *sums, CodeScratch &s, const uint8_t *w, int M, KvFormat format, const NsnFields &f) {
    if constexpr (HAVE_AVX512_CODES)
        if (by_avx512(f.d)) return avx512::code_weighted(sums, s, w, M, format, f);
    portable::code_weighted(sums, s, w, M, format, f);
}

// ---- what is not integer ------------------------------------------------------------------------------
constexpr float TINY = 1e-30f;    // below this the largest number of a row counts as zero: its unit could not be inverted

void code_queries(CodeScratch &s, const float *Rq, int M, int d, int C, int stride) {
    CodeQueries &q = s.queries;
    const int w = wide(d);
    q.value.assign((size_t)M * w, 0), q.hi.resize((size_t)M * w), q.lo.resize((size_t)M * w), q.unit.resize(M), q.sum.resize(M);
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
            const size_t at = (size_t)m * w + (j / 4 * C + c % C) * 4 + j % 4;
            q.value[(size_t)m * w + c] = (int16_t)v, q.hi[at] = (int8_t)hi, q.lo[at] = (int8_t)(v - hi * 256);
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
            const f32x16 code = load16(f.s2_log8->code + t),
                         x = (splat16(f.s2_log8->min) + splat16(f.s2_log8->step) * (code + splat16(-1.0f))) * splat16(0.69314718f);
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
        int j = 0;
        for (; j + LANES <= half; j += LANES)
            add_product(cosines, load16(angle + j), load16(z + r * d + j)), add_product(sines, load16(angle + half + j), load16(z + r * d + half + j));
        float *to = score + r * KV_BLOCK;
        to[0] = sum16(cosines + minus * sines);
        for (; j < half; j++) to[0] += angle[j] * z[r * d + j] - angle[half + j] * z[r * d + half + j];
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
    for (int first = 0; first < half; first += LANES) {
        const int j = std::min(first, half - LANES);    // the last ones may be some of those before again
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
    token_scales(s1, scale, f, code_delta(format));
    code_dots(s.sums.data(), s, M, format, f);
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
    token_scales(s1, scale, f, code_delta(format));
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
    code_weighted(s.sums.data(), s, s.weights.data(), M, format, f);
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
