// groups.h - weights in q8 and q4: whole numbers in groups of 32 neighbouring inputs that share a scale.
//
//   w[o,i] = scale[o, i/32] code[o,i]            code: q8 -128 ... 127, q4 -8 ... 7;  scale f16, of either sign
//
//   a matrix of q4, in = 64: codes of all rows, then (elsewhere) scales of all rows; each group's codes are 16 bytes
//
//   code   row 0 | byte j = 0 ... 15: input j in the low half, input 16 + j in the high, both + 8 | bytes of inputs 32 ... 63 |
//          row 1 | ...
//   scale  row 0 | inputs 0 ... 31: f16 | inputs 32 ... 63: f16 |
//          row 1 | ...
//
//   q8 has a byte an input in place of that, two's complement, in order.  8.5 and 4.5 bits a weight.
//
// Two arrays, so that codes and scales are aligned whatever the width, and so that a file shows them as plain tensors
// (tools/FORMAT.md).  16 inputs of q4 are the low halves of 16 neighbouring bytes: one load, no shuffle.
// A q4 scale has at most 8 significant bits, so that w is an f16 number and a product in f16 loses nothing.
#pragma once
#include <vector>
#include "ops.h"

constexpr int GROUP = 32;    // inputs that share a scale

inline bool is_grouped(DType t) { return t == DType::q8 || t == DType::q4; }
// Bytes of n codes or plain numbers, and of their scales; n is a multiple of GROUP for q8 and q4.
inline int64_t code_bytes(DType t, int64_t n) { return t == DType::q4 ? n / 2 : t == DType::q8 ? n : n * dtype_size(t); }
inline int64_t scale_bytes(DType t, int64_t n) { return is_grouped(t) ? n / GROUP * (int64_t)sizeof(f16) : 0; }
static_assert(GROUP % 32 == 0 && sizeof(f16) == 2, "a group of q4 is whole 16-byte loads");

// The code of input i of a row; `code` is where the row begins.
HD int code_q8(const void *code, int64_t i) { return ((const int8_t *)code)[i]; }
HD int code_q4(const void *code, int64_t i) { return (((const uint8_t *)code)[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15) - 8; }
// Element i of a whole matrix of any type, counted through: exact in f32 (11 bits of scale times 8 of code).
HD float weight_at(const Matrix &W, int64_t i) {
    switch (W.type) {
    case DType::f32: return ((const float *)W.data)[i];
    case DType::f16: return to_f32(((const f16 *)W.data)[i]);
    case DType::bf16: return to_f32(((const bf16 *)W.data)[i]);
    case DType::q8: return to_f32(W.scale[i / GROUP]) * code_q8(W.data, i);
    case DType::q4: return to_f32(W.scale[i / GROUP]) * code_q4(W.data, i);
    }
    return 0;
}

// n finite numbers, whole groups, become codes and scales of `type`.  A scale is infinite where a number is beyond the range,
// 127 x 65,504 for q8, some 8 x 65,280 for q4.
//   q8  the smallest f16 that reaches the largest |w| with code 127:  |w - w'| <= scale / 2
//   q4  least squares: of 38 ways to round the group, each with the scale that serves it best, the one with the least error
void quantize_groups(void *code, f16 *scale, DType type, const float *w, int64_t n);
