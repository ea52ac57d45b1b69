/* gemv_groups - products of up to 8 rows of x with weights in q8 and q4 on CUDA (groups.h), at memory speed.

   y[n,o] = s[n] sum over groups of scale[o,group] (sum over its 32 inputs of code[o,i] g[i] x[n,i])     letters as in gemv.cu

   Math      Tensor cores, m16n8k32 of 8-bit integers: 16 rows of W times a group of x.  Codes are what they are; g x is a 24-bit integer
             of the group's largest |g x|, in three bytes: columns (high, middle, low, 0) of two rows of x.  Sums of a group are exact;
             the scale multiplies them in f32.  A column's sum knows nothing of the others: the same bits for any N and any neighbours.
             Codes of q4 become 16 (code - 8), bytes with a sign, by one or two instructions for four.
   Order     A warp adds its groups from left to right, 16 warps share the inputs of a row and are added in order.
   Work      A thread block owns tiles of 16 outputs.  A warp of its own fills rings with weights (ring.cuh), before the kernel that makes
             x is done: what stands between its start and its first request counts four times a layer.  Two teams of eight warps
             multiply, steps of a row by turns, each from its own ring: while a step's instructions wait for each other, the next one's run.
             A warp makes integers of the x that it multiplies, a step of its team ahead, and waits for nobody.
   Layout    A stage is boxes (map_boxes) of ROW_BYTES of the codes of 16 rows and their scales; a warp takes twice 64 bytes of each row,
             4 groups of q4 or 2 of q8 each.
             Lane (g = lane / 4, t = lane % 4) gives the tensor core inputs 4t ... 4t + 3 and 16 + 4t ... 16 + 4t + 3 of a group, of rows
             g and g + 8: for q4 the two halves of 4 bytes.
   Cost      Each code and scale is read once: 8.5 and 4.5 bits a weight.  Llama-3-8B, batch 1, depth 0: q8 331 to 334 tok/s (86% of the read
             bandwidth), q4 505 to 510 (74%).  What made it so, q4: weights in boxes, four instructions of one thread a stage in place of 36
             of a warp, 464 to 470 -> 478 to 479; and_xor 480 -> 486; teams, who make their own x, a ring that is filled at once, and
             unembed's norm -> 509.  8 sequences decode 1,468 tok/s, 1,023 with the version that had 8 rows in one launch.
             A layer in q4 (clocks, us from one kernel's x to the next one's; in brackets its bytes at 3.06 TB/s): qkv 7.0 (4.6), attention 6.4
             (5 when weights were asked for later: it may wait for L2 behind them), wo 4.3 (3.1), gate and up 25.2 (21.6), down 11.4 (10.8).
             With boxes, before teams, 479: nothing multiplied (wrong) 516 to 518 tok/s, nothing copied (wrong) 648 to 655, neither 1,015 to
             1,026: a step is not memory alone, nor instructions, but the starts and ends of four kernels a layer, too.
             Tried, at 477 to 512: weights of the next product asked to come to L2 behind a kernel's own: 468 to 471 for 477 to 478, and beside
             attention, six stages a thread block: gate and up take 1.6 us less, attention 2.5 more, 455 to 462; x of 14,336 inputs in one
             turn of loads: 474 to 478 for 483, it takes L2 as long; eight warps: 459 to 466 for 460 to 467; one team, x as now: 490 to 493
             for 504; three stages before x is there: 504 to 506 for 507 to 512.
             Tried before: codes as f16 and x as two f16, m16n8k16, and the norm apart: q4 351 tok/s, q8 255; a warp's x kept in registers:
             286, it does not fit; one unit for a row of x, not for a group: no faster, but coarse; weights in bulk copies, a kilobyte of a
             row each: 297 for 395; scales in copies of 8 bytes: 431 for 446.
   Limits    N <= 8, more than 4 in two launches; in a multiple of 128 (q4) or 64 (q8), 256 where boxes shall copy; matrices aligned to 16 bytes.
   Tested by tests/test_cuda_groups.cpp                                                                        */
