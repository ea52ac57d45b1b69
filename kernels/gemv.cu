/* gemv - products of up to 8 rows of x on CUDA, the kernels of a decode step: every weight is read once, at memory speed.

   y[n,o] = s[n] sum_i W[o,i] (g[i] x[n,i])          s[n] = 1 / sqrt( mean_i x[n,i]^2 + eps )

   The norm's weights g and s are 1 where there is no norm, and for f32 and bf16 (matmul.cu calls rmsnorm); q8 and q4 are
   matmul_groups.cu's.  Letters, and what add and gated do with y, are matmul.cu's.

   Math      f16, in a multiple of 8: tensor cores, x as a sum of two f16, sums in f32.  A product is linear, so s can wait: x is
             multiplied by g on its way in, its squares are added up beside the first outputs, and finished sums are scaled.
             Other types: f32 multiply-adds, a warp a few outputs.
   Order     Fixed by `in`: neither N, nor a row's place, nor the number of SMs enters a sum.
   Work      A thread block owns tiles of 16 outputs (gated: 8 of gate, 8 of up) and shares their inputs among its warps, which add up
             in order at the end of a tile.  Weights go through a ring in shared memory, each lane its own.
   Memory    What the formula costs is 2 bytes a weight; what a launch costs beside is the time in which nobody has asked for
             weights.  So a thread block starts while the kernel before it is at work, fills its ring, and waits for x only then.
   Limits    N <= 8; weights and rows of x aligned to 16 bytes where in is a multiple of 8; f16: |g x| < 2^20.
   Tested by tests/test_cuda_matmul.cpp                                                                                   */
