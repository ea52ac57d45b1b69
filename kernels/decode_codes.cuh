// decode_codes.cuh - what the kernels over codes share: shared memory, codebook tables, fields of a block.  decode_codes.cu says
// what lies where.
#pragma once
#include "attention_decode.cuh"

namespace cuda {

constexpr int BLOCKS_EACH = 8;    // at least, of a part that a thread block has
constexpr uint32_t TABLE = 65536, ABOVE = 2 * TABLE, START = 1024, END = 228 * 1024;    // addresses in shared memory

template <class K, class V> struct Layout {
    static constexpr int D = K::d;
    static constexpr bool ALIKE = std::is_same_v<K, V>;
    // A block and what is before it in its first 16 bytes.
    static constexpr int span(int bytes) { return (bytes + (bytes % 16 ? 16 - (bytes & -bytes) : 0) + 15) / 16 * 16; }
    static constexpr int SLOT_K = span(sizeof(typename K::Block)), SLOT_V = span(sizeof(typename V::Block)), SLOT = SLOT_K + SLOT_V;
    static constexpr int MEAN = sizeof(Mean<D>), E_BYTES = KV_BLOCK * D * 2, FACTORS = KV_BLOCK * 16, Z = 8 * D / 2 * 4;
    static constexpr int WARP = (2 * SLOT + Z + (ALIKE ? 0 : FACTORS) + 4 * MEAN + 15) / 16 * 16;
    static constexpr int E_AT = START, BELOW_AT = START + (ALIKE ? 0 : E_BYTES), BELOW = ((int)TABLE - BELOW_AT) / WARP;
    static constexpr int WARPS = BELOW + (int)(END - ABOVE) / WARP < CODE_WARPS ? BELOW + (int)(END - ABOVE) / WARP : CODE_WARPS;
    static constexpr int BYTES = (int)ABOVE + (WARPS > BELOW ? WARPS - BELOW : 0) * WARP - (int)START;
    static_assert(WARPS >= 4 && sizeof(WarpResult<D, QUERIES>) <= 2 * SLOT && E_BYTES / 128 + CODE_WARPS * FACTORS / 128 <= 256, "does not fit");
    __device__ static uint32_t warp_at(int w) { return w < BELOW ? BELOW_AT + w * WARP : ABOVE + (w - BELOW) * WARP; }
    // The second halves of the codebook's rows hold E, then the token factors: 8 lanes' 16 bytes a row.
    static constexpr uint32_t BESIDE = TABLE + 128, FRAGMENT = ALIKE ? 1024 : 512, ROW = ALIKE ? 256 : 128;    // from one fragment, or 128 bytes of factors, to the next
    __device__ static uint32_t E(int lane) { return ALIKE ? BESIDE + lane / 8 * 256 + lane % 8 * 16 : E_AT + lane * 16; }
    __device__ static uint32_t factors(int w) { return ALIKE ? BESIDE + E_BYTES * 2 + w * FACTORS * 2 : warp_at(w) + 2 * SLOT + Z; }
    __device__ static uint32_t means(int w) { return warp_at(w) + WARP - 4 * MEAN; }
};

// ---- shared memory by address -------------------------------------------------------------------------------
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
template <int BYTES> __device__ inline void copy_async(uint32_t to, const uint8_t *from) {
    if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// ---- fields of a block --------------------------------------------------------------------------------------
// BYTES neighbouring bytes as words.
template <int BYTES, bool ALIGNED8> __device__ inline void load_bytes(uint32_t (&w)[BYTES < 4 ? 1 : BYTES / 4], uint32_t at) {
    if constexpr (BYTES == 1) w[0] = load_shared<uint8_t>(at);
    else if constexpr (BYTES == 2) w[0] = load_shared<uint16_t>(at);
    else if constexpr (BYTES == 4 || !ALIGNED8) {
#pragma unroll
        for (int i = 0; i < BYTES / 4; i++) w[i] = load_shared<uint32_t>(at + 4 * i);
    } else {
#pragma unroll
        for (int i = 0; i < BYTES / 8; i++) {
            const uint2 v = load_shared<uint2>(at + 8 * i);
            w[2 * i] = v.x, w[2 * i + 1] = v.y;
        }
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
// One copy of codeword k for every lane that reads it alone.
template <int C, int WARPS> __device__ void fill_table(uint32_t table, const int8_t *codebook) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int EACH = (256 + WARPS - 1) / WARPS;
    uint32_t v[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int k = min(warp + i * WARPS, 255);
        if constexpr (C == 2) v[i] = *(const uint16_t *)(codebook + 2 * k) * 0x10001u;
        else v[i] = *(const uint32_t *)(codebook + k * C + (C == 8 ? lane % 2 * 4 : 0));
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (warp + i * WARPS < 256) store_shared(table + (warp + i * WARPS) * 256 + lane * 4, v[i]);
}
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

// Formats with codewords of `channels` channels.
template <class Format, class = void> constexpr bool is_nsn = false;
template <class Format> constexpr bool is_nsn<Format, decltype((void)Format::channels)> = Format::has_code && Format::has_plain;
}    // namespace cuda
