/* gemv - products of up to 8 rows of x on CUDA, the kernels of a decode step: every weight is read once, at memory speed.

   y[n,o] = s[n] sum_i W[o,i] (g[i] x[n,i])          s[n] = 1 / sqrt( mean_i x[n,i]^2 + eps )

   The norm's weights g and s are 1 where there is no norm, and for f32 and bf16 (matmul.cu calls rmsnorm); q8 and q4 are
   gemv_groups.cu's.  Letters, and what add and gated do with y, are matmul.cu's.

   Math      f16, in a multiple of 8: tensor cores, x as a sum of two f16, sums in f32.  A product is linear, so s can wait: x is
             multiplied by g on its way in, its squares are added up beside, and finished sums are scaled.
             Other types: f32 multiply-adds, a warp a few outputs.
   Order     Fixed by `in`: neither N, nor a row's place, nor the number of SMs enters a sum.
   Work      A thread block owns tiles of 16 outputs (gated: 8 of gate, 8 of up) and shares their inputs among its warps, which add up
             in order at the end of a tile.  A warp of its own copies weights into a ring (ring.cuh); each of the others splits the x
             of its inputs once and keeps it in shared memory.
   Memory    What the formula costs is 2 bytes a weight; what a launch costs beside is the time in which nobody has asked for
             weights.  So a thread block starts while the kernel before it is at work, fills its ring, and waits for x only then.
   Cost      Batch 1, depth 0, tok/s: Llama-3.2-1B 1,004 to 1,013, Llama-3-8B 192 to 194, Llama-2-7B 215.  912, 180 and 200 when 16 warps copied for
             themselves, five stages, and read and split x again for every tile; some 4% of the 1B came with attention_decode.cu.
             Tried: f32 multiply-adds, weights in registers: 2.5 TB/s over the layers of Llama-3-8B, 1.7 at 8 rows.
             Tried: each warp its own copies, x in shared memory: 961 and 187; with two thread blocks of different kernels on a multiprocessor
             (one takes more than half of the shared memory, the other of the registers, so that never two of one kernel meet), the next let
             loose when all but one stage is asked for: 951 and 181.
             Tried: stages on their way at any time, 1B: all 966, three 985, two 939, one 744; 8B: three at first 192, for good 189, four
             for good 191.  Six stages in all for eight: 983 for 1,010.
             Tried, with the kernel before this one: weights behind the ring prefetched to L2 (220 us a layer for 196); all products from one
             attention to the next in one launch, whose thread blocks meet at a counter in L2 (828 tok/s for 864: a meeting takes 1.4 us, the
             end of a kernel to the next one's x less than 1); two thread blocks of any kernel a multiprocessor (730 for 867: some
             multiprocessors get two of one kernel, and those come last); bulk copies (869 for 862, 172 for 178).
   Limits    N <= 8; weights and rows of x aligned to 16 bytes where in is a multiple of 8; f16: |g x| < 2^20.
   Tested by tests/test_cuda_matmul.cpp                                                                                   */
