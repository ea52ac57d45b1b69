/* decode_codes_one - decode attention over NSN codes on tensor cores where every query head has its own kv head: decode_codes.cu's
   arithmetic with the columns of its B operands put to other use.

   Math      decode_codes.cu's.
   Work      As there; the means of four blocks are done together.
   Fragments Lane (g, t) = (lane / 4, lane % 4) has the scores of tokens a = 16 t + g and a + 8.
               keys    row g + 8 h of tile i is token 16 i + 8 h + g; all pairs of columns are the query's (hi, lo), so that every lane
                       has the products of its rows, and takes those of tile t
               means   columns b and b + 4 are block b's z: E is read once for four blocks
               values  a row is a word of 4 neighbouring channels as the codebook has it, k runs over 8 tokens x 4 bytes.  Column n has
                       the weight's byte n / 4 (hi, lo) where k is byte n % 4 of a word, else 0: channel 4 row + n % 4.
   Memory    decode_codes.cu's without token factors, with 8 means a warp.  Where z was: for each of four blocks the mean scores, a pair a
             lane, and behind them the weights of the block at work.
   Cost      As there, 32 rows, 32 heads, 4,096 tokens:
               nsn4b 590   1,124 48%   440 75%          nsn2b 369     746 51%   258 70%, memory 69%
               nsn2  436   1,046 60%   271 62%          nsn1  329     642 49%   247 75%
             nsn2b takes 111 us, of which memory alone would take 96: exact tokens and the ends of parts are the rest.  With a byte of signs
             a code nsn2 had 1,189 instructions, 61% of what ALUs can: 127 us for 115 to 116.  One row, nsn2b: 10.2 us; 10.6 when the end of a
             part exchanged its sums one by one, each behind a branch.
             Tried: 8 warps of 255 registers (32 rows: nsn2b 106.6 for 111.8, nsn1 83.3 for 83.8, but nsn2 118.2 for 113.6, and one row of 32,768
             tokens nsn2b 31.9 for 31.0); 14 of 128 (156 us when 12 took 146); three blocks of keys on their way (as fast), a fifth
             half block of either (123.5 for 118.8); both asked for half a block later (as fast); exact tokens prefetched to L2 (124 for
             117); 256-byte hints (117.7), 128-byte ones (116.9 for 117.4); teams of 2, 4, 6, 12 warps (139, 123, 128, 155 for 117 of 3).
   Tested by tests/test_cuda_decode.cpp                       Timed by tests/bench_decode.cu                             */
