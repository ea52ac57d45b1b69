/* matmul_groups - products with weights in q8 and q4 on CUDA (groups.h; on the CPU: dot_groups.h).

   few rows    y[n,o] = s[n] sum over groups of scale[o,group] (sum over its 32 inputs of code[o,i] g[i] x[n,i])     N <= 8
   many rows   W is widened to f16, a slab at a time, and goes through cuBLAS: matmul.cu

   s and g are the norm's (gemv.cu), 1 where there is none.

   Math      Tensor cores, m16n8k32 of 8-bit integers: 16 rows of W times a group of x.  Codes are what they are; g x is a 24-bit integer
             of the group's largest |g x|, in three bytes: columns (high, middle, low, 0) of two rows of x.  Sums of a group are exact;
             the scale multiplies them in f32.  A column's sum knows nothing of the others: the same bits for any N and any neighbours.
             Codes of q4 become 16 (code - 8), bytes with a sign, by one or two instructions for four.
   Order     A warp adds its groups from left to right, 16 warps share the inputs of a row and are added in order.
   Cost      Each code and scale is read once: 8.5 and 4.5 bits a weight.  Llama-3-8B, batch 1, depth 0: q8 314 tok/s (81% of the read
             bandwidth), q4 467 (68%); 275 and 396 when every warp asked for its own weights, 302 and 442 with rows of a stage 16 bytes
             more apart and all stages asked for at once (ring.cuh).
             Tried: codes as f16 and x as two f16, m16n8k16, and the norm apart: q4 351 tok/s, q8 255; a warp's x kept in registers: q4
             286, it does not fit; one unit for a row of x, not for a group: no faster, but coarse.  Weights in bulk copies
             (cp.async.bulk), a kilobyte of a row each: q4 297 tok/s for 395: the copies themselves take too long; copies by one warp that
             finds each row's place by shuffles: 396 for 429; 7 stages for 6: no faster; x asked for one turn ahead, or four, each warp
             its own: no faster.  Three stages at first instead of two: 459 for 467; scales in copies of 8 bytes: 431 for 446.
   Layout    A stage of the ring in shared memory (ring.cuh) has ROW_BYTES of the codes of 16 rows and their scales; a warp takes 64
             bytes of each row, 4 groups of q4 or 2 of q8.  A warp of its own fills it, before the kernel that makes x is done.
             Lane (g = lane / 4, t = lane % 4) gives the tensor core inputs 4t ... 4t + 3 and 16 + 4t ... 16 + 4t + 3 of a group, of rows
             g and g + 8: for q4 the two halves of 4 bytes.
   Limits    in a multiple of 128 (q4) or 64 (q8) for the fast kernel, of 32 for the other; matrices aligned to 16 bytes; widened q8: |w| < 65,520.
   Tested by tests/test_cuda_groups.cpp                                                                        */
#include "groups.h"

