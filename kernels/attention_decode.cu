/* attention_decode - attention of steps with one row a slot, over codes on tensor cores; the contract is attention.cu's.

   Math      q . k_t = (R q) . code_t + q . RoPE_t(plain_t), all of a block of 64 tokens at a time:
               code    codewords are 8-bit x + 1/2, R q is a 16-bit integer in two bytes (hi, lo), so mma.sync s8 is exact:
                       sum q (x + 1/2) = 256 sum hi x + sum lo x + (sum q) / 2
               plain   s1[t] mean, turned to the block's start once: z_j = (q_lo m_lo + q_hi m_hi, q_hi m_lo - q_lo m_hi), times
                       the 64 x d matrix E of the cosines and sines of tokens 0..63, in f16 (z as a sum of two)
               values  weights p[t] s1[t] s2[t] are 16-bit integers with a power of two of the block as unit, in two bytes
   Work      A warp takes a segment: neighbouring sealed blocks of one row and kv head, for up to QUERIES query heads.  Exact
             blocks (sinks, recents, open, format f16) are segments of their own kernel.  Every segment leaves a triple
             (m, l, o), the last kernel merges them in segment order.
   Order     The blocks of a segment are a function of the row's length and the cache's shape; for more than 8 rows also of
             the number of rows, because so many rows fill the GPU with longer segments.
   Fragments Lane (g, t) = (lane / 4, lane % 4).  A row of an A operand is a token for keys (row g + 8 h of tile i is token
             16 i + 8 h + g), a channel for values; column 2 t, 2 t + 1 of a B operand is query t's hi and lo part.
   Codebook  256 rows of 256 bytes in shared memory, 128 for keys and 128 for values, one copy a lane (pair): no bank conflicts.
   Limits    d 64 or 128; K and V both f16 or both NSN; no --ablate.  Everything else is attention_any.cu's.
   Tested by tests/test_cuda_decode.cpp                                                                              */
