// ring.cuh - a ring of stages in shared memory: one warp fills it, the others read it, and nobody waits for more than a stage.
//
// A stage has two barriers (mbarrier, PTX ISA).  `full`: every lane's copies are there; `free`: every reader is done.  Their phases are
// odd and even by turns, one a time around.  A warp of its own asks for what comes: readers spend no instructions on it, and do not
// stand still when the memory pipe takes no more.
#pragma once
#include "gemv.cuh"

namespace cuda {

template <int STAGES, int AT_FIRST> struct Ring {    // AT_FIRST: stages on their way before the first one is read, at most
    static constexpr int BYTES = 2 * STAGES * 8;    // of the barriers, at a multiple of 8
    uint32_t barriers;                              // address in shared memory
    struct Place {                                  // where a warp is
        int slot = 0, time = 0;                     // time: around the ring
        __device__ void advance() {
            if (++slot == STAGES) slot = 0, time++;
        }
    };
    __device__ uint32_t full(int slot) const { return barriers + slot * 8; }
    __device__ uint32_t free(int slot) const { return full(slot) + STAGES * 8; }

    // By one thread, before the thread block meets.
    __device__ void open(int readers) const {
        for (int s = 0; s < STAGES; s++) {
            asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(full(s)) : "memory");
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(free(s)), "r"(32 * readers) : "memory");
        }
    }
    // The warp that fills: all lanes, copies by any of them in between.  The first time around it waits for what it asked for AT_FIRST
    // stages before: if all multiprocessors ask for whole rings at once, what comes from L2, x and the norm's weights, takes up to 4 us.
    __device__ void begin_fill(Place p) const {
        if (p.time > 0) wait(free(p.slot), p.time - 1);
        else if (p.slot >= AT_FIRST) wait(full(p.slot - AT_FIRST), 0);
    }
    __device__ void end_fill(Place p) const { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full(p.slot)) : "memory"); }
    // A warp that reads: every lane says that it has.  (One for all after __syncwarp is in order, too, and no faster; racecheck does not see it.)
    __device__ void begin_read(Place p) const { wait(full(p.slot), p.time); }
    __device__ void end_read(Place p) const { asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(free(p.slot)) : "memory"); }

private:
    __device__ static void wait(uint32_t barrier, int time) {    // until that phase is complete
        uint32_t done;
        do
#if __CUDA_ARCH__ >= 900    // sleeps until then, or for so many ns
            asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2, 1000000;\n selp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done) : "r"(barrier), "r"(time & 1) : "memory");
#else
            asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                         : "=r"(done) : "r"(barrier), "r"(time & 1) : "memory");
#endif
        while (!done);
    }
};

template <int WARPS> __device__ inline void meet_readers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

// A stage has ROW_BYTES neighbouring bytes of each of 16 rows, at a multiple of 128 bytes.  Within 128 bytes, which are all banks, rows
// 0 .. S-1 have their parts of 128 / S bytes in different orders, so that the same part of S rows lies in different banks.
// S <= 4: 32 bytes, what memory gives at a time, shall stay together at a multiple of 32.  Llama-3-8B in q4 decodes 467 tok/s with S = 4,
// 425 with 8, where 16 bytes change places; 452 with rows 16 bytes more apart in the place of all this.
constexpr int ROW_BYTES = 1024;
template <int S> __device__ inline int place_in_stage(int row, int byte) { return row * ROW_BYTES + (byte ^ row % S * (128 / S)); }
// A warp's copies: eight lanes 128 bytes of a row at a time, a lane those of rows lane / 8, 4 further ...
struct RowCopies {
    static constexpr int EACH = 4;    // rows of a lane
    const uint8_t *next[EACH];        // what comes next, the lane's bytes
    __device__ static int row(int r) { return threadIdx.x % 32 / 8 + 4 * r; }
    __device__ static int piece() { return threadIdx.x % 8 * 16; }
    template <int S> __device__ void copy(uint8_t *stage, int bytes) {    // no more than so many of each row, a multiple of 16
#pragma unroll
        for (int b = 0; b < ROW_BYTES; b += 128)
            if (b + piece() < bytes)
#pragma unroll
                for (int r = 0; r < EACH; r++) copy_weights(stage + place_in_stage<S>(row(r), piece()) + b, next[r] + b);
#pragma unroll
        for (int r = 0; r < EACH; r++) next[r] += ROW_BYTES;
    }
};
}    // namespace cuda
