// ring.cuh - a ring of stages in shared memory: one warp fills it, the others read it, and nobody waits for more than a stage.
//
// A stage has two barriers (mbarrier, PTX ISA).  `full`: every lane's copies are there; `free`: every reader is done.  Their phases are
// odd and even by turns, one a time around.  A warp of its own asks for what comes: readers spend no instructions on it, and do not
// stand still when the memory pipe takes no more.
#pragma once
#include "cuda.cuh"

namespace cuda {

template <int STAGES> struct Ring {
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
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(free(s)), "r"(readers) : "memory");
        }
    }
    // The warp that fills: all lanes, copies by any of them in between.
    __device__ void begin_fill(Place p) const {
        if (p.time > 0) wait(free(p.slot), p.time - 1);
    }
    __device__ void end_fill(Place p) const { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full(p.slot)) : "memory"); }
    // A warp that reads.  One lane arrives for all: what the others read comes before that, too, by __syncwarp.
    __device__ void begin_read(Place p) const { wait(full(p.slot), p.time); }
    __device__ void end_read(Place p) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(free(p.slot)) : "memory");
    }

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
}    // namespace cuda
