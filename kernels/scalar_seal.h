// scalar_seal.h - one block of 64 rows into the scalar codes of kv_baselines.h: the reference and CPU backend, and the steps
// of it that the GPU (kv_seal_scalar.cu) shares.
//
//   1  keys: x_t = RoPE_t(x_t);  rotated formats: x_t = H x_t;  deco4: x_t = U, below
//   2  for every group, scale (and zero) by the format's rule, kept as f16: the kept values decide what follows
//   3  code = the level nearest to (x - zero) / scale; half way goes to the even code of a grid, to the lower of a table
//   4  calibrated: zero and scale move in by eta and are kept so
//
// All in f64: the rows are f16 and the angles products of two f32, so nothing is lost before a rounding of the format.
//
// What is not a number: a block with a NaN or an infinity gets scale = NaN everywhere, so every row read from it is NaN.
// A group whose scale rounds to 0 gets code 0; where f16 has no such number, scale and zero stop at +-65504.
#pragma once
#include <cmath>
#include "kv_block.h"

HD f16 kept(double v) {
    if (v != v) return f16{0x7e00};    // the same NaN on both backends
    return to_f16((float)(v > 65504.0 ? 65504.0 : v < -65504.0 ? -65504.0 : v));
}

// ---- a group ----------------------------------------------------------------------------------------------
// The tokens and channels of group g.
struct GroupSpan { int t0, t1, c0, c1; };
HD GroupSpan group_span(const ScalarFields &f, int g) {
    const int t0 = g / f.groups_across() * f.tokens, c0 = g % f.groups_across() * f.channels, c1 = c0 + f.channels;
    return {t0, t0 + f.tokens, c0, c1 < f.d ? c1 : f.d};
}

// Step 2 for group g of x (KV_BLOCK, d): into f.scale[g] and f.zero[g].
HD void keep_scale(const ScalarFields &f, const double *x, int g) {
    const GroupSpan s = group_span(f, g);
    double lo = x[s.t0 * f.d + s.c0], hi = lo, extreme = lo, squares = 0, scale = 0;
    for (int t = s.t0; t < s.t1; t++)
        for (int c = s.c0; c < s.c1; c++) {
            const double v = x[t * f.d + c];
            lo = v < lo ? v : lo, hi = hi < v ? v : hi;
            if (std::fabs(v) > std::fabs(extreme)) extreme = v;
            squares += v * v;
        }
    switch (f.rule) {
    case ScalarRule::min_max: case ScalarRule::calibrated: scale = (hi - lo) / ((1 << f.bits) - 1); break;
    case ScalarRule::absmax: scale = std::fabs(extreme) / ((1 << (f.bits - 1)) - 1); break;
    case ScalarRule::extreme: scale = -extreme / (1 << (f.bits - 1)); break;
    case ScalarRule::normal4: scale = std::sqrt(squares / ((s.t1 - s.t0) * (s.c1 - s.c0))); break;
    case ScalarRule::nf4: scale = std::fabs(extreme); break;
    }
    f.scale[g] = kept(scale);
    if (f.zero) f.zero[g] = kept(lo + 0.0);    // + 0: never -0
}
HD double kept_scale(const ScalarFields &f, int g) { return to_f32(f.scale[g]); }
HD double kept_zero(const ScalarFields &f, int g) { return f.zero ? to_f32(f.zero[g]) : 0.0; }

// Step 3: the code of x, which is (value - zero) / scale.
HD int scalar_code(ScalarRule rule, int bits, double x) {
    const int last = (1 << bits) - 1;
    if (rule != ScalarRule::normal4 && rule != ScalarRule::nf4) {
        const double q = std::nearbyint(x - scalar_level(rule, bits, 0));
        return q > 0 ? (q < last ? (int)q : last) : 0;
    }
    int best = 0;
    for (int q = 1; q <= last; q++)
        if (std::fabs(x - scalar_level(rule, bits, q)) < std::fabs(x - scalar_level(rule, bits, best))) best = q;
    return best;
}

