/* gemm_batch - products of 5 to 32 rows of x on CUDA, the kernels of a decode step of a batch: every weight is read once.

   y[n,o] = s[n] sum_i W[o,i] (g[i] x[n,i])          letters as in gemv.cu; norm, add and gated happen here, too

   Math      Tensor cores, m16n8k16: 16 rows of W times 8 rows of x; g x is rounded to f16, sums are f32, s comes last.
             q8 and q4 (groups.h): a code times its scale becomes f16 on its way from shared memory, q8 rounded, q4 exactly.
   Order     A warp adds up every so many-th step of inputs from left to right, then the parts of a tile's warps are added in their order.
             Fixed by in, out and the type: a row has the same bits in every step of 5 to 32 rows.
   Work      Weights are read once, but x by everybody who has other outputs: as f16, in the order in which the tensor core takes it, it
             costs next to nothing (copies alone, gate and up of Llama-3-8B: weights 77.1 us, with x 77.7, with x in f32 102.6).  So whoever
             makes x leaves it like that (rows16.cuh); if nobody did, the thread blocks make it together, and meet.
   Layout    A stage of the ring (ring.cuh) has 64 inputs, of codes 128, of a tile of 16 outputs for each warp, and their x.  One warp asks for
             weights, before the kernel that makes x is done, one thread for x: bulk copies, weights as boxes of a matrix (tensor maps, CUDA
             driver API), so that those 16 warps only multiply.  Rows of a box change places so that they meet all banks.  Scales go from
             memory to the lanes that need them, two stages ahead.
   Cost      Products of a step of Llama-3-8B, us (bench_products): 8 rows f16 5,370, q8 3,510, q4 2,740; 32 rows 5,700, 4,040, 3,570.  Before, 8 rows
             in gemv.cu and gemv_groups.cu took 8,580, 7,510 and 4,890, 32 rows of codes, widened for cuBLAS, 14,840 and 13,740.
             Codes: a warp takes 198 instructions for a step of 128 inputs and 8 rows, 248 of 32 rows (q4).  ncu, gate and up, 8 rows: 44% of
             the issue slots, 44% of the bandwidth; of 9 cycles between two instructions of a warp 3.0 wait for memory, 1.7 are those of
             warps without a tile, 1.6 fixed latencies.  Down, with two tiles a multiprocessor, is the furthest from memory: 33%.
             Tried, q4, 8 and 32 rows: a copy a tile, and scales in boxes of 16 bytes 4,040 and 4,474, asking takes longer than what is asked
             for; seven tiles a copy, and scales by lanes 2,902 and 3,780; then 0x64646464 as an argument, not a constant, 2,732 and 3,835;
             then two stages at least in place of four, and more warps, 2,742 and 3,568.  f16 in copies of seven tiles: 5,740 for 5,700.
             f16: in a step of 32 sequences of Llama-3-8B (clocks read in the kernels), us from one kernel's x to the next one's: gate and up 85 (77 at
             the read bandwidth), down 47 (38), qkv 21 (16), wo 19 (11); 4,560 to 4,589 tok/s at 4k (nsn2b), 4,242 to 4,260 when clusters of
             thread blocks shared the inputs and each made its x f16 for itself.  (Clocks are of the version with two stages before x.)
             What is left: 2 to 3 us until the first products, 1.3 to 3.2 after the last; thread blocks that start late have an empty ring.
             Tried: cp.async in the place of bulk copies, by the 16 warps 4,119 tok/s for 4,149; by two warps of their own 3,927 for 4,124, by three
             4,051 for 4,186: asking is what takes so long; x of wo made by all thread blocks, which meet, and not by attention: 4,311 for 4,341.
             x copied by halves or sixteenths (wrong), nothing multiplied (wrong): no faster, so neither
             limits.  Two stages of weights before x is there: 4,341 for 4,380; one 4,056.  Twelve stages, so fewer warps a tile: 4,286 for 5,176
             (depth 64, f16), nine 5,135, four 5,206.  Memory asked for by 128 bytes, not 256: 4,997 for 5,176.  Two teams of warps that take stages
             in turns: 4,344 for 4,392, and wrong where a stage's next reader comes before the last one is done.
             Tried before: x as two f16 (split_f16): 2.1 us a step of 64 inputs where memory takes 1.2; thread blocks of half a multiprocessor,
             so that the next kernel's fill their ring beside them: 3,918 tok/s for 4,144; asking for the first 8, 16 or 32 MB of the next
             product's weights to come to L2: 4,043, 4,039 and 3,955 tok/s for 4,085.
   Limits    5 <= N <= 32; in a multiple of 8, of codes of 256, at most 65,536; all of it aligned to 16 bytes; |g x| and |w| < 65,520; compute
             capability 9.0, 227 KB of shared memory a thread block.
   Tested by tests/test_cuda_batch.cpp                Timed by tests/bench_products.cu, ./run --bench -b 32                        */