#ifdef __CUDACC__
#include <algorithm>
#include "cuda.cuh"
namespace cuda {

constexpr int QUERIES = 4;                        // query heads that share a pass over the codes: 8 columns of mma.sync
constexpr int CODE_WARPS = 12, CODE_THREADS = 32 * CODE_WARPS;
constexpr int EXACT_WARPS = 4;
constexpr int MAX_PARTS = 128;                    // segments of a row, coded and exact each
constexpr int MOST_ROWS = 256;                    // of a step; more would need more scratch
constexpr int FEW = 8;                            // up to so many rows, a row's segments do not depend on the step
constexpr int GPU_WARPS = 132 * CODE_WARPS;       // of an H100; a constant, so that every GPU adds in the same order
constexpr uint32_t TABLE = 65536;                 // shared address of the codebook: its low 16 bits are free for a code and a lane

// Blocks of a segment when there are n, in a step of `rows` rows of Hkv heads and `chunks` groups of queries.
HD int decode_parts(int rows, int heads) { return rows <= FEW ? GPU_WARPS / heads : 4 * GPU_WARPS / (rows * heads); }
HD int decode_segment(int n, int rows, int heads) {
    const int want = decode_parts(rows, heads), parts = want < 1 ? 1 : want > MAX_PARTS ? MAX_PARTS : want;
    return (n + parts - 1) / parts > 0 ? (n + parts - 1) / parts : 1;
}

struct DecodeArgs {
    float *y;                  // (N, Hq, d)
    const float *q;            // (N, Hq, d)
    KvView kv;
    const f16 *k16, *v16;      // (N, Hkv, d)
    Batch b;
    float *q_scaled;           // (N, Hq, d)          q log2(e) / sqrt(d)
    int8_t *q_code;            // (N, Hq, 2, d)       hi, lo of R of it, in units of q_unit.x
    float2 *q_unit;            // (N, Hq)             unit, half the sum of the integers
    float *part_o;             // (N, Hq, 2 room, 2, d)   sums of codes, of plain rows; first the coded segments
    float2 *part_ml;           // (N, Hq, 2 room)
    int layer, Hq, G, chunks;
    int parts, room;           // segments of a row that a launch works on, that the scratch holds; coded and exact each
};

__device__ inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
__device__ inline uint32_t load_shared(uint32_t at) {
    uint32_t v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ inline uint2 load_shared2(uint32_t at) {
    uint2 v;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
__device__ inline void store_shared(uint32_t at, uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
// c (16, 8) += a (16, 32) b (32, 8)
__device__ inline void mma_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma_s8_u8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// c (16, 8) += a (16, 16) b (16, 8)
__device__ inline void mma_f16(float (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ inline uint32_t half2_bits(float x, float y) {
    const __half2 h = __floats2half2_rn(x, y);
    return *(const uint32_t *)&h;
}

// ---- queries ------------------------------------------------------------------------------------------------
// One warp a query.
__global__ void __launch_bounds__(32) decode_queries_kernel(DecodeArgs a) {
    const int d = a.kv.d, lane = threadIdx.x;
    const int64_t query = (int64_t)blockIdx.y * a.Hq + blockIdx.x;
    __shared__ float x[128];
    const float scale = 1.4426950408889634f / sqrtf((float)d);
    for (int c = lane; c < d; c += 32) a.q_scaled[query * d + c] = x[c] = a.q[query * d + c] * scale;
    hadamard_warp(x, d);
    float top = 1e-30f;
    for (int c = lane; c < d; c += 32) top = fmaxf(top, fabsf(x[c]));
    top = warp_max(top);
    const float unit = top / 32512.0f;    // 127 * 256: hi fits a byte
    int sum = 0;
    for (int c = lane; c < d; c += 32) {
        const int v = __float2int_rn(x[c] / unit), lo = (int8_t)(v & 255);
        sum += v;
        a.q_code[query * 2 * d + c] = (int8_t)((v - lo) >> 8);
        a.q_code[query * 2 * d + d + c] = (int8_t)lo;
    }
    sum = warp_sum(sum);
    if (lane == 0) a.q_unit[query] = make_float2(unit, 0.5f * sum);
}

// ---- sealed blocks ------------------------------------------------------------------------------------------
// BYTES neighbouring bytes as words.
template <int BYTES> __device__ inline void load_bytes(uint32_t (&w)[BYTES < 4 ? 1 : BYTES / 4], const uint8_t *p, bool aligned8) {
    if constexpr (BYTES == 1) w[0] = *p;
    else if constexpr (BYTES == 2) w[0] = *(const uint16_t *)p;
    else if constexpr (BYTES == 4) w[0] = *(const uint32_t *)p;
    else {
#pragma unroll
        for (int i = 0; i < BYTES / 8; i++) {
            if (aligned8) { const uint2 v = ((const uint2 *)p)[i]; w[2 * i] = v.x, w[2 * i + 1] = v.y; }
            else w[2 * i] = ((const uint32_t *)p)[2 * i], w[2 * i + 1] = ((const uint32_t *)p)[2 * i + 1];
        }
    }
}
// Words of 4 channels: the codewords that the bytes name, signs applied.  lane_table: TABLE, the side's half, the lane's copy.
template <int C, bool SIGN, int BYTES>
__device__ inline void look_up(uint32_t (&x)[BYTES * C / 4], const uint32_t *code, const uint32_t *sign, uint32_t lane_table) {
    auto at = [&](int i) { return prmt(lane_table, code[i / 4], 0x3200 | (4 + i % 4) << 4); };
    if constexpr (C == 8) {
#pragma unroll
        for (int i = 0; i < BYTES; i++) {
            const uint2 v = load_shared2(at(i));
            x[2 * i] = v.x, x[2 * i + 1] = v.y;
            if constexpr (SIGN) {    // bit to byte 0 or 255: -(x + 1/2) = ~x + 1/2
                const uint32_t s = sign[i / 4] >> i % 4 * 8;
                x[2 * i] ^= ((s & 15) * 0x00204081 & 0x01010101) * 255;
                x[2 * i + 1] ^= ((s >> 4 & 15) * 0x00204081 & 0x01010101) * 255;
            }
        }
    } else if constexpr (C == 4) {
#pragma unroll
        for (int i = 0; i < BYTES; i++) x[i] = load_shared(at(i));
    } else {
#pragma unroll
        for (int i = 0; i < BYTES; i += 2) x[i / 2] = prmt(load_shared(at(i)), load_shared(at(i + 1)), 0x7610);
    }
}
// One copy of codeword k for every lane that reads it alone.
template <int C> __device__ void fill_table(uint32_t table, const int8_t *codebook) {
#pragma unroll 8
    for (int i = threadIdx.x; i < 256 * 32; i += CODE_THREADS) {
        const int k = i / 32, word = i % 32;
        uint32_t v = 0;
        if (C == 2) { const uint32_t h = *(const uint16_t *)(codebook + 2 * k); v = h | h << 16; }
        else v = *(const uint32_t *)(codebook + k * C + (C == 8 ? word % 2 * 4 : 0));
        store_shared(table + k * 256 + word * 4, v);
    }
}

// What a warp keeps in shared memory.
template <int D> struct CodeScratch {
    uint32_t z[8][D / 2 + 16];             // column, pair: (cosine part, sine part) in f16; the pad keeps columns in different banks
    float4 scale[KV_BLOCK];                // of token t: k: s1 s2 delta, s1; v: s1 s2 delta, s1
    float q[QUERIES][D];
    uint4 weight[8][4];                    // column, t: 16 bytes
};
template <class Scale> __device__ inline float2 scales_of(const Scale &s, int t) { return make_float2(s.at(t), s.at(t + 1)); }

template <class K, class V> __global__ void __launch_bounds__(CODE_THREADS, 1) decode_codes_kernel(DecodeArgs a) {
    constexpr int D = K::d, PAIRS = D / 64;                        // PAIRS: RoPE pairs of a lane
    constexpr int K_BYTES = D / 4 / K::channels, V_BYTES = D / 8 / V::channels, KW = K_BYTES < 4 ? 1 : K_BYTES / 4, VW = V_BYTES < 4 ? 1 : V_BYTES / 4;
    constexpr int STEPS = D / 32, V_CHANNELS = D / 8;              // mma steps over channels; channels of a lane
    constexpr bool k8 = sizeof(typename K::Block) % 8 == 0, v8 = sizeof(typename V::Block) % 8 == 0;
    using Scratch = CodeScratch<D>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const KvView &kv = a.kv;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint4 *E = (uint4 *)shared;                                    // (4, D/16, 32) fragments
    const uint32_t origin = (uint32_t)__cvta_generic_to_shared(shared);
    Scratch &s = *((Scratch *)(shared + 2 * TABLE - origin) + warp);    // behind the codebook
    fill_table<K::channels>(TABLE, kv.k_codebook);
    fill_table<V::channels>(TABLE + 128, kv.v_codebook);
#pragma unroll 4
    for (int i = threadIdx.x; i < 4 * (D / 16) * 32; i += CODE_THREADS) {
        const int l = i % 32, step = i / 32 % (D / 16), tile = i / 32 / (D / 16), pair = step / 2 * 16 + l % 4 * 4 + step % 2 * 2;
        auto at = [&](int row, int j) { return half2_bits(kv.rope.step[(16 * tile + row) * D + j], kv.rope.step[(16 * tile + row) * D + D / 2 + j]); };
        E[i] = make_uint4(at(l / 4, pair), at(l / 4 + 8, pair), at(l / 4, pair + 1), at(l / 4 + 8, pair + 1));
    }
    __syncthreads();
    const uint32_t k_table = TABLE | (K::channels == 8 ? lane % 16 * 8 : lane * 4), v_table = TABLE | 128 | (V::channels == 8 ? lane % 16 * 8 : lane * 4);
    const int items = a.b.N * kv.Hkv * a.chunks * a.parts, heads = kv.Hkv * a.chunks;

    for (int item = blockIdx.x + gridDim.x * warp; item < items; item += gridDim.x * CODE_WARPS) {
        const int part = item % a.parts, head = item / a.parts % heads, n = item / a.parts / heads, h = head / a.chunks;
        const int coded_end = kv.coded_end(a.b.pos[n]), coded = coded_end - kv.sink;
        const int segment = decode_segment(coded, a.b.N, heads), begin = kv.sink + part * segment, end = min(begin + segment, coded_end), slot = a.b.slot[n];
        if (begin >= end) continue;
        const int q0 = head % a.chunks * QUERIES, n_queries = min(QUERIES, a.G - q0);
        const int64_t first = (int64_t)n * a.Hq + h * a.G + q0;    // of the queries
        __syncwarp();
        for (int i = lane; i < QUERIES * D; i += 32) s.q[i / D][i % D] = i / D < n_queries ? a.q_scaled[first * D + i] : 0.0f;
        uint32_t bq[2 * STEPS];                                    // column g: channels D/4 t + 4 i ..
        for (int i = 0; i < 2 * STEPS; i++) bq[i] = g / 2 < n_queries ? *(const uint32_t *)(a.q_code + ((first + g / 2) * 2 + g % 2) * D + D / 4 * t + 4 * i) : 0;
        const float2 unit = t < n_queries ? a.q_unit[first + t] : make_float2(0, 0);
        float m = -INFINITY, l = 0, w_sum = 0, out[V_CHANNELS] = {}, plain[QUERIES][2 * PAIRS] = {};
        __syncwarp();
        // A block's lines come to L2 while the one before it is worked on.
        auto prefetch = [&](int i) {
            const uint8_t *k = kv.k_block(a.layer, slot, h, i), *v = kv.v_block(a.layer, slot, h, i);
            for (int at = lane * 128; at < (int)sizeof(typename K::Block); at += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(k + at));
            for (int at = lane * 128; at < (int)sizeof(typename V::Block); at += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(v + at));
        };
        if (begin + 1 < end) prefetch(begin + 1);

        for (int i = begin; i < end; i++) {
            if (i + 2 < end) prefetch(i + 2);
            const typename K::Block &kb = *(const typename K::Block *)kv.k_block(a.layer, slot, h, i);
            const typename V::Block &vb = *(const typename V::Block *)kv.v_block(a.layer, slot, h, i);
            uint32_t kc[8][KW], ks[8][KW], vc[16][VW], vs[16][VW];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                load_bytes<K_BYTES>(kc[j], kb.code[8 * j + g] + K_BYTES * t, k8);
                if constexpr (K::has_sign) load_bytes<K_BYTES>(ks[j], kb.sign[8 * j + g] + K_BYTES * t, k8);
            }
#pragma unroll
            for (int j = 0; j < 16; j++) {
                load_bytes<V_BYTES>(vc[j], vb.code[8 * (j % 8) + j / 8 * 4 + t] + V_BYTES * g, v8);
                if constexpr (V::has_sign) load_bytes<V_BYTES>(vs[j], vb.sign[8 * (j % 8) + j / 8 * 4 + t] + V_BYTES * g, v8);
            }
            // factors of tokens 2 lane, 2 lane + 1
            {
                const float2 k2 = scales_of(kb.s2, 2 * lane), v2 = scales_of(vb.s2, 2 * lane);
                const float ka = kb.s1.at(2 * lane), kc1 = kb.s1.at(2 * lane + 1), va = vb.s1.at(2 * lane), vc1 = vb.s1.at(2 * lane + 1);
                s.scale[2 * lane] = make_float4(ka * k2.x * K::delta, ka, va * v2.x * V::delta, va);
                s.scale[2 * lane + 1] = make_float4(kc1 * k2.y * K::delta, kc1, vc1 * v2.y * V::delta, vc1);
            }
            // z of the mean, pairs PAIRS lane ..
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                const int j = PAIRS * lane + p;
                const float lo = kb.mean.at(j), hi = kb.mean.at(j + D / 2), c = kv.rope.base[(int64_t)i * D + j], sn = kv.rope.base[(int64_t)i * D + D / 2 + j];
                const float ml = lo * c - hi * sn, mh = lo * sn + hi * c;
#pragma unroll
                for (int q = 0; q < QUERIES; q++) {
                    const float ql = s.q[q][j], qh = s.q[q][j + D / 2], x = ql * ml + qh * mh, y = qh * ml - ql * mh;
                    const __half2 top = __floats2half2_rn(x, y);
                    const float2 kept = __half22float2(top);
                    s.z[2 * q][j] = *(const uint32_t *)&top;
                    s.z[2 * q + 1][j] = half2_bits(x - kept.x, y - kept.y);
                }
            }
            __syncwarp();
            // scores of query t, tokens 8 j + g
            float score[8];
            uint4 z[D / 32];
            for (int k = 0; k < D / 32; k++) z[k] = *(const uint4 *)&s.z[g][16 * k + 4 * t];
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                float c[4] = {};
#pragma unroll
                for (int k = 0; k < D / 32; k++) {
                    mma_f16(c, E[(tile * (D / 16) + 2 * k) * 32 + lane], z[k].x, z[k].y);
                    mma_f16(c, E[(tile * (D / 16) + 2 * k + 1) * 32 + lane], z[k].z, z[k].w);
                }
                int e[4] = {};
                uint32_t x0[2 * STEPS], x1[2 * STEPS];
                look_up<K::channels, K::has_sign, K_BYTES>(x0, kc[2 * tile], ks[2 * tile], k_table);
                look_up<K::channels, K::has_sign, K_BYTES>(x1, kc[2 * tile + 1], ks[2 * tile + 1], k_table);
#pragma unroll
                for (int k = 0; k < STEPS; k++) mma_s8(e, x0[2 * k], x1[2 * k], x0[2 * k + 1], x1[2 * k + 1], bq[2 * k], bq[2 * k + 1]);
                const float4 f0 = s.scale[16 * tile + g], f1 = s.scale[16 * tile + 8 + g];
                score[2 * tile] = fmaf(((float)(e[0] * 256 + e[1]) + unit.y) * unit.x, f0.x, (c[0] + c[1]) * f0.y);
                score[2 * tile + 1] = fmaf(((float)(e[2] * 256 + e[3]) + unit.y) * unit.x, f1.x, (c[2] + c[3]) * f1.y);
            }
            // softmax in base 2
            float top = score[0];
            for (int j = 1; j < 8; j++) top = fmaxf(top, score[j]);
            for (int o = 4; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
            if (__any_sync(~0u, top > m)) {
                const float up = fmaxf(m, top), old = exp2f(m - up);
                m = up, l *= old, w_sum *= old;
                for (int c = 0; c < V_CHANNELS; c++) out[c] *= old;
                for (int q = 0; q < QUERIES; q++) {
                    const float f = __shfl_sync(~0u, old, q);
                    for (int c = 0; c < 2 * PAIRS; c++) plain[q][c] *= f;
                }
            }
            float weight[8], largest = 0, s1_sum = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float4 f = s.scale[8 * j + g];
                const float p = exp2f(score[j] - m);
                l += p, s1_sum = fmaf(p, f.w, s1_sum);
                weight[j] = p * f.z;
                largest = fmaxf(largest, weight[j]);
            }
            for (int o = 4; o < 32; o *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
                s1_sum += __shfl_xor_sync(~0u, s1_sum, o);
            }
            const uint32_t exponent = max(__float_as_uint(largest) & 0x7f800000u, 40u << 23);    // of the unit 2^-14 of the largest
            const float inverse = __uint_as_float((254u + 14 << 23) - exponent), w_unit = __uint_as_float(exponent - (14u << 23));
            uint32_t lo[2] = {}, hi[2] = {}, total = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const uint32_t w = (uint32_t)__float2int_rn(weight[j] * inverse);
                total += w;
                lo[j / 4] |= (w & 255) << j % 4 * 8;
                hi[j / 4] |= (w >> 8 & 255) << j % 4 * 8;
            }
            w_sum = fmaf((float)total, w_unit, w_sum);
            ((uint2 *)&s.weight[2 * t][g % 4])[g / 4] = make_uint2(hi[0], hi[1]);
            ((uint2 *)&s.weight[2 * t + 1][g % 4])[g / 4] = make_uint2(lo[0], lo[1]);
            __syncwarp();
            // values
            const uint4 bw = s.weight[g][t];
            const uint32_t b[4] = {bw.x, bw.y, bw.z, bw.w};
#pragma unroll
            for (int part8 = 0; part8 < V_CHANNELS / 8; part8++) {
                int e[4][4] = {};
#pragma unroll
                for (int step = 0; step < 2; step++) {
                    uint32_t y[2][8];    // [4 tokens][channel]: bytes of 4 tokens
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t x[4][V_CHANNELS / 4];
#pragma unroll
                        for (int j = 0; j < 4; j++) look_up<V::channels, V::has_sign, V_BYTES>(x[j], vc[8 * step + 4 * half + j], vs[8 * step + 4 * half + j], v_table);
#pragma unroll
                        for (int w = 0; w < 2; w++) {
                            const int at = 2 * part8 + w;
                            const uint32_t u0 = prmt(x[0][at], x[1][at], 0x5140), u1 = prmt(x[2][at], x[3][at], 0x5140);
                            const uint32_t u2 = prmt(x[0][at], x[1][at], 0x7362), u3 = prmt(x[2][at], x[3][at], 0x7362);
                            y[half][4 * w] = prmt(u0, u1, 0x5410), y[half][4 * w + 1] = prmt(u0, u1, 0x7632);
                            y[half][4 * w + 2] = prmt(u2, u3, 0x5410), y[half][4 * w + 3] = prmt(u2, u3, 0x7632);
                        }
                    }
#pragma unroll
                    for (int c = 0; c < 4; c++) mma_s8_u8(e[c], y[0][2 * c], y[0][2 * c + 1], y[1][2 * c], y[1][2 * c + 1], b[2 * step], b[2 * step + 1]);
                }
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    out[8 * part8 + 2 * c] = fmaf((float)(e[c][0] * 256 + e[c][1]), w_unit, out[8 * part8 + 2 * c]);
                    out[8 * part8 + 2 * c + 1] = fmaf((float)(e[c][2] * 256 + e[c][3]), w_unit, out[8 * part8 + 2 * c + 1]);
                }
            }
#pragma unroll
            for (int c = 0; c < 2 * PAIRS; c++) {
                const float mean = vb.mean.at(2 * PAIRS * lane + c);
                for (int q = 0; q < QUERIES; q++) plain[q][c] = fmaf(__shfl_sync(~0u, s1_sum, q), mean, plain[q][c]);
            }
            __syncwarp();
        }
        for (int o = 4; o < 32; o *= 2) l += __shfl_xor_sync(~0u, l, o), w_sum += __shfl_xor_sync(~0u, w_sum, o);
        for (int q = 0; q < n_queries; q++) {
            const int64_t at = (first + q) * 2 * a.room + part;
            if (t == q) {
                for (int c = 0; c < V_CHANNELS; c++) a.part_o[at * 2 * D + V_CHANNELS * g + c] = out[c] + 0.5f * w_sum;
                if (g == 0) a.part_ml[at] = make_float2(m, l);
            }
            for (int c = 0; c < 2 * PAIRS; c++) a.part_o[(at * 2 + 1) * D + 2 * PAIRS * lane + c] = plain[q][c];
        }
    }
}

