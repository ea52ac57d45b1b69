// decode_shared.cuh - shared memory of the kernels over codes: what lies where, addresses, fields of a block, products of codewords,
// codebook tables.  decode_codes.cu has the drawing.
#pragma once
#include "attention_decode.cuh"

namespace cuda {

constexpr uint32_t START = 1024, END = 228 * 1024;    // addresses in shared memory
constexpr int ROW = 128, TABLE_BYTES = 256 * ROW;     // of a codebook: a row has copies of a codeword, one a lane (pair)

template <class Format> constexpr int stride = (int)kv_aligned(sizeof(typename Format::Block));    // kv_block_stride

// Q: query heads of a kv head that share a pass, at most: one, or a set of four, the columns of a product, or two sets.
template <class K, class V, int Q> struct Layout {
    static constexpr int D = K::d, SETS = (Q + 3) / 4;
    static constexpr bool ALIKE = std::is_same_v<K, V>;
    static constexpr int SLOT_K = stride<K>, SLOT_V = stride<V>, SLOT = SLOT_K + SLOT_V;
    static constexpr int MEAN = sizeof(Mean<D>), E_BYTES = KV_BLOCK * D * 2, FACTORS = Q == 1 ? 0 : KV_BLOCK * 16;
    static constexpr int K_TABLE = START, V_TABLE = K_TABLE + (ALIKE ? 0 : TABLE_BYTES), E_AT = V_TABLE + TABLE_BYTES, WARPS_AT = E_AT + E_BYTES;
    // Of a query: its numbers.  Of a set: fragments of its integers' bytes; (unit, unit times half the sum of the integers), a copy for every g;
    // pairs of channels in f16.  All of a part's are in a place of the team, of which a warp has a share.
    static constexpr int NUMBERS = D * 4, CODES = D * 8, UNITS = 256, PAIRS = 4 * D * 2;
    static constexpr int LEAST_TEAM = Q == 1 ? 1 : 2 * SETS, SHARE = Q == 1 ? 0 : (Q * NUMBERS + SETS * (CODES + UNITS + PAIRS)) / LEAST_TEAM;
    // The mean scores of n blocks are made together.  Where their z was lie then the weights of the block at work, 512 bytes, and the mean
    // scores of the n - 1 that follow, 1 KB each, all for each set; with one query those of all four, and weights behind them.
    static constexpr int KEPT = 48;    // of a warp's Part
    static constexpr int MEAN_SCORES = 72 * 4, WEIGHTS = 4 * MEAN_SCORES;    // one query's
    static constexpr int z_bytes(int n) { return Q == 1 ? WEIGHTS + 128 : std::max(n * Q * D * 2, SETS * (n * 1024 - 512)); }
    static constexpr int warp_bytes(int n) { return (z_bytes(n) + 2 * SLOT + FACTORS + 2 * n * MEAN + KEPT + 127) / 128 * 128; }
    static constexpr int MOST_WARPS = D == 128 && Q > 1 ? WIDE_CODE_WARPS : CODE_WARPS;
    static constexpr int warps(int n) { return std::min(((int)END - WARPS_AT) / (warp_bytes(n) + SHARE), MOST_WARPS); }
    // As many as cost no warp: E is read less often.  (d 64: where registers are not scarce.)
    static constexpr bool FOUR = Q == 1 || (SETS == 1 && (D == 128 || K::channels > 2) && warps(4) == warps(2));
    static constexpr int TOGETHER = FOUR ? 4 : SETS == 1 || warps(2) == warps(1) ? 2 : 1;
    static constexpr int Z = z_bytes(TOGETHER), MEANS = 2 * TOGETHER, WARP = warp_bytes(TOGETHER), WARPS = warps(TOGETHER);
    static constexpr int QUERIES_AT = WARPS_AT + WARPS * WARP, BYTES = QUERIES_AT + WARPS * SHARE - (int)START;
    // A word of z, and of E: the cosine parts, or the sine parts, of two pairs; or both parts of one pair.
    static constexpr bool BY_PART = D == 128 || Q > 1;
    static_assert(WARPS >= LEAST_TEAM && SHARE % 16 == 0 && (Q > 1 || 2 * D <= SLOT), "queries do not fit");
    static_assert(WARPS >= 4 && sizeof(WarpResult<D, Q, true>) <= Z + 2 * SLOT + FACTORS + MEANS * MEAN, "does not fit");
    // A warp's: z, at a multiple of 128, two blocks, token factors, means, part.  All but the part take its result.
    __device__ static uint32_t warp_at(int w) { return WARPS_AT + w * WARP; }
    __device__ static uint32_t slots(int w) { return warp_at(w) + Z; }
    __device__ static uint32_t factors(int w) { return slots(w) + 2 * SLOT; }
    __device__ static uint32_t means(int w) { return factors(w) + FACTORS; }
    __device__ static uint32_t part(int w) { return means(w) + MEANS * MEAN; }
    // Of a team, by its first warp: query q's numbers; fragments, units, pairs.
    __device__ static uint32_t numbers(int first, int q) { return QUERIES_AT + first * SHARE + q * NUMBERS; }
    __device__ static uint32_t queries(int first) { return numbers(first, Q); }
    __device__ static uint32_t E(int lane) { return E_AT + 16 * lane; }
    // A lane's copy of a codebook.
    template <class Format> __device__ static uint32_t copy(uint32_t table, int lane) { return table + (Format::channels == 8 ? lane % 16 * 8 : lane * 4); }
};

// ---- shared memory by address -------------------------------------------------------------------------------
__device__ inline uint8_t *at_address(uint32_t at) {
    extern __shared__ __align__(1024) uint8_t shared[];    // starts there
    return shared + (at - START);
}
// The other one of two 64-byte halves; computed where it is used, for want of registers.
__device__ inline uint32_t other_half(uint32_t x) {
    asm volatile("xor.b32 %0, %0, 64;" : "+r"(x));
    return x;
}
// A number the compiler knows nothing about: constants added to it become part of the load instead of instructions.
__device__ inline uint32_t opaque(uint32_t x) {
    asm volatile("mov.u32 %0, %0;" : "+r"(x));
    return x;
}
__device__ inline uint32_t load_codeword(uint32_t at) {    // nobody writes them: the compiler may move these
    uint32_t v;
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}
__device__ inline uint2 load_codeword2(uint32_t at) {
    uint2 v;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
__device__ inline uint4 load_codeword4(uint32_t at) {
    uint4 v;
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
template <class T> __device__ inline T load_shared(uint32_t at) {
    T x;
    if constexpr (sizeof(T) <= 2) {
        uint16_t v;
        if constexpr (sizeof(T) == 1) asm volatile("ld.shared.u8 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
        else asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
        memcpy(&x, &v, sizeof x);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t v;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
        memcpy(&x, &v, sizeof x);
    } else if constexpr (sizeof(T) == 8) {
        uint2 v;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
        memcpy(&x, &v, sizeof x);
    } else {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
        memcpy(&x, &v, sizeof x);
    }
    return x;
}
__device__ inline void store_shared(uint32_t at, uint32_t x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
template <int N> struct Words { uint32_t x[N]; };
template <int N> __device__ inline void store_shared(uint32_t at, const Words<N> &w) {
    if constexpr (N == 1) store_shared(at, w.x[0]);
    if constexpr (N == 2) asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(w.x[0]), "r"(w.x[1]) : "memory");
    if constexpr (N == 4) asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w.x[0]), "r"(w.x[1]), "r"(w.x[2]), "r"(w.x[3]) : "memory");
}
__device__ inline Words<4> words(float a, float b, float c, float d) { return {{__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)}}; }
// Predicated: a branch for each of a block's copies costs more than they.  Blocks are read once: they leave L2 first.
constexpr uint64_t READ_ONCE = 0x12F0000000000000;    // what createpolicy.fractional.L2::evict_first says for all of the bytes
__device__ inline void copy_async16(uint32_t to, const uint8_t *from, bool wanted) {
    asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %2, 0;\n @p cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %3;\n}" ::"r"(to), "l"(from), "r"((int)wanted), "l"(READ_ONCE) : "memory");
}
__device__ inline void copy_async4(uint32_t to, const uint8_t *from, bool wanted) {
    asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %2, 0;\n @p cp.async.ca.shared.global [%0], [%1], 4;\n}" ::"r"(to), "l"(from), "r"((int)wanted) : "memory");
}

