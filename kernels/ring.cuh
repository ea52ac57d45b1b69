// ring.cuh - a ring of stages in shared memory: some warps fill it, the others read it, and nobody waits for more than a stage.
//
// A stage has two barriers (mbarrier, PTX ISA).  `full`: what was asked for is there; `free`: every reader is done.  Their phases are
// odd and even by turns, one a time around: whoever reads has to read every stage, or takes one time around for another.  Warps of their
// own ask for what comes: readers spend no instructions on it, and do not stand still when the memory pipe takes no more.
#pragma once
#include <cuda.h>
#include "gemv.cuh"

namespace cuda {

struct Ring {
    uint32_t barriers;        // address in shared memory, of bytes(stages) at a multiple of 8
    int stages, at_first;     // at_first: stages on their way before the first one is read, at most
    HD static constexpr int bytes(int stages) { return 2 * stages * 8; }
    struct Place {            // where a warp is
        int slot = 0, time = 0;    // time: around the ring
    };
    __device__ void advance(Place &p) const {
        if (++p.slot == stages) p.slot = 0, p.time++;
    }
    __device__ uint32_t full(int slot) const { return barriers + slot * 8; }
    __device__ uint32_t free(int slot) const { return full(slot) + stages * 8; }

    // By one thread, before any other uses it (say_open, wait_open); so many threads fill it, so many warps read.
    __device__ void open(int fillers, int readers) const {
        for (int s = 0; s < stages; s++) {
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(full(s)), "r"(fillers) : "memory");
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(free(s)), "r"(32 * readers) : "memory");
        }
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");    // for bulk copies
#endif
    }
    // A warp that fills: all lanes, copies by any of them in between.  The first time around it waits for what it asked for at_first
    // stages before: if all multiprocessors ask for whole rings at once, what comes from L2, x and the norm's weights, takes up to 4 us.
    __device__ void begin_fill(Place p) const {
        if (p.time > 0) wait_free(p);
        else if (p.slot >= at_first) wait(full(p.slot - at_first), 0);
    }
    __device__ void wait_free(Place p) const { wait(free(p.slot), p.time - 1); }    // not the first time around
    __device__ void end_fill(Place p) const { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full(p.slot)) : "memory"); }
    // In the place of copies and end_fill, by one thread: first how many bytes will come, then bulk copies of them.  Compute capability 9.0.
    __device__ void expect(Place p, int bytes) const {
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(full(p.slot)), "r"(bytes) : "memory");
#endif
    }
    __device__ void copy_bulk(Place p, void *to, const void *from, int bytes) const {    // neighbouring bytes
#if __CUDA_ARCH__ >= 900
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                     "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"(full(p.slot)) : "memory");
#endif
    }
    __device__ void copy_box(Place p, void *to, const CUtensorMap &boxes, int byte, int row) const {    // a box (map_boxes), by any thread
#if __CUDA_ARCH__ >= 900
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(&boxes), "r"(byte), "r"(row), "r"(full(p.slot)) : "memory");
#endif
    }
    __device__ void copy_boxes(Place p, void *to, const CUtensorMap &boxes, int first, int row) const {    // neighbouring ones, as many as the map says
#if __CUDA_ARCH__ >= 900
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
                     "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(&boxes), "r"(0), "r"(row), "r"(first), "r"(full(p.slot)) : "memory");
#endif
    }
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

// A matrix of which boxes are copied: some rows' `bytes`, 128 or 64, row by row; 16-byte pieces of 128 bytes change places (box_place) so
// that rows meet all banks.  Behind the last row, or a row's end, come zeros.  `data` and the pitch, bytes from row to row: multiples of 16.
// at_once: so many neighbouring boxes make one copy, box by box; the pitch is a multiple of `bytes` then.  Compute capability 9.0.
CUtensorMap map_boxes(const void *data, int64_t pitch, int64_t rows, int bytes, int box_rows, int at_once = 1);
// Where byte `at` of a box lies that begins at a multiple of 1,024.
template <int BYTES> __device__ inline int box_place(int at) { return at ^ at / 128 % (BYTES / 16) * 16; }

// Whoever opened a ring does not wait for those of the thread block's THREADS that are to read.
template <int THREADS> __device__ inline void say_open() { asm volatile("bar.arrive 2, %0;" ::"n"(THREADS) : "memory"); }
template <int THREADS> __device__ inline void wait_open() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

template <int WARPS> __device__ inline void meet_readers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

// A stage has ROW_BYTES neighbouring bytes of each of 16 rows, at a multiple of 128 bytes.  Within 128 bytes, which are all banks, rows
// 0 .. S-1 have their parts of 128 / S bytes in different orders, so that the same part of S rows lies in different banks.
// S <= 4: 32 bytes, what memory gives at a time, shall stay together at a multiple of 32 (q4, before it had boxes: 467 tok/s with S = 4,
// 425 with 8, where 16 bytes change places; 452 with rows 16 bytes more apart in the place of all this).
constexpr int ROW_BYTES = 1024;
template <int S> __device__ inline int place_in_stage(int row, int byte) { return row * ROW_BYTES + (byte ^ row % S * (128 / S)); }
// A warp's copies: eight lanes 128 bytes of a row at a time, a lane those of rows lane / 8, 4 further ...
struct RowCopies {
    static constexpr int EACH = 4;    // rows of a lane
    const uint8_t *next[EACH];        // what comes next, the lane's bytes
    __device__ static int row(int r) { return threadIdx.x % 32 / 8 + 4 * r; }
    __device__ static int piece() { return threadIdx.x % 8 * 16; }
    template <class Where> __device__ void copy(uint8_t *stage, int bytes, Where where) {    // no more than so many of each row, a multiple of 16
#pragma unroll
        for (int b = 0; b < ROW_BYTES; b += 128)
            if (b + piece() < bytes)
#pragma unroll
                for (int r = 0; r < EACH; r++) copy_weights(stage + where(row(r), piece() + b), next[r] + b);
#pragma unroll
        for (int r = 0; r < EACH; r++) next[r] += ROW_BYTES;
    }
};
}    // namespace cuda