// ---- exact blocks -------------------------------------------------------------------------------------------
// Exact block e of a row: sinks, then (in format f16) the sealed ones, then recents and the open one.
HD int exact_blocks(const KvView &kv, int pos) {
    const int n = pos / KV_BLOCK + 1;
    return kv.k_format == KvFormat::f16 ? n : n - max(0, min(kv.coded_end(pos), n) - kv.sink);
}
// A warp a segment.  8 lanes share a token; lane u of them has channels D/16 u .. and as many from D/2 on: pairs that RoPE turns.
template <int D> __global__ void __launch_bounds__(32 * EXACT_WARPS) decode_exact_kernel(DecodeArgs a) {
    constexpr int C = D / 16;
    const KvView &kv = a.kv;
    const int lane = threadIdx.x % 32, u = lane % 8, row = lane / 8, heads = kv.Hkv * a.chunks;
    const int item = blockIdx.x * EXACT_WARPS + threadIdx.x / 32;
    if (item >= a.b.N * heads * a.parts) return;
    const int part = item % a.parts, head = item / a.parts % heads, n = item / a.parts / heads, h = head / a.chunks, slot = a.b.slot[n], pos = a.b.pos[n];
    const int blocks = exact_blocks(kv, pos), segment = decode_segment(blocks, a.b.N, heads), coded_end = kv.coded_end(pos);
    if (part * segment >= blocks) return;
    const int q0 = head % a.chunks * QUERIES, n_queries = min(QUERIES, a.G - q0);
    const int64_t first = (int64_t)n * a.Hq + h * a.G + q0;
    float m[QUERIES], l[QUERIES] = {}, o[QUERIES][2 * C] = {};
    for (int q = 0; q < QUERIES; q++) m[q] = -INFINITY;
    auto load = [&](float (&x)[2 * C], const f16 *p) {
        for (int half = 0; half < 2; half++) {
            uint32_t w[C / 2];
            if constexpr (C == 8) { const uint4 v = *(const uint4 *)(p + half * (D / 2) + C * u); w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w; }
            else { const uint2 v = *(const uint2 *)(p + half * (D / 2) + C * u); w[0] = v.x, w[1] = v.y; }
            for (int c = 0; c < C / 2; c++) {
                const float2 f = __half22float2(*(const __half2 *)&w[c]);
                x[half * C + 2 * c] = f.x, x[half * C + 2 * c + 1] = f.y;
            }
        }
    };
    for (int e = part * segment; e < min((part + 1) * segment, blocks); e++) {
        const int i = kv.k_format == KvFormat::f16 || e < kv.sink ? e : e + coded_end - kv.sink, count = min(KV_BLOCK, pos + 1 - i * KV_BLOCK);
        const bool sealed = i >= kv.sink && i < coded_end;
        const f16 *K = sealed ? (const f16 *)kv.k_block(a.layer, slot, h, i) : kv.k_exact + kv.exact_at(a.layer, slot, h, i);
        const f16 *V = sealed ? (const f16 *)kv.v_block(a.layer, slot, h, i) : kv.v_exact + kv.exact_at(a.layer, slot, h, i);
        float q[QUERIES][2 * C];    // turned back to the block's first token
        for (int j = 0; j < QUERIES; j++)
            for (int c = 0; c < C; c++) {
                const float co = kv.rope.base[(int64_t)i * D + C * u + c], si = kv.rope.base[(int64_t)i * D + D / 2 + C * u + c];
                const float lo = j < n_queries ? a.q_scaled[(first + j) * D + C * u + c] : 0.0f, hi = j < n_queries ? a.q_scaled[(first + j) * D + D / 2 + C * u + c] : 0.0f;
                q[j][c] = lo * co + hi * si, q[j][C + c] = hi * co - lo * si;
            }
        for (int r = row; r < KV_BLOCK; r += 16) {
            if (r - row >= count) break;
            float score[4][QUERIES];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int tok = r + 4 * k, safe = min(tok, count - 1);
                const bool own = i * KV_BLOCK + safe == pos;
                float x[2 * C];
                load(x, own ? a.k16 + ((int64_t)n * kv.Hkv + h) * D : K + safe * D);
                const float *cs = kv.rope.step + safe * D + C * u;
                for (int c = 0; c < C; c++) {
                    const float lo = x[c], hi = x[C + c];
                    x[c] = lo * cs[c] - hi * cs[D / 2 + c], x[C + c] = lo * cs[D / 2 + c] + hi * cs[c];
                }
                for (int j = 0; j < QUERIES; j++) {
                    float sum = 0;
                    for (int c = 0; c < 2 * C; c++) sum = fmaf(q[j][c], x[c], sum);
                    for (int w = 1; w < 8; w *= 2) sum += __shfl_xor_sync(~0u, sum, w);
                    score[k][j] = tok < count ? sum : -INFINITY;
                }
            }
            float p[4][QUERIES];
            for (int j = 0; j < QUERIES; j++) {
                float top = fmaxf(fmaxf(score[0][j], score[1][j]), fmaxf(score[2][j], score[3][j]));
                for (int w = 8; w < 32; w *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, w));
                top = fmaxf(top, m[j]);
                const float old = exp2f(m[j] - top);
                m[j] = top, l[j] *= old;
                for (int c = 0; c < 2 * C; c++) o[j][c] *= old;
                for (int k = 0; k < 4; k++) l[j] += p[k][j] = exp2f(score[k][j] - top);
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int safe = min(r + 4 * k, count - 1);
                float x[2 * C];
                load(x, i * KV_BLOCK + safe == pos ? a.v16 + ((int64_t)n * kv.Hkv + h) * D : V + safe * D);
                for (int j = 0; j < QUERIES; j++)
                    for (int c = 0; c < 2 * C; c++) o[j][c] = fmaf(p[k][j], x[c], o[j][c]);
            }
        }
    }
    for (int j = 0; j < QUERIES; j++) {
        for (int w = 8; w < 32; w *= 2) {
            l[j] += __shfl_xor_sync(~0u, l[j], w);
            for (int c = 0; c < 2 * C; c++) o[j][c] += __shfl_xor_sync(~0u, o[j][c], w);
        }
        if (j >= n_queries || row != 0) continue;
        const int64_t at = (first + j) * 2 * a.room + a.room + part;
        if (u == 0) a.part_ml[at] = make_float2(m[j], l[j]);
        for (int c = 0; c < C; c++) a.part_o[(at * 2 + 1) * D + C * u + c] = o[j][c], a.part_o[(at * 2 + 1) * D + D / 2 + C * u + c] = o[j][C + c];
    }
}

