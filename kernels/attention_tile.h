// attention_tile.h - a block of the cache widened to f32, as attention on the CPU reads it, and its keys turned by RoPE.
#pragma once
#include <algorithm>
#include <vector>
#include "attention_codes.h"
#include "simd.h"

namespace cpu {

// Where the rows of one sequence stand in this step.
struct SlotStep { int slot, row0, pos0; };

// One cached block as attention reads it: f32 rows, `stride` apart (d rounded up to whole lanes, the rest zero).
struct Tile {
    std::vector<float> code, plain;
    bool has_code = false, has_plain = false, rotated = false;
    bool turned = true;    // keys: plain rows are before RoPE
};

inline void widen_row(float *to, const f16 *from, int d) {
    int c = 0;
    for (; c + LANES <= d; c += LANES) store16(to + c, load16(from + c));
    for (; c < d; c++) to[c] = to_f32(from[c]);
}

// Tile of a sealed block.
inline void load_rows(Tile &tile, const f16 *x, int n, int d, int stride) {    // n rows of fp16
    tile.has_code = tile.rotated = false, tile.has_plain = tile.turned = true;
    for (int t = 0; t < n; t++) widen_row(&tile.plain[t * stride], x + t * d, d);
}
inline void load_nsn(Tile &tile, KvFormat format, const NsnFields &f, unsigned ablate, int stride) {
    tile.has_code = tile.has_plain = true;
    tile.rotated = !(ablate & NO_HADAMARD), tile.turned = !(ablate & NO_PRE_ROPE);
    const float delta = code_delta(format);
    float mean[MAX_HEAD_DIM];
    int16_t x[KV_BLOCK * MAX_HEAD_DIM];
    for (int c = 0; c < f.d; c++) mean[c] = f.mean_at(c);
    codewords(x, f.d, format, f);
    for (int t = 0; t < KV_BLOCK; t++) {
        const float s1 = f.s1->at(t), s = s1 * f.s2(t) * delta;
        for (int c = 0; c < f.d; c++) tile.code[t * stride + c] = s * (x[t * f.d + c] + 0.5f), tile.plain[t * stride + c] = s1 * mean[c];
    }
}
// A row's d codes, a byte each; eight at a time are spread by halves.
template <int BITS> inline void load_codes(uint8_t *q, const uint8_t *code, int d) {
    for (int c = 0; c < d; c += 8, code += BITS) {
        uint64_t x = 0;
        memcpy(&x, code, BITS);
        for (int k = 4; k > 0; k /= 2) {    // k codes stay together, 8 k bits from the next k
            const uint64_t together = ((uint64_t)1 << k * BITS) - 1;
            x = (x | x << k * (8 - BITS)) & (k == 4 ? together << 32 | together : k == 2 ? together * 0x0001000100010001 : together * 0x0101010101010101);
        }
        memcpy(q + c, &x, 8);
    }
}
// What f.at gives, a row at a time.
inline void load_scalars(Tile &tile, const ScalarFields &f, unsigned ablate, int stride) {
    tile.has_code = true, tile.has_plain = false, tile.rotated = f.rotated && !(ablate & NO_HADAMARD);
    const int d = f.d, width = basis_width(d);
    const bool even = f.rule != ScalarRule::normal4 && f.rule != ScalarRule::nf4;    // levels are 1 apart; others have 4 bits at most
    float level[16], basis[16 * 16], scale[MAX_HEAD_DIM], zero[MAX_HEAD_DIM] = {};
    for (int q = 0; q < (even ? 1 : 1 << f.bits); q++) level[q] = scalar_level(f.rule, f.bits, q);
    for (int i = 0; f.basis && i < width * width; i++) basis[i] = to_f32(f.basis[i]);
    for (int t = 0; t < KV_BLOCK; t++) {
        float *const x = &tile.code[t * stride], value[MAX_HEAD_DIM];
        uint8_t q[MAX_HEAD_DIM];
        const uint8_t *const code = f.code + t * d * f.bits / 8;
        if (f.bits == 8) load_codes<8>(q, code, d);
        else if (f.bits == 4) load_codes<4>(q, code, d);
        else if (f.bits == 2) load_codes<2>(q, code, d);
        else load_codes<1>(q, code, d);
        for (int g = f.group(t, 0), first = 0; first < d && t % f.tokens == 0; g++, first += f.channels) {
            const int end = std::min(d, first + f.channels);
            std::fill(scale + first, scale + end, to_f32(f.scale[g]));
            if (f.zero) std::fill(zero + first, zero + end, to_f32(f.zero[g]));
        }
        if (even)
            for (int c = 0; c < d; c++) value[c] = zero[c] + scale[c] * (level[0] + q[c]);
        else
            for (int c = 0; c < d; c++) value[c] = zero[c] + scale[c] * level[q[c]];
        if (!f.basis) std::copy(value, value + d, x);
        else
            for (int first = 0; first < d; first += width) {
                float sum[16] = {};
                for (int i = 0; i < width; i++)
                    for (int c = 0; c < width; c++) sum[c] += value[first + i] * basis[i * width + c];
                std::copy(sum, sum + width, x + first);
            }
    }
}
inline void load_sealed(Tile &tile, KvFormat format, const uint8_t *block, const int8_t *beside, unsigned ablate, int d, int stride) {
    if (kv_is_nsn(format)) return load_nsn(tile, format, nsn_fields(format, d, block), ablate, stride);
    with_format(format, d, [&](auto f) {
        using Block = typename decltype(f)::Block;
        if constexpr (!f.has_code) load_rows(tile, ((const Block *)block)->x[0], KV_BLOCK, d, stride);
        else if constexpr (!f.has_plain) load_scalars(tile, f.fields(*const_cast<Block *>((const Block *)block), const_cast<int8_t *>(beside)), ablate, stride);
    });
}

// Tile of the first n tokens of exact block i: from the ring, then from this step's rows.
inline void load_exact(Tile &tile, const KvView &kv, int layer, const SlotStep &step, int h, int i, int n, int stride, const f16 *ring, const f16 *rows) {
    tile.has_code = tile.rotated = false, tile.has_plain = tile.turned = true;
    for (int t = 0; t < n; t++) {
        const int pos = i * KV_BLOCK + t;
        const f16 *from = pos < step.pos0 ? ring + kv.exact_at(layer, step.slot, h, pos)
                                          : rows + ((int64_t)(step.row0 + pos - step.pos0) * kv.Hkv + h) * kv.d;
        widen_row(&tile.plain[t * stride], from, kv.d);
    }
}

// A row turned by the angles of one row of a RopeTable, or back with direction -1; `to` may be x.
inline void turn_row(float *to, const float *x, const float *angle, float direction, int d) {
    const int half = d / 2;
#pragma omp simd
    for (int j = 0; j < half; j++) {
        const float c = angle[j], s = direction * angle[half + j], lo = x[j], hi = x[j + half];
        to[j] = lo * c - hi * s;
        to[j + half] = lo * s + hi * c;
    }
}

// Rows 0..n-1 of a block of keys turned by their place in the block.
inline void turn_keys(float *plain, RopeTable rope, int n, int d, int stride) {
    for (int t = 1; t < n; t++) {
        const float *angle = rope.step + (int64_t)t * d;
        turn_row(plain + t * stride, plain + t * stride, angle, 1.0f, d);
    }
}

// Queries as seen from the first token of block i.
inline void turn_back(float *to, const float *q, RopeTable rope, int i, int M, int d, int stride) {
    const float *angle = rope.base + (int64_t)i * d;
    for (int m = 0; m < M; m++) turn_row(to + m * stride, q + m * stride, angle, -1.0f, d);
}
}    // namespace cpu