#ifdef __CUDACC__
#include <algorithm>
#include <cuda_pipeline.h>
#include "gemv.cuh"
namespace cuda {

// ---- f16: tensor cores --------------------------------------------------------------------------------------
// mma m16n8k16 multiplies 16 rows of W with 8 columns, the rows of x.  A lane (g = lane / 4, t = lane % 4) gives it W[g] and
// W[g + 8] at two pairs of inputs and x[g] at the same; which inputs is free as long as both agree.  So a lane takes 16 bytes
// of two rows of W, inputs 8 t .. 8 t + 7 of a block of 32, and those of x[g]: two mma.  Nothing in a column's sum depends on the
// others.
// Tried: f32 multiply-adds, weights in registers: 2.5 TB/s over the layers of Llama-3-8B, 1.7 at 8 rows.
// Tried: weights behind the ring prefetched to L2 (17 MB, before the wait): 200 us a layer of Llama-3-8B for 196, and 220 if that
// lead is kept to the end; the next kernel let loose only when all weights are asked for: 196 for 169 with an early start.
// Tried: 4 and 6 stages: 156 and 160 us for 155 with 5; 4 without the hint of 256 bytes 163; 3 with it 164.
// Tried: all products from one attention to the next in one launch, whose thread blocks meet at a counter in L2 and whose ring runs on:
// Llama-3.2-1B 828 tok/s for 864, Llama-3-8B 172 for 179 (a meeting takes 1.4 us, the end of a kernel to the next one's x less than 1); the
// same with the next 4, 8 or 12 stages asked for into L2: 817, 813 and 795 for 831.
// Tried: two thread blocks a multiprocessor (8 warps, or 16 with 64 registers and 3 stages), so that the next kernel's fills its ring beside
// this one's: 730 and 713 for 867; some multiprocessors get two thread blocks of one kernel, and those come last.
// Tried: weights by a warp of its own, in bulk copies: Llama-3.2-1B 869, Llama-3-8B 172 (862 and 178 in another call).
// Tried: the same with this ring, a warp an output: 2.95 TB/s for the largest matrix, 1.7 for w_down: x arrives too late.
constexpr int MMA_ROWS = 16;                   // of weights in a tile
constexpr int MMA_WARPS = 16;
// Stages of the ring, of which all but one are on their way while one is in work: as many as are worth it, if they fit.
constexpr int MOST_STAGES = 5, LEAST_STAGES = 2;
constexpr int STAGE_INPUTS = 64;               // of a warp: 128 neighbouring bytes of 16 rows
constexpr int PIECE_INPUTS = STAGE_INPUTS * MMA_WARPS;    // a piece: what the warps take at a time, 32 KB
constexpr int ring_bytes(int stages) { return MMA_WARPS * stages * 32 * 64; }
constexpr int ROUND_SUMS = MMA_ROWS * FEW_ROWS;    // that are added up at a time: a tile of 8 rows, or eight of one
static_assert(ROUND_SUMS <= 32 * MMA_WARPS, "a thread adds up one");

template <bool NORM, int STAGES>
__global__ void __launch_bounds__(32 * MMA_WARPS) gemv_mma_kernel(const __grid_constant__ Products p, const float *x, int N, int in) {
    extern __shared__ uint4 ring[];                              // [warp][stage][load][lane]
    __shared__ float parts[2][MMA_WARPS * ROUND_SUMS];           // [tile of the round][warp][output][row of x]
    __shared__ float squares[NORM ? MMA_WARPS : 1][FEW_ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile_outs = p.tile_outs(MMA_ROWS), tiles = p.tiles(MMA_ROWS), steps = (in + PIECE_INPUTS - 1) / PIECE_INPUTS;
    const int begin = (int)((int64_t)tiles * blockIdx.x / gridDim.x), end = (int)((int64_t)tiles * (blockIdx.x + 1) / gridDim.x);
    uint4 *const mine = ring + warp * STAGES * 4 * 32 + lane;
    const int first_input = warp * STAGE_INPUTS + 8 * t;

    const f16 *w[2];
    int load_tile = begin, load_step = 0;
    auto load = [&](int stage) {    // the next stage of weights, if there is one
        if (load_tile < end) {
            if (load_step == 0)
                for (int i = 0; i < 2; i++) w[i] = p.weights_of<f16>(p.row_of<MMA_ROWS>(load_tile, g + 8 * i), in);
#pragma unroll
            for (int i = 0; i < 4; i++) {    // [block of 32 inputs][row g or g + 8]
                const int k = load_step * PIECE_INPUTS + first_input + i / 2 * 32;
                if (k < in) copy_weights(mine + (stage * 4 + i) * 32, w[i % 2] + k);
            }
            if (++load_step == steps) load_step = 0, load_tile++;
        }
        __pipeline_commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s);
    // This thread's output: of row n, row r of tile `of` of a round.  Divisions take a while: here nobody waits for them.
    const int round = ROUND_SUMS / (MMA_ROWS * N), n = threadIdx.x % N, r = threadIdx.x / N % tile_outs, of = threadIdx.x / N / tile_outs;
    wait_for_inputs();

    const float *xg = x + (int64_t)min(g, N - 1) * in;
    float4 xs[4];    // of the step in work, and then of the next
    auto load_x = [&](int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int k = step * PIECE_INPUTS + first_input + i / 2 * 32;
            xs[i] = g < N && k < in ? ((const float4 *)(xg + k))[i % 2] : make_float4(0, 0, 0, 0);
        }
    };
    load_x(0);
    int stage = 0, at = 0, half = 0;    // at: tile of the round
    double square = 0;
    float scale = 1;
    for (int tile = begin; tile < end; tile++, at++) {
        float high_sum[4] = {}, low_sum[4] = {};
        for (int step = 0; step < steps; step++) {
            float4 gain[4];
            if (NORM) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int k = step * PIECE_INPUTS + first_input + i / 2 * 32;
                    gain[i] = k < in ? __ldg((const float4 *)(p.norm.weight + k) + i % 2) : make_float4(0, 0, 0, 0);
                }
            }
            load((stage + STAGES - 1) % STAGES);
            // 16 squares in f32, the rest in f64: off by 2^-20 of the sum at worst, 2^-21 of s
            if (NORM && tile == begin) square += add_squares(xs[3], add_squares(xs[2], add_squares(xs[1], add_squares(xs[0], 0))));
            unsigned high[8], low[8];    // [block of 32 inputs][pair]
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 v = NORM ? gain[i] * xs[i] : xs[i];
                split_f16(high[2 * i], low[2 * i], v.x, v.y), split_f16(high[2 * i + 1], low[2 * i + 1], v.z, v.w);
            }
            load_x(step + 1 < steps ? step + 1 : 0);
            __pipeline_wait_prior(STAGES - 1);
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const bool inside = step * PIECE_INPUTS + first_input + b * 32 < in;
                const uint4 zero = make_uint4(0, 0, 0, 0), r0 = inside ? mine[(stage * 4 + 2 * b) * 32] : zero, r1 = inside ? mine[(stage * 4 + 2 * b + 1) * 32] : zero;
                const unsigned a[2][4] = {{r0.x, r1.x, r0.y, r1.y}, {r0.z, r1.z, r0.w, r1.w}};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma(high_sum, a[i], high[4 * b + 2 * i], high[4 * b + 2 * i + 1]);
                    mma(low_sum, a[i], low[4 * b + 2 * i], low[4 * b + 2 * i + 1]);
                }
            }
            stage = (stage + 1) % STAGES;
        }
        if (NORM && tile == begin) {
            square += __shfl_xor_sync(~0u, square, 1);
            square += __shfl_xor_sync(~0u, square, 2);
            if (t == 0) squares[warp][g] = (float)square;
        }
        // Warps meet once a round of tiles, so that loads go on meanwhile.
        float *const part = parts[half];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (2 * t + i % 2 < N) part[((at * MMA_WARPS + warp) * MMA_ROWS + g + i / 2 * 8) * N + 2 * t + i % 2] = fmaf(low_sum[i], 1.0f / 2048, high_sum[i]) * 16.0f;
        if (at + 1 < round && tile + 1 < end) continue;
        const bool stores = of <= at && (tile - at + of) * tile_outs + r < p.outs();
        float *const to = p.result_of(p.row_of<MMA_ROWS>(tile - at + of, r), n);
        const float old = p.add && stores ? *to : 0.0f;    // asked for before the others are here
        __syncthreads();    // the other half of parts keeps the next round from the readers of this one
        if (NORM && tile - at == begin) {
            double sum = 0;
            for (int j = 0; j < MMA_WARPS; j++) sum += squares[j][n];
            scale = 1.0f / sqrtf((float)sum / in + p.norm.eps);
        }
        if (stores) {
            float sum = 0, up = 0;
            for (int j = 0; j < MMA_WARPS; j++) {
                sum += part[((of * MMA_WARPS + j) * MMA_ROWS + r) * N + n];
                if (p.gated) up += part[((of * MMA_WARPS + j) * MMA_ROWS + r + 8) * N + n];
            }
            if (NORM) sum *= scale, up *= scale;
            *to = p.gated ? silu(sum) * up : old + sum;
        }
        at = -1, half ^= 1;    // the next tile is the first of a round
    }
}