// Step 4 for group g, when its codes are chosen.
HD void calibrate_scale(const ScalarFields &f, int g) {
    const double eta = f.bits == 1 ? 1.0 / 6 : 0.045, scale = kept_scale(f, g), zero = kept_zero(f, g);
    f.zero[g] = kept(zero + eta * scale * ((1 << f.bits) - 1)), f.scale[g] = kept((1 - 2 * eta) * scale);
}

// ---- deco4's matrix -------------------------------------------------------------------------------------
//   X = U S V^T (rows of w = basis_width(d) channels);   X^T X = V S^2 V^T;   matrix = S V^T / sqrt(rows), f16
// Divided by sqrt(rows) it has the size of X, and the scales of U take up the factor.  From the kept matrix M alone,
//   U_i = <x, M_i> / |M_i|^2, 0 where M_i is.

// a (w, w) symmetric -> its eigenvalues on the diagonal, eigenvectors in the columns of v: cyclic Jacobi rotations.
HD void eigen(double *a, double *v, int w) {
    for (int i = 0; i < w * w; i++) v[i] = i % (w + 1) == 0;
    for (int sweep = 0; sweep < 20; sweep++)    // 16 x 16 takes 6 to 8; a rotation by nothing changes nothing
        for (int p = 0; p < w; p++)
            for (int q = p + 1; q < w; q++) {
                if (a[p * w + q] == 0) continue;
                const double theta = (a[q * w + q] - a[p * w + p]) / (2 * a[p * w + q]);
                const double t = (theta < 0 ? -1 : 1) / (std::fabs(theta) + std::sqrt(theta * theta + 1)), c = 1 / std::sqrt(t * t + 1), s = t * c;
                auto turn = [&](double &x, double &y) {
                    const double old = x;
                    x = c * old - s * y, y = s * old + c * y;
                };
                for (int k = 0; k < w; k++) turn(a[k * w + p], a[k * w + q]);
                for (int k = 0; k < w; k++) turn(a[p * w + k], a[q * w + k]);
                for (int k = 0; k < w; k++) turn(v[k * w + p], v[k * w + q]);
            }
}

// basis (w, w) <- gram = X^T X / rows (w, w), which is used up; v (w, w) scratch.  Largest first; the largest entry of a row is
// positive.
HD void keep_basis(f16 *basis, double *gram, double *v, int w) {
    eigen(gram, v, w);
    unsigned taken = 0;    // bit k: eigenvalue k has its row
    for (int i = 0; i < w; i++) {
        int e = -1, top = 0;
        for (int k = 0; k < w; k++)
            if (!(taken >> k & 1) && (e < 0 || gram[k * w + k] > gram[e * w + e])) e = k;
        taken |= 1u << e;
        for (int c = 1; c < w; c++)
            if (std::fabs(v[c * w + e]) > std::fabs(v[top * w + e])) top = c;
        const double square = gram[e * w + e], s = std::sqrt(square > 0 ? square : 0.0) * (v[top * w + e] < 0 ? -1 : 1);
        for (int c = 0; c < w; c++) basis[i * w + c] = kept(s * v[c * w + e]);
    }
}

// 1 / |M_i|^2 of a row (w) of the kept matrix, 0 where it is 0.
HD double inverse_square(const f16 *row, int w) {
    double norm = 0;
    for (int c = 0; c < w; c++) norm += (double)to_f32(row[c]) * to_f32(row[c]);
    return norm > 0 ? 1 / norm : 0;
}
// x (w) <- U, with the matrix widened to m (w, w) and inverse_square of its rows in inverse (w).
HD void whiten(double *x, const double *m, const double *inverse, int w) {
    double u[16];
    for (int i = 0; i < w; i++) {
        u[i] = 0;
        for (int c = 0; c < w; c++) u[i] += x[c] * m[i * w + c];
    }
    for (int i = 0; i < w; i++) x[i] = u[i] * inverse[i];
}

