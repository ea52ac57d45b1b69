// decode_codes.cuh - what the kernels over codes share: shared memory, codebook tables, fields of a block, the ring of blocks, a
// warp's part and its exact tokens.  decode_codes.cu says what lies where.
#pragma once
#include "attention_decode.cuh"

namespace cuda {

constexpr uint32_t TABLE = 65536, ABOVE = 2 * TABLE, START = 1024, END = 228 * 1024;    // addresses in shared memory

constexpr int ONE_WARPS = 12;     // of a thread block of decode_codes_mha.cu, if they fit

template <class Format> constexpr int stride = (sizeof(typename Format::Block) + 15) / 16 * 16;    // kv_block_stride

// Q: query heads of a kv head, at most.
template <class K, class V, int Q> struct Layout {
    static constexpr int D = K::d, MOST_WARPS = Q == 1 ? ONE_WARPS : CODE_WARPS;
    static constexpr bool ALIKE = std::is_same_v<K, V>;
    static constexpr int SLOT_K = stride<K>, SLOT_V = stride<V>, SLOT = SLOT_K + SLOT_V;
    // Of half the means there are mean scores at a time, the others come.  Where z was, one query's kernel has those and the weights.
    static constexpr int MEANS = Q == 1 ? 8 : 4, MEAN = sizeof(Mean<D>), E_BYTES = KV_BLOCK * D * 2, FACTORS = Q == 1 ? 0 : KV_BLOCK * 16;
    static constexpr int MEAN_SCORES = 72 * 4, WEIGHTS = 4 * MEAN_SCORES, Z = Q == 1 ? WEIGHTS + 128 : D == 128 ? 2048 : 1536;
    static constexpr bool MEANS_BESIDE = ALIKE && Q == 1;
    static constexpr int MEAN_STEP = MEANS_BESIDE ? 256 : MEAN;
    static constexpr int E_AT = START, BELOW_AT = START + (ALIKE ? 0 : E_BYTES), BESIDE_SLOTS = Z + (ALIKE ? 0 : FACTORS) + (MEANS_BESIDE ? 0 : MEANS * MEAN);
    static constexpr int WARP = (2 * SLOT + BESIDE_SLOTS + 127) / 128 * 128, BELOW = ((int)TABLE - BELOW_AT) / WARP, FIT = BELOW + (int)(END - ABOVE) / WARP;
    static constexpr int WARPS = FIT < MOST_WARPS ? FIT : MOST_WARPS, BYTES = (int)ABOVE + (WARPS > BELOW ? WARPS - BELOW : 0) * WARP - (int)START;
    // Of a query while a team prepares it, in a second slot that no block has yet: its numbers, its bytes (hi, lo), (unit, half their sum).
    static constexpr int QUERY = D * 4 + D * 2 + 16, LEAST_TEAM = Q * QUERY <= SLOT ? 1 : 2;    // a team's last warp prepares those that others do not
    static_assert((Q - LEAST_TEAM + 1) * QUERY <= SLOT && QUERY % 16 == 0, "queries do not fit");
    static_assert(WARPS >= 4 && sizeof(WarpResult<D, Q>) <= 2 * SLOT && E_BYTES / 128 + WARPS * (FACTORS / 128 + (MEANS_BESIDE ? MEANS : 0)) <= 256, "does not fit");
    // A warp's: z, at a multiple of 128, blocks, and what has no place beside the codebook.
    __device__ static uint32_t slots(int w) { return warp_at(w) + Z; }
    __device__ static uint32_t warp_at(int w) { return w < BELOW ? BELOW_AT + w * WARP : ABOVE + (w - BELOW) * WARP; }
    // The second halves of the codebook's rows hold E, then the token factors: 8 lanes' 16 bytes a row; of one query the means instead, one a row.
    static constexpr uint32_t BESIDE = TABLE + 128, FRAGMENT = ALIKE ? 1024 : 512, ROW = ALIKE ? 256 : 128;    // from one fragment, or 128 bytes of factors, to the next
    __device__ static uint32_t E(int lane) { return ALIKE ? BESIDE + lane / 8 * 256 + lane % 8 * 16 : E_AT + lane * 16; }
    __device__ static uint32_t factors(int w) { return ALIKE ? BESIDE + E_BYTES * 2 + w * FACTORS * 2 : slots(w) + 2 * SLOT; }
    __device__ static uint32_t means(int w) { return MEANS_BESIDE ? BESIDE + E_BYTES * 2 + w * MEANS * MEAN_STEP : slots(w) + 2 * SLOT + (ALIKE ? 0 : FACTORS); }
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
template <class T> __device__ inline T *opaque(T *p) {    // in global memory
    size_t x = __cvta_generic_to_global(p);
    asm volatile("mov.u64 %0, %0;" : "+l"(x));
    return (T *)__cvta_global_to_generic(x);
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
// Words of 4 channels: the codewords that the bytes name, signs applied.  lane_table: TABLE, the side's half, the lane's copy.
template <int C, bool SIGN, int BYTES>
__device__ inline void look_up(uint32_t (&x)[BYTES * C / 4], const uint32_t *code, const uint32_t *sign, uint32_t lane_table) {
    auto at = [&](int i) { return __byte_perm(lane_table, code[i / 4], 0x3200 | (4 + i % 4) << 4); };
    if constexpr (C == 8) {
#pragma unroll
        for (int i = 0; i < BYTES; i++) {
            const uint2 v = load_codeword2(at(i));
            x[2 * i] = v.x, x[2 * i + 1] = v.y;
            if constexpr (SIGN) {    // bit to byte 0 or 255: -(x + 1/2) = ~x + 1/2
                const uint32_t s = sign[i / 4] >> i % 4 * 8;
                x[2 * i] ^= ((s & 15) * 0x00204081 & 0x01010101) * 255;
                x[2 * i + 1] ^= ((s >> 4 & 15) * 0x00204081 & 0x01010101) * 255;
            }
        }
    } else if constexpr (C == 4) {
#pragma unroll
        for (int i = 0; i < BYTES; i++) x[i] = load_codeword(at(i));
    } else {
#pragma unroll
        for (int i = 0; i < BYTES; i += 2) x[i / 2] = __byte_perm(load_codeword(at(i)), load_codeword(at(i + 1)), 0x7610);
    }
}
// Products of 16 tokens' codewords and the query's bytes: lane (g, t) looks up channels d/4 t .. of tokens 16 tile + g and 8 further;
// `codes` is where those of token g begin, the first field of a block.
template <class K, int N> __device__ inline void multiply_keys(int (&e)[4], uint32_t codes, int tile, const uint32_t (&bq)[N], uint32_t table) {
    constexpr int D = K::d, ROW = D / K::channels, BYTES = ROW / 4, WORDS = BYTES < 4 ? 1 : BYTES / 4;
    uint32_t x[2][N];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t code[WORDS], sign[WORDS];
        const uint32_t at = codes + (16 * tile + 8 * half) * ROW;
        load_bytes<BYTES>(code, at);
        if constexpr (K::has_sign) load_bytes<BYTES>(sign, at + KV_BLOCK * ROW);
        look_up<K::channels, K::has_sign, BYTES>(x[half], code, sign, table);
    }
#pragma unroll
    for (int k = 0; k < N / 2; k++) mma_s8(e, {x[0][2 * k], x[1][2 * k], x[0][2 * k + 1], x[1][2 * k + 1]}, bq[2 * k], bq[2 * k + 1]);
}
// The four tiles of E times z: columns are rows of D/2 words, whose 64-byte halves are swapped in odd ones.  z's place is free then.
template <class S> __device__ inline void multiply_E(float (&c)[4][4], uint32_t E, uint32_t z_load, uint32_t z_load_odd) {
    constexpr int D = S::D;
    uint32_t z[D / 8];
#pragma unroll
    for (int k = 0; k < D / 32; k++) {
        const uint4 v = load_shared<uint4>((k % 2 ? z_load_odd : z_load) + k / 2 * 128);
        memcpy(z + 4 * k, &v, 16);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int tile = 0; tile < 4; tile++) {
            unsigned e[4];
            const uint4 v = load_shared<uint4>(E + (tile * (D / 16) + k) * S::FRAGMENT);
            memcpy(e, &v, 16);
            mma(c[tile], e, z[2 * k], z[2 * k + 1]);
        }
}
// One copy of codeword k for every lane that reads it alone.  Loads and stores are apart, so that those of all tables wait together.
template <int C, int WARPS> struct TableRows {
    static constexpr int EACH = (256 + WARPS - 1) / WARPS;
    uint32_t v[EACH];
    __device__ void load(const int8_t *codebook) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int k = min((int)threadIdx.x / 32 + i * WARPS, 255);
            if constexpr (C == 2) v[i] = *(const uint16_t *)(codebook + 2 * k) * 0x10001u;
            else v[i] = *(const uint32_t *)(codebook + k * C + (C == 8 ? threadIdx.x % 2 * 4 : 0));
        }
    }
    __device__ void store(uint32_t table) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int k = threadIdx.x / 32 + i * WARPS;
            if (k < 256) store_shared(table + k * 256 + threadIdx.x % 32 * 4, v[i]);
        }
    }
};
// Cosines and sines of tokens 0 .. 63 as fragments of an A operand: fragment k of tile i has pairs 16 (k / 2) + 4 t + 2 (k % 2) ..
template <class S> struct AngleRows {
    static constexpr int D = S::D, FRAGMENTS = 4 * (D / 16), EACH = (FRAGMENTS + S::WARPS - 1) / S::WARPS;
    float2 x[EACH][2][2];    // rows lane / 4 and 8 further; cosines, sines of two pairs
    __device__ static int fragment(int i) { return min((int)threadIdx.x / 32 + i * S::WARPS, FRAGMENTS - 1); }
    __device__ void load(const float *rope_step) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int tile = fragment(i) / (D / 16), step = fragment(i) % (D / 16), pair = step / 2 * 16 + lane % 4 * 4 + step % 2 * 2;
            for (int row = 0; row < 2; row++)
                for (int part = 0; part < 2; part++) x[i][row][part] = *(const float2 *)(rope_step + (16 * tile + lane / 4 + 8 * row) * D + part * (D / 2) + pair);
        }
    }
    __device__ void store() const {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            store_shared(S::E(threadIdx.x % 32) + fragment(i) * S::FRAGMENT, Words<4>{{pack(x[i][0][0].x, x[i][0][1].x), pack(x[i][1][0].x, x[i][1][1].x), pack(x[i][0][0].y, x[i][0][1].y), pack(x[i][1][0].y, x[i][1][1].y)}});
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
        k.store(TABLE);
        if (!S::ALIKE) v.store(TABLE + 128);
        angles.store();
        __syncthreads();
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

// ---- a warp's part ------------------------------------------------------------------------------------------
// Part `part` of the cache of row n and kv head h, for query heads from q0 on; the team's warp `rank` has blocks begin, begin + team ...
struct Part {
    int n, h, q0, part, parts, slot, pos, n_blocks, coded, begin, count, team, rank, warp;
    __device__ Part(const DecodeArgs &a, int task, int queries) : team(a.team), rank(threadIdx.x / 32 % a.team), warp(threadIdx.x / 32) {
        const KvView &kv = a.kv;
        const int heads = kv.Hkv * a.chunks, head = task % heads;
        n = task / heads % a.b.N, part = task / heads / a.b.N, h = head / a.chunks, q0 = head % a.chunks * queries;    // parts that few rows have come last
        slot = a.b.slot[n], pos = a.b.pos[n], n_blocks = pos / KV_BLOCK + 1, coded = max(0, min(kv.coded_end(pos), n_blocks) - kv.sink);
        parts = parts_of(coded, a.b.N <= FEW_ROWS ? BLOCKS_EACH : 1, a.room);
        begin = kv.sink + (int)((int64_t)coded * part / parts) + rank;
        const int end = kv.sink + (int)((int64_t)coded * (part + 1) / parts);
        count = there() && begin < end ? (end - begin + team - 1) / team : 0;
    }
    __device__ bool there() const { return part < parts; }
    __device__ void sync() const {    // the team's warps
        if (team == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + warp / team), "r"(32 * team) : "memory");
    }
};

