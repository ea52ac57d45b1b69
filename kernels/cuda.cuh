// cuda.cuh - what the CUDA halves of the pages share: error checks, the stream, the step that begin() announced, and sums
// over a warp.  Every kernel runs on one stream, so an op sees what the ops before it wrote.
#pragma once
#include <algorithm>
#include <vector>
#include "kv_block.h"

#define CUDA_CHECK(call)                                                                                            \
    do {                                                                                                            \
        const cudaError_t error_ = (call);                                                                          \
        if (error_ != cudaSuccess) fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(error_));    \
    } while (0)

namespace cuda {

extern cudaStream_t stream;

constexpr int FEW_ROWS = 8;    // steps of up to so many rows: attention, if no slot has two, gives a row the same bits in any of them
constexpr int GPU_SMS = 132;   // multiprocessors of an H100; a constant, so that every GPU adds in the same order

// The rows of one slot in this step: rows row..row+rows-1.
struct SlotRows { int row, rows; };
// Up to KV_BLOCK rows of one slot and one stretch of positions (KvView::stretch), so they agree on what is coded.
struct RowTile { int row, rows; };
// Tile `number` of the slot whose first row is `row`.  Which rows these are, and whether there are any, depends on the layer.
struct TilePlace {
    int row, number;
    HD RowTile rows(const KvView &kv, int layer, const int *pos, const int *last_pos) const {
        const int p0 = pos[row], stretch = kv.stretch(p0, layer) + number, begin = kv.stretch_begin(stretch, layer);
        const int from = begin > p0 ? begin : p0, last = last_pos[row], end = begin + KV_BLOCK <= last ? begin + KV_BLOCK : last + 1;
        return {row + from - p0, end > from ? end - from : 0};
    }
};
inline int most_tiles(int rows) { return (int)ceil_div(rows - 1, KV_BLOCK) + 1; }    // of a slot, wherever they begin

// The current step.  Arrays named on_* live on the device, the others are the host's copy, for sizes of launches.
struct Step {
    Batch on_device;
    std::vector<int> pos;
    std::vector<SlotRows> slots;
    std::vector<TilePlace> tiles;
    const SlotRows *on_slots;
    const TilePlace *on_tiles;
    const int *on_last_pos;    // (N) position of the last row of the row's slot
    void *rows16;              // what an op leaves for the next: rows16.cuh
    void *work;                // what one op needs while it runs: see work_bytes in cuda_ops.cu
    bool single_rows() const { return slots.size() == pos.size(); }    // every slot has one row: a decode step
    // At least as many blocks as a row sees; a power of two, because steps with different ones are recorded apart (cuda_ops.cu).
    int reach() const {
        int last = 0, blocks = 1;
        for (int p : pos) last = std::max(last, p);
        while (blocks < last / KV_BLOCK + 1) blocks *= 2;
        return blocks;
    }
    int most_rows() const {    // of a slot
        int rows = 0;
        for (const SlotRows &s : slots) rows = std::max(rows, s.rows);
        return rows;
    }
    // Blocks to seal, of the slot and layer with most.
    int most_seals(const KvView &kv) const {
        int n = 0;
        for (const SlotRows &s : slots) n = std::max(n, kv.most_seals(pos[s.row], pos[s.row + s.rows - 1]));
        return n;
    }
};
extern Step step;
// The same, for an op that was given batch b.
const Step &step_of(const Batch &b);

// The fields of a sealed block for kernels that take format and head dimension at run time: those of the block at origin.
// One of the two, by kv_is_scalar(format).
struct SealedFormat {
    NsnFields at_origin;
    const uint8_t *origin;
    float delta;               // of the codebook's grid
    ScalarFields scalar_at_origin;
    const uint8_t *beside;     // where scalar_at_origin has what is beside the block
    template <class T> HD T *moved(T *p, uint8_t *block) const { return p ? (T *)(block + ((const uint8_t *)p - origin)) : nullptr; }
    HD NsnFields fields(uint8_t *block) const {
        const NsnFields &f = at_origin;
        return {f.d, f.channels, moved(f.code, block), moved(f.sign, block), moved(f.s2_f16, block), moved(f.s2_log8, block), moved(f.s1, block),
                moved(f.mean, block), moved(f.mean_step, block), moved(f.mean_min, block)};
    }
    HD ScalarFields scalar_fields(uint8_t *block, int8_t *beside_block) const {
        ScalarFields f = scalar_at_origin;
        f.code = f.code == beside ? (uint8_t *)beside_block : moved(f.code, block);
        f.scale = moved(f.scale, block), f.zero = moved(f.zero, block);
        f.basis = f.basis ? (const f16 *)beside_block : nullptr;
        return f;
    }
};
SealedFormat sealed_format(KvFormat format, int d);    // kv_seal.cu; nothing in it for f16

// Blocks begin..begin+n-1 of every slot of the step are sealed, where a slot has so many to seal; begin as kv_write says.
void seal_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n);
// For a step of one row a slot, f16 and NSN: what every layer whose turn it is seals, in one launch.  All of it is in the ring.
void seal_in_turn(const KvView &kv, const Step &step);
// The same for the sides in a scalar format (kv_seal_scalar.cu); seal_blocks calls it.
void seal_scalar_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n);

