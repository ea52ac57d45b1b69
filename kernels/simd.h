// simd.h - sixteen f32 lanes, for the fast CPU sections: one AVX-512 register, two of AVX2, four of SSE or NEON.
//
// The arithmetic is the same lane by lane on all of them and lanes are added in a fixed tree, so a sum has one order
// everywhere.  (With -ffp-contract=fast, gcc's default, a*b + c is rounded once where the machine has FMA, else twice.)
#pragma once
#include <cmath>
#include <cstring>
#include "base.h"
#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"    // gcc 12 warns about its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
constexpr int PARTS = LANES / NATIVE;
#define LANE_FUNCTION static inline __attribute__((always_inline))

typedef float vn __attribute__((vector_size(NATIVE * 4)));                  // one machine register
typedef int32_t vni __attribute__((vector_size(NATIVE * 4)));
typedef int16_t vnh __attribute__((vector_size(NATIVE * 4)));               // 2 NATIVE of them
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef float vn_in_memory __attribute__((vector_size(NATIVE * 4), aligned(4), may_alias));
struct f32x16 { vn part[PARTS]; };

LANE_FUNCTION f32x16 load16(const float *p) {
    f32x16 x;
    for (int i = 0; i < PARTS; i++) x.part[i] = *(const vn_in_memory *)(p + i * NATIVE);
    return x;
}
LANE_FUNCTION f32x16 load16(const bf16 *p) {
    typedef uint16_t halves __attribute__((vector_size(NATIVE * 2), aligned(2), may_alias));
    f32x16 x;
    for (int i = 0; i < PARTS; i++) x.part[i] = (vn)(__builtin_convertvector(*(const halves *)(p + i * NATIVE), vni) << 16);
    return x;
}
LANE_FUNCTION f32x16 load16(const f16 *p) {
    f32x16 x;
#if defined(__AVX512F__)
    x.part[0] = (vn)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    for (int i = 0; i < PARTS; i++) x.part[i] = (vn)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i * NATIVE)));
#else    // exponent and fraction move up and 2^112 makes up for the other bias, subnormals too; infinity and NaN get all exponent bits
    typedef uint16_t halves __attribute__((vector_size(NATIVE * 2), aligned(2), may_alias));
    for (int i = 0; i < PARTS; i++) {
        const vni h = __builtin_convertvector(*(const halves *)(p + i * NATIVE), vni), size = (h & 0x7fff) << 13;
        x.part[i] = (vn)((vni)((vn)size * 0x1p112f) | ((size >= 31 << 23) & 0x7f800000) | (h & 0x8000) << 16);
    }
#endif
    return x;
}
// Integers, widened; from int32 they are rounded.
LANE_FUNCTION f32x16 load16(const int32_t *p) {
    typedef int32_t ints __attribute__((vector_size(NATIVE * 4), aligned(4), may_alias));
    f32x16 x;
    for (int i = 0; i < PARTS; i++) x.part[i] = __builtin_convertvector((vni)*(const ints *)(p + i * NATIVE), vn);
    return x;
}
LANE_FUNCTION f32x16 load16(const uint8_t *p) {
    f32x16 x;
#if defined(__AVX512F__)    // gcc 12 converts bytes one by one
    x.part[0] = (vn)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i *)p)));
#else
    for (int i = 0; i < LANES; i++) x.part[i / NATIVE][i % NATIVE] = p[i];
#endif
    return x;
}
// 16 nibbles of 8 bytes, the low half of a byte first.
LANE_FUNCTION f32x16 load16_nibbles(const uint8_t *p) {
    typedef uint8_t v16b __attribute__((vector_size(16)));
    typedef uint64_t v2l __attribute__((vector_size(16)));
    uint64_t pairs;
    memcpy(&pairs, p, sizeof pairs);
    const v16b x = (v16b)(v2l{pairs, pairs >> 4} & 0x0f0f0f0f0f0f0f0f);
    const v16b in_turn = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15}, y = __builtin_shuffle(x, in_turn);
    return load16((const uint8_t *)&y);
}
LANE_FUNCTION void store16(float *p, f32x16 x) {
    for (int i = 0; i < PARTS; i++) *(vn_in_memory *)(p + i * NATIVE) = x.part[i];
}
// Whole numbers of 0..65535, in two bytes.
LANE_FUNCTION void store16(uint8_t *high, uint8_t *low, f32x16 x) {
#if defined(__AVX512F__)
    const __m512i v = _mm512_maskz_cvttps_epi32(0xffff, (__m512)x.part[0]);
    _mm_storeu_si128((__m128i *)high, _mm512_maskz_cvtepi32_epi8(0xffff, _mm512_maskz_srli_epi32(0xffff, v, 8)));
    _mm_storeu_si128((__m128i *)low, _mm512_maskz_cvtepi32_epi8(0xffff, v));
#else
    for (int i = 0; i < LANES; i++) high[i] = (uint8_t)((int)x.part[i / NATIVE][i % NATIVE] >> 8), low[i] = (uint8_t)(int)x.part[i / NATIVE][i % NATIVE];
#endif
}
LANE_FUNCTION f32x16 truncate16(f32x16 x) {
    for (int i = 0; i < PARTS; i++) x.part[i] = __builtin_convertvector(__builtin_convertvector(x.part[i], vni), vn);
    return x;
}
LANE_FUNCTION f32x16 splat16(float x) {
    f32x16 y;
    for (int i = 0; i < PARTS; i++) y.part[i] = x - vn{};
    return y;
}
LANE_FUNCTION f32x16 splat16(f16 h) {
#if defined(__AVX512F__)
    f32x16 y;
    y.part[0] = (vn)_mm512_maskz_cvtph_ps(0xffff, _mm256_set1_epi16((short)h.bits));
    return y;
#else
    return splat16(to_f32(h));
#endif
}
LANE_FUNCTION f32x16 operator+(f32x16 a, f32x16 b) {
    for (int i = 0; i < PARTS; i++) a.part[i] += b.part[i];
    return a;
}
LANE_FUNCTION f32x16 operator*(f32x16 a, f32x16 b) {
    for (int i = 0; i < PARTS; i++) a.part[i] *= b.part[i];
    return a;
}
// The larger of a and b; a where either is NaN, as std::max has it.
LANE_FUNCTION f32x16 max16(f32x16 a, f32x16 b) {
    for (int i = 0; i < PARTS; i++) a.part[i] = a.part[i] < b.part[i] ? b.part[i] : a.part[i];
    return a;
}
// The last lane first.
LANE_FUNCTION f32x16 reverse16(f32x16 x) {
    f32x16 y;
    vni last_first;
    for (int i = 0; i < NATIVE; i++) last_first[i] = NATIVE - 1 - i;
    for (int i = 0; i < PARTS; i++) y.part[i] = __builtin_shuffle(x.part[PARTS - 1 - i], last_first);
    return y;
}
LANE_FUNCTION void add_product(f32x16 &sum, f32x16 a, f32x16 b) {
    for (int i = 0; i < PARTS; i++) sum.part[i] += a.part[i] * b.part[i];
}

