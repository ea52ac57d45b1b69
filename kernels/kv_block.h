// kv_block.h - the bytes of the KV cache, how to read numbers out of them, and which of them a row sees.
//
// A sequence's cache is a row of blocks of KV_BLOCK tokens, for every layer, kv head, and K or V.  A block that is far
// enough behind is *sealed*: written once in the cache's format, never touched again.  The others are *exact*: fp16, keys
// before RoPE, in every format.
//
//   block      0    1    2    3    4    5    6    7            sink = 1, recent = 2 (blocks), row at position 7*64 + 9
//            +----+----+----+----+----+----+----+----+
//            |f16 |code|code|code|code|f16 |f16 |f16 |         sinks | sealed | recents | open
//            +----+----+----+----+----+----+----+----+
//                  ^sink               ^coded_end(pos)         in blocks
//
// Which tokens does a row see, and in what precision?  A row at position p sees tokens 0..p: those of blocks
// [sink, coded_end(p)) through codes, the rest exactly.  Prefill, single decode and batched decode are therefore one
// function.  With `exact_prefill` all rows of a step use coded_end of the step's first position: they see each other
// exactly, and blocks are sealed for the steps that follow.
//
// Where the exact tokens are: tokens of this step in k16, v16; earlier ones in the ring k_exact, v_exact.  kv_write
// rounds the rows and seals what a row of this step reads as codes, attention reads, kv_keep puts the step's rows that stay
// exact into the ring.
//
// A cached row is the sum of two parts,      k_t = R code_t + RoPE_t(plain_t)
//                                            v_t = R code_t + plain_t
// with R the Hadamard matrix (hadamard.h) or, for formats that do not rotate, 1.  A format is one struct, no base class:
//     Block           plain bytes; the layout is the drawing, pinned by the static_assert below it
//     has_code        false: code_t = 0;  has_plain  false: plain_t = 0
//     rotated         R is the Hadamard matrix
//     load_code()     channels c..c+C-1 of code_t
//     load_plain()    channels c..c+C-1 of plain_t
// and one seal() in kv_write.cu.
#pragma once
#include "ops.h"

constexpr int KV_BLOCK = 64;           // tokens that share one NSN mean, and one sealing
constexpr int MAX_HEAD_DIM = 256;

enum class KvFormat : uint8_t { f16, count };

// Steps of NSN that can be switched off to see what they buy (--ablate); 0 is the method.
enum KvAblate : unsigned { NO_FIRST_NORM = 1, NO_SHIFT = 2, NO_HADAMARD = 4, NO_PRE_ROPE = 8, NO_SCALE = 16 };

// ---- f16: what everybody compares with --------------------------------------------------------------
//   offset  bytes       field
//        0  64 * d * 2  x[t][c]       keys before RoPE, like every exact row
template <int D> struct F16 {
    static constexpr int d = D;
    static constexpr bool has_code = false, has_plain = true, rotated = false;
    struct Block { f16 x[KV_BLOCK][D]; };
    static_assert(sizeof(Block) == KV_BLOCK * D * 2, "F16::Block is not the layout above");

    template <int C> HD static void load_code(float (&x)[C], const Block &, int, int) {
        for (int i = 0; i < C; i++) x[i] = 0.0f;
    }
    template <int C> HD static void load_plain(float (&x)[C], const Block &b, int t, int c) {
        for (int i = 0; i < C; i++) x[i] = to_f32(b.x[t][c + i]);
    }
};

// ---- the whole cache, as the kernels see it; owns nothing -------------------------------------------------
struct KvView {
    KvFormat k_format, v_format;
    int64_t k_block_bytes, v_block_bytes;    // sizeof(Block) for d
    int L, B, Hkv, d;
    int n_blocks;                  // sealed blocks that the pool holds, for each layer
    int max_blocks;                // entries of a slot's block table
    int sink, recent;              // blocks kept exact at the start, and behind the open one
    bool exact_prefill;
    unsigned ablate;               // KvAblate
    uint8_t *k_sealed, *v_sealed;  // (L, n_blocks, Hkv) Block
    f16 *k_exact, *v_exact;        // (L, B, sink + recent + 1, Hkv, KV_BLOCK, d)
    const int *table;              // (B, max_blocks)    block i of slot s is number table[s][i] of the pool
    RopeTable rope;

    HD int n_exact() const { return sink + recent + 1; }
    // The first block that a row at pos does not read as codes.  pos = -1: nothing is sealed yet.
    HD int coded_end(int pos) const {
        const int end = (pos < 0 ? 0 : pos / KV_BLOCK) - recent;
        return end > sink ? end : sink;
    }
    // Index of block i of a slot in units of Block.
    HD int64_t sealed_at(int layer, int slot, int h, int i) const {
        return ((int64_t)layer * n_blocks + table[(int64_t)slot * max_blocks + i]) * Hkv + h;
    }
    HD uint8_t *k_block(int layer, int slot, int h, int i) const { return k_sealed + sealed_at(layer, slot, h, i) * k_block_bytes; }
    HD uint8_t *v_block(int layer, int slot, int h, int i) const { return v_sealed + sealed_at(layer, slot, h, i) * v_block_bytes; }
    // Element offset of the exact block i (KV_BLOCK, d) in k_exact and v_exact: sinks first, then a ring.
    HD int64_t exact_at(int layer, int slot, int h, int i) const {
        const int at = i < sink ? i : sink + (i - sink) % (recent + 1);
        return ((((int64_t)layer * B + slot) * n_exact() + at) * Hkv + h) * KV_BLOCK * d;
    }
};

// Cosine and sine of the angle of position pos in channel pair j; d is the head dimension.
HD void rope_angle(float &c, float &s, RopeTable table, int pos, int j, int d) {
    const float *b = table.base + ((int64_t)(pos / KV_BLOCK) * (d / 2) + j) * 2;
    const float *r = table.step + ((int64_t)(pos % KV_BLOCK) * (d / 2) + j) * 2;
    c = b[0] * r[0] - b[1] * r[1];
    s = b[0] * r[1] + b[1] * r[0];
}

// ---- from run-time format and head dimension to a type ---------------------------------------------------
// f(F16<d>{}) or whatever the pair names; d a multiple of 8, at most MAX_HEAD_DIM.
template <int D, class Function> auto with_format_at(KvFormat format, Function f) {
    switch (format) {
    case KvFormat::f16: return f(F16<D>{});
    case KvFormat::count: break;
    }
    refuse("KV format %d: unknown", (int)format);
}
template <class Function> auto with_format(KvFormat format, int d, Function f) {
    switch (d) {
#define HEAD_DIM(D) case D: return with_format_at<D>(format, f);
#define HEAD_DIMS(D) HEAD_DIM(D) HEAD_DIM(D + 8) HEAD_DIM(D + 16) HEAD_DIM(D + 24)
        HEAD_DIMS(8) HEAD_DIMS(40) HEAD_DIMS(72) HEAD_DIMS(104) HEAD_DIMS(136) HEAD_DIMS(168) HEAD_DIMS(200) HEAD_DIMS(232)
#undef HEAD_DIMS
#undef HEAD_DIM
    }
    refuse("head_dim %d: supported are multiples of 8 up to %d", d, MAX_HEAD_DIM);
}

const char *kv_format_name(KvFormat f);
KvFormat kv_format_from_name(const std::string &name);        // refuses an unknown name and lists the known ones
int64_t kv_block_bytes(KvFormat f, int d);                     // sizeof(Block)
inline double kv_bits(KvFormat f, int d) { return 8.0 * kv_block_bytes(f, d) / (KV_BLOCK * d); }    // per value, everything counted
