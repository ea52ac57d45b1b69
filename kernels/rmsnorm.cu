/* rmsnorm - every row divided by its root mean square, times a learned gain.

   y[n,i] = w[i] x[n,i] / sqrt( mean_i x[n,i]^2 + eps )        x, y (N,D) f32; w (D) f32; y may be x

   Source    Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467), section 3.
   Cost      reads x twice (the second time from the cache), writes y: 12 D bytes a row.
   Precision the squares are added in f64: D of up to 2^17 terms in f32 would lose 2-3 digits.
   On CUDA   few rows have their norms inside the products that follow (gemv.cu), but for weights other than f16.
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp                                                             */
#include <algorithm>
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

// ---- CUDA: one thread block a row ---------------------------------------------------------------------
#else
#include "cuda.cuh"
namespace cuda {

__global__ void __launch_bounds__(1024) rmsnorm_kernel(float *y, const float *x, const float *w, float eps, int D) {
    wait_for_inputs();
    x += (int64_t)blockIdx.x * D, y += (int64_t)blockIdx.x * D;
    double sum = 0;
    for (int i = threadIdx.x; i < D; i += blockDim.x) sum += (double)x[i] * x[i];
    __shared__ double warps[32];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    const double total = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0);
    const float scale = (float)(1.0 / sqrt(total / D + eps));
    for (int i = threadIdx.x; i < D; i += blockDim.x) y[i] = w[i] * (x[i] * scale);
}

void rmsnorm(float *y, const float *x, const float *w, float eps, int N, int D) {
    const int threads = (int)std::min<int64_t>(1024, ceil_div(D, 128) * 32);    // four channels a thread, if they are enough
    launch(rmsnorm_kernel, dim3(N), threads, 0, y, x, w, eps, D);
}
}    // namespace cuda
#endif