#ifdef __CUDACC__
#include <algorithm>
#include "gemv.cuh"
#include "ring.cuh"
namespace cuda {

// ---- f16: tensor cores --------------------------------------------------------------------------------------
// mma m16n8k16 multiplies 16 rows of W with 8 columns, the rows of x.  A lane (g = lane / 4, t = lane % 4) gives it W[g] and
// W[g + 8] at two pairs of inputs and x[g] at the same; which inputs is free as long as both agree.  So a lane takes 16 bytes
// of two rows of W, inputs 8 t .. 8 t + 7 of a block of 32, and those of x[g]: two mma.  Nothing in a column's sum depends on the
// others.
constexpr int MMA_ROWS = 16;                              // of weights in a tile
constexpr int MMA_WARPS = 8;                              // that multiply; one more copies weights
constexpr int THREADS = 32 * (MMA_WARPS + 1);
constexpr int WARP_INPUTS = 64;                           // a warp's of a row in a stage
constexpr int STAGE_INPUTS = WARP_INPUTS * MMA_WARPS;     // ROW_BYTES of a row
constexpr int STAGE_BYTES = MMA_ROWS * ROW_BYTES;         // 64 bytes of two rows lie in different banks
constexpr int MANY_STAGES = 8, FEW_STAGES = 4, LEAST_STAGES = 2;    // of the ring: the first if x fits beside it, the last for devices with 99 KB
constexpr int AT_FIRST = 3;                               // stages on their way before x is there
constexpr int ROUND_SUMS = MMA_ROWS * FEW_ROWS;           // that are added up at a time: a tile of 8 rows, or eight of one
static_assert(ROUND_SUMS <= 32 * MMA_WARPS, "a thread adds up one");

// A warp's part of a row of x in shared memory: 8 inputs are a chunk, 16 bytes of high halves and 16 of low ones (split_f16).
struct Halves {
    int chunks;    // 8 of a stage
    HD int row() const { return 2 * chunks + 4; }    // from row to row, in 16 bytes: two rows' 64 bytes lie in different banks
    HD static int64_t bytes(int steps, int N) { return (int64_t)MMA_WARPS * N * Halves{8 * steps}.row() * 16; }
    static int steps_in(int64_t bytes, int N) { return std::max<int>(0, (int)(bytes / (MMA_WARPS * N * 16) - 4) / 16); }
};
// The warp's inputs of stages first_step .. last_step-1; R: rows, at most.  Adds to `squares` those of the lane's chunks: whose they are
// depends on nothing but the input.
template <int R>
__device__ inline void fill_halves(uint4 *xs, Halves place, const float *x, const float *gain, int N, int in, int first_step, int last_step, double (&squares)[R]) {
    constexpr int AT_ONCE = R == 1 ? 4 : 1;    // chunks whose loads are on their way together
    const int lane = threadIdx.x % 32, first = 8 * first_step, last = 8 * last_step;
    __syncwarp();    // all have read what was here
#pragma unroll
    for (int n = 0; n < R; n++) {
        if (n >= N) break;
#pragma unroll 1
        for (int c0 = first / 32 * 32 + lane; c0 < last; c0 += 32 * AT_ONCE) {
            float4 v[AT_ONCE][2];
            auto input = [&](int i) { return (c0 / 8 + 4 * i) * STAGE_INPUTS + threadIdx.x / 32 * WARP_INPUTS + c0 % 8 * 8; };
            auto wanted = [&](int i) { return c0 + 32 * i >= first && c0 + 32 * i < last; };
            auto inside = [&](int i) { return wanted(i) && input(i) < in; };
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float4 *const from = (const float4 *)(x + (int64_t)n * in + input(i));
                v[i][0] = v[i][1] = make_float4(0, 0, 0, 0);
                if (inside(i)) v[i][0] = from[0], v[i][1] = from[1];
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (!wanted(i)) continue;
                if (gain && inside(i)) {    // 8 squares in f32, the rest in f64: off by 2^-21 of the sum at worst, 2^-22 of s
                    squares[n] += add_squares(v[i][1], add_squares(v[i][0], 0));
                    const float4 *const g = (const float4 *)(gain + input(i));
                    v[i][0] = v[i][0] * __ldg(g), v[i][1] = v[i][1] * __ldg(g + 1);
                }
                uint4 high, low;
                split_f16(high.x, low.x, v[i][0].x, v[i][0].y), split_f16(high.y, low.y, v[i][0].z, v[i][0].w);
                split_f16(high.z, low.z, v[i][1].x, v[i][1].y), split_f16(high.w, low.w, v[i][1].z, v[i][1].w);
                uint4 *const to = xs + n * place.row() + c0 + 32 * i - first;
                to[0] = high, to[place.chunks] = low;
            }
        }
    }
    __syncwarp();
}