// 16 lanes to 4: lane i takes i + 8, then i + 4.
LANE_FUNCTION v4 fold16(f32x16 x) {
    union { f32x16 all; v4 quarter[4]; } u = {x};
    return (u.quarter[0] + u.quarter[2]) + (u.quarter[1] + u.quarter[3]);
}
// The sums of four vectors (v4 or v4i): lane i takes i + 2, then i + 1.
template <class V> LANE_FUNCTION V sum4(V a, V b, V c, V d) {
    const v4i front = {0, 1, 4, 5}, back = {2, 3, 6, 7}, even = {0, 2, 4, 6}, odd = {1, 3, 5, 7};
    const V ab = __builtin_shuffle(a, b, front) + __builtin_shuffle(a, b, back);
    const V cd = __builtin_shuffle(c, d, front) + __builtin_shuffle(c, d, back);
    return __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, odd);
}
LANE_FUNCTION float sum16(f32x16 x) {
    const v4 a = fold16(x);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

LANE_FUNCTION float largest16(f32x16 x) {
    union { f32x16 all; v4 quarter[4]; } u = {x};
    const v4 a = u.quarter[0] < u.quarter[2] ? u.quarter[2] : u.quarter[0], b = u.quarter[1] < u.quarter[3] ? u.quarter[3] : u.quarter[1], c = a < b ? b : a;
    const float d = c[0] < c[2] ? c[2] : c[0], e = c[1] < c[3] ? c[3] : c[1];
    return d < e ? e : d;
}

// 16-bit numbers: lane i is a_2i b_2i + a_2i+1 b_2i+1.
LANE_FUNCTION vni pair_products(vnh a, vnh b) {
#if defined(__AVX512BW__)
    return (vni)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (vni)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (vni)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((vni)a << 16 >> 16) * ((vni)b << 16 >> 16) + ((vni)a >> 16) * ((vni)b >> 16);
#endif
}
LANE_FUNCTION v4i fold4(vni x) {    // NATIVE lanes to 4
    union { vni all; v4i quarter[PARTS == 1 ? 4 : PARTS == 2 ? 2 : 1]; } u = {x};
    v4i sum = u.quarter[0];
    for (int i = 1; i < NATIVE / 4; i++) sum += u.quarter[i];
    return sum;
}

// e^x for x <= 0 (softmax, sigmoid), relative error below 2e-7; below -87.3 the result is 0.
// x = n ln 2 + r with |r| <= ln(2)/2; e^r by its Taylor polynomial of degree 7 (error 2^-27), 2^n through the exponent bits.
LANE_FUNCTION f32x16 exp16(f32x16 x) {
    for (int i = 0; i < PARTS; i++) {
        const vni alive = x.part[i] > -87.3f;
        const vn y = (vn)((vni)x.part[i] & alive);              // dead lanes compute e^0 and are cleared at the end
        const float magic = 12582912.0f;                        // 1.5 2^23: adding it rounds to an integer
        const vn n = (y * 1.44269504f + magic) - magic;
        const vn r = (y - n * 0.693359375f) - n * -2.12194440e-4f;    // ln 2 in two parts: the first product is exact
        vn e = r * (1.0f / 5040) + 1.0f / 720;
        e = e * r + 1.0f / 120;
        e = e * r + 1.0f / 24;
        e = e * r + 1.0f / 6;
        e = e * r + 0.5f;
        e = e * r + 1.0f;
        e = e * r + 1.0f;
        e *= (vn)((__builtin_convertvector(n, vni) + 127) << 23);
        x.part[i] = (vn)((vni)e & alive);
    }
    return x;
}
