/* matmul - activations times weight matrices: where a decode step spends its time.

   matmul       y[n,o]  = sum_i x[n,i] W[o,i]        y (N,out), x (N,in) f32;  W (out,in), row-major, any DType
   matmul_add   y[n,o] += sum_i x[n,i] W[o,i]        the residual stream
   qkv          q, k, v = three products of one x
   gated        gate = silu(x Wgate^T) * (x Wup^T)   swiglu.cu has the formula's source

   Math      On the CPU every y[n,o] is one sum of 16 lanes: lane j adds the products of i = j, j + 16, ... in order, then
             the lanes are added in a fixed tree (dot.h).  Few rows and many rows use the same order, so a row's result does
             not depend on its neighbours.  q8 and q4 give the bits of the same weights in f32 (dot_groups.h).
   Cost      Few rows: each weight is read once, 2 N flops for its 2 or 4 bytes; memory speed is the limit.
             Llama-3-8B in bf16 is 16.1 GB a step.  Many rows: 2 N in out flops; a tile of W is widened to f32 once and
             used by all rows, four rows times four outputs a turn (8 loads for 16 multiply-adds).
   On CUDA   Up to GEMV_ROWS rows: a kernel of ours at memory speed, f32 activations, one order of addition for any number
             of rows; products of one x are one launch, and what is done with a result (add, gate) happens where it is.
             More rows: cuBLAS, sums in f32; activations stay f32 for f32 weights, are rounded to f16 for f16, and are
             split into two bf16 numbers for bf16, each with a product of its own.  Models in bf16 are f16 on the GPU
             wherever their weights allow it (cuda_ops.cu), so that the last is rare.  cuBLAS chooses its order by the
             shape, so there, and only there, a row's last bits depend on the number of rows.
             Weights in q8 and q4: matmul_groups.cu; for many rows a slab of them at a time is widened to f16 and goes the way of f16.
             Tried: activations in one bf16: half the work, but logits of the golden bf16 models are off by 6e-3 to 1e-2, and
             the PPL of books-5m moves by 0.037%; with two by 0.0005%.
   Limits    in, out, N >= 1, in a multiple of 32 for q8 and q4; any alignment on the CPU, weights and rows of x aligned to 16 bytes
             on CUDA where in is a multiple of 8.  Many rows with f16, q8 or q4 weights on CUDA: |x| < 65,520.
   Tested by tests/test_ops.cpp, tests/test_cuda.cpp            Timed by ./run model.bin --bench                     */
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

void matmul_add(float *y, const float *x, Matrix W, int N, int in, int out) {
    static std::vector<float> product;    // grows to the largest step, then stays
    const int64_t n = (int64_t)N * out;
    product.resize(std::max<size_t>(product.size(), n));
    matmul(product.data(), x, W, N, in, out);
    for (int64_t i = 0; i < n; i++) y[i] += product[i];
}
void qkv(float *q, float *k, float *v, const float *x, Matrix Wq, Matrix Wk, Matrix Wv, int N, int in, int q_out, int kv_out) {
    matmul(q, x, Wq, N, in, q_out);
    matmul(k, x, Wk, N, in, kv_out);
    matmul(v, x, Wv, N, in, kv_out);
}
void gated(float *gate, float *up, const float *x, Matrix Wgate, Matrix Wup, int N, int in, int out) {
    matmul(gate, x, Wgate, N, in, out);
    matmul(up, x, Wup, N, in, out);
    swiglu(gate, up, (int64_t)N * out);
}
}    // namespace cpu

