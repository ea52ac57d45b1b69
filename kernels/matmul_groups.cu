/* matmul_groups - products with weights in q8 and q4 on CUDA (groups.h; on the CPU: dot_groups.h).

   few rows    y[n,o] = sum over groups of scale[o,group] (sum over its 32 inputs of code[o,i] x[n,i])       N <= 8
   many rows   W is widened to f16, a slab at a time, and goes through cuBLAS: matmul.cu

   Math      Tensor cores, m16n8k16: 16 rows of W times 8 columns of x.  Codes are whole numbers, exact in f16; the scale
             multiplies a group's sum in f32, so nothing of a weight is rounded.  x = 16 (high + low / 2048), both f16: 22 bits of x
             down to 2^-32, |x| up to 2^20; high and low are columns of their own where N <= 4, products of their own else, and
             meet in the end.  A column's sum knows nothing of the others: the same bits for any N and any neighbours.
   Order     A warp adds its groups from left to right, 16 warps share the inputs of a row and are added in order.
   Cost      Each code and scale is read once: 8.5 and 4.5 bits a weight.  Llama-3-8B in q4: 4.2 GB a step, 5.4 weights a ns at
             3.06 TB/s, 24 a cycle and multiprocessor.  Instructions are the other limit: 2.2 a weight and lane, of 128 / 24 = 5.3.
             So x is split once a thread block, not once a tile as in matmul.cu, which would cost 2.5 more.
   Layout    A warp takes 64 bytes of 16 rows at a time, 4 groups of q4 or 2 of q8, through a ring in shared memory that is filled
             before the kernel that makes x is done.  Lane (g = lane / 4, t = lane % 4) gives the tensor core inputs
             4t ... 4t + 3 and 16 + 4t ... 16 + 4t + 3 of a group, of rows g and g + 8: for q4 the two halves of 4 bytes.
   Limits    in a multiple of 128 (q4) or 64 (q8) for the fast kernel, of 32 for the other; widened q8: |w| < 65,520.
   Tested by tests/test_cuda_groups.cpp                                                                        */
#include "groups.h"

