// attention_decode.cuh - what the two kernels of decode attention share (attention_decode.cu has the whole picture): who does
// what, exact tokens, and how results of parts are merged.
#pragma once
#include <algorithm>
#include <cmath>
#include "rows16.cuh"

namespace cuda {

constexpr int MAX_PARTS = 128;     // of a row and kv head
// Sealed blocks, at least, of a part of few rows.  Llama-3-8B in q4, depth 1,024, 2,048 and 4,096 (nsn2b), medians of three: 461, 460 and 450
// tok/s; with 8 448, 450 and 451, with 2 459, 453 and 451.
constexpr int BLOCKS_EACH = 4;
constexpr int QUERIES = 4;         // query heads of a kv head that share a pass over its cache; over codes two sets of them may
// Of a thread block over codes, if they fit.  Each of four schedulers has a quarter of the registers: 168 for three warps, 255 for two.
constexpr int CODE_WARPS = 12, WIDE_CODE_WARPS = 8;
constexpr int MOST_TASKS = 4 * GPU_SMS * CODE_WARPS;    // of more than FEW_ROWS rows, if they have more than one part
constexpr int MOST_COUNTED = 1 << 16;    // rows times query heads, if there is more than one part

// x / d for x * d < 2^32: a multiplication where a division is some twenty instructions, each waiting for the one before.
struct Divider {
    uint32_t d, inverse;
    explicit Divider(uint32_t d) : d(d), inverse(~0u / d + 1) {}    // 2^32 / d rounded up; for d = 1 nothing
    __device__ uint32_t operator()(uint32_t x) const { return d == 1 ? x : __umulhi(x, inverse); }
};

struct DecodeArgs {
    float *y;                  // (N, Hq, d)
    KvView kv;
    const float *q, *k, *v;    // (N, Hq, d), (N, Hkv, d)
    const f16 *k16, *v16;      // (N, Hkv, d)         of k, v; null: attend, q is not turned by RoPE, and the ring does not have k, v
    Batch b;
    float *part_o;             // (N, Hq, room, d)    sums of a part: R is done
    float2 *part_ml;           // (N, Hq, room)       m in base 2, l
    unsigned *arrived;         // (N, Hq)             parts that are done; the last one makes it 0
    const uint8_t *k_blocks, *v_blocks;    // (block, Hkv) of the layer
    int layer, turn, Hq, G;    // turn: KvView's
    int room, reach;           // parts that a row and head can have; that those of this step can have
    // Groups of queries that share a pass over a head's cache; Hkv times as many; rows; warps that share a part of codes.
    Divider chunks, heads, rows, team;
    Rows16 rows16;             // of y, for the product that is next; if wanted
    HD bool fresh() const { return k16 == nullptr; }
};

// Who does what: a cache of a row and head is divided into parts, a part is a team's, whose warps take turns.
struct Shares { int parts, team; };
// Query heads of a kv head that share a pass: one, a set, or two sets if neither stays empty.
inline int queries_of_pass(int G, bool codes) { return G == 1 ? 1 : codes && ceil_div(G, QUERIES) % 2 == 0 ? 2 * QUERIES : QUERIES; }
// Few rows spread over the whole GPU.
inline int parts_of_few(int heads, int teams) { return std::clamp(teams / heads, 1, MAX_PARTS); }
// Of a cache of so many units, at least `least` in a part.
HD int parts_of(int units, int least, int most) { return units < 2 * least ? 1 : units / least < most ? units / least : most; }

__device__ inline float merge_weight(float m, float top) { return m == -INFINITY ? 0.0f : exp2_fast(m - top); }

// N neighbouring numbers, one load or store.
template <int N> struct Halves;
template <> struct Halves<1> { uint16_t raw; };
template <> struct Halves<2> { uint32_t raw; };
template <> struct Halves<4> { uint2 raw; };
template <int N> __device__ inline void widen(float (&x)[N], const Halves<N> &h) {
    __half y[N];
    memcpy(y, &h, sizeof y);
    for (int i = 0; i < N; i++) x[i] = __half2float(y[i]);
}
template <int N> struct alignas(4 * N) Floats { float x[N]; };
template <int N> __device__ inline Floats<N> load_l2(const float *p) {    // what another SM wrote
    Floats<N> f;
    if constexpr (N == 4) { const float4 v = __ldcg((const float4 *)p); memcpy(&f, &v, sizeof f); }
    else { const float2 v = __ldcg((const float2 *)p); memcpy(&f, &v, sizeof f); }
    return f;
}

// A row's query as it is in memory: pairs p of a lane are channels D/64 lane + p and D/2 further.
template <int D> struct QueryRow {
    Floats<D / 64> lo, hi;
    __device__ void load(const DecodeArgs &a, int64_t query) {
        const float *q = a.q + query * D + D / 64 * (threadIdx.x % 32);
        lo = *(const Floats<D / 64> *)q, hi = *(const Floats<D / 64> *)(q + D / 2);
    }
};
// What turns it: cosines and sines of the position, times log2(e) / sqrt(d).
template <int D> struct QueryTurn {
    static constexpr int PAIRS = D / 64;
    float c[PAIRS], s[PAIRS];
    __device__ void turn(float (&x)[D / 32], const QueryRow<D> &q) const {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) x[p] = q.lo.x[p] * c[p] - q.hi.x[p] * s[p], x[PAIRS + p] = q.lo.x[p] * s[p] + q.hi.x[p] * c[p];
    }
};
// The position's angle as the table has it, in two; none where q is turned already.  Apart from QueryTurn, so that others can be asked for
// while these are on their way.
template <int D> struct QueryAngles {
    static constexpr int PAIRS = D / 64;
    Floats<PAIRS> base_c, base_s, step_c, step_s;
    __device__ void load(const DecodeArgs &a, int pos) {
        for (int p = 0; p < PAIRS; p++) base_c.x[p] = step_c.x[p] = 1, base_s.x[p] = step_s.x[p] = 0;
        if (!a.fresh()) return;
        const int j = PAIRS * (threadIdx.x % 32);
        const float *const base = a.kv.rope.base + (int64_t)(pos / KV_BLOCK) * D + j, *const step = a.kv.rope.step + (int64_t)(pos % KV_BLOCK) * D + j;
        base_c = *(const Floats<PAIRS> *)base, base_s = *(const Floats<PAIRS> *)(base + D / 2);
        step_c = *(const Floats<PAIRS> *)step, step_s = *(const Floats<PAIRS> *)(step + D / 2);
    }
    __device__ QueryTurn<D> sum() const {
        const float scale = 1.4426950408889634f * rsqrtf((float)D);
        QueryTurn<D> t;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            t.c[p] = (base_c.x[p] * step_c.x[p] - base_s.x[p] * step_s.x[p]) * scale;
            t.s[p] = (base_c.x[p] * step_s.x[p] + base_s.x[p] * step_c.x[p]) * scale;
        }
        return t;
    }
};
// The row's own key and value rounded; in attend who reads them (`mine`) puts them into the ring too, and into `here`.  By a warp.
struct OwnRow { const f16 *k, *v; };
template <int D> __device__ inline OwnRow own_row(const DecodeArgs &a, int n, int slot, int h, int pos, bool mine, f16 *here) {
    const int64_t row = ((int64_t)n * a.kv.Hkv + h) * D;
    if (!a.fresh()) return {a.k16 + row, a.v16 + row};
    if (mine) {
        const int64_t ring = a.kv.exact_at(a.layer, slot, h, pos);
        for (int c = threadIdx.x % 32; c < D; c += 32) {
            const f16 key = to_f16(a.k[row + c]), value = to_f16(a.v[row + c]);
            a.kv.k_exact[ring + c] = here[c] = key, a.kv.v_exact[ring + c] = here[D + c] = value;
        }
    }
    __syncwarp();
    return {here, here + D};
}

