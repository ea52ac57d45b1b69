// base.h - errors and number formats: the only header of ours that every folder may include.
//
// Errors   A bad file, shape or resource ends the program with one line on stderr and exit code 1; a wrong or
//          unsupported request with exit code 2.  Both travel as an exception, so that half-written files are removed on
//          the way out and tests can look at the line; only main() prints it.  A message names file, name, expected,
//          found.  Never throw inside an OpenMP region.
// Numbers  f16 and bf16 are raw bits, so that files, cache blocks and both backends agree on the bytes.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HD __host__ __device__ inline
#else
#define HD inline
#endif

struct Error : std::runtime_error {
    int exit_code;    // 1 bad data or too few resources, 2 usage or not supported
    Error(int exit_code, const std::string &line) : std::runtime_error(line), exit_code(exit_code) {}
};

inline std::string format_args(const char *fmt, va_list args) {
    va_list again;
    va_copy(again, args);
    std::string s(vsnprintf(nullptr, 0, fmt, args), '\0');
    vsnprintf(&s[0], s.size() + 1, fmt, again);
    va_end(again);
    return s;
}
#if defined(__GNUC__)
#define PRINTF_LIKE __attribute__((format(printf, 1, 2)))
#else
#define PRINTF_LIKE
#endif
inline std::string strf(const char *fmt, ...) PRINTF_LIKE;
[[noreturn]] inline void fail(const char *fmt, ...) PRINTF_LIKE;      // bad data, missing file, too little memory
[[noreturn]] inline void refuse(const char *fmt, ...) PRINTF_LIKE;    // wrong usage, or something we do not support

inline std::string strf(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = format_args(fmt, args);
    va_end(args);
    return s;
}
inline void fail(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = format_args(fmt, args);
    va_end(args);
    throw Error(1, s);
}
inline void refuse(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = format_args(fmt, args);
    va_end(args);
    throw Error(2, s);
}

struct f16  { uint16_t bits; };    // IEEE half
struct bf16 { uint16_t bits; };    // the upper half of an f32

HD float bits_to_f32(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
HD uint32_t f32_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

HD float to_f32(float x) { return x; }
HD float to_f32(bf16 h) { return bits_to_f32((uint32_t)h.bits << 16); }
HD float to_f32(f16 h) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(h.bits));
#else
    const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, e = h.bits >> 10 & 31, m = h.bits & 1023;
    if (e == 31) return bits_to_f32(sign | 0x7f800000 | m << 13);
    if (e != 0) return bits_to_f32(sign | (e + 112) << 23 | m << 13);
    return bits_to_f32(sign | f32_to_bits(m * 5.9604644775390625e-8f));    // subnormal: m 2^-24
#endif
}
// Round to nearest, ties to even; beyond the range becomes infinity, NaN stays NaN.
HD f16 to_f16(float x) {
#ifdef __CUDA_ARCH__
    return f16{__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t u = f32_to_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return f16{(uint16_t)(sign | 0x7e00)};
    if (a >= 0x477ff000) return f16{(uint16_t)(sign | 0x7c00)};        // 65520 and above
    if (a < 0x38800000) {                                              // subnormal: units of 2^-24; adding 2^-1 rounds
        const uint32_t r = f32_to_bits(bits_to_f32(a) + 0.5f) - f32_to_bits(0.5f);
        return f16{(uint16_t)(sign | r)};
    }
    return f16{(uint16_t)(sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13))};
#endif
}
HD bf16 to_bf16(float x) {
    const uint32_t u = f32_to_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return bf16{(uint16_t)(u >> 16 | 0x40)};
    return bf16{(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
