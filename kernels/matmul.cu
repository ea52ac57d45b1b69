/* matmul - activations times weight matrices: where a decode step spends its time.

   matmul       y[n,o]  = sum_i x[n,i] W[o,i]        y (N,out), x (N,in) f32;  W (out,in), row-major, any DType
   matmul_add   y[n,o] += sum_i x[n,i] W[o,i]        the residual stream
   unembed      y = the product of n = rmsnorm(x)
   qkv          q, k, v = three products of n
   gated        gate = silu(n Wgate^T) * (n Wup^T)   rmsnorm.cu and swiglu.cu have the formulas' sources

   Math      On the CPU every y[n,o] is one sum of 16 lanes: lane j adds the products of i = j, j + 16, ... in order, then
             the lanes are added in a fixed tree (dot.h).  Few rows and many rows use the same order, so a row's result does
             not depend on its neighbours.  q8 and q4 give the bits of the same weights in f32 (dot_groups.h).
   Cost      Few rows: each weight is read once, 2 N flops for its 2 or 4 bytes; memory speed is the limit.
             Llama-3-8B in bf16 is 16.1 GB a step.  Many rows: 2 N in out flops; a tile of W is widened to f32 once and
             used by all rows, four rows times four outputs a turn (8 loads for 16 multiply-adds).
   On CUDA   Few rows: kernels of ours at memory speed (gemv.cu, gemv_groups.cu), f32 activations, one order of addition for any
             number of rows; products of one x are one launch, and what is done with x (norm) and with a result (add, gate)
             happens where it is.  Up to GEMV_ROWS rows; up to FEW_ROWS where the next does not serve.
             Up to 32 rows of f16, q8 and q4 on an H100: a kernel of ours, too (gemm_batch.cu); x is rounded to f16, a row's bits are the
             same in any of those steps.
             More rows: cuBLAS, sums in f32; activations stay f32 for f32 weights, are rounded to f16 for f16, and are
             split into two bf16 numbers for bf16, each with a product of its own.  Models in bf16 are f16 on the GPU
             wherever their weights allow it (cuda_ops.cu), so that the last is rare.  cuBLAS chooses its order by the
             shape, so there, and only there, a row's last bits depend on the number of rows.
             Many rows of q8 and q4: a slab of them at a time is widened to f16 (matmul_groups.cu) and goes the way of f16.
             Tried: activations in one bf16: half the work, but logits of the golden bf16 models are off by 6e-3 to 1e-2, and
             the PPL of books-5m moves by 0.037%; with two by 0.0005%.
   Limits    in, out, N >= 1, in a multiple of 32 for q8 and q4; any alignment on the CPU, weights and rows of x (and of norms)
             aligned to 16 bytes on CUDA where in is a multiple of 8.  With f16, q8 or q4 weights on CUDA many rows need
             |x| < 65,520, few rows what gemv.cu says.
   Tested by tests/test_ops.cpp, tests/test_cuda_matmul.cpp, tests/test_cuda_batch.cpp     Timed by ./run model.bin --bench                     */
#include <algorithm>
#include <vector>
#include "ops.h"

#ifndef __CUDACC__
#include "dot_groups.h"