#ifdef __CUDACC__
#include <cuda_pipeline.h>
#include "gemv.cuh"
namespace cuda {

constexpr int WARPS = 16;
constexpr int STAGES = 4;           // of the ring: 55 KB on their way while one is in work
constexpr int ROWS = 16;            // outputs of a tile; gated: 8 of gate, 8 of up
constexpr int BATCH = 2;            // tiles that share a reading of x, where x does not fit in shared memory
constexpr int STAGE_BYTES = ROWS * 64 + ROWS * 8;    // codes, then scales, of a warp
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int X_NUMBERS = 32768;    // of x in shared memory at a time, at most: 8 rows of 4,096
constexpr int PART_BYTES = WARPS * BATCH * ROWS * FEW_ROWS * (int)sizeof(float);
static_assert(RING_BYTES + PART_BYTES + X_NUMBERS * 4 <= 227 * 1024, "the shared memory of a thread block of an H100");

template <DType T> constexpr int UNIT = T == DType::q4 ? 128 : 64;    // inputs in 64 bytes of codes

// Rows of x, inputs begin ... end - 1, as the tensor core takes them: [group][high, low][row][t] of 4 pairs each.
__device__ inline void fill_x(uint4 *xs, const float *x, int N, int in, int begin, int end) {
    const int items = (end - begin) / GROUP * 4 * N;
    for (int i = threadIdx.x; i < items; i += 32 * WARPS) {
        const int at = i % (4 * N), group = i / (4 * N);
        const float4 *from = (const float4 *)(x + (int64_t)(at / 4) * in + begin + group * GROUP) + at % 4;
        const float4 a = from[0], b = from[4];
        uint4 high, low;
        split_f16(high.x, low.x, a.x, a.z), split_f16(high.y, low.y, a.y, a.w);
        split_f16(high.z, low.z, b.x, b.z), split_f16(high.w, low.w, b.y, b.w);
        xs[group * 8 * N + at] = high, xs[group * 8 * N + 4 * N + at] = low;
    }
}

// 1024 + code + offset as halves, less 1024 + offset: 0x6400 is 1024, whose last place is 1.
__device__ inline unsigned subtract_halves(unsigned a, unsigned b) {
    __half2 x, y;
    memcpy(&x, &a, 4), memcpy(&y, &b, 4);
    const __half2 z = __hsub2(x, y);
    memcpy(&a, &z, 4);
    return a;
}
__device__ inline unsigned sixteenth_less_72(unsigned a) {    // (1024 + 16 q) / 16 - 72 = q - 8
    __half2 x;
    memcpy(&x, &a, 4);
    const __half2 z = __hfma2(x, __float2half2_rn(0.0625f), __float2half2_rn(-72.0f));
    memcpy(&a, &z, 4);
    return a;
}
// Codes of a lane as pairs (0,2), (1,3) of inputs 4t ..., and the same of 16 + 4t ...
__device__ inline void widen_codes(unsigned (&w)[4], unsigned codes) {    // q4
    const unsigned next = codes >> 8;
    w[0] = subtract_halves((codes & 0x000f000f) | 0x64006400, 0x64086408), w[1] = subtract_halves((next & 0x000f000f) | 0x64006400, 0x64086408);
    w[2] = sixteenth_less_72((codes & 0x00f000f0) | 0x64006400), w[3] = sixteenth_less_72((next & 0x00f000f0) | 0x64006400);
}
__device__ inline void widen_codes(unsigned (&w)[4], unsigned low, unsigned high) {    // q8
    low ^= 0x80808080, high ^= 0x80808080;    // code + 128
    w[0] = subtract_halves(__byte_perm(low, 0x64646464, 0x4240), 0x64806480), w[1] = subtract_halves(__byte_perm(low, 0x64646464, 0x4341), 0x64806480);
    w[2] = subtract_halves(__byte_perm(high, 0x64646464, 0x4240), 0x64806480), w[3] = subtract_halves(__byte_perm(high, 0x64646464, 0x4341), 0x64806480);
}

// FEW: N <= 4, high and low are columns 0 ... 3 and 4 ... 7 of one product.
template <DType T, bool FEW>
__global__ void __launch_bounds__(32 * WARPS) gemv_groups_kernel(const __grid_constant__ Products p, const float *x, int N, int in, int slab_steps) {
    extern __shared__ uint4 shared[];
    uint8_t *const ring = (uint8_t *)shared;                                          // [warp][stage]
    float *const parts = (float *)(ring + RING_BYTES);                                // [warp][tile of the batch][row of W][row of x]
    uint4 *const xs = (uint4 *)(ring + RING_BYTES + PART_BYTES);
    constexpr int GROUPS = UNIT<T> / GROUP, SCALE_BYTES = GROUPS * 2, PRODUCTS = FEW ? 1 : 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile_outs = p.tile_outs(ROWS), tiles = p.tiles(ROWS);
    const int steps = (in + UNIT<T> * WARPS - 1) / (UNIT<T> * WARPS), slabs = (steps + slab_steps - 1) / slab_steps;
    const int begin = (int)((int64_t)tiles * blockIdx.x / gridDim.x), end = (int)((int64_t)tiles * (blockIdx.x + 1) / gridDim.x);
    uint8_t *const mine = ring + warp * STAGES * STAGE_BYTES;

    // ---- weights: lane copies 16 bytes of rows g and g + 8, and the scales of row `lane`
    struct { int batch, slab, tile, step; } next = {begin, 0, 0, 0};
    const uint8_t *code[2], *scale;
    auto row_of = [&](int r) { return p.row_of<ROWS>(next.batch + next.tile, r); };
    auto load = [&](int stage) {    // the next stage of weights, if there is one
        if (next.batch < end) {
            if (next.step == next.slab * slab_steps) {
                for (int i = 0; i < 2; i++) code[i] = p.weights_of<uint8_t>(row_of(g + 8 * i), in / UNIT<T> * 64);
                const Products::Row row = row_of(lane % ROWS);
                scale = (const uint8_t *)(p.W[row.m].scale + (int64_t)row.o * (in / GROUP));
            }
            const int unit = next.step * WARPS + warp;
            if (unit * UNIT<T> < in) {
                uint8_t *const to = mine + stage * STAGE_BYTES;
                for (int i = 0; i < 2; i++)    // 16 bytes of row r go to place t ^ (r / 2 % 4), so that reading 8 rows meets all banks
                    __pipeline_memcpy_async(to + (g + 8 * i) * 64 + (t ^ (g / 2)) * 16, code[i] + (int64_t)unit * 64 + t * 16, 16);
                if (lane < ROWS) __pipeline_memcpy_async(to + ROWS * 64 + lane * 8, scale + (int64_t)unit * SCALE_BYTES, SCALE_BYTES);
            }
            if (++next.step == min(steps, (next.slab + 1) * slab_steps)) {
                if (++next.tile == BATCH || next.batch + next.tile == end) {
                    next.tile = 0;
                    if (++next.slab == slabs) next.slab = 0, next.batch += BATCH;
                }
                next.step = next.slab * slab_steps;
            }
        }
        __pipeline_commit();
    };
    for (int s = 0; s < STAGES - 1; s++) load(s);
    wait_for_inputs();

    // ---- products
    int stage = 0;
    const int column = FEW ? g % 4 : g;    // row of x
    auto multiply = [&](float (&sum)[PRODUCTS][4], int step, int slab) {
        __pipeline_wait_prior(STAGES - 2);
        __syncwarp();    // all lanes' copies are there, and nobody reads the stage before any more
        load((stage + STAGES - 1) % STAGES);
        const int unit = step * WARPS + warp;
        if (unit * UNIT<T> < in) {
            const uint8_t *from = mine + stage * STAGE_BYTES, *row[2] = {from + g * 64 + 4 * t, from + (g + 8) * 64 + 4 * t};
            struct alignas(SCALE_BYTES) Scales { f16 of[GROUPS]; };
            const Scales s_low = *(const Scales *)(from + ROWS * 64 + g * 8), s_high = *(const Scales *)(from + ROWS * 64 + (g + 8) * 8);
            const uint4 *x_of_unit = xs + (unit * UNIT<T> / GROUP - slab * slab_steps * WARPS * GROUPS) * 8 * N + (FEW ? g / 4 * 4 * N : 0) + column * 4 + t;
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                unsigned w[2][4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    auto chunk = [&](int c) { return *(const unsigned *)(row[i] + (c ^ (g / 2)) * 16); };
                    if constexpr (T == DType::q4) widen_codes(w[i], chunk(j));
                    else widen_codes(w[i], chunk(2 * j), chunk(2 * j + 1));
                }
                const float s0 = to_f32(s_low.of[j]), s1 = to_f32(s_high.of[j]);
#pragma unroll
                for (int h = 0; h < PRODUCTS; h++) {
                    const uint4 b = column < N ? x_of_unit[(j * 2 + h) * 4 * N] : make_uint4(0, 0, 0, 0);
                    float c[4];
                    mma(c, {w[0][0], w[1][0], w[0][1], w[1][1]}, b.x, b.y, {0, 0, 0, 0});
                    mma(c, {w[0][2], w[1][2], w[0][3], w[1][3]}, b.z, b.w);
                    sum[h][0] = fmaf(s0, c[0], sum[h][0]), sum[h][1] = fmaf(s0, c[1], sum[h][1]);
                    sum[h][2] = fmaf(s1, c[2], sum[h][2]), sum[h][3] = fmaf(s1, c[3], sum[h][3]);
                }
            }
        }
        stage = (stage + 1) % STAGES;
    };
    for (int batch = begin; batch < end; batch += BATCH) {
        float sum[BATCH][PRODUCTS][4] = {};
        for (int slab = 0; slab < slabs; slab++) {
            const int last = min(steps, (slab + 1) * slab_steps);
            if (slabs > 1 || batch == begin) {
                __syncthreads();
                fill_x(xs, x, N, in, slab * slab_steps * WARPS * UNIT<T>, min(in, last * WARPS * UNIT<T>));
                __syncthreads();
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                if (batch + b < end)
                    for (int step = slab * slab_steps; step < last; step++) multiply(sum[b], step, slab);
        }
        __syncthreads();    // parts of the batch before are read
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float low = FEW ? __shfl_xor_sync(~0u, sum[b][0][i], 2) : sum[b][PRODUCTS - 1][i];    // of column + 4
                const int n = 2 * t + i % 2;
                if (n < N) parts[((warp * BATCH + b) * ROWS + g + i / 2 * 8) * N + n] = fmaf(low, 1.0f / 2048, sum[b][0][i]) * 16.0f;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < BATCH * tile_outs * N; i += 32 * WARPS) {
            const int n = i % N, r = i / N % tile_outs, b = i / N / tile_outs;
            if (batch + b >= end || (batch + b) * tile_outs + r >= p.outs()) continue;
            float s = 0, up = 0;
            for (int j = 0; j < WARPS; j++) {
                s += parts[((j * BATCH + b) * ROWS + r) * N + n];
                if (p.gated) up += parts[((j * BATCH + b) * ROWS + r + 8) * N + n];
            }
            float *const to = p.result_of(p.row_of<ROWS>(batch + b, r), n);
            *to = p.gated ? silu(s) * up : p.add ? *to + s : s;
        }
    }
}