template <int R, int STAGES>
__global__ void __launch_bounds__(THREADS, 1) gemv_mma_kernel(const __grid_constant__ Products p, Tiles share, const float *x, int N, int in, int slab_steps) {
    extern __shared__ __align__(128) uint4 shared[];             // ring, x of each warp
    __shared__ float parts[2][MMA_WARPS * ROUND_SUMS];           // [tile of the round][warp][output][row of x]
    __shared__ double squares[MMA_WARPS][FEW_ROWS];
    __shared__ uint64_t barriers[Ring::bytes(STAGES) / 8];
    uint8_t *const stages = (uint8_t *)shared;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int begin = share.begin(), end = share.end(), steps = (in + STAGE_INPUTS - 1) / STAGE_INPUTS;
    const Ring ring = {(uint32_t)__cvta_generic_to_shared(barriers), STAGES, AT_FIRST};

    if (warp == MMA_WARPS) {    // weights
        if (lane == 0) ring.open(32, MMA_WARPS);
        __syncwarp();
        say_open<THREADS>();
        Ring::Place stage;
#pragma unroll 1
        for (int tile = begin; tile < end; tile++) {
            RowCopies rows;
            const Products::Row first = p.first_of<MMA_ROWS>(tile);
#pragma unroll
            for (int r = 0; r < RowCopies::EACH; r++) rows.next[r] = (const uint8_t *)p.weights_of<f16>(p.row_of<MMA_ROWS>(first, rows.row(r)), in) + rows.piece();
#pragma unroll 1
            for (int step = 0; step < steps; step++, ring.advance(stage)) {
                ring.begin_fill(stage);
                rows.copy(stages + stage.slot * STAGE_BYTES, (in - step * STAGE_INPUTS) * 2, place_in_stage<2>);
                ring.end_fill(stage);
            }
        }
        return;
    }
    wait_open<THREADS>();
    // This thread's output: of row n, row r of tile `of` of a round.  Divisions take a while: here nobody waits for them.
    const int tile_outs = p.tile_outs<MMA_ROWS>(), round = ROUND_SUMS / (MMA_ROWS * N), n = threadIdx.x % N, r = threadIdx.x / N % tile_outs, of = threadIdx.x / N / tile_outs;
    const Halves place = {8 * slab_steps};
    uint4 *const xs = shared + STAGES * STAGE_BYTES / 16 + warp * N * place.row();
    const uint4 *const x_lane = xs + min(g, N - 1) * place.row() + t;
    const int w_lane = place_in_stage<2>(g, warp * (WARP_INPUTS * 2) + t * 16);
    ask_for_gain(p.norm, in, 32 * MMA_WARPS);
    wait_for_inputs();

    Ring::Place stage;
    int at = 0, half = 0;    // at: tile of the round
    double square[R] = {};
    float scale = 1;
    for (int tile = begin; tile < end; tile++, at++) {
        float high_sum[4] = {}, low_sum[4] = {};
        for (int from = 0; from < steps; from += slab_steps) {
            const int to = min(steps, from + slab_steps);
            if (tile == begin || slab_steps < steps) fill_halves<R>(xs, place, x, p.norm.weight, N, in, from, to, square);
#pragma unroll 1
            for (int step = from; step < to; step++, ring.advance(stage)) {
                ring.begin_read(stage);
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    const bool inside = step * STAGE_INPUTS + warp * WARP_INPUTS + b * 32 + 8 * t < in;
                    const uint8_t *const row = stages + stage.slot * STAGE_BYTES + (w_lane ^ b * 64);
                    const uint4 zero = make_uint4(0, 0, 0, 0), r0 = inside ? *(const uint4 *)row : zero, r1 = inside ? *(const uint4 *)(row + 8 * ROW_BYTES) : zero;
                    const uint4 *const chunk = x_lane + (step - from) * 8 + b * 4;
                    const uint4 high = chunk[0], low = chunk[place.chunks];
                    mma(high_sum, {r0.x, r1.x, r0.y, r1.y}, high.x, high.y);
                    mma(low_sum, {r0.x, r1.x, r0.y, r1.y}, low.x, low.y);
                    mma(high_sum, {r0.z, r1.z, r0.w, r1.w}, high.z, high.w);
                    mma(low_sum, {r0.z, r1.z, r0.w, r1.w}, low.z, low.w);
                }
                ring.end_read(stage);
            }
        }
        if (p.norm.weight && tile == begin)
#pragma unroll
            for (int i = 0; i < R; i++) {
                const double sum = warp_sum(square[i]);
                if (lane == 0) squares[warp][i] = sum;
            }
        // Warps meet once a round of tiles.
        float *const part = parts[half];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (2 * t + i % 2 < N) part[((at * MMA_WARPS + warp) * MMA_ROWS + g + i / 2 * 8) * N + 2 * t + i % 2] = fmaf(low_sum[i], 1.0f / 2048, high_sum[i]) * 16.0f;
        if (at + 1 < round && tile + 1 < end) continue;
        float *const to = of <= at ? p.result_of<MMA_ROWS>(tile - at + of, r, n) : nullptr;
        const float old = p.add && to ? *to : 0.0f;    // asked for before the others are here
        meet_readers<MMA_WARPS>();    // the other half of parts keeps the next round from the readers of this one
        if (p.norm.weight && tile - at == begin) {
            double sum = 0;
            for (int j = 0; j < MMA_WARPS; j++) sum += squares[j][n];
            scale = 1.0f / sqrtf((float)sum / in + p.norm.eps);
        }
        if (to) {
            float sum = 0, up = 0;
            for (int j = 0; j < MMA_WARPS; j++) {
                sum += part[((of * MMA_WARPS + j) * MMA_ROWS + r) * N + n];
                if (p.gated) up += part[((of * MMA_WARPS + j) * MMA_ROWS + r + 8) * N + n];
            }
            if (p.norm.weight) sum *= scale, up *= scale;
            *to = p.gated ? silu(sum) * up : old + sum;
        }
        at = -1, half ^= 1;    // the next tile is the first of a round
    }
}