#ifdef __CUDACC__
#include <algorithm>
#include "gemm_batch.cuh"
namespace cuda {

// All thread blocks of a launch are at work at once (at most one a multiprocessor, and the next kernel's start after the last of these):
// they meet at a counter in memory.  What any of them wrote before is there after.
__device__ unsigned arrived, meetings;
__device__ inline void meet_blocks() {
    meet_readers<WARPS>();
    if (threadIdx.x == 0) {
        volatile unsigned *const count = &meetings;
        const unsigned before = *count;
        __threadfence();
        if (atomicAdd(&arrived, 1) + 1 == gridDim.x) {
            arrived = 0;
            __threadfence();
            *count = before + 1;
        } else
            while (*count == before) {}
        __threadfence();
    }
    meet_readers<WARPS>();
}

// What was written to memory is seen by bulk copies, too.
__device__ inline void fence_bulk() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// The matrices, as boxes of STEP inputs: of a tile's rows; of those of as many as a copy brings.
struct Maps { CUtensorMap of[MAX_PRODUCTS], many[MAX_PRODUCTS]; };

// `made`: rows has g x already; into: where the next product wants its own, if not null; above: ABOVE, which as a constant would take a
// register an instruction for what selects bytes.
template <DType T, int GROUPS>
__global__ void __launch_bounds__(THREADS, 1) gemm_batch_kernel(const __grid_constant__ Products p, const __grid_constant__ Maps maps, Tiles share, const float *x,
                                                                const __grid_constant__ Rows16 rows, bool made,
                                                                const __grid_constant__ Rows16 into, int N, int in, Shares shares, int stages,
                                                                unsigned above) {
    using S = Shared<GROUPS>;
    constexpr int STEP = cuda::STEP<T>, UNIT_BYTES = cuda::UNIT_BYTES<T>;
    extern __shared__ __align__(1024) uint8_t shared[];
    float *const sums = (float *)shared;                          // [row of x][part of the inputs][tile][output]
    double *const squares = (double *)(shared + S::SQUARES_AT);   // [of SQUARE_SUMS][row of x]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int steps = (in + STEP - 1) / STEP, parts = shares.parts, turns = (steps + parts - 1) / parts;
    const int begin = share.begin(), end = share.end(), rounds = (end - begin + shares.tiles - 1) / shares.tiles;
    auto round_at = [&](int round) { return round == 0 ? begin : round == rounds ? end : begin + (end - begin) * round / rounds; };

    const uint32_t barriers = (uint32_t)__cvta_generic_to_shared(shared + S::BARRIERS);
    const Ring ring = {barriers, stages, stages}, x_ring = {barriers + Ring::bytes(stages), stages, stages};
    const int stage_bytes = shares.stage_bytes<T>(GROUPS), x_at = shares.x_at<T>(), x_bytes = shares.x_bytes<T>(GROUPS);
    uint8_t *const stage_0 = shared + S::RING;
    constexpr Ring::Place all_made = {0, 1};    // of x_ring: x has a stage's place when the weights have

    // ---- weights: a lane copies some tiles of a matrix, or one where a round has tiles of two.  Many small copies take longer to ask for
    // than to come.
    if (warp == WARPS) {
        if (lane == 0) ring.open(1, shares.tiles * parts), x_ring.open(1, 1);
        __syncwarp();
        say_open<THREADS>();
#if __CUDA_ARCH__ >= 900
        if (lane == 0)
            for (const CUtensorMap &map : maps.many) asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
        Ring::Place stage;
#pragma unroll 1
        for (int round = 0; round < rounds; round++) {
            const int n_tiles = round_at(round + 1) - round_at(round);
            const bool many = p.first_of<ROWS>(round_at(round)).m == p.first_of<ROWS>(round_at(round) + n_tiles - 1).m;
            const int box = many ? shares.box : 1, boxes = (n_tiles + box - 1) / box;
            const Products::Row tile = p.first_of<ROWS>(round_at(round) + min(lane, boxes - 1) * box);
            const CUtensorMap *const map = many ? maps.many : maps.of;
#pragma unroll 1
            for (int turn = 0; turn < turns; turn++, ring.advance(stage)) {
                const int here = min(parts, steps - turn * parts);
                ring.begin_fill(stage);
                if (lane == 0) ring.expect(stage, here * boxes * box * UNIT_BYTES);
                __syncwarp();
                if (lane < boxes)
                    for (int part = 0; part < here; part++) {
                        const int byte = (turn * parts + part) * BOX<T>;
                        uint8_t *const to = stage_0 + stage.slot * stage_bytes + (part * shares.tiles + lane * box) * UNIT_BYTES;
                        ring.copy_box(stage, to, map[tile.m], byte, tile.o);
                        if (p.gated) ring.copy_box(stage, to + box * UNIT_BYTES / 2, map[1], byte, tile.o);
                    }
            }
        }
        return;
    }
    wait_open<THREADS>();
    wait_for_inputs();

    // ---- x: a thread copies what all thread blocks have made
    if (warp == WARPS + 1) {
        if (!made) x_ring.wait_free(all_made);
        if (lane > 0) return;
        fence_bulk();
        Ring::Place stage;
#pragma unroll 1
        for (int round = 0; round < rounds; round++)
#pragma unroll 1
            for (int turn = 0; turn < turns; turn++, ring.advance(stage)) {
                const int bytes = min(parts, steps - turn * parts) * x_bytes;
                if (stage.time > 0) ring.wait_free(stage);
                x_ring.expect(stage, bytes);
                x_ring.copy_bulk(stage, stage_0 + stage.slot * stage_bytes + x_at, rows.x + turn * parts * (x_bytes / 16), bytes);
            }
        return;
    }
    if (!made) {
        narrow_rows<T, GROUPS>(rows, p.norm, x, N, in);
        fence_bulk();
        meet_blocks();
        if (warp == 0) x_ring.end_read(all_made);
    }
    if (p.norm.weight && threadIdx.x < SQUARE_SUMS * 8 * GROUPS) {
        double sum = 0;
        for (int i = threadIdx.x; i < steps * (STEP / SQUARES) * 8 * GROUPS; i += SQUARE_SUMS * 8 * GROUPS) sum += __ldcg(rows.squares + i);
        squares[threadIdx.x] = sum;
    }

    // ---- products
    const int g = lane / 4, t = lane % 4, my_tile = warp % shares.tiles, part = warp / shares.tiles;    // of a stage, this warp's
    // Results: a thread has output `out` of row x_row, of every `apart`-th of the thread block's tiles from tile_lane on.
    const int log_outs = p.gated ? 3 : 4, outs = 1 << log_outs, out = threadIdx.x & (outs - 1), x_row = threadIdx.x >> log_outs & (8 * GROUPS - 1);
    const int tile_lane = (threadIdx.x >> log_outs) / (8 * GROUPS), apart = (32 * WARPS >> log_outs) / (8 * GROUPS);
    float scale = 1;
    // Where the tile's rows lie in a stage: those of gate in a box, then those of up; the lane's, of load_matrices.
    const int my_box = my_tile / shares.box * shares.box, row = p.gated ? (my_tile - my_box) * (ROWS / 2) + lane % 8 + lane / 8 % 2 * (shares.box * ROWS / 2)
                                                                      : (my_tile - my_box) * ROWS + lane % 16;
    const int pieces = BOX<T> / 16, lane_at = (part * shares.tiles + my_box) * UNIT_BYTES + row * BOX<T> + ((lane / 16) ^ row / (8 / pieces) % pieces) * 16;
    Ring::Place stage;
#pragma unroll 1
    for (int round = 0; round < rounds; round++) {
        const int from = round_at(round), n_tiles = round_at(round + 1) - from;
        // Scales of rows g and g + 8: asked for by the lanes that need them.
        const f16 *scales[2];
        uint2 s[SCALES_AHEAD][2];
        auto load_scales = [&](uint2 (&s)[2], int turn) {
            for (int i = 0; i < 2; i++) s[i] = __ldg((const uint2 *)scales[i] + min(turn * parts + part, steps - 1));
        };
        if constexpr (T != DType::f16) {
            const Products::Row first = p.first_of<ROWS>(from + min(my_tile, n_tiles - 1));
            for (int i = 0; i < 2; i++) {
                const Products::Row row = p.row_of<ROWS>(first, g + 8 * i);
                scales[i] = p.W[row.m].scale + (int64_t)row.o * (in / GROUP);
            }
            for (int i = 0; i < SCALES_AHEAD; i++) load_scales(s[i], i);
        }
        float *to[AT_ONCE], old[AT_ONCE], gain[AT_ONCE];
        auto find_results = [&](int first) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int tile = first + j * apart;
                to[j] = tile < n_tiles && x_row < N ? p.result_of<ROWS>(from + tile, out, x_row) : nullptr;
                old[j] = to[j] && p.add ? *to[j] : 0.0f;
                gain[j] = to[j] && p.next.weight ? __ldg(p.next.weight + ((from + tile) << log_outs) + out) : 0.0f;
            }
        };
        find_results(tile_lane);    // asked for early
        float sum[GROUPS][4] = {};
        if (part < parts) {
#pragma unroll 1
            for (int turn = 0; turn < turns; turn++, ring.advance(stage)) {
                x_ring.begin_read(stage);
                ring.begin_read(stage);
                if (my_tile < n_tiles && turn * parts + part < steps) {
                    const uint8_t *const here = stage_0 + stage.slot * stage_bytes;
                    const uint4 *const v = (const uint4 *)(here + x_at + part * x_bytes) + lane;
                    const unsigned codes_at = (unsigned)__cvta_generic_to_shared(here + lane_at);    // pieces change places: box_place
                    auto add = [&](const unsigned (&a)[2][4], int b) {
#pragma unroll
                        for (int j = 0; j < GROUPS; j++) {
                            const uint4 u = v[(b * GROUPS + j) * 32];
                            mma(sum[j], a[0], u.x, u.y), mma(sum[j], a[1], u.z, u.w);
                        }
                    };
                    if constexpr (T == DType::f16) {
#pragma unroll
                        for (int b = 0; b < STEP / ROW_BLOCK; b++) {
                            unsigned a[2][4];
                            for (int h = 0; h < 2; h++) load_matrices(a[h], codes_at ^ (b * 4 + h * 2) * 16);
                            add(a, b);
                        }
                    } else {
                        unsigned loaded[4];
#pragma unroll
                        for (int b = 0; b < STEP / ROW_BLOCK; b++) {
                            if (T == DType::q8) load_matrices(loaded, codes_at ^ 2 * b * 16);
                            else if (b % 2 == 0) load_matrices(loaded, codes_at ^ b * 16);
                            const int first = T == DType::q4 ? b % 2 * 2 : 0;
                            const unsigned codes[2][2] = {{loaded[first], loaded[first + 1]}, {loaded[2], loaded[3]}};
                            __half2 scale[2];
                            for (int i = 0; i < 2; i++) {
                                const unsigned two = __byte_perm(b < 2 ? s[0][i].x : s[0][i].y, 0, b % 2 ? 0x3232 : 0x1010);
                                memcpy(&scale[i], &two, 4);
                            }
                            unsigned a[2][4];
                            widen_group<T>(a, codes, above, scale);
                            add(a, b);
                        }
                    }
                }
                ring.end_read(stage);
                if constexpr (T != DType::f16) {
                    for (int i = 0; i + 1 < SCALES_AHEAD; i++) s[i][0] = s[i + 1][0], s[i][1] = s[i + 1][1];
                    load_scales(s[SCALES_AHEAD - 1], turn + SCALES_AHEAD);
                }
            }
            if (round > 0) meet_readers<WARPS>();    // the last round's sums are read
#pragma unroll
            for (int j = 0; j < GROUPS; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[(8 * j + 2 * t + c % 2) * SUM_PITCH + warp * ROWS + g + c / 2 * 8] = sum[j][c];
        } else if (round > 0) meet_readers<WARPS>();
        meet_readers<WARPS>();

        // ---- parts are added up, by a thread those of a few results at a time
        if (round == 0 && p.norm.weight) {
            double sum = 0;
            for (int i = 0; i < SQUARE_SUMS; i++) sum += squares[i * 8 * GROUPS + x_row];
            scale = 1.0f / sqrtf((float)sum / in + p.norm.eps);
        }
        for (int first = tile_lane; first < n_tiles; first += AT_ONCE * apart) {
            if (first > tile_lane) find_results(first);
            float y[AT_ONCE] = {}, up[AT_ONCE] = {};
            for (int q = 0; q < parts; q++)
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    const float *const at = sums + x_row * SUM_PITCH + (q * shares.tiles + min(first + j * apart, n_tiles - 1)) * ROWS + out;
                    y[j] += at[0], up[j] += p.gated ? at[ROWS / 2] : 0.0f;
                }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const float v = p.gated ? silu(y[j] * scale) * (up[j] * scale) : old[j] + y[j] * scale;
                if (to[j]) *to[j] = v;
                const int tile = first + j * apart;
                if (into.x && tile < n_tiles) narrow_result<GROUPS>(into, p.next.weight, to[j] ? v : 0.0f, gain[j], x_row, ((from + tile) << log_outs) + out);
            }
        }
    }
}

