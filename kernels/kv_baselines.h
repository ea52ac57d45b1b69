// kv_baselines.h - the scalar formats of other systems, to compare with: part of kv_block.h, which includes it.
//
// Every value has a code of B bits, and every group of values a scale; the formats differ in what a group is and in which
// values the codes name.  They have no plain part, and keys are coded after RoPE:
//   k_t = R code_t, v_t = R code_t,       code_t[c] = zero[g] + scale[g] * level[q],   g the group of (t, c)
// Codes lie in a row lowest bits first: code c is bits B c .. B c + B-1.  Groups are numbered along the channels, then along
// the tokens: g = t / tokens * ceil(d / channels) + c / channels; the last group of a row is short where d is no multiple.
//
//             B  group: tokens x channels    rule         R  after
//   kivi2  K  2         32 x 1               min_max      1  KIVI, arXiv 2402.02750, g = 32
//          V  2          1 x 32              min_max      1
//   q8        8          1 x 32              absmax       H  llama.cpp's q8_0 behind its Hadamard rotation
//   q4        4          1 x 32              extreme      H  q4_0
//   tq2       2          1 x d               normal4      H  TurboQuant's scalars, arXiv 2504.19874, without its sketch of the rest
//   nqkv      4      256/d x d               nf4          1  NQKV, arXiv 2505.16210
//   deco4     4          1 x d               absmax       1  DecoQuant, arXiv 2405.12591
//   xquant K  2         64 x 1               calibrated   1  XQuant, arXiv 2510.11236
//          V  1          1 x 128             calibrated   1
//
//   bytes at d = 128    kivi2     q8     q4    tq2   nqkv  deco4  xquant K, V   field, in this order
//   64 * d B/8           2048   8192   4096   2048   4096   4096    beside      code[t]     row of codes of token t
//   groups * 2            512    512    512    128     64    128    256  128    scale[g]    f16
//   groups * 2            512                                       256  128    zero[g]     f16
//                        3072   8704   4608   2176   4160   4224    512  256
//   bits a value          3      8.5    4.5    2.125  4.0625  4.125  0.5 0.25   and what is beside, below
//
// Where we differ from the papers, since a block is 64 tokens of one head:
//   all      What is open or recent is fp16.  KIVI and XQuant keep 128 tokens of it (--recent 128); NQKV keeps none.
//   nqkv     A block of 256 values is 256/d neighbouring tokens of one head (rounded down to a power of two), not 256/d
//            neighbouring heads of one token: as many bits, and sealing needs one head only.
//   deco4    X of 16 channels is split into U (S V^T) by the Gram matrix of the sequence's first sealed block, all heads:
//            "the prompt", which in coded prefill must not depend on the size of a step.  code = U, and every 16 channels of
//            the row are 16 of U times the matrix beside.  A token's scale is for one head, not for all: 0.12 bits more.
//   xquant   z' = z + eta s (2^B - 1), s' = (1 - 2 eta) s, eta = 0.045 at 2 bits, 1/6 at 1 bit.  Keys group 64 tokens, not 128.
//            Codes are beside, because layers share them: values of odd layers from L/2 on use the codes of the layer
//            below, with their own zero and scale.  1.375 bits of codes a value, the paper's headline; 1.75 with all else.
//
//   beside            bytes                      shape
//   deco4             16 * 16 * 2                matrix[i][c] f16, one a layer, slot and side (8 x 8 where 16 does not divide d)
//   xquant            64 * d B/8                 code[t], one a block, head and layer that keeps codes
#pragma once