// ---- reference ----------------------------------------------------------------------------------------
namespace reference {

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) {
    for (int n = 0; n < N; n++)
        for (int o = 0; o < out; o++) {
            double sum = 0;
            for (int i = 0; i < in; i++) sum += (double)x[(int64_t)n * in + i] * weight_at(W, (int64_t)o * in + i);
            y[(int64_t)n * out + o] = (float)sum;
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

// Rows of W from `row` on, and what is done with them.
template <class T> struct PlainRows {
    const T *W;
    int64_t in;
    PlainRows from(int64_t row) const { return {W + row * in, in}; }
};
template <class T> static void widen(float *to, const PlainRows<T> &W, int64_t n) { widen(to, W.W, n); }
template <class T> static void dot(float *y, const float *x, const PlainRows<T> &W, int rows, int outs, int64_t y_stride) {
    dot_rows(y, x, W.W, rows, outs, (int)W.in, y_stride, W.in, W.in);
}
static void widen(float *to, const Q8Rows &W, int64_t n) { widen_groups(to, W, n); }
static void widen(float *to, const Q4Rows &W, int64_t n) { widen_groups(to, W, n); }
static void dot(float *y, const float *x, const Q8Rows &W, int rows, int outs, int64_t y_stride) { dot_groups(y, x, W, rows, outs, y_stride); }
static void dot(float *y, const float *x, const Q4Rows &W, int rows, int outs, int64_t y_stride) { dot_groups(y, x, W, rows, outs, y_stride); }

template <class Rows> static void matmul_of(float *y, const float *x, const Rows &W, int N, int in, int out) {
    if (N <= FEW_ROWS) {
#pragma omp parallel for schedule(static) if ((int64_t)N * in * out > SMALL)
        for (int o = 0; o < out; o += DOT_OUT)
            dot(y + o, x, W.from(o), N, std::min(DOT_OUT, out - o), out);
        return;
    }
#pragma omp parallel if ((int64_t)N * in * out > SMALL)
    {
        static thread_local std::vector<float> tile;    // grows to the largest matrix of the model, then stays
        tile.resize(std::max(tile.size(), (size_t)TILE_OUT * in));
#pragma omp for schedule(dynamic)
        for (int o = 0; o < out; o += TILE_OUT) {
            const int n_out = std::min(TILE_OUT, out - o);
            widen(tile.data(), W.from(o), (int64_t)n_out * in);
            dot_rows(y + o, x, tile.data(), N, n_out, in, out, in, in);
        }
    }
}

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) {
    switch (W.type) {
    case DType::f32: return matmul_of(y, x, PlainRows<float>{(const float *)W.data, in}, N, in, out);
    case DType::f16: return matmul_of(y, x, PlainRows<f16>{(const f16 *)W.data, in}, N, in, out);
    case DType::bf16: return matmul_of(y, x, PlainRows<bf16>{(const bf16 *)W.data, in}, N, in, out);
    case DType::q8: return matmul_of(y, x, Q8Rows{(const int8_t *)W.data, W.scale, in}, N, in, out);
    case DType::q4: return matmul_of(y, x, Q4Rows{(const uint8_t *)W.data, W.scale, in}, N, in, out);
    }
}

void matmul_add(float *y, const float *x, Matrix W, int N, int in, int out, Norm) {
    static std::vector<float> product;    // grows to the largest step, then stays
    const int64_t n = (int64_t)N * out;
    product.resize(std::max<size_t>(product.size(), n));
    matmul(product.data(), x, W, N, in, out);
    for (int64_t i = 0; i < n; i++) y[i] += product[i];
}
void unembed(float *y, float *xn, const float *x, Norm norm, Matrix W, int N, int in, int out) {
    rmsnorm(xn, x, norm.weight, norm.eps, N, in);
    matmul(y, xn, W, N, in, out);
}
void qkv(float *q, float *k, float *v, float *xn, const float *x, Norm norm, Matrix Wq, Matrix Wk, Matrix Wv, int N, int in, int q_out, int kv_out) {
    rmsnorm(xn, x, norm.weight, norm.eps, N, in);
    matmul(q, xn, Wq, N, in, q_out);
    matmul(k, xn, Wk, N, in, kv_out);
    matmul(v, xn, Wv, N, in, kv_out);
}
void gated(float *gate, float *up, float *xn, const float *x, Norm norm, Matrix Wgate, Matrix Wup, int N, int in, int out) {
    rmsnorm(xn, x, norm.weight, norm.eps, N, in);
    matmul(gate, xn, Wgate, N, in, out);
    matmul(up, xn, Wup, N, in, out);
    swiglu(gate, up, (int64_t)N * out);
}
}    // namespace cpu

