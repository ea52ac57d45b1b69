/* kv_seal - blocks of 64 rows into the cache's format on the GPU: the contract is kv_write.cu's, the method nsn_seal.h's.

   Work      One thread block for each block, kv head, and K or V.  Rows go to shared memory as f32; a warp owns a token at a time, a
             thread a channel for the means.  In the search a thread owns SEARCH groups of channels at once: a codeword, read by
             all lanes together, serves them all from registers.
   Agrees    with the reference up to ties: sums of squares are added in another order (in f64, so f32 results differ in the last bit
             at most now and then), and multiply-adds may round once instead of twice.
   Cost      64 d 256 multiply-adds a block for the search, 2 M at d = 128, and three instructions more for each of the 64 d / C x 256
             comparisons.  A step of one row seals at most one block per head, every 64 tokens.
   Tested by tests/test_cuda.cpp                                                                                     */
#ifdef __CUDACC__
#include <algorithm>
#include "cuda.cuh"
namespace cuda {

constexpr int SEAL_WARPS = 8, SEAL_THREADS = 32 * SEAL_WARPS;
static_assert(SEAL_THREADS >= MAX_HEAD_DIM && SEAL_THREADS == 256, "a thread a channel, a thread a codeword");

SealedFormat sealed_format(KvFormat format, int d) {
    alignas(16) static uint8_t origin[KV_BLOCK * MAX_HEAD_DIM * 2 + 4096];    // never read: addresses only
    SealedFormat f = {};
    with_format(format, d, [&](auto type) {
        using Format = decltype(type);
        if constexpr (Format::has_code && Format::has_plain) {    // NSN
            static_assert(sizeof(typename Format::Block) <= sizeof origin, "room for the largest block");
            f = {nsn_fields(type, *(typename Format::Block *)origin), origin, Format::delta};
        }
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
    return (float)sqrt(warp_sum(sum)) / sqrtf((float)d);
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

// The nearest of 256 codewords to each of n groups of C channels, the lowest index among equals; code, sign (n).
// x (n, C), book (256, C), half_norm (256) and s2 (n / groups) in shared memory; rows with s2 = 0 have no codes.
constexpr int SEARCH = 4;
template <int C>
__device__ inline void search(uint8_t *code, uint8_t *sign, const float *x, const float *book, const float *half_norm, const float *s2, int n, int groups) {
    for (int v0 = threadIdx.x; v0 < n; v0 += SEARCH * SEAL_THREADS) {
        float y[SEARCH][C], best[SEARCH];
        int at[SEARCH];
#pragma unroll
        for (int i = 0; i < SEARCH; i++) {
            const int v = min(v0 + i * SEAL_THREADS, n - 1);
#pragma unroll
            for (int c = 0; c < C; c++) y[i][c] = sign ? fabsf(x[v * C + c]) : x[v * C + c];
            best[i] = INFINITY, at[i] = 0;
        }
#pragma unroll 4
        for (int k = 0; k < 256; k++) {
            alignas(16) float w[C];
            if (C == 2) *(float2 *)w = *(const float2 *)(book + k * C);
            else
                for (int c = 0; c < C; c += 4) *(float4 *)(w + c) = *(const float4 *)(book + k * C + c);
#pragma unroll
            for (int i = 0; i < SEARCH; i++) {
                float score = half_norm[k];
#pragma unroll
                for (int c = 0; c < C; c++) score = fmaf(-y[i][c], w[c], score);
                if (score < best[i]) best[i] = score, at[i] = k;
            }
        }
#pragma unroll
        for (int i = 0; i < SEARCH; i++) {
            const int v = v0 + i * SEAL_THREADS;
            if (v >= n || s2[v / groups] == 0) continue;
            code[v] = (uint8_t)at[i];
            if (!sign) continue;
            unsigned bits = 0;
            for (int c = 0; c < C; c++) bits |= (unsigned)(x[v * C + c] < 0) << c;
            sign[v] = (uint8_t)bits;
        }
    }
}
// (<x,x> / <x,q>)^a of token t, x (d) in shared memory, q its codewords; 0 where the codewords point away.  By one warp.
__device__ inline float scale_correction_warp(const NsnFields &f, int t, const float *x, const float *book, bool ablated, float exponent) {
    const int shift = __ffs(f.channels) - 1;
    double xx = 0, xq = 0;
    for (int c = threadIdx.x % 32; c < f.d; c += 32) {
        const float y = f.sign ? fabsf(x[c]) : x[c], w = book[(f.code[t * (f.d >> shift) + (c >> shift)] << shift) + (c & (f.channels - 1))];
        xx += (double)y * y, xq += (double)y * w;
    }
    xx = warp_sum(xx), xq = warp_sum(xq);
    if (!(xq > 0)) return 0.0f;
    return ablated ? 1.0f : (float)(exponent == 1.0f ? xx / xq : pow(xx / xq, (double)exponent));
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

__global__ void __launch_bounds__(SEAL_THREADS) seal_kernel(SealArgs a) {
    const KvView &kv = a.kv;
    const int d = kv.d, h = blockIdx.y, thread = threadIdx.x, warp = thread / 32;
    const bool key = blockIdx.z % 2 == 0;
    const SlotRows rows = a.slots[blockIdx.z / 2];
    const int slot = a.b.slot[rows.row], p0 = a.b.pos[rows.row], begin = kv.coded_end(p0 - 1), end = kv.coded_end(a.last_pos[rows.row]);
    const int i = begin + blockIdx.x;
    if (i >= end) return;
    uint8_t *block = key ? kv.k_block(a.layer, slot, h, i) : kv.v_block(a.layer, slot, h, i);
    const f16 *ring = (key ? kv.k_exact : kv.v_exact) + kv.exact_at(a.layer, slot, h, i), *fresh = key ? a.k16 : a.v16;
    auto row = [&](int t) {    // from the ring or from this step
        const int pos = i * KV_BLOCK + t;
        return pos < p0 ? ring + (int64_t)t * d : fresh + ((int64_t)(rows.row + pos - p0) * kv.Hkv + h) * d;
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
    extern __shared__ float shared[];
    float *x = shared, *book = x + KV_BLOCK * d;    // (KV_BLOCK, d), (256, channels)
    __shared__ float half_norm[256], s1[KV_BLOCK], s2[KV_BLOCK], mean[MAX_HEAD_DIM];
    for (int64_t n = thread; n < bytes; n += SEAL_THREADS) block[n] = 0;
    bool finite = true;
    for (int n = thread; n < KV_BLOCK * chunks; n += SEAL_THREADS) {
        alignas(16) f16 raw[8];
        *(uint4 *)raw = *(const uint4 *)(row(n / chunks) + n % chunks * 8);
        for (int c = 0; c < 8; c++) {
            x[n * 8 + c] = to_f32(raw[c]);
            finite = finite && isfinite(x[n * 8 + c]);
        }
    }
    half_norm[thread] = 0;
    for (int c = 0; c < f.channels; c++) {
        const float w = (index[thread * f.channels + c] + 0.5f) * delta;
        book[thread * f.channels + c] = w;
        half_norm[thread] += 0.5f * w * w;
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
        s1[thread] = s > 0 ? 1.0f / s : 0.0f;
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

    for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) {
        // 3 to 5
        float *xt = x + t * d;
        for (int c = thread % 32; c < d; c += 32) xt[c] -= mean[c];
        __syncwarp();
        const float s = norm_warp(xt, d);
        if (thread % 32 == 0) s2[t] = s;
        if (!(s > 0)) continue;
        for (int c = thread % 32; c < d; c += 32) xt[c] /= s;
        if (key && pre_rope) turn_warp(xt, kv.rope, i * KV_BLOCK + t, d);
        if (!(kv.ablate & NO_HADAMARD)) hadamard_warp(xt, d);
        __syncwarp();
    }
    __syncthreads();
    // 6
    const int groups = d / f.channels;
    if (f.channels == 8) search<8>(f.code, f.sign, x, book, half_norm, s2, KV_BLOCK * groups, groups);
    else if (f.channels == 4) search<4>(f.code, f.sign, x, book, half_norm, s2, KV_BLOCK * groups, groups);
    else search<2>(f.code, f.sign, x, book, half_norm, s2, KV_BLOCK * groups, groups);
    __syncthreads();
    // 7
    for (int t = warp; t < KV_BLOCK; t += SEAL_WARPS) {
        const float scale = scale_correction_warp(f, t, x + t * d, book, kv.ablate & NO_SCALE, key ? kv.k_exponent : kv.v_exponent);
        if (thread % 32 == 0 && s2[t] > 0) s2[t] *= scale;
    }
    __syncthreads();
    if (warp == 0) store_scales_warp(f, s2);
}

void seal_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n) {
    const int bytes = (KV_BLOCK * kv.d + 256 * 8) * (int)sizeof(float);
    static const cudaError_t allowed = cudaFuncSetAttribute(seal_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                            (KV_BLOCK * MAX_HEAD_DIM + 256 * 8) * (int)sizeof(float));
    CUDA_CHECK(allowed);
    const SealArgs a = {kv, k16, v16, step.on_device, step.on_slots, step.on_last_pos, sealed_format(kv.k_format, kv.d), sealed_format(kv.v_format, kv.d), layer};
    seal_kernel<<<dim3(n, kv.Hkv, 2 * (int)step.slots.size()), SEAL_THREADS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
}    // namespace cuda
#endif
