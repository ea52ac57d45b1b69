// dot.h - rows times rows, the inner loop of matmul and of attention scores on the CPU.
//
// Every result is one sum of 16 lanes: lane j adds the products of i = j, j + 16, ... in order, then the lanes are added
// in a fixed tree (simd.h).  How many rows and outputs are taken together changes the speed, never a bit.
//
// A single row is as fast as W arrives.  Rows of W are short (1 KB at D = 512 in bf16), so the hardware's own prefetch starts
// anew with each; the rows of the next turn are asked for while these are in work.
// ./run books-46m.bin --bench -n 48 --prompt-tokens 64 -t 2, bf16: 70% of the read bandwidth without, 88% with.
#pragma once
#include <cstring>
#include "simd.h"

constexpr int CACHE_LINE = 64;    // bytes

#ifdef __AVX512F__
constexpr int DOT_OUT = 4, DOT_ROWS = 4;    // sums of a turn: 16 of 32 registers, 8 loads for 16 multiply-adds
#else
constexpr int DOT_OUT = 4, DOT_ROWS = 1;    // a 16-lane sum is two registers or more, and there are 16
#endif

template <class T> LANE_FUNCTION f32x16 load_tail(const T *p, int n) {
    T a[LANES] = {};
    for (int i = 0; i < n; i++) a[i] = p[i];
    return load16(a);
}

// y[r,c] = the sum of the lanes of sum[r][c]
template <int R, int C> LANE_FUNCTION void store_sums(float *y, const f32x16 (&sum)[R][C], int64_t y_stride) {
    for (int r = 0; r < R; r++) {
        float *to = y + r * y_stride;
        if (C == 4) {
            const v4 four = sum4(fold16(sum[r][0]), fold16(sum[r][1 % C]), fold16(sum[r][2 % C]), fold16(sum[r][3 % C]));
            memcpy(to, &four, sizeof four);
        } else
            for (int c = 0; c < C; c++) to[c] = sum16(sum[r][c]);
    }
}

// y[r,c] = sum_i x[r,i] W[c,i] for R rows and C outputs; rows of x, W and y are x_stride, W_stride, y_stride apart.
template <int R, int C, class T>
LANE_FUNCTION void dot_tile(float *y, const float *x, const T *W, int n, int64_t y_stride, int64_t x_stride, int64_t W_stride) {
    f32x16 sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = splat16(0.0f);
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 w[C];
        if (R == 1 && i % (CACHE_LINE / (int)sizeof(T)) == 0)    // one row waits for memory
            for (int c = 0; c < C; c++) __builtin_prefetch(W + (C + c) * W_stride + i);
        for (int c = 0; c < C; c++) w[c] = load16(W + c * W_stride + i);
        for (int r = 0; r < R; r++) {
            const f32x16 xr = load16(x + r * x_stride + i);
            for (int c = 0; c < C; c++) add_product(sum[r][c], xr, w[c]);
        }
    }
    if (i < n)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                add_product(sum[r][c], load_tail(x + r * x_stride + i, n - i), load_tail(W + c * W_stride + i, n - i));
    store_sums(y, sum, y_stride);
}

// The same for numbers of rows and outputs known only now.
template <class T>
static void dot_rows(float *y, const float *x, const T *W, int rows, int outs, int n, int64_t y_stride, int64_t x_stride, int64_t W_stride) {
    int c = 0;
    for (; c + DOT_OUT <= outs; c += DOT_OUT) {
        int r = 0;
        for (; r + DOT_ROWS <= rows; r += DOT_ROWS)
            dot_tile<DOT_ROWS, DOT_OUT>(y + r * y_stride + c, x + r * x_stride, W + c * W_stride, n, y_stride, x_stride, W_stride);
        for (; r < rows; r++)
            dot_tile<1, DOT_OUT>(y + r * y_stride + c, x + r * x_stride, W + c * W_stride, n, y_stride, x_stride, W_stride);
    }
    for (; c < outs; c++)
        for (int r = 0; r < rows; r++)
            dot_tile<1, 1>(y + r * y_stride + c, x + r * x_stride, W + c * W_stride, n, y_stride, x_stride, W_stride);
}