// ---- CUDA -------------------------------------------------------------------------------------------------
#else
#include <cublas_v2.h>
#include <cuda_pipeline.h>
#include "groups.cuh"
namespace cuda {

constexpr int GEMV_ROWS = 8;     // up to here weights are read once by our own kernel, activations stay f32
constexpr int GEMV_WARPS = 4;    // of a thread block; each has rows of W of its own and meets no other
constexpr int CHUNK = 8;         // neighbouring inputs of a lane: 16 bytes of f16 or bf16
constexpr int TURN = 32 * CHUNK; // inputs that a warp takes at a time
constexpr int MAX_PRODUCTS = 3;

// What a launch multiplies x with: matrices one after the other, outputs counted through.
struct Products {
    const void *W[MAX_PRODUCTS];
    float *y[MAX_PRODUCTS];
    int out[MAX_PRODUCTS];
    int outs;                    // of the launch: their sum; for gated, of one of the two
    bool add, gated;
    // Output o: which matrix (o becomes its row), its weights, and where row n's result goes.  gated names the matrix.
    __device__ int matrix_of(int &o) const {
        int m = 0;
        while (m + 1 < MAX_PRODUCTS && o >= out[m]) o -= out[m++];
        return m;
    }
    __device__ const void *row_of(int m, int o, int in) const {    // of f16
        if (m < 0) m = matrix_of(o);
        return (const f16 *)W[m] + (int64_t)o * in;
    }
    __device__ void store(float value, int o, int n) const {
        const int m = gated ? 0 : matrix_of(o);
        float *to = y[m] + (int64_t)n * out[m] + o;
        *to = add ? *to + value : value;
    }
};

// Eight weights as they lie, and as f32.
struct Raw32 { float4 a, b; };
__device__ inline Raw32 load8(const float *p) { return {__ldcs((const float4 *)p), __ldcs((const float4 *)p + 1)}; }
__device__ inline uint4 load8(const f16 *p) { return __ldcs((const uint4 *)p); }
__device__ inline uint4 load8(const bf16 *p) { return __ldcs((const uint4 *)p); }
__device__ inline void widen8(float (&w)[CHUNK], Raw32 r, float) {
    w[0] = r.a.x, w[1] = r.a.y, w[2] = r.a.z, w[3] = r.a.w, w[4] = r.b.x, w[5] = r.b.y, w[6] = r.b.z, w[7] = r.b.w;
}
__device__ inline void widen8(float (&w)[CHUNK], uint4 u, f16) {
    const unsigned word[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __half2 h;
        memcpy(&h, &word[i], 4);
        const float2 f = __half22float2(h);
        w[2 * i] = f.x, w[2 * i + 1] = f.y;
    }
}
__device__ inline void widen8(float (&w)[CHUNK], uint4 u, bf16) {
    const unsigned word[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) w[2 * i] = __uint_as_float(word[i] << 16), w[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
}

// A warp computes ROWS outputs of all N <= R rows of x.  Lane t adds the products of inputs 8 t .. 8 t + 7, then of those 256
// further, and so on; lanes are added in a fixed tree.  Neither R, nor N, nor the row's place enters a sum.
// The first weights are asked for before the kernel that makes x is done.
template <int R, class T, bool VECTOR>
__global__ void __launch_bounds__(32 * GEMV_WARPS) gemv_kernel(Products g, const float *x, int N, int in) {
    constexpr int ROWS = R <= 2 ? 2 : 4, AHEAD = R <= 2 ? 4 : 2;    // ROWS * AHEAD loads of 16 bytes in flight a lane
    const int lane = threadIdx.x % 32, first = (blockIdx.x * GEMV_WARPS + threadIdx.x / 32) * (g.gated ? ROWS / 2 : ROWS);
    if (first >= g.outs) return;
    const T *w[ROWS];
    float *y[ROWS];
    int stride[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int o = g.gated ? first + r % (ROWS / 2) : first + r, m = 0;
        o = min(o, g.outs - 1);
        if (g.gated) m = r / (ROWS / 2);
        else
            while (o >= g.out[m]) o -= g.out[m++];
        w[r] = (const T *)g.W[m] + (int64_t)o * in;
        y[r] = g.y[m] + o;
        stride[r] = g.out[m];
    }
    float sum[ROWS][R] = {};
    if constexpr (VECTOR) {
        decltype(load8(w[0])) raw[AHEAD][ROWS];
        auto load = [&](int k0) {
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    if (k0 + a * TURN < in) raw[a][r] = load8(w[r] + k0 + a * TURN);
        };
        load(lane * CHUNK);
        wait_for_inputs();
        for (int k0 = lane * CHUNK; k0 < in; k0 += AHEAD * TURN) {
            if (k0 >= AHEAD * TURN) load(k0);
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int k = k0 + a * TURN;
                if (k >= in) break;
                float wide[ROWS][CHUNK];
#pragma unroll
                for (int r = 0; r < ROWS; r++) widen8(wide[r], raw[a][r], T());
#pragma unroll
                for (int n = 0; n < R; n++) {
                    const float4 *xn = (const float4 *)(x + (int64_t)min(n, N - 1) * in + k);
                    const float4 lo = xn[0], hi = xn[1];
                    const float xs[CHUNK] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
#pragma unroll
                        for (int i = 0; i < CHUNK; i++) sum[r][n] = fmaf(xs[i], wide[r][i], sum[r][n]);
                }
            }
        }
    } else {
        wait_for_inputs();
        for (int k0 = lane * CHUNK; k0 < in; k0 += TURN)
#pragma unroll
            for (int n = 0; n < R; n++)
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    for (int k = k0; k < min(k0 + CHUNK, in); k++) sum[r][n] = fmaf(x[(int64_t)min(n, N - 1) * in + k], to_f32(w[r][k]), sum[r][n]);
    }

    // Lane n ROWS + r keeps output r of row n.
    float mine = 0;
#pragma unroll
    for (int n = 0; n < R; n++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float s = warp_sum(sum[r][n]);
            if (lane == n * ROWS + r) mine = s;
        }
    const float up = __shfl_down_sync(~0u, mine, ROWS / 2);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int n = lane / ROWS;
        if (lane % ROWS != r || n >= min(N, R)) continue;
        if (g.gated ? r >= ROWS / 2 || first + r >= g.outs : first + r >= g.outs) continue;
        float *to = y[r] + (int64_t)n * stride[r];
        *to = g.gated ? silu(mine) * up : g.add ? *to + mine : mine;
    }
}