// The part's queries, each by a warp of the team (one query by every warp for itself): a lane's pairs of all of them, and column g of a
// B operand of their integers, channels D/4 t + 4 i ..  Behind a head's last query comes that one again.  Returns (unit, half the sum of
// the integers) of query t.
template <class S, int Q> __device__ float2 prepare_queries(const DecodeArgs &a, const Part &p, float (&scaled)[Q][S::D / 32], uint32_t (&bq)[S::D / 16]) {
    constexpr int D = S::D, C = D / 32, PAIRS = D / 64, CODES = D * 4, UNIT = D * 6;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, last = min(Q, a.G - p.q0) - 1, last_rank = Q == 1 ? 0 : p.team - 1, rank = Q == 1 ? 0 : p.rank;
    auto at = [&](int q) { return S::slots(p.warp - rank + min(q, last_rank)) + S::SLOT + max(0, q - last_rank) * S::QUERY; };
    auto sync = [&] { Q == 1 ? __syncwarp() : p.sync(); };
#pragma unroll 1
    for (int q = rank; q <= last; q = rank < last_rank ? Q : q + 1) {
        const uint32_t to = at(q);
        Floats<C> x;
        load_query<D>(x.x, a, (int64_t)p.n * a.Hq + p.h * a.G + p.q0 + q, p.pos);
        Words<C> w;
        memcpy(&w, &x, sizeof w);
        store_shared(to + 4 * C * lane, w);
        hadamard_lanes(x.x);    // of channels in the order of (lower or upper half, lane, pair)
        float top = 1e-30f;
        for (int i = 0; i < C; i++) top = fmaxf(top, fabsf(x.x[i]));
        top = warp_max(top);
        const float inverse = 32512.0f / top;    // 127 * 256: hi fits a byte
        int sum = 0, v[C];
        for (int i = 0; i < C; i++) sum += v[i] = __float2int_rn(x.x[i] * inverse);
        for (int half = 0; half < 2; half++) {
            int8_t hi[PAIRS], lo[PAIRS];
            for (int i = 0; i < PAIRS; i++) lo[i] = (int8_t)(v[half * PAIRS + i] & 255), hi[i] = (int8_t)((v[half * PAIRS + i] - lo[i]) >> 8);
            uint8_t *const bytes = at_address(to + CODES + half * D / 2 + PAIRS * lane);
            memcpy(bytes, hi, PAIRS), memcpy(bytes + D, lo, PAIRS);
        }
        sum = warp_sum(sum);
        if (lane == 0) store_shared(to + UNIT, Words<2>{{__float_as_uint(top * (1 / 32512.0f)), __float_as_uint(0.5f * sum)}});
    }
    sync();
#pragma unroll
    for (int q = 0; q < Q; q++) {
        const Floats<C> x = load_shared<Floats<C>>(at(min(q, last)) + 4 * C * lane);
        for (int i = 0; i < C; i++) scaled[q][i] = x.x[i];
    }
    const uint32_t codes = at(Q == 1 ? 0 : min(g / 2, last)) + CODES + g % 2 * D + D / 4 * t;
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const uint4 v = load_shared<uint4>(codes + 16 * i);
        memcpy(bq + 4 * i, &v, 16);
    }
    const float2 unit = load_shared<float2>(at(Q == 1 ? 0 : min(t, last)) + UNIT);
    sync();
    return unit;
}

