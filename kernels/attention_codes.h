// attention_codes.h - scores and sums over the codes of a sealed NSN block, in 8-bit integers (AVX-512 VBMI and VNNI).
//
// A codebook entry is (index + 1/2) delta with an 8-bit index, so codewords need not be widened to be multiplied:
//
//   look up   64 code bytes at once, channel by channel: plane c holds byte c of all 256 entries in four registers, two
//             permutes and a select give 64 of them.  nsn2: the sign bit flips all bits, ~i + 1/2 = -(i + 1/2).
//   scores    q is 16 bits in two signed bytes (hi 256 + lo) of one scale per query; vpdpbusd multiplies four code bytes by
//             four query bytes and adds: exact in 32 bits.  It wants one side unsigned, so codes are offset by 128 and
//             128 sum q is taken off again, with the 1/2 sum q of the grid.
//   values    weights p s1 s2 delta are 16 bits in two unsigned bytes of one scale per block and query.  Four tokens of one
//             code position are put side by side, so a lane keeps one channel and nothing is added across lanes.
//
// Error: q to 2^-16 of its largest channel, weights to 2^-17 of the block's largest; everything between is exact.
// Work for 64 tokens at d = 128, 4 channels a byte, 4 queries: 800 look-ups and permutes, 2,048 multiply-adds of 64 bytes;
// fp16 rows take 1,024 conversions, 512 turns of 16 lanes and 4,096 multiply-adds of 16.
//
// Sums of code values are kept plane by plane: channel C j + c stands at c n_codes + j until codes_in_order().
#pragma once
#include "kv_block.h"
#include "simd.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
constexpr bool HAVE_CODE_KERNELS = true;

// Scratch of one block: staged bytes of all channels, (C, 64 tokens x n_codes) for scores, (n_codes/16, C, 16, 16 x 4) for values.
struct CodeScratch {
    alignas(64) uint8_t bytes[KV_BLOCK * 128], turned[KV_BLOCK * 64], turned_sign[KV_BLOCK * 64];
};

// Queries in two bytes: (M, C, 64) each, the n_codes bytes of a plane repeated to fill a register.
struct CodeQueries {
    std::vector<int8_t> hi, lo;
    std::vector<float> scale;
    std::vector<int> sum;    // of the 16-bit values
};

struct Planes { alignas(64) uint8_t byte[8][256]; };
inline Planes make_planes(const int8_t *codebook, int C, uint8_t flip) {
    Planes p{};
    for (int k = 0; k < 256; k++)
        for (int c = 0; c < C; c++) p.byte[c][k] = (uint8_t)codebook[k * C + c] ^ flip;
    return p;
}

LANE_FUNCTION __m512i look_up(__m512i code, const uint8_t *plane) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(plane), code, _mm512_load_si512(plane + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), code, _mm512_load_si512(plane + 192));
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(code), high);
}
// The bits of value flipped where bit c of sign is set.
LANE_FUNCTION __m512i flip_signs(__m512i value, __m512i sign, int c) {
    return _mm512_xor_si512(value, _mm512_movm_epi8(_mm512_test_epi8_mask(sign, _mm512_set1_epi8((char)(1 << c)))));
}

inline void code_queries(CodeQueries &to, const float *Rq, int M, int d, int C, int stride) {
    const int n_codes = d / C;
    to.hi.assign((size_t)M * C * 64, 0), to.lo.assign((size_t)M * C * 64, 0), to.scale.assign(M, 0), to.sum.assign(M, 0);
    for (int m = 0; m < M; m++) {
        const float *q = Rq + (int64_t)m * stride;
        float largest = 0;
        for (int i = 0; i < d; i++) largest = std::max(largest, std::fabs(q[i]));
        const float scale = largest / 32512.0f, inverse = largest > 0 ? 1.0f / scale : 0.0f;    // 32512 = 127 256: hi stays within a byte
        to.scale[m] = scale;
        for (int i = 0; i < d; i++) {
            const int x = (int)std::nearbyint(q[i] * inverse), hi = (x + 128) >> 8;
            to.sum[m] += x;
            for (int at = i / C; at < 64; at += n_codes) {
                to.hi[((size_t)m * C + i % C) * 64 + at] = (int8_t)hi;
                to.lo[((size_t)m * C + i % C) * 64 + at] = (int8_t)(x - hi * 256);
            }
        }
    }
}