template <bool NORM, int STAGES> static void gemv_mma(const Products &p, const float *x, int N, int in) {
    static const cudaError_t allowed = cudaFuncSetAttribute(gemv_mma_kernel<NORM, STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes(STAGES));
    // x and the norm's weights are read through L1: an SM that gave most of it to a kernel over codes takes it back.
    // 80% of an H100's 228 KB is more than the ring and the sums, and less than all.
    static const cudaError_t preferred = cudaFuncSetAttribute(gemv_mma_kernel<NORM, STAGES>, cudaFuncAttributePreferredSharedMemoryCarveout, 80);
    CUDA_CHECK(allowed);
    CUDA_CHECK(preferred);
    launch(gemv_mma_kernel<NORM, STAGES>, dim3(std::min(sm_count, p.tiles(MMA_ROWS))), 32 * MMA_WARPS, ring_bytes(STAGES), p, x, N, in);
}
static void gemv_mma(const Products &p, const float *x, int N, int in) {
    constexpr int BESIDE = 2 * MMA_WARPS * ROUND_SUMS * (int)sizeof(float) + 1024;    // the kernel's other shared memory
    if (most_shared >= ring_bytes(MOST_STAGES) + BESIDE)
        return p.norm.weight ? gemv_mma<true, MOST_STAGES>(p, x, N, in) : gemv_mma<false, MOST_STAGES>(p, x, N, in);
    p.norm.weight ? gemv_mma<true, LEAST_STAGES>(p, x, N, in) : gemv_mma<false, LEAST_STAGES>(p, x, N, in);
}

