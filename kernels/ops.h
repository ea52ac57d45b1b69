// ops.h - everything the forward pass asks of a backend.
//
// Legend: N rows, B slots, Hq query heads, Hkv kv heads, G = Hq/Hkv, d head dimension (always innermost), D model
// dimension, F feed-forward dimension, V vocabulary, L layers, T positions.  Activations are f32, row-major.
#pragma once
#include <cstddef>
#include <cstdint>
#include "base.h"

enum class DType : uint8_t { f32, f16, bf16 };
inline int dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

// A weight matrix W (out, in), row-major; the shape is the caller's.
struct Matrix {
    const void *data = nullptr;
    DType type = DType::f32;
};
