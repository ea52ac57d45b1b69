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
//                  ^sink               ^coded_end              in blocks
//
// Which tokens does a row see, and in what precision?  In layer l a row at position p sees tokens 0..p: those of blocks
// [sink, coded_end(p, l)) through codes, the rest exactly.  Prefill, single decode and batched decode are therefore one
// function.  With `exact_prefill` all rows of a step use coded_end of the step's first position: they see each other
// exactly, and blocks are sealed for the steps that follow.
//
// When is a block sealed?  Layers take turns: the first when the block is full, the last up to SEAL_STEPS - 1 tokens later,
// spread evenly (turn), so that a decode step seals a 32nd of the layers.  Rows read the codes from the next token on.
// Tried: all layers at once, a step of 32 sequences of Llama-3-8B half as long again; 8 turns, after which all layers read the codes,
// 19 to 24% longer with as many sequences of Llama-2-7B as fit.
//
// Where the exact tokens are: tokens of this step in k16, v16; earlier ones in the ring k_exact, v_exact.  kv_write
// rounds the rows and seals blocks, attention reads, kv_keep puts the step's rows that stay exact into the ring.
//
// A cached row is the sum of two parts,      k_t = R code_t + RoPE_t(plain_t)
//                                            v_t = R code_t + plain_t
// with R the Hadamard matrix (hadamard.h) or, for formats that do not rotate, 1.  A format is one struct, no base class:
//     Block           plain bytes; the layout is the drawing, pinned by the static_assert below it
//     has_code        false: code_t = 0;  has_plain  false: plain_t = 0
//     rotated         R is the Hadamard matrix
//     load_code()     channels c..c+N-1 of code_t
//     load_plain()    channels c..c+N-1 of plain_t
//     codebook        what load_code looks codes up in, kv_codebook() on the host; one for all models, null if there is none
// and one seal() in kv_write.cu.
#pragma once
#include <cmath>
#include "nsn_codebook.inc"
#include "ops.h"

constexpr int KV_BLOCK = 64;           // tokens that share one NSN mean, and one sealing
constexpr int SEAL_STEPS = 32;         // layers seal a block in so many turns
constexpr int MAX_HEAD_DIM = 256;

enum class KvFormat : uint8_t {
    f16, nsn1, nsn2, nsn2b, nsn4b, kivi2, q8, q4, tq2, nqkv, deco4, xquant,
    count,           // of the names; below: what a name means for values where keys are kept otherwise
    kivi2_values, xquant_values,
};
HD constexpr bool kv_is_nsn(KvFormat f) { return f > KvFormat::f16 && f < KvFormat::kivi2; }
HD constexpr bool kv_is_scalar(KvFormat f) { return f >= KvFormat::kivi2; }    // a format of kv_baselines.h
constexpr KvFormat kv_side_format(KvFormat f, bool key) {
    return key ? f : f == KvFormat::kivi2 ? KvFormat::kivi2_values : f == KvFormat::xquant ? KvFormat::xquant_values : f;
}

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

    template <int N> HD static void load_code(float (&x)[N], const Block &, const int8_t *, int, int) {
        for (int i = 0; i < N; i++) x[i] = 0.0f;
    }
    template <int N> HD static void load_plain(float (&x)[N], const Block &b, int t, int c) {
        for (int i = 0; i < N; i++) x[i] = to_f32(b.x[t][c + i]);
    }
};

// ---- NSN: normalise, shift, normalise, then vector codes ---------------------------------------------------
//   code_t  = s1[t] s2[t] w_t        w_t: codewords of C neighbouring channels, (index + 1/2) delta, side by side
//   plain_t = s1[t] mean             (NSNQuant, arXiv 2505.18231; the design's nsnquant.md redoes the arithmetic)
//   s1[t]   = s1_min + s1_step * nibble t                                4 bits a token
//   mean[c] = mean_min[c/32] + mean_step[c/32] * nibble c                4 bits a channel
//   s2[t]   as f16, or 2^(min + step (u - 1)) of a byte u, 0 for u = 0   with the paper's scale correction folded in
//   Nibble 2i is the low half of byte i, nibble 2i+1 the high half.
//
//   nsn1   C = 8, signed codebook: the paper's 1 bit              nsn2b  C = 4, signed codebook (ours)
//   nsn2   C = 8, codebook of |x| and 8 sign bits: the paper's 2   nsn4b  C = 2, signed codebook (ours)
//
//   bytes at d = 128          nsn1   nsn2  nsn2b  nsn4b   field, in this order
//   64 * d/C                  1024   1024   2048   4096   code[t][j]    codeword of channels C j .. C j + C-1
//   64 * d/8                          1024                sign[t]       a bit a channel, set where it is negative: sign_place
//   64 * 2                     128    128                 s2[t]         f16
//   64 + 4                                    68     68   s2[t], step, min
//   32 + 4                      36     36     36     36   s1[t], s1_step, s1_min
//   d/2                         64     64     64     64   mean[c]
//   ceil(d/32) * 4              16     16     16     16   mean_step[g], then mean_min[g]
//                             1268   2292   2232   4280   = 1.2383, 2.2383, 2.1797, 4.1797 bits a value
HD int nibble(const uint8_t *p, int i) { return p[i / 2] >> (i % 2 * 4) & 15; }

