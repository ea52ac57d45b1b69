// x <- R x.  R = H / sqrt(p), H the Sylvester Hadamard matrix of size p, the largest power of two that divides d; where d
// is larger, R is block diagonal (d = 48: three blocks of 16).  R is symmetric and R R = 1.  d log2 p additions.
#pragma once
#include <cmath>
// Here of n vectors at once, x (d, n).
template <class Float> inline void hadamard_rows(Float *x, int d, int n) {
    const int p = d & -d;
    for (int h = 1; h < p; h *= 2)
        for (int i = 0; i < d; i += 2 * h)
            for (int j = i * n; j < (i + h) * n; j++) {
                const Float a = x[j], b = x[j + h * n];
                x[j] = a + b;
                x[j + h * n] = a - b;
            }
    const Float scale = 1 / std::sqrt((Float)p);
    for (int i = 0; i < d * n; i++) x[i] *= scale;
}
template <class Float> inline void hadamard(Float *x, int d) { hadamard_rows(x, d, 1); }
