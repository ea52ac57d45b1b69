// cuda.cuh - what the CUDA halves of the pages share: error checks, the stream, the step that begin() announced, and sums
// over a warp.  Every kernel runs on one stream, so an op sees what the ops before it wrote.
#pragma once
#include <vector>
#include "kv_block.h"

#define CUDA_CHECK(call)                                                                                            \
    do {                                                                                                            \
        const cudaError_t error_ = (call);                                                                          \
        if (error_ != cudaSuccess) fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(error_));    \
    } while (0)

namespace cuda {

extern cudaStream_t stream;

// The rows of one slot in this step: rows row..row+rows-1.
struct SlotRows { int row, rows; };
// Up to KV_BLOCK rows of one slot and one block of positions, so they agree on what is coded.
struct RowTile { int row, rows; };

// The current step.  Arrays named on_* live on the device, the others are the host's copy, for sizes of launches.
struct Step {
    Batch on_device;
    std::vector<int> pos;
    std::vector<SlotRows> slots;
    std::vector<RowTile> tiles;
    const SlotRows *on_slots;
    const RowTile *on_tiles;
    const int *on_last_pos;    // (N) position of the last row of the row's slot
    void *work;                // what one op needs while it runs: see work_bytes in cuda_ops.cu
};
extern Step step;
// The same, for an op that was given batch b.
const Step &step_of(const Batch &b);

// The fields of a sealed block for kernels that take format and head dimension at run time: those of the block at origin.
struct SealedFormat {
    NsnFields at_origin;
    const uint8_t *origin;
    float delta;               // of the codebook's grid
    template <class T> HD T *moved(T *p, uint8_t *block) const { return p ? (T *)(block + ((const uint8_t *)p - origin)) : nullptr; }
    HD NsnFields fields(uint8_t *block) const {
        const NsnFields &f = at_origin;
        return {f.d, f.channels, moved(f.code, block), moved(f.sign, block), moved(f.s2_f16, block), moved(f.s2_log8, block), moved(f.s1, block),
                moved(f.mean, block), moved(f.mean_step, block), moved(f.mean_min, block)};
    }
};
SealedFormat sealed_format(KvFormat format, int d);    // kv_seal.cu; nothing in it for f16

// Blocks begin..begin+n-1 of every slot of the step are sealed, where a slot has so many to seal; begin as kv_write says.
void seal_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n);

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
__device__ inline void hadamard_warp(float *x, int d) {
    const int p = d & -d, lane = threadIdx.x % 32;
    for (int h = 1; h < p; h *= 2) {
        __syncwarp();
        for (int k = lane; k < d / 2; k += 32) {
            const int j = 2 * k - (k & (h - 1));    // k / h * 2 h + k % h
            const float a = x[j], b = x[j + h];
            x[j] = a + b, x[j + h] = a - b;
        }
    }
    __syncwarp();
    const float scale = 1.0f / sqrtf((float)p);
    for (int i = lane; i < d; i += 32) x[i] *= scale;
    __syncwarp();
}

// Scratch of one op, see the pages.
int64_t attention_work_bytes(const StepShape &shape);
int64_t attention_prefill_work_bytes(const StepShape &shape);
int64_t matmul_work_bytes(const StepShape &shape);
}    // namespace cuda