// score[m,t] = (R q_m) . code_t for the 64 tokens, without s1 s2 (which scale[t] holds, with delta): M rows of KV_BLOCK.
template <int C> static void code_scores(float *score, CodeScratch &s, const CodeQueries &q, int M, const NsnFields &f, const Planes &planes, const float *scale) {
    const int n_codes = f.d / C, registers = n_codes;    // 64 tokens x n_codes bytes
    for (int z = 0; z < registers; z++) {
        const __m512i code = _mm512_loadu_si512(f.code + z * 64);
        for (int c = 0; c < C; c++) {
            __m512i v = look_up(code, planes.byte[c]);
            if (f.sign) v = flip_signs(v, _mm512_loadu_si512(f.sign + z * 64), c);
            _mm512_store_si512(s.bytes + (c * registers + z) * 64, v);
        }
    }
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int m = 0; m < M; m++) {
        __m512i sum[64], q_hi[C], q_lo[C];
        for (int c = 0; c < C; c++) q_hi[c] = _mm512_loadu_si512(&q.hi[((size_t)m * C + c) * 64]), q_lo[c] = _mm512_loadu_si512(&q.lo[((size_t)m * C + c) * 64]);
        for (int z = 0; z < registers; z++) {
            __m512i hi = _mm512_setzero_si512(), lo = hi;
            for (int c = 0; c < C; c++) {
                const __m512i v = _mm512_load_si512(s.bytes + (c * registers + z) * 64);
                hi = _mm512_dpbusd_epi32(hi, v, q_hi[c]), lo = _mm512_dpbusd_epi32(lo, v, q_lo[c]);
            }
            sum[z] = _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo);
        }
        for (int n = registers; n > 4; n /= 2)    // neighbouring lanes of a token are added until it has one
            for (int i = 0; i < n / 2; i++)
                sum[i] = _mm512_add_epi32(_mm512_permutex2var_epi32(sum[2 * i], even, sum[2 * i + 1]), _mm512_permutex2var_epi32(sum[2 * i], odd, sum[2 * i + 1]));
        const __m512i offset = _mm512_set1_epi32(128 * q.sum[m]);
        const __m512 half = _mm512_set1_ps(0.5f * q.sum[m]), unit = _mm512_set1_ps(q.scale[m]);
        for (int i = 0; i < 4; i++) {
            const __m512 x = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i], offset)), half);
            _mm512_storeu_ps(score + m * KV_BLOCK + i * 16, _mm512_mul_ps(_mm512_mul_ps(x, unit), _mm512_loadu_ps(scale + i * 16)));
        }
    }
}

// Rows of 16 code bytes of four tokens, 4 by 4: byte 4 j + i of the result is code j of token i.
LANE_FUNCTION __m512i turn_4(const uint8_t *code, int64_t row) {
    __m128i x[4], y[4];
    for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)(code + i * row));
    y[0] = _mm_unpacklo_epi8(x[0], x[1]), y[1] = _mm_unpackhi_epi8(x[0], x[1]), y[2] = _mm_unpacklo_epi8(x[2], x[3]), y[3] = _mm_unpackhi_epi8(x[2], x[3]);
    const __m256i low = _mm256_set_m128i(_mm_unpackhi_epi16(y[0], y[2]), _mm_unpacklo_epi16(y[0], y[2]));
    const __m256i high = _mm256_set_m128i(_mm_unpackhi_epi16(y[1], y[3]), _mm_unpacklo_epi16(y[1], y[3]));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// o[m, c n_codes + j] += sum_t p[m,t] scale[t] code_t[C j + c]; rows of o are o_stride apart.