// ---- few rows, f16 weights: tensor cores --------------------------------------------------------------------
// mma m16n8k16 multiplies 16 rows of W with 8 columns, the rows of x.  A lane (g = lane / 4, t = lane % 4) gives it W[g] and
// W[g + 8] at two pairs of inputs and x[g] at the same; which inputs is free as long as both agree.  So a lane takes 16 bytes
// of two rows of W, inputs 8 t .. 8 t + 7 of a block of 32, and those of x[g]: two mma.
//
//   x = 16 (high + low / 2048)      both f16: 22 bits of x down to 2^-32, |x| up to 2^20
//
// A thread block owns tiles of 16 outputs (gated: 8 of gate, 8 of up) and shares their inputs among its warps, which add up in
// order at the end of a tile.  Nothing in a column's sum depends on the others.  Weights go through a ring in shared memory, each lane
// its own; the first are asked for before the kernel that makes x is done.
// Tried: f32 multiply-adds, weights in registers: 2.5 TB/s over the layers of Llama-3-8B, 1.7 at 8 rows.
// Tried: the same with this ring, a warp an output: 2.95 TB/s for the largest matrix, 1.7 for w_down: x arrives too late.
constexpr int MMA_WARPS = 16;
constexpr int STAGES = 3;                      // of the ring: all but one are on their way while one is in work
constexpr int STAGE_INPUTS = 64;               // of a warp: 128 neighbouring bytes of 16 rows
constexpr int TILE_INPUTS = STAGE_INPUTS * MMA_WARPS;
constexpr int PART_FLOATS = MMA_WARPS * 16 * 8;    // of a round: a tile of 8 rows, or eight of one
constexpr int MMA_RING_BYTES = MMA_WARPS * STAGES * 32 * 64;

__device__ inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Two numbers as high and low halves.
__device__ inline void split_f16(uint32_t &high, uint32_t &low, float x0, float x1) {
    x0 *= 0.0625f, x1 *= 0.0625f;
    const __half2 h = __floats2half2_rn(x0, x1);
    const float2 back = __half22float2(h);
    const __half2 l = __floats2half2_rn((x0 - back.x) * 2048.0f, (x1 - back.y) * 2048.0f);
    memcpy(&high, &h, 4), memcpy(&low, &l, 4);
}