#ifdef __CUDACC__
#include "decode_codes.cuh"
namespace cuda {

// Second scales of tokens t and t + 8 of the field at `at`, and first ones.
__device__ static float2 scales_of(uint32_t at, int t, const ScaleF16 *) {
    const uint32_t from = at + 2 * t;
    return make_float2(to_f32(load_shared<f16>(from)), to_f32(load_shared<f16>(from + 16)));
}
__device__ static float2 scales_of(uint32_t at, int t, const ScaleLog8 *) {
    const uint32_t from = at + t, u = load_shared<uint8_t>(from), v = load_shared<uint8_t>(from + 8);
    const float2 grid = unpack(load_shared<uint32_t>(at + offsetof(ScaleLog8, step)));    // step, min
    const float below = grid.y - grid.x;
    return make_float2(u ? exp2_fast(fmaf(grid.x, (float)u, below)) : 0.0f, v ? exp2_fast(fmaf(grid.x, (float)v, below)) : 0.0f);
}
__device__ static float2 first_norms_of(uint32_t at, int t) {
    const uint32_t from = at + t / 2, shift = t % 2 * 4, u = load_shared<uint8_t>(from) >> shift & 15, v = load_shared<uint8_t>(from + 4) >> shift & 15;
    const float2 grid = unpack(load_shared<uint32_t>(at + offsetof(FirstNorm, step)));
    return make_float2(fmaf(grid.x, (float)u, grid.y), fmaf(grid.x, (float)v, grid.y));
}

// No token's first norm is larger.
__device__ static float first_norm_bound(uint32_t at) {
    const float2 grid = unpack(load_shared<uint32_t>(at + offsetof(FirstNorm, step)));
    return fmaf(grid.x, 15.0f, grid.y);
}
// The warp's sum of numbers from 0 to `bound`, each to 2^-25 of it: a sum of integers is one instruction.  NaN if bound is.
__device__ static float sum_below(float x, float bound) {
    const uint32_t exponent = max(__float_as_uint(bound) & 0x7f800000u, 40u << 23);
    const float unit = __uint_as_float(exponent - (24u << 23)), inverse = __uint_as_float((254u + 24 << 23) - exponent);
    return fmaf((float)__reduce_add_sync(~0u, __float2int_rn(x * inverse)), unit, 0.0f * bound);
}

template <class K, class V> __global__ void __launch_bounds__(32 * Layout<K, V, 1>::WARPS, 1) decode_codes_one_kernel(const __grid_constant__ DecodeArgs a) {
    using S = Layout<K, V, 1>;
    using KB = typename K::Block;
    using VB = typename V::Block;
    constexpr int D = K::d, PAIRS = D / 64, C = D / 32;    // PAIRS: RoPE pairs of a lane
    ask_for_arguments(a, S::part(threadIdx.x / 32));
    constexpr int K_BYTES = D / 4 / K::channels, V_BYTES = D / 8 / V::channels, VW = V_BYTES < 4 ? 1 : V_BYTES / 4;
    constexpr int STEPS = D / 32, TILES = D / 64;                  // mma steps over channels; tiles of 16 words
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, token = 16 * t + g;
    const uint32_t z_at = S::warp_at(warp);    // (8, D/2) column, pair: (cosine part, sine part) in f16
    const uint32_t z_store = opaque(z_at + PAIRS * lane * 4);                // odd columns have their 64-byte halves swapped, so that
    const uint32_t z_load = opaque(z_at + g % 4 * (D / 2) * 4 + 16 * t + g % 2 * 64);    // neighbours lie in different banks
    // Of block b: (tile, token % 8, token / 8 % 2), 8 words left out between tiles 1 and 2 and after 3: 16 lanes lie in different banks.
    const uint32_t mean_store = opaque(z_at + 2 * t * S::MEAN_SCORES + 8 * g), mean_load = opaque(z_at + 64 * t + t / 2 * 32 + 8 * g);
    const uint32_t weight_store = opaque(z_at + S::WEIGHTS + 4 * lane), weight_load = opaque(z_at + S::WEIGHTS + 16 * t);
    const uint32_t E = opaque(S::E(lane)), means = opaque(S::means(warp));
    const uint32_t k_lane = opaque(g * (D / K::channels) + K_BYTES * t), v_lane = opaque(t * (D / V::channels) + V_BYTES * g);    // of the codes
    // Byte g % 4 is the hi or lo byte of the lower or upper half, the others 0.
    const uint32_t select = (0x4444u & ~(15u << g % 4 * 4)) | (g < 4 ? 1u : 0u) << g % 4 * 4, select_upper = select + (2u << g % 4 * 4);

    if (a.b.N <= FEW_ROWS) let_next_start();
    Turns<K, V, S, 1> turns;
    if (!turns.start(a)) return;
    Part &p = turns.p;
    BlockRing<K, V, S> &ring = turns.ring;
    const uint32_t k_table = S::template copy<K>(S::K_TABLE, lane), v_table = S::template copy<V>(S::V_TABLE, lane);
    if (p.task >= turns.tasks(a)) return;
    do {
        if (!p.there()) continue;
        Floats<PAIRS> base[4][2];                                  // of the next four blocks
        if (p.count > 0) ring.load_base(a, base, 0);
        Floats<C> query[1];                                        // pairs PAIRS lane ..
        uint32_t bq[1][2 * STEPS];
        const float2 unit_sum = prepare_query<S>(p, turns.query, query, bq[0]);
        const float unit = unit_sum.x * K::delta, half_sum = unit * unit_sum.y, (&q)[2 * PAIRS] = query[0].x;
        ring.load_second(a);
        p.keep(S::part(warp));
        float m = -INFINITY, l = 0, w_sum = 0, out[TILES][4] = {}, plain[1][C] = {};    // l and w_sum of the lane's tokens

#pragma unroll 1
        for (int j = 0; j < p.count; j++) {
            const uint32_t kb = ring.keys_at(j), vb = ring.values_at(j);
            ring.wait_keys();
            if (j % 4 == 0) {    // means of this block and the next three
                const uint32_t z_store_odd = other_half(z_store), z_load_odd = other_half(z_load);
#pragma unroll
                for (int two = 0; two < 4; two += 2) {
                    if (j + two >= p.count) break;
                    Floats<PAIRS> lo[2], hi[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const uint32_t mean = means + j % S::MEANS * S::MEAN + (two + i) * S::MEAN;
                        lo[i] = mean_at<D, PAIRS>(mean, PAIRS * lane), hi[i] = mean_at<D, PAIRS>(mean, PAIRS * lane + D / 2);
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float zc[PAIRS], zs[PAIRS];
#pragma unroll
                        for (int k = 0; k < PAIRS; k++) {
                            const float c = base[two + i][0].x[k], s = base[two + i][1].x[k];
                            const float ml = lo[i].x[k] * c - hi[i].x[k] * s, mh = lo[i].x[k] * s + hi[i].x[k] * c;
                            zc[k] = q[k] * ml + q[PAIRS + k] * mh, zs[k] = q[PAIRS + k] * ml - q[k] * mh;
                        }
                        Words<PAIRS> z;
                        if constexpr (S::BY_PART) z = {{pack(zc[0], zc[1]), pack(zs[0], zs[1])}};
                        else z = {{pack(zc[0], zs[0])}};
                        store_shared((i % 2 ? z_store_odd : z_store) + (two + i) * (D / 2) * 4, z);
                    }
                }
                if (j + 4 < p.count) ring.load_base(a, base, j + 4);
                __syncwarp();
                float sums[1][4][4] = {};
                multiply_E<S>(sums, E, z_load, z_load_odd);
                const auto &c = sums[0];
#pragma unroll
                for (int tile = 0; tile < 4; tile++)    // of blocks 2 t and 2 t + 1
                    for (int i = 0; i < 2; i++)
                        if (t < 2) store_shared(mean_store + i * S::MEAN_SCORES + 64 * tile + tile / 2 * 32, Words<2>{{__float_as_uint(c[tile][i]), __float_as_uint(c[tile][2 + i])}});
                __syncwarp();
            }
            // scores
            int dot[4][2];
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                int e[1][4] = {};
                multiply_keys<K>(e, kb + k_lane, tile, bq, k_table);
                dot[tile][0] = e[0][0] * 256 + e[0][1], dot[tile][1] = e[0][2] * 256 + e[0][3];
            }
            float score[2];
            {
                const float2 s1 = first_norms_of(kb + offsetof(KB, s1), token), s2 = scales_of(kb + offsetof(KB, s2), token, &((KB *)nullptr)->s2);
                const float2 mean = load_shared<float2>(mean_load + j % 4 * S::MEAN_SCORES);
                auto code = [&](int i) {
                    const int x = t & 1 ? dot[1][i] : dot[0][i], y = t & 1 ? dot[3][i] : dot[2][i];
                    return fmaf((float)(t & 2 ? y : x), unit, half_sum);
                };
                score[0] = s1.x * fmaf(code(0), s2.x, mean.x), score[1] = s1.y * fmaf(code(1), s2.y, mean.y);
            }
            __syncwarp();
            ring.release_keys(a, j);
            // softmax in base 2; m follows when it is 2^8 too small
            float top = fmaxf(score[0], score[1]);
            if (__any_sync(~0u, top > m + 8)) {
                const float up = fmaxf(m, warp_max(top)), old = exp2_fast(m - up);
                m = up, l *= old, w_sum *= old;
                for (int i = 0; i < TILES; i++)
                    for (int c = 0; c < 4; c++) out[i][c] *= old;
                for (int c = 0; c < C; c++) plain[0][c] *= old;
            }
            ring.wait_values();
            const float2 s1 = first_norms_of(vb + offsetof(VB, s1), token), s2 = scales_of(vb + offsetof(VB, s2), token, &((VB *)nullptr)->s2);
            const float p0 = exp2_fast(score[0] - m), p1 = exp2_fast(score[1] - m), weight0 = p0 * s1.x * s2.x, weight1 = p1 * s1.y * s2.y;
            l += p0 + p1;
            const float s1_sum = sum_below(fmaf(p0, s1.x, p1 * s1.y), first_norm_bound(vb + offsetof(VB, s1)) * 512);    // p <= 2^8
            const uint32_t largest = __reduce_max_sync(~0u, __float_as_uint(fmaxf(fmaxf(weight0, weight1), 0.0f)));    // bits of numbers >= 0 are in their order
            const uint32_t exponent = max(largest & 0x7f800000u, 40u << 23);    // of the unit 2^-14 of the largest
            const float inverse = __uint_as_float((254u + 14 << 23) - exponent), w_unit = __uint_as_float(exponent - (14u << 23));
            // 1.5 2^23 + w has w in its low bits
            const uint32_t w0 = __float_as_uint(fmaf(weight0, inverse, 12582912.0f)), w1 = __float_as_uint(fmaf(weight1, inverse, 12582912.0f));
            w_sum = fmaf((float)(int)(w0 + w1 - 2u * 0x4B400000u), w_unit, w_sum);
            store_shared(weight_store, __byte_perm(w0, w1, 0x5410));
            __syncwarp();
            // values: k = 4 (token % 4) .. of step s, lower and upper half, are tokens 8 s + t and 8 s + t + 4, whose weights lanes 4 t + s / 2 and 16 more have
            const uint4 near = load_shared<uint4>(weight_load), far = load_shared<uint4>(weight_load + 64);
            const uint32_t w[2][4] = {{near.x, near.y, near.z, near.w}, {far.x, far.y, far.z, far.w}};
            int e[TILES][4] = {};
#pragma unroll
            for (int s = 0; s < 8; s++) {
                uint32_t x[2][2 * TILES], b[2];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint32_t code[VW], sign = 0;
                    const uint32_t at = vb + v_lane + (8 * s + 4 * half) * (D / V::channels);
                    load_bytes<V_BYTES>(code, at);
                    if constexpr (V::has_sign) sign = signs_at<V_BYTES>(at + KV_BLOCK * (D / V::channels));
                    look_up<V::channels, V::has_sign, V_BYTES>(x[half], code, sign, v_table);
                    b[half] = __byte_perm(w[half][s / 2], 0, s % 2 ? select_upper : select);
                }
#pragma unroll
                for (int i = 0; i < TILES; i++) mma_s8_u8(e[i], {x[0][2 * i], x[0][2 * i + 1], x[1][2 * i], x[1][2 * i + 1]}, b[0], b[1]);
            }
#pragma unroll
            for (int i = 0; i < TILES; i++)
                for (int c = 0; c < 4; c++) out[i][c] = fmaf((float)e[i][c], w_unit, out[i][c]);
            const Floats<C> mean = mean_at<D, C>(vb + offsetof(VB, mean), C * lane);
            for (int c = 0; c < C; c++) plain[0][c] = fmaf(s1_sum, mean.x[c], plain[0][c]);
            __syncwarp();
            ring.release_values(a, j);
        }