#ifdef __CUDACC__
#include "groups_x.cuh"
#include "ring.cuh"
namespace cuda {

constexpr int ROWS = 16;             // outputs of a tile; gated: 8 of gate, 8 of up
constexpr int CODE_BYTES = ROWS * ROW_BYTES;         // of a stage: of each row twice 64 are a warp's, the same 16 of 4 rows lie in different banks
constexpr int AT_FIRST = 1;          // stages of a team on their way before x is there
constexpr int MANY_STAGES = 6, FEW_STAGES = 4, LEAST_STAGES = 2;    // of both teams, 18 KB each: the last for devices with 99 KB
constexpr int PART_BYTES = 33280;    // sums of tiles, of all warps, twice
constexpr int MOST_ROWS = 4;         // of x in a launch
constexpr int THREADS = 32 * (WARPS + 1);
constexpr int LANES = 8;             // that add up an output
template <int R> constexpr int TILES = 8 / R;    // that are added up together

template <DType T> constexpr int SCALES = UNIT<T> / GROUP * 2;        // bytes of a unit's scales
template <DType T> constexpr int ROW_SCALES = TEAM * UNITS * SCALES<T>;      // bytes of a row's scales in a stage
template <DType T> constexpr int STAGE_BYTES = CODE_BYTES + ROWS * ROW_SCALES<T>;
// A stage is boxes (map_boxes): for each half of the tile ROW_BYTES / 128 of 8 rows' codes, then 8 rows' scales, one half behind the other.
constexpr int BOX_ROWS = ROWS / 2;
__device__ inline int place_of_codes(int row, int byte) {
    return box_place<128>(((row / 8 * (ROW_BYTES / 128) + byte / 128) * 8 + row % 8) * 128 + byte % 128);
}
template <DType T> __device__ inline int place_of_scales(int row, int byte) { return CODE_BYTES + box_place<ROW_SCALES<T>>(row * ROW_SCALES<T> + byte); }
struct Maps { CUtensorMap codes[MAX_PRODUCTS], scales[MAX_PRODUCTS]; };

// (a & mask) ^ flip in one instruction: left to itself the compiler takes two, of one constant each.
__device__ inline unsigned and_xor(unsigned a, unsigned mask, unsigned flip) {
    unsigned r;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(r) : "r"(a), "r"(mask), "r"(flip));
    return r;
}

// Shared memory, where what begins, in bytes.  x comes last.
template <DType T, int STAGES> struct Shared {
    static constexpr int PARTS = STAGES * STAGE_BYTES<T>, SQUARES = PARTS + PART_BYTES, BARRIERS = SQUARES + MOST_ROWS * WARPS * (int)sizeof(double);
    static constexpr int X = (BARRIERS + TEAMS * Ring::bytes(STAGES / TEAMS) + 127) / 128 * 128;
};

// A ring a team: whoever reads a stage has read all before it, as a ring asks for.
template <DType T, int STAGES> struct Rings {
    static constexpr int EACH = STAGES / TEAMS;
    uint8_t *shared;
    __device__ Ring of(int team) const {
        return {(uint32_t)__cvta_generic_to_shared(shared + cuda::Shared<T, STAGES>::BARRIERS) + team * Ring::bytes(EACH), EACH, AT_FIRST};
    }
    __device__ uint8_t *stage(int team, int slot) const { return shared + (team * EACH + slot) * STAGE_BYTES<T>; }
};