// Fixed by the number of tiles of weights, so that sums are.
template <DType T> static Shares shares_of(int tiles) {
    const int most = (int)ceil_div(tiles, GPU_SMS), at_a_time = (int)ceil_div(most, ceil_div(most, TILES)), boxes = (int)ceil_div(at_a_time, BOX_TILES<T>);
    Shares s;
    s.box = (int)ceil_div(at_a_time, boxes), s.tiles = boxes * s.box, s.parts = 1;
    for (Shares more = s; ++more.parts * s.tiles <= WARPS && more.stages<T, BATCH_ROWS / 8>(H100_SHARED) >= ENOUGH_STAGES<T>;) s = more;
    return s;
}

constexpr int WIDEST = 1 << 16;    // inputs
bool gemm_batch_serves(DType type, int N, int in) {
    const bool fits = type == DType::f16 ? in % 8 == 0 : is_grouped(type) && in % 256 == 0;    // codes and scales of a row begin at a multiple of 16 bytes
    return fits && N > GEMV_ROWS && N <= BATCH_ROWS && in <= WIDEST && starts_early && most_shared >= H100_SHARED;
}

// ---- rows that are left for the next product ----
static int64_t squares_at(int groups, int in) { return ceil_div(in, ROW_STEP) * row16_bytes(groups); }
static int64_t slot_bytes() { return squares_at(BATCH_ROWS / 8, WIDEST) + WIDEST / SQUARES * BATCH_ROWS * (int64_t)sizeof(float); }
int64_t rows16_bytes(int N) { return N > GEMV_ROWS ? 2 * slot_bytes() : 0; }    // one is read while the other is written

