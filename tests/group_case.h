// group_case.h - what the tests of q8 and q4 on both backends share.
#pragma once
#include "cases.h"
#include "../kernels/groups.h"

// A random matrix of whole groups in q8 or q4.
struct GroupMatrix {
    std::vector<uint8_t> code;
    std::vector<f16> scale;
    std::vector<float> f;    // what it holds, exactly
    Matrix m;
    GroupMatrix(size_t n, DType type, uint64_t seed, float deviation = 0.1f)
        : code(code_bytes(type, n)), scale(n / GROUP), f(random_floats(n, seed, deviation)) {
        quantize_groups(code.data(), scale.data(), type, f.data(), n);
        m = {code.data(), type, scale.data()};
        for (size_t i = 0; i < n; i++) f[i] = weight_at(m, i);
    }
    GroupMatrix(const GroupMatrix &) = delete;
};
constexpr DType GROUPED[] = {DType::q8, DType::q4};
