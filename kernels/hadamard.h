// x <- R x.  R = H / sqrt(p), H the Sylvester Hadamard matrix of size p, the largest power of two that divides d; where d
// is larger, R is block diagonal (d = 48: three blocks of 16).  R is symmetric and R R = 1.  d log2 p additions.
#pragma once
#include <cmath>
inline void hadamard(float *x, int d) {
    const int p = d & -d;
    for (int h = 1; h < p; h *= 2)
        for (int i = 0; i < d; i += 2 * h)
            for (int j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    const float scale = 1.0f / sqrtf((float)p);
    for (int i = 0; i < d; i++) x[i] *= scale;
}