template <int C> static void code_sums(float *o, CodeScratch &s, const float *p, int M, const NsnFields &f, const Planes &planes, const float *scale, int o_stride) {
    const int n_codes = f.d / C, chunks = n_codes / 16;
    for (int k = 0; k < chunks; k++)
        for (int g = 0; g < 16; g++) {
            const __m512i code = turn_4(f.code + g * 4 * n_codes + k * 16, n_codes);
            const __m512i sign = f.sign ? turn_4(f.sign + g * 4 * n_codes + k * 16, n_codes) : code;
            for (int c = 0; c < C; c++) {
                __m512i v = look_up(code, planes.byte[c]);
                if (f.sign) v = flip_signs(v, sign, c);
                _mm512_store_si512(s.bytes + (((k * C + c) * 16) + g) * 64, v);
            }
        }
    constexpr int Q = 4;    // queries at a time: eight sums
    for (int m0 = 0; m0 < M; m0 += Q) {
        uint8_t hi[Q][KV_BLOCK] = {}, lo[Q][KV_BLOCK] = {};
        float unit[Q] = {}, half[Q] = {};
        for (int m = m0; m < std::min(M, m0 + Q); m++) {
            float w[KV_BLOCK], largest = 0;
            for (int t = 0; t < KV_BLOCK; t++) w[t] = p[m * KV_BLOCK + t] * scale[t], largest = std::max(largest, w[t]);
            unit[m - m0] = largest / 65535.0f;
            const float inverse = largest > 0 ? 65535.0f / largest : 0.0f;
            int sum = 0;
            for (int t = 0; t < KV_BLOCK; t++) {
                const int x = (int)(w[t] * inverse + 0.5f);
                hi[m - m0][t] = (uint8_t)(x >> 8), lo[m - m0][t] = (uint8_t)x;
                sum += x;
            }
            half[m - m0] = 0.5f * sum;
        }
        for (int k = 0; k < chunks; k++)
            for (int c = 0; c < C; c++) {
                __m512i sum_hi[Q], sum_lo[Q];
                for (int i = 0; i < Q; i++) sum_hi[i] = sum_lo[i] = _mm512_setzero_si512();
                for (int g = 0; g < 16; g++) {
                    const __m512i v = _mm512_load_si512(s.bytes + (((k * C + c) * 16) + g) * 64);
                    for (int i = 0; i < Q; i++) {
                        int w_hi, w_lo;
                        memcpy(&w_hi, &hi[i][g * 4], 4), memcpy(&w_lo, &lo[i][g * 4], 4);
                        sum_hi[i] = _mm512_dpbusd_epi32(sum_hi[i], _mm512_set1_epi32(w_hi), v);
                        sum_lo[i] = _mm512_dpbusd_epi32(sum_lo[i], _mm512_set1_epi32(w_lo), v);
                    }
                }
                for (int i = 0; i < std::min(Q, M - m0); i++) {
                    float *to = o + (int64_t)(m0 + i) * o_stride + c * n_codes + k * 16;
                    const __m512 x = _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum_hi[i], 8), sum_lo[i])), _mm512_set1_ps(half[i]));
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(x, _mm512_set1_ps(unit[i]), _mm512_loadu_ps(to)));
                }
            }
    }
}
#else
constexpr bool HAVE_CODE_KERNELS = false;
struct CodeScratch {};
struct CodeQueries {};
#endif

// Channels a code byte names in the formats that the integer kernels take, else 0.  They want 16, 32 or 64 codes a token.
inline int code_channels(KvFormat format, int d) {
    const int C = format == KvFormat::nsn1 || format == KvFormat::nsn2 ? 8 : format == KvFormat::nsn2b ? 4 : format == KvFormat::nsn4b ? 2 : 0;
    return HAVE_CODE_KERNELS && C && (d / C == 16 || d / C == 32 || d / C == 64) && d % C == 0 ? C : 0;
}

// From plane by plane to channel order, in place.
inline void codes_in_order(float *x, int d, int C) {
    float y[MAX_HEAD_DIM];
    for (int i = 0; i < d; i++) y[i] = x[i % C * (d / C) + i / C];
    std::copy(y, y + d, x);
}

// s1[t], and s1[t] s2[t] delta, of the 64 tokens.
inline void token_scales(float *s1, float *scale, const NsnFields &f, float delta) {
    for (int t = 0; t < KV_BLOCK; t++) s1[t] = f.s1->at(t);
    if (f.s2_f16)
        for (int t = 0; t < KV_BLOCK; t += LANES) store16(scale + t, load16(f.s2_f16->value + t));
    else {
        const float step = to_f32(f.s2_log8->step), min = to_f32(f.s2_log8->min), ln2 = 0.69314718f;
        float x[KV_BLOCK];
        for (int t = 0; t < KV_BLOCK; t++) x[t] = f.s2_log8->code[t] ? (min + step * (f.s2_log8->code[t] - 1)) * ln2 : -INFINITY;
        for (int t = 0; t < KV_BLOCK; t += LANES) store16(scale + t, exp16(load16(x + t)));
    }
    for (int t = 0; t < KV_BLOCK; t++) scale[t] *= s1[t] * delta;
}