// ---- other types, and any in --------------------------------------------------------------------------------
constexpr int GEMV_WARPS = 4;    // of a thread block; each has rows of W of its own and meets no other
constexpr int CHUNK = 8;         // neighbouring inputs of a lane: 16 bytes of bf16
constexpr int TURN = 32 * CHUNK; // inputs that a warp takes at a time

// Eight weights as they lie, and as f32.
struct Raw32 { float4 a, b; };
__device__ inline Raw32 load8(const float *p) { return {__ldcs((const float4 *)p), __ldcs((const float4 *)p + 1)}; }
__device__ inline uint4 load8(const bf16 *p) { return __ldcs((const uint4 *)p); }
__device__ inline void widen8(float (&w)[CHUNK], Raw32 r) {
    w[0] = r.a.x, w[1] = r.a.y, w[2] = r.a.z, w[3] = r.a.w, w[4] = r.b.x, w[5] = r.b.y, w[6] = r.b.z, w[7] = r.b.w;
}
__device__ inline void widen8(float (&w)[CHUNK], uint4 u) {
    const unsigned word[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) w[2 * i] = __uint_as_float(word[i] << 16), w[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
}

template <int R> constexpr int TILE_ROWS = R <= 2 ? 2 : 4;    // of weights, of a warp

// A warp computes a tile's outputs of all N <= R rows of x.  Lane t adds the products of inputs 8 t .. 8 t + 7, then of those
// 256 further, and so on; lanes are added in a fixed tree.
// The first weights are asked for before the kernel that makes x is done.
template <int R, class T, bool VECTOR>
__global__ void __launch_bounds__(32 * GEMV_WARPS) gemv_kernel(const __grid_constant__ Products p, const float *x, int N, int in) {
    constexpr int ROWS = TILE_ROWS<R>, AHEAD = R <= 2 ? 4 : 2;    // ROWS * AHEAD loads of 16 bytes in flight a lane
    const int lane = threadIdx.x % 32, tile = blockIdx.x * GEMV_WARPS + threadIdx.x / 32;
    if (tile >= p.tiles(ROWS)) return;
    const T *w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) w[r] = p.weights_of<T>(p.row_of<ROWS>(tile, r), in);
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
                for (int r = 0; r < ROWS; r++) widen8(wide[r], raw[a][r]);
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
    const int n = lane / ROWS, r = lane % ROWS, tile_outs = p.tile_outs(ROWS);
    if (n >= N || r >= tile_outs || tile * tile_outs + r >= p.outs()) return;
    float *const to = p.result_of(p.row_of<ROWS>(tile, r), n);
    *to = p.gated ? silu(mine) * up : p.add ? *to + mine : mine;
}

template <int R, class T, bool VECTOR> static void gemv_of(const Products &p, const float *x, int N, int in) {
    launch(gemv_kernel<R, T, VECTOR>, dim3(ceil_div(p.tiles(TILE_ROWS<R>), GEMV_WARPS)), 32 * GEMV_WARPS, 0, p, x, N, in);
}
template <class T> static void gemv_type(const Products &p, const float *x, int N, int in) {
    if (in % CHUNK) gemv_of<FEW_ROWS, T, false>(p, x, N, in);
    else if (N == 1) gemv_of<1, T, true>(p, x, N, in);
    else if (N == 2) gemv_of<2, T, true>(p, x, N, in);
    else if (N <= 4) gemv_of<4, T, true>(p, x, N, in);
    else gemv_of<FEW_ROWS, T, true>(p, x, N, in);
}

bool gemv_norms(DType type, int in) { return is_grouped(type) ? gemv_groups_norms(type, in) : type == DType::f16 && in % CHUNK == 0; }

void gemv(const Products &p, const float *x, int N, int in) {
    switch (p.W[0].type) {
    case DType::f32: return gemv_type<float>(p, x, N, in);
    case DType::f16:
        if (in % CHUNK) return gemv_of<FEW_ROWS, f16, false>(p, x, N, in);
        return gemv_mma(p, x, N, in);
    case DType::bf16: return gemv_type<bf16>(p, x, N, in);
    case DType::q8: case DType::q4: return gemv_groups(p, x, N, in);
    }
}
}    // namespace cuda
#endif
