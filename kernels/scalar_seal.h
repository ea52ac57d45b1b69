// scalar_seal.h - one block of 64 rows into the scalar codes of kv_baselines.h: the reference, and the CPU backend.
//
//   1  keys: x_t = RoPE_t(x_t);  rotated formats: x_t = H x_t
//   2  for every group, scale (and zero) by the format's rule, kept as f16: the kept values decide what follows
//   3  code = the level nearest to (x - zero) / scale; half way goes to the even code of a grid, to the lower of a table
//
// All in f64: the rows are f16 and the angles products of two f32, so nothing is lost before a rounding of the format.
//
// What is not a number: a block with a NaN or an infinity gets scale = NaN everywhere, so every row read from it is NaN.
// A group whose scale rounds to 0 gets code 0; where f16 has no such number, scale and zero stop at +-65504.
#pragma once
#include "nsn_seal.h"

// A group's scale and zero, from its n values.
inline void scalar_scale(f16 &scale, f16 *zero, ScalarRule rule, int bits, const double *x, int n) {
    double lo = x[0], hi = x[0], extreme = x[0], squares = 0, s = 0;
    for (int i = 0; i < n; i++) {
        lo = std::min(lo, x[i]), hi = std::max(hi, x[i]);
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
        squares += x[i] * x[i];
    }
    switch (rule) {
    case ScalarRule::min_max: s = (hi - lo) / ((1 << bits) - 1); break;
    case ScalarRule::absmax: s = std::fabs(extreme) / ((1 << (bits - 1)) - 1); break;
    case ScalarRule::extreme: s = -extreme / (1 << (bits - 1)); break;
    case ScalarRule::normal4: s = std::sqrt(squares / n); break;
    }
    auto kept = [](double v) { return to_f16((float)std::min(std::max(v, -65504.0), 65504.0)); };
    scale = kept(s);
    if (zero) *zero = kept(lo + 0.0);    // -0 becomes 0
}

// The code of x in units of its scale.
inline int scalar_code(ScalarRule rule, int bits, double x) {
    const int last = (1 << bits) - 1;
    if (rule != ScalarRule::normal4) {
        const double q = std::nearbyint(x - scalar_level(rule, bits, 0));
        return (int)std::min(std::max(q, 0.0), (double)last);
    }
    int best = 0;
    for (int q = 1; q <= last; q++)
        if (std::fabs(x - scalar_level(rule, bits, q)) < std::fabs(x - scalar_level(rule, bits, best))) best = q;
    return best;
}

// rows (KV_BLOCK, d) f16, keys before RoPE -> the fields of a block of zeros.
inline void scalar_seal(const ScalarFields &f, const f16 *rows, const SealPlace &p) {
    const int d = f.d, across = f.groups_across();
    double x[KV_BLOCK * MAX_HEAD_DIM], group[KV_BLOCK * MAX_HEAD_DIM];
    bool finite = true;
    for (int i = 0; i < KV_BLOCK * d; i++) {
        x[i] = to_f32(rows[i]);
        finite = finite && std::isfinite(x[i]);
    }
    if (!finite) {
        for (int g = 0; g < KV_BLOCK / f.tokens * across; g++) f.scale[g] = to_f16(NAN);
        return;
    }
    for (int t = 0; t < KV_BLOCK; t++) {
        double *xt = x + t * d;
        for (int j = 0; j < d / 2 && p.key; j++) {
            const float *base = p.rope.base + (int64_t)(p.pos / KV_BLOCK) * d + j, *step = p.rope.step + t * d + j;    // as rope_angle, in f64
            const double c = (double)base[0] * step[0] - (double)base[d / 2] * step[d / 2], s = (double)base[0] * step[d / 2] + (double)base[d / 2] * step[0];
            const double lo = xt[j], hi = xt[j + d / 2];
            xt[j] = lo * c - hi * s;
            xt[j + d / 2] = lo * s + hi * c;
        }
        if (f.rotated && !(p.ablate & NO_HADAMARD)) hadamard(xt, d);
    }
    for (int t0 = 0; t0 < KV_BLOCK; t0 += f.tokens)
        for (int c0 = 0; c0 < d; c0 += f.channels) {
            const int g = f.group(t0, c0), t1 = t0 + f.tokens, c1 = std::min(d, c0 + f.channels);
            int n = 0;
            for (int t = t0; t < t1; t++)
                for (int c = c0; c < c1; c++) group[n++] = x[t * d + c];
            scalar_scale(f.scale[g], f.zero ? f.zero + g : nullptr, f.rule, f.bits, group, n);
            const double scale = to_f32(f.scale[g]), zero = f.zero ? to_f32(f.zero[g]) : 0;
            if (scale == 0) continue;
            for (int t = t0; t < t1; t++)
                for (int c = c0; c < c1; c++) {
                    const int bit = (t * d + c) * f.bits;
                    f.code[bit / 8] |= (uint8_t)(scalar_code(f.rule, f.bits, (x[t * d + c] - zero) / scale) << bit % 8);
                }
        }
}
