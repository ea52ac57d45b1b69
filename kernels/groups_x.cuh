// groups_x.cuh - x of gemv_groups.cu: which of a row's inputs are whose, and how they become integers in shared memory.
#pragma once
#include "gemv.cuh"

namespace cuda {

constexpr int TEAMS = 2, TEAM = 8;    // of warps that multiply, by turns a stage; one warp more copies weights
constexpr int WARPS = TEAMS * TEAM, UNITS = 2;    // a warp's parts of a stage
constexpr float INTEGERS = 127 * 65536;    // the largest of x: its high byte fits
template <DType T> constexpr int UNIT = T == DType::q4 ? 128 : 64;    // inputs in 64 bytes of codes
template <DType T> constexpr int STEP = UNIT<T> * TEAM * UNITS;       // inputs of a stage

// x in shared memory, of a group and a pair of rows (or of one row, if there is one): a column has 32 bytes, lane t's 8 together.
// Behind the columns of all groups, for each row of a pair: the units of the integers of all groups.
template <int R> struct XPlace {    // R rows
    static constexpr int PAIRS = (R + 1) / 2, COLUMNS = R == 1 ? 4 : 8;
    int groups;
    __device__ int column_at(int group, int pair, int column) const { return ((group * PAIRS + pair) * COLUMNS + column) * 32; }
    __device__ int unit_at(int group, int n) const { return groups * PAIRS * COLUMNS * 32 + (n * groups + group) * 4; }
    static int64_t bytes(int64_t in) { return in / GROUP * (PAIRS * COLUMNS * 32 + (R == 1 ? 1 : 2 * PAIRS) * 4); }
};

// Four lanes' inputs 4t ..., 16 + 4t ... of a group of row n, as integers, by a warp; not for lanes without `any`.
template <DType T, int R> __device__ inline void make_integers(uint8_t *xs, const XPlace<R> &place, const float4 (&v)[2], int t, int group, int n, bool any) {
    unsigned top = 0;    // |g x| as bits, which are in its order; NaN is above all
    for (const float4 &e : v) top = max(top, __float_as_uint(fmaxf(fmaxf(fabsf(e.x), fabsf(e.y)), fmaxf(fabsf(e.z), fabsf(e.w)))));
    for (const float4 &e : v) top = max(top, __float_as_uint(fabsf(e.x + e.y + e.z + e.w)) > 0x7f800000u ? 0x7fffffffu : 0u);    // fmaxf leaves NaN out
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    const bool tiny = top < 27u << 23;    // below 2^-100: nothing
    const float largest = __uint_as_float(top), inverse = tiny ? 0.0f : INTEGERS / largest;
    uint32_t bytes[3][2];    // [high, middle, low][inputs 4t ..., 16 + 4t ...]
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float e[4] = {v[h].x, v[h].y, v[h].z, v[h].w};
        uint32_t w[4];    // with 128 added to each byte, which are digits then
#pragma unroll
        for (int c = 0; c < 4; c++) w[c] = __float2int_rn(e[c] * inverse) + 0x808080;
#pragma unroll
        for (int b = 0; b < 3; b++) {
            const int select = (2 - b) | (6 - b) << 4;
            bytes[b][h] = __byte_perm(__byte_perm(w[0], w[1], select), __byte_perm(w[2], w[3], select), 0x5410) ^ 0x80808080;
        }
    }
    uint8_t *const to = xs + place.column_at(group, n / 2, n % 2 * 4) + 8 * t;
    for (int b = 0; b < 3; b++)
        if (any) *(uint2 *)(to + b * 32) = make_uint2(bytes[b][0], bytes[b][1]);
    if (any) *(uint2 *)(to + 3 * 32) = make_uint2(0, 0);
    // codes of q4 are 16 times what they are
    if (any && t == 0) *(float *)(xs + place.unit_at(group, n)) = tiny ? 0.0f : largest * ((T == DType::q4 ? 0.0625f : 1.0f) / INTEGERS);
}
// The units of a step are shared by the warps of a team; u: of a warp.
__device__ inline int unit_of(int step, int u) { return (step * UNITS + u) * TEAM + threadIdx.x / 32 % TEAM; }
// A lane's part of making x of what its warp multiplies: a quad of lanes has a group of a step.
template <DType T, int ROWS_AT_ONCE> struct XLane {
    static constexpr int GROUPS = UNIT<T> / GROUP;    // of a unit
    float4 v[ROWS_AT_ONCE][2], gain[2];
    __device__ static int group(int step) { return unit_of(step, threadIdx.x % 32 / (4 * GROUPS)) * GROUPS + threadIdx.x / 4 % GROUPS; }
    __device__ static bool any(int step, int in) { return threadIdx.x % 32 / (4 * GROUPS) < UNITS && group(step) * GROUP < in; }
    __device__ static int input(int step) { return group(step) * GROUP + threadIdx.x % 4 * 4; }
    __device__ void load_gain(const float *weights, int step, int in) {
        for (int h = 0; h < 2; h++)
            if (weights) gain[h] = any(step, in) ? __ldg((const float4 *)(weights + input(step) + 16 * h)) : make_float4(0, 0, 0, 0);
    }
    __device__ void load(const float *x, int step, int n0, int N, int in) {
#pragma unroll
        for (int n = 0; n < ROWS_AT_ONCE; n++)
            for (int h = 0; h < 2; h++)
                if (n0 + n < N) v[n][h] = any(step, in) ? *(const float4 *)(x + (int64_t)(n0 + n) * in + input(step) + 16 * h) : make_float4(0, 0, 0, 0);
    }
};
}    // namespace cuda