// ---- merge --------------------------------------------------------------------------------------------------
// One warp a query: coded segments, then exact ones, in order.
template <int D> __global__ void __launch_bounds__(32) decode_merge_kernel(DecodeArgs a) {
    const KvView &kv = a.kv;
    const int n = blockIdx.y, lane = threadIdx.x, heads = kv.Hkv * a.chunks, pos = a.b.pos[n];
    const int64_t query = (int64_t)n * a.Hq + blockIdx.x;
    const int coded = kv.k_format == KvFormat::f16 ? 0 : min(kv.coded_end(pos), pos / KV_BLOCK + 1) - kv.sink, exact = exact_blocks(kv, pos);
    const int coded_segment = decode_segment(coded, a.b.N, heads), exact_segment = decode_segment(exact, a.b.N, heads);
    const int n_coded = coded > 0 ? (coded + coded_segment - 1) / coded_segment : 0, n_exact = (exact + exact_segment - 1) / exact_segment;
    float m = -INFINITY, l = 0, o[2][D / 32] = {};
    constexpr int AT_ONCE = 8;    // segments whose loads are in flight together
    const int n_parts = n_coded + n_exact;
    for (int i0 = 0; i0 < n_parts; i0 += AT_ONCE) {
        float2 ml[AT_ONCE];
        float x[AT_ONCE][2][D / 32];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int i = min(i0 + j, n_parts - 1);
            const int64_t at = query * 2 * a.room + (i < n_coded ? i : a.room + i - n_coded);
            ml[j] = i0 + j < n_parts ? a.part_ml[at] : make_float2(-INFINITY, 0.0f);
            for (int c = 0; c < D / 32; c++) {
                x[j][0][c] = i < n_coded ? a.part_o[at * 2 * D + c * 32 + lane] : 0.0f;
                x[j][1][c] = a.part_o[(at * 2 + 1) * D + c * 32 + lane];
            }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const float top = fmaxf(m, ml[j].x), wa = exp2f(m - top), wb = exp2f(ml[j].x - top);
            m = top, l = fmaf(ml[j].y, wb, l * wa);
            for (int half = 0; half < 2; half++)
                for (int c = 0; c < D / 32; c++) o[half][c] = fmaf(x[j][half][c], wb, o[half][c] * wa);
        }
    }
    __shared__ float code[D];
    for (int c = 0; c < D / 32; c++) code[c * 32 + lane] = o[0][c];
    hadamard_warp(code, D);
    for (int c = 0; c < D / 32; c++) a.y[query * D + c * 32 + lane] = (code[c * 32 + lane] + o[1][c]) / l;
}

