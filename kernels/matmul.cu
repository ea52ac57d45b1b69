/* matmul - activations times a weight matrix: where a decode step spends its time.

   y[n,o] = sum_i x[n,i] W[o,i]          y (N,out), x (N,in) f32;  W (out,in) f32, f16 or bf16, row-major

   Math      On the CPU every y[n,o] is one sum of 16 lanes: lane j adds the products of i = j, j + 16, ... in order, then
             the lanes are added in a fixed tree (dot.h).  Few rows and many rows use the same order, so a row's result does
             not depend on its neighbours.
   Cost      Few rows: each weight is read once, 2 N flops for its 2 or 4 bytes; memory speed is the limit.
             Llama-3-8B in bf16 is 16.1 GB a step.  Many rows: 2 N in out flops; a tile of W is widened to f32 once and
             used by all rows, four rows times four outputs a turn (8 loads for 16 multiply-adds).
   On CUDA   Up to GEMV_ROWS rows: a kernel of ours at memory speed, f32 activations, one order of addition for any number
             of rows.  More rows: cuBLAS, sums in f32; activations stay f32 for f32 weights, are rounded to f16 for f16, and are
             split into two bf16 numbers for bf16, each with a product of its own.  cuBLAS chooses its order by the shape, so
             there, and only there, a row's last bits depend on the number of rows.
             Tried: activations in one bf16: half the work, but logits of the golden bf16 models are off by 6e-3 to 1e-2, and
             the PPL of books-5m moves by 0.037%; with two by 0.0005%.
   Limits    in, out, N >= 1; any alignment on the CPU, weights and rows of x aligned to 16 bytes on CUDA where in is a
             multiple of 8.  Many rows with f16 weights on CUDA: |x| < 65,520.
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp            Timed by ./run model.bin --bench                     */
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

// ---- CUDA -------------------------------------------------------------------------------------------------
#else
#include <cublas_v2.h>
#include "cuda.cuh"
namespace cuda {

constexpr int GEMV_ROWS = 8;        // up to here weights are read once by our own kernel, activations stay f32
constexpr int GEMV_THREADS = 128;   // a thread block adds up GEMV_OUT outputs; its threads share the inputs
constexpr int GEMV_OUT = 4;         // 4 weight loads of 16 bytes in flight a thread, and 4 uses of every activation
constexpr int CHUNK = 8;            // neighbouring inputs of a thread: 16 bytes of f16 or bf16

// Eight weights as f32.
__device__ inline void widen8(float (&w)[CHUNK], const float *p) {
    const float4 a = __ldcs((const float4 *)p), b = __ldcs((const float4 *)p + 1);
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
}
__device__ inline void widen8(float (&w)[CHUNK], uint4 u, f16) {
    const unsigned word[4] = {u.x, u.y, u.z, u.w};
    for (int i = 0; i < 4; i++) {
        __half2 h;
        memcpy(&h, &word[i], 4);
        const float2 f = __half22float2(h);
        w[2 * i] = f.x, w[2 * i + 1] = f.y;
    }
}
__device__ inline void widen8(float (&w)[CHUNK], uint4 u, bf16) {
    const unsigned word[4] = {u.x, u.y, u.z, u.w};
    for (int i = 0; i < 4; i++) w[2 * i] = __uint_as_float(word[i] << 16), w[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
}

// The products of inputs k..k+7 for all outputs and rows of the thread block.
template <int R, class T>
__device__ inline void add_chunk(float (&sum)[GEMV_OUT][R], const float *x, const T *W, int k, int in, int N, int n_out) {
    float w[GEMV_OUT][CHUNK];
    if constexpr (sizeof(T) == 2) {
        uint4 raw[GEMV_OUT];
        for (int o = 0; o < GEMV_OUT; o++) raw[o] = __ldcs((const uint4 *)(W + (int64_t)min(o, n_out - 1) * in + k));
        for (int o = 0; o < GEMV_OUT; o++) widen8(w[o], raw[o], T());
    } else
        for (int o = 0; o < GEMV_OUT; o++) widen8(w[o], W + (int64_t)min(o, n_out - 1) * in + k);
#pragma unroll
    for (int r = 0; r < R; r++) {
        const float4 *xr = (const float4 *)(x + (int64_t)min(r, N - 1) * in + k);
        const float4 a = __ldg(xr), b = __ldg(xr + 1);
        const float xs[CHUNK] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int o = 0; o < GEMV_OUT; o++)
#pragma unroll
            for (int i = 0; i < CHUNK; i++) sum[o][r] = fmaf(xs[i], w[o][i], sum[o][r]);
    }
}

// Outputs o..o+3 of all N <= R rows.  Thread t adds the products of inputs 8 t .. 8 t + 7, then 1,024 further, and so on;
// lanes, then warps are added in a fixed tree.  R and the row's place in it do not enter a sum.
template <int R, class T, bool VECTOR>
__global__ void __launch_bounds__(GEMV_THREADS) gemv_kernel(float *y, const float *x, const T *W, int N, int in, int out) {
    const int o0 = blockIdx.x * GEMV_OUT, n_out = min(GEMV_OUT, out - o0), t = threadIdx.x;
    W += (int64_t)o0 * in;
    float sum[GEMV_OUT][R] = {};
    if constexpr (VECTOR) {
#pragma unroll(R <= 4 ? 2 : 1)
        for (int k = t * CHUNK; k < in; k += GEMV_THREADS * CHUNK) add_chunk<R>(sum, x, W, k, in, N, n_out);
    } else
        for (int k0 = t * CHUNK; k0 < in; k0 += GEMV_THREADS * CHUNK)
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int o = 0; o < GEMV_OUT; o++)
                    for (int k = k0; k < min(k0 + CHUNK, in); k++)
                        sum[o][r] = fmaf(x[(int64_t)min(r, N - 1) * in + k], to_f32(W[(int64_t)min(o, n_out - 1) * in + k]), sum[o][r]);

