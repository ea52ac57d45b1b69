/* decode_codes - decode attention over NSN codes on tensor cores (attention_decode.cu calls it).

   Math      Of a block of 64 tokens at a time, for a set of up to QUERIES query heads, or two sets, which share all lookups:
               keys    codewords are 8-bit x + 1/2, R q is a 16-bit integer in two bytes (hi, lo), so mma.sync s8 is exact:
                       sum q (x + 1/2) = 256 sum hi x + sum lo x + (sum q) / 2
               means   s1[t] q . RoPE_t(mean), the mean turned to the block's start once: z_j = (q_lo m_lo + q_hi m_hi, q_hi m_lo - q_lo m_hi),
                       in pairs of f16, times the 64 x d matrix E of the cosines and sines of tokens 0..63, f16 with sums in f32
               values  weights p[t] s1[t] s2[t] are 16-bit integers with a power of two of the block as unit, in two bytes
   Work      A part's blocks go in turn to the warps of a team; keys and values of a block come to shared memory as soon as those
             of the block before the last are done with.  Means of up to four blocks (Layout) are done together, so that E is read once.
             Tokens that are exact (sinks, recents, open) are shared among the same warps, 8 at a time (attention_decode.cuh).
             Few rows: a team is a thread block.  Many: what keeps all of them busy to the end (shares_of_many), often one part a
             row and head, whose sums then never leave the SM.  Sums of codewords of a team are merged before R turns them, once a query.
   Fragments Lane (g, t) = (lane / 4, lane % 4).
               keys    row g + 8 h of tile i is token 16 i + 8 h + g, k runs over channels; columns 2 t, 2 t + 1 are query t's (hi, lo)
               means   rows as for keys, k runs over pairs of channels; columns 2 t, 2 t + 1 are query t's z of two blocks, or of two sets
               values  a row is two neighbouring channels, k runs over 16 tokens x these two.  Columns 2 t, 2 t + 1 have query t's weights
                       (hi, lo) where k is an even channel, else 0; moved by a byte they serve the odd channels.
   Memory    Shared, by address:
               1 K   K's codebook: codeword k at 128 k, one copy a lane (pair) | V's, if it is another | E | warps ...
                     a warp: z, 2 blocks, token factors, means, its part; where z was, then weights and the next blocks' mean scores
                     | queries of teams
   Cost      ncu, d 128, 8 kv heads, 8,192 tokens, the call's for each block of a multiprocessor: clocks; warp instructions, share of the issue
             slots; wavefronts of shared memory, share of the clocks
               4 queries, 32 rows   nsn4b 804   1,393 44%   529 66%          nsn2b 503     977 49%   306 61%
                                    nsn2  606   1,281 53%   320 53%          nsn1  480     880 46%   295 61%
               8 queries, 16 rows   nsn4b 1,122 1,764 40%   682 61%          nsn2b 851   1,365 40%   430 51%
                                    nsn2  1,008 1,718 43%   447 44%          nsn1  851   1,345 40%   425 50%
             Memory alone would take 340 clocks (nsn2b), 195 (nsn1).  Of nsn2b's wavefronts 128 are codewords, 32 E (64 when it was read for
             two blocks).  No pipe is full: of the 3.8 cycles between two instructions of a warp (8 queries 4.3) one issues, 1.0 is fixed
             latencies (1.0), shared memory takes 0.5 (0.4), each other 0.4 (0.4), dispatch 0.3 (0.4), pipes 0.2 (0.3), global memory 0.2 (0.3),
             the end of a part 0.1 (0.3).  So fewer bytes (nsn1) are hardly faster, and nsn2 pays for its signs.
             Warps    A scheduler has 16 K registers: two warps of 255 or three of 168.  32 rows, nsn2b 63.8 us for 65.7 with three, nsn1 59.5 for
                      61.7, nsn2 77.2 for 76.9; one row of 131,072 tokens 35.8 for 38.4, 32.8 for 35.7, 42.0 for 43.9.  Twelve have no registers
                      for E's next fragments, four blocks' means, two sets: 8 queries spilled 15, 58.8 us for 52.7 (nsn2 74.4 for 60.7).
                      d 64: three (40.7 for 43.6).
             8 queries  51.7 us (16 rows of 64 heads, nsn2b) where two passes of four took 65.3: 3.7 times as fast as cuDNN's 191.2 us.  4.4 times
                      would be 43 us.  7 us are what a call takes for no tokens, one wave of 128 parts on 132 multiprocessors has nothing
                      to hide them; blocks would have to take 500 clocks of 610, with 1,244 instructions in the loop 63% of the issue slots for
                      51%.  The second set adds some 390 instructions: lookups, operands of values, copies, factors are there once.
             Tried, 8 queries: 10 and 11 warps (168 registers too: 60.2 and 59.7 us for 58.9); one block's means at a time (53.3 for 51.5); z in
             f32 and one set's softmax behind the other's (64.4 for 58.2, 12 warps).
             d 64: four blocks' means together 42.1 to 42.8 us, two 43.5 (nsn2b).
             Tried, 12 warps: 16 warps of 128 registers, queries in shared memory (82 for 66.5; 24% of the samples wait for memory, where the
             spilled registers are), the end of a part a function of its own (74 for 67); addresses of codewords by byte permutes (67.9 for
             67.1); codes of the values in registers before the softmax (68.0 for 67.5), and their place free then (69.9, but 11.2 for 11.5 at
             one row); warps that take the next of many small parts by a counter (103 to 139 for 96: what a part costs by itself).
   Fixed     What a call takes for no tokens, from one row of 32,768 and 4,096 tokens (heads with one query) or 131,072 and 8,192 (GQA-4): nsn2b
             7.1 and 7.4 us, nsn1 6.9 and 7.0.  globaltimer, 12 warps, of the thread block that ends last, us from the end of the call before
             (a multiprocessor holds one thread block: it starts when that of the call before ends):
               GQA-4, 8,192 tokens: starts -0.2, slot and position 0.8 to 1.1, tables stored 1.8, blocks asked for 2.0, inputs 2.1, queries'
                     integers 3.0, in registers 3.3, block there 3.7, done 6.6, exact tokens 7.0, all warps 7.2, merged 7.9, handed on 8.9, parts
                     read 9.5, y 9.9, end 10.0 (9.3 without the timestamps)
             Waits are for memory, one behind the other: arguments, slot and position, block numbers, blocks; sums and the counter; parts.
             What made it shorter, GQA-4 and 8,192 tokens, nsn2b: 10.6 us; no integer division and no spilled load (a store that waits for it) before
             the first blocks, and R once a query behind a team's merge 9.9; arguments by all warps at once and 12 warps' sums together 9.7; tables
             on their way before slot and position are there, stored while block numbers are 9.3.  Heads with one query, 4,096 tokens: 11.3 to 10.2.
             Tried: a part's sums word by word to a last part that reads until all are there, without fence and counter: 12.4 for 9.7; clusters for
             the parts of a head, merged in shared memory: of 16 thread blocks 7 run at once, of 4 30, and the barrier makes an empty
             kernel 1.4 us longer; inputs waited for before blocks are asked for: 32.8 for 31.8 (heads with one query, 32,768 tokens); addresses
             only behind the start: 9.6 for 9.3; angles of the queries before inputs are there: 11.2 for 10.9; parts of two blocks: 1,024
             tokens 8.1 for 9.2, 4,096 9.8 for 9.2.
   Tested by tests/test_cuda_decode.cpp                       Timed by tests/bench_decode.cu                             */