static struct {
    const float *x, *gain;
    int N, in, slot;
    int64_t launch;
    DType type = DType::f16;    // of the weights that were multiplied last, probably of those that come next
} left;
static Rows16 rows_in(int slot, DType type, int N, int in) {
    const int groups = N <= 8 ? 1 : N <= 16 ? 2 : 4;
    uint8_t *const at = (uint8_t *)step.rows16 + slot * slot_bytes();
    return {(uint4 *)at, (float *)(at + squares_at(groups, in)), groups, is_grouped(type)};
}
static Rows16 other_rows(int N, int in) { return rows_in(left.slot ^= 1, left.type, N, in); }
Rows16 leave_rows(int N, int in) { return in % ROW_STEP == 0 && gemm_batch_serves(left.type, N, in) ? other_rows(N, in) : Rows16{}; }
void rows_left(const float *x, const float *gain, int N, int in) {
    left.x = x, left.gain = gain, left.N = N, left.in = in, left.launch = launches;
}
// What the last op left of x, for weights of this type; null: nothing, or not of this x.
static Rows16 left_rows(DType type, const float *x, const float *gain, int N, int in) {
    const bool same = left.launch == launches && left.x == x && left.gain == gain && left.N == N && left.in == in && is_grouped(left.type) == is_grouped(type);
    return same ? rows_in(left.slot, type, N, in) : Rows16{};
}