// How a group's scale is chosen (scalar_seal.h), and what the codes stand for.
enum class ScalarRule : uint8_t {
    min_max,       // scale = (max - min) / (2^B - 1), zero = min            level = q
    calibrated,    // the same, then both ends move in by eta of the range
    absmax,        // scale = max |x| / (2^(B-1) - 1)                        level = q - 2^(B-1)
    extreme,       // scale = -(the x of largest |x|) / 2^(B-1): it gets code 0, the only level without a mirror image
    normal4,       // scale = root mean square; the levels are the four best for normal values (Lloyd-Max)
    nf4,           // scale = max |x|; quantiles of the normal distribution, as QLoRA has them
};
HD float scalar_level(ScalarRule rule, int bits, int q) {
    constexpr float normal4[] = {-1.5104f, -0.4528f, 0.4528f, 1.5104f};
    constexpr float nf4[] = {-1.0f, -0.6961928f, -0.5250731f, -0.3949175f, -0.2844414f, -0.1847734f, -0.0910500f, 0.0f,
                             0.0795803f, 0.1609302f, 0.2461123f, 0.3379152f, 0.4407098f, 0.5626170f, 0.7229568f, 1.0f};
    switch (rule) {
    case ScalarRule::min_max: case ScalarRule::calibrated: return q;
    case ScalarRule::absmax: case ScalarRule::extreme: return q - (1 << (bits - 1));
    case ScalarRule::normal4: return normal4[q];
    case ScalarRule::nf4: return nf4[q];
    }
    return 0;
}
constexpr bool scalar_has_zero(ScalarRule rule) { return rule == ScalarRule::min_max || rule == ScalarRule::calibrated; }

enum class Beside : uint8_t { nothing, matrix, codes };
HD constexpr int basis_width(int d) { return d % 16 ? 8 : 16; }

// Layers that keep codes when odd layers from `share` (even) on use those of the layer below; and where a layer's are.
HD int code_layer(int share, int layer) { return layer < share ? layer : share + (layer - share) / 2; }
HD int code_layers(int share, int L) { return code_layer(share, L - 1) + 1; }

// The fields of a block, for code that takes d at run time.
struct ScalarFields {
    ScalarRule rule;
    bool rotated;                       // R is the Hadamard matrix
    int d, bits, tokens, channels;      // of a group
    uint8_t *code;                      // (KV_BLOCK, d bits / 8)
    f16 *scale, *zero;                  // (groups); zero: null unless the rule has one
    const f16 *basis;                   // (basis_width, basis_width) or null

    HD int groups_across() const { return (d + channels - 1) / channels; }
    HD int group(int t, int c) const { return t / tokens * groups_across() + c / channels; }
    HD int code_at(int t, int c) const {
        const int bit = (t * d + c) * bits;
        return code[bit / 8] >> bit % 8 & ((1 << bits) - 1);
    }
    HD float value(int t, int c) const {
        const int g = group(t, c);
        return (zero ? to_f32(zero[g]) : 0.0f) + to_f32(scale[g]) * scalar_level(rule, bits, code_at(t, c));
    }
    HD float at(int t, int c) const {
        if (!basis) return value(t, c);
        const int w = basis_width(d), first = c / w * w;
        float sum = 0;
        for (int i = 0; i < w; i++) sum += value(t, first + i) * to_f32(basis[i * w + c - first]);
        return sum;
    }
};

template <int CODES, int SCALES> struct ScalarBlock {
    uint8_t code[CODES];                // (KV_BLOCK, d B/8)
    f16 scale_zero[SCALES];             // scale[groups], then zero[groups]
    HD uint8_t *codes() { return code; }
};
template <int SCALES> struct ScalarBlock<0, SCALES> {
    f16 scale_zero[SCALES];
    HD uint8_t *codes() { return nullptr; }
};

// Kind: bits, tokens and channels of a group (channels 0: d; tokens 0: as many as 256 values have), rule, rotated, beside.
template <int BITS, int TOKENS, int CHANNELS, ScalarRule RULE, bool ROTATED, Beside BESIDE = Beside::nothing> struct ScalarKind {
    static constexpr int bits = BITS, tokens = TOKENS, channels = CHANNELS;
    static constexpr ScalarRule rule = RULE;
    static constexpr bool rotated = ROTATED;
    static constexpr Beside beside = BESIDE;
};
constexpr int tokens_of_256(int d) { return d > 128 ? 1 : 2 * tokens_of_256(2 * d); }    // a power of two