#ifdef __CUDACC__
#include <algorithm>
#include "decode_codes.cuh"
namespace cuda {

// ---- the kernel ---------------------------------------------------------------------------------------------
template <class K, class V, int Q> __global__ void __launch_bounds__(32 * Layout<K, V, Q>::WARPS, 1) decode_codes_kernel(const __grid_constant__ DecodeArgs a) {
    using S = Layout<K, V, Q>;
    constexpr int D = K::d, C = D / 32;
    ask_for_arguments(a, S::part(threadIdx.x / 32));
    constexpr int K_BYTES = D / 4 / K::channels, V_BYTES = D / 8 / V::channels, VW = V_BYTES < 4 ? 1 : V_BYTES / 4;
    constexpr int TOGETHER = S::TOGETHER, SETS = S::SETS, SET = QUERIES;
    constexpr int STEPS = D / 32, V_CHANNELS = D / 8;              // mma steps over channels; channels of a lane
    // Words of a lane's channels.  Codewords of 8 channels: all sums of a set are in registers at once, and codes come as they are needed.
    constexpr bool LATE_CODES = V::channels == 8 && SETS == 1;
    constexpr int WORDS = V_CHANNELS / 4, WORDS_AT_ONCE = LATE_CODES ? WORDS : SETS > 1 && V::channels < 8 ? 1 : 2;
    using KB = typename K::Block;
    using VB = typename V::Block;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Of a mean a lane has the L-th two pairs; with d 64 the upper lanes' mean is the next block's, odd columns of z.
    constexpr int SIDE_BY_SIDE = D == 64 ? 2 : 1;
    const int L = lane % (D / 4), odd = lane / (D / 4);
    const uint32_t z_at = S::warp_at(warp);    // (8, D/4, 2) column, two pairs: their cosine parts, their sine parts in f16
    const uint32_t z_store = opaque(z_at + odd * (D / 2) * 4 + (8 * L ^ odd * 64));  // odd columns have their 64-byte halves swapped, so that
    const uint32_t z_load = opaque(z_at + g * (D / 2) * 4 + 16 * t + g % 2 * 64);    // neighbours lie in different banks
    // Of query q, the i-th block: two blocks of a set, or the two sets of a block, are neighbours.
    auto column_of = [](int q, int i) { return TOGETHER == 1 ? 2 * (q % SET) + q / SET : 8 * (SETS * (i / 2) + q / SET) + 2 * (q % SET) + i % 2; };
    const uint32_t factor_at = opaque(S::factors(warp) + 8 * g);
    auto factor = [&](bool key, int i) { return load_shared<float2>(factor_at + (key ? 0 : 512) + 64 * i); };    // of token 8 i + g: s1 s2, s1
    const uint32_t weight_store = opaque(z_at + t * 128 + (16 * g ^ 32 * t)), weight_load = opaque(z_at + g / 2 * 128 + (16 * t ^ g / 2 * 32));
    const uint32_t weight_bytes = g % 2 ? 0x4240 : 0x4341;                   // permutes a word of two weights to (lo, 0, lo, 0) or (hi, 0, hi, 0)
    const uint32_t E = opaque(S::E(lane)), means = S::means(warp);
    const uint32_t k_lane = opaque(g * (D / K::channels) + K_BYTES * t), v_lane = opaque(t * (D / V::channels) + V_BYTES * g);    // of the codes

    if (a.b.N <= FEW_ROWS) let_next_start();
    Turns<K, V, S, Q> turns;
    if (!turns.start(a)) return;
    Part &p = turns.p;
    BlockRing<K, V, S> &ring = turns.ring;
    const uint32_t k_table = S::template copy<K>(S::K_TABLE, lane), v_table = S::template copy<V>(S::V_TABLE, lane);
    if (p.task >= turns.tasks(a)) return;
    do {
        if (!p.there()) continue;
        Floats<2> base[TOGETHER / SIDE_BY_SIDE][2];                           // angles of the next blocks whose means are due
        if (p.count > 0) ring.load_base(a, base, 0);
        ring.load_second(a);
        prepare_queries<S, Q>(a, p, turns.query, K::delta);
        // One set's are in registers, two sets' are loaded where they are needed.
        const uint32_t fragments = opaque(S::queries(warp - p.rank) + 16 * lane), units_at = fragments + SETS * S::CODES - (SETS == 1 ? 8 * lane : 0);
        const uint32_t pairs_at = fragments + SETS * (S::CODES + S::UNITS) - 16 * (lane - L);
        uint32_t bq[SETS][2 * STEPS];    // column g of a B operand of the queries' integers, channels D/4 t + 4 i ..
        float2 units[SETS];              // of query t: (unit, unit times half the sum of the integers)
        uint4 pairs[Q / 2];              // L of two queries each, in f16: lower channels, upper ones
        auto load_fragments = [&] {
#pragma unroll
            for (int i = 0; i < SETS * D / 64; i++) {
                const uint4 v = load_shared<uint4>(fragments + 512 * i);
                memcpy(&bq[0][0] + 4 * i, &v, 16);
            }
            if constexpr (SETS == 2) {
                const float4 v = load_shared<float4>(units_at);
                units[0] = make_float2(v.x, v.y), units[SETS - 1] = make_float2(v.z, v.w);
            } else units[0] = load_shared<float2>(units_at);
        };
        auto load_pairs = [&] {
#pragma unroll
            for (int i = 0; i < Q / 2; i++) pairs[i] = load_shared<uint4>(pairs_at + i * (4 * D));
        };
        if constexpr (SETS == 1) load_fragments(), load_pairs();
        p.keep(S::part(warp));
        float m[SETS] = {}, l[SETS] = {}, w_sum[SETS] = {}, out[SETS][V_CHANNELS] = {}, plain[Q][C] = {};

#pragma unroll 1
        for (int j = 0; j < p.count; j++) {
            const uint32_t kb = ring.keys_at(j), vb = ring.values_at(j);
            ring.wait_block();
            float mean_score[SETS][8];    // of query t, tokens 8 j + g, without s1
            if (TOGETHER == 1 || j % TOGETHER == 0) {       // and those of the next blocks
                const uint32_t z_store_odd = other_half(z_store), z_load_odd = other_half(z_load);
                constexpr int M = (SETS * TOGETHER + 1) / 2, TWO = TOGETHER == 1 ? 1 : 2 / SIDE_BY_SIDE;    // matrices of 8 columns; a lane's means
                static_assert(SETS * TOGETHER > 1, "half a matrix");
                if constexpr (SETS == 2) load_pairs();    // all on their way before the first one is needed
#pragma unroll
                for (int two = 0; two < TOGETHER; two += 2) {
                    if (two > 0 && j + two >= p.count) break;
                    __half2 lo[TWO], hi[TWO];
#pragma unroll
                    for (int i = 0; i < TWO; i++) {
                        const uint32_t mean = means + (j + two + i + odd) % S::MEANS * S::MEAN;
                        const Floats<2> x = mean_at<D, 2>(mean, 2 * L), y = mean_at<D, 2>(mean, 2 * L + D / 2);
                        const Floats<2> (&angle)[2] = base[two / SIDE_BY_SIDE + i];
                        lo[i] = __floats2half2_rn(x.x[0] * angle[0].x[0] - y.x[0] * angle[1].x[0], x.x[1] * angle[0].x[1] - y.x[1] * angle[1].x[1]);
                        hi[i] = __floats2half2_rn(x.x[0] * angle[1].x[0] + y.x[0] * angle[0].x[0], x.x[1] * angle[1].x[1] + y.x[1] * angle[0].x[1]);
                    }
#pragma unroll
                    for (int pair = 0; pair < Q / 2; pair++) {
                        __half2 q[2][2];    // lower and upper channels
                        memcpy(q, &pairs[pair], sizeof q);
#pragma unroll
                        for (int k = 0; k < 2; k++)
#pragma unroll
                            for (int i = 0; i < TWO; i++) {
                                const __half2 z[2] = {__hfma2(q[k][0], lo[i], __hmul2(q[k][1], hi[i])),
                                                      __hfma2(q[k][1], lo[i], __hneg2(__hmul2(q[k][0], hi[i])))};
                                const int column = column_of(2 * pair + k, two + i);
                                Words<2> w;
                                memcpy(&w, z, sizeof w);
                                store_shared((column % 2 ? z_store_odd : z_store) + column * (D / 2) * 4, w);
                            }
                    }
                }
                if (j + TOGETHER < p.count) ring.load_base(a, base, j + TOGETHER);
                __syncwarp();
                float c[M][4][4] = {};
                if (M > SETS && j + 2 >= p.count) multiply_E<S>((float (&)[SETS][4][4])c, E, z_load, z_load_odd);    // there are no others
                else multiply_E<S>(c, E, z_load, z_load_odd);
#pragma unroll
                for (int s = 0; s < SETS; s++)
                    for (int tile = 0; tile < 4; tile++) {
                        const int column = column_of(SET * s, 0);
                        const float (&x)[4] = c[column / 8][tile];
                        mean_score[s][2 * tile] = x[column % 8], mean_score[s][2 * tile + 1] = x[column % 8 + 2];
                    }
#pragma unroll
                for (int b = 1; b < TOGETHER; b++)
                    for (int s = 0; s < SETS; s++)
                        for (int i = 0; i < 2; i++) {
                            const float (&x)[4] = c[b / 2 * SETS + s][2 * i], (&y)[4] = c[b / 2 * SETS + s][2 * i + 1];
                            store_shared(ring.kept() + 1024 * (SETS * (b - 1) + s) + 512 * i, words(x[b % 2], x[b % 2 + 2], y[b % 2], y[b % 2 + 2]));
                        }
            } else {
                const uint32_t from = ring.kept() + (TOGETHER == 2 ? 0 : 1024 * SETS * (j % TOGETHER - 1));
                for (int s = 0; s < SETS; s++)
                    for (int i = 0; i < 2; i++) {
                        const float4 v = load_shared<float4>(from + 1024 * s + 512 * i);
                        mean_score[s][4 * i] = v.x, mean_score[s][4 * i + 1] = v.y, mean_score[s][4 * i + 2] = v.z, mean_score[s][4 * i + 3] = v.w;
                    }
            }
            {    // factors of tokens 2 lane, 2 lane + 1
                const float2 k1 = first_norms_at(kb + offsetof(KB, s1), lane), k2 = scales_at(kb + offsetof(KB, s2), lane, &((KB *)nullptr)->s2);
                const float2 v1 = first_norms_at(vb + offsetof(VB, s1), lane), v2 = scales_at(vb + offsetof(VB, s2), lane, &((VB *)nullptr)->s2);
                store_shared(ring.factors(), words(k1.x * k2.x, k1.x, k1.y * k2.y, k1.y));
                store_shared(ring.factors() + 512, words(v1.x * v2.x, v1.x, v1.y * v2.y, v1.y));
            }
            __syncwarp();
            // scores of query t, tokens 8 j + g, less m
            float score[SETS][8];
            if constexpr (SETS == 2) load_fragments();
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
                int e[SETS][4] = {};
                multiply_keys<K>(e, kb + k_lane, tile, bq, k_table);
                const float2 f0 = factor(true, 2 * tile), f1 = factor(true, 2 * tile + 1);
#pragma unroll
                for (int s = 0; s < SETS; s++) {
                    auto below_m = [&](int dot, float mean, const float2 &f) {
                        return fmaf(fmaf((float)dot, units[s].x, units[s].y), f.x, fmaf(mean, f.y, -m[s]));
                    };
                    score[s][2 * tile] = below_m(e[s][0] * 256 + e[s][1], mean_score[s][2 * tile], f0);
                    score[s][2 * tile + 1] = below_m(e[s][2] * 256 + e[s][3], mean_score[s][2 * tile + 1], f1);
                }
            }
            __syncwarp();
            ring.release_keys(a, j);
            // softmax in base 2; m follows when it is 2^8 too small
            float top[SETS];
            bool up = j == 0;    // m is none's score yet
            for (int s = 0; s < SETS; s++) {
                top[s] = score[s][0];
                for (int i = 1; i < 8; i++) top[s] = fmaxf(top[s], score[s][i]);
                up |= top[s] > 8;
            }
            if (__any_sync(~0u, up)) {
#pragma unroll
                for (int s = 0; s < SETS; s++) {
                    for (int o = 4; o < 32; o *= 2) top[s] = fmaxf(top[s], __shfl_xor_sync(~0u, top[s], o));
                    if (j > 0) top[s] = fmaxf(top[s], 0.0f);
                    const float old = exp2_fast(fminf(-top[s], 0.0f));    // the first time there is nothing to make smaller
                    m[s] += top[s], l[s] *= old, w_sum[s] *= old;
                    for (int i = 0; i < 8; i++) score[s][i] -= top[s];
                    for (int c = 0; c < V_CHANNELS; c++) out[s][c] *= old;
                    for (int q = 0; q < SET; q++) {
                        const float f = __shfl_sync(~0u, old, q);
                        for (int c = 0; c < C; c++) plain[SET * s + q][c] *= f;
                    }
                }
            }
            float (&weight)[SETS][8] = score, largest[SETS] = {}, s1_sum[SETS] = {}, w_unit[SETS];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float2 f = factor(false, i);
#pragma unroll
                for (int s = 0; s < SETS; s++) {
                    const float p = exp2_fast(score[s][i]);
                    l[s] += p, s1_sum[s] = fmaf(p, f.y, s1_sum[s]);
                    weight[s][i] = p * f.x;
                    largest[s] = fmaxf(largest[s], weight[s][i]);
                }
            }
            for (int o = 4; o < 32; o *= 2)
                for (int s = 0; s < SETS; s++) {
                    largest[s] = fmaxf(largest[s], __shfl_xor_sync(~0u, largest[s], o));
                    s1_sum[s] += __shfl_xor_sync(~0u, s1_sum[s], o);
                }
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                const uint32_t exponent = max(__float_as_uint(largest[s]) & 0x7f800000u, 40u << 23);    // of the unit 2^-14 of the largest
                const float inverse = __uint_as_float((254u + 14 << 23) - exponent);
                w_unit[s] = __uint_as_float(exponent - (14u << 23));
                // 1.5 2^23 + w has w in its low bits
                uint32_t w[8], total = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) total += w[i] = __float_as_uint(fmaf(weight[s][i], inverse, 12582912.0f));
                w_sum[s] = fmaf((float)(int)(total - 8u * 0x4B400000u), w_unit[s], w_sum[s]);
                // Query t: 128 bytes; g: 16 bytes, weights of tokens 8 i + g, swizzled so that lanes lie in different banks; z is done with.
                Words<4> two;
                for (int i = 0; i < 4; i++) two.x[i] = __byte_perm(w[2 * i], w[2 * i + 1], 0x5410);
                store_shared(weight_store + 512 * s, two);
            }
            __syncwarp();
            // values: k = 4 t .. of step s, lower and upper half, are tokens 16 s + t and 8 further, and those 4 further
            uint32_t b[SETS][4][2];