// Where the sign of channel c is among a row's d/8 bytes.  Of 32 channels in 4 bytes, byte b has those of channels 4 k + b, as bit k: what
// flips the four channels of word k is the highest bits of the bytes of (sign << 7 - k): two instructions on a GPU, three and a half
// with a byte a code.  The last d % 32 channels: byte c / 8, bit c % 8.
struct SignPlace { int byte, bit; };
HD constexpr SignPlace sign_place(int d, int c) { return c / 32 < d / 32 ? SignPlace{c / 32 * 4 + c % 4, c % 32 / 4} : SignPlace{c / 8, c % 8}; }
HD bool is_negative(const uint8_t *sign, int d, int c) { return sign[sign_place(d, c).byte] >> sign_place(d, c).bit & 1; }
// The 32 bits from the other order, a byte a code (bit 4 k + b), and back: the five bits of a bit's index change places in four pairs.
template <int A, int B> HD uint32_t swap_index_bits(uint32_t x) {
    constexpr uint32_t with_bit[] = {0xaaaaaaaa, 0xcccccccc, 0xf0f0f0f0, 0xff00ff00, 0xffff0000};
    const uint32_t t = (x ^ x >> ((1 << A) - (1 << B))) & ~with_bit[A] & with_bit[B];
    return x ^ t ^ t << ((1 << A) - (1 << B));
}
HD uint32_t signs_by_word(uint32_t x) { return swap_index_bits<1, 0>(swap_index_bits<2, 1>(swap_index_bits<3, 0>(swap_index_bits<4, 1>(x)))); }
HD uint32_t signs_by_code(uint32_t x) { return swap_index_bits<4, 1>(swap_index_bits<3, 0>(swap_index_bits<2, 1>(swap_index_bits<1, 0>(x)))); }

struct ScaleF16 {
    f16 value[KV_BLOCK];
    HD float at(int t) const { return to_f32(value[t]); }
};
struct ScaleLog8 {
    uint8_t code[KV_BLOCK];
    f16 step, min;
    HD float at(int t) const { return code[t] ? exp2f(to_f32(min) + to_f32(step) * (code[t] - 1)) : 0.0f; }
};
struct FirstNorm {
    uint8_t code[KV_BLOCK / 2];
    f16 step, min;
    HD float at(int t) const { return to_f32(min) + to_f32(step) * nibble(code, t); }
};
template <int D> struct Mean {
    uint8_t code[D / 2];
    f16 step[(D + 31) / 32], min[(D + 31) / 32];
    HD float at(int c) const { return to_f32(min[c / 32]) + to_f32(step[c / 32]) * nibble(code, c); }
};

