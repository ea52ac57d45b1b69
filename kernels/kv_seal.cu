/* kv_seal - blocks of 64 rows into the cache's format on the GPU: the contract is kv_write.cu's, the method nsn_seal.h's.

   Work      One thread block for each block, kv head, and K or V.  Rows go to shared memory as f32; a warp owns a token at a time, a
             thread a channel for the means.
   Search    On tensor cores.  A codeword is w = delta / 2 m with odd integers m below 256, which f16 holds exactly; x is two
             f16 numbers, hi + lo, together within 2^-22 of it.  The nearest w has the smallest
                 2 / delta (|w|^2 / 2 - x . w)  =  delta / 4 |m|^2 - hi . m - lo . m
             The rows of A are -hi and -lo of 16 groups of C <= 8 channels, the columns of B are m of 8 codewords, twice, and the
             sums begin with the norms.
   Agrees    with the reference up to ties: sums of squares are added in another order, in f64, and their roots and quotients are f32,
             so results differ in the last bit now and then; the search chooses between codewords whose scores are closer than
             2^-22 |x||w| as it likes.
   Cost      64 d / C x 256 comparisons a block, which take longer than the multiply-adds: 114 us for 512 blocks of nsn2b, d = 128 (8 heads,
             K and V, 32 rows) on an H100, 2.9 instructions a clock of 142,000 a block, 37% of them in the loop over codewords.  A step
             of one row seals at most one block per head of every eighth layer, in 8 of 64 steps (SEAL_STEPS).
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
    int layer;
};

// RTN4 of n <= 64 values in shared memory, by one warp: nsn_seal.h's round_4bit.
__device__ inline void round_4bit_warp(uint8_t *code, f16 *step, f16 *min, const float *v, int n) {
    const int lane = threadIdx.x % 32;
    float lo = INFINITY, hi = -INFINITY;
    for (int i = lane; i < n; i += 32) lo = fminf(lo, v[i]), hi = fmaxf(hi, v[i]);
    lo = -warp_max(-lo), hi = warp_max(hi);
    const f16 s = to_f16(fmaxf((hi - lo) / 15.0f, 1e-5f)), m = to_f16(lo);
    for (int i = lane; i < n / 2; i += 32) {
        int q[2];
        for (int j = 0; j < 2; j++) q[j] = (int)rintf(fminf(fmaxf((v[2 * i + j] - to_f32(m)) / to_f32(s), 0.0f), 15.0f));
        code[i] = (uint8_t)(q[0] | q[1] << 4);
    }
    if (lane == 0) *step = s, *min = m;
}

__device__ inline float norm_warp(const float *x, int d) {
    double sum = 0;
    for (int c = threadIdx.x % 32; c < d; c += 32) sum += (double)x[c] * x[c];
    return sqrtf((float)warp_sum(sum)) / sqrtf((float)d);
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

// Steps 3 to 5 of a token x (d), by one warp; K lanes-full of channels, lane L holds L + 32 k.  Returns the norm; 0: x stays.
template <int K> __device__ inline float normalise_warp(float *x, const float *mean, int d, bool turn, bool rotate, RopeTable rope, int pos) {
    const int lane = threadIdx.x % 32, p = d & -d;
    float y[K];
    double sum = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int c = lane + 32 * k;
        y[k] = c < d ? x[c] - mean[c] : 0.0f;
        sum += (double)y[k] * y[k];
    }
    const float norm = sqrtf((float)warp_sum(sum)) / sqrtf((float)d);
    if (!(norm > 0)) return norm;
#pragma unroll
    for (int k = 0; k < K; k++) y[k] /= norm;
    auto store = [&] {
#pragma unroll
        for (int k = 0; k < K; k++)
            if (lane + 32 * k < d) x[lane + 32 * k] = y[k];
    };
    if (turn) {
        store();
        turn_warp(x, rope, pos, d);
#pragma unroll
        for (int k = 0; k < K; k++) y[k] = lane + 32 * k < d ? x[lane + 32 * k] : 0.0f;
    }
    if (rotate) {    // hadamard.h: additions between lanes, then within them
        for (int h = 1; h < 32 && h < p; h *= 2)
#pragma unroll
            for (int k = 0; k < K; k++) {
                const float other = __shfl_xor_sync(~0u, y[k], h);
                y[k] = lane & h ? other - y[k] : y[k] + other;
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
        const float scale = 1.0f / sqrtf((float)p);
#pragma unroll
        for (int k = 0; k < K; k++) y[k] *= scale;
    }
    store();
    return norm;
}

// The nearest of 256 codewords to each of n groups of C channels, the lowest index among equals; code, sign (n), n a multiple of 64.
// In shared memory: x (n, C), m (256, C), half_norm (256) delta / 4 |m|^2, s2 (n / groups); rows with s2 = 0 have no codes.
template <int C>
__device__ inline void search(uint8_t *code, uint8_t *sign, const float *x, const f16 *m, const float *half_norm, const float *s2, int n, int groups) {
    constexpr int TILES = 4;    // of 16 groups: a warp's share of the work that a codeword read is good for
    const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const bool holds = 2 * j < C;    // this lane's fragments hold channels 2j, 2j+1; zeros where there are none
    for (int v0 = threadIdx.x / 32 * 16 * TILES; v0 < n; v0 += SEAL_WARPS * 16 * TILES) {
        unsigned a[TILES][4];
        float best[TILES][2];    // of rows g, g + 8
        int at[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float2 y = holds ? *(const float2 *)(x + (v0 + 16 * i + 8 * r + g) * C + 2 * j) : make_float2(0, 0);
                if (sign) y = make_float2(fabsf(y.x), fabsf(y.y));
                const float hi_x = to_f32(to_f16(y.x)), hi_y = to_f32(to_f16(y.y));
                a[i][r] = pack(-hi_x, -hi_y), a[i][r + 2] = pack(hi_x - y.x, hi_y - y.y);
                best[i][r] = INFINITY, at[i][r] = 0;
            }
        // Which 16 codewords hold the nearest of those this lane sees: k + 2j + {0, 1, 8, 9}?
        for (int k = 0; k < 256; k += 16) {
            unsigned b[2];
            float start[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                b[half] = holds ? *(const unsigned *)(m + (k + 8 * half + g) * C + 2 * j) : 0;
                const float2 norm = *(const float2 *)(half_norm + k + 8 * half + 2 * j);
                start[half][0] = start[half][2] = norm.x, start[half][1] = start[half][3] = norm.y;
            }
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                float low[4], high[4];
                mma(low, a[i], b[0], b[0], start[0]);
                mma(high, a[i], b[1], b[1], start[1]);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float score = fminf(fminf(low[2 * r], low[2 * r + 1]), fminf(high[2 * r], high[2 * r + 1]));
                    at[i][r] = score < best[i][r] ? k : at[i][r];
                    best[i][r] = fminf(best[i][r], score);
                }
            }
        }
        // A row's four lanes agree on the best four codewords; each looks at one of them once more, in f32.
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int v = v0 + 16 * i + 8 * r + g;
                auto take_nearest = [](float &score, int &at) {
                    for (int o = 1; o < 4; o *= 2) {
                        const float other = __shfl_xor_sync(~0u, score, o);
                        const int other_at = __shfl_xor_sync(~0u, at, o);
                        if (other < score || (other == score && other_at < at)) score = other, at = other_at;
                    }
                };
                int k = at[i][r] + 2 * j;
                take_nearest(best[i][r], k);
                k += j % 2 + j / 2 * 8;
                float score = half_norm[k];
                unsigned bits = 0;
#pragma unroll
                for (int c = 0; c < C; c += 2) {
                    const float2 y = *(const float2 *)(x + v * C + c), w = __half22float2(*(const __half2 *)(m + k * C + c));
                    bits |= (unsigned)(y.x < 0) << c | (unsigned)(y.y < 0) << (c + 1);
                    score = fmaf(sign ? -fabsf(y.x) : -y.x, w.x, score);
                    score = fmaf(sign ? -fabsf(y.y) : -y.y, w.y, score);
                }
                take_nearest(score, k);
                if (j > 0 || s2[v / groups] == 0) continue;
                code[v] = (uint8_t)k;
                if (sign) sign[v] = (uint8_t)bits;
            }
    }
}
// (<x,x> / <x,q>)^a of token t, x (d) in shared memory, q its codewords delta / 2 m; 0 where they point away.  By one warp.
__device__ inline float scale_correction_warp(const NsnFields &f, int t, const float *x, const f16 *m, float delta, bool ablated, float exponent) {
    const int shift = __ffs(f.channels) - 1;
    double xx = 0, xq = 0;
    for (int c = threadIdx.x % 32; c < f.d; c += 32) {
        const int code = f.code[t * (f.d >> shift) + (c >> shift)];
        const float y = f.sign ? fabsf(x[c]) : x[c], w = 0.5f * delta * to_f32(m[(code << shift) + (c & (f.channels - 1))]);
        xx += (double)y * y, xq += (double)y * w;
    }
    xx = warp_sum(xx), xq = warp_sum(xq);
    if (!(xq > 0)) return 0.0f;
    const float ratio = (float)xx / (float)xq;
    return ablated ? 1.0f : exponent == 1.0f ? ratio : powf(ratio, exponent);
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

__global__ void __launch_bounds__(SEAL_THREADS, 2) seal_kernel(SealArgs a) {
    const KvView &kv = a.kv;
    const int d = kv.d, h = blockIdx.y, thread = threadIdx.x, warp = thread / 32;
    const bool key = blockIdx.z % 2 == 0;
    if (kv_is_scalar(key ? kv.k_format : kv.v_format)) return;
    const SlotRows rows = a.slots[blockIdx.z / 2];
    const int slot = a.b.slot[rows.row], p0 = a.b.pos[rows.row], begin = kv.sealed_end(p0 - 1, a.layer), end = kv.sealed_end(a.last_pos[rows.row], a.layer);
    const int i = begin + blockIdx.x;
    if (i >= end) return;
    uint8_t *block = key ? kv.k_block(a.layer, slot, h, i) : kv.v_block(a.layer, slot, h, i);
    const f16 *ring = key ? kv.k_exact : kv.v_exact, *fresh = key ? a.k16 : a.v16;
    auto row = [&](int t) {    // from the ring or from this step
        const int pos = i * KV_BLOCK + t;
        return pos < p0 ? ring + kv.exact_at(a.layer, slot, h, pos) : fresh + ((int64_t)(rows.row + pos - p0) * kv.Hkv + h) * d;
    };
    const int chunks = d / 8;    // of 8 channels, 16 bytes, in a row
    if ((key ? kv.k_format : kv.v_format) == KvFormat::f16) {
        for (int n = thread; n < KV_BLOCK * chunks; n += SEAL_THREADS) ((uint4 *)block)[n] = *(const uint4 *)(row(n / chunks) + n % chunks * 8);
        return;
    }

    const NsnFields f = (key ? a.k : a.v).fields(block);
    const int64_t bytes = key ? kv.k_block_bytes : kv.v_block_bytes;
    const int8_t *index = key ? kv.k_codebook : kv.v_codebook;
    const float delta = (key ? a.k : a.v).delta;
    extern __shared__ __align__(16) float shared[];
    float *x = shared;    // (KV_BLOCK, d)
    __shared__ alignas(4) f16 m[KV_CODEBOOK_BYTES];    // (256, channels)
    __shared__ alignas(8) float half_norm[256];
    __shared__ float s1[KV_BLOCK], s2[KV_BLOCK], mean[MAX_HEAD_DIM];
    for (int64_t n = thread; n < bytes; n += SEAL_THREADS) block[n] = 0;
    bool finite = true;
    for (int n = thread; n < KV_BLOCK * chunks; n += SEAL_THREADS) {
        alignas(16) f16 raw[8];
        *(uint4 *)raw = *(const uint4 *)(row(n / chunks) + n % chunks * 8);
        float y[8];
        for (int c = 0; c < 8; c++) y[c] = to_f32(raw[c]), finite = finite && isfinite(y[c]);
        for (int c = 0; c < 8; c += 4) *(float4 *)(x + n * 8 + c) = make_float4(y[c], y[c + 1], y[c + 2], y[c + 3]);
    }
    if (thread < 256) {    // a thread a codeword
        float square = 0;
        for (int c = 0; c < f.channels; c++) {
            const float odd = 2 * index[thread * f.channels + c] + 1;
            m[thread * f.channels + c] = to_f16(odd);
            square += odd * odd;
        }
        half_norm[thread] = 0.25f * delta * square;
    }
    if (!__syncthreads_and(finite)) {
        if (thread == 0) f.s1->min = to_f16(NAN);
        return;
    }
    const bool pre_rope = !(kv.ablate & NO_PRE_ROPE);

    // 1 and 2
    for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) {
        if (key && !pre_rope) turn_warp(x + t * d, kv.rope, i * KV_BLOCK + t, d);
        const float s = norm_warp(x + t * d, d);
        if (thread % 32 == 0) s1[t] = kv.ablate & NO_FIRST_NORM ? 1.0f : s;
    }
    __syncthreads();
    if (warp == 0) round_4bit_warp(f.s1->code, &f.s1->step, &f.s1->min, s1, KV_BLOCK);
    __syncthreads();
    if (thread < KV_BLOCK) {
        const float s = f.s1->at(thread);
        s1[thread] = s > 0 ? 1.0f / s : 0.0f;    // inverses from here on
    }
    __syncthreads();
    if (thread < d) {
        double sum = 0;
#pragma unroll 8
        for (int t = 0; t < KV_BLOCK; t++) {
            x[t * d + thread] *= s1[t];
            sum += x[t * d + thread];
        }
        mean[thread] = kv.ablate & NO_SHIFT ? 0.0f : (float)(sum / KV_BLOCK);
    }
    __syncthreads();
    for (int g = warp; g < (d + 31) / 32; g += SEAL_WARPS)
        round_4bit_warp(f.mean + g * 16, f.mean_step + g, f.mean_min + g, mean + g * 32, min(32, d - g * 32));
    __syncthreads();
    if (thread < d) mean[thread] = f.mean_at(thread);
    __syncthreads();

    // 3 to 5
    for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) {
        const bool turn = key && pre_rope, rotate = !(kv.ablate & NO_HADAMARD);
        const int pos = i * KV_BLOCK + t;
        const float norm = d <= 64    ? normalise_warp<2>(x + t * d, mean, d, turn, rotate, kv.rope, pos)
                           : d <= 128 ? normalise_warp<4>(x + t * d, mean, d, turn, rotate, kv.rope, pos)
                                      : normalise_warp<8>(x + t * d, mean, d, turn, rotate, kv.rope, pos);
        if (thread % 32 == 0) s2[t] = norm;
    }
    __syncthreads();
    // 6
    const int groups = d / f.channels, n = KV_BLOCK * groups;
    if (f.channels == 8) search<8>(f.code, f.sign, x, m, half_norm, s2, n, groups);
    else if (f.channels == 4) search<4>(f.code, f.sign, x, m, half_norm, s2, n, groups);
    else search<2>(f.code, f.sign, x, m, half_norm, s2, n, groups);
    __syncthreads();
    // 7
    for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) {
        const float scale = scale_correction_warp(f, t, x + t * d, m, delta, kv.ablate & NO_SCALE, key ? kv.k_exponent : kv.v_exponent);
        if (thread % 32 == 0 && s2[t] > 0) s2[t] *= scale;
    }
    __syncthreads();
    if (warp == 0) store_scales_warp(f, s2);
}

void seal_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n) {
    seal_scalar_blocks(kv, layer, k16, v16, step, n);
    if (kv_is_scalar(kv.k_format) && kv_is_scalar(kv.v_format)) return;
    const int bytes = KV_BLOCK * kv.d * (int)sizeof(float);
    static const cudaError_t allowed =
        cudaFuncSetAttribute(seal_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, KV_BLOCK * MAX_HEAD_DIM * (int)sizeof(float));
    CUDA_CHECK(allowed);
    const SealArgs a = {kv, k16, v16, step.on_device, step.on_slots, step.on_last_pos, sealed_format(kv.k_format, kv.d), sealed_format(kv.v_format, kv.d), layer};
    seal_kernel<<<dim3(n, kv.Hkv, 2 * (int)step.slots.size()), SEAL_THREADS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
}    // namespace cuda
#endif
