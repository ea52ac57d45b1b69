/* embed, gather - pick rows of a table.

   embed    x[n,:] = table[token[n],:]        x (N,D) f32, table (V,D) f32, f16 or bf16
   gather   y[i,:] = x[row[i],:]              y (n_rows,D), x (N,D) f32

   Cost      reads and writes each row once: at most 16 KiB a row for D = 4096, nothing beside the layers.
   Limits    0 <= token[n] < V is the caller's promise (generate and perplexity only make ids of the tokenizer).
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp                                                             */
#include <cstring>
#include "ops.h"

// ---- reference: the CPU backend -----------------------------------------------------------------------
#ifndef __CUDACC__
namespace cpu {

template <class T> static void embed_rows(float *x, const T *table, const Batch &b, int D) {
    for (int n = 0; n < b.N; n++)
        for (int i = 0; i < D; i++) x[(int64_t)n * D + i] = to_f32(table[(int64_t)b.token[n] * D + i]);
}

void embed(float *x, Matrix table, const Batch &b, int D) {
    switch (table.type) {
    case DType::f32: return embed_rows(x, (const float *)table.data, b, D);
    case DType::f16: return embed_rows(x, (const f16 *)table.data, b, D);
    case DType::bf16: return embed_rows(x, (const bf16 *)table.data, b, D);
    }
}

void gather(float *y, const float *x, const int *row, int n_rows, int D) {
    for (int i = 0; i < n_rows; i++) memcpy(y + (int64_t)i * D, x + (int64_t)row[i] * D, D * sizeof(float));
}
}    // namespace cpu

// ---- CUDA: one thread block a row ---------------------------------------------------------------------
#else
#include "cuda.cuh"
namespace cuda {

template <class T> __global__ void embed_kernel(float *x, const T *table, const int *token, int D) {
    const int n = blockIdx.x;
    wait_for_inputs();
    for (int i = threadIdx.x; i < D; i += blockDim.x) x[(int64_t)n * D + i] = to_f32(table[(int64_t)token[n] * D + i]);
}

void embed(float *x, Matrix table, const Batch &b, int D) {
    switch (table.type) {
    case DType::f32: launch(embed_kernel<float>, dim3(b.N), 256, 0, x, (const float *)table.data, b.token, D); break;
    case DType::f16: launch(embed_kernel<f16>, dim3(b.N), 256, 0, x, (const f16 *)table.data, b.token, D); break;
    case DType::bf16: launch(embed_kernel<bf16>, dim3(b.N), 256, 0, x, (const bf16 *)table.data, b.token, D); break;
    }
}

void gather(float *y, const float *x, const int *row, int n_rows, int D) {
    launch(embed_kernel<float>, dim3(n_rows), 256, 0, y, x, row, D);    // the same, from a table of activations
}
}    // namespace cuda
#endif