// Block j of the warp: its keys and its values come as soon as those whose place they take are done with, the mean of its keys before,
// when j / AHEAD * AHEAD starts.
template <class K, class V, class S> struct BlockRing {
    static constexpr int AHEAD = S::MEANS / 2;
    using KB = typename K::Block;
    using VB = typename V::Block;
    static_assert(S::MEAN <= 128, "a word a lane");
    int count, every;                                          // blocks, and from one to the next
    int table, base;                                           // where in the block table and in the table of angles the first one is
    const uint8_t *k_from, *v_from, *mean_from;                // of number 0, the lane's bytes
    uint32_t k_bytes, v_bytes, slots, means;                   // from one number to the next; the lane's first slots
    int next[AHEAD], after;                                    // numbers in the pool, from the next values to load on; the one behind

    __device__ void start(const DecodeArgs &a, const Part &p) {
        const uint8_t *const keys = a.kv.k_sealed + first(a, p) * S::SLOT_K, *const values = a.kv.v_sealed + first(a, p) * S::SLOT_V;
        count = p.count, every = p.team, table = p.slot * a.kv.max_blocks + p.begin, base = p.begin * K::d + K::d / 64 * lane();
        k_from = opaque(keys + 16 * lane()), v_from = opaque(values + 16 * lane()), mean_from = opaque(keys + offsetof(KB, mean) + 4 * lane());
        k_bytes = a.kv.Hkv * S::SLOT_K, v_bytes = a.kv.Hkv * S::SLOT_V;
        slots = opaque(S::slots(p.warp) + 16 * lane()), means = opaque(S::means(p.warp) + 4 * lane());
        if (count == 0) return;
        const int number = entry(a, 0);
        for (int i = 0; i < AHEAD; i++) next[i] = entry(a, i + 1);
        for (int i = 0; i < AHEAD; i++) load_mean(i, i == 0 ? number : next[i - 1]);
        load_keys(0, number);
        load_values(0, number);
    }
    // Block 1, when prepare_queries is done with its place.
    __device__ void load_second(const DecodeArgs &a) {
        if (count == 0) return;
        release_keys(a, -1);
        release_values(-1);
    }
    __device__ uint32_t keys_at(int j) const { return slots - 16 * lane() + j % 2 * S::SLOT; }
    __device__ uint32_t values_at(int j) const { return keys_at(j) + S::SLOT_K; }
    // What is in flight: keys, values, keys, values ...; that these of the block at work are there:
    __device__ void wait_keys() const { wait<3>(); }      // before the next are asked for
    __device__ void wait_values() const { wait<3>(); }    // after release_keys
    __device__ void wait_block() const { wait<2>(); }     // before it
    // All lanes are done with the keys, with the values, of block j.
    __device__ void release_keys(const DecodeArgs &a, int j) {
        after = entry(a, j + 2 + AHEAD);    // half a block before it is needed
        load_mean(j + 1 + AHEAD, next[AHEAD - 1]);
        load_keys(j + 2, next[0]);
    }
    __device__ void release_values(int j) {
        load_values(j + 2, next[0]);
        for (int i = 0; i < AHEAD - 1; i++) next[i] = next[i + 1];
        next[AHEAD - 1] = after;
    }
    // Cosines and sines at the start of blocks j .. j + AHEAD-1, pairs N lane ..
    template <int N> __device__ void load_base(const DecodeArgs &a, Floats<N> (&x)[AHEAD][2], int j) const {
        static_assert(N == K::d / 64);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const float *from = a.kv.rope.base + (base + min(j + i, count - 1) * every * K::d);
            x[i][0] = *(const Floats<N> *)from, x[i][1] = *(const Floats<N> *)(from + K::d / 2);
        }
    }

  private:
    __device__ static int lane() { return threadIdx.x % 32; }
    __device__ static int64_t first(const DecodeArgs &a, const Part &p) { return (int64_t)a.layer * a.kv.n_blocks * a.kv.Hkv + p.h; }    // as kv.sealed_at
    __device__ int entry(const DecodeArgs &a, int j) const {
        int number;    // asked for here, not where it is needed
        asm volatile("ld.global.s32 %0, [%1];" : "=r"(number) : "l"(a.kv.table + table + min(j, count - 1) * every));
        return number;
    }
    __device__ void load_mean(int j, int number) const {
        copy_async4(means + j % S::MEANS * S::MEAN_STEP, mean_from + (uint64_t)(uint32_t)number * k_bytes, j < count && lane() < S::MEAN / 4);
    }
    // `from` and `to` are the lane's.
    template <int BYTES> __device__ static void copy(uint32_t to, const uint8_t *from, bool wanted) {
#pragma unroll
        for (int at = 0; at < BYTES; at += 512) copy_async16(to + at, from + at, wanted && (at + 512 <= BYTES || at + 16 * lane() < BYTES));
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ void load_keys(int j, int number) const { copy<S::SLOT_K>(slots + j % 2 * S::SLOT, k_from + (uint64_t)(uint32_t)number * k_bytes, j < count); }
    __device__ void load_values(int j, int number) const { copy<S::SLOT_V>(slots + j % 2 * S::SLOT + S::SLOT_K, v_from + (uint64_t)(uint32_t)number * v_bytes, j < count); }
    template <int IN_FLIGHT> __device__ static void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory");
        __syncwarp();
    }
};