template <int D, int CHANNELS, class Scale> struct NsnBytes {
    static constexpr int d = D, channels = CHANNELS;
    static constexpr bool has_code = true, has_plain = true, rotated = true, has_sign = false;
    struct Block {
        uint8_t code[KV_BLOCK][D / CHANNELS];
        Scale s2;
        FirstNorm s1;
        Mean<D> mean;
    };
    static constexpr float delta = CHANNELS == 8 ? NSN1_DELTA : CHANNELS == 4 ? NSN2B_DELTA : NSN4B_DELTA;
    template <int N> HD static void load_code(float (&x)[N], const Block &b, const int8_t *codebook, int t, int c) {
        const float s = b.s1.at(t) * b.s2.at(t) * delta;
        for (int i = 0; i < N; i++) x[i] = s * (codebook[b.code[t][(c + i) / CHANNELS] * CHANNELS + (c + i) % CHANNELS] + 0.5f);
    }
    template <int N> HD static void load_plain(float (&x)[N], const Block &b, int t, int c) {
        for (int i = 0; i < N; i++) x[i] = b.s1.at(t) * b.mean.at(c + i);
    }
};
template <int D> struct Nsn2 {
    static constexpr int d = D, channels = 8;
    static constexpr bool has_code = true, has_plain = true, rotated = true, has_sign = true;
    struct Block {
        uint8_t code[KV_BLOCK][D / 8], sign[KV_BLOCK][D / 8];
        ScaleF16 s2;
        FirstNorm s1;
        Mean<D> mean;
    };
    static constexpr float delta = NSN2_DELTA;
    template <int N> HD static void load_code(float (&x)[N], const Block &b, const int8_t *codebook, int t, int c) {
        const float s = b.s1.at(t) * b.s2.at(t) * delta;
        for (int i = 0; i < N; i++) {
            const float w = s * (codebook[b.code[t][(c + i) / 8] * 8 + (c + i) % 8] + 0.5f);
            x[i] = is_negative(b.sign[t], D, c + i) ? -w : w;
        }
    }
    template <int N> HD static void load_plain(float (&x)[N], const Block &b, int t, int c) {
        for (int i = 0; i < N; i++) x[i] = b.s1.at(t) * b.mean.at(c + i);
    }
};
// Where the fields of a block are, for code that takes d at run time.
struct NsnFields {
    int d, channels;
    uint8_t *code, *sign;        // (KV_BLOCK, d/channels), (KV_BLOCK, d/8) or null
    ScaleF16 *s2_f16;            // one of the two
    ScaleLog8 *s2_log8;
    FirstNorm *s1;
    uint8_t *mean;               // nibbles (d)
    f16 *mean_step, *mean_min;   // (ceil(d/32))
    HD float s2(int t) const { return s2_f16 ? s2_f16->at(t) : s2_log8->at(t); }
    HD float mean_at(int c) const { return to_f32(mean_min[c / 32]) + to_f32(mean_step[c / 32]) * nibble(mean, c); }
};
HD ScaleF16 *f16_scale(ScaleF16 &s) { return &s; }
HD ScaleF16 *f16_scale(ScaleLog8 &) { return nullptr; }
HD ScaleLog8 *log8_scale(ScaleF16 &) { return nullptr; }
HD ScaleLog8 *log8_scale(ScaleLog8 &s) { return &s; }
template <int D, int C, class Scale> HD NsnFields nsn_fields(NsnBytes<D, C, Scale>, typename NsnBytes<D, C, Scale>::Block &b) {
    return {D, C, b.code[0], nullptr, f16_scale(b.s2), log8_scale(b.s2), &b.s1, b.mean.code, b.mean.step, b.mean.min};
}
template <int D> HD NsnFields nsn_fields(Nsn2<D>, typename Nsn2<D>::Block &b) {
    return {D, 8, b.code[0], b.sign[0], &b.s2, nullptr, &b.s1, b.mean.code, b.mean.step, b.mean.min};
}

// The same where format and d are numbers: the layout of the table above.
inline NsnFields nsn_fields(KvFormat format, int d, const uint8_t *block) {
    NsnFields f{};
    f.d = d, f.channels = format == KvFormat::nsn4b ? 2 : format == KvFormat::nsn2b ? 4 : 8;
    uint8_t *p = const_cast<uint8_t *>(block);
    auto take = [&](size_t bytes) { return p += bytes, p - bytes; };
    f.code = take(KV_BLOCK * d / f.channels);
    if (format == KvFormat::nsn2) f.sign = take(KV_BLOCK * d / 8);
    if (f.channels == 8) f.s2_f16 = (ScaleF16 *)take(sizeof(ScaleF16)); else f.s2_log8 = (ScaleLog8 *)take(sizeof(ScaleLog8));
    f.s1 = (FirstNorm *)take(sizeof(FirstNorm));
    f.mean = take(d / 2), f.mean_step = (f16 *)take((d + 31) / 32 * sizeof(f16)), f.mean_min = (f16 *)p;
    return f;
}

