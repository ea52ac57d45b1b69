// groups.cpp - see groups.h: numbers become codes.
#include "groups.h"
#include <algorithm>
#include <cmath>

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

// The codes that are nearest for 1 / scale = inverse, as numbers.
static void round_codes(float (&q)[GROUP], const float *w, float inverse) {
    const float magic = 12582912.0f;    // 1.5 2^23: adding it rounds to an integer
    for (int i = 0; i < GROUP; i++) q[i] = std::min(7.0f, std::max(-8.0f, (w[i] * inverse + magic) - magic));
}

// Weights are not spread evenly between their extremes, so the scale that reaches the largest is seldom the best.  The largest
// may meet -8 or 7 (a scale of either sign does that), and is tried with codes of 6.2 to 8 and a bit.
// Squared error on weights of books-46m against the largest at -8: 0.88 times.
// Tried: 16 levels spaced as normal numbers are instead of evenly: 0.73 times, but tensor cores want numbers and a GPU would
// spend twice as many instructions on a code as now.
static void quantize_q4(uint8_t *code, f16 *scale, const float *w) {
    float largest = 0, size = 0;
    for (int i = 0; i < GROUP; i++)
        if (std::fabs(w[i]) > size) largest = w[i], size = std::fabs(w[i]);
    float best[GROUP] = {}, q[GROUP];
    *scale = f16{0};
    float gain = 0;    // of the best so far: sum w^2 less its squared error
    for (int sign = -1; sign <= 1; sign += 2)
        for (int i = 0; size >= 0x1p-100f && i < 19; i++) {
            round_codes(q, w, sign * (6.2f + 0.125f * i) / largest);
            float wq = 0, qq = 0;
            for (int j = 0; j < GROUP; j++) wq += w[j] / size * q[j], qq += q[j] * q[j];
            const f16 s = round_scale(wq / qq * size);
            const float t = to_f32(s) / size, better = t * (2 * wq - t * qq);
            if (better > gain || std::isinf(t)) gain = better, *scale = s, std::copy(q, q + GROUP, best);
        }
    const float s = to_f32(*scale);
    if (s != 0 && std::isfinite(s) && std::isfinite(1 / s)) round_codes(best, w, 1 / s);    // the nearest for the rounded scale
    for (int j = 0; j < 16; j++) code[j] = (uint8_t)((int)(best[j] + 8) | (int)(best[j + 16] + 8) << 4);
}

void quantize_groups(void *code, f16 *scale, DType type, const float *w, int64_t n) {
#pragma omp parallel for if (n > 1 << 16)
    for (int64_t g = 0; g < n / GROUP; g++) {
        if (type == DType::q8) quantize_q8((int8_t *)code + g * GROUP, scale + g, w + g * GROUP);
        else quantize_q4((uint8_t *)code + g * GROUP / 2, scale + g, w + g * GROUP);
    }
}