// The tasks of a team, one after the other.
template <class K, class V, class S, int Q> struct Turns {
    const int tasks, teams;
    int task;
    Part p;
    BlockRing<K, V, S> ring;
    __device__ Turns(const DecodeArgs &a)
        : tasks(a.b.N * a.kv.Hkv * a.chunks * a.reach), teams(gridDim.x * (S::WARPS / a.team)), task(blockIdx.x + gridDim.x * (threadIdx.x / 32 / a.team)), p(a, task, Q) {}
    // Tables and first blocks; false: there is nothing to do for this thread block.  Positions and block tables are there before the
    // step's first kernel, so are blocks that the step does not seal.
    __device__ bool start(const DecodeArgs &a) {
        Tables<K, V, S> tables;
        tables.load(a.kv);
        const bool one_task = teams == tasks && a.team == S::WARPS;
        if (one_task && !p.there()) return false;
        if (a.seals) wait_for_inputs();
        ring.start(a, p);
        if (!one_task || p.coded > 0) tables.store();
        wait_for_inputs();
        return true;
    }
    __device__ void go_on(const DecodeArgs &a) {
        if ((task += teams) >= tasks) return;
        p = Part(a, task, Q);
        ring.start(a, p);
    }
};

// Exact tokens of the part, then both together.  Lane q has m and l of query q's codes; coded(q, c): their sum for channel D/32 lane + c.
template <class S, int Q, class Coded>
__device__ void finish_warp(const DecodeArgs &a, const Part &p, const float (&scaled)[Q][S::D / 32], float m, float l, Coded coded) {
    constexpr int D = S::D, C = D / 32;
    const KvView &kv = a.kv;
    const int n_queries = min(Q, a.G - p.q0);
    const int64_t first = (int64_t)p.n * a.Hq + p.h * a.G + p.q0;
    ExactTokens<D, Q> tokens;
    const int exact = p.n_blocks - p.coded, groups = (exact - 1) * GROUPS + p.pos % KV_BLOCK / GROUP + 1;    // sinks, then from coded_end on
#pragma unroll 1
    for (int i = p.part + (p.team - 1 - p.rank) * p.parts; i < groups; i += p.parts * p.team) {    // last warps have fewer blocks
        const int e = i / GROUPS, block = e < kv.sink ? e : e + p.coded, t0 = i % GROUPS * GROUP, own = p.pos - block * KV_BLOCK;
        const int64_t rows = kv.exact_at(a.layer, p.slot, p.h, block);
        const OwnRow own_rows = own_row<D>(a, p.n, p.slot, p.h, p.pos, i == groups - 1, (f16 *)at_address(S::warp_at(p.warp)));
        tokens.load_keys(kv.k_exact + rows, own_rows.k, t0, own);
        tokens.load_values(kv.v_exact + rows, own_rows.v, t0, own);
        tokens.turn_queries([&](int q, int i) { return scaled[q][i]; }, kv.rope.base + (int64_t)block * D);
        tokens.add_values(tokens.scores(kv.rope.step, t0, own));
    }
    float m_of[Q], l_of[Q];
    tokens.totals(m_of, l_of);
#pragma unroll
    for (int q = 0; q < Q; q++) {
        const float m_coded = __shfl_sync(~0u, m, q), l_coded = __shfl_sync(~0u, l, q), both = fmaxf(m_of[q], m_coded);
        const float exact_weight = merge_weight(m_of[q], both), coded_weight = merge_weight(m_coded, both);
        m_of[q] = both, l_of[q] = l_of[q] * exact_weight + l_coded * coded_weight;
        for (int c = 0; c < C; c++) tokens.o[q][c] = tokens.o[q][c] * exact_weight + coded(q, c) * coded_weight;
    }
    __syncwarp();    // all have read what coded reads
    auto result = [&](int w) -> WarpResult<D, Q> & { return *(WarpResult<D, Q> *)at_address(S::slots(p.warp - p.rank + w)); };
    result(p.rank).put(m_of, l_of, tokens.o);
    p.sync();
    merge_warps<D, Q>(a, first, n_queries, p.part, p.parts, p.rank, p.team, result);
    p.sync();
}