template <DType T, int GROUPS> static void gemm_batch_of(const Products &p, const float *x, int N, int in) {
    auto kernel = gemm_batch_kernel<T, GROUPS>;
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
    CUDA_CHECK(allowed);
    Rows16 rows = left_rows(T, x, p.norm.weight, N, in);
    const bool made = rows.x;
    left.type = T;
    if (!made) rows = other_rows(N, in);
    const Rows16 into = p.leaves ? leave_rows(N, p.out[0]) : Rows16{};
    const Shares s = shares_of<T>(p.tiles<ROWS>());
    const int stages = s.stages<T, GROUPS>(most_shared);
    const Tiles share(p.tiles<ROWS>());
    Maps maps = {};
    for (int m = 0; m < MAX_PRODUCTS; m++)
        if (p.out[m] > 0) {
            maps.of[m] = map_boxes(p.W[m].data, code_bytes(T, in), p.out[m], BOX<T>, p.tile_outs<ROWS>());
            maps.many[m] = map_boxes(p.W[m].data, code_bytes(T, in), p.out[m], BOX<T>, p.tile_outs<ROWS>() * s.box);
        }
    launch(kernel, share.blocks(), THREADS, Shared<GROUPS>::RING + stages * s.stage_bytes<T>(GROUPS), p, maps, share, x, rows, made,
           into, N, in, s, stages, ABOVE);
    if (into.x) rows_left(p.y[0], p.next.weight, N, p.out[0]);
}
template <DType T> static void gemm_batch_of(const Products &p, const float *x, int N, int in) {
    N <= 8 ? gemm_batch_of<T, 1>(p, x, N, in) : N <= 16 ? gemm_batch_of<T, 2>(p, x, N, in) : gemm_batch_of<T, 4>(p, x, N, in);
}
void gemm_batch(const Products &p, const float *x, int N, int in) {
    if (p.W[0].type == DType::f16) return gemm_batch_of<DType::f16>(p, x, N, in);
    p.W[0].type == DType::q8 ? gemm_batch_of<DType::q8>(p, x, N, in) : gemm_batch_of<DType::q4>(p, x, N, in);
}
}    // namespace cuda
#endif