// ---- fields of a block --------------------------------------------------------------------------------------
// BYTES neighbouring bytes as words; at a multiple of BYTES.
template <int BYTES> __device__ inline void load_bytes(uint32_t (&w)[BYTES < 4 ? 1 : BYTES / 4], uint32_t at) {
    if constexpr (BYTES == 1) w[0] = load_shared<uint8_t>(at);
    else if constexpr (BYTES == 2) w[0] = load_shared<uint16_t>(at);
    else if constexpr (BYTES == 4) w[0] = load_shared<uint32_t>(at);
    else if constexpr (BYTES == 8) {
        const uint2 v = load_shared<uint2>(at);
        w[0] = v.x, w[1] = v.y;
    } else {
        const uint4 v = load_shared<uint4>(at);
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
}
// Every byte's highest bit in all of its bits.
__device__ inline uint32_t spread_tops(uint32_t x) {
    uint32_t y;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(y) : "r"(x));
    return y;
}
// Words of 4 channels: the codewords that the bytes name, signs applied.  `copy`: the lane's copy of codeword 0; sign: the highest bits of
// its bytes are the last word's.
template <int C, bool SIGN, int BYTES>
__device__ inline void look_up(uint32_t (&x)[BYTES * C / 4], const uint32_t *code, uint32_t sign, uint32_t copy) {
    auto at = [&](int i) { return __dp4a(code[i / 4], (uint32_t)ROW << i % 4 * 8, copy); };    // copy + ROW byte i; on a pipe that has time
    if constexpr (C == 8) {
#pragma unroll
        for (int i = 0; i < BYTES; i++) {
            const uint2 v = load_codeword2(at(i));
            x[2 * i] = v.x, x[2 * i + 1] = v.y;
            if constexpr (SIGN)    // -(x + 1/2) = ~x + 1/2
                x[2 * i] ^= spread_tops(sign << (2 * BYTES - 1 - 2 * i)), x[2 * i + 1] ^= spread_tops(sign << (2 * BYTES - 2 - 2 * i));
        }
    } else if constexpr (C == 4) {
#pragma unroll
        for (int i = 0; i < BYTES; i++) x[i] = load_codeword(at(i));
    } else {
#pragma unroll
        for (int i = 0; i < BYTES; i += 2) x[i / 2] = __byte_perm(load_codeword(at(i)), load_codeword(at(i + 1)), 0x7610);
    }
}
// For look_up: the signs of the 8 BYTES channels of which a byte a code would be at `at`, where the 4 bytes of 32 channels are (sign_place).
template <int BYTES> __device__ inline uint32_t signs_at(uint32_t at) {
    const uint32_t x = load_shared<uint32_t>(at & ~3u);
    return BYTES == 4 ? x : x << (8 - 2 * BYTES - 2 * (at & 3));
}
// Products of 16 tokens' codewords and the bytes of each set of queries: lane (g, t) looks up channels d/4 t .. of tokens 16 tile + g and 8 further;
// `codes` is where those of token g begin, the first field of a block.
template <class K, int SETS, int N>
__device__ inline void multiply_keys(int (&e)[SETS][4], uint32_t codes, int tile, const uint32_t (&bq)[SETS][N], uint32_t table) {
    constexpr int D = K::d, ROW = D / K::channels, BYTES = ROW / 4, WORDS = BYTES < 4 ? 1 : BYTES / 4;
    uint32_t x[2][N];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t code[WORDS], sign = 0;
        const uint32_t at = codes + (16 * tile + 8 * half) * ROW;
        load_bytes<BYTES>(code, at);
        if constexpr (K::has_sign) sign = signs_at<BYTES>(at + KV_BLOCK * ROW);
        look_up<K::channels, K::has_sign, BYTES>(x[half], code, sign, table);
    }
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        for (int s = 0; s < SETS; s++) mma_s8(e[s], {x[0][2 * k], x[1][2 * k], x[0][2 * k + 1], x[1][2 * k + 1]}, bq[s][2 * k], bq[s][2 * k + 1]);
}
// The four tiles of E times M matrices z, one behind the other: 8 columns are rows of D/2 words, whose 64-byte halves are swapped in odd ones.
// z's place is free then.
template <class S, int M> __device__ inline void multiply_E(float (&c)[M][4][4], uint32_t E, uint32_t z_load, uint32_t z_load_odd) {
    constexpr int D = S::D;
    uint32_t z[M][D / 8];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < D / 32; k++) {
            const uint4 v = load_shared<uint4>((k % 2 ? z_load_odd : z_load) + k / 2 * 128 + m * 16 * D);
            memcpy(z[m] + 4 * k, &v, 16);
        }
    unsigned e[2][4][4];
    auto load = [&](int k) {
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            const uint4 v = load_codeword4(E + (tile * (D / 16) + k) * 512);
            memcpy(e[k % 2][tile], &v, 16);
        }
    };
    load(0);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        if (k + 1 < D / 16) load(k + 1);
