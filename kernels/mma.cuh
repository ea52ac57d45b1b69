// mma.cuh - tensor cores and asynchronous copies by hand.
#pragma once
#include "cuda.cuh"

namespace cuda {

// Fragments of m16n8k16, lane = 4 g + j:   A  {rows g, g + 8} x {columns 2j, 2j+1}, then the same at columns 8 + 2j
//                                          B  rows (2j, 2j+1), then 8 + (2j, 2j+1), of column g
//                                          C  rows g, then g + 8, at columns 2j, 2j+1
// y = A B + c, f16 with sums in f32
__device__ inline void mma(float (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ inline void mma(float (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { mma(y, a, b0, b1, y); }    // y += A B

// m16n8k32 of 8-bit integers, exact: a register has four neighbouring columns of A or rows of B instead of two.  y += A B
__device__ inline void mma_s8(int (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(y[0]), "+r"(y[1]), "+r"(y[2]), "+r"(y[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma_s8_u8(int (&y)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {    // B unsigned
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(y[0]), "+r"(y[1]), "+r"(y[2]), "+r"(y[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane L gives the address of row L % 8 of matrix L / 8.
__device__ inline void load_matrices(unsigned (&x)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ inline void load_matrices_turned(unsigned (&x)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ inline unsigned pack(float a, float b) {
    const __half2 h = __floats2half2_rn(a, b);
    unsigned u;
    memcpy(&u, &h, 4);
    return u;
}
__device__ inline float2 unpack(unsigned u) {
    __half2 h;
    memcpy(&h, &u, 4);
    return __half22float2(h);
}
}    // namespace cuda
