/* kv_seal - blocks of 64 rows into the cache's format on the GPU: the contract is kv_write.cu's, the method nsn_seal.h's.

   Work      One thread block for each block, kv head, and K or V.  Rows go to shared memory as f32; eight threads
             add up what a token needs, a warp turns and rotates it.
   Search    nsn_search.cuh
   Agrees    with the reference up to ties: sums are added in another order, mostly in f32, so results differ in the last bit now
             and then, and the search takes either of two codewords that are nearly as near.
   Cost      On an H100, seal_blocks in a loop between two events: 64 us for 512 blocks of nsn2b, d = 128 (8 heads, K and V, 32 rows),
             nsn2 and nsn1 61, nsn4b 94; 22 us for 16 blocks.  In a step: the seal column of --bench.
             Before, with every score compared and a warp for every sum: 142,000 warp instructions a block, 115, 80 and 178 us, 39.
             Tried: four tiles of groups at a time, which leave no registers for the next products, so that each waits for the sum
             before it; with that, and tables made in more passes, 68 us and 71,500 instructions (ncu), 63% of them in the search.
   Tested by tests/test_cuda.cpp                                                                                     */
#ifdef __CUDACC__
#include <algorithm>
#include "nsn_search.cuh"
namespace cuda {

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
    if (f.sign)    // a byte a code so far
        for (int n = thread; n < KV_BLOCK * (d / 32); n += SEAL_THREADS) {
            uint8_t *const at = f.sign + n / (d / 32) * (d / 8) + n % (d / 32) * 4;
            uint32_t x;
            memcpy(&x, at, 4);
            x = signs_by_word(x);
            memcpy(at, &x, 4);
        }
}

template <int D> __global__ void __launch_bounds__(SEAL_THREADS, 2) seal_kernel(SealArgs a) {
    const KvView &kv = a.kv;
    const int d = D ? D : kv.d, h = blockIdx.y, thread = threadIdx.x;
    const bool key = blockIdx.z % 2 == 0;
    if (kv_is_scalar(key ? kv.k_format : kv.v_format)) return;
    const SlotRows rows = a.slots[blockIdx.z / 2];
    const int slot = a.b.slot[rows.row], p0 = a.b.pos[rows.row];
    const int layer = a.layer == ALL_IN_TURN ? kv.layer_in_turn(p0, (int)blockIdx.x) : a.layer;
    if (layer == kv.L) return;
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
