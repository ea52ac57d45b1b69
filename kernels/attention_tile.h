// attention_tile.h - a block of the cache widened to f32, as attention on the CPU reads it, and its keys turned by RoPE.
#pragma once
#include <vector>
#include "kv_block.h"
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

static void widen_row(float *to, const f16 *from, int d) {
    int c = 0;
    for (; c + LANES <= d; c += LANES) store16(to + c, load16(from + c));
    for (; c < d; c++) to[c] = to_f32(from[c]);
}

// Tile of a sealed block.
static void load_rows(Tile &tile, const f16 *x, int n, int d, int stride) {    // n rows of fp16
    tile.has_code = tile.rotated = false, tile.has_plain = tile.turned = true;
    for (int t = 0; t < n; t++) widen_row(&tile.plain[t * stride], x + t * d, d);
}
template <int D> static void load_block(Tile &tile, F16<D>, const typename F16<D>::Block &b, const int8_t *, unsigned, int stride) {
    load_rows(tile, b.x[0], KV_BLOCK, D, stride);
}
static void load_nsn(Tile &tile, const NsnFields &f, const int8_t *codebook, float delta, unsigned ablate, int stride) {
    tile.has_code = tile.has_plain = true;
    tile.rotated = !(ablate & NO_HADAMARD), tile.turned = !(ablate & NO_PRE_ROPE);
    float mean[MAX_HEAD_DIM];
    for (int c = 0; c < f.d; c++) mean[c] = f.mean_at(c);
    for (int t = 0; t < KV_BLOCK; t++) {
        const float s1 = f.s1->at(t), s = s1 * f.s2(t) * delta;
        float *code = &tile.code[t * stride], *plain = &tile.plain[t * stride];
        for (int j = 0; j < f.d / f.channels; j++) {
            const int8_t *index = codebook + f.code[t * (f.d / f.channels) + j] * f.channels;
            const int sign = f.sign ? f.sign[t * (f.d / 8) + j] : 0;
            for (int c = 0; c < f.channels; c++) code[j * f.channels + c] = (sign >> c & 1 ? -s : s) * (index[c] + 0.5f);
        }
        for (int c = 0; c < f.d; c++) plain[c] = s1 * mean[c];
    }
}
template <class Nsn> static void load_block(Tile &tile, Nsn nsn, const typename Nsn::Block &b, const int8_t *codebook, unsigned ablate, int stride) {
    load_nsn(tile, nsn_fields(nsn, const_cast<typename Nsn::Block &>(b)), codebook, Nsn::delta, ablate, stride);
}
static void load_scalars(Tile &tile, const ScalarFields &f, unsigned ablate, int stride) {
    tile.has_code = true, tile.has_plain = false, tile.rotated = f.rotated && !(ablate & NO_HADAMARD);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int c = 0; c < f.d; c++) tile.code[t * stride + c] = f.at(t, c);
}
template <int D, class Kind>
static void load_block(Tile &tile, Scalars<D, Kind> format, const typename Scalars<D, Kind>::Block &b, const int8_t *beside, unsigned ablate, int stride) {
    load_scalars(tile, format.fields(const_cast<typename Scalars<D, Kind>::Block &>(b), const_cast<int8_t *>(beside)), ablate, stride);
}
static void load_sealed(Tile &tile, KvFormat format, const uint8_t *block, const int8_t *codebook, unsigned ablate, int d, int stride) {
    with_format(format, d, [&](auto f) { load_block(tile, f, *(const typename decltype(f)::Block *)block, codebook, ablate, stride); });
}

// Tile of the first n tokens of exact block i: from the ring, then from this step's rows.
static void load_exact(Tile &tile, const KvView &kv, int layer, const SlotStep &step, int h, int i, int n, int stride, const f16 *ring, const f16 *rows) {
    tile.has_code = tile.rotated = false, tile.has_plain = tile.turned = true;
    for (int t = 0; t < n; t++) {
        const int pos = i * KV_BLOCK + t;
        const f16 *from = pos < step.pos0 ? ring + kv.exact_at(layer, step.slot, h, pos)
                                          : rows + ((int64_t)(step.row0 + pos - step.pos0) * kv.Hkv + h) * kv.d;
        widen_row(&tile.plain[t * stride], from, kv.d);
    }
}

// A row turned by the angles of one row of a RopeTable, or back with direction -1; `to` may be x.
static void turn_row(float *to, const float *x, const float *angle, float direction, int d) {
    const int half = d / 2;
#pragma omp simd
    for (int j = 0; j < half; j++) {
        const float c = angle[j], s = direction * angle[half + j], lo = x[j], hi = x[j + half];
        to[j] = lo * c - hi * s;
        to[j + half] = lo * s + hi * c;
    }
}

// Rows 0..n-1 of a block of keys turned by their place in the block.
static void turn_keys(float *plain, RopeTable rope, int n, int d, int stride) {
    for (int t = 1; t < n; t++) {
        const float *angle = rope.step + (int64_t)t * d;
        turn_row(plain + t * stride, plain + t * stride, angle, 1.0f, d);
    }
}

// Queries as seen from the first token of block i.
static void turn_back(float *to, const float *q, RopeTable rope, int i, int M, int d, int stride) {
    const float *angle = rope.base + (int64_t)i * d;
    for (int m = 0; m < M; m++) turn_row(to + m * stride, q + m * stride, angle, -1.0f, d);
}
}    // namespace cpu
