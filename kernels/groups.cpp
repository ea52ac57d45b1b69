// groups.cpp - see groups.h: numbers become codes.
#include "groups.h"
#include <algorithm>
#include <cmath>
#include "simd.h"

static void quantize_q8(int8_t *code, f16 *scale, const float *w) {
    float largest = 0;
    for (int i = 0; i < GROUP; i++) largest = std::max(largest, std::fabs(w[i]));
    f16 s = to_f16(largest / 127);
    if (to_f32(s) * 127 < largest) s.bits++;    // the next f16 up; infinity follows 65504
    *scale = s;
    const float step = to_f32(s), inverse = step > 0 && std::isfinite(step) ? 1 / step : 0;
    for (int i = 0; i < GROUP; i++) code[i] = (int8_t)std::lrint(std::min(127.0f, std::max(-127.0f, w[i] * inverse)));
}

// To the nearest f16 of 8 significant bits: fewer bits below 2^-14, where f16 itself has fewer.
static f16 round_scale(float s) {
    const uint32_t u = f32_to_bits(s);
    return to_f16(bits_to_f32((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000));    // of bf16, which has as many
}

// The codes that are nearest to u * factor, as numbers.
LANE_FUNCTION f32x16 round_codes(f32x16 u, float factor) {
    const float magic = 12582912.0f;    // 1.5 2^23: adding it rounds to an integer
    for (int i = 0; i < PARTS; i++) {
        const vn q = (u.part[i] * factor + magic) - magic, least = q < -8.0f ? -8.0f - vn{} : q;
        u.part[i] = least > 7.0f ? 7.0f - vn{} : least;
    }
    return u;
}

// Weights are not spread evenly between their extremes, so the scale that reaches the largest is seldom the best.  The largest
// may meet -8 or 7 (a scale of either sign does that), and is tried with codes of 6.2 to 8 and a bit.
// Squared error on weights of books-46m against the largest at -8: 0.88 times.
// Tried: 16 levels spaced as normal numbers are instead of evenly: 0.73 times, but tensor cores want numbers and a GPU would
// spend twice as many instructions on a code as now.
static void quantize_q4(uint8_t *code, f16 *scale, const float *w) {
    float size = 0;
    for (int i = 0; i < GROUP; i++) size = std::max(size, std::fabs(w[i]));
    *scale = f16{0};
    memset(code, 0x88, GROUP / 2);    // zeros
    if (size < 0x1p-100f) return;
    const f32x16 unit = splat16(1 / size), u[2] = {load16(w) * unit, load16(w + LANES) * unit};    // within 1
    float best = 0;    // sum u^2 less the squared error
    for (int i = 0; i < 38; i++) {
        const float factor = (i % 2 ? -1 : 1) * (6.2f + 0.125f * (i / 2));
        const f32x16 q[2] = {round_codes(u[0], factor), round_codes(u[1], factor)};
        const float uq = sum16(u[0] * q[0] + u[1] * q[1]), qq = sum16(q[0] * q[0] + q[1] * q[1]);
        const f16 s = round_scale(uq / qq * size);
        const float t = to_f32(s) / size, gain = t * (2 * uq - t * qq);
        if (std::isfinite(t) ? gain > best : best == 0) *scale = s;    // infinite only if all are
        if (std::isfinite(t)) best = std::max(best, gain);
    }
    if (scale->bits == 0 || std::isinf(to_f32(*scale))) return;
    // the nearest codes for the scale as it is written
    float q[GROUP];
    for (int h = 0; h < 2; h++) store16(q + h * LANES, round_codes(u[h], size / to_f32(*scale)));
    for (int j = 0; j < 16; j++) code[j] = (uint8_t)((int)(q[j] + 8) | (int)(q[j + 16] + 8) << 4);
}

void quantize_groups(void *code, f16 *scale, DType type, const float *w, int64_t n) {
#pragma omp parallel for if (n > 1 << 16)
    for (int64_t g = 0; g < n / GROUP; g++) {
        if (type == DType::q8) quantize_q8((int8_t *)code + g * GROUP, scale + g, w + g * GROUP);
        else quantize_q4((uint8_t *)code + g * GROUP / 2, scale + g, w + g * GROUP);
    }
}
