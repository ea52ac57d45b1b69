// kv_baselines.h - the scalar formats that others use: part of kv_block.h, which includes it.
//
// Every value has a code of B bits, and every group of values a scale; the formats differ in what a group is and in which
// values the codes name.  They have no plain part:
//   k_t = R code_t, v_t = R code_t,       code_t[c] = zero[g] + scale[g] * level[code],   g the group of (t, c)
// Keys are coded after RoPE.  Codes lie in a row lowest bits first: code c is bits B c .. B c + B-1 of the row.
// Groups are numbered along the channels, then along the tokens: g = t / tokens * ceil(d / channels) + c / channels.
// The last group of a row is shorter where `channels` does not divide d.
//
//             B  group: tokens x channels    levels        R   after
//   kivi2  K  2         32 x 1               zero + q      1   KIVI, arXiv 2402.02750, g = 32.  Its residual of 128 tokens
//          V  2          1 x 32              zero + q      1   is --recent 128 here; what is open is fp16 without being asked
//   q8        8          1 x 32              q - 128       H   llama.cpp's q8_0 behind its Hadamard rotation
//   q4        4          1 x 32              q - 8         H   q4_0
//   tq2       2          1 x d               normal4[q]    H   TurboQuant's scalars, arXiv 2504.19874, without its sketch of the rest
//
//   bytes at d = 128    kivi2     q8     q4    tq2     field, in this order
//   64 * d B/8           2048   8192   4096   2048     code[t]     row of codes of token t
//   groups * 2            512    512    512    128     scale[g]    f16
//   groups * 2            512                          zero[g]     f16
//                        3072   8704   4608   2176     = 3, 8.5, 4.5, 2.125 bits a value
#pragma once

// How a group's scale is chosen (scalar_seal.h), and what the codes stand for.
enum class ScalarRule : uint8_t {
    min_max,     // scale = (max - min) / (2^B - 1), zero = min            level = q
    absmax,      // scale = max |x| / (2^(B-1) - 1)                        level = q - 2^(B-1)
    extreme,     // scale = -(the x of largest |x|) / 2^(B-1): it gets code 0, the only level without a mirror image
    normal4,     // scale = root mean square; the levels are the four best for normal values (Lloyd-Max)
};
HD float scalar_level(ScalarRule rule, int bits, int q) {
    constexpr float normal4[] = {-1.5104f, -0.4528f, 0.4528f, 1.5104f};
    return rule == ScalarRule::min_max ? q : rule == ScalarRule::normal4 ? normal4[q] : q - (1 << (bits - 1));
}

// The fields of a block, for code that takes d at run time.
struct ScalarFields {
    ScalarRule rule;
    bool rotated;                       // R is the Hadamard matrix
    int d, bits, tokens, channels;      // of a group
    uint8_t *code;                      // (KV_BLOCK, d bits / 8)
    f16 *scale, *zero;                  // (groups); zero: null unless rule is min_max

    HD int groups_across() const { return (d + channels - 1) / channels; }
    HD int group(int t, int c) const { return t / tokens * groups_across() + c / channels; }
    HD int code_at(int t, int c) const {
        const int bit = (t * d + c) * bits;
        return code[bit / 8] >> bit % 8 & ((1 << bits) - 1);
    }
    HD float at(int t, int c) const {
        const int g = group(t, c);
        return (zero ? to_f32(zero[g]) : 0.0f) + to_f32(scale[g]) * scalar_level(rule, bits, code_at(t, c));
    }
};

// CHANNELS = 0: all d.
template <int D, int BITS, int TOKENS, int CHANNELS, ScalarRule RULE, bool ROTATED> struct Scalars {
    static constexpr int d = D;
    static constexpr bool has_code = true, has_plain = false, rotated = ROTATED, has_zero = RULE == ScalarRule::min_max;
    static constexpr int channels = CHANNELS == 0 || CHANNELS > D ? D : CHANNELS;
    static constexpr int groups = KV_BLOCK / TOKENS * ((D + channels - 1) / channels);
    struct Block {
        uint8_t code[KV_BLOCK][D * BITS / 8];
        f16 scale_zero[groups * (has_zero ? 2 : 1)];    // scale[groups], then zero[groups]
    };
    static_assert(sizeof(Block) == KV_BLOCK * D * BITS / 8 + groups * (has_zero ? 4 : 2), "Scalars::Block is not the table above");

    HD static ScalarFields fields(Block &b) {
        return {RULE, ROTATED, D, BITS, TOKENS, channels, b.code[0], b.scale_zero, has_zero ? b.scale_zero + groups : nullptr};
    }
    template <int N> HD static void load_code(float (&x)[N], const Block &b, const int8_t *, int t, int c) {
        const ScalarFields f = fields(const_cast<Block &>(b));
        for (int i = 0; i < N; i++) x[i] = f.at(t, c + i);
    }
    template <int N> HD static void load_plain(float (&x)[N], const Block &, int, int) {
        for (int i = 0; i < N; i++) x[i] = 0.0f;
    }
};

template <int D> using Kivi2Keys = Scalars<D, 2, 32, 1, ScalarRule::min_max, false>;
template <int D> using Kivi2Values = Scalars<D, 2, 1, 32, ScalarRule::min_max, false>;
template <int D> using Q8 = Scalars<D, 8, 1, 32, ScalarRule::absmax, true>;
template <int D> using Q4 = Scalars<D, 4, 1, 32, ScalarRule::extreme, true>;
template <int D> using Tq2 = Scalars<D, 2, 1, 0, ScalarRule::normal4, true>;
static_assert(sizeof(Kivi2Keys<128>::Block) == 3072 && sizeof(Kivi2Values<128>::Block) == 3072, "3 bits");
static_assert(sizeof(Q8<128>::Block) == 8704 && sizeof(Q4<128>::Block) == 4608 && sizeof(Tq2<128>::Block) == 2176, "8.5, 4.5, 2.125 bits");
static_assert(sizeof(Kivi2Keys<48>::Block) == 64 * 12 + 2 * 48 * 4 && sizeof(Kivi2Values<48>::Block) == 64 * 12 + 64 * 2 * 4, "a short last group");
