/* gemm_batch - products of 9 to 32 rows of x on CUDA, the kernels of a decode step of a batch: every weight is read once.

   y[n,o] = s[n] sum_i W[o,i] (g[i] x[n,i])          letters as in gemv.cu; norm, add and gated happen here, too

   Math      Tensor cores, m16n8k16: 16 rows of W times 8 rows of x; g x is rounded to f16, sums are f32, s comes last.
   Order     A cluster of thread blocks shares the inputs of its outputs: each adds up a range of them from left to right, then these
             sums are added in the order of the ranges.  Fixed by in and out: a row has the same bits in every step of 9 to 32 rows.
   Work      Weights are read once, but x by everybody who has other outputs: beside a weight's 2 bytes, 4 N / (outputs at a time) come
             from L2.  So a thread block has up to 224 outputs at a time, and where a matrix is too small for that on every
             multiprocessor, 2 or 4 thread blocks share them, each with a part of the inputs (cluster_of).
   Layout    A warp takes 128 inputs of a tile of 16 outputs at a time, through a ring in shared memory that is filled before the
             kernel that makes x is done.  Lane (g = lane / 4, t = lane % 4) gives the tensor core inputs 8t ... 8t + 7 of a block of
             32, of rows g and g + 8: two mma.  x becomes f16 a step ahead and lies as the tensor core takes it.
   Cost      Llama-3-8B, 32 rows, ncu: gate and up 91 us (77 at the read bandwidth), down 52 (38), qkv 29 (16), wo 23 (11); without
             products and x, weights alone, 88, 50, 28 and 21.  Clusters of 4 take 120 of an H100's 132 multiprocessors.
             In a step of 32 sequences (clocks read in the kernels), from one kernel's x to the next one's: gate and up 85 us, down 54, qkv
             22, wo 24.  Of down: 2.8 until the first products, 38 at 2.7 TB/s, 5 until a cluster has added up, up to 7 more for
             clusters whose multiprocessors the kernel before left last.
             Tried: x as two f16 (split_f16): 2.1 us a step of 64 inputs where memory takes 1.2; 8 thread blocks a cluster: an H100
             has no place for 16 of those, and two rounds take twice as long; clusters of 2 (3,797 tok/s for 4,124); thread blocks of
             half a multiprocessor (113 KB, 8 warps of two tiles, stages of 64 inputs, x a step of 128 ahead), so that the next kernel's
             fill their ring beside them: 94, 69, 36 and 29 us alone, and 3,918 tok/s for 4,144 (3,775 if those start at once); asking for
             the first 8, 16 or 32 MB of the next product's weights to come to L2 once all of the own are asked for: 4,043, 4,039 and
             3,955 tok/s for 4,085; weights copied by 8 warps of their own (ring.cuh): 4,064 for 4,177;
             one stage asked for before x is there, the others after: 4,035 and 4,059 for 4,154 and 4,165.
   Limits    9 <= N <= 32; f16 weights, in a multiple of 8, all of it aligned to 16 bytes; |g x| < 65,520; a thread block of 227 KB.
   Tested by tests/test_cuda_matmul.cpp                         Timed by ./run --bench -b 32                        */
#ifdef __CUDACC__
#include <algorithm>
#include <cstdlib>
#include "gemv.cuh"
namespace cuda {

constexpr int WARPS = 16;
constexpr int ROWS = 16;                  // of weights in a tile, a warp's
constexpr int TILES = 14;                 // of a thread block at a time, at most: three stages fit
constexpr int STEP = 128;                 // inputs at a time: 256 neighbouring bytes of a row
constexpr int TILE_BYTES = ROWS * STEP * 2;
constexpr int MOST_CLUSTER = 4;
constexpr int ENOUGH_TILES = 10;          // of a thread block
constexpr int SUM_PITCH = TILES * ROWS + 4;    // from a row of x to the next in the sums: lanes meet different banks
constexpr int AT_ONCE = 4;                // results of a thread
constexpr int MOST_SHARED = 227 * 1024;   // bytes that a thread block takes, at most

// Shared memory, where what begins.  x of two steps: [step][block of 32 inputs][8 rows][row][t], 8 numbers each.
template <int GROUPS> struct Shared {     // GROUPS of 8 rows of x
    static constexpr int X_STEP = STEP / 32 * GROUPS * 32, SUMS = 2 * X_STEP * 16, SQUARES = SUMS + GROUPS * 8 * SUM_PITCH * 4;
    static constexpr int ROW_SQUARES = SQUARES + STEP / 32 * GROUPS * 8 * 8, RING = ROW_SQUARES + GROUPS * 8 * 8;
};

// copy_weights by address; zeros if they are not wanted.
__device__ inline void copy_async(unsigned to, const uint4 *from, bool wanted) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0) : "memory");
}
__device__ inline void sync_cluster(int cluster) {
#if __CUDA_ARCH__ >= 900
    if (cluster > 1) return __cluster_barrier_arrive(), __cluster_barrier_wait();
#endif
    __syncthreads();
}
// The sum over a cluster's thread blocks of what each has at `at`, in their order.
template <class T> __device__ inline T sum_of_cluster(T *at, int cluster) {
#if __CUDA_ARCH__ >= 900
    if (cluster > 1) {
        T each[MOST_CLUSTER], sum = 0;
#pragma unroll
        for (int r = 0; r < MOST_CLUSTER; r++) each[r] = r < cluster ? *(T *)__cluster_map_shared_rank(at, r) : 0;
#pragma unroll
        for (int r = 0; r < MOST_CLUSTER; r++) sum += each[r];
        return sum;
    }
#endif
    return *at;
}