#pragma unroll
        for (int tile = 0; tile < 4; tile++)
            for (int m = 0; m < M; m++) mma(c[m][tile], e[k % 2][tile], z[m][2 * k], z[m][2 * k + 1]);
    }
}
// One copy of codeword k for every lane that reads it alone; a thread fills a row.  Loads and stores are apart, so that those of all tables
// wait together.
template <int C, int WARPS> struct TableRows {
    static constexpr int THREADS = 32 * WARPS, EACH = (256 + THREADS - 1) / THREADS, BYTES = C == 8 ? 8 : 4;
    Words<BYTES / 4> v[EACH];
    __device__ void load(const int8_t *codebook) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int8_t *const from = codebook + min(threadIdx.x + i * THREADS, 255u) * C;
            if constexpr (C == 2) v[i].x[0] = *(const uint16_t *)from * 0x10001u;
            else memcpy(&v[i], __builtin_assume_aligned(from, BYTES), BYTES);
        }
    }
    __device__ void store(uint32_t table) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t k = threadIdx.x + i * THREADS;
            Words<4> copies;
            for (int w = 0; w < 4; w++) copies.x[w] = v[i].x[w % (BYTES / 4)];
            for (uint32_t at = 0; at < ROW && k < 256; at += 16)
                store_shared(table + k * ROW + (at + k * 16) % ROW, copies);    // neighbours meet different banks
        }
    }
};
// Cosines and sines of tokens 0 .. 63 as fragments of an A operand: fragment k of tile i has pairs 16 (k / 2) + 4 t + 2 (k % 2) ..
template <class S> struct AngleRows {
    static constexpr int D = S::D, FRAGMENTS = 4 * (D / 16), EACH = (FRAGMENTS + S::WARPS - 1) / S::WARPS;
    float2 x[EACH][2][2];    // rows lane / 4 and 8 further; cosines, sines of two pairs
    __device__ static uint32_t fragment(uint32_t i) { return min(threadIdx.x / 32 + i * S::WARPS, FRAGMENTS - 1u); }
    __device__ void load(const float *rope_step) {
        const uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const uint32_t tile = fragment(i) / (D / 16), step = fragment(i) % (D / 16), pair = step / 2 * 16 + lane % 4 * 4 + step % 2 * 2;
            for (int row = 0; row < 2; row++)
                for (int part = 0; part < 2; part++) x[i][row][part] = *(const float2 *)(rope_step + (16 * tile + lane / 4 + 8 * row) * D + part * (D / 2) + pair);
        }
    }
    __device__ void store() const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float2 (&near)[2] = x[i][0], (&far)[2] = x[i][1];    // cosines, sines of two pairs
            store_shared(S::E(threadIdx.x % 32) + fragment(i) * 512,
                         S::BY_PART ? Words<4>{{pack(near[0].x, near[0].y), pack(far[0].x, far[0].y), pack(near[1].x, near[1].y), pack(far[1].x, far[1].y)}}
                                    : Words<4>{{pack(near[0].x, near[1].x), pack(far[0].x, far[1].x), pack(near[0].y, near[1].y), pack(far[0].y, far[1].y)}});
        }
    }
};
template <class K, class V, class S> struct Tables {
    TableRows<K::channels, S::WARPS> k;
    TableRows<V::channels, S::WARPS> v;
    AngleRows<S> angles;
    __device__ void load(const KvView &kv) {
        k.load(kv.k_codebook);
        if (!S::ALIKE) v.load(kv.v_codebook);
        angles.load(kv.rope.step);
    }
    __device__ void store() const {
        k.store(S::K_TABLE);
        if (!S::ALIKE) v.store(S::V_TABLE);
        angles.store();
    }
};
// Second scales of tokens 2 lane, 2 lane + 1 of the field at `at`, and first ones.
__device__ inline float2 scales_at(uint32_t at, int lane, const ScaleF16 *) { return unpack(load_shared<uint32_t>(at + 4 * lane)); }
__device__ inline float2 scales_at(uint32_t at, int lane, const ScaleLog8 *) {
    const uint32_t u = load_shared<uint16_t>(at + 2 * lane), a = u & 255, b = u >> 8;
    const float2 grid = unpack(load_shared<uint32_t>(at + offsetof(ScaleLog8, step)));    // step, min
    const float below = grid.y - grid.x;
    return make_float2(a ? exp2_fast(fmaf(grid.x, (float)a, below)) : 0.0f, b ? exp2_fast(fmaf(grid.x, (float)b, below)) : 0.0f);
}
__device__ inline float2 first_norms_at(uint32_t at, int lane) {
    const float2 grid = unpack(load_shared<uint32_t>(at + offsetof(FirstNorm, step)));
    const uint32_t u = load_shared<uint8_t>(at + lane);
    return make_float2(fmaf(grid.x, (float)(u & 15), grid.y), fmaf(grid.x, (float)(u >> 4), grid.y));
}
// Channels c .. c + N-1 of the mean at `at`; c a multiple of N.
template <int D, int N> __device__ inline Floats<N> mean_at(uint32_t at, int c) {
    uint32_t u;
    if constexpr (N == 4) u = load_shared<uint16_t>(at + c / 2);
    else u = load_shared<uint8_t>(at + c / 2) >> (N == 1 ? c % 2 * 4 : 0);
    const uint32_t grid = at + offsetof(Mean<D>, step) + c / 32 * 2;
    const float step = to_f32(load_shared<f16>(grid)), min = to_f32(load_shared<f16>(grid + offsetof(Mean<D>, min) - offsetof(Mean<D>, step)));
    Floats<N> x;
#pragma unroll
    for (int i = 0; i < N; i++) x.x[i] = fmaf(step, (float)(u >> 4 * i & 15), min);
    return x;
}
}    // namespace cuda