#ifdef __CUDACC__
#include "gemv.cuh"
#include "ring.cuh"
namespace cuda {

constexpr int WARPS = 16;            // that multiply; one more copies weights
constexpr int ROWS = 16;             // outputs of a tile; gated: 8 of gate, 8 of up
constexpr int CODE_BYTES = ROWS * ROW_BYTES;         // of a stage: 64 of each row are a warp's, the same 16 of 4 rows lie in different banks
constexpr int AT_FIRST = 2;          // stages on their way before x is there
constexpr int MANY_STAGES = 6, FEW_STAGES = 4, LEAST_STAGES = 2;    // of the ring, 18 KB each: the last for devices with 99 KB
constexpr int PART_BYTES = 32768;    // sums of tiles, of all warps: twice (8 rows: once)
constexpr int LANES = 8;             // that add up an output
constexpr float INTEGERS = 127 * 65536;    // the largest of x: its high byte fits
template <int R> constexpr int TILES = R == 1 ? 8 : R == 2 ? 4 : 2;    // that are added up together

template <DType T> constexpr int UNIT = T == DType::q4 ? 128 : 64;    // inputs in 64 bytes of codes, a warp's of a row in a stage
template <DType T> constexpr int STEP = UNIT<T> * WARPS;              // inputs of a stage
template <DType T> constexpr int SCALES = UNIT<T> / GROUP * 2;        // bytes of a unit's scales
template <DType T> constexpr int STAGE_BYTES = CODE_BYTES + ROWS * WARPS * SCALES<T>;
// Where a row's scales lie in a stage: those of a unit in different banks, 32 bytes together (ring.cuh).
template <DType T> __device__ inline int place_of_scales(int row, int byte) {
    const int at = row * (WARPS * SCALES<T>) + byte;
    return CODE_BYTES + (at ^ at / 128 % 4 * 32);
}
template <DType T, int STAGES> constexpr int BESIDE_X = STAGES * STAGE_BYTES<T> + PART_BYTES;
constexpr int BLOCK_BYTES = FEW_ROWS * (WARPS * 8 + 4) + 256;    // declared shared memory, at most

// x in shared memory, of a group and a pair of rows (or of one row, if there is one): a column has 32 bytes, lane t's 8 together.
// Behind the columns of all groups, for each row of a pair: the units of the integers of all groups.
template <int R> struct XPlace {    // R rows
    static constexpr int PAIRS = (R + 1) / 2, COLUMNS = R == 1 ? 4 : 8;
    int groups;
    __device__ int column_at(int group, int pair, int column) const { return ((group * PAIRS + pair) * COLUMNS + column) * 32; }
    __device__ int unit_at(int group, int n) const { return groups * PAIRS * COLUMNS * 32 + (n * groups + group) * 4; }
    static int64_t bytes(int64_t in) { return in / GROUP * (PAIRS * COLUMNS * 32 + (R == 1 ? 1 : 2 * PAIRS) * 4); }
};

// Four lanes' inputs 4t ..., 16 + 4t ... of a group of row n, as integers.
template <DType T, int R> __device__ inline void make_integers(uint8_t *xs, const XPlace<R> &place, const float4 (&v)[2], int t, int group, int n) {
    const unsigned quad = 15u << threadIdx.x % 32 / 4 * 4;
    unsigned top = 0;    // |g x| as bits, which are in its order; NaN is above all
    for (const float4 &e : v) top = max(top, __float_as_uint(fmaxf(fmaxf(fabsf(e.x), fabsf(e.y)), fmaxf(fabsf(e.z), fabsf(e.w)))));
    for (const float4 &e : v) top = max(top, __float_as_uint(fabsf(e.x + e.y + e.z + e.w)) > 0x7f800000u ? 0x7fffffffu : 0u);    // fmaxf leaves NaN out
    top = max(top, __shfl_xor_sync(quad, top, 1));
    top = max(top, __shfl_xor_sync(quad, top, 2));
    const bool tiny = top < 27u << 23;    // below 2^-100: nothing
    const float largest = __uint_as_float(top), inverse = tiny ? 0.0f : INTEGERS / largest;
    uint32_t bytes[3][2];    // [high, middle, low][inputs 4t ..., 16 + 4t ...]
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
        }
    }
    uint8_t *const to = xs + place.column_at(group, n / 2, n % 2 * 4) + 8 * t;
    for (int b = 0; b < 3; b++) *(uint2 *)(to + b * 32) = make_uint2(bytes[b][0], bytes[b][1]);
    *(uint2 *)(to + 3 * 32) = make_uint2(0, 0);
    // codes of q4 are 16 times what they are
    if (t == 0) *(float *)(xs + place.unit_at(group, n)) = tiny ? 0.0f : largest * ((T == DType::q4 ? 0.0625f : 1.0f) / INTEGERS);
}
// Rows of g x, inputs begin .. of place.groups groups.  Adds to `squares` those of the thread's part of x: whose they are depends on
// nothing but the input, not on the slab.
template <DType T, int R>
__device__ inline void fill_x(uint8_t *xs, const XPlace<R> &place, const float *x, const float *gain, int N, int in, int begin, double (&squares)[R]) {
#pragma unroll
    for (int n = 0; n < R; n++) {
        if (n >= N) break;
        for (int i = (threadIdx.x - begin / 8) % (32 * WARPS); i < place.groups * 4; i += 32 * WARPS) {
            const int t = i % 4, group = i / 4, k = begin + group * GROUP + 4 * t;
            const float *const from = x + (int64_t)n * in + k;
            float4 v[2] = {*(const float4 *)from, *(const float4 *)(from + 16)};
            if (gain) {
                squares[n] += add_squares(v[1], add_squares(v[0], 0));
                v[0] = v[0] * __ldg((const float4 *)(gain + k)), v[1] = v[1] * __ldg((const float4 *)(gain + k + 16));
            }
            make_integers<T>(xs, place, v, t, group, n);
        }
    }
}