// ---- a tile's steps from .. to-1 of weights come to the rings, by one warp; from: a multiple of TEAMS
template <DType T, int STAGES>
__device__ inline void fill_with_boxes(const Rings<T, STAGES> &rings, Ring::Place (&at)[TEAMS], const Products &p, const Maps &maps, int tile, int from,
                                       int to) {
    const Products::Row first = p.first_of<ROWS>(tile);
    const int low = first.m, high = p.gated ? 1 : first.m, high_row = p.gated ? first.o : first.o + BOX_ROWS;    // the tile's halves
#pragma unroll 1
    for (int step0 = from; step0 < to; step0 += TEAMS)
#pragma unroll
        for (int team = 0; team < TEAMS; team++) {
            const int step = step0 + team;
            if (step >= to) break;
            const Ring ring = rings.of(team);
            ring.begin_fill(at[team]);
            if (threadIdx.x % 32 == 0) {
                uint8_t *const stage = rings.stage(team, at[team].slot);
                ring.expect(at[team], STAGE_BYTES<T>);
                ring.copy_boxes(at[team], stage, maps.codes[low], step * (ROW_BYTES / 128), first.o);
                ring.copy_boxes(at[team], stage + CODE_BYTES / 2, maps.codes[high], step * (ROW_BYTES / 128), high_row);
                ring.copy_box(at[team], stage + CODE_BYTES, maps.scales[low], step * ROW_SCALES<T>, first.o);
                ring.copy_box(at[team], stage + CODE_BYTES + BOX_ROWS * ROW_SCALES<T>, maps.scales[high], step * ROW_SCALES<T>, high_row);
            }
            ring.advance(at[team]);
        }
}
// A unit's scales, where they are at a multiple of their size only.
template <int BYTES> __device__ inline void copy_scales(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
}
// The same where boxes do not serve.
template <DType T, int STAGES>
__device__ inline void fill_with_pieces(const Rings<T, STAGES> &rings, Ring::Place (&at)[TEAMS], const Products &p, int tile, int from, int to, int in) {
    const Products::Row first = p.first_of<ROWS>(tile);
    RowCopies codes;
    const uint8_t *scales[RowCopies::EACH];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < RowCopies::EACH; r++) {
        const Products::Row row = p.row_of<ROWS>(first, codes.row(r));
        const int64_t unit = (int64_t)row.o * (in / UNIT<T>) + from * (TEAM * UNITS);
        codes.next[r] = (const uint8_t *)p.W[row.m].data + unit * 64 + codes.piece();
        scales[r] = (const uint8_t *)p.W[row.m].scale + (unit + lane % 8) * SCALES<T>;
    }
#pragma unroll 1
    for (int step0 = from; step0 < to; step0 += TEAMS)
#pragma unroll
        for (int team = 0; team < TEAMS; team++) {
            if (step0 + team >= to) break;
            const Ring ring = rings.of(team);
            const int units = min(TEAM * UNITS, in / UNIT<T> - (step0 + team) * (TEAM * UNITS));
            ring.begin_fill(at[team]);
            uint8_t *const stage = rings.stage(team, at[team].slot);
            codes.copy(stage, units * 64, place_of_codes);
            for (int u = lane % 8; u < units; u += 8)
                for (int r = 0; r < RowCopies::EACH; r++)
                    copy_scales<SCALES<T>>(stage + place_of_scales<T>(codes.row(r), u * SCALES<T>), scales[r] + (u - lane % 8) * SCALES<T>);
            ring.end_fill(at[team]);
            ring.advance(at[team]);
#pragma unroll
            for (int r = 0; r < RowCopies::EACH; r++) scales[r] += ROW_SCALES<T>;
        }
}
// N neighbouring numbers, one load.
template <class U, int N> struct alignas(N * sizeof(U)) Few { U of[N]; };

