// scalar_seal.h - one block of 64 rows into the scalar codes of kv_baselines.h: the reference, and the CPU backend.
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
#include "nsn_seal.h"

inline f16 kept(double v) { return to_f16((float)(v > 65504.0 ? 65504.0 : v < -65504.0 ? -65504.0 : v)); }

// A group's scale and zero, from its n values.
inline void scalar_scale(double &scale, double &zero, ScalarRule rule, int bits, const double *x, int n) {
    double lo = x[0], hi = x[0], extreme = x[0], squares = 0;
    scale = 0;
    for (int i = 0; i < n; i++) {
        lo = std::min(lo, x[i]), hi = std::max(hi, x[i]);
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
        squares += x[i] * x[i];
    }
    zero = scalar_has_zero(rule) ? lo + 0.0 : 0.0;    // + 0: never -0
    switch (rule) {
    case ScalarRule::min_max: case ScalarRule::calibrated: scale = (hi - lo) / ((1 << bits) - 1); break;
    case ScalarRule::absmax: scale = std::fabs(extreme) / ((1 << (bits - 1)) - 1); break;
    case ScalarRule::extreme: scale = -extreme / (1 << (bits - 1)); break;
    case ScalarRule::normal4: scale = std::sqrt(squares / n); break;
    case ScalarRule::nf4: scale = std::fabs(extreme); break;
    }
}

// The code of x in units of its scale.
inline int scalar_code(ScalarRule rule, int bits, double x) {
    const int last = (1 << bits) - 1;
    if (rule != ScalarRule::normal4 && rule != ScalarRule::nf4) {
        const double q = std::nearbyint(x - scalar_level(rule, bits, 0));
        return (int)std::min(std::max(q, 0.0), (double)last);
    }
    int best = 0;
    for (int q = 1; q <= last; q++)
        if (std::fabs(x - scalar_level(rule, bits, q)) < std::fabs(x - scalar_level(rule, bits, best))) best = q;
    return best;
}

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

// ---- deco4's matrix -------------------------------------------------------------------------------------
//   X = U S V^T (rows of w = basis_width(d) channels);   X^T X = V S^2 V^T;   matrix = S V^T / sqrt(rows), f16
// Divided by sqrt(rows) it has the size of X, and the scales of U take up the factor.  From the kept matrix M alone,
//   U_i = <x, M_i> / |M_i|^2, 0 where M_i is.

// a (w, w) symmetric -> its eigenvalues on the diagonal, eigenvectors in the columns of v: cyclic Jacobi rotations.
inline void eigen(double *a, double *v, int w) {
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

// basis (w, w) from one block of all heads, rows (Hkv, KV_BLOCK, d).  Largest first; the largest entry of a row is positive.
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
    if (!finite) {
        for (int i = 0; i < w * w; i++) basis[i] = to_f16(NAN);
        return;
    }
    eigen(gram, v, w);
    bool taken[16] = {};
    for (int i = 0; i < w; i++) {
        int e = -1, top = 0;
        for (int k = 0; k < w; k++)
            if (!taken[k] && (e < 0 || gram[k * w + k] > gram[e * w + e])) e = k;
        taken[e] = true;
        for (int c = 1; c < w; c++)
            if (std::fabs(v[c * w + e]) > std::fabs(v[top * w + e])) top = c;
        const double s = std::sqrt(std::max(gram[e * w + e], 0.0)) * (v[top * w + e] < 0 ? -1 : 1);
        for (int c = 0; c < w; c++) basis[i * w + c] = kept(s * v[c * w + e]);
    }
}

// x (KV_BLOCK, d) <- U
inline void whiten(double *x, const f16 *basis, int d) {
    const int w = basis_width(d);
    double m[256], inverse[16], u[16];
    for (int i = 0; i < w; i++) {
        double norm = 0;
        for (int c = 0; c < w; c++) m[i * w + c] = to_f32(basis[i * w + c]), norm += m[i * w + c] * m[i * w + c];
        inverse[i] = norm > 0 ? 1 / norm : 0;
    }
    for (int r = 0; r < KV_BLOCK * d; r += w) {
        for (int i = 0; i < w; i++) {
            u[i] = 0;
            for (int c = 0; c < w; c++) u[i] += x[r + c] * m[i * w + c];
        }
        for (int i = 0; i < w; i++) x[r + i] = u[i] * inverse[i];
    }
}

// ---- the block ------------------------------------------------------------------------------------------
// rows (KV_BLOCK, d) f16, keys before RoPE -> the fields of a block of zeros.
inline void scalar_seal(const ScalarFields &f, const f16 *rows, const SealPlace &p) {
    const int d = f.d, across = f.groups_across();
    double x[KV_BLOCK * MAX_HEAD_DIM], group[KV_BLOCK * MAX_HEAD_DIM];
    if (!p.shares) memset(f.code, 0, KV_BLOCK * d * f.bits / 8);
    if (!widen_rows(x, rows, d, p)) {
        for (int g = 0; g < KV_BLOCK / f.tokens * across; g++) f.scale[g] = to_f16(NAN);
        return;
    }
    if (f.rotated && !(p.ablate & NO_HADAMARD))
        for (int t = 0; t < KV_BLOCK; t++) hadamard(x + t * d, d);
    if (f.basis) whiten(x, f.basis, d);
    for (int t0 = 0; t0 < KV_BLOCK; t0 += f.tokens)
        for (int c0 = 0; c0 < d; c0 += f.channels) {
            const int g = f.group(t0, c0), t1 = t0 + f.tokens, c1 = std::min(d, c0 + f.channels);
            int n = 0;
            for (int t = t0; t < t1; t++)
                for (int c = c0; c < c1; c++) group[n++] = x[t * d + c];
            double scale, zero;
            scalar_scale(scale, zero, f.rule, f.bits, group, n);
            f.scale[g] = kept(scale);
            scale = to_f32(f.scale[g]);
            if (f.zero) f.zero[g] = kept(zero), zero = to_f32(f.zero[g]);
            for (int t = t0; t < t1 && scale != 0 && !p.shares; t++)
                for (int c = c0; c < c1; c++) {
                    const int bit = (t * d + c) * f.bits;
                    f.code[bit / 8] |= (uint8_t)(scalar_code(f.rule, f.bits, (x[t * d + c] - zero) / scale) << bit % 8);
                }
            if (f.rule == ScalarRule::calibrated) {
                const double eta = f.bits == 1 ? 1.0 / 6 : 0.045;
                f.zero[g] = kept(zero + eta * scale * ((1 << f.bits) - 1)), f.scale[g] = kept((1 - 2 * eta) * scale);
            }
        }
}