// A unit's scales, where they are at a multiple of their size only.
template <int BYTES> __device__ inline void copy_scales(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
}
// N neighbouring numbers, one load.
template <class U, int N> struct alignas(N * sizeof(U)) Few { U of[N]; };

// Up to R rows of x.
template <DType T, int R, int STAGES>
__global__ void __launch_bounds__(32 * (WARPS + 1), 1) gemv_groups_kernel(const __grid_constant__ Products p, const float *x, int N, int in, int slab_steps) {
    extern __shared__ __align__(128) uint4 shared[];
    constexpr int GROUPS = UNIT<T> / GROUP, PAIRS = XPlace<R>::PAIRS, COLUMNS = XPlace<R>::COLUMNS;
    constexpr int TILES = cuda::TILES<R>, SUMS = COLUMNS / 2, PART = WARPS * TILES * PAIRS * ROWS * SUMS;    // SUMS: of a row of W and a pair of x
    static_assert(PART * (R == 8 ? 1 : 2) * (int)sizeof(float) == PART_BYTES, "sums have no place");
    __shared__ double squares[FEW_ROWS][WARPS];
    __shared__ float norms[FEW_ROWS];
    __shared__ uint64_t barriers[Ring::bytes(STAGES) / 8];
    static_assert(sizeof squares + sizeof norms + sizeof barriers <= BLOCK_BYTES, "more shared memory than is left");
    uint8_t *const stages = (uint8_t *)shared;
    float *const parts = (float *)(stages + STAGES * STAGE_BYTES<T>);                 // [tiles of this turn, of the last][warp][tile][pair][row of W][sum]
    uint8_t *const xs = stages + BESIDE_X<T, STAGES>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int tile_outs = p.tile_outs(ROWS), tiles = p.tiles(ROWS);
    const int steps = (in + STEP<T> - 1) / STEP<T>, slabs = (steps + slab_steps - 1) / slab_steps;
    const int begin = (int)((int64_t)tiles * blockIdx.x / gridDim.x), end = (int)((int64_t)tiles * (blockIdx.x + 1) / gridDim.x);
    const Ring ring = {(uint32_t)__cvta_generic_to_shared(barriers), STAGES, AT_FIRST};
    if (threadIdx.x == 0) ring.open(32, WARPS);
    __syncthreads();

    // ---- weights: `TILES` tiles at a time, slab by slab
    if (warp == WARPS) {
        const bool wide = in % (16 / SCALES<T> * UNIT<T>) == 0;    // a row's scales begin at a multiple of 16 bytes
        const int scale_piece = lane % 8 * (wide ? 16 : SCALES<T>);
        Ring::Place stage;
#pragma unroll 1
        for (int first = begin; first < end; first += TILES)
#pragma unroll 1
            for (int slab = 0; slab < slabs; slab++)
#pragma unroll 1
                for (int tile = first; tile < min(first + TILES, end); tile++) {
                    RowCopies codes;
                    const uint8_t *scales[RowCopies::EACH];
                    const int first_unit = slab * slab_steps * WARPS, last_unit = min(in / UNIT<T>, first_unit + slab_steps * WARPS);
#pragma unroll
                    for (int r = 0; r < RowCopies::EACH; r++) {
                        const Products::Row row = p.row_of<ROWS>(tile, codes.row(r));
                        const int64_t unit = (int64_t)row.o * (in / UNIT<T>) + first_unit;
                        codes.next[r] = (const uint8_t *)p.W[row.m].data + unit * 64 + codes.piece();
                        scales[r] = (const uint8_t *)p.W[row.m].scale + unit * SCALES<T> + scale_piece;
                    }
#pragma unroll 1
                    for (int unit = first_unit; unit < last_unit; unit += WARPS, ring.advance(stage)) {
                        uint8_t *const to = stages + stage.slot * STAGE_BYTES<T>;
                        const int units = min(WARPS, last_unit - unit);
                        ring.begin_fill(stage);
                        codes.copy<4>(to, units * 64);
                        if (wide && scale_piece < units * SCALES<T>)
#pragma unroll
                            for (int r = 0; r < RowCopies::EACH; r++) copy_weights(to + place_of_scales<T>(codes.row(r), scale_piece), scales[r]);
                        for (int b = 0; !wide && lane % 8 + b < units; b += 8)
                            for (int r = 0; r < RowCopies::EACH; r++)
                                copy_scales<SCALES<T>>(to + place_of_scales<T>(codes.row(r), scale_piece + b * SCALES<T>), scales[r] + b * SCALES<T>);
                        ring.end_fill(stage);
#pragma unroll
                        for (int r = 0; r < RowCopies::EACH; r++) scales[r] += SCALES<T> * WARPS;
                    }
                }
        return;
    }
    ask_for_gain(p.norm, in, 32 * WARPS);
    wait_for_inputs();

    // ---- products
    const int code_lane = place_in_stage<4>(g, warp * 64 + 4 * t);    // of the unit's first 16 bytes
    const int scale_low = place_of_scales<T>(g, warp * SCALES<T>), scale_high = place_of_scales<T>(g + 8, warp * SCALES<T>);
    int turn = 0;
    Ring::Place stage;
    double square[R] = {};
    for (int first = begin; first < end; first += TILES, turn ^= 1) {
        const int n_tiles = min(TILES, end - first);
        float *const sums = parts + (R == 8 ? 0 : turn * PART);
        for (int slab = 0; slab < slabs; slab++) {
            const int first_step = slab * slab_steps, last_step = min(steps, first_step + slab_steps), from = first_step * STEP<T>;
            const XPlace<R> place = {(min(in, last_step * STEP<T>) - from) / GROUP};
            if (slabs > 1 || first == begin) {
                if (slab > 0 || first > begin) meet_readers<WARPS>();
                fill_x<T, R>(xs, place, x, p.norm.weight, N, in, from, square);
                if (p.norm.weight && first == begin && slab + 1 == slabs)
#pragma unroll
                    for (int n = 0; n < R; n++) {
                        const double sum = warp_sum(square[n]);
                        if (lane == 0) squares[n][warp] = sum;
                    }
                meet_readers<WARPS>();
            }
            const uint8_t *const x_lane = xs + place.column_at(0, 0, g % COLUMNS) + 8 * t, *const unit_lane = xs + place.unit_at(0, R == 1 ? 0 : t / 2);
#pragma unroll 1
            for (int tile = 0; tile < n_tiles; tile++) {
                float *const part = sums + ((warp * TILES + tile) * PAIRS * ROWS + g) * SUMS + t % SUMS;
                float sum[PAIRS][2] = {};
                if (slab > 0)
                    for (int h = 0; h < PAIRS; h++) sum[h][0] = part[h * ROWS * SUMS], sum[h][1] = part[(h * ROWS + 8) * SUMS];
#pragma unroll 1
                for (int step = first_step; step < last_step; step++, ring.advance(stage)) {
                    ring.begin_read(stage);
                    const int unit = step * WARPS + warp, group = unit * GROUPS - from / GROUP;
                    if (unit * UNIT<T> < in) {
                        const uint8_t *const here = stages + stage.slot * STAGE_BYTES<T>;
                        const auto s_low = *(const Few<f16, GROUPS> *)(here + scale_low), s_high = *(const Few<f16, GROUPS> *)(here + scale_high);
                        auto codes_of = [&](int i, int piece) { return *(const unsigned *)(here + (code_lane ^ piece * 16) + i * 8 * ROW_BYTES); };    // of row g + 8 i
                        Few<float, GROUPS> x_unit[PAIRS];
#pragma unroll
                        for (int h = 0; h < PAIRS; h++) x_unit[h] = *(const Few<float, GROUPS> *)(unit_lane + (2 * h * place.groups + group) * 4);
#pragma unroll
                        for (int j = 0; j < GROUPS; j++) {
                            unsigned a[4];    // rows g and g + 8 of inputs 4t ..., then of 16 + 4t ...
#pragma unroll
                            for (int i = 0; i < 2; i++) {
                                if constexpr (T == DType::q4) {    // 16 (code - 8), as bytes with a sign
                                    const unsigned codes = codes_of(i, j);
                                    a[i] = (codes << 4 & 0xf0f0f0f0) ^ 0x80808080, a[2 + i] = (codes & 0xf0f0f0f0) ^ 0x80808080;
                                } else a[i] = codes_of(i, 2 * j), a[2 + i] = codes_of(i, 2 * j + 1);
                            }
                            const float s0 = to_f32(s_low.of[j]), s1 = to_f32(s_high.of[j]);
#pragma unroll
                            for (int h = 0; h < PAIRS; h++) {
                                const uint2 b = *(const uint2 *)(x_lane + ((group + j) * PAIRS + h) * COLUMNS * 32);
                                int c[4] = {};
                                mma_s8(c, a, b.x, b.y);
                                sum[h][0] = fmaf((float)(c[0] * 256 + c[1]), s0 * x_unit[h].of[j], sum[h][0]);
                                sum[h][1] = fmaf((float)(c[2] * 256 + c[3]), s1 * x_unit[h].of[j], sum[h][1]);
                            }
                        }
                    }
                    ring.end_read(stage);
                }
                if (t < SUMS)
                    for (int h = 0; h < PAIRS; h++) part[h * ROWS * SUMS] = sum[h][0], part[(h * ROWS + 8) * SUMS] = sum[h][1];
            }
        }
        if (p.norm.weight && first == begin && threadIdx.x < N) {
            double sum = 0;
            for (int w = 0; w < WARPS; w++) sum += squares[threadIdx.x][w];
            norms[threadIdx.x] = 1.0f / sqrtf((float)sum / in + p.norm.eps);
        }
        meet_readers<WARPS>();    // with two turns' sums the next turn does not wait for the readers of this one
        const int part_of = threadIdx.x % LANES, log_outs = p.gated ? 3 : 4;
        for (int i = threadIdx.x / LANES; i < R * n_tiles << log_outs; i += 32 * WARPS / LANES) {
            const int n = i % R, r = i / R & (tile_outs - 1), tile = i / R >> log_outs;
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
            if (part_of != 0 || n >= N || (first + tile) * tile_outs + r >= p.outs()) continue;
            float *const to = p.result_of(p.row_of<ROWS>(first + tile, r), n);
            *to = p.gated ? silu(y) * up : p.add ? *to + y : y;
        }
        if (R == 8) meet_readers<WARPS>();
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
    auto kernel = gemv_groups_kernel<T, R, STAGES>;
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared - BLOCK_BYTES);
    CUDA_CHECK(allowed);
    const int64_t bytes = BESIDE_X<T, STAGES> + XPlace<R>::bytes(std::min<int64_t>(in, (int64_t)slab_steps * STEP<T>));
    launch(kernel, dim3(std::min(sm_count, p.tiles(ROWS))), 32 * (WARPS + 1), bytes, p, x, N, in, slab_steps);
}
// False: N is too large, or not even a step's x fits.
template <DType T, int R, int STAGES> static bool gemv_groups_by(const Products &p, const float *x, int N, int in) {
    const int64_t room = most_shared - BLOCK_BYTES - BESIDE_X<T, STAGES>;
    const int slab_steps = (int)std::min<int64_t>(room / XPlace<R>::bytes(STEP<T>), ceil_div(in, STEP<T>));    // steps whose x fits
    if (N > R || room < 0 || slab_steps < 1) return false;
    launch_groups<T, R, STAGES>(p, x, N, in, slab_steps);
    return true;
}
// The fast kernel, by halves of the rows where not all fit: their bits are the same.
template <DType T> static void gemv_groups_fast(const Products &p, const float *x, int N, int in) {
    if (gemv_groups_by<T, 1, MANY_STAGES>(p, x, N, in) || gemv_groups_by<T, 1, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 2, FEW_STAGES>(p, x, N, in) ||
        gemv_groups_by<T, 4, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 8, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 1, LEAST_STAGES>(p, x, N, in))
        return;
    const int half = (N + 1) / 2;
    Products others = p;
    for (int i = 0; i < MAX_PRODUCTS; i++) others.y[i] += (int64_t)half * p.out[i];
    gemv_groups_fast<T>(p, x, half, in);
    if (N > 1) gemv_groups_fast<T>(others, x + (int64_t)half * in, N - half, in);
}
template <DType T> static bool fast(int in) { return in % UNIT<T> == 0 && most_shared - BLOCK_BYTES >= BESIDE_X<T, LEAST_STAGES> + XPlace<1>::bytes(STEP<T>); }
bool gemv_groups_norms(DType type, int in) { return type == DType::q4 ? fast<DType::q4>(in) : fast<DType::q8>(in); }
template <DType T> static void gemv_groups_of(const Products &p, const float *x, int N, int in) {
    if (fast<T>(in)) return gemv_groups_fast<T>(p, x, N, in);
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
