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

// The nearest of 256 codewords to x (C).  All exact in order: 16 running minima, then the lowest of them.
template <int C> inline int nearest(const SearchBook &book, const float *x) {
    f32x16 best = splat16(INFINITY), at = splat16(0);
    for (int k = 0; k < 256; k += LANES) {
        f32x16 score = load16(book.half_norm + k);
        for (int c = 0; c < C; c++) add_product(score, splat16(-x[c]), load16(book.w[c] + k));
        for (int i = 0; i < PARTS; i++) {
            const vni less = score.part[i] < best.part[i];
            best.part[i] = (vn)(((vni)score.part[i] & less) | ((vni)best.part[i] & ~less));
            at.part[i] = (vn)(((vni)((float)k - vn{}) & less) | ((vni)at.part[i] & ~less));
        }
    }
    float value[LANES], block[LANES];
    store16(value, best);
    store16(block, at);
    int lane = 0;
    for (int i = 1; i < LANES; i++)
        if (value[i] < value[lane] || (value[i] == value[lane] && block[i] + i < block[lane] + lane)) lane = i;
    return (int)block[lane] + lane;
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
    bool finite = true;
    for (int i = 0; i < KV_BLOCK * d; i++) {
        x[i] = to_f32(rows[i]);
        finite = finite && std::isfinite(x[i]);
    }
    if (!finite) {
        f.s1->min = to_f16(NAN);
        return;
    }
    auto norm = [&](const float *v) {
        double sum = 0;
        for (int c = 0; c < d; c++) sum += (double)v[c] * v[c];
        return (float)std::sqrt(sum) / root;
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
    for (int t = 0; t < KV_BLOCK; t++) s1[t] = p.ablate & NO_FIRST_NORM ? 1.0f : norm(x + t * d);
    round_4bit(f.s1->code, f.s1->step, f.s1->min, s1, KV_BLOCK);
    for (int t = 0; t < KV_BLOCK; t++) {
        const float s = f.s1->at(t), inverse = s > 0 ? 1.0f / s : 0.0f;
        for (int c = 0; c < d; c++) x[t * d + c] *= inverse;
    }
    for (int c = 0; c < d; c++) {
        double sum = 0;
        for (int t = 0; t < KV_BLOCK; t++) sum += x[t * d + c];
        mean[c] = p.ablate & NO_SHIFT ? 0.0f : (float)(sum / KV_BLOCK);
    }
    for (int g = 0; g < (d + 31) / 32; g++) round_4bit(f.mean + g * 16, f.mean_step[g], f.mean_min[g], mean + g * 32, std::min(32, d - g * 32));
    for (int c = 0; c < d; c++) mean[c] = f.mean_at(c);

    const SearchBook &book = search_book(C, f.sign);
    for (int t = 0; t < KV_BLOCK; t++) {
        // 3 to 5
        float *xt = x + t * d;
        for (int c = 0; c < d; c++) xt[c] -= mean[c];
        const float s = norm(xt);
        s2[t] = 0;
        if (!(s > 0)) continue;
        for (int c = 0; c < d; c++) xt[c] /= s;
        if (p.key && pre_rope) turn(xt, t);
        if (!(p.ablate & NO_HADAMARD)) hadamard(xt, d);
        // 6 and 7
        double xx = 0, xq = 0;
        for (int j = 0; j < d / C; j++) {
            float *y = xt + j * C;
            if (f.sign)
                for (int c = 0; c < C; c++) {
                    f.sign[t * (d / 8) + j] |= (uint8_t)((y[c] < 0) << c);
                    y[c] = std::fabs(y[c]);
                }
            const int k = C == 8 ? nearest<8>(book, y) : C == 4 ? nearest<4>(book, y) : nearest<2>(book, y);
            f.code[t * (d / C) + j] = (uint8_t)k;
            for (int c = 0; c < C; c++) xx += (double)y[c] * y[c], xq += (double)y[c] * book.w[c][k];
        }
        if (xq > 0) s2[t] = s * (float)(p.ablate & NO_SCALE ? 1.0 : std::pow(xx / xq, (double)p.exponent));
    }
    if (f.s2_f16) store_scales(*f.s2_f16, s2);
    else store_scales(*f.s2_log8, s2);
}