template <int D> using Nsn1 = NsnBytes<D, 8, ScaleF16>;
template <int D> using Nsn2b = NsnBytes<D, 4, ScaleLog8>;
template <int D> using Nsn4b = NsnBytes<D, 2, ScaleLog8>;
static_assert(sizeof(Nsn1<128>::Block) == 1268 && sizeof(Nsn2<128>::Block) == 2292, "the paper's 19.8125 and 35.8125 bytes a token");
static_assert(sizeof(Nsn2b<128>::Block) == 2232 && sizeof(Nsn4b<128>::Block) == 4280, "NsnBytes::Block is not the table above");
static_assert(sizeof(Nsn2<48>::Block) == 64 * 12 + 128 + 36 + 24 + 8 && sizeof(Nsn4b<8>::Block) == 64 * 4 + 68 + 36 + 4 + 4, "padding");

#include "kv_baselines.h"    // kivi2, q8, q4, tq2, nqkv, deco4, xquant

// ---- the whole cache, as the kernels see it; owns nothing -------------------------------------------------
struct KvView {
    KvFormat k_format, v_format;             // of kv_side_format
    int64_t k_block_bytes, v_block_bytes;    // kv_block_stride
    int64_t k_beside_bytes, v_beside_bytes;  // kv_beside_bytes
    int k_share, v_share;                    // kv_share
    int L, B, Hkv, d;
    int n_blocks;                  // sealed blocks that the pool holds, for each layer
    int max_blocks;                // entries of a slot's block table
    int sink, recent;              // blocks kept exact at the start, and behind the open one
    bool exact_prefill;
    unsigned ablate;               // KvAblate
    float k_exponent, v_exponent;  // of the scale correction, see seal in kv_write.cu
    const int8_t *k_codebook, *v_codebook;
    uint8_t *k_sealed, *v_sealed;  // (L, n_blocks, Hkv) Block
    uint8_t *k_beside, *v_beside;  // deco4: (L, B) matrices; xquant: (layers with codes, n_blocks, Hkv) codes; else null
    f16 *k_exact, *v_exact;        // (L, B, Hkv, n_exact, d)
    const int *table;              // (B, max_blocks)    block i of slot s is number table[s][i] of the pool
    RopeTable rope;

    // The layer seals block i - 1 in the step of position KV_BLOCK i + turn; never before a lower layer, whose codes it may share (xquant).
    HD int turn(int layer) const { return layer * SEAL_STEPS / L; }
    // The first block that this layer has not sealed when the row at pos is there.  pos = -1: nothing is sealed yet.
    HD int sealed_end(int pos, int layer) const { return end_behind(pos - turn(layer)); }
    // The first block that a row at pos does not read as codes: what steps of earlier positions sealed.
    HD int coded_end(int pos, int layer) const { return coded_end_at(pos, turn(layer)); }
    HD int coded_end_at(int pos, int turn) const { return end_behind(pos - 1 - turn); }    // of the layers of that turn
    // The i-th layer that may seal a block, and one at most, in a step of one row, at pos; L: there is none.
    HD int layer_in_turn(int pos, int i) const {
        const int at = pos % KV_BLOCK, layer = (at * L + SEAL_STEPS - 1) / SEAL_STEPS + i;
        return layer < L && turn(layer) == at ? layer : L;
    }
    // Blocks that a layer seals in a step of rows at positions from .. to, at most; of one row, exactly.
    HD int most_seals(int from, int to) const {
        if (from < to) return end_behind(to) - sealed_end(from - 1, L - 1);
        const int layer = layer_in_turn(to, 0);
        return layer < L ? sealed_end(to, layer) - sealed_end(to - 1, layer) : 0;
    }
    // Rows of equal stretches, KV_BLOCK positions from stretch_begin on, agree on coded_end.
    HD int stretch(int pos, int layer) const { return (pos + KV_BLOCK - 1 - turn(layer)) / KV_BLOCK; }
    HD int stretch_begin(int stretch, int layer) const { return (stretch - 1) * KV_BLOCK + 1 + turn(layer); }
    // Index of block i of a slot in units of Block.
    HD int64_t sealed_at(int layer, int slot, int h, int i) const {
        return ((int64_t)layer * n_blocks + table[(int64_t)slot * max_blocks + i]) * Hkv + h;
    }
    HD uint8_t *k_block(int layer, int slot, int h, int i) const { return k_sealed + sealed_at(layer, slot, h, i) * k_block_bytes; }
    HD uint8_t *v_block(int layer, int slot, int h, int i) const { return v_sealed + sealed_at(layer, slot, h, i) * v_block_bytes; }
    // What load_code needs beside the block: its codebook, deco4's matrix or xquant's codes.
    HD int8_t *beside(bool key, int layer, int slot, int h, int i) const {
        const KvFormat f = key ? k_format : v_format;
        const int share = key ? k_share : v_share;
        int8_t *all = (int8_t *)(key ? k_beside : v_beside);
        if (!all) return const_cast<int8_t *>(key ? k_codebook : v_codebook);
        const int64_t record = f == KvFormat::deco4 ? (int64_t)layer * B + slot : sealed_at(code_layer(share, layer), slot, h, i);
        return all + record * (key ? k_beside_bytes : v_beside_bytes);
    }
    // Exact tokens of a head: sinks first, then a ring.
    HD int n_exact() const { return sink * KV_BLOCK + ring(); }
    HD int ring() const { return (recent + 1) * KV_BLOCK + SEAL_STEPS; }
    // Element offset of token pos in k_exact and v_exact.  8 tokens from a multiple of 8 on lie side by side.
    HD int64_t exact_at(int layer, int slot, int h, int pos) const {
        const int sinks = sink * KV_BLOCK, at = pos < sinks ? pos : sinks + (pos - sinks) % ring();
        return ((((int64_t)layer * B + slot) * Hkv + h) * n_exact() + at) * d;
    }