// ---- kernels in a row -----------------------------------------------------------------------------------------
// Every kernel waits before it touches what earlier kernels of its step write; until then it may read what none of them writes: weights,
// and tokens of earlier steps.
// On devices that can (compute capability 9.0), launch() lets its thread blocks start while the kernel before is at work, so
// that the start of one hides behind the end of the other: programmatic dependent launch, CUDA C++ Programming Guide.
// The next kernel may start; it waits for all of this one, which waits itself: so nothing that either waits for is missed.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    let_next_start();
}
extern bool starts_early;    // the device can
extern int sm_count;
extern int most_shared;      // bytes of shared memory that a thread block can have: 227 KiB on an H100, 99 on many others
extern int64_t launches;     // so far; and what else changes the device's memory
template <class... P, class... A> void launch(void (*kernel)(P...), dim3 blocks, int threads, size_t shared_bytes, A... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {blocks, dim3(threads), shared_bytes, stream, &early, starts_early ? 1u : 0u};
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, P(args)...));
    launches++;
}

// x / (1 + e^-x) with e^-|x|, which never overflows, as on the CPU.
__device__ inline float silu(float x) {
    const float e = expf(-fabsf(x));
    return x * (x > 0.0f ? 1.0f : e) / (1.0f + e);
}

// attention for steps of many rows (attention_prefill.cu); false: not a step that it serves, and nothing is done.
bool attention_prefill(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);

// Sums in a fixed order; every lane gets the result.
template <class T> __device__ inline T warp_sum(T x) {
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
    return x;
}

// x <- R x as in hadamard.h, by one warp, x in shared memory.  All lanes call it and see the result.
template <class Float> __device__ inline void hadamard_warp(Float *x, int d) {
    const int p = d & -d, lane = threadIdx.x % 32;
    for (int h = 1; h < p; h *= 2) {
        __syncwarp();
        for (int k = lane; k < d / 2; k += 32) {
            const int j = 2 * k - (k & (h - 1));    // k / h * 2 h + k % h
            const Float a = x[j], b = x[j + h];
            x[j] = a + b, x[j + h] = a - b;
        }
    }
    __syncwarp();
    const Float scale = 1 / sqrt((Float)p);
    for (int i = lane; i < d; i += 32) x[i] *= scale;
    __syncwarp();
}

// A row of d = 32 / FIRST C channels in the registers of 32 / FIRST lanes, those that differ in the bits of FIRST and above: each has C
// neighbouring ones.  x <- R x as in hadamard.h, d a power of two.
template <int FIRST = 1, int C> __device__ inline void hadamard_lanes(float (&x)[C]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 1; h < C; h *= 2)
#pragma unroll
        for (int c = 0; c < C; c++)
            if (!(c & h)) {
                const float a = x[c], b = x[c + h];
                x[c] = a + b, x[c + h] = a - b;
            }
#pragma unroll
    for (int o = FIRST; o < 32; o *= 2)
#pragma unroll
        for (int c = 0; c < C; c++) {
            const float other = __shfl_xor_sync(~0u, x[c], o);
            x[c] = lane & o ? other - x[c] : x[c] + other;
        }
#pragma unroll
    for (int c = 0; c < C; c++) x[c] *= 1.0f / sqrtf(32.0f / FIRST * C);
}
// A row of 32 C channels turned by position pos: the other of a pair is 16 lanes away.
template <int C> __device__ inline void turn_lanes(float (&x)[C], RopeTable rope, int pos) {
    const int lane = threadIdx.x % 32;
    for (int c = 0; c < C; c++) {
        float cosine, sine;
        rope_angle(cosine, sine, rope, pos, lane % 16 * C + c, 32 * C);
        const float other = __shfl_xor_sync(~0u, x[c], 16);
        x[c] = lane < 16 ? x[c] * cosine - other * sine : other * sine + x[c] * cosine;
    }
}
__device__ inline float exp2_fast(float x) {    // 2 ulp, denormals are 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Scratch of one op, see the pages.
int64_t attention_work_bytes(const StepShape &shape);
int64_t attention_prefill_work_bytes(const StepShape &shape);
int64_t matmul_work_bytes(const StepShape &shape);
// attention_decode.cu: steps with one row a slot; false: not a step it serves.
bool attend(float *y, const float *q, const float *k, const float *v, f16 *k16, f16 *v16, const KvView &kv, int layer, const Batch &b, int Hq);
bool attention_decode(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
int64_t attention_decode_work_bytes(const StepShape &shape);
}    // namespace cuda