// Any multiple of 32: a warp an output, a lane a group, f32.
template <DType T> __global__ void __launch_bounds__(128) gemv_groups_any_kernel(const __grid_constant__ Products p, const float *x, int N, int in) {
    const int lane = threadIdx.x % 32, output = blockIdx.x * 4 + threadIdx.x / 32;
    if (output >= p.outs()) return;
    auto row_of = [&](int i) { return p.gated ? p.row_of<2>(output, i) : p.row_of<2>(output / 2, output % 2); };    // i: gate, up
    wait_for_inputs();
    float sum[2][FEW_ROWS] = {};
    for (int i = 0; i < (p.gated ? 2 : 1); i++) {
        const Products::Row row = row_of(i);
        for (int k = lane * GROUP; k < in; k += 32 * GROUP) {
            const int64_t at = (int64_t)row.o * in + k;
            const float s = to_f32(p.W[row.m].scale[at / GROUP]);
            for (int j = 0; j < GROUP; j++) {
                const float w = s * (T == DType::q4 ? code_q4(p.W[row.m].data, at + j) : code_q8(p.W[row.m].data, at + j));
#pragma unroll
                for (int n = 0; n < FEW_ROWS; n++)
                    if (n < N) sum[i][n] = fmaf(x[(int64_t)n * in + k + j], w, sum[i][n]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < FEW_ROWS; n++) {
        const float s = warp_sum(sum[0][n]), up = warp_sum(sum[1][n]);
        if (lane != 0 || n >= N) continue;
        float *const to = p.result_of(row_of(0), n);
        *to = p.gated ? silu(s) * up : p.add ? *to + s : s;
    }
}

template <DType T, bool FEW> static void launch_groups(const Products &p, const float *x, int N, int in, int numbers, int slab_steps) {
    static const cudaError_t allowed = cudaFuncSetAttribute(gemv_groups_kernel<T, FEW>, cudaFuncAttributeMaxDynamicSharedMemorySize, RING_BYTES + PART_BYTES + numbers * 4);
    CUDA_CHECK(allowed);
    const size_t bytes = RING_BYTES + PART_BYTES + (size_t)std::min<int64_t>(numbers, (int64_t)N * in) * 4;
    launch(gemv_groups_kernel<T, FEW>, dim3(std::min(sm_count, p.tiles(ROWS))), 32 * WARPS, bytes, p, x, N, in, slab_steps);
}
template <DType T> static void gemv_groups_of(const Products &p, const float *x, int N, int in) {
    const int numbers = std::min(X_NUMBERS, (most_shared - RING_BYTES - PART_BYTES) / 4), step = UNIT<T> * WARPS;
    const int slab_steps = (int)std::min<int64_t>(numbers / N / step, ceil_div(in, step));    // steps whose x fits
    if (in % UNIT<T> != 0 || slab_steps < 1) launch(gemv_groups_any_kernel<T>, dim3(ceil_div(p.outs(), 4)), 128, 0, p, x, N, in);
    else if (N <= 4) launch_groups<T, true>(p, x, N, in, numbers, slab_steps);
    else launch_groups<T, false>(p, x, N, in, numbers, slab_steps);
}
void gemv_groups(const Products &p, const float *x, int N, int in) {
    if (p.W[0].type == DType::q4) gemv_groups_of<DType::q4>(p, x, N, in);
    else gemv_groups_of<DType::q8>(p, x, N, in);
}

// ---- many rows: f16 for cuBLAS ------------------------------------------------------------------------------
// A thread widens 8 neighbouring inputs.
__global__ void widen_groups_kernel(uint4 *to, Matrix W, int64_t first, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, at = first + 8 * i;
    wait_for_inputs();
    if (8 * i >= n) return;
    const float s = to_f32(W.scale[at / GROUP]);
    const int64_t byte = W.type == DType::q8 ? at : at / GROUP * 16 + at % 16;
    const int shift = (int)(at % GROUP / 16 * 4);
    const uint2 eight = *(const uint2 *)((const uint8_t *)W.data + byte);
    unsigned pair[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const unsigned codes = (j < 2 ? eight.x : eight.y) >> j % 2 * 16;
        const int a = W.type == DType::q8 ? (int8_t)codes : (int)(codes >> shift & 15) - 8;
        const int b = W.type == DType::q8 ? (int8_t)(codes >> 8) : (int)(codes >> 8 >> shift & 15) - 8;
        pair[j] = pack(s * a, s * b);
    }
    to[i] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}
void widen_groups(f16 *to, const Matrix &W, int64_t first, int64_t rows, int in) {
    launch(widen_groups_kernel, dim3(ceil_div(rows * in / 8, 256)), 256, 0, (uint4 *)to, W, first * in, rows * in);
}
}    // namespace cuda
#endif
