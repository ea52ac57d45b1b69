// gemv.cuh - what matmul.cu asks of gemv.cu and gemm_batch.cu: products of few rows and of a batch's.
#pragma once
#include <algorithm>
#include "groups.h"
#include "mma.cuh"

namespace cuda {

constexpr int MAX_PRODUCTS = 3;

// What a launch multiplies x with.  Outputs are counted through the matrices; for gated, which has gate and up, through one.
struct Products {
    Matrix W[MAX_PRODUCTS];        // of one type
    float *y[MAX_PRODUCTS];
    int out[MAX_PRODUCTS];         // 0: no such product
    bool add = false, gated = false;
    Norm norm = {};                // of x, first; weight null: none
    bool leaves = false;           // the next product is of y
    Norm next = {};                // with this norm

    // A warp or thread block multiplies tiles of ROWS rows of weights: as many outputs of a matrix, or half as many of gate and of up.
    struct Row { int m, o; };      // output o of matrix m
    template <int ROWS> HD int tile_outs() const { return gated ? ROWS / 2 : ROWS; }
    template <int ROWS> HD int tiles(int m) const { return gated ? (out[m] + ROWS / 2 - 1) / (ROWS / 2) : (out[m] + ROWS - 1) / ROWS; }
    template <int ROWS> HD int tiles() const { return gated ? tiles<ROWS>(0) : tiles<ROWS>(0) + tiles<ROWS>(1) + tiles<ROWS>(2); }
    template <int ROWS> __device__ Row first_of(int tile) const {
        int m = 0;
        if (!gated)
            while (m + 1 < MAX_PRODUCTS && tile >= tiles<ROWS>(m)) tile -= tiles<ROWS>(m++);
        return {m, tile * tile_outs<ROWS>()};
    }
    // Row r of the tile whose first is `first`; behind its matrix's last output, the last.
    template <int ROWS> __device__ Row row_of(Row first, int r) const {
        if (gated) return {r / (ROWS / 2), min(first.o + r % (ROWS / 2), out[0] - 1)};
        return {first.m, min(first.o + r, out[first.m] - 1)};
    }
    // Of output r of a tile and row n of x; null: there is none.
    template <int ROWS> __device__ float *result_of(int tile, int r, int n) const {
        const Row first = first_of<ROWS>(tile);
        return first.o + r < out[first.m] ? y[first.m] + (int64_t)n * out[first.m] + first.o + r : nullptr;
    }
    template <class T> __device__ const T *weights_of(Row row, int in) const { return (const T *)W[row.m].data + (int64_t)row.o * in; }
};

// Which tiles are whose: some thread blocks, the first ones, have one more than the others.  (Without a division: weights are asked for
// as soon as it is known which.)
struct Tiles {
    int each, more, n;
    explicit Tiles(int tiles) : n(std::min(sm_count, tiles)) { each = tiles / n, more = tiles % n; }
    dim3 blocks() const { return dim3(n); }
    __device__ int begin() const { return blockIdx.x * each + min((int)blockIdx.x, more); }
    __device__ int end() const { return begin() + each + ((int)blockIdx.x < more); }
};

// Two numbers as high and low halves:
//   x = 16 (high + low / 2048)      both f16: 22 bits of x from 2^20 down to 2^-10, and 2^-32 below
// x that is to be normalised may have any size in between: s g x is off by 2^-22 of itself or by s 2^-32, and s is at most
// 1 / rms(x), so the latter is 2^-22 of the mean normalised value or less as long as rms(x) >= 2^-10.
__device__ inline void split_f16(unsigned &high, unsigned &low, float x0, float x1) {
    x0 *= 0.0625f, x1 *= 0.0625f;
    const __half2 h = __floats2half2_rn(x0, x1);
    const float2 back = __half22float2(h);
    memcpy(&high, &h, 4);
    low = pack((x0 - back.x) * 2048.0f, (x1 - back.y) * 2048.0f);
}

__device__ inline float4 operator*(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ inline float add_squares(float4 a, float sum) { return fmaf(a.w, a.w, fmaf(a.z, a.z, fmaf(a.y, a.y, fmaf(a.x, a.x, sum)))); }
// The norm's weights come to L2 while x is awaited.  By so many threads.
__device__ inline void ask_for_gain(Norm norm, int in, int threads) {
    for (int k = threadIdx.x * 32; norm.weight && k < in; k += threads * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(norm.weight + k));
}
// 16 bytes to shared memory; of the 256 around them the rest comes to L2: it is the next lanes', warps' or steps'.
__device__ inline void copy_weights(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}

// N <= FEW_ROWS; a row's bits do not depend on N or on the other rows.  Where gemm_batch serves, too, it is the faster one from GEMV_ROWS on.
constexpr int GEMV_ROWS = 4;
void gemv(const Products &p, const float *x, int N, int in);
bool gemv_norms(DType type, int in);    // it takes the norm, too

// gemm_batch.cu: more than GEMV_ROWS and up to BATCH_ROWS rows.  A row's bits do not depend on the others, but they are not gemv's.
bool gemm_batch_serves(DType type, int N, int in);    // if all weights are of this type; it takes the norm, too
void gemm_batch(const Products &p, const float *x, int N, int in);

// Weights in q8 and q4.  gemv_groups.cu: up to FEW_ROWS rows, takes the norm, too, as gemv; matmul_groups.cu: any in, without norm.
bool gemv_groups_serves(DType type, int in);
void gemv_groups(const Products &p, const float *x, int N, int in);
void gemv_groups_any(const Products &p, const float *x, int N, int in);
// Rows [first, first + rows) of W (.., in) become f16, to (rows, in): exactly those of q4, rounded those of q8.
void widen_groups(f16 *to, const Matrix &W, int64_t first, int64_t rows, int in);
}    // namespace cuda
