// groups.cuh - what matmul asks of matmul_groups.cu: products with weights in q8 and q4 (groups.h).
#pragma once
#include "cuda.cuh"
#include "groups.h"

namespace cuda {

constexpr int MAX_GROUP_PRODUCTS = 3;

// Products of one x, outputs counted through: matrices of one type, q8 or q4.
struct GroupProducts {
    Matrix W[MAX_GROUP_PRODUCTS];    // (out[m], in)
    float *y[MAX_GROUP_PRODUCTS];    // (N, out[m])
    int out[MAX_GROUP_PRODUCTS];     // 0 where there is no matrix
    int outs;                        // their sum; for gated, of one of the two
    bool add;                        // y += instead of y =
    bool gated;                      // y[0] = silu(x W[0]^T) * (x W[1]^T)
    // Output o: which matrix; o becomes its row.  gated: the caller says which.
    __device__ int matrix_of(int &o) const {
        int m = 0;
        while (m + 1 < MAX_GROUP_PRODUCTS && o >= out[m]) o -= out[m++];
        return m;
    }
    __device__ void store(float value, int o, int n) const {
        const int m = gated ? 0 : matrix_of(o);
        float *to = y[m] + (int64_t)n * out[m] + o;
        *to = add ? *to + value : value;
    }
};

constexpr int MAX_GROUP_ROWS = 8;
// x (N, in) f32, 1 <= N <= MAX_GROUP_ROWS; a row's bits do not depend on N or on the other rows.
void gemv_groups(const GroupProducts &p, const float *x, int N, int in);
// Rows [first, first + rows) of W (.., in) become f16, to (rows, in): exactly those of q4, rounded those of q8.
void widen_groups(f16 *to, const Matrix &W, int64_t first, int64_t rows, int in);
}    // namespace cuda
