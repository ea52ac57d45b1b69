/* matmul_groups - products with weights in q8 and q4 on CUDA (groups.h; on the CPU: dot_groups.h).

   few rows    y[n,o] = s[n] sum over groups of scale[o,group] (sum over its 32 inputs of code[o,i] g[i] x[n,i])     N <= 8
   many rows   W is widened to f16, a slab at a time, and goes through cuBLAS: matmul.cu

   s and g are the norm's (gemv.cu), 1 where there is none.

   Math      Tensor cores, m16n8k32 of 8-bit integers: 16 rows of W times a group of x.  Codes are what they are; g x is a 24-bit integer
             of the group's largest |g x|, in three bytes: columns (high, middle, low, 0) of two rows of x.  Sums of a group are exact;
             the scale multiplies them in f32.  A column's sum knows nothing of the others: the same bits for any N and any neighbours.
             q4 has codes from 0 to 15: the sum starts at -8 times that of x.
   Order     A warp adds its groups from left to right, 16 warps share the inputs of a row and are added in order.
   Cost      Each code and scale is read once: 8.5 and 4.5 bits a weight.  Llama-3-8B, batch 1, depth 0: q8 282 tok/s (72% of the read
             bandwidth), q4 406 (58%).  A step of a warp, 4 groups of q4, takes 130 instructions and as many to ask for the next; of 35
             us of gate and up (ncu) loads alone take 30, products alone 26.
             Tried: codes as f16 and x as two f16, m16n8k16, and the norm apart: q4 351 tok/s, q8 255; no hints to L2: 385 and 261
             for 397 and 274; a warp's x kept in registers: q4 286, it does not fit; one unit for a row of x, not for a group: no
             faster, but coarse; rows found from those of the tile before: 402 for 406.
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
constexpr int ROWS = 16;            // outputs of a tile; gated: 8 of gate, 8 of up
constexpr int STAGE_BYTES = ROWS * 64 + ROWS * 8;    // codes, then scales, of a warp
constexpr int MANY_STAGES = 6, FEW_STAGES = 3;       // of the ring: 92 and 37 KB on their way while one stage is in work
constexpr int PART_BYTES = 32768;   // sums of tiles, of all warps: twice (8 rows: once)
constexpr int LANES = 8;            // that add up an output
constexpr float INTEGERS = 127 * 65536;    // the largest of x: its high byte fits
template <int R> constexpr int TILES = R == 1 ? 8 : R == 2 ? 4 : 2;    // that are added up together
template <int STAGES> constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
template <int STAGES> constexpr int BESIDE_X = RING_BYTES<STAGES> + PART_BYTES;
constexpr int BLOCK_BYTES = FEW_ROWS * (WARPS * 8 + 4);    // declared shared memory

template <DType T> constexpr int UNIT = T == DType::q4 ? 128 : 64;    // inputs in 64 bytes of codes

// x in shared memory, of a group and a pair of rows (or of one row, if there is one): a column has 32 bytes, lane t's 8 together.
// Behind the columns of all groups, for two columns each: (what their sums begin with, the unit of the integers).
template <int R> struct XPlace {    // R rows
    static constexpr int PAIRS = (R + 1) / 2, COLUMNS = R == 1 ? 4 : 8;
    int groups;
    __device__ int column_at(int group, int pair, int column) const { return ((group * PAIRS + pair) * COLUMNS + column) * 32; }
    __device__ int start_at(int group, int pair, int column) const { return groups * PAIRS * COLUMNS * 32 + ((group * PAIRS + pair) * COLUMNS + column) * 8; }
    static int64_t bytes(int64_t in) { return in / GROUP * PAIRS * COLUMNS * 40; }
};

__device__ inline float4 load_normed(const float *x, const float *gain, int n, int in, int k) {
    const float4 v = *(const float4 *)(x + (int64_t)n * in + k);
    return gain ? v * __ldg((const float4 *)(gain + k)) : v;
}
// Rows of g x, inputs begin .. of place.groups groups, as integers.
template <DType T, int R> __device__ inline void fill_x(uint8_t *xs, const XPlace<R> &place, const float *x, const float *gain, int N, int in, int begin) {
    const unsigned quad = 15u << threadIdx.x % 32 / 4 * 4;    // lanes that share a group
    for (int i = threadIdx.x; i < place.groups * 4 * N; i += 32 * WARPS) {
        const int t = i % 4, n = i / 4 % N, group = i / 4 / N, k = begin + group * GROUP + 4 * t, column = n % 2 * 4;
        const float4 v[2] = {load_normed(x, gain, n, in, k), load_normed(x, gain, n, in, k + 16)};
        unsigned top = 0;    // |g x| as bits, which are in its order; NaN is above all
        for (const float4 &e : v) top = max(top, __float_as_uint(fmaxf(fmaxf(fabsf(e.x), fabsf(e.y)), fmaxf(fabsf(e.z), fabsf(e.w)))));
        for (const float4 &e : v) top = max(top, __float_as_uint(fabsf(e.x + e.y + e.z + e.w)) > 0x7f800000u ? 0x7fffffffu : 0u);    // fmaxf leaves NaN out
        top = max(top, __shfl_xor_sync(quad, top, 1));
        top = max(top, __shfl_xor_sync(quad, top, 2));
        const bool tiny = top < 27u << 23;    // below 2^-100: nothing
        const float largest = __uint_as_float(top), inverse = tiny ? 0.0f : INTEGERS / largest;
        uint32_t bytes[3][2];    // [high, middle, low][inputs 4t ..., 16 + 4t ...]
        int sums[3] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float e[4] = {v[h].x, v[h].y, v[h].z, v[h].w};
            uint32_t w[4];    // with 128 added to each byte, which are digits then
#pragma unroll
            for (int c = 0; c < 4; c++) w[c] = __float2int_rn(e[c] * inverse) + 0x808080;
#pragma unroll
            for (int b = 0; b < 3; b++) {
                const int select = (2 - b) | (6 - b) << 4;
                bytes[b][h] = __byte_perm(__byte_perm(w[0], w[1], select), __byte_perm(w[2], w[3], select), 0x5410) ^ 0x80808080;
                sums[b] = __dp4a((int)bytes[b][h], 0x01010101, sums[b]);
            }
        }
        for (int b = 0; b < 3; b++) *(uint2 *)(xs + place.column_at(group, n / 2, column + b) + 8 * t) = make_uint2(bytes[b][0], bytes[b][1]);
        *(uint2 *)(xs + place.column_at(group, n / 2, column + 3) + 8 * t) = make_uint2(0, 0);
        for (int b = 0; b < 3; b++)
            for (int o = 1; o < 4; o *= 2) sums[b] += __shfl_xor_sync(quad, sums[b], o);
        const int offset = T == DType::q4 ? -8 : 0, unit = __float_as_int(tiny ? 0.0f : largest / INTEGERS);
        if (t < 2) *(int4 *)(xs + place.start_at(group, n / 2, column + 2 * t)) = t == 0 ? make_int4(offset * sums[0], offset * sums[1], unit, 0) : make_int4(offset * sums[2], 0, unit, 0);
    }
}

template <int BYTES> __device__ inline void copy_scales(uint8_t *to, const uint8_t *from) {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
}
// Up to R rows of x.
template <DType T, int R, int STAGES>
__global__ void __launch_bounds__(32 * WARPS, 1) gemv_groups_kernel(const __grid_constant__ Products p, const float *x, int N, int in, int slab_steps) {
    extern __shared__ uint4 shared[];
    constexpr int GROUPS = UNIT<T> / GROUP, SCALE_BYTES = GROUPS * 2, PAIRS = XPlace<R>::PAIRS, COLUMNS = XPlace<R>::COLUMNS;
    constexpr int TILES = cuda::TILES<R>, SUMS = COLUMNS / 2, PART = WARPS * TILES * PAIRS * ROWS * SUMS;    // SUMS: of a row of W and a pair of x
    static_assert(PART * (R == 8 ? 1 : 2) * (int)sizeof(float) == PART_BYTES, "sums have no place");
    __shared__ double squares[FEW_ROWS][WARPS];
    __shared__ float norms[FEW_ROWS];
    uint8_t *const ring = (uint8_t *)shared;                                          // [warp][stage]
    float *const parts = (float *)(ring + RING_BYTES<STAGES>);                        // [tiles of this turn, of the last][warp][tile][pair][row of W][sum]
    uint8_t *const xs = ring + BESIDE_X<STAGES>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile_outs = p.tile_outs(ROWS), tiles = p.tiles(ROWS);
    const int steps = (in + UNIT<T> * WARPS - 1) / (UNIT<T> * WARPS), slabs = (steps + slab_steps - 1) / slab_steps;
    const int begin = (int)((int64_t)tiles * blockIdx.x / gridDim.x), end = (int)((int64_t)tiles * (blockIdx.x + 1) / gridDim.x);
    uint8_t *const mine = ring + warp * STAGES * STAGE_BYTES;

    // ---- weights: lane copies 16 bytes of rows g and g + 8, and the scales of row `lane`
    struct { int first, slab, tile, step; } next = {begin, 0, 0, 0};    // of `TILES` tiles from first on
    const uint8_t *code[2], *scale;
    auto find_rows = [&] {
        for (int i = 0; i < 2; i++) code[i] = p.weights_of<uint8_t>(p.row_of<ROWS>(next.first + next.tile, g + 8 * i), in / UNIT<T> * 64) + warp * 64 + t * 16;
        const Products::Row row = p.row_of<ROWS>(next.first + next.tile, lane % ROWS);
        scale = (const uint8_t *)(p.W[row.m].scale + (int64_t)row.o * (in / GROUP)) + warp * SCALE_BYTES;
    };
    auto load = [&](int stage) {    // the next stage of weights, if there is one
        if (next.first < end) {
            if (next.step == next.slab * slab_steps) find_rows();
            if ((next.step * WARPS + warp) * UNIT<T> < in) {
                uint8_t *const to = mine + stage * STAGE_BYTES;
                for (int i = 0; i < 2; i++)    // 16 bytes of row r go to place t ^ (r / 2 % 4), so that reading 8 rows meets all banks
                    copy_weights(to + (g + 8 * i) * 64 + (t ^ (g / 2)) * 16, code[i] + next.step * (WARPS * 64));
                if (lane < ROWS) copy_scales<SCALE_BYTES>(to + ROWS * 64 + lane * 8, scale + next.step * (WARPS * SCALE_BYTES));
            }
            if (++next.step == min(steps, (next.slab + 1) * slab_steps)) {
                if (++next.tile == TILES || next.first + next.tile == end) {
                    next.tile = 0;
                    if (++next.slab == slabs) next.slab = 0, next.first += TILES;
                }
                next.step = next.slab * slab_steps;
            }
        }
        __pipeline_commit();
    };
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) load(s);
    wait_for_inputs();

    // ---- products
    auto find_squares = [&] {    // rows one after the other, so that none's sum depends on how many there are
        for (int n = 0; n < N; n++) {
            double square = 0;
            for (int k = 4 * threadIdx.x; k < in; k += 4 * 32 * WARPS)
                square += add_squares(load_normed(x, nullptr, n, in, k), 0);
            square = warp_sum(square);
            if (lane == 0) squares[n][warp] = square;
        }
    };
    int stage = 0, turn = 0;
    for (int first = begin; first < end; first += TILES, turn ^= 1) {
        const int n_tiles = min(TILES, end - first);
        float *const sums = parts + (R == 8 ? 0 : turn * PART);
        for (int slab = 0; slab < slabs; slab++) {
            const int first_step = slab * slab_steps, last_step = min(steps, first_step + slab_steps), from = first_step * WARPS * UNIT<T>;
            const XPlace<R> place = {(min(in, last_step * WARPS * UNIT<T>) - from) / GROUP};
            if (slabs > 1 || first == begin) {
                if (slab > 0 || first > begin) __syncthreads();
                fill_x<T, R>(xs, place, x, p.norm.weight, N, in, from);
                __syncthreads();
            }
            const uint8_t *const x_lane = xs + place.column_at(0, 0, g % COLUMNS) + 8 * t, *const start_lane = xs + place.start_at(0, 0, 2 * t % COLUMNS);
#pragma unroll 1
            for (int tile = 0; tile < n_tiles; tile++) {
                float *const part = sums + ((warp * TILES + tile) * PAIRS * ROWS + g) * SUMS + t % SUMS;
                float sum[PAIRS][2] = {};
                if (slab > 0)
                    for (int h = 0; h < PAIRS; h++) sum[h][0] = part[h * ROWS * SUMS], sum[h][1] = part[(h * ROWS + 8) * SUMS];
#pragma unroll 1
                for (int step = first_step; step < last_step; step++) {
                    __pipeline_wait_prior(STAGES - 2);
                    __syncwarp();    // all lanes' copies are there, and nobody reads the stage before any more
                    load(stage == 0 ? STAGES - 1 : stage - 1);
                    const uint8_t *const here = mine + stage * STAGE_BYTES;
                    stage = stage + 1 == STAGES ? 0 : stage + 1;
                    const int unit = step * WARPS + warp;
                    if (unit * UNIT<T> >= in) continue;
                    const uint8_t *row[2] = {here + g * 64 + 4 * t, here + (g + 8) * 64 + 4 * t};
                    struct alignas(SCALE_BYTES) Scales { f16 of[GROUPS]; };
                    const Scales s_low = *(const Scales *)(here + ROWS * 64 + g * 8), s_high = *(const Scales *)(here + ROWS * 64 + (g + 8) * 8);
                    const int group = unit * GROUPS - from / GROUP;
#pragma unroll
                    for (int j = 0; j < GROUPS; j++) {
                        unsigned a[4];    // rows g and g + 8 of inputs 4t ..., then of 16 + 4t ...
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            auto chunk = [&](int c) { return *(const unsigned *)(row[i] + (c ^ (g / 2)) * 16); };
                            if constexpr (T == DType::q4) {
                                const unsigned codes = chunk(j);
                                a[i] = codes & 0x0f0f0f0f, a[2 + i] = codes >> 4 & 0x0f0f0f0f;
                            } else a[i] = chunk(2 * j), a[2 + i] = chunk(2 * j + 1);
                        }
                        const float s0 = to_f32(s_low.of[j]), s1 = to_f32(s_high.of[j]);
#pragma unroll
                        for (int h = 0; h < PAIRS; h++) {
                            const int at = ((group + j) * PAIRS + h) * COLUMNS;
                            const uint2 b = *(const uint2 *)(x_lane + at * 32);
                            const int4 start = *(const int4 *)(start_lane + at * 8);
                            const float x_unit = __int_as_float(start.z);
                            int c[4] = {start.x, start.y, start.x, start.y};
                            mma_s8(c, a, b.x, b.y);
                            sum[h][0] = fmaf((float)(c[0] * 256 + c[1]), s0 * x_unit, sum[h][0]);
                            sum[h][1] = fmaf((float)(c[2] * 256 + c[3]), s1 * x_unit, sum[h][1]);
                        }
                    }
                }
                if (t < SUMS)
                    for (int h = 0; h < PAIRS; h++) part[h * ROWS * SUMS] = sum[h][0], part[(h * ROWS + 8) * SUMS] = sum[h][1];
            }
        }
        if (p.norm.weight && first == begin) {
            find_squares();
            __syncthreads();
            if (threadIdx.x < N) {
                double sum = 0;
                for (int w = 0; w < WARPS; w++) sum += squares[threadIdx.x][w];
                norms[threadIdx.x] = 1.0f / sqrtf((float)sum / in + p.norm.eps);
            }
        }
        __syncthreads();    // with two turns' sums the next turn does not wait for the readers of this one
        const int outs = n_tiles * tile_outs * N, part_of = threadIdx.x % LANES;
        for (int i = threadIdx.x / LANES; i < outs; i += 32 * WARPS / LANES) {
            const int n = i % N, r = i / N % tile_outs, tile = i / N / tile_outs;
            auto total = [&](int r) {
                float high = 0, low = 0;    // of high and middle bytes, of low ones
                for (int w = part_of * (WARPS / LANES); w < (part_of + 1) * (WARPS / LANES); w++) {
                    const float2 v = *(const float2 *)(sums + (((w * TILES + tile) * PAIRS + n / 2) * ROWS + r) * SUMS + n % 2 * 2);
                    high += v.x, low += v.y;
                }
                float y = fmaf(high, 256.0f, low * (1.0f / 256));
                for (int o = 1; o < LANES; o *= 2) y += __shfl_xor_sync(~0u, y, o);
                return p.norm.weight ? y * norms[n] : y;
            };
            const float y = total(r), up = p.gated ? total(r + ROWS / 2) : 0.0f;
            if (part_of != 0 || (first + tile) * tile_outs + r >= p.outs()) continue;
            float *const to = p.result_of(p.row_of<ROWS>(first + tile, r), n);
            *to = p.gated ? silu(y) * up : p.add ? *to + y : y;
        }
        if (R == 8) __syncthreads();
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

template <DType T, int R, int STAGES> static void launch_groups(const Products &p, const float *x, int N, int in, int slab_steps) {
    static const cudaError_t allowed = cudaFuncSetAttribute(gemv_groups_kernel<T, R, STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared - BLOCK_BYTES);
    CUDA_CHECK(allowed);
    const int64_t inputs = std::min<int64_t>(in, (int64_t)slab_steps * UNIT<T> * WARPS);
    launch(gemv_groups_kernel<T, R, STAGES>, dim3(std::min(sm_count, p.tiles(ROWS))), 32 * WARPS, BESIDE_X<STAGES> + XPlace<R>::bytes(inputs), p, x, N, in, slab_steps);
}
// False: N is too large, or not even a step's x fits.
template <DType T, int R, int STAGES> static bool gemv_groups_by(const Products &p, const float *x, int N, int in) {
    constexpr int STEP = UNIT<T> * WARPS;
    const int64_t room = most_shared - BLOCK_BYTES - BESIDE_X<STAGES>;
    const int slab_steps = (int)std::min<int64_t>(room / XPlace<R>::bytes(STEP), ceil_div(in, STEP));    // steps whose x fits
    if (N > R || room < 0 || slab_steps < 1) return false;
    launch_groups<T, R, STAGES>(p, x, N, in, slab_steps);
    return true;
}
bool gemv_groups_norms(DType type, int in) {    // the fast kernel serves any number of rows
    const int unit = type == DType::q4 ? UNIT<DType::q4> : UNIT<DType::q8>;
    return in % unit == 0 && most_shared - BLOCK_BYTES >= BESIDE_X<FEW_STAGES> + XPlace<FEW_ROWS>::bytes(unit * WARPS);
}
template <DType T> static void gemv_groups_of(const Products &p, const float *x, int N, int in) {
    if (in % UNIT<T> == 0 && (gemv_groups_by<T, 1, MANY_STAGES>(p, x, N, in) || gemv_groups_by<T, 1, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 2, MANY_STAGES>(p, x, N, in) ||
                              gemv_groups_by<T, 4, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 8, FEW_STAGES>(p, x, N, in)))
        return;
    launch(gemv_groups_any_kernel<T>, dim3(ceil_div(p.outs(), 4)), 128, 0, p, x, N, in);
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
