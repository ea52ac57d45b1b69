/* swiglu - the gate of the feed-forward, after its two products (matmul.cu's gated).

   gate[i] = silu(gate[i]) * up[i],   silu(x) = x / (1 + e^-x)        in place, n = N F

   Source    Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), equation 6.
   Cost      12 bytes an element, beside matrices of F bytes an element: little of a step.  On the CPU 16 lanes
             at a time, because expf() is a call for every element.
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp                                                             */
#include <algorithm>
#include <cmath>
#include "ops.h"

#ifndef __CUDACC__
#include "simd.h"

// ---- reference ----------------------------------------------------------------------------------------
namespace reference {
void swiglu(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}
}    // namespace reference

// ---- the CPU backend ----------------------------------------------------------------------------------
namespace cpu {

// With e = e^-|x|, which never overflows:  silu(x) = x / (1 + e) for x >= 0,  x e / (1 + e) below.
LANE_FUNCTION f32x16 silu16(f32x16 x) {
    f32x16 e = x;
    for (vn &part : e.part) part = part > 0.0f ? -part : part;
    e = exp16(e);
    for (int i = 0; i < PARTS; i++) x.part[i] = x.part[i] * (x.part[i] > 0.0f ? 1.0f - vn{} : e.part[i]) / (1.0f + e.part[i]);
    return x;
}

void swiglu(float *gate, const float *up, int64_t n) {
    const int64_t whole = n / LANES * LANES;
#pragma omp parallel for if (n > 16384)
    for (int64_t i = 0; i < whole; i += LANES) store16(gate + i, silu16(load16(gate + i)) * load16(up + i));
    if (whole < n) {
        float g[LANES] = {}, u[LANES] = {};
        std::copy(gate + whole, gate + n, g);
        std::copy(up + whole, up + n, u);
        store16(g, silu16(load16(g)) * load16(u));
        std::copy(g, g + (n - whole), gate + whole);
    }
}
}    // namespace cpu

// ---- CUDA: one thread an element ------------------------------------------------------------------------
#else
#include "cuda.cuh"
namespace cuda {

__global__ void swiglu_kernel(float *gate, const float *up, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_inputs();
    if (i < n) gate[i] = silu(gate[i]) * up[i];
}

void swiglu(float *gate, const float *up, int64_t n) { launch(swiglu_kernel, dim3(ceil_div(n, 256)), 256, 0, gate, up, n); }
}    // namespace cuda
#endif
