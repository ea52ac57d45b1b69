/* rope - rotary position embedding: channel pairs of a head turned by an angle that grows with the position.

   (x[j], x[j + d/2])  <-  (x[j] c - x[j + d/2] s,  x[j] s + x[j + d/2] c),      c, s = cos, sin(pos[n] freq[j])

   q (N,H,d) f32, in place.  The half layout of Hugging Face checkpoints: pairs (j, j + d/2); checkpoints with
   neighbouring pairs (llama2.c, Meta) are permuted by the converter.

   Source    Su et al., RoFormer (arXiv 2104.09864), section 3.2.2; freq: model.h.
   Cost      reads and writes q once.  Queries only: the cache keeps keys before RoPE (kv_block.h).
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp                                                             */
#include "kv_block.h"

// ---- reference: the CPU backend -----------------------------------------------------------------------
#ifndef __CUDACC__
namespace cpu {

void rope(float *q, const Batch &b, RopeTable table, int H, int d) {
    const int half = d / 2;
#pragma omp parallel for if (b.N > 1)
    for (int n = 0; n < b.N; n++)
        for (int j = 0; j < half; j++) {
            float c, s;
            rope_angle(c, s, table, b.pos[n], j, d);
            for (int h = 0; h < H; h++) {
                float *x = q + ((int64_t)n * H + h) * d;
                const float lo = x[j], hi = x[j + half];
                x[j] = lo * c - hi * s;
                x[j + half] = lo * s + hi * c;
            }
        }
}
}    // namespace cpu

// ---- CUDA: a thread turns a pair ---------------------------------------------------------------------
#else
#include "cuda.cuh"
namespace cuda {

__global__ void rope_kernel(float *q, const int *pos, RopeTable table, int H, int d) {
    const int n = blockIdx.y, half = d / 2;
    wait_for_inputs();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < H * half; i += gridDim.x * blockDim.x) {
        const int h = i / half, j = i % half;
        float c, s;
        rope_angle(c, s, table, pos[n], j, d);
        float *x = q + ((int64_t)n * H + h) * d;
        const float lo = x[j], hi = x[j + half];
        x[j] = lo * c - hi * s;
        x[j + half] = lo * s + hi * c;
    }
}

void rope(float *q, const Batch &b, RopeTable table, int H, int d) {
    launch(rope_kernel, dim3(ceil_div(H * d / 2, 256), b.N), 256, 0, q, b.pos, table, H, d);
}
}    // namespace cuda
#endif