template <int GROUPS, int STAGES>
__global__ void __launch_bounds__(32 * WARPS, 1) gemm_batch_kernel(const __grid_constant__ Products p, const float *x, int N, int in, int cluster, int most_tiles) {
    using S = Shared<GROUPS>;
    extern __shared__ __align__(128) uint8_t shared[];
    uint4 *const xs = (uint4 *)shared;
    float *const sums = (float *)(shared + S::SUMS);
    double *const row_squares = (double *)(shared + S::ROW_SQUARES);
    double *const squares = (double *)(shared + S::SQUARES);    // [row][block of 32 inputs]; row_squares: of all that the thread block has
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % cluster, clusters = gridDim.x / cluster, tiles = p.tiles(ROWS), all_steps = (in + STEP - 1) / STEP;
    const int begin = (int)((int64_t)tiles * (blockIdx.x / cluster) / clusters), end = (int)((int64_t)tiles * (blockIdx.x / cluster + 1) / clusters);
    const int first_step = all_steps * rank / cluster, last_step = all_steps * (rank + 1) / cluster;
    const int rounds = (end - begin + most_tiles - 1) / most_tiles;
    auto round_at = [&](int round) { return begin + (int)((int64_t)(end - begin) * round / rounds); };

    // ---- weights: a lane copies 16 bytes of rows lane / 16, 2 further ... of its warp's tile
    const unsigned stage_bytes = most_tiles * TILE_BYTES, mine = warp * TILE_BYTES;
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared + S::RING) + mine + lane / 16 * 256 + (lane % 16 ^ lane / 16 * 4) * 16;    // odd rows have
                                                                                                   // neighbouring 64 bytes swapped: two rows meet all banks
    struct { int round, step; bool there; } next = {0, first_step, false};    // stage to load
    int w[8];    // where rows begin, the lane's bytes of them: 16 bytes a number, from the first matrix
    auto find_rows = [&] {
        const int tile = next.round < rounds ? round_at(next.round) + warp : end;
        next.there = first_step < last_step && next.round < rounds && tile < round_at(next.round + 1);
        for (int r = 0; r < 8 && next.there; r++) w[r] = (int)((const uint4 *)p.weights_of<f16>(p.row_of<ROWS>(tile, 2 * r + lane / 16), in) - (const uint4 *)p.W[0].data) + lane % 16;
    };
    auto load_rows = [&](int stage, int r) {    // r and the next
        const bool inside = next.step * STEP + lane % 16 * 8 < in;
        const uint4 *const from = (const uint4 *)p.W[0].data + (inside ? next.step * (STEP / 8) : 0);
        if (next.there)
            for (int i = r; i < r + 2; i++) copy_async(to + stage * stage_bytes + i * 512, from + w[i], inside);
    };
    auto end_load = [&] {
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (++next.step >= last_step) next.step = first_step, next.round++, find_rows();
    };
    find_rows();
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) {
        for (int r = 0; r < 8; r += 2) load_rows(s, r);
        end_load();
    }
    wait_for_inputs();

    // ---- x: a thread has 8 neighbouring numbers of row xn, in block of 32 inputs xb
    const int xb = threadIdx.x / (32 * GROUPS), xn = threadIdx.x / 4 % (8 * GROUPS);
    const bool has_x = xb < STEP / 32;
    float4 xr[2], gain[2];
    auto load_x = [&](int step) {
        const int k = step * STEP + xb * 32 + 8 * t;
        for (int i = 0; i < 2; i++) {
            xr[i] = has_x && xn < N && k < in ? *((const float4 *)(x + (int64_t)xn * in + k) + i) : make_float4(0, 0, 0, 0);
            if (p.norm.weight && has_x) gain[i] = __ldg((const float4 *)(p.norm.weight + min(k, in - 8)) + i);
        }
    };
    double square = 0;
    auto store_x = [&](uint4 *to, bool count) {
        if (!has_x) return;
        if (p.norm.weight)
            for (int i = 0; i < 2; i++) {
                if (count) square += add_squares(xr[i], 0);
                xr[i] = xr[i] * gain[i];
            }
        to[(xb * GROUPS + xn / 8) * 32 + xn % 8 * 4 + t] = make_uint4(pack(xr[0].x, xr[0].y), pack(xr[0].z, xr[0].w), pack(xr[1].x, xr[1].y), pack(xr[1].z, xr[1].w));
    };

    // ---- products
    int stage = 0, buffer = 0;
    if (first_step < last_step) load_x(first_step);
    else if (threadIdx.x < 8 * GROUPS) row_squares[threadIdx.x] = 0;
    // Results: a thread has output `out` of row x_row, of every `apart`-th of the thread block's tiles from tile_lane on.
    const int log_outs = p.gated ? 3 : 4, outs = 1 << log_outs, out = threadIdx.x & (outs - 1), x_row = threadIdx.x >> log_outs & (8 * GROUPS - 1);
    const int tile_lane = (threadIdx.x >> log_outs) / (8 * GROUPS), apart = (32 * WARPS >> log_outs) / (8 * GROUPS);
    float scale = 1;