  private:
    HD int end_behind(int pos) const {
        const int end = (pos < 0 ? 0 : pos / KV_BLOCK) - recent;
        return end > sink ? end : sink;
    }
};
static_assert(SEAL_STEPS % 8 == 0 && SEAL_STEPS < KV_BLOCK, "exact tokens are read in groups of 8, and turns end before the next block does");

// Cosine and sine of the angle of position pos in channel pair j; d is the head dimension.  In double nothing is rounded.
template <class Float> HD void rope_angle(Float &c, Float &s, RopeTable table, int pos, int j, int d) {
    const float *b = table.base + (int64_t)(pos / KV_BLOCK) * d + j, *r = table.step + (int64_t)(pos % KV_BLOCK) * d + j;
    c = (Float)b[0] * r[0] - (Float)b[d / 2] * r[d / 2];
    s = (Float)b[0] * r[d / 2] + (Float)b[d / 2] * r[0];
}

// ---- from run-time format and head dimension to a type ---------------------------------------------------
// f(F16<d>{}) or whatever the pair names; d a multiple of 8, at most MAX_HEAD_DIM.
template <int D, class Function> auto with_format_at(KvFormat format, Function f) {
    switch (format) {
    case KvFormat::f16: return f(F16<D>{});
    case KvFormat::nsn1: return f(Nsn1<D>{});
    case KvFormat::nsn2: return f(Nsn2<D>{});
    case KvFormat::nsn2b: return f(Nsn2b<D>{});
    case KvFormat::nsn4b: return f(Nsn4b<D>{});
    case KvFormat::kivi2: return f(Kivi2Keys<D>{});
    case KvFormat::kivi2_values: return f(Kivi2Values<D>{});
    case KvFormat::q8: return f(Q8<D>{});
    case KvFormat::q4: return f(Q4<D>{});
    case KvFormat::tq2: return f(Tq2<D>{});
    case KvFormat::nqkv: return f(Nqkv<D>{});
    case KvFormat::deco4: return f(Deco4<D>{});
    case KvFormat::xquant: return f(XquantKeys<D>{});
    case KvFormat::xquant_values: return f(XquantValues<D>{});
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
int64_t kv_block_stride(KvFormat f, int d);                    // from one block to the next in the pool; zeros are between them
constexpr int64_t kv_aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }    // of codes: a kernel copies 16 bytes at a time
const int8_t *kv_codebook(KvFormat f);                         // on the host, KV_CODEBOOK_BYTES; null if it has none
float kv_scale_exponent(KvFormat f, bool key);                 // what its seal uses, see kv_write.cu
constexpr int64_t KV_CODEBOOK_BYTES = 256 * 8;                 // of the largest
int64_t kv_beside_bytes(KvFormat f, int d);                    // deco4: of a matrix, xquant: of a block's codes; else 0
int kv_share(KvFormat f, int L);                               // from this even layer on, odd layers use the codes of the layer below
inline double kv_bits(KvFormat f, int d) { return 8.0 * kv_block_bytes(f, d) / (KV_BLOCK * d); }    // per value, of what is in blocks
