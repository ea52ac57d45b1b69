// nsn_seal.h - one block of 64 rows into NSN codes: the reference, and the CPU backend.
//
//   1  s1_t = |x_t| / sqrt(d), kept in 4 bits;    x_t /= s1_t
//   2  mean_c over the 64 rows, kept in 4 bits;   x_t -= mean
//   3  s2_t = |x_t| / sqrt(d);                    x_t /= s2_t
//   4  keys: x_t = RoPE_t(x_t) - NSN works on keys before RoPE, the residual is turned at its own position
//   5  x_t = H x_t
//   6  codes: every C neighbouring channels become the nearest codeword (Euclidean; ties to the lowest index)
//   7  s2'_t = s2_t (<x,x> / <x,q>)^a, q the codewords side by side.  a = 1 is the paper's rule: it makes the error
//      orthogonal to x, so scores keep their size; a < 1 trades that for a smaller squared error (scale_exponent below)
//
// Source: NSNQuant (arXiv 2505.18231), sections 3 and 4.  s1 and mean are rounded before the next step uses them, so later
// steps absorb their rounding.
//
// Sums are made row by row or channel by channel, in order, whatever the lanes are: 8 rows, or the 64 tokens of a channel.
//
// Cost    a block of 128 channels, one thread of an EPYC with AVX-512, us: nsn1 35, nsn2 34, nsn2b 37, nsn4b 54.  91, 95, 134 and 209 when
//         lanes were codewords of which the nearest was looked for afterwards, and a row's sum was one chain of additions.
//
// What is not a number: a block with a NaN or an infinity gets s1_min = NaN, so every row read from it is NaN and the
// logits tell.  A row that is all zero after step 1 or 2, or whose codewords point away from it (<x,q> <= 0), gets s2' = 0.
#pragma once
#include <algorithm>
#include <cmath>
#include "hadamard.h"
#include "kv_block.h"
#include "simd.h"

// Where a block stands and how it is to be sealed.
struct SealPlace {
    bool key;
    int pos;            // of its first row
    RopeTable rope;
    unsigned ablate;
    float exponent;     // a of step 7
    int8_t *beside = nullptr;    // KvView::beside of the block
    bool shares = false;         // the codes there are another layer's: leave them
};

// RTN4: n values in 4 bits between their smallest and largest.  step and min are kept as f16, and the kept values decide.
inline void round_4bit(uint8_t *code, f16 &step, f16 &min, const float *v, int n) {
    const float lo = *std::min_element(v, v + n), hi = *std::max_element(v, v + n);
    step = to_f16(std::max((hi - lo) / 15.0f, 1e-5f));
    min = to_f16(lo);
    for (int i = 0; i < n; i++) {
        const float x = (v[i] - to_f32(min)) / to_f32(step);
        const int q = (int)std::nearbyint(std::min(std::max(x, 0.0f), 15.0f));
        code[i / 2] = (uint8_t)(i % 2 ? (code[i / 2] & 15) | q << 4 : (code[i / 2] & 0xf0) | q);
    }
}

// ---- codewords ----------------------------------------------------------------------------------------
// A codebook the way the search reads it: channel by channel, and |w|^2 / 2 of every entry, so that the nearest entry has
// the smallest |w|^2 / 2 - <x,w>.
struct SearchBook {
    int channels;
    float delta, w[8][256], half_norm[256];
    template <int C> SearchBook(const int8_t (&index)[256][C], float delta) : channels(C), delta(delta) {
        for (int k = 0; k < 256; k++) {
            half_norm[k] = 0;
            for (int c = 0; c < C; c++) {
                w[c][k] = (index[k][c] + 0.5f) * delta;
                half_norm[k] += 0.5f * w[c][k] * w[c][k];
            }
        }
    }
};