// False: not even a slab of x fits, or, if it has to, all of it.
template <int R, int STAGES> static bool gemv_mma(const Products &p, const float *x, int N, int in, bool whole) {
    constexpr int DECLARED = 2 * MMA_WARPS * ROUND_SUMS * (int)sizeof(float) + MMA_WARPS * FEW_ROWS * (int)sizeof(double) + Ring::bytes(STAGES);
    constexpr int BESIDE = (DECLARED + 127) / 128 * 128;    // the kernel's other shared memory
    const int steps = (int)ceil_div(in, STAGE_INPUTS);
    const int64_t room = most_shared - BESIDE - STAGES * STAGE_BYTES;
    const int slab_steps = std::min(steps, Halves::steps_in(room, N));
    if (N > R || slab_steps < (whole ? steps : 1)) return false;
    auto kernel = gemv_mma_kernel<R, STAGES>;
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared - BESIDE);
    CUDA_CHECK(allowed);
    const Tiles share(p.tiles<MMA_ROWS>());
    launch(kernel, share.blocks(), THREADS, STAGES * STAGE_BYTES + Halves::bytes(slab_steps, N), p, share, x, N, in, slab_steps);
    return true;
}
static void gemv_mma(const Products &p, const float *x, int N, int in) {
    if (gemv_mma<1, MANY_STAGES>(p, x, N, in, true) || gemv_mma<FEW_ROWS, MANY_STAGES>(p, x, N, in, true) || gemv_mma<1, FEW_STAGES>(p, x, N, in, false) ||
        gemv_mma<FEW_ROWS, FEW_STAGES>(p, x, N, in, false) || gemv_mma<FEW_ROWS, LEAST_STAGES>(p, x, N, in, false))
        return;
    fail("GPU: %d bytes of shared memory a thread block are too few", most_shared);
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
    if (tile >= p.tiles<ROWS>()) return;
    const Products::Row first = p.first_of<ROWS>(tile);
    const T *w[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) w[r] = p.weights_of<T>(p.row_of<ROWS>(first, r), in);
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
    const int n = lane / ROWS, r = lane % ROWS;
    float *const to = n < N && r < p.tile_outs<ROWS>() ? p.result_of<ROWS>(tile, r, n) : nullptr;
    if (to) *to = p.gated ? silu(mine) * up : p.add ? *to + mine : mine;
}

template <int R, class T, bool VECTOR> static void gemv_of(const Products &p, const float *x, int N, int in) {
    launch(gemv_kernel<R, T, VECTOR>, dim3(ceil_div(p.tiles<TILE_ROWS<R>>(), GEMV_WARPS)), 32 * GEMV_WARPS, 0, p, x, N, in);
}
template <class T> static void gemv_type(const Products &p, const float *x, int N, int in) {
    if (in % CHUNK) gemv_of<FEW_ROWS, T, false>(p, x, N, in);
    else if (N == 1) gemv_of<1, T, true>(p, x, N, in);
    else if (N == 2) gemv_of<2, T, true>(p, x, N, in);
    else if (N <= 4) gemv_of<4, T, true>(p, x, N, in);
    else gemv_of<FEW_ROWS, T, true>(p, x, N, in);
}

bool gemv_norms(DType type, int in) { return is_grouped(type) ? gemv_groups_serves(type, in) : type == DType::f16 && in % CHUNK == 0; }

void gemv(const Products &p, const float *x, int N, int in) {
    switch (p.W[0].type) {
    case DType::f32: return gemv_type<float>(p, x, N, in);
    case DType::f16:
        if (in % CHUNK) return gemv_of<FEW_ROWS, f16, false>(p, x, N, in);
        return gemv_mma(p, x, N, in);
    case DType::bf16: return gemv_type<bf16>(p, x, N, in);
    case DType::q8: case DType::q4: return gemv_groups_serves(p.W[0].type, in) ? gemv_groups(p, x, N, in) : gemv_groups_any(p, x, N, in);
    }
}
}    // namespace cuda
#endif