#pragma unroll 1
    for (int round = 0; round < rounds; round++) {
        const int from = round_at(round), n_tiles = round_at(round + 1) - from;
        float sum[GROUPS][4] = {};
#pragma unroll 1
        for (int step = first_step; step < last_step; step++) {
            uint4 *const x_here = xs + buffer * S::X_STEP;
            store_x(x_here, round == 0);
            const bool squared = p.norm.weight && round == 0 && step + 1 == last_step;
            if (squared && has_x) {
                square += __shfl_xor_sync(~0u, square, 1);
                square += __shfl_xor_sync(~0u, square, 2);
                if (t == 0) squares[xn * (STEP / 32) + xb] = square;
            }
            load_x(step + 1 < last_step ? step + 1 : first_step);
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncthreads();    // x and weights of this step are there, and nobody reads what is written next
            if (squared && threadIdx.x < 8 * GROUPS) {
                double sum = 0;
                for (int b = 0; b < STEP / 32; b++) sum += squares[threadIdx.x * (STEP / 32) + b];
                row_squares[threadIdx.x] = sum;
            }
            const int free_stage = stage == 0 ? STAGES - 1 : stage - 1;
            const uint8_t *const row = shared + S::RING + stage * stage_bytes + mine + g * 256;
#pragma unroll
            for (int b = 0; b < STEP / 32; b++) {    // the loads of a later step between the products of this one
                load_rows(free_stage, 2 * b);
                if (warp >= n_tiles) continue;
                const uint4 *const at = (const uint4 *)row + ((b * 4 + t) ^ g % 2 * 4), r0 = at[0], r1 = at[8 * 16];
                const unsigned a[2][4] = {{r0.x, r1.x, r0.y, r1.y}, {r0.z, r1.z, r0.w, r1.w}};
#pragma unroll
                for (int j = 0; j < GROUPS; j++) {
                    const uint4 v = x_here[(b * GROUPS + j) * 32 + lane];
                    mma(sum[j], a[0], v.x, v.y), mma(sum[j], a[1], v.z, v.w);
                }
            }
            end_load();
            stage = stage + 1 == STAGES ? 0 : stage + 1, buffer ^= 1;
        }
        if (warp < n_tiles)
#pragma unroll
            for (int j = 0; j < GROUPS; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[(8 * j + 2 * t + c % 2) * SUM_PITCH + warp * ROWS + g + c / 2 * 8] = sum[j][c];

        // ---- a cluster adds up: thread block `rank` tiles rank, rank + cluster ...; a thread a few at a time
        float *to[AT_ONCE], old[AT_ONCE];
        auto find_results = [&](int first) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int tile = (first + j * apart) * cluster + rank;
                const bool wanted = tile < n_tiles && x_row < N && ((from + tile) << log_outs) + out < p.outs();
                to[j] = wanted ? p.result_of(p.row_of<ROWS>(from + tile, out), x_row) : nullptr;
                old[j] = wanted && p.add ? *to[j] : 0.0f;
            }
        };
        find_results(tile_lane);
        sync_cluster(cluster);
        if (round == 0 && p.norm.weight) scale = 1.0f / sqrtf((float)sum_of_cluster(row_squares + x_row, cluster) / in + p.norm.eps);
        for (int first = tile_lane; first * cluster + rank < n_tiles; first += AT_ONCE * apart) {
            if (first > tile_lane) find_results(first);
            float y[AT_ONCE], up[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                float *const at = sums + x_row * SUM_PITCH + min((first + j * apart) * cluster + rank, n_tiles - 1) * ROWS + out;
                y[j] = sum_of_cluster(at, cluster), up[j] = p.gated ? sum_of_cluster(at + ROWS / 2, cluster) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                if (to[j]) *to[j] = p.gated ? silu(y[j] * scale) * (up[j] * scale) : old[j] + y[j] * scale;
        }
        sync_cluster(cluster);    // sums are read
    }
}