// The nearest of 256 codewords to each of 16 G vectors; x (C, KV_BLOCK).  A lane is a vector and meets the codewords in order, so that the
// first of several that are equally near stays.
template <int C, int G> inline void nearest_of(uint8_t *code, const SearchBook &book, const float *x) {
    f32x16 minus_x[G][C], best[G];
    vni at[G][PARTS] = {}, here = {};    // here: k in all lanes
    for (int g = 0; g < G; g++) {
        best[g] = splat16(INFINITY);
        for (int c = 0; c < C; c++) minus_x[g][c] = splat16(-1.0f) * load16(x + c * KV_BLOCK + g * LANES);
    }
    for (int k = 0; k < 256; k++, here += 1)
        for (int g = 0; g < G; g++) {
            f32x16 score = splat16(book.half_norm[k]);
            for (int c = 0; c < C; c++) add_product(score, minus_x[g][c], splat16(book.w[c][k]));
            for (int i = 0; i < PARTS; i++) {
                const vni less = score.part[i] < best[g].part[i];
                at[g][i] = less ? here : at[g][i], best[g].part[i] = less ? score.part[i] : best[g].part[i];
            }
        }
    for (int g = 0; g < G; g++)
        for (int n = 0; n < LANES; n++) code[g * LANES + n] = (uint8_t)at[g][n / NATIVE][n % NATIVE];
}
template <int C> inline void nearest_of_block(uint8_t *code, const SearchBook &book, const float *x) {
    constexpr int G = PARTS > 1 ? 1 : C == 8 ? 2 : 4;    // what registers hold
    for (int t = 0; t < KV_BLOCK; t += G * LANES) nearest_of<C, G>(code + t, book, x + t);
}
// Of KV_BLOCK vectors, x (book.channels, KV_BLOCK).
inline void nearest(uint8_t *code, const SearchBook &book, const float *x) {
    if (book.channels == 8) nearest_of_block<8>(code, book, x);
    else if (book.channels == 4) nearest_of_block<4>(code, book, x);
    else nearest_of_block<2>(code, book, x);
}

inline const SearchBook &search_book(int channels, bool magnitudes) {
    static const SearchBook nsn1(NSN1_INDEX, NSN1_DELTA), nsn2(NSN2_INDEX, NSN2_DELTA), nsn2b(NSN2B_INDEX, NSN2B_DELTA), nsn4b(NSN4B_INDEX, NSN4B_DELTA);
    return magnitudes ? nsn2 : channels == 8 ? nsn1 : channels == 4 ? nsn2b : nsn4b;
}

// ---- scales -------------------------------------------------------------------------------------------
inline void store_scales(ScaleF16 &to, const float *s2) {
    for (int t = 0; t < KV_BLOCK; t++) to.value[t] = to_f16(std::min(s2[t], 65504.0f));
}
inline void store_scales(ScaleLog8 &to, const float *s2) {
    float lo = INFINITY, hi = -INFINITY;
    for (int t = 0; t < KV_BLOCK; t++)
        if (s2[t] > 0) lo = std::min(lo, std::log2(s2[t])), hi = std::max(hi, std::log2(s2[t]));
    to.min = to_f16(lo <= hi ? lo : 0.0f);
    to.step = to_f16(lo <= hi ? (hi - lo) / 254.0f : 0.0f);
    for (int t = 0; t < KV_BLOCK; t++) {
        const float step = to_f32(to.step), x = step > 0 && s2[t] > 0 ? (std::log2(s2[t]) - to_f32(to.min)) / step : 0.0f;
        to.code[t] = s2[t] > 0 ? (uint8_t)(1 + std::nearbyint(std::min(std::max(x, 0.0f), 254.0f))) : 0;
    }
}