// ---- formats ------------------------------------------------------------------------------------------------
// Formats with codewords of `channels` channels.
template <class Format, class = void> constexpr bool is_nsn = false;
template <class Format> constexpr bool is_nsn<Format, decltype((void)Format::channels)> = Format::has_code && Format::has_plain;
// f(K{}, V{}) of the cache's formats.
template <int D, class Function> void with_nsn_at(const KvView &kv, Function f) {
    with_format_at<D>(kv.k_format, [&](auto k) {
        with_format_at<D>(kv.v_format, [&](auto v) {
            using K = decltype(k);
            using V = decltype(v);
            if constexpr (is_nsn<K> && is_nsn<V>) f(K(), V());
        });
    });
}
template <class Function> void with_nsn(const KvView &kv, Function f) { kv.d == 64 ? with_nsn_at<64>(kv, f) : with_nsn_at<128>(kv, f); }
template <class S> void launch_codes(void (*kernel)(DecodeArgs), const DecodeArgs &a) {
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES);    // S: of one kernel
    CUDA_CHECK(allowed);
    const int64_t tasks = (int64_t)a.b.N * a.kv.Hkv * a.chunks * a.reach;
    launch(kernel, dim3((unsigned)std::min<int64_t>(tasks, sm_count)), 32 * S::WARPS, S::BYTES, a);
}
void decode_codes_one(const DecodeArgs &a);    // decode_codes_mha.cu: G = 1
}    // namespace cuda
