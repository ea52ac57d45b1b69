// gemm_batch.cuh - what gemm_batch.cu's kernel is made of beside its loops: shares and stages, how x becomes rows of f16 and codes become
// what the tensor core takes.
#pragma once
#include <algorithm>
#include "gemv.cuh"
#include "ring.cuh"
#include "rows16.cuh"

namespace cuda {

constexpr int WARPS = 16;                 // that multiply
constexpr int THREADS = 32 * (WARPS + 2);     // one more copies weights, one x
constexpr int ROWS = 16;                  // of weights in a tile
constexpr int TILES = 14;                 // of a thread block at a time, at most
template <DType T> constexpr int STEP = T == DType::f16 ? ROW_STEP : 2 * ROW_STEP;    // inputs of a warp in a stage, whole ROW_STEPs ...
template <DType T> constexpr int BOX = T == DType::q4 ? 64 : 128;                     // ... in so many neighbouring bytes of a row
template <DType T> constexpr int UNIT_BYTES = ROWS * BOX<T>;                          // of weights, a warp's in a stage
template <DType T> constexpr int BOX_TILES = T == DType::f16 ? 1 : 7;    // of a box, at most
constexpr int SCALES_AHEAD = 2;           // stages whose scales a lane has before they are needed
constexpr int MOST_STAGES = 12;
template <DType T> constexpr int ENOUGH_STAGES = T == DType::f16 ? 4 : 2;    // codes keep a warp busy for longer: rather more warps
constexpr int SUM_PITCH = WARPS * ROWS + 4;    // from a row of x to the next in the sums: lanes meet different banks
constexpr int SQUARE_SUMS = 16;           // of a row: each adds up every so many-th of its squares
constexpr int AT_ONCE = 4;                // results of a thread
constexpr int H100_SHARED = 227 * 1024;   // bytes of a thread block

// Shared memory, where what begins, in bytes.
template <int GROUPS> struct Shared {
    static constexpr int SQUARES_AT = GROUPS * 8 * SUM_PITCH * 4, BARRIERS = SQUARES_AT + SQUARE_SUMS * GROUPS * 8 * 8;
    static constexpr int RING = (BARRIERS + 2 * Ring::bytes(MOST_STAGES) + 1023) / 1024 * 1024;
};
struct Shares {
    int tiles, parts;    // of a thread block's warps: outputs, at most, and parts of a stage's inputs
    int box;             // tiles that a copy brings
    template <DType T> HD int x_at() const { return parts * tiles * UNIT_BYTES<T>; }    // a stage is [part][tile] weights, [part] x
    template <DType T> HD static int x_bytes(int groups) { return STEP<T> / ROW_STEP * row16_bytes(groups); }    // of a part
    template <DType T> HD int stage_bytes(int groups) const { return x_at<T>() + parts * x_bytes<T>(groups); }
    template <DType T, int GROUPS> int stages(int shared) const { return std::min((shared - Shared<GROUPS>::RING) / stage_bytes<T>(GROUPS), MOST_STAGES); }
};

// ---- x ------------------------------------------------------------------------------------------------------
// The thread block's part of x; 32 lanes 8 rows of a block of inputs.
template <DType T, int GROUPS> __device__ inline void narrow_rows(Rows16 rows, Norm norm, const float *x, int N, int in) {
    constexpr bool FOURS = T != DType::f16;
    const int lane = threadIdx.x % 32, units = (in + ROW_STEP - 1) / ROW_STEP * (ROW_STEP / ROW_BLOCK) * GROUPS;
    for (int unit = blockIdx.x + gridDim.x * (threadIdx.x / 32); unit < units; unit += gridDim.x * WARPS) {
        const int n = unit % GROUPS * 8 + lane / 4, first = unit / GROUPS * ROW_BLOCK;
        float2 v[4];
        float square[4];
        auto input = [&](int i) { return first + Rows16::input(FOURS, lane % 4, i); };
        for (int i = 0; i < 4; i++) v[i] = n < N && input(i) < in ? *(const float2 *)(x + (int64_t)n * in + input(i)) : make_float2(0, 0);
        if (norm.weight) {
            for (int i = 0; i < 4; i++) {
                square[i] = __fadd_rn(__fmul_rn(v[i].x, v[i].x), __fmul_rn(v[i].y, v[i].y));
                if (input(i) < in) {
                    const float2 g = __ldg((const float2 *)(norm.weight + input(i)));
                    v[i].x *= g.x, v[i].y *= g.y;
                }
            }
            // Pairs of neighbouring sums, three times: where they lie is what the order of the inputs says.
            if (FOURS) square[0] += square[1], square[1] = square[2] + square[3];
            for (int i = 0; i < (FOURS ? 2 : 4); i++)
                for (int o = 1; o <= 2; o *= 2) square[i] += __shfl_xor_sync(~0u, square[i], o);
            if (!FOURS) square[0] += square[1], square[1] = square[2] + square[3];
            if (lane % 4 < 2) rows.squares[(unit / GROUPS * 2 + lane % 4) * (8 * GROUPS) + n] = lane % 4 ? square[1] : square[0];
        }
        rows.x[unit * 32 + lane] = make_uint4(pack(v[0].x, v[0].y), pack(v[1].x, v[1].y), pack(v[2].x, v[2].y), pack(v[3].x, v[3].y));
    }
}
// The same of one number; 16 lanes have SQUARES neighbouring k's of a row.  Sums of squares are made in the same order.
template <int GROUPS> __device__ inline void narrow_result(Rows16 rows, bool normed, float v, float gain, int n, int k) {
    ((__half *)rows.pair(n, k & ~1))[k % 2] = __float2half_rn(normed ? v * gain : v);
    if (!normed) return;
    float square = __fmul_rn(v, v);
#pragma unroll
    for (int o = 1; o < SQUARES; o *= 2) square += __shfl_xor_sync(~0u, square, o);
    if (k % SQUARES == 0) rows.squares[k / SQUARES * (8 * GROUPS) + n] = square;
}

// ---- codes --------------------------------------------------------------------------------------------------
// A of the two products of a group: codes of rows g and g + 8, lane t's 4t ... of its first and of its last 16 inputs (q4: the halves of
// the same bytes), times their scales.  A byte with 0x64 before it is 1,024 and itself as f16.
constexpr unsigned ABOVE = 0x64646464;
template <DType T> __device__ inline void widen_group(unsigned (&a)[2][4], const unsigned (&codes)[2][2], unsigned above, const __half2 (&scale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const bool sixteen = T == DType::q4 && h;    // times 16
            const unsigned c = T == DType::q4 ? codes[0][row] & (sixteen ? 0xf0f0f0f0 : 0x0f0f0f0f) : codes[h][row] ^ 0x80808080;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const unsigned u = __byte_perm(c, above, r ? 0x4342 : 0x4140);
                __half2 w;
                memcpy(&w, &u, 4);
                w = sixteen ? __hfma2(w, __float2half2_rn(0.0625f), __float2half2_rn(-72)) : __hadd2(w, __float2half2_rn(T == DType::q8 ? -1152 : -1032));
                w = __hmul2(w, scale[row]);
                memcpy(&a[h][2 * r + row], &w, 4);
            }
        }
}
}    // namespace cuda