// Formats with codewords of `channels` channels.
template <class Format, class = void> constexpr bool is_nsn = false;
template <class Format> constexpr bool is_nsn<Format, decltype((void)Format::channels)> = Format::has_code && Format::has_plain;

// ---- launch -------------------------------------------------------------------------------------------------
static int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
// Segments that any row of such a step can have: decode_segment asks for no more.
static int room_of(int N, int Hq) { return std::min(MAX_PARTS, std::max(1, decode_parts(N, (int)ceil_div(Hq, QUERIES)))); }
static int64_t work_of(int64_t N, int Hq, int d) {
    const int64_t queries = N * Hq, parts = queries * 2 * room_of((int)N, Hq);
    return aligned(queries * d * 4) + aligned(queries * d * 2) + aligned(queries * 8) + aligned(parts * 8) + parts * 2 * d * 4;
}
int64_t attention_decode_work_bytes(const StepShape &shape) {
    int64_t most = 0;    // fewer rows may have more segments in all
    for (int N = 1; N <= std::min(shape.N, MOST_ROWS); N++) most = std::max(most, work_of(N, shape.Hq, shape.d));
    return most;
}

template <class K, class V> static void launch_codes(const DecodeArgs &a) {
    constexpr int bytes = 2 * (int)TABLE - 1024 + CODE_WARPS * (int)sizeof(CodeScratch<K::d>);    // dynamic shared memory starts at 1,024
    static_assert(4 * (K::d / 16) * 512 + 1024 <= (int)TABLE && bytes <= 227 * 1024, "E before the codebook, the warps' scratch behind it");
    static const cudaError_t allowed = cudaFuncSetAttribute(decode_codes_kernel<K, V>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    CUDA_CHECK(allowed);
    const int64_t items = (int64_t)a.b.N * a.kv.Hkv * a.chunks * a.parts;
    decode_codes_kernel<K, V><<<(int)std::min<int64_t>(items, sm_count), CODE_THREADS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
template <int D> static bool launch(DecodeArgs &a) {
    const KvView &kv = a.kv;
    const dim3 queries(a.Hq, a.b.N);
    const bool exact_only = kv.k_format == KvFormat::f16;
    if (kv.k_format > KvFormat::nsn4b || kv.v_format > KvFormat::nsn4b || exact_only != (kv.v_format == KvFormat::f16)) return false;
    decode_queries_kernel<<<queries, 32, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
    const int heads = kv.Hkv * a.chunks, parts_most = (int)ceil_div(kv.max_blocks, decode_segment(kv.max_blocks, a.b.N, heads));
    // A shorter row may have more segments than the longest: one block each.
    a.parts = std::max(parts_most, std::min({kv.max_blocks, MAX_PARTS, std::max(1, decode_parts(a.b.N, heads))}));
    if (!exact_only && kv.n_blocks > 0)
        with_format_at<D>(kv.k_format, [&](auto k) {
            with_format_at<D>(kv.v_format, [&](auto v) {
                using K = decltype(k);
                using V = decltype(v);
                if constexpr (is_nsn<K> && is_nsn<V>) launch_codes<K, V>(a);
            });
        });
    const int parts = a.parts;
    if (!exact_only) a.parts = std::min(parts, kv.sink + kv.recent + 1);
    decode_exact_kernel<D><<<(int)ceil_div((int64_t)a.b.N * heads * a.parts, EXACT_WARPS), 32 * EXACT_WARPS, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
    decode_merge_kernel<D><<<queries, 32, 0, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
    return true;
}

bool attention_decode(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    const Step &step = step_of(b);
    if (kv.ablate || (kv.d != 64 && kv.d != 128) || !step.single_rows() || b.N > MOST_ROWS) return false;
    DecodeArgs a = {y, q, kv, k16, v16, b, nullptr, nullptr, nullptr, nullptr, nullptr, layer, Hq, Hq / kv.Hkv, 0, 0, 0};
    a.chunks = (int)ceil_div(a.G, QUERIES);
    const int64_t queries = (int64_t)b.N * Hq;
    uint8_t *at = (uint8_t *)step.work;
    auto take = [&](int64_t bytes) { uint8_t *p = at; at += aligned(bytes); return p; };
    a.q_scaled = (float *)take(queries * kv.d * 4);
    a.q_code = (int8_t *)take(queries * kv.d * 2);
    a.q_unit = (float2 *)take(queries * 8);
    a.room = room_of(b.N, Hq);
    a.part_ml = (float2 *)take(queries * 2 * a.room * 8);
    a.part_o = (float *)take(queries * 2 * a.room * 2 * kv.d * 4);
    return kv.d == 64 ? launch<64>(a) : launch<128>(a);
}
}    // namespace cuda
#endif