// ---- reference: the block -----------------------------------------------------------------------------
#ifndef __CUDACC__
#include "nsn_seal.h"

// x (KV_BLOCK, d) <- rows, keys after RoPE.  False: something in it is not finite.
inline bool widen_rows(double *x, const f16 *rows, int d, const SealPlace &p) {
    bool finite = true;
    for (int i = 0; i < KV_BLOCK * d; i++) {
        x[i] = to_f32(rows[i]);
        finite = finite && std::isfinite(x[i]);
    }
    for (int t = 0; t < KV_BLOCK && p.key; t++)
        for (int j = 0; j < d / 2; j++) {
            double c, s;
            rope_angle(c, s, p.rope, p.pos + t, j, d);
            double &lo = x[t * d + j], &hi = x[t * d + j + d / 2], a = lo, b = hi;
            lo = a * c - b * s;
            hi = a * s + b * c;
        }
    return finite;
}

// deco4's basis (w, w) from one block of all heads, rows (Hkv, KV_BLOCK, d).
inline void learn_basis(f16 *basis, const f16 *rows, int Hkv, int d, const SealPlace &p) {
    const int w = basis_width(d), n = Hkv * KV_BLOCK * d / w;
    double x[KV_BLOCK * MAX_HEAD_DIM], gram[256] = {}, v[256];
    bool finite = true;
    for (int h = 0; h < Hkv; h++) {
        finite = widen_rows(x, rows + (int64_t)h * KV_BLOCK * d, d, p) && finite;
        for (int r = 0; r < KV_BLOCK * d; r += w)
            for (int i = 0; i < w; i++)
                for (int j = 0; j < w; j++) gram[i * w + j] += x[r + i] * x[r + j] / n;
    }
    if (finite) keep_basis(basis, gram, v, w);
    else
        for (int i = 0; i < w * w; i++) basis[i] = kept(NAN);
}

// rows (KV_BLOCK, d) f16, keys before RoPE -> the fields of a block of zeros.
inline void scalar_seal(const ScalarFields &f, const f16 *rows, const SealPlace &p) {
    const int d = f.d, groups = KV_BLOCK / f.tokens * f.groups_across();
    double x[KV_BLOCK * MAX_HEAD_DIM];
    if (!p.shares) memset(f.code, 0, KV_BLOCK * d * f.bits / 8);
    if (!widen_rows(x, rows, d, p)) {
        for (int g = 0; g < groups; g++) f.scale[g] = kept(NAN);
        return;
    }
    if (f.rotated && !(p.ablate & NO_HADAMARD))
        for (int t = 0; t < KV_BLOCK; t++) hadamard(x + t * d, d);
    if (f.basis) {
        const int w = basis_width(d);
        double m[256], inverse[16];
        for (int i = 0; i < w * w; i++) m[i] = to_f32(f.basis[i]);
        for (int i = 0; i < w; i++) inverse[i] = inverse_square(f.basis + i * w, w);
        for (int r = 0; r < KV_BLOCK * d; r += w) whiten(x + r, m, inverse, w);
    }
    for (int g = 0; g < groups; g++) {
        keep_scale(f, x, g);
        const GroupSpan s = group_span(f, g);
        const double scale = kept_scale(f, g), zero = kept_zero(f, g);
        for (int t = s.t0; t < s.t1 && scale != 0 && !p.shares; t++)
            for (int c = s.c0; c < s.c1; c++) {
                const int bit = (t * d + c) * f.bits;
                f.code[bit / 8] |= (uint8_t)(scalar_code(f.rule, f.bits, (x[t * d + c] - zero) / scale) << bit % 8);
            }
        if (f.rule == ScalarRule::calibrated) calibrate_scale(f, g);
    }
}
#endif
