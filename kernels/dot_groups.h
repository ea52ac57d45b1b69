// dot_groups.h - dot.h for weights in q8 and q4 (groups.h): codes become f32 on their way from memory to the multiply-add.
//
// Every result is the sum that dot.h would give for the same weights in f32, bit for bit: scale times code is exact, and lane j
// adds the products of i = j, j + 16, ... in order.
#pragma once
#include "dot.h"
#include "groups.h"

// How far ahead of the multiply-add codes are asked for: rows are short (256 bytes at D = 512 in q4), those of the next turn would
// come too late.
constexpr int PREFETCH_BYTES = 4096;

// Rows of one type: where a row's codes and scales begin, how far it is to the next.
struct Q8Rows {
    const int8_t *code;
    const f16 *scale;
    int64_t in;
    Q8Rows from(int64_t row) const { return {code + row * in, scale + row * (in / GROUP), in}; }
    const int8_t *group(int64_t row, int64_t g) const { return code + row * in + g * GROUP; }
    static constexpr int GROUP_BYTES = GROUP, ZERO = 0;    // ZERO: the code that means 0
};
struct Q4Rows {
    const uint8_t *code;
    const f16 *scale;
    int64_t in;
    Q4Rows from(int64_t row) const { return {code + row * (in / 2), scale + row * (in / GROUP), in}; }
    const uint8_t *group(int64_t row, int64_t g) const { return code + row * (in / 2) + g * (GROUP / 2); }
    static constexpr int GROUP_BYTES = GROUP / 2, ZERO = 8;
};

// NATIVE bytes as 32-bit integers.  (gcc 12 makes a dozen instructions of __builtin_convertvector here.)
LANE_FUNCTION vni widen_bytes(const int8_t *p) {
#if defined(__AVX512F__)
    return (vni)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vni)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vni x;
    for (int i = 0; i < NATIVE; i++) x[i] = p[i];
    return x;
#endif
}
LANE_FUNCTION vni widen_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (vni)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (vni)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    vni x;
    for (int i = 0; i < NATIVE; i++) x[i] = p[i];
    return x;
#endif
}

// The 32 weights of a group: its codes times s, and least, which is -ZERO s: exact.
// q4 with AVX2, the 46M model on one thread: 324 tok/s with 8 taken off each code, 335 with -8 s made for each group, 369 so.
LANE_FUNCTION void load_group(f32x16 (&w)[2], const int8_t *code, float s, float) {
    const f32x16 scale = splat16(s);
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < PARTS; i++)
            w[h].part[i] = __builtin_convertvector(widen_bytes(code + 16 * h + i * NATIVE), vn) * scale.part[i];
}
LANE_FUNCTION void load_group(f32x16 (&w)[2], const uint8_t *code, float s, [[maybe_unused]] float least) {
#if defined(__AVX512F__)
    // A register of 16 floats is the table of what a code means; the lookup takes four bits of an index and ignores the others.
    // Zen 4, matmul of 128 rows of 2,048 again and again, two threads: 24 GB/s, from memory 23 (q8 38 and 26).  Of 7 instructions for 32 weights
    // 4 are shuffles and shifts.  Tried: a conversion and a multiply-add for one of the two lookups, 20 GB/s.
    const __m512 table = _mm512_mul_ps(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_ps(s));
    const __m512i codes = (__m512i)widen_bytes(code);
    w[0].part[0] = (vn)_mm512_permutexvar_ps(codes, table);
    w[1].part[0] = (vn)_mm512_permutexvar_ps(_mm512_maskz_srli_epi32(0xffff, codes, 4), table);
#else
    const f32x16 scale = splat16(s), lowest = splat16(least);
    for (int i = 0; i < PARTS; i++) {
        const vni codes = widen_bytes(code + i * NATIVE);
        w[0].part[i] = __builtin_convertvector(codes & 15, vn) * scale.part[i] + lowest.part[i];
        w[1].part[i] = __builtin_convertvector(codes >> 4, vn) * scale.part[i] + lowest.part[i];
    }
#endif
}

// y[c] = sum_i x[i] W[c,i], as dot_tile; x (in).
template <int C, class Rows> LANE_FUNCTION void dot_groups_tile(float *y, const float *x, const Rows &W) {
    constexpr int LINE_GROUPS = CACHE_LINE / Rows::GROUP_BYTES, TOGETHER = PARTS == 1 ? C : 1;    // outputs whose weights fit in registers
    const int64_t in = W.in, groups = in / GROUP;
    const int64_t ahead = ceil_div(PREFETCH_BYTES, C * groups * Rows::GROUP_BYTES) * C;    // rows
    f32x16 sum[1][C];
    for (int c = 0; c < C; c++) sum[0][c] = splat16(0.0f);
    for (int64_t first = 0; first < groups; first += LANES) {
        // Scales of 16 groups at once: one conversion, then broadcasting loads.  The last 16 may repeat some.
        const int64_t end = groups - first < LANES ? groups : first + LANES, from = end < LANES ? 0 : end - LANES;
        float s[C][LANES], least[C][LANES];
        for (int c = 0; c < C; c++) {
            const f16 *scale = W.scale + c * groups + from;
            __builtin_prefetch(scale + ahead * groups);
            if (groups >= LANES) store16(s[c], load16(scale));
            else
                for (int i = 0; i < groups; i++) s[c][i] = to_f32(scale[i]);
            store16(least[c], load16(s[c]) * splat16(-Rows::ZERO));
        }
        for (int64_t g = first; g < end; g++) {
            if (g % LINE_GROUPS == 0)
                for (int c = 0; c < C; c++) __builtin_prefetch(W.group(ahead + c, g));
            for (int c = 0; c < C; c += TOGETHER) {
                f32x16 w[TOGETHER][2];
                for (int i = 0; i < TOGETHER; i++) load_group(w[i], W.group(c + i, g), s[c + i][g - from], least[c + i][g - from]);
                for (int h = 0; h < 2; h++) {
                    const f32x16 xh = load16(x + g * GROUP + h * LANES);
                    for (int i = 0; i < TOGETHER; i++) add_product(sum[0][c + i], xh, w[i][h]);
                }
            }
        }
    }
    store_sums(y, sum, 0);
}

// The same for up to DOT_OUT outputs and any number of rows.
template <class Rows> static void dot_groups(float *y, const float *x, const Rows &W, int rows, int outs, int64_t y_stride) {
    for (int r = 0; r < rows; r++) {
        if (outs == DOT_OUT) dot_groups_tile<DOT_OUT>(y + r * y_stride, x + r * W.in, W);
        else
            for (int c = 0; c < outs; c++) dot_groups_tile<1>(y + r * y_stride + c, x + r * W.in, W.from(c));
    }
}

// n weights, whole groups from the start of `W`, as f32.
template <class Rows> static void widen_groups(float *to, const Rows &W, int64_t n) {
    for (int64_t g = 0; g < n / GROUP; g++) {
        f32x16 w[2];
        const float s = to_f32(W.scale[g]);
        load_group(w, W.group(0, g), s, -Rows::ZERO * s);
        store16(to + g * GROUP, w[0]), store16(to + g * GROUP + LANES, w[1]);
    }
}
