/* kv_seal - blocks of 64 rows into the cache's format on the GPU: the contract is kv_write.cu's, the method nsn_seal.h's.

   Work      One thread block for each block, kv head, and K or V.  Rows go to shared memory as f32; eight threads
             add up what a token needs, a warp turns and rotates it.
   Search    On tensor cores.  A codeword is w = delta / 2 m with odd integers m below 256, which f16 holds exactly; x is two
             f16 numbers, hi + lo, together within 2^-22 of it.  The nearest w has the smallest
                 2 / delta (|w|^2 / 2 - x . w)  =  delta / 4 |m|^2 - hi . m - lo . m
             The rows of A are -hi and -lo of 16 groups of C <= 8 channels, the sums begin with the norms.  The columns of B are not
             codewords but half the sum and half the difference of two, which are integers again: the smaller of two scores is
             h - |g|, an addition, where min(a, b) waits for the pipe that every comparison takes.  So a lane finds which 8
             codewords hold the nearest of those it sees; four lanes see all of them; the 8 are looked at once more, in f32.
   Agrees    with the reference up to ties: sums are added in another order, mostly in f32, so results differ in the last bit now
             and then; the search chooses between codewords whose scores are closer than 2^-21 |x||w| as it likes.
   Cost      64 us for 512 blocks of nsn2b, d = 128 (8 heads, K and V, 32 rows) on an H100, nsn2 and nsn1 61, nsn4b 94; 22 us for 16.
             Before, with every score compared and a warp for every sum: 142,000 warp instructions a block, 115, 80 and 178 us, 39.
             Tried: four tiles of groups at a time, which leave no registers for the next products, so that each waits for the sum
             before it; with that, and tables made in more passes, 68 us and 71,500 instructions (ncu), 63% of them in the search.
   Tested by tests/test_cuda.cpp                                                                                     */