template <int D, class Kind> struct Scalars {
    static constexpr int d = D;
    static constexpr bool has_code = true, has_plain = false, rotated = Kind::rotated, has_zero = scalar_has_zero(Kind::rule);
    static constexpr int tokens = Kind::tokens ? Kind::tokens : tokens_of_256(D);
    static constexpr int channels = Kind::channels == 0 || Kind::channels > D ? D : Kind::channels;
    static constexpr int groups = KV_BLOCK / tokens * ((D + channels - 1) / channels);
    static constexpr int code_bytes = Kind::beside == Beside::codes ? 0 : KV_BLOCK * D * Kind::bits / 8;
    using Block = ScalarBlock<code_bytes, groups * (has_zero ? 2 : 1)>;
    static_assert(sizeof(Block) == code_bytes + groups * (has_zero ? 4 : 2), "Scalars::Block is not the table above");

    HD static ScalarFields fields(Block &b, int8_t *beside) {
        return {Kind::rule, rotated, D, Kind::bits, tokens, channels, Kind::beside == Beside::codes ? (uint8_t *)beside : b.codes(),
                b.scale_zero, has_zero ? b.scale_zero + groups : nullptr, Kind::beside == Beside::matrix ? (const f16 *)beside : nullptr};
    }
    template <int N> HD static void load_code(float (&x)[N], const Block &b, const int8_t *beside, int t, int c) {
        const ScalarFields f = fields(const_cast<Block &>(b), const_cast<int8_t *>(beside));
        for (int i = 0; i < N; i++) x[i] = f.at(t, c + i);
    }
    template <int N> HD static void load_plain(float (&x)[N], const Block &, int, int) {
        for (int i = 0; i < N; i++) x[i] = 0.0f;
    }
};

template <int D> using Kivi2Keys = Scalars<D, ScalarKind<2, 32, 1, ScalarRule::min_max, false>>;
template <int D> using Kivi2Values = Scalars<D, ScalarKind<2, 1, 32, ScalarRule::min_max, false>>;
template <int D> using Q8 = Scalars<D, ScalarKind<8, 1, 32, ScalarRule::absmax, true>>;
template <int D> using Q4 = Scalars<D, ScalarKind<4, 1, 32, ScalarRule::extreme, true>>;
template <int D> using Tq2 = Scalars<D, ScalarKind<2, 1, 0, ScalarRule::normal4, true>>;
template <int D> using Nqkv = Scalars<D, ScalarKind<4, 0, 0, ScalarRule::nf4, false>>;
template <int D> using Deco4 = Scalars<D, ScalarKind<4, 1, 0, ScalarRule::absmax, false, Beside::matrix>>;
template <int D> using XquantKeys = Scalars<D, ScalarKind<2, 64, 1, ScalarRule::calibrated, false, Beside::codes>>;
template <int D> using XquantValues = Scalars<D, ScalarKind<1, 1, 128, ScalarRule::calibrated, false, Beside::codes>>;
static_assert(sizeof(Kivi2Keys<128>::Block) == 3072 && sizeof(Kivi2Values<128>::Block) == 3072, "3 bits");
static_assert(sizeof(Q8<128>::Block) == 8704 && sizeof(Q4<128>::Block) == 4608 && sizeof(Tq2<128>::Block) == 2176, "8.5, 4.5, 2.125 bits");
static_assert(sizeof(Nqkv<128>::Block) == 4160 && sizeof(Deco4<128>::Block) == 4224, "4.0625, 4.125 bits");
static_assert(sizeof(XquantKeys<128>::Block) == 512 && sizeof(XquantValues<128>::Block) == 256, "0.5, 0.25 bits and the codes");
static_assert(sizeof(Kivi2Keys<48>::Block) == 64 * 12 + 2 * 48 * 4 && sizeof(Kivi2Values<48>::Block) == 64 * 12 + 64 * 2 * 4, "a short last group");
static_assert(tokens_of_256(256) == 1 && tokens_of_256(136) == 1 && tokens_of_256(128) == 2 && tokens_of_256(48) == 4 && tokens_of_256(8) == 32,
              "256 values at most");