__global__ void __launch_bounds__(32 * MMA_WARPS) gemv_mma_kernel(Products p, const float *x, int N, int in) {
    extern __shared__ uint4 ring[];                                   // [warp][stage][load][lane]
    __shared__ float parts[2][PART_FLOATS];                           // [tile of the round][warp][output][row of x]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile_outs = p.gated ? 8 : 16, tiles = (p.outs + tile_outs - 1) / tile_outs, steps = (in + TILE_INPUTS - 1) / TILE_INPUTS;
    const int begin = (int)((int64_t)tiles * blockIdx.x / gridDim.x), end = (int)((int64_t)tiles * (blockIdx.x + 1) / gridDim.x);
    uint4 *const mine = ring + warp * STAGES * 4 * 32 + lane;
    const int first_input = warp * STAGE_INPUTS + 8 * t;

    const f16 *w[2];
    int load_tile = begin, load_step = 0;
    auto load = [&](int stage) {    // the next stage of weights, if there is one
        if (load_tile < end) {
            if (load_step == 0)
                for (int i = 0; i < 2; i++) {
                    const int o = load_tile * tile_outs + (p.gated ? g : g + 8 * i);
                    w[i] = (const f16 *)p.row_of(p.gated ? i : -1, min(o, p.outs - 1), in);
                }
#pragma unroll
            for (int i = 0; i < 4; i++) {    // [block of 32 inputs][row g or g + 8]
                const int k = load_step * TILE_INPUTS + first_input + i / 2 * 32;
                if (k < in) __pipeline_memcpy_async(mine + (stage * 4 + i) * 32, w[i % 2] + k, 16);
            }
            if (++load_step == steps) load_step = 0, load_tile++;
        }
        __pipeline_commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s);
    wait_for_inputs();

    const float *xg = x + (int64_t)min(g, N - 1) * in;
    float4 xs[4];    // of the step in work, and then of the next
    auto load_x = [&](int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = step * TILE_INPUTS + first_input + i / 2 * 32;
            xs[i] = g < N && k < in ? ((const float4 *)(xg + k))[i % 2] : make_float4(0, 0, 0, 0);
        }
    };
    if (begin < end) load_x(0);
    const int round = PART_FLOATS / (MMA_WARPS * 16 * N);
    int stage = 0;
    for (int tile = begin; tile < end; tile++) {
        float high_sum[4] = {}, low_sum[4] = {};
        for (int step = 0; step < steps; step++) {
            uint32_t high[8], low[8];    // [block of 32 inputs][pair]
#pragma unroll
            for (int i = 0; i < 4; i++) split_f16(high[2 * i], low[2 * i], xs[i].x, xs[i].y), split_f16(high[2 * i + 1], low[2 * i + 1], xs[i].z, xs[i].w);
            load_x(step + 1 < steps ? step + 1 : 0);
            load((stage + STAGES - 1) % STAGES);
            __pipeline_wait_prior(STAGES - 1);
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const bool inside = step * TILE_INPUTS + first_input + b * 32 < in;
                const uint4 zero = make_uint4(0, 0, 0, 0), r0 = inside ? mine[(stage * 4 + 2 * b) * 32] : zero, r1 = inside ? mine[(stage * 4 + 2 * b + 1) * 32] : zero;
                mma_f16(high_sum, r0.x, r1.x, r0.y, r1.y, high[4 * b], high[4 * b + 1]);
                mma_f16(low_sum, r0.x, r1.x, r0.y, r1.y, low[4 * b], low[4 * b + 1]);
                mma_f16(high_sum, r0.z, r1.z, r0.w, r1.w, high[4 * b + 2], high[4 * b + 3]);
                mma_f16(low_sum, r0.z, r1.z, r0.w, r1.w, low[4 * b + 2], low[4 * b + 3]);
            }
            stage = (stage + 1) % STAGES;
        }
        // Warps meet once a round of tiles, so that loads go on meanwhile.
        const int at = (tile - begin) % round;
        float *part = parts[(tile - begin) / round % 2];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (2 * t + i % 2 < N) part[((at * MMA_WARPS + warp) * 16 + g + i / 2 * 8) * N + 2 * t + i % 2] = fmaf(low_sum[i], 1.0f / 2048, high_sum[i]) * 16.0f;
        if (at + 1 < round && tile + 1 < end) continue;
        __syncthreads();    // the other half of parts keeps the next round from the readers of this one
        for (int i = threadIdx.x; i < (at + 1) * tile_outs * N; i += 32 * MMA_WARPS) {
            const int n = i % N, r = i / N % tile_outs, of = i / N / tile_outs, o = (tile - at + of) * tile_outs + r;
            if (o >= p.outs) continue;
            float s = 0, up = 0;
            for (int j = 0; j < MMA_WARPS; j++) {
                s += part[((of * MMA_WARPS + j) * 16 + r) * N + n];
                if (p.gated) up += part[((of * MMA_WARPS + j) * 16 + r + 8) * N + n];
            }
            p.store(p.gated ? silu(s) * up : s, o, n);
        }
    }
}