#pragma unroll
            for (int s = 0; s < SETS; s++) {
                const uint4 near = load_shared<uint4>(weight_load + 512 * s), far = load_shared<uint4>(other_half(weight_load) + 512 * s);
                const uint32_t w[4][2] = {{near.x, far.x}, {near.y, far.y}, {near.z, far.z}, {near.w, far.w}};
                for (int i = 0; i < 8; i++) b[s][i / 2][i % 2] = __byte_perm(w[i / 2][i % 2], 0, weight_bytes);
            }
            uint32_t vc[16][VW], vs[16] = {};
            auto load_codes = [&](int i) {
                const uint32_t at = vb + v_lane + 4 * i * (D / V::channels);
                load_bytes<V_BYTES>(vc[i], at);
                if constexpr (V::has_sign) vs[i] = signs_at<V_BYTES>(at + KV_BLOCK * (D / V::channels));
            };
            if (!LATE_CODES)
#pragma unroll
                for (int i = 0; i < 16; i++) load_codes(i);
#pragma unroll
            for (int first = 0; first < WORDS; first += WORDS_AT_ONCE) {
                int e[SETS][WORDS_AT_ONCE][2][4] = {};    // even and odd channels of words first ..
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    uint32_t x[4][WORDS];    // tokens 16 step + 4 i + t
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (LATE_CODES) load_codes(4 * step + i);
                        look_up<V::channels, V::has_sign, V_BYTES>(x[i], vc[4 * step + i], vs[4 * step + i], v_table);
                    }