#ifdef __CUDACC__
#include <algorithm>
#include "mma.cuh"
namespace cuda {

constexpr int SEAL_WARPS = 16, SEAL_THREADS = 32 * SEAL_WARPS;
static_assert(SEAL_THREADS >= MAX_HEAD_DIM && SEAL_THREADS >= 256, "a thread a channel, a thread a codeword");

SealedFormat sealed_format(KvFormat format, int d) {
    alignas(16) static uint8_t origin[KV_BLOCK * MAX_HEAD_DIM * 2 + 4096], beside[1];    // never read: addresses only
    SealedFormat f = {};
    f.origin = origin, f.beside = beside;
    with_format(format, d, [&](auto type) {
        using Format = decltype(type);
        static_assert(sizeof(typename Format::Block) <= sizeof origin, "room for the largest block");
        auto &block = *(typename Format::Block *)origin;
        if constexpr (Format::has_code && Format::has_plain) f.at_origin = nsn_fields(type, block), f.delta = Format::delta;    // NSN
        else if constexpr (Format::has_code) f.scalar_at_origin = Format::fields(block, (int8_t *)beside);
    });
    return f;
}

struct SealArgs {
    KvView kv;
    const f16 *k16, *v16;
    Batch b;
    const SlotRows *slots;
    const int *last_pos;
    SealedFormat k, v;
    int layer;    // or ALL_IN_TURN, in steps of one row a slot
};
constexpr int ALL_IN_TURN = -1;

// RTN4 of n <= 64 values in shared memory, by one warp: nsn_seal.h's round_4bit.  v becomes what is kept.
__device__ inline void round_4bit_warp(uint8_t *code, f16 *step, f16 *min, float *v, int n) {
    const int lane = threadIdx.x % 32;
    float lo = INFINITY, hi = -INFINITY;
    for (int i = lane; i < n; i += 32) lo = fminf(lo, v[i]), hi = fmaxf(hi, v[i]);
    lo = -warp_max(-lo), hi = warp_max(hi);
    const f16 s = to_f16(fmaxf((hi - lo) / 15.0f, 1e-5f)), m = to_f16(lo);
    for (int i = lane; i < n / 2; i += 32) {
        int q[2];
        for (int j = 0; j < 2; j++) {
            q[j] = (int)rintf(fminf(fmaxf((v[2 * i + j] - to_f32(m)) / to_f32(s), 0.0f), 15.0f));
            v[2 * i + j] = to_f32(m) + to_f32(s) * q[j];
        }
        code[i] = (uint8_t)(q[0] | q[1] << 4);
    }
    if (lane == 0) *step = s, *min = m;
}

__device__ inline void turn_warp(float *x, RopeTable rope, int pos, int d) {
    __syncwarp();
    for (int j = threadIdx.x % 32; j < d / 2; j += 32) {
        float c, s;
        rope_angle(c, s, rope, pos, j, d);
        const float lo = x[j], hi = x[j + d / 2];
        x[j] = lo * c - hi * s;
        x[j + d / 2] = lo * s + hi * c;
    }
    __syncwarp();
}

// Sum over the 8 neighbouring lanes that share a token.
__device__ inline float sum8(float x) {
    for (int o = 1; o < 8; o *= 2) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

// A token in registers: lane L of a warp holds channels L + 32 k; zeros past channel d.  D: d, or 0 if only run time knows it.
template <int D> struct Token {
    static constexpr int K = D ? D / 32 : MAX_HEAD_DIM / 32;
    float y[K];
    __device__ static bool is(int k, int d) { return D || (int)threadIdx.x % 32 + 32 * k < d; }
    __device__ void load(const float *x, int d) {
#pragma unroll
        for (int k = 0; k < K; k++) y[k] = is(k, d) ? x[threadIdx.x % 32 + 32 * k] : 0.0f;
    }
    __device__ void store(float *x, int d) const {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (is(k, d)) x[threadIdx.x % 32 + 32 * k] = y[k];
    }
    // RoPE, x: room for the token in shared memory.
    __device__ void turn(float *x, int d, RopeTable rope, int pos) {
        if (D) {    // channels j and j + d / 2 are one lane's
#pragma unroll
            for (int k = 0; k < K / 2; k++) {
                float c, s;
                rope_angle(c, s, rope, pos, threadIdx.x % 32 + 32 * k, d);
                const float lo = y[k], hi = y[k + K / 2];
                y[k] = lo * c - hi * s;
                y[k + K / 2] = lo * s + hi * c;
            }
        } else {
            store(x, d);
            turn_warp(x, rope, pos, d);
            load(x, d);
        }
    }
    // hadamard.h's x sqrt(p): additions between lanes, then within them.
    __device__ void hadamard(int p) {
#pragma unroll
        for (int h = 1; h < 32; h *= 2)
            if (h < p) {
                const float side = threadIdx.x & h ? -1.0f : 1.0f;
#pragma unroll
                for (int k = 0; k < K; k++) y[k] = fmaf(side, y[k], __shfl_xor_sync(~0u, y[k], h));
            }
#pragma unroll
        for (int h = 1; h < K; h *= 2)
            if (32 * h < p)
#pragma unroll
                for (int k = 0; k < K; k++)
                    if (!(k & h)) {
                        const float a = y[k], b = y[k + h];
                        y[k] = a + b, y[k + h] = a - b;
                    }
    }
};

// ---- step 6 ---------------------------------------------------------------------------------------------------
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

// The nearest of 256 codewords to each of n groups of C channels, the lowest index among equals; code, sign (n), n a multiple of 64.
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

__device__ inline void store_scales_warp(const NsnFields &f, const float *s2) {
    const int lane = threadIdx.x % 32;
    if (f.s2_f16) {
        for (int t = lane; t < KV_BLOCK; t += 32) f.s2_f16->value[t] = to_f16(fminf(s2[t], 65504.0f));
        return;
    }
    float lo = INFINITY, hi = -INFINITY;
    for (int t = lane; t < KV_BLOCK; t += 32)
        if (s2[t] > 0) lo = fminf(lo, log2f(s2[t])), hi = fmaxf(hi, log2f(s2[t]));
    lo = -warp_max(-lo), hi = warp_max(hi);
    const f16 min = to_f16(lo <= hi ? lo : 0.0f), step = to_f16(lo <= hi ? (hi - lo) / 254.0f : 0.0f);
    for (int t = lane; t < KV_BLOCK; t += 32) {
        const float x = to_f32(step) > 0 && s2[t] > 0 ? (log2f(s2[t]) - to_f32(min)) / to_f32(step) : 0.0f;
        f.s2_log8->code[t] = s2[t] > 0 ? (uint8_t)(1 + rintf(fminf(fmaxf(x, 0.0f), 254.0f))) : 0;
    }
    if (lane == 0) f.s2_log8->min = min, f.s2_log8->step = step;
}

// What thread blocks share beside x and the tables.
struct alignas(16) SealWork {
    float inverse_s1[KV_BLOCK], s2[KV_BLOCK], inverse_s2[KV_BLOCK], mean[MAX_HEAD_DIM];
    double sums[SEAL_THREADS];
};
// Steps 1 to 7 of a block of zeros.  x (KV_BLOCK, d) in shared memory; channels of a codeword: C.
template <int D, int C>
__device__ inline void seal(const NsnFields &f, float *x, SearchTables<C> &book, SealWork &work, const SealArgs &a, bool key, int first_pos) {
    auto &[inverse_s1, s2, inverse_s2, mean, sums] = work;
    const KvView &kv = a.kv;
    const int d = D ? D : kv.d, thread = threadIdx.x, warp = thread / 32;
    static_assert(SEAL_THREADS == 8 * KV_BLOCK, "eight threads a token");
    const int token = thread / 8, eighth = thread % 8;
    const float delta = (key ? a.k : a.v).delta;
    const bool pre_rope = !(kv.ablate & NO_PRE_ROPE);
    book.fill(key ? kv.k_codebook : kv.v_codebook, delta);
    // 1 and 2
    if (key && !pre_rope) {
        for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) turn_warp(x + t * d, kv.rope, first_pos + t, d);
        __syncthreads();
    }
    float square = 0;
    for (int c = 4 * eighth; c < d; c += 32) {
        const float4 y = *(const float4 *)(x + token * d + c);
        square += (y.x * y.x + y.y * y.y) + (y.z * y.z + y.w * y.w);
    }
    square = sum8(square) / d;
    if (eighth == 0) inverse_s1[token] = kv.ablate & NO_FIRST_NORM ? 1.0f : sqrtf(square);    // not yet the inverse
    __syncthreads();
    if (warp == 0) round_4bit_warp(f.s1->code, &f.s1->step, &f.s1->min, inverse_s1, KV_BLOCK);
    __syncthreads();
    if (thread < KV_BLOCK) inverse_s1[thread] = inverse_s1[thread] > 0 ? 1.0f / inverse_s1[thread] : 0.0f;
    __syncthreads();
    int parts = 1;    // a power of two: of the rows, each a thread's in every channel
    while (2 * parts * d <= SEAL_THREADS && parts < KV_BLOCK) parts *= 2;
    if (thread < parts * d) {
        double sum = 0;    // the means are rounded to a coarse grid: they should not fall on its other side
#pragma unroll 8
        for (int t = thread / d; t < KV_BLOCK; t += parts) sum += x[t * d + thread % d] * inverse_s1[t];
        sums[thread] = sum;
    }
    __syncthreads();
    if (thread < d) {
        double sum = 0;
        for (int part = 0; part < parts; part++) sum += sums[part * d + thread];
        mean[thread] = kv.ablate & NO_SHIFT ? 0.0f : (float)(sum / KV_BLOCK);
    }
    __syncthreads();
    for (int g = warp; g < (d + 31) / 32; g += SEAL_WARPS)
        round_4bit_warp(f.mean + g * 16, f.mean_step + g, f.mean_min + g, mean + g * 32, min(32, d - g * 32));
    __syncthreads();
    // 3
    square = 0;
    for (int c = 4 * eighth; c < d; c += 32) {
        const float4 y = *(const float4 *)(x + token * d + c), m = *(const float4 *)(mean + c);
        const float s = inverse_s1[token], u = fmaf(y.x, s, -m.x), v = fmaf(y.y, s, -m.y), w = fmaf(y.z, s, -m.z), z = fmaf(y.w, s, -m.w);
        square += (u * u + v * v) + (w * w + z * z);
    }
    square = sum8(square) / d;
    if (eighth == 0) s2[token] = sqrtf(square), inverse_s2[token] = square > 0 ? rsqrtf(square) : 0.0f;
    __syncthreads();
    // 3 to 5: what is linear can wait for the scales
    const int p = d & -d;
    const bool rotate = !(kv.ablate & NO_HADAMARD);
    const float rotation_scale = rotate ? rsqrtf((float)p) : 1.0f;
    Token<D> mean_here;
    mean_here.load(mean, d);
#pragma unroll(D ? 2 : 1)
    for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) {
        Token<D> here;
        here.load(x + t * d, d);
#pragma unroll
        for (int k = 0; k < here.K; k++) here.y[k] = fmaf(here.y[k], inverse_s1[t], -mean_here.y[k]);
        if (key && pre_rope) here.turn(x + t * d, d, kv.rope, first_pos + t);
        if (rotate) here.hadamard(p);
        const float scale = inverse_s2[t] * rotation_scale;
#pragma unroll
        for (int k = 0; k < here.K; k++) here.y[k] *= scale;
        here.store(x + t * d, d);
    }
    __syncthreads();
    // 6
    const int groups = d / C;
    search<C>(f.code, f.sign, x, book, s2, KV_BLOCK * groups, groups);
    __syncthreads();
    // 7: (<x,x> / <x,q>)^a, q = delta / 2 m; 0 where the codewords point away
    float xx = 0, xq = 0;
    for (int e = eighth; e < groups; e += 8) {
        const float2 products = *(const float2 *)(x + token * d + e * C);
        xx += products.x, xq += products.y;
    }
    xx = sum8(xx), xq = 0.5f * delta * sum8(xq);
    if (eighth == 0 && s2[token] > 0) {
        const float exponent = key ? kv.k_exponent : kv.v_exponent, ratio = xx / xq;
        s2[token] *= !(xq > 0) ? 0.0f : kv.ablate & NO_SCALE ? 1.0f : exponent == 1.0f ? ratio : powf(ratio, exponent);
    }
    __syncthreads();
    if (warp == 0) store_scales_warp(f, s2);
}