// ---- CUDA -------------------------------------------------------------------------------------------------
#else
#include <cublas_v2.h>
#include "gemv.cuh"
namespace cuda {

// ---- many rows: cuBLAS ----
__global__ void narrow_kernel_f16(f16 *y, const float *x, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_inputs();
    if (i < n) y[i] = to_f16(x[i]);
}
// x = high + low, to 2^-16 of x: bf16 rounds to 8 bits, twice.
__global__ void narrow_kernel_bf16(bf16 *high, bf16 *low, const float *x, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_inputs();
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

// y = x W^T + beta y, rows of y `stride` apart.  Row-major, that is column-major y^T = W x^T: W^T with leading dimension in, x and y
// as they lie.
static void gemm(float *y, const void *x, const void *W, cudaDataType type, int N, int in, int out, int stride, float beta) {
    const float one = 1.0f;
    CUBLAS_CHECK(cublasGemmEx(cublas(), CUBLAS_OP_T, CUBLAS_OP_N, out, N, in, &one, W, type, in, x, type, in, &beta, y, CUDA_R_32F, stride,
                              CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    launches++;
}

// Rows of x in 16 bits, made once for the products that share them; behind them a slab of q8 or q4 weights, widened to f16.
constexpr int64_t SLAB_BYTES = (int64_t)32 << 20;    // stays in the L2 of an H100 between the two kernels that touch it
static int64_t narrowed_bytes(int64_t n) { return ceil_div(n * 4, 256) * 256; }
int64_t matmul_work_bytes(const StepShape &shape) { return shape.N > FEW_ROWS ? narrowed_bytes((int64_t)shape.N * shape.widest) + SLAB_BYTES : 0; }

static void gemm_groups(float *y, Matrix W, int N, int in, int out, float beta) {
    f16 *const slab = (f16 *)((uint8_t *)step.work + narrowed_bytes((int64_t)N * in));
    const int rows = (int)std::min<int64_t>(out, SLAB_BYTES / sizeof(f16) / in);
    for (int o = 0; o < out; o += rows) {
        const int n = std::min(rows, out - o);
        widen_groups(slab, W, o, n, in);
        gemm(y + o, step.work, slab, CUDA_R_16F, N, in, n, out, beta);
    }
}

static void narrow(DType type, const float *x, int64_t n) {
    if (type == DType::f16 || is_grouped(type)) launch(narrow_kernel_f16, dim3(ceil_div(n, 256)), 256, 0, (f16 *)step.work, x, n);
    if (type == DType::bf16) launch(narrow_kernel_bf16, dim3(ceil_div(n, 256)), 256, 0, (bf16 *)step.work, (bf16 *)step.work + n, x, n);
}
static void gemm_narrowed(float *y, const float *x, Matrix W, int N, int in, int out, float beta) {
    const bf16 *high = (const bf16 *)step.work;
    switch (W.type) {
    case DType::f32: return gemm(y, x, W.data, CUDA_R_32F, N, in, out, out, beta);
    case DType::f16: return gemm(y, step.work, W.data, CUDA_R_16F, N, in, out, out, beta);
    case DType::bf16:
        gemm(y, high + (int64_t)N * in, W.data, CUDA_R_16BF, N, in, out, out, beta);
        return gemm(y, high, W.data, CUDA_R_16BF, N, in, out, out, 1.0f);
    case DType::q8: case DType::q4: return gemm_groups(y, W, N, in, out, beta);
    }
}

// ---- the ops ----
// All of the products, whichever way; matrices of different types one by one.  xn is room for the normalised x.
static void multiply(Products p, int n_products, const float *x, int N, int in, float *xn = nullptr) {
    bool same = true;
    for (int i = 1; i < n_products; i++) same = same && p.W[i].type == p.W[0].type;
    const bool few = N <= FEW_ROWS;
    if (same && gemm_batch_serves(p.W[0].type, N, in)) return gemm_batch(p, x, N, in);
    if (p.norm.weight && !(few && same && gemv_norms(p.W[0].type, in))) {
        rmsnorm(xn, x, p.norm.weight, p.norm.eps, N, in);
        x = xn, p.norm = {};
    }
    if (few && same) return gemv(p, x, N, in);
    if (same) narrow(p.W[0].type, x, (int64_t)N * in);
    for (int i = 0; i < n_products; i++)
        if (same) gemm_narrowed(p.y[i], x, p.W[i], N, in, p.out[i], p.add ? 1.0f : 0.0f);
        else multiply({{p.W[i]}, {p.y[i]}, {p.out[i]}, p.add}, 1, x, N, in);
    if (p.gated) swiglu(p.y[0], p.y[1], (int64_t)N * p.out[0]);
}

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) { multiply({{W}, {y}, {out}}, 1, x, N, in); }
void matmul_add(float *y, const float *x, Matrix W, int N, int in, int out, Norm next) {
    multiply({{W}, {y}, {out}, true, false, {}, next.weight != nullptr, next}, 1, x, N, in);
}
void unembed(float *y, float *xn, const float *x, Norm norm, Matrix W, int N, int in, int out) { multiply({{W}, {y}, {out}, false, false, norm}, 1, x, N, in, xn); }
void qkv(float *q, float *k, float *v, float *xn, const float *x, Norm norm, Matrix Wq, Matrix Wk, Matrix Wv, int N, int in, int q_out, int kv_out) {
    multiply({{Wq, Wk, Wv}, {q, k, v}, {q_out, kv_out, kv_out}, false, false, norm}, 3, x, N, in, xn);
}
void gated(float *gate, float *up, float *xn, const float *x, Norm norm, Matrix Wgate, Matrix Wup, int N, int in, int out) {
    multiply({{Wgate, Wup}, {gate, up}, {out, out}, false, true, norm, true}, 2, x, N, in, xn);
}
}    // namespace cuda
#endif