    __shared__ float warps[GEMV_THREADS / 32][GEMV_OUT][R];
#pragma unroll
    for (int o = 0; o < GEMV_OUT; o++)
#pragma unroll
        for (int r = 0; r < R; r++) {
            const float s = warp_sum(sum[o][r]);
            if (t % 32 == 0) warps[t / 32][o][r] = s;
        }
    __syncthreads();
    if (t < GEMV_OUT * R) {
        const int o = t % GEMV_OUT, r = t / GEMV_OUT;
        float s = 0;
        for (int i = 0; i < GEMV_THREADS / 32; i++) s += warps[i][o][r];
        if (o < n_out && r < N) y[(int64_t)r * out + o0 + o] = s;
    }
}

template <int R, class T> static void gemv_of(float *y, const float *x, const T *W, int N, int in, int out) {
    const int blocks = (int)ceil_div(out, GEMV_OUT);
    if (in % CHUNK == 0) gemv_kernel<R, T, true><<<blocks, GEMV_THREADS, 0, stream>>>(y, x, W, N, in, out);
    else gemv_kernel<R, T, false><<<blocks, GEMV_THREADS, 0, stream>>>(y, x, W, N, in, out);
    CUDA_CHECK(cudaGetLastError());
}
template <class T> static void gemv(float *y, const float *x, const T *W, int N, int in, int out) {
    if (N == 1) gemv_of<1>(y, x, W, N, in, out);
    else if (N == 2) gemv_of<2>(y, x, W, N, in, out);
    else if (N <= 4) gemv_of<4>(y, x, W, N, in, out);
    else gemv_of<GEMV_ROWS>(y, x, W, N, in, out);
}

// ---- many rows: cuBLAS ----
__global__ void narrow_kernel(f16 *y, const float *x, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = to_f16(x[i]);
}
// x = high + low, to 2^-16 of x: bf16 rounds to 8 bits, twice.
__global__ void narrow_kernel(bf16 *high, bf16 *low, const float *x, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    high[i] = to_bf16(x[i]);
    low[i] = to_bf16(x[i] - to_f32(high[i]));
}

#define CUBLAS_CHECK(call)                                                                                           \
    do {                                                                                                             \
        const cublasStatus_t status_ = (call);                                                                       \
        if (status_ != CUBLAS_STATUS_SUCCESS) fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasGetStatusString(status_)); \
    } while (0)

static cublasHandle_t cublas() {
    static cublasHandle_t handle;
    if (!handle) {
        CUBLAS_CHECK(cublasCreate(&handle));
        CUBLAS_CHECK(cublasSetStream(handle, stream));
        CUBLAS_CHECK(cublasSetMathMode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));    // sums in f32
    }
    return handle;
}

// y = x W^T + beta y.  Row-major, that is column-major y^T = W x^T: W^T with leading dimension in, x and y as they lie.
static void gemm(float *y, const void *x, Matrix W, cudaDataType type, int N, int in, int out, float beta = 0.0f) {
    const float one = 1.0f;
    CUBLAS_CHECK(cublasGemmEx(cublas(), CUBLAS_OP_T, CUBLAS_OP_N, out, N, in, &one, W.data, type, in, x, type, in, &beta, y, CUDA_R_32F, out,
                              CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

int64_t matmul_work_bytes(const StepShape &shape) { return shape.N > GEMV_ROWS ? (int64_t)shape.N * shape.widest * 4 : 0; }

static void gemm_f16(float *y, const float *x, Matrix W, int N, int in, int out) {
    const int64_t n = (int64_t)N * in;
    f16 *x16 = (f16 *)step.work;
    narrow_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(x16, x, n);
    CUDA_CHECK(cudaGetLastError());
    gemm(y, x16, W, CUDA_R_16F, N, in, out);
}
static void gemm_bf16(float *y, const float *x, Matrix W, int N, int in, int out) {
    const int64_t n = (int64_t)N * in;
    bf16 *high = (bf16 *)step.work, *low = high + n;
    narrow_kernel<<<ceil_div(n, 256), 256, 0, stream>>>(high, low, x, n);
    CUDA_CHECK(cudaGetLastError());
    gemm(y, low, W, CUDA_R_16BF, N, in, out);
    gemm(y, high, W, CUDA_R_16BF, N, in, out, 1.0f);
}

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) {
    const bool few = N <= GEMV_ROWS;
    switch (W.type) {
    case DType::f32: return few ? gemv(y, x, (const float *)W.data, N, in, out) : gemm(y, x, W, CUDA_R_32F, N, in, out);
    case DType::f16: return few ? gemv(y, x, (const f16 *)W.data, N, in, out) : gemm_f16(y, x, W, N, in, out);
    case DType::bf16: return few ? gemv(y, x, (const bf16 *)W.data, N, in, out) : gemm_bf16(y, x, W, N, in, out);
    }
}
}    // namespace cuda
#endif
