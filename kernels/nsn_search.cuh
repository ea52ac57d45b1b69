// nsn_search.cuh - the nearest codewords on tensor cores: step 6 of nsn_seal.h, for kv_seal.cu.
//
// A codeword is w = delta / 2 m with odd integers m below 256, which f16 holds exactly; x is two f16 numbers, hi + lo, together
// within 2^-22 of it.  The nearest w has the smallest
//     2 / delta (|w|^2 / 2 - x . w)  =  delta / 4 |m|^2 - hi . m - lo . m
// The rows of A are -hi and -lo of 16 groups of C <= 8 channels.  The columns of B are not codewords but half the sum and half the
// difference of two, which are integers again: the smaller of two scores is h - |g|, an addition, where min(a, b) waits for the pipe
// that every comparison takes.  Norms are three f16 numbers where A has room for as many ones (C < 8), else what sums begin with.
//
// So a lane finds which 8 codewords hold the nearest of those it sees; four lanes see all of them; the 8 are looked at once more, in
// f32.  Between codewords whose scores are closer than 2^-21 |x||w| it may take either.
#pragma once
#include "mma.cuh"
namespace cuda {

constexpr int SEAL_WARPS = 16, SEAL_THREADS = 32 * SEAL_WARPS;    // of the thread block that calls

// A codebook in shared memory.  Chunk 4 k + j has the 8 codewords that lane j of a row sees in round k of 8: pairs t = 0..3.
template <int C> struct SearchTables {
    // Registers of B of round k, lane (g, j): of pair t, [t / 2] x, y or z, w.  Column g is of chunk 4 k + g / 2, half a sum where g
    // is even, half a difference where odd.  The first register has channels 2 (j % (C / 2)) and the next, the second the same for
    // C = 8, else of delta / 4 |m|^2 what three f16 numbers hold.
    uint4 b[8][8][4][2];
    unsigned ones[4];                   // C < 8: what lanes j multiply the second with
    float4 norm[C == 8 ? 32 : 1][4];    // C = 8: of chunk and pair, half the sum and half the difference, twice: what sums begin with
    struct alignas(16) Chunk {
        unsigned m[8][C / 2];           // two f16 numbers each
        float norm[8];
        unsigned apart[4];              // an odd number of 16 bytes from chunk to chunk
    } chunk[32];
    // By the whole thread block; index (256, C).
    __device__ void fill(const int8_t *index, float delta) {
        for (int n = threadIdx.x; n < 256; n += SEAL_THREADS) {
            float square = 0;
#pragma unroll
            for (int c = 0; c < C; c += 2) {
                const char2 i = *(const char2 *)(index + n * C + c);
                const float u = 2 * i.x + 1, w = 2 * i.y + 1;
                chunk[n / 8].m[n % 8][c / 2] = pack(u, w);
                square += u * u + w * w;
            }
            chunk[n / 8].norm[n % 8] = 0.25f * delta * square;
        }
        __syncthreads();
        if (threadIdx.x < 8 * 8 * 4) {
            const int j = threadIdx.x % 4, g = threadIdx.x / 4 % 8, k = threadIdx.x / 32;
            const Chunk &from = chunk[4 * k + g / 2];
            const float side = g % 2 ? -0.5f : 0.5f;
            unsigned first[4], second[4];
#pragma unroll
            for (int t = 0; t < 4; t++) {
                const float2 u = unpack(from.m[2 * t][j % (C / 2)]), w = unpack(from.m[2 * t + 1][j % (C / 2)]);
                first[t] = second[t] = pack(0.5f * u.x + side * w.x, 0.5f * u.y + side * w.y);
                if (C == 8) continue;
                const float x = 0.5f * from.norm[2 * t] + side * from.norm[2 * t + 1], hi = to_f32(to_f16(x)), lo = to_f32(to_f16(x - hi));
                second[t] = j == 0 ? pack(hi, lo) : j == 1 ? pack(x - hi - lo, 0) : 0;
            }
            b[k][g][j][0] = make_uint4(first[0], second[0], first[1], second[1]);
            b[k][g][j][1] = make_uint4(first[2], second[2], first[3], second[3]);
        }
        if (threadIdx.x < 4) ones[threadIdx.x] = threadIdx.x == 0 ? pack(1, 1) : threadIdx.x == 1 ? pack(1, 0) : 0;
        if (C == 8 && threadIdx.x < 128) {
            const int t = threadIdx.x % 4, n = threadIdx.x / 4;
            const float u = 0.5f * chunk[n].norm[2 * t], w = 0.5f * chunk[n].norm[2 * t + 1];
            norm[n][t] = make_float4(u + w, u - w, u + w, u - w);
        }
    }
};

// The nearest of 256 codewords to each of n groups of C channels, the lowest index among equals; code, sign (n), a byte a group, n a
// multiple of 64.
// In shared memory: x (n, C), s2 (n / groups); groups of rows with s2 = 0 have no codes.  A group's first two channels become
// <x,x> and <x,m>.
template <int C>
__device__ inline void search(uint8_t *code, uint8_t *sign, float *x, const SearchTables<C> &book, const float *s2, int n, int groups) {
    constexpr int TILES = 2;    // of 16 groups: a warp shares what it reads of the codebook; with four, sums wait for registers
    const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    for (int v0 = threadIdx.x / 32 * 16 * TILES; v0 < n; v0 += SEAL_WARPS * 16 * TILES) {
        unsigned a[TILES][4];     // 16 groups as rows of A: -hi and -lo side by side, for C < 8 then 1 for each part of the norm
        float best[2 * TILES];    // of row 8 e + g
        int at[2 * TILES];
#pragma unroll
        for (int e = 0; e < 2 * TILES; e++) {
            float2 y = *(const float2 *)(x + (v0 + 8 * e + g) * C + 2 * (j % (C / 2)));
            if (sign) y = make_float2(fabsf(y.x), fabsf(y.y));
            const unsigned hi = pack(-y.x, -y.y);
            const float2 kept = unpack(hi);
            const unsigned lo = pack(-y.x - kept.x, -y.y - kept.y);
            a[e / 2][e % 2] = C == 8 || j < C / 2 ? hi : j < C ? lo : 0;
            a[e / 2][e % 2 + 2] = C == 8 ? lo : *(const volatile unsigned *)&book.ones[j];    // volatile: of one register the loop makes copies
            best[e] = INFINITY, at[e] = 0;
        }
#pragma unroll 1
        for (int k = 0; k < 8; k++) {
            const uint4 b[2] = {book.b[k][g][j][0], book.b[k][g][j][1]};
            float4 norm[4];
#pragma unroll
            for (int t = 0; t < 4; t++) norm[t] = C == 8 ? book.norm[4 * k + j][t] : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                float smaller[2][4];    // of row g, g + 8: of each pair
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    const float begin[4] = {norm[t].x, norm[t].y, norm[t].z, norm[t].w};
                    float y[4];
                    mma(y, a[i], t % 2 ? b[t / 2].z : b[t / 2].x, t % 2 ? b[t / 2].w : b[t / 2].y, begin);
                    smaller[0][t] = y[0] - fabsf(y[1]), smaller[1][t] = y[2] - fabsf(y[3]);
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float score = fminf(fminf(smaller[r][0], smaller[r][1]), fminf(smaller[r][2], smaller[r][3]));
                    at[2 * i + r] = score < best[2 * i + r] ? k : at[2 * i + r];
                    best[2 * i + r] = fminf(best[2 * i + r], score);
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 2 * TILES; e++) at[e] = 4 * at[e] + j;    // the chunk
        // The four lanes of a row agree: each gives half of its rows to the other, twice, and is left with rows 8 j + g and 32 more.
#pragma unroll
        for (int half = 1; half < 4; half *= 2)
#pragma unroll
            for (int e = 0; e < TILES / half; e++) {
                const float mine = j & half ? best[2 * e + 1] : best[2 * e], other = __shfl_xor_sync(~0u, j & half ? best[2 * e] : best[2 * e + 1], half);
                const int mine_at = j & half ? at[2 * e + 1] : at[2 * e], other_at = __shfl_xor_sync(~0u, j & half ? at[2 * e] : at[2 * e + 1], half);
                const bool take = other < mine || (other == mine && other_at < mine_at);
                best[e] = take ? other : mine, at[e] = take ? other_at : mine_at;
            }
        __syncwarp();    // all have read x
#pragma unroll
        for (int e = 0; e < TILES / 2; e++) {
            const int v = v0 + 32 * e + 8 * j + g;
            float y[C], square = 0;
            unsigned bits = 0;
#pragma unroll
            for (int c = 0; c < C; c += 2) {
                const float2 two = *(const float2 *)(x + v * C + c);
                y[c] = two.x, y[c + 1] = two.y;
            }
#pragma unroll
            for (int c = 0; c < C; c++) {
                bits |= (unsigned)(y[c] < 0) << c;
                if (sign) y[c] = fabsf(y[c]);
                square = fmaf(y[c], y[c], square);
            }
            const auto &chunk = book.chunk[at[e]];
            float nearest = INFINITY;
            int which = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float score = chunk.norm[i];
#pragma unroll
                for (int c = 0; c < C; c += 2) {
                    const float2 m = unpack(chunk.m[i][c / 2]);
                    score = fmaf(-y[c], m.x, score), score = fmaf(-y[c + 1], m.y, score);
                }
                which = score < nearest ? i : which;
                nearest = fminf(nearest, score);
            }
            *(float2 *)(x + v * C) = make_float2(square, chunk.norm[which] - nearest);
            if (s2[v / groups] == 0) continue;
            code[v] = (uint8_t)(8 * at[e] + which);
            if (sign) sign[v] = (uint8_t)bits;
        }
    }
}
}    // namespace cuda