struct Slabs { int all, steps, n; };    // steps of a row of weights; those whose x is in shared memory at a time; how often
// Up to R rows of x.
template <DType T, int R, int STAGES, bool BOXES>
__global__ void __launch_bounds__(THREADS, 1) gemv_groups_kernel(const __grid_constant__ Products p, const __grid_constant__ Maps maps, Tiles share,
                                                                 const float *x, int N, int in, Slabs slabs) {
    using S = Shared<T, STAGES>;
    extern __shared__ __align__(1024) uint8_t shared[];
    constexpr int GROUPS = UNIT<T> / GROUP, PAIRS = XPlace<R>::PAIRS, COLUMNS = XPlace<R>::COLUMNS;
    constexpr int TILES = cuda::TILES<R>, SUMS = COLUMNS / 2;                                    // SUMS: of a row of W and a pair of x
    constexpr int WARP_PART = TILES * PAIRS * ROWS * SUMS + 4, PART = WARPS * WARP_PART;    // 4: lanes that add up parts meet different banks
    static_assert(2 * PART * (int)sizeof(float) == PART_BYTES, "sums have no place");
    uint8_t *const xs = shared + S::X;
    float *const parts = (float *)(shared + S::PARTS);                 // [tiles of this turn, of the last][warp][tile][pair][row of W][sum]
    double *const squares = (double *)(shared + S::SQUARES);           // [row of x][warp]
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);    // so that the compiler knows that lanes agree
    const int team = warp / TEAM, g = lane / 4, t = lane % 4;
    const int begin = share.begin(), end = share.end();
    const Rings<T, STAGES> rings = {shared};

    // ---- weights: `TILES` tiles at a time, slab by slab
    if (warp == WARPS) {
        for (int r = 0; r < TEAMS; r++)
            if (lane == 0) rings.of(r).open(BOXES ? 1 : 32, TEAM);
        __syncwarp();
        say_open<THREADS>();
        Ring::Place at[TEAMS];
#pragma unroll 1
        for (int first = begin; first < end; first += TILES)
#pragma unroll 1
            for (int slab = 0; slab < slabs.n; slab++)
#pragma unroll 1
                for (int tile = first; tile < min(first + TILES, end); tile++) {
                    const int from = slab * slabs.steps, to = min(slabs.all, from + slabs.steps);
                    if constexpr (BOXES) fill_with_boxes(rings, at, p, maps, tile, from, to);
                    else fill_with_pieces(rings, at, p, tile, from, to, in);
                }
        return;
    }
    wait_open<THREADS>();
    ask_for_gain(p.norm, in, 32 * WARPS);
    constexpr int ROWS_AT_ONCE = R == 1 ? 1 : 2;
    XLane<T, ROWS_AT_ONCE> mine;
    mine.load_gain(p.norm.weight, team, in);
    wait_for_inputs();
    if (R == 1) mine.load(x, team, 0, N, in);    // one row: x of a step is asked for a step of the team ahead

    // ---- x: a warp makes integers of what it will multiply
    const XPlace<R> place = {min(in, slabs.steps * STEP<T>) / GROUP};
    double square[R] = {};
    auto make_x = [&](int step, int from, int last_step) {    // from: of the slab
        if (R > 1) mine.load_gain(p.norm.weight, step, in);
#pragma unroll
        for (int n0 = 0; n0 < R; n0 += ROWS_AT_ONCE) {
            if (R > 1) mine.load(x, step, n0, N, in);
#pragma unroll
            for (int n = n0; n < n0 + ROWS_AT_ONCE; n++) {
                if (n >= N) break;
                float4 (&v)[2] = mine.v[n - n0];
                if (p.norm.weight) {
                    square[n] += add_squares(v[1], add_squares(v[0], 0));
                    v[0] = v[0] * mine.gain[0], v[1] = v[1] * mine.gain[1];
                }
                make_integers<T>(xs, place, v, t, mine.group(step) - from / GROUP, n, mine.any(step, in));
            }
        }
        if (R == 1 && step + TEAMS < last_step) mine.load_gain(p.norm.weight, step + TEAMS, in), mine.load(x, step + TEAMS, 0, N, in);
        __syncwarp();
    };

    // ---- products
    const int code_lane = place_of_codes(lane % 8, warp % TEAM * 64 + lane / 8 * 16);    // of load_matrices
    const int scale_low = place_of_scales<T>(g, warp % TEAM * SCALES<T>), scale_high = place_of_scales<T>(g + 8, warp % TEAM * SCALES<T>);
    const Ring ring = rings.of(team);
    int turn = 0;
    Ring::Place stage;
    float scale = 1;    // of row threadIdx.x / LANES % R
    for (int first = begin; first < end; first += TILES, turn ^= 1) {
        const int n_tiles = min(TILES, end - first);
        float *const sums = parts + turn * PART;
        for (int slab = 0; slab < slabs.n; slab++) {
            const int first_step = slab * slabs.steps, last_step = min(slabs.all, first_step + slabs.steps), from = first_step * STEP<T>;
            const bool fresh = slabs.n > 1 || first == begin;
            if (fresh && (slab > 0 || first > begin)) {
                if (R == 1) mine.load_gain(p.norm.weight, first_step + team, in), mine.load(x, first_step + team, 0, N, in);
                __syncwarp();    // all have read what was here
            }
            const uint8_t *const x_lane = xs + place.column_at(0, 0, g % COLUMNS) + 8 * t, *const unit_lane = xs + place.unit_at(0, R == 1 ? 0 : t / 2);
#pragma unroll 1
            for (int tile = 0; tile < n_tiles; tile++) {
                float *const part = sums + warp * WARP_PART + (tile * PAIRS * ROWS + g) * SUMS + t % SUMS;
                float sum[PAIRS][2] = {};
                if (slab > 0)
                    for (int h = 0; h < PAIRS; h++) sum[h][0] = part[h * ROWS * SUMS], sum[h][1] = part[(h * ROWS + 8) * SUMS];
#pragma unroll 1
                for (int step = first_step + team; step < last_step; step += TEAMS, ring.advance(stage)) {
                    if (fresh && tile == 0) make_x(step, from, last_step);
                    ring.begin_read(stage);
                    const uint8_t *const here = rings.stage(team, stage.slot);
                    const unsigned code_address = (unsigned)__cvta_generic_to_shared(here) + code_lane;
#pragma unroll (R == 1 ? UNITS : 1)
                    for (int u = 0; u < UNITS; u++) {
                        const int unit = unit_of(step, u), group = unit * GROUPS - from / GROUP;
                        if (unit * UNIT<T> >= in) break;
                        const int scale_u = u * TEAM * SCALES<T>, code_u = u * TEAM * 64 * BOX_ROWS;    // where the unit's are, behind the first one's
                        const auto s_low = *(const Few<f16, GROUPS> *)(here + (scale_low ^ scale_u));
                        const auto s_high = *(const Few<f16, GROUPS> *)(here + (scale_high ^ scale_u));
                        unsigned codes[2][4];    // 4t ... of rows g and g + 8, of each 16 bytes
                        for (int i = 0; i < 2; i++)
                            load_matrices(codes[i], code_address + code_u + i * (CODE_BYTES / 2));
                        Few<float, GROUPS> x_unit[PAIRS];
#pragma unroll
                        for (int h = 0; h < PAIRS; h++) x_unit[h] = *(const Few<float, GROUPS> *)(unit_lane + (2 * h * place.groups + group) * 4);
#pragma unroll
                        for (int j = 0; j < GROUPS; j++) {
                            unsigned a[4];    // rows g and g + 8 of inputs 4t ..., then of 16 + 4t ...
#pragma unroll
                            for (int i = 0; i < 2; i++) {
                                if constexpr (T == DType::q4) {    // 16 (code - 8), as bytes with a sign
                                    a[i] = and_xor(codes[i][j] << 4, 0xf0f0f0f0, 0x80808080), a[2 + i] = and_xor(codes[i][j], 0xf0f0f0f0, 0x80808080);
                                } else a[i] = codes[i][2 * j], a[2 + i] = codes[i][2 * j + 1];
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
        if (p.norm.weight && first == begin)
#pragma unroll
            for (int n = 0; n < R; n++) {
                const double sum = warp_sum(square[n]);
                if (lane == 0) squares[n * WARPS + warp] = sum;
            }
        meet_readers<WARPS>();    // with two turns' sums the next turn does not wait for the readers of this one
        const int part_of = threadIdx.x % LANES, n = threadIdx.x / LANES % R, log_outs = p.gated ? 3 : 4, tile_outs = 1 << log_outs;
        if (p.norm.weight && first == begin) {
            double sum = 0;
            for (int w = part_of * (WARPS / LANES); w < (part_of + 1) * (WARPS / LANES); w++) sum += squares[n * WARPS + w];
            for (int o = 1; o < LANES; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
            scale = 1.0f / sqrtf((float)sum / in + p.norm.eps);
        }
        for (int i = threadIdx.x / LANES; i < R * n_tiles << log_outs; i += 32 * WARPS / LANES) {
            const int r = i / R & (tile_outs - 1), tile = i / R >> log_outs;
            auto total = [&](int r) {
                float high = 0, low = 0;    // of high and middle bytes, of low ones
                for (int w = part_of * (WARPS / LANES); w < (part_of + 1) * (WARPS / LANES); w++) {
                    const float2 v = *(const float2 *)(sums + w * WARP_PART + ((tile * PAIRS + n / 2) * ROWS + r) * SUMS + n % 2 * 2);
                    high += v.x, low += v.y;
                }
                float y = fmaf(high, 256.0f, low * (1.0f / 256));
                for (int o = 1; o < LANES; o *= 2) y += __shfl_xor_sync(~0u, y, o);
                return y * scale;
            };
            const float y = total(r), up = p.gated ? total(r + ROWS / 2) : 0.0f;
            float *const to = part_of == 0 && n < N ? p.result_of<ROWS>(first + tile, r, n) : nullptr;
            if (to) *to = p.gated ? silu(y) * up : p.add ? *to + y : y;
        }
    }
}

template <DType T, int R, int STAGES, bool BOXES> static void launch_groups(const Products &p, const float *x, int N, int in, Slabs slabs) {
    auto kernel = gemv_groups_kernel<T, R, STAGES, BOXES>;
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
    CUDA_CHECK(allowed);
    Maps maps = {};
    for (int m = 0; m < MAX_PRODUCTS && BOXES; m++)
        if (p.out[m] > 0) {
            maps.codes[m] = map_boxes(p.W[m].data, in / UNIT<T> * 64, p.out[m], 128, BOX_ROWS, ROW_BYTES / 128);
            maps.scales[m] = map_boxes(p.W[m].scale, in / UNIT<T> * SCALES<T>, p.out[m], ROW_SCALES<T>, BOX_ROWS);
        }
    const int64_t bytes = Shared<T, STAGES>::X + XPlace<R>::bytes(std::min<int64_t>(in, (int64_t)slabs.steps * STEP<T>));
    const Tiles share(p.tiles<ROWS>());
    launch(kernel, share.blocks(), THREADS, bytes, p, maps, share, x, N, in, slabs);
}
// False: N is too large, or x of not even a step of each team fits.
template <DType T, int R, int STAGES> static bool gemv_groups_by(const Products &p, const float *x, int N, int in) {
    const int64_t room = most_shared - Shared<T, STAGES>::X;
    const int steps = (int)ceil_div(in, STEP<T>);
    const int64_t fit = room / XPlace<R>::bytes(STEP<T>);    // steps whose x fits
    if (N > R || room < 0 || fit < std::min(steps, TEAMS)) return false;
    const int at_a_time = fit >= steps ? steps : (int)fit / TEAMS * TEAMS;    // so that a place in shared memory is always the same warp's
    const Slabs slabs = {steps, at_a_time, (int)ceil_div(steps, at_a_time)};
    const bool boxes = starts_early && in % 256 == 0;    // codes of a row begin at a multiple of 128 bytes, scales of 16
    if (boxes) launch_groups<T, R, STAGES, true>(p, x, N, in, slabs);
    else launch_groups<T, R, STAGES, false>(p, x, N, in, slabs);
    return true;
}
// The fast kernel, by halves of the rows where not all fit: their bits are the same.
template <DType T> static void gemv_groups_of(const Products &p, const float *x, int N, int in) {
    if (gemv_groups_by<T, 1, MANY_STAGES>(p, x, N, in) || gemv_groups_by<T, 1, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 2, FEW_STAGES>(p, x, N, in) ||
        gemv_groups_by<T, 4, FEW_STAGES>(p, x, N, in) || gemv_groups_by<T, 1, LEAST_STAGES>(p, x, N, in))
        return;
    const int half = (N + 1) / 2;
    Products others = p;
    for (int i = 0; i < MAX_PRODUCTS; i++) others.y[i] += (int64_t)half * p.out[i];
    gemv_groups_of<T>(p, x, half, in);
    if (N > 1) gemv_groups_of<T>(others, x + (int64_t)half * in, N - half, in);
}
template <DType T> static bool serves(int in) { return in % UNIT<T> == 0 && most_shared >= Shared<T, LEAST_STAGES>::X + XPlace<1>::bytes(TEAMS * STEP<T>); }
bool gemv_groups_serves(DType type, int in) { return type == DType::q4 ? serves<DType::q4>(in) : serves<DType::q8>(in); }
void gemv_groups(const Products &p, const float *x, int N, int in) {
    if (p.W[0].type == DType::q4) gemv_groups_of<DType::q4>(p, x, N, in);
    else gemv_groups_of<DType::q8>(p, x, N, in);
}
}    // namespace cuda
#endif
