// product_case.h - what the tests of the GPU's products share: which way they go, the same in f64.
#pragma once
#include "cuda_case.h"
#include "group_case.h"

namespace reference {
void matmul(float *y, const float *x, Matrix W, int N, int in, int out);
}

// Which way products of N rows go (matmul.cu): up to FEW_ROWS rows kernels with x in f32; in front of those, where it serves, and
// up to BATCH_ROWS rows gemm_batch.cu, with x in f16; else cuBLAS.
constexpr int FEW_ROWS = 8, BATCH_ROWS = 32;
#if WITH_CUDA
namespace cuda {
bool gemm_batch_serves(DType type, int N, int in);
}
inline bool through_batch(DType type, int N, int in) { return cuda::gemm_batch_serves(type, N, in); }
#else
inline bool through_batch(DType, int, int) { return false; }
#endif
inline bool through_few(DType type, int N, int in) { return N <= FEW_ROWS && !through_batch(type, N, in); }
inline bool through_cublas(DType type, int N, int in) { return N > FEW_ROWS && !through_batch(type, N, in); }
// The most rows of a step whose bits are those that each has alone.
inline int rows_as_alone(DType type, int in) {
    int N = FEW_ROWS;
    while (!through_few(type, N, in)) N--;
    return N;
}

// The products of n = rmsnorm(x), in f64, and the bound on what a result may be off by.
struct NormedProducts {
    int in;
    std::vector<float> gain;
    std::vector<double> n;     // (N,in)
    double bound;              // of an error, over sum |n||w| and what `least` adds
    std::vector<double> least; // (N) what a small |n| is off by where g x is rounded to f16 before it is divided by rms(x)
    NormedProducts(const std::vector<float> &x, int N, int in, bool fused, bool rounds, bool bf16, float eps) : in(in), gain(random_floats(in, 6)) {
        for (int r = 0; r < N; r++) {
            double squares = 0;
            for (int i = 0; i < in; i++) squares += (double)x[(size_t)r * in + i] * x[(size_t)r * in + i];
            for (int i = 0; i < in; i++) n.push_back(gain[i] * x[(size_t)r * in + i] / std::sqrt(squares / in + eps));
            least.push_back(rounds && fused ? 0x1p-25 / std::sqrt(squares / in + eps) : 0);
        }
        // additions as in matmul alone.  In n: a few roundings of f32; fused, 2^-21 of the squares and x in 22 bits; many rows: of
        // f16, or to two bf16 numbers
        bound = (in + 16) * 0x1p-23 + (fused ? 0x1p-20 : 0);
        if (rounds) bound += 0x1.01p-11;
        if (N > FEW_ROWS && bf16) bound += in * 0x1p-23 + 0x1p-16;
    }
    // Output o of row r, and the size that the bound is of.
    template <class HostWeights> double operator()(const HostWeights &W, int r, int o, double *size) const {
        double sum = 0;
        *size = 0;
        for (int i = 0; i < in; i++) {
            const double p = n[(size_t)r * in + i] * W.f[(size_t)o * in + i];
            sum += p, *size += std::fabs(p) + least[r] / bound * std::fabs(W.f[(size_t)o * in + i]);
        }
        return sum;
    }
};

// Weights of any type on the device.
struct DeviceMatrix {
    OnDevice<uint8_t> code;
    OnDevice<f16> scale;
    Matrix m;
    DeviceMatrix(const Ops &ops, const GroupMatrix &W) : code(ops, W.code), scale(ops, W.scale), m{code.p, W.m.type, scale.p} {}
    DeviceMatrix(const Ops &ops, const HostMatrix &W) : code(ops, W.bytes), scale(ops, 1), m{code.p, W.type} {}
    // Those behind the first n weights.
    Matrix behind(int64_t n) const {
        return {(const uint8_t *)m.data + code_bytes(m.type, n), m.type, is_grouped(m.type) ? m.scale + n / GROUP : nullptr};
    }
};
