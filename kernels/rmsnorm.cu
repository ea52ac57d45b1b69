/* rmsnorm - every row divided by its root mean square, times a learned gain.

   y[n,i] = w[i] x[n,i] / sqrt( mean_i x[n,i]^2 + eps )        x, y (N,D) f32; w (D) f32; y may be x

   Source    Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467), section 3.
   Cost      reads x twice (the second time from the cache), writes y: 12 D bytes a row.
   Precision the squares are added in f64: D of up to 2^17 terms in f32 would lose 2-3 digits.
   Tested by tests/test_ops.cpp                                                                                  */
#include <cmath>
#include "ops.h"

// ---- reference: the CPU backend -----------------------------------------------------------------------
#ifndef __CUDACC__
namespace cpu {

void rmsnorm(float *y, const float *x, const float *w, float eps, int N, int D) {
#pragma omp parallel for if (N > 1)
    for (int n = 0; n < N; n++) {
        const float *xn = x + (int64_t)n * D;
        float *yn = y + (int64_t)n * D;
        double sum[8] = {};    // eight running sums: one would wait for every addition
        for (int i = 0; i < D; i++) sum[i % 8] += (double)xn[i] * xn[i];
        double total = 0;
        for (double s : sum) total += s;
        const float scale = (float)(1.0 / sqrt(total / D + eps));
        for (int i = 0; i < D; i++) yn[i] = w[i] * (xn[i] * scale);
    }
}
}    // namespace cpu
#endif