// Lane L gets the sum of s[L % N] over the N lanes around it.
template <int N> __device__ inline float sums_of(const float (&s)[N]);
template <> __device__ inline float sums_of(const float (&s)[1]) { return s[0]; }
template <int N> __device__ inline float sums_of(const float (&s)[N]) {
    const unsigned upper = threadIdx.x & N / 2 ? ~0u : 0;
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const unsigned x = __float_as_uint(s[i]), y = __float_as_uint(s[i + N / 2]), swap = (x ^ y) & upper;
        half[i] = __uint_as_float(x ^ swap) + __shfl_xor_sync(~0u, __uint_as_float(y ^ swap), N / 2);
    }
    return sums_of(half);
}
// ---- exact tokens -------------------------------------------------------------------------------------------
// A warp takes GROUP neighbouring tokens of a block of fp16 rows for Q queries.  A lane has D/64 of the pairs that RoPE turns,
// and channels D/32 lane .. of the values; it keeps the score of token lane / Q for query lane % Q.
constexpr int GROUP = 8, GROUPS = KV_BLOCK / GROUP;
template <int D, int Q> struct ExactTokens {
    static constexpr int PAIRS = D / 64, C = D / 32, SCORES = GROUP * Q;
    float m = -INFINITY, l = 0;    // of query lane % Q; l of the lane's tokens
    float o[Q][C] = {};
    float q[Q][2 * PAIRS];         // as seen from the block's first token
    Halves<PAIRS> k_lo[GROUP], k_hi[GROUP];
    Halves<C> v[GROUP];

    Floats<PAIRS> base_c, base_s;  // angles of a block

    __device__ void load_base(const float *base) {
        const int j = PAIRS * (threadIdx.x % 32);
        base_c = *(const Floats<PAIRS> *)(base + j), base_s = *(const Floats<PAIRS> *)(base + D / 2 + j);
    }
    // scaled(i, p): query i as load_query has it, turned back by the angle of a block.
    template <class Scaled> __device__ void turn_queries(Scaled scaled) {
#pragma unroll
        for (int p = 0; p < PAIRS; p++)
#pragma unroll
            for (int i = 0; i < Q; i++) {
                const float lo = scaled(i, p), hi = scaled(i, PAIRS + p);
                q[i][p] = lo * base_c.x[p] + hi * base_s.x[p], q[i][PAIRS + p] = hi * base_c.x[p] - lo * base_s.x[p];
            }
    }
    // The same tokens and angles as another.
    __device__ void see(const ExactTokens &x) {
        base_c = x.base_c, base_s = x.base_s;
        for (int i = 0; i < GROUP; i++) k_lo[i] = x.k_lo[i], k_hi[i] = x.k_hi[i], v[i] = x.v[i];
    }
    // Tokens t0 .. of a block; `rows` are D apart, that of token `own` is elsewhere and the last one (behind the group: all are there).
    // Tokens behind it are the last one again.
    template <int N> __device__ static void load_rows(Halves<N> (&x)[GROUP], const f16 *rows, const f16 *own_row, int t0, int own) {
        if (t0 + GROUP <= own) {
#pragma unroll
            for (int i = 0; i < GROUP; i++) x[i] = *(const Halves<N> *)(rows + i * D);
        } else
#pragma unroll
            for (int i = 0; i < GROUP; i++) x[i] = *(const Halves<N> *)(t0 + i >= own ? own_row : rows + i * D);
    }
    __device__ void load_keys(const f16 *rows, const f16 *own_row, int t0, int own) {
        const int c = PAIRS * (threadIdx.x % 32);
        load_rows(k_lo, rows + c, own_row + c, t0, own);
        load_rows(k_hi, rows + c + D / 2, own_row + c + D / 2, t0, own);
    }
    __device__ void load_values(const f16 *rows, const f16 *own_row, int t0, int own) {
        const int c = C * (threadIdx.x % 32);
        load_rows(v, rows + c, own_row + c, t0, own);
    }
    // The same in two halves: tokens before `own`, and when its row is there, it and those behind.  (Not in the
    // kernels over codes: one of four queries then spills 652 bytes for 404.)
    template <int N> __device__ static void load_earlier(Halves<N> (&x)[GROUP], const f16 *rows, int t0, int own) {
        if (t0 + GROUP <= own) return load_rows(x, rows, rows, t0, own);
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            if (t0 + i < own) x[i] = *(const Halves<N> *)(rows + i * D);
    }
    __device__ void load_earlier_keys(const f16 *rows, int t0, int own) {
        const int c = PAIRS * (threadIdx.x % 32);
        load_earlier(k_lo, rows + c, t0, own);
        load_earlier(k_hi, rows + c + D / 2, t0, own);
    }
    __device__ void load_earlier_values(const f16 *rows, int t0, int own) { load_earlier(v, rows + C * (threadIdx.x % 32), t0, own); }
    template <int N> __device__ static void load_own(Halves<N> (&x)[GROUP], const f16 *own_row, int t0, int own) {
        if (t0 + GROUP <= own) return;
#pragma unroll
        for (int i = 0; i < GROUP; i++)
            if (t0 + i >= own) x[i] = *(const Halves<N> *)own_row;
    }
    __device__ void load_own(const f16 *key, const f16 *value, int t0, int own) {
        const int lane = threadIdx.x % 32;
        load_own(k_lo, key + PAIRS * lane, t0, own);
        load_own(k_hi, key + PAIRS * lane + D / 2, t0, own);
        load_own(v, value + C * lane, t0, own);
    }
    // rope_step: angles of token t0.
    __device__ float scores(const float *rope_step, int t0, int own) {
        rope_step += PAIRS * (threadIdx.x % 32);
        float s[SCORES];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const float *angle = rope_step + i * D;
            const Floats<PAIRS> co = *(const Floats<PAIRS> *)angle, si = *(const Floats<PAIRS> *)(angle + D / 2);
            float lo[PAIRS], hi[PAIRS];
            widen(lo, k_lo[i]), widen(hi, k_hi[i]);
#pragma unroll
            for (int n = 0; n < Q; n++) s[i * Q + n] = 0;
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                const float x = lo[p] * co.x[p] - hi[p] * si.x[p], y = lo[p] * si.x[p] + hi[p] * co.x[p];
#pragma unroll
                for (int n = 0; n < Q; n++) s[i * Q + n] = fmaf(q[n][p], x, fmaf(q[n][PAIRS + p], y, s[i * Q + n]));
            }
        }
        float score = sums_of(s);
        for (int w = SCORES; w < 32; w *= 2) score += __shfl_xor_sync(~0u, score, w);
        return t0 + (int)threadIdx.x % SCORES / Q <= own ? score : -INFINITY;
    }
    __device__ void add_values(float score) {
        float top = score;
        for (int w = Q; w < SCORES; w *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, w));
        if (__any_sync(~0u, top > m)) {
            const float up = fmaxf(m, top), old = exp2_fast(m - up);
            m = up, l *= old;
#pragma unroll
            for (int n = 0; n < Q; n++) {
                const float f = __shfl_sync(~0u, old, n);
                for (int c = 0; c < C; c++) o[n][c] *= f;
            }
        }
        const float p = exp2_fast(score - m);
        l += p;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            float x[C];
            widen(x, v[i]);