        p.fetch(S::part(warp));

        // Row g + 8 r of tile i is word 2 TILES g + 2 i + r; the hi parts are lanes t = 0, 1's, the lo parts lanes 2 and 3's: the former keep
        // r = 0, the latter r = 1.
        float sum[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++)
            for (int c = 0; c < 2; c++) {
                const float keep = t < 2 ? out[i][c] * 256.0f : out[i][2 + c], give = t < 2 ? out[i][2 + c] * 256.0f : out[i][c];
                sum[i][c] = keep + __shfl_xor_sync(~0u, give, 2);
            }
        l = warp_sum(l), w_sum = warp_sum(w_sum);
        float *const to = warp_result<S, 1>(warp).o[1][0] + 8 * TILES * g + t / 2 * 4 + t % 2 * 2;
        for (int i = 0; i < TILES; i++)
            for (int c = 0; c < 2; c++) to[8 * i + c] = (sum[i][c] + 0.5f * w_sum) * V::delta;
        finish_warp<S, 1>(a, p, [&](int) { return query[0]; }, {m}, {l}, plain);
    } while (turns.go_on(a));
}

void decode_codes_one(const DecodeArgs &a) {
    with_nsn(a.kv, [&](auto k, auto v) { launch_codes<Layout<decltype(k), decltype(v), 1>>(decode_codes_one_kernel<decltype(k), decltype(v)>, a); });
}
}    // namespace cuda
#endif