#pragma unroll
                    for (int i = 0; i < WORDS_AT_ONCE; i++) {
                        uint32_t a[4];    // rows: the word's lower two channels, its upper two
#pragma unroll
                        for (int r = 0; r < 4; r++) a[r] = __byte_perm(x[r / 2][first + i], x[r / 2 + 2][first + i], r % 2 ? 0x7632 : 0x5410);
#pragma unroll
                        for (int s = 0; s < SETS; s++) {
                            mma_s8_u8(e[s][i][0], a, b[s][step][0], b[s][step][1]);
                            mma_s8_u8(e[s][i][1], a, b[s][step][0] << 8, b[s][step][1] << 8);
                        }
                    }
                }
#pragma unroll
                for (int s = 0; s < SETS; s++)
                    for (int i = 0; i < 4 * WORDS_AT_ONCE; i++) {    // channel 4 word + 2 row + odd
                        const int (&sums)[4] = e[s][i / 4][i % 2], row = i / 2 % 2;
                        out[s][4 * first + i] = fmaf((float)(sums[2 * row] * 256 + sums[2 * row + 1]), w_unit[s], out[s][4 * first + i]);
                    }
            }
            const Floats<C> mean = mean_at<D, C>(vb + offsetof(VB, mean), C * lane);
#pragma unroll
            for (int q = 0; q < Q; q++) {
                const float sum = __shfl_sync(~0u, s1_sum[q / SET], q % SET);
                for (int c = 0; c < C; c++) plain[q][c] = fmaf(sum, mean.x[c], plain[q][c]);
            }
            __syncwarp();
            ring.release_values(a, j);
        }

        p.fetch(S::part(warp));

        // Lane (g, t) has channels V_CHANNELS g .. of query t.
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            for (int o = 4; o < 32; o *= 2) l[s] += __shfl_xor_sync(~0u, l[s], o), w_sum[s] += __shfl_xor_sync(~0u, w_sum[s], o);
            for (int c = 0; c < V_CHANNELS; c++) warp_result<S, Q>(warp).o[1][SET * s + t][V_CHANNELS * g + c] = (out[s][c] + 0.5f * w_sum[s]) * V::delta;
        }
        if (p.count == 0)    // m is no token's
            for (float &x : m) x = -INFINITY;
        auto query = [&](int q) { return load_shared<Floats<C>>(S::numbers(warp - p.rank, q) + 4 * C * lane); };
        finish_warp<S, Q>(a, p, query, m, l, plain);
    } while (turns.go_on(a));
}