#pragma unroll
            for (int n = 0; n < Q; n++) {
                const float w = __shfl_sync(~0u, p, i * Q + n);
                for (int c = 0; c < C; c++) o[n][c] = fmaf(w, x[c], o[n][c]);
            }
        }
    }
    // l of query lane % Q, of all tokens.
    __device__ float total() const {
        float sum = l;
        for (int w = Q; w < SCORES; w *= 2) sum += __shfl_xor_sync(~0u, sum, w);
        return sum;
    }
};

// ---- merging ------------------------------------------------------------------------------------------------
// How many came before; what all of them wrote is there for the last one, which finds most, and makes the counter 0 again.
__device__ inline unsigned arrive(unsigned *counter, unsigned most) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most) : "memory");
    return before;
}
// What is left of a query when a part of it is done; lanes have channels D/32 lane ...  Whoever arrives last merges, in the order of
// the parts.  By one warp.
template <int D> __device__ void finish_part(const DecodeArgs &a, int64_t query, int part, int parts, float m, float l, const float (&o)[D / 32]) {
    constexpr int C = D / 32, AT_ONCE = 16;    // parts whose loads are in flight together
    const int lane = threadIdx.x % 32;
    auto store = [&](float *to, const float (&x)[C], float scale) {
        Floats<C> f;
        for (int c = 0; c < C; c++) f.x[c] = x[c] * scale;
        *(Floats<C> *)(to + C * lane) = f;
        return f;
    };
    auto store_y = [&](const float (&x)[C], float scale) {
        const Floats<C> f = store(a.y + query * D, x, scale);
        if (!a.rows16.x) return;
        const int n = (unsigned)query / (unsigned)a.Hq, k = ((unsigned)query % (unsigned)a.Hq) * D + C * lane;
        for (int c = 0; c < C; c += 2) *a.rows16.pair(n, k + c) = pack(f.x[c], f.x[c + 1]);
    };
    if (parts == 1) return store_y(o, 1.0f / l);
    float2 *const ml = a.part_ml + query * a.room;
    float *const part_o = a.part_o + query * a.room * D;
    store(part_o + part * D, o, 1.0f);
    if (lane == 0) ml[part] = make_float2(m, l);
    __syncwarp();
    unsigned before = 0;
    if (lane == 0) before = arrive(a.arrived + query, parts - 1);
    if (__shfl_sync(~0u, before, 0) + 1 < parts) return;
    float sum = 0, weight = 0, y[C] = {};
    Floats<C> x[AT_ONCE];
    auto load = [&](int part) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) x[i] = load_l2<C>(part_o + C * lane + (int64_t)min(part + i, parts - 1) * D);
    };
    auto load_ml = [&](int part) { return part < parts ? __ldcg(ml + part) : make_float2(-INFINITY, 0.0f); };
    load(0);
    float2 of_lane = load_ml(lane);    // of 32 parts
    float top = of_lane.x;
    for (int i = 32 + lane; i < parts; i += 32) top = fmaxf(top, __ldcg(ml + i).x);
    top = warp_max(top);
