/* matmul_groups - products with weights in q8 and q4 on CUDA (groups.h; on the CPU: dot_groups.h).

   few rows    gemv_groups.cu, where it serves; else a kernel for any number of inputs, here
   a batch's   gemm_batch.cu, where it serves
   many rows   W is widened to f16, a slab at a time, and goes through cuBLAS: matmul.cu

   Limits    in a multiple of 32; widened q8: |w| < 65,520.
   Tested by tests/test_cuda_groups.cpp                                                                        */
#include "groups.h"

#ifdef __CUDACC__
#include "gemv.cuh"
namespace cuda {

// Any multiple of 32: a warp a tile of two rows of weights, a lane a group, f32.
template <DType T> __global__ void __launch_bounds__(128) gemv_groups_any_kernel(const __grid_constant__ Products p, const float *x, int N, int in) {
    const int lane = threadIdx.x % 32, tile = blockIdx.x * 4 + threadIdx.x / 32;
    if (tile >= p.tiles<2>()) return;
    wait_for_inputs();
    float sum[2][FEW_ROWS] = {};
    const Products::Row first = p.first_of<2>(tile);
    for (int i = 0; i < 2; i++) {
        const Products::Row row = p.row_of<2>(first, i);
        for (int k = lane * GROUP; k < in; k += 32 * GROUP) {
            const int64_t at = (int64_t)row.o * in + k;
            const float s = to_f32(p.W[row.m].scale[at / GROUP]);
            for (int j = 0; j < GROUP; j++) {
                const float w = s * (T == DType::q4 ? code_q4(p.W[row.m].data, at + j) : code_q8(p.W[row.m].data, at + j));
#pragma unroll
                for (int n = 0; n < FEW_ROWS; n++)
                    if (n < N) sum[i][n] = fmaf(x[(int64_t)n * in + k + j], w, sum[i][n]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < FEW_ROWS; n++) {
        const float y[2] = {warp_sum(sum[0][n]), warp_sum(sum[1][n])};
        for (int r = 0; r < p.tile_outs<2>(); r++) {
            float *const to = lane == 0 && n < N ? p.result_of<2>(tile, r, n) : nullptr;
            if (to) *to = p.gated ? silu(y[0]) * y[1] : p.add ? *to + y[r] : y[r];
        }
    }
}
void gemv_groups_any(const Products &p, const float *x, int N, int in) {
    auto kernel = p.W[0].type == DType::q4 ? gemv_groups_any_kernel<DType::q4> : gemv_groups_any_kernel<DType::q8>;
    launch(kernel, dim3(ceil_div(p.tiles<2>(), 4)), 128, 0, p, x, N, in);
}

// ---- many rows: f16 for cuBLAS ------------------------------------------------------------------------------
// A thread widens 8 neighbouring inputs.
__global__ void widen_groups_kernel(uint4 *to, Matrix W, int64_t first, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, at = first + 8 * i;
    wait_for_inputs();
    if (8 * i >= n) return;
    const float s = to_f32(W.scale[at / GROUP]);
    const int64_t byte = W.type == DType::q8 ? at : at / GROUP * 16 + at % 16;
    const int shift = (int)(at % GROUP / 16 * 4);
    const uint2 eight = *(const uint2 *)((const uint8_t *)W.data + byte);
    unsigned pair[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const unsigned codes = (j < 2 ? eight.x : eight.y) >> j % 2 * 16;
        const int a = W.type == DType::q8 ? (int8_t)codes : (int)(codes >> shift & 15) - 8;
        const int b = W.type == DType::q8 ? (int8_t)(codes >> 8) : (int)(codes >> 8 >> shift & 15) - 8;
        pair[j] = pack(s * a, s * b);
    }
    to[i] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}
void widen_groups(f16 *to, const Matrix &W, int64_t first, int64_t rows, int in) {
    launch(widen_groups_kernel, dim3(ceil_div(rows * in / 8, 256)), 256, 0, (uint4 *)to, W, first * in, rows * in);
}
}    // namespace cuda
#endif