// ---- the block ------------------------------------------------------------------------------------------
// rows (KV_BLOCK, d) f16 -> the fields of a block of zeros.
inline void nsn_seal(const NsnFields &f, const f16 *rows, const SealPlace &p) {
    const int d = f.d, C = f.channels;
    const float root = std::sqrt((float)d);
    const bool pre_rope = !(p.ablate & NO_PRE_ROPE);
    float x[KV_BLOCK * MAX_HEAD_DIM], s1[KV_BLOCK], s2[KV_BLOCK], mean[MAX_HEAD_DIM];
    int infinite = 0;
    for (int i = 0; i < KV_BLOCK * d; i += LANES) store16(x + i, load16(rows + i));
    for (int i = 0; i < KV_BLOCK * d; i++) infinite |= !(std::fabs(x[i]) < INFINITY);
    if (infinite) {
        f.s1->min = to_f16(NAN);
        return;
    }
    constexpr int AT_ONCE = 8;    // rows whose sums do not wait for each other
    auto norms = [&](float *s) {
        for (int t = 0; t < KV_BLOCK; t += AT_ONCE) {
            double sum[AT_ONCE] = {};
            for (int c = 0; c < d; c++)
                for (int i = 0; i < AT_ONCE; i++) sum[i] += (double)x[(t + i) * d + c] * x[(t + i) * d + c];
            for (int i = 0; i < AT_ONCE; i++) s[t + i] = (float)std::sqrt(sum[i]) / root;
        }
    };
    auto turn = [&](float *v, int t) {
        for (int j = 0; j < d / 2; j++) {
            float c, s;
            rope_angle(c, s, p.rope, p.pos + t, j, d);
            const float lo = v[j], hi = v[j + d / 2];
            v[j] = lo * c - hi * s;
            v[j + d / 2] = lo * s + hi * c;
        }
    };
    if (p.key && !pre_rope)
        for (int t = 0; t < KV_BLOCK; t++) turn(x + t * d, t);

    // 1 and 2
    if (p.ablate & NO_FIRST_NORM) std::fill(s1, s1 + KV_BLOCK, 1.0f);
    else norms(s1);
    round_4bit(f.s1->code, f.s1->step, f.s1->min, s1, KV_BLOCK);
    for (int t = 0; t < KV_BLOCK; t++) {
        const float s = f.s1->at(t), inverse = s > 0 ? 1.0f / s : 0.0f;
        for (int c = 0; c < d; c++) x[t * d + c] *= inverse;
    }
    double sum[MAX_HEAD_DIM] = {};
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) sum[c] += x[t * d + c];
    for (int c = 0; c < d; c++) mean[c] = p.ablate & NO_SHIFT ? 0.0f : (float)(sum[c] / KV_BLOCK);
    for (int g = 0; g < (d + 31) / 32; g++) round_4bit(f.mean + g * 16, f.mean_step[g], f.mean_min[g], mean + g * 32, std::min(32, d - g * 32));
    for (int c = 0; c < d; c++) mean[c] = f.mean_at(c);

    // 3 to 5, the Hadamard transform with a channel's 64 tokens side by side
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < d; c++) x[t * d + c] -= mean[c];
    norms(s2);
    for (int t = 0; t < KV_BLOCK; t++) {
        for (int c = 0; c < d && s2[t] > 0; c++) x[t * d + c] /= s2[t];
        if (p.key && pre_rope) turn(x + t * d, t);
    }
    float y[MAX_HEAD_DIM * KV_BLOCK];
    for (int c = 0; c < d; c++)
        for (int t = 0; t < KV_BLOCK; t++) y[c * KV_BLOCK + t] = x[t * d + c];
    if (!(p.ablate & NO_HADAMARD)) hadamard_rows(y, d, KV_BLOCK);

    // 6 and 7
    const SearchBook &book = search_book(C, f.sign);
    const int n_codes = d / C;
    double xx[KV_BLOCK] = {}, xq[KV_BLOCK] = {};
    for (int j = 0; j < n_codes; j++) {
        float *yj = y + j * C * KV_BLOCK;
        uint8_t code[KV_BLOCK];
        for (int c = 0; c < C && f.sign; c++) {
            const SignPlace place = sign_place(d, j * C + c);
            for (int t = 0; t < KV_BLOCK; t++) {
                float &v = yj[c * KV_BLOCK + t];
                if (s2[t] > 0) f.sign[t * (d / 8) + place.byte] |= (uint8_t)((v < 0) << place.bit);
                v = std::fabs(v);
            }
        }
        nearest(code, book, yj);
        for (int c = 0; c < C; c++)
            for (int t = 0; t < KV_BLOCK; t++) {
                const double v = yj[c * KV_BLOCK + t];
                xx[t] += v * v, xq[t] += v * book.w[c][code[t]];
            }
        for (int t = 0; t < KV_BLOCK; t++) f.code[t * n_codes + j] = s2[t] > 0 ? code[t] : 0;
    }
    for (int t = 0; t < KV_BLOCK; t++)
        s2[t] = s2[t] > 0 && xq[t] > 0 ? s2[t] * (float)(p.ablate & NO_SCALE ? 1.0 : std::pow(xx[t] / xq[t], (double)p.exponent)) : 0.0f;
    if (f.s2_f16) store_scales(*f.s2_f16, s2);
    else store_scales(*f.s2_log8, s2);
}