#pragma unroll 1
    for (int i = 0; i < parts; i += AT_ONCE) {
        if (i > 0) load(i);
        if (i % 32 == 0) {
            if (i > 0) of_lane = load_ml(i + lane);
            weight = merge_weight(of_lane.x, top);
            sum = fmaf(of_lane.y, weight, sum);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const float w = __shfl_sync(~0u, weight, i % 32 + j);
            for (int c = 0; c < C; c++) y[c] = fmaf(w, x[j].x[c], y[c]);
        }
    }
    store_y(y, 1.0f / warp_sum(sum));
}

// Results of a thread block's warps, in shared memory: Q queries' sums of values, beside them of codewords if there are any (R is not
// done), each with its m, and l of all.
template <int D, int Q, bool CODES = false> struct WarpResult {
    static constexpr int SUMS = CODES ? 2 : 1;
    float o[SUMS][Q][D], m[SUMS][Q], l[Q];    // m[0] is not below m[1]
    template <int N> __device__ void put(const float (&x)[N][D / 32], float top, float sum, int first = 0) {    // m and l of query first + lane % N
        const int lane = threadIdx.x % 32;
        for (int q = 0; q < N; q++)
            for (int c = 0; c < D / 32; c++) o[0][first + q][D / 32 * lane + c] = x[q][c];
        if (lane < N) m[0][first + lane] = top, l[first + lane] = sum;
    }
};
// Those of a team are merged in their order and handed on, a query by a warp.  result(w): warp w's.
// Tried: a lane a warp's weight, four warps' sums on their way together: 12.3 us for 12.3 to 12.4 (32 heads, 4,096 tokens).
template <int D, int Q, bool CODES, class Result>
__device__ void merge_warps(const DecodeArgs &a, int64_t first, int n, int part, int parts, int rank, int warps, Result result) {
    using Warp = WarpResult<D, Q, CODES>;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int q = rank; q < n; q += warps) {
        float m = -INFINITY, l = 0, o[Warp::SUMS][D / 32] = {};
        auto raise = [&](int w) { m = fmaxf(m, result(w).m[0][q]); };
        auto add = [&](int w) {
            const Warp &r = result(w);
            for (int i = 0; i < Warp::SUMS; i++) {
                const float weight = merge_weight(r.m[i][q], m);
                if (i == 0) l = fmaf(r.l[q], weight, l);
                for (int c = 0; c < D / 32; c++) o[i][c] = fmaf(r.o[i][q][D / 32 * lane + c], weight, o[i][c]);
            }
        };
        // All at once where a thread block is a team, else four at a time: their loads are on their way together.
        auto all = [&](auto n) {
#pragma unroll
            for (int w = 0; w < n.value; w++) raise(w);
#pragma unroll
            for (int w = 0; w < n.value; w++) add(w);
        };
        if (warps == CODE_WARPS) all(std::integral_constant<int, CODE_WARPS>());
        else if (warps == WIDE_CODE_WARPS) all(std::integral_constant<int, WIDE_CODE_WARPS>());
        else {
#pragma unroll 4
            for (int w = 0; w < warps; w++) raise(w);
#pragma unroll 4
            for (int w = 0; w < warps; w++) add(w);
        }
        if constexpr (CODES) {
            hadamard_lanes(o[1]);
            for (int c = 0; c < D / 32; c++) o[0][c] += o[1][c];
        }
        finish_part<D>(a, first + q, part, parts, m, l, o[0]);
    }
}

Shares codes_shares(const KvView &kv, int rows, int G);    // decode_codes.cu
void decode_codes(const DecodeArgs &a);
bool decode_codes_fit();                                   // this device's shared memory
}    // namespace cuda