// Teams and parts for more than FEW_ROWS rows whose caches are full: what takes the fewest blocks one after the other, where what a
// part costs beside them counts as blocks too.
static Shares shares_of_many(int tasks, int blocks, int warps, int least_team) {
    Shares best = {1, 1};
    double best_time = INFINITY;
    for (int team = least_team; team <= warps; team++)
        for (int parts = 1; warps % team == 0 && parts <= std::clamp(MOST_TASKS / tasks, 1, MAX_PARTS); parts++) {
            const int64_t rounds = ceil_div((int64_t)tasks * parts, (int64_t)GPU_SMS * (warps / team));
            const double time = rounds * (ceil_div(ceil_div(blocks, parts), team) + 1.5 + (parts > 1 ? 1 + parts / 8.0 : 0));
            if (time < best_time) best = {parts, team}, best_time = time;
        }
    return best;
}
Shares codes_shares(const KvView &kv, int rows, int G) {
    Shares shares;
    auto of = [&](auto layout) {
        using S = decltype(layout);
        const int heads = kv.Hkv * (int)ceil_div(G, queries_of_pass(G, true));
        shares = rows <= FEW_ROWS ? Shares{parts_of_few(heads, GPU_SMS), S::WARPS} : shares_of_many(rows * heads, kv.max_blocks, S::WARPS, S::LEAST_TEAM);
    };
    with_nsn(kv, [&](auto k, auto v) {
        using K = decltype(k);
        using V = decltype(v);
        switch (queries_of_pass(G, true)) {
        case 1: return of(Layout<K, V, 1>());
        case QUERIES: return of(Layout<K, V, QUERIES>());
        default: return of(Layout<K, V, 2 * QUERIES>());
        }
    });
    return shares;
}

bool decode_codes_fit() { return most_shared >= (int)(END - START); }

void decode_codes(const DecodeArgs &a) {
    if (a.G == 1) return decode_codes_one(a);
    with_nsn(a.kv, [&](auto k, auto v) {
        using K = decltype(k);
        using V = decltype(v);
        if (queries_of_pass(a.G, true) > QUERIES) launch_codes<Layout<K, V, 2 * QUERIES>>(decode_codes_kernel<K, V, 2 * QUERIES>, a);
        else launch_codes<Layout<K, V, QUERIES>>(decode_codes_kernel<K, V, QUERIES>, a);
    });
}
}    // namespace cuda
#endif
