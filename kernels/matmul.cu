/* matmul - activations times a weight matrix: where a decode step spends its time.

   y[n,o] = sum_i x[n,i] W[o,i]          y (N,out), x (N,in) f32;  W (out,in) f32, f16 or bf16, row-major

   Math      On the CPU every y[n,o] is one sum of 16 lanes: lane j adds the products of i = j, j + 16, ... in order, then
             the lanes are added in a fixed tree (dot.h).  Few rows and many rows use the same order, so a row's result does
             not depend on its neighbours.
   Cost      Few rows: each weight is read once, 2 N flops for its 2 or 4 bytes; memory speed is the limit.
             Llama-3-8B in bf16 is 16.1 GB a step.  Many rows: 2 N in out flops; a tile of W is widened to f32 once and
             used by all rows, four rows times four outputs a turn (8 loads for 16 multiply-adds).
   Limits    in, out, N >= 1; any alignment.
   Tested by tests/test_ops.cpp            Timed by ./run model.bin --bench                                          */
#include <algorithm>
#include <vector>
#include "ops.h"

#ifndef __CUDACC__
#include "dot.h"

// ---- reference ----------------------------------------------------------------------------------------
namespace reference {

template <class T> static void matmul_of(float *y, const float *x, const T *W, int N, int in, int out) {
    for (int n = 0; n < N; n++)
        for (int o = 0; o < out; o++) {
            double sum = 0;
            for (int i = 0; i < in; i++) sum += (double)x[(int64_t)n * in + i] * to_f32(W[(int64_t)o * in + i]);
            y[(int64_t)n * out + o] = (float)sum;
        }
}

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) {
    switch (W.type) {
    case DType::f32: return matmul_of(y, x, (const float *)W.data, N, in, out);
    case DType::f16: return matmul_of(y, x, (const f16 *)W.data, N, in, out);
    case DType::bf16: return matmul_of(y, x, (const bf16 *)W.data, N, in, out);
    }
}
}    // namespace reference

// ---- the CPU backend ----------------------------------------------------------------------------------
namespace cpu {

constexpr int64_t SMALL = 1 << 17;    // multiply-adds below which waking the other threads costs more than it saves
constexpr int FEW_ROWS = 4;     // up to here weights go straight from memory to the multiply-add
constexpr int TILE_OUT = 32;    // outputs of a widened tile: 32 x 14,336 f32 (Llama-3-8B w_down) still fits in L2

static void widen(float *to, const float *from, int64_t n) { memcpy(to, from, n * sizeof(float)); }
template <class T> static void widen(float *to, const T *from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store16(to + i, load16(from + i));
    for (; i < n; i++) to[i] = to_f32(from[i]);
}

template <class T> static void matmul_of(float *y, const float *x, const T *W, int N, int in, int out) {
    if (N <= FEW_ROWS) {
#pragma omp parallel for schedule(static) if ((int64_t)N * in * out > SMALL)
        for (int o = 0; o < out; o += DOT_OUT)
            dot_rows(y + o, x, W + (int64_t)o * in, N, std::min(DOT_OUT, out - o), in, out, in, in);
        return;
    }
#pragma omp parallel if ((int64_t)N * in * out > SMALL)
    {
        static thread_local std::vector<float> tile;    // grows to the largest matrix of the model, then stays
        tile.resize(std::max(tile.size(), (size_t)TILE_OUT * in));
#pragma omp for schedule(dynamic)
        for (int o = 0; o < out; o += TILE_OUT) {
            const int n_out = std::min(TILE_OUT, out - o);
            widen(tile.data(), W + (int64_t)o * in, (int64_t)n_out * in);
            dot_rows(y + o, x, tile.data(), N, n_out, in, out, in, in);
        }
    }
}

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) {
    switch (W.type) {
    case DType::f32: return matmul_of(y, x, (const float *)W.data, N, in, out);
    case DType::f16: return matmul_of(y, x, (const f16 *)W.data, N, in, out);
    case DType::bf16: return matmul_of(y, x, (const bf16 *)W.data, N, in, out);
    }
}
}    // namespace cpu
#endif
