/* embed, gather - pick rows of a table.

   embed    x[n,:] = table[token[n],:]        x (N,D) f32, table (V,D) of any DType
   gather   y[i,:] = x[row[i],:]              y (n_rows,D), x (N,D) f32

   Cost      reads and writes each row once: at most 16 KiB a row for D = 4096, nothing beside the layers.
   Limits    0 <= token[n] < V is the caller's promise (generate and perplexity only make ids of the tokenizer).
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp                                                             */
#include <cstring>
#include "groups.h"

// ---- reference: the CPU backend -----------------------------------------------------------------------
#ifndef __CUDACC__
namespace cpu {

void embed(float *x, Matrix table, const Batch &b, int D) {
    for (int n = 0; n < b.N; n++)
        for (int i = 0; i < D; i++) x[(int64_t)n * D + i] = weight_at(table, (int64_t)b.token[n] * D + i);
}

void gather(float *y, const float *x, const int *row, int n_rows, int D) {
    for (int i = 0; i < n_rows; i++) memcpy(y + (int64_t)i * D, x + (int64_t)row[i] * D, D * sizeof(float));
}
}    // namespace cpu

// ---- CUDA: one thread block a row ---------------------------------------------------------------------
#else
#include "cuda.cuh"
namespace cuda {

__global__ void embed_kernel(float *x, Matrix table, const int *token, int D) {
    const int n = blockIdx.x;
    wait_for_inputs();
    for (int i = threadIdx.x; i < D; i += blockDim.x) x[(int64_t)n * D + i] = weight_at(table, (int64_t)token[n] * D + i);
}

void embed(float *x, Matrix table, const Batch &b, int D) { launch(embed_kernel, dim3(b.N), 256, 0, x, table, b.token, D); }

void gather(float *y, const float *x, const int *row, int n_rows, int D) {
    launch(embed_kernel, dim3(n_rows), 256, 0, y, Matrix{x, DType::f32}, row, D);    // the same, from a table of activations
}
}    // namespace cuda
#endif