// Thread blocks that share the inputs of their outputs; of so many tiles of weights.
static int cluster_of(int tiles) {
    int cluster = 1;
    while (cluster < MOST_CLUSTER && ceil_div(tiles, GPU_SMS / cluster) < ENOUGH_TILES) cluster *= 2;
    return cluster;
}
template <int GROUPS, int STAGES> static void launch_batch(const Products &p, const float *x, int N, int in, int cluster, int clusters, int most_tiles) {
    static const cudaError_t allowed = cudaFuncSetAttribute(gemm_batch_kernel<GROUPS, STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED);
    CUDA_CHECK(allowed);
    launch_clusters(gemm_batch_kernel<GROUPS, STAGES>, clusters * cluster, cluster, 32 * WARPS, Shared<GROUPS>::RING + STAGES * most_tiles * TILE_BYTES, p, x, N, in, cluster, most_tiles);
}
// Clusters of that size that are at work at once, if each takes all of its multiprocessors' shared memory.
static int clusters_at_once(int cluster) {
    if (cluster == 1) return sm_count;
    static int known[MOST_CLUSTER + 1];
    int &n = known[cluster];
    if (n == 0) {
        auto kernel = gemm_batch_kernel<4, 3>;
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED));
        cudaLaunchAttribute size = {};
        size.id = cudaLaunchAttributeClusterDimension;
        size.val.clusterDim = {(unsigned)cluster, 1, 1};
        cudaLaunchConfig_t config = {dim3(cluster), dim3(32 * WARPS), MOST_SHARED, stream, &size, 1};
        CUDA_CHECK(cudaOccupancyMaxActiveClusters(&n, kernel, &config));
        n = std::max(n, 1);
    }
    return n;
}
template <int GROUPS> static void gemm_batch_of(const Products &p, const float *x, int N, int in) {
    const int tiles = p.tiles(ROWS), cluster = cluster_of(tiles), clusters = std::min(tiles, clusters_at_once(cluster));
    const int most = (int)ceil_div(tiles, clusters), most_tiles = (int)ceil_div(most, ceil_div(most, TILES));
    const int stages = (MOST_SHARED - Shared<GROUPS>::RING) / (most_tiles * TILE_BYTES);
    if (stages >= 6) launch_batch<GROUPS, 6>(p, x, N, in, cluster, clusters, most_tiles);
    else if (stages >= 4) launch_batch<GROUPS, 4>(p, x, N, in, cluster, clusters, most_tiles);
    else launch_batch<GROUPS, 3>(p, x, N, in, cluster, clusters, most_tiles);
}
bool gemm_batch_serves(DType type, int N, int in) {    // starts_early: compute capability 9.0, which has clusters
    return type == DType::f16 && N <= BATCH_ROWS && in % 8 == 0 && starts_early && most_shared >= MOST_SHARED;
}
bool gemm_batch(const Products &p, const float *x, int N, int in) {
    constexpr int64_t FARTHEST = (int64_t)1 << 34;    // bytes from the first matrix to another: rows are found by 32-bit numbers of 16 bytes
    for (int i = 1; i < MAX_PRODUCTS; i++)
        if (p.out[i] > 0 && std::abs((const char *)p.W[i].data - (const char *)p.W[0].data) > FARTHEST) return false;
    N <= 16 ? gemm_batch_of<2>(p, x, N, in) : gemm_batch_of<4>(p, x, N, in);
    return true;
}
}    // namespace cuda
#endif
