// random_weights.h - a Model without a file: random weights made in the memory of the device, for --bench --shape.
#pragma once
#include "model.h"

// Matrices of `type` hold near-normal numbers of deviation 1/sqrt(dim), norms are 1.  One buffer of such numbers is uploaded
// again and again until all tensors are full, so this takes as long as the copies; build/random_model makes weights that
// are all different.  The tokenizer is empty.
Model random_weights(const Config &c, DType type, const Ops &ops);

// Element i of a random sequence `key`: the sum of the four 16-bit parts of one mixed 64-bit number, less its mean.  Close
// enough to normal for weights, and it costs no logarithm or cosine.  Its deviation is NEAR_NORMAL_DEVIATION:
// four times the variance (2^32 - 1) / 12 of a uniform 16-bit number, under the root.
inline uint64_t splitmix64(uint64_t z) {
    z += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}
constexpr double NEAR_NORMAL_DEVIATION = 37837.22723720648;
inline float near_normal(uint64_t key, uint64_t i) {
    const uint64_t z = splitmix64(key + i), sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
    return (float)sum - 4 * 32767.5f;
}