template <int R, class T> static void gemv_of(const Products &g, const float *x, int N, int in) {
    const int rows = (R <= 2 ? 2 : 4) / (g.gated ? 2 : 1);
    const dim3 blocks(ceil_div(ceil_div(g.outs, rows), GEMV_WARPS));
    if (in % CHUNK == 0) launch(gemv_kernel<R, T, true>, blocks, 32 * GEMV_WARPS, 0, g, x, N, in);
    else launch(gemv_kernel<R, T, false>, blocks, 32 * GEMV_WARPS, 0, g, x, N, in);
}
template <class T> static void gemv_type(const Products &g, const float *x, int N, int in) {
    if (N == 1) gemv_of<1, T>(g, x, N, in);
    else if (N == 2) gemv_of<2, T>(g, x, N, in);
    else if (N <= 4) gemv_of<4, T>(g, x, N, in);
    else gemv_of<GEMV_ROWS, T>(g, x, N, in);
}
static void gemv_mma(const Products &g, const float *x, int N, int in) {
    static const cudaError_t allowed = cudaFuncSetAttribute(gemv_mma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MMA_RING_BYTES);
    CUDA_CHECK(allowed);
    launch(gemv_mma_kernel, dim3(std::min<int64_t>(sm_count, ceil_div(g.outs, g.gated ? 8 : 16))), 32 * MMA_WARPS, MMA_RING_BYTES, g, x, N, in);
}
static void gemv(const Products &g, DType type, const float *x, int N, int in) {
    switch (type) {
    case DType::f32: return gemv_type<float>(g, x, N, in);
    case DType::f16: return in % CHUNK ? gemv_type<f16>(g, x, N, in) : gemv_mma(g, x, N, in);
    case DType::bf16: return gemv_type<bf16>(g, x, N, in);
    case DType::q8: case DType::q4: break;    // gemv_groups
    }
}

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
}

// Rows of x in 16 bits, made once for the products that share them; behind them a slab of q8 or q4 weights, widened to f16.
constexpr int64_t SLAB_BYTES = (int64_t)32 << 20;    // stays in the L2 of an H100 between the two kernels that touch it
static int64_t narrowed_bytes(int64_t n) { return ceil_div(n * 4, 256) * 256; }
int64_t matmul_work_bytes(const StepShape &shape) { return shape.N > GEMV_ROWS ? narrowed_bytes((int64_t)shape.N * shape.widest) + SLAB_BYTES : 0; }

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
static void few_rows(const Products &g, const Matrix *W, int n_products, const float *x, int N, int in) {
    if (!is_grouped(W[0].type)) return gemv(g, W[0].type, x, N, in);
    GroupProducts p = {};
    for (int i = 0; i < n_products; i++) p.W[i] = W[i], p.y[i] = g.y[i], p.out[i] = g.out[i];
    p.outs = g.outs, p.add = g.add, p.gated = g.gated;
    gemv_groups(p, x, N, in);
}

// All of the products, whichever way; matrices of different types take turns.
static void multiply(const Products &g, const Matrix *W, int n_products, const float *x, int N, int in) {
    bool same = true;
    for (int i = 1; i < n_products; i++) same = same && W[i].type == W[0].type;
    if (N <= GEMV_ROWS && same) return few_rows(g, W, n_products, x, N, in);
    for (int i = 0; i < n_products; i++) {
        if (N <= GEMV_ROWS) {
            few_rows({{W[i].data}, {g.y[i]}, {g.out[i]}, g.out[i], g.add, false}, W + i, 1, x, N, in);
            continue;
        }
        if (i == 0 || W[i].type != W[i - 1].type) narrow(W[i].type, x, (int64_t)N * in);
        gemm_narrowed(g.y[i], x, W[i], N, in, g.out[i], g.add ? 1.0f : 0.0f);
    }
    if (g.gated) swiglu(g.y[0], g.y[1], (int64_t)N * g.out[0]);
}

void matmul(float *y, const float *x, Matrix W, int N, int in, int out) { multiply({{W.data}, {y}, {out}, out, false, false}, &W, 1, x, N, in); }
void matmul_add(float *y, const float *x, Matrix W, int N, int in, int out) { multiply({{W.data}, {y}, {out}, out, true, false}, &W, 1, x, N, in); }
void qkv(float *q, float *k, float *v, const float *x, Matrix Wq, Matrix Wk, Matrix Wv, int N, int in, int q_out, int kv_out) {
    const Matrix W[] = {Wq, Wk, Wv};
    multiply({{Wq.data, Wk.data, Wv.data}, {q, k, v}, {q_out, kv_out, kv_out}, q_out + 2 * kv_out, false, false}, W, 3, x, N, in);
}
void gated(float *gate, float *up, const float *x, Matrix Wgate, Matrix Wup, int N, int in, int out) {
    const Matrix W[] = {Wgate, Wup};
    multiply({{Wgate.data, Wup.data}, {gate, up}, {out, out}, out, false, true}, W, 2, x, N, in);
}
}    // namespace cuda
#endif