template <int D> __global__ void __launch_bounds__(SEAL_THREADS, 2) seal_kernel(SealArgs a) {
    const KvView &kv = a.kv;
    const int d = D ? D : kv.d, h = blockIdx.y, thread = threadIdx.x;
    const bool key = blockIdx.z % 2 == 0;
    if (kv_is_scalar(key ? kv.k_format : kv.v_format)) return;
    const SlotRows rows = a.slots[blockIdx.z / 2];
    const int slot = a.b.slot[rows.row], p0 = a.b.pos[rows.row];
    const int layer = a.layer == ALL_IN_TURN ? kv.layer_in_turn(p0, (int)blockIdx.x) : a.layer;
    if (a.layer == ALL_IN_TURN && (p0 % KV_BLOCK >= SEAL_STEPS || layer >= kv.L)) return;    // the first: most steps seal nothing
    const int i = kv.sealed_end(p0 - 1, layer) + (a.layer == ALL_IN_TURN ? 0 : blockIdx.x);
    if (i >= kv.sealed_end(a.last_pos[rows.row], layer)) return;
    uint8_t *block = key ? kv.k_block(layer, slot, h, i) : kv.v_block(layer, slot, h, i);
    const f16 *ring = key ? kv.k_exact : kv.v_exact, *fresh = key ? a.k16 : a.v16;
    __shared__ const f16 *row[KV_BLOCK];    // from the ring or from this step
    if (thread < KV_BLOCK) {
        const int pos = i * KV_BLOCK + thread;
        row[thread] = pos < p0 ? ring + kv.exact_at(layer, slot, h, pos) : fresh + ((int64_t)(rows.row + pos - p0) * kv.Hkv + h) * d;
    }
    __syncthreads();
    const int chunks = d / 8;    // of 8 channels, 16 bytes, in a row
    if ((key ? kv.k_format : kv.v_format) == KvFormat::f16) {
        for (int n = thread; n < KV_BLOCK * chunks; n += SEAL_THREADS) ((uint4 *)block)[n] = *(const uint4 *)(row[n / chunks] + n % chunks * 8);
        return;
    }

    const NsnFields f = (key ? a.k : a.v).fields(block);
    const int bytes = (int)(key ? kv.k_block_bytes : kv.v_block_bytes);    // a multiple of 16
    extern __shared__ __align__(16) float x[];    // (KV_BLOCK, d)
    for (int n = 16 * thread; n < bytes; n += 16 * SEAL_THREADS) *(uint4 *)(block + n) = make_uint4(0, 0, 0, 0);
    bool finite = true;
    for (int n = thread; n < KV_BLOCK * chunks; n += SEAL_THREADS) {
        alignas(16) f16 raw[8];
        *(uint4 *)raw = *(const uint4 *)(row[n / chunks] + n % chunks * 8);
        float y[8];
        for (int c = 0; c < 8; c++) y[c] = to_f32(raw[c]), finite = finite && isfinite(y[c]);
        for (int c = 0; c < 8; c += 4) *(float4 *)(x + n * 8 + c) = make_float4(y[c], y[c + 1], y[c + 2], y[c + 3]);
    }
    if (!__syncthreads_and(finite)) {
        if (thread == 0) f.s1->min = to_f16(NAN);
        return;
    }
    __shared__ SealWork work;
    __shared__ alignas(16) uint8_t tables[sizeof(SearchTables<8>)];
    if (f.channels == 8) seal<D, 8>(f, x, *(SearchTables<8> *)tables, work, a, key, i * KV_BLOCK);
    else if (f.channels == 4) seal<D, 4>(f, x, *(SearchTables<4> *)tables, work, a, key, i * KV_BLOCK);
    else seal<D, 2>(f, x, *(SearchTables<2> *)tables, work, a, key, i * KV_BLOCK);
}

// One thread block for each of so many blocks or layers, kv head, slot, and K or V.
static void seal_grid(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n) {
    const SealArgs a = {kv, k16, v16, step.on_device, step.on_slots, step.on_last_pos,
                        sealed_format(kv.k_format, kv.d), sealed_format(kv.v_format, kv.d), layer};
    const auto kernel = kv.d == 128 ? seal_kernel<128> : kv.d == 64 ? seal_kernel<64> : seal_kernel<0>;
    const int bytes = KV_BLOCK * kv.d * (int)sizeof(float);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<dim3(n, kv.Hkv, 2 * (int)step.slots.size()), SEAL_THREADS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
void seal_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n) {
    seal_scalar_blocks(kv, layer, k16, v16, step, n);
    if (!kv_is_scalar(kv.k_format) || !kv_is_scalar(kv.v_format)) seal_grid(kv, layer, k16, v16, step, n);
}
void seal_in_turn(const KvView &kv, const Step &step) { seal_grid(kv, ALL_IN_TURN, nullptr, nullptr, step, ceil_div(kv.L, SEAL_STEPS)); }
}    // namespace cuda
#endif
