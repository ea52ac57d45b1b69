/* attention_decode - attention of steps with one row a slot; the contract is attention.cu's.

   Math      q . k_t = (R q) . code_t + q . RoPE_t(plain_t),   sum p_t v_t = R (sum p_t code_t) + sum p_t plain_t
   Kernels   rows    turns and scales the queries, rounds R q to 16-bit integers, and (in attend) keeps the row's keys and values
             f16     both sides fp16: this page
             codes   both sides NSN: decode_codes.cu, and decode_codes_mha.cu for heads with one query
             With few rows one layer of decode is these two launches, each starting while the one before it is at work.
   Work      The cache of a row and kv head is divided into parts (decode_parts); a part is a thread block's, and a warp's in
             decode_codes with many rows.  A part leaves a triple (m, l, o), the last to arrive merges them in order.
             f16: units are 8 tokens; 8 warps take turns.  The keys of a warp's next tokens are on their way while it adds up the
             values of these.
             Tried: wo prefetched to L2 by blocks beside the rows' (33 MB, cp.async.bulk.prefetch): Llama-3-8B at depth 0 decodes
             175 tok/s in f16 for 179, and as many as without in nsn2b.
   Order     Of a row: a function of its length and of the cache's shape; for more than FEW_ROWS rows also of the number of rows,
             because so many fill the GPU with longer parts.
   Limits    d 64 or 128; K and V both f16 or both NSN; no --ablate.  Everything else is attention_any.cu's.
   Tested by tests/test_cuda_decode.cpp                       Timed by tests/bench_decode.cu                             */
#ifdef __CUDACC__
#include <algorithm>
#include "attention_decode.cuh"
namespace cuda {

// ---- rows ---------------------------------------------------------------------------------------------------
constexpr int ROW_WARPS = 4;
// What attend brings before RoPE and rounding.
struct FreshRows {
    const float *q, *k, *v;
    f16 *k16, *v16;
    bool fresh;            // false: q is turned, the keys and values are kept
};
// A warp a query; in attend also one for each kv head.
template <int D> __global__ void __launch_bounds__(32 * ROW_WARPS) decode_rows_kernel(DecodeArgs a, FreshRows f) {
    constexpr int C = D / 32;
    const KvView &kv = a.kv;
    const int lane = threadIdx.x % 32, heads = a.Hq + (f.fresh ? kv.Hkv : 0), item = blockIdx.x * ROW_WARPS + threadIdx.x / 32;
    wait_for_inputs();
    if (item >= a.b.N * heads) return;
    const int n = item / heads, h = item % heads, pos = a.b.pos[n];
    if (h >= a.Hq) {
        const int64_t row = ((int64_t)n * kv.Hkv + h - a.Hq) * D, ring = kv.exact_at(a.layer, a.b.slot[n], h - a.Hq, pos / KV_BLOCK) + (int64_t)(pos % KV_BLOCK) * D;
        for (int c = C * lane; c < C * lane + C; c++) {
            const f16 key = to_f16(f.k[row + c]), value = to_f16(f.v[row + c]);
            f.k16[row + c] = key, f.v16[row + c] = value;
            kv.k_exact[ring + c] = key, kv.v_exact[ring + c] = value;
        }
        return;
    }
    const int64_t query = (int64_t)n * a.Hq + h;
    float x[C];
    for (int c = 0; c < C; c++) x[c] = f.q[query * D + C * lane + c];
    if (f.fresh) turn_lanes(x, kv.rope, pos);
    const float scale = 1.4426950408889634f * rsqrtf((float)D);
    for (int c = 0; c < C; c++) a.q_scaled[query * D + C * lane + c] = x[c] *= scale;
    hadamard_lanes(x);
    float top = 1e-30f;
    for (int c = 0; c < C; c++) top = fmaxf(top, fabsf(x[c]));
    const float unit = warp_max(top) / 32512.0f;    // 127 * 256: hi fits a byte
    int sum = 0;
    int8_t hi[C], lo[C];
    for (int c = 0; c < C; c++) {
        const int v = __float2int_rn(x[c] / unit);
        sum += v, lo[c] = (int8_t)(v & 255), hi[c] = (int8_t)((v - lo[c]) >> 8);
    }
    memcpy(a.q_code + query * 2 * D + C * lane, hi, C), memcpy(a.q_code + query * 2 * D + D + C * lane, lo, C);
    sum = warp_sum(sum);
    if (lane == 0) a.q_unit[query] = make_float2(unit, 0.5f * sum), a.arrived[query] = 0;
}

// ---- f16 ----------------------------------------------------------------------------------------------------
constexpr int F16_WARPS = 8, F16_TEAMS = 2 * GPU_SMS;    // thread blocks at work at once
template <int D, int Q> __global__ void __launch_bounds__(32 * F16_WARPS, 2) decode_f16_kernel(DecodeArgs a) {
    __shared__ WarpResult<D, Q> results[F16_WARPS];
    const KvView &kv = a.kv;
    const int warp = threadIdx.x / 32, heads = kv.Hkv * a.chunks, tasks = a.b.N * heads * a.room;
    wait_for_inputs();
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int head = task % heads, n = task / heads % a.b.N, part = task / heads / a.b.N, h = head / a.chunks;    // parts that few rows have come last
        const int slot = a.b.slot[n], pos = a.b.pos[n], units = pos / GROUP + 1, parts = parts_of(units, F16_WARPS, a.room);
        if (part >= parts) continue;
        const int begin = (int)((int64_t)units * part / parts), end = (int)((int64_t)units * (part + 1) / parts), coded_end = kv.coded_end(pos);
        const int q0 = head % a.chunks * Q, n_queries = min(Q, a.G - q0);
        const int64_t first = (int64_t)n * a.Hq + h * a.G + q0, own_row = ((int64_t)n * kv.Hkv + h) * D;
        ExactTokens<D, Q> tokens;
        auto rows_of = [&](bool key, int i) -> const f16 * {
            if (i >= kv.sink && i < coded_end) return (const f16 *)(key ? kv.k_block(a.layer, slot, h, i) : kv.v_block(a.layer, slot, h, i));
            return (key ? kv.k_exact : kv.v_exact) + kv.exact_at(a.layer, slot, h, i);
        };
        auto load_keys = [&](int g) { tokens.load_keys(rows_of(true, g / GROUPS), a.k16 + own_row, g % GROUPS * GROUP, pos - g / GROUPS * KV_BLOCK); };
        int g = begin + warp;
        if (g < end) load_keys(g);
        for (; g < end; g += F16_WARPS) {
            const int i = g / GROUPS, t0 = g % GROUPS * GROUP, own = pos - i * KV_BLOCK;
            tokens.load_values(rows_of(false, i), a.v16 + own_row, t0, own);
            tokens.turn_queries(a.q_scaled + first * D, n_queries, kv.rope.base + (int64_t)i * D);
            const float score = tokens.scores(kv.rope.step, t0, own);
            if (g + F16_WARPS < end) load_keys(g + F16_WARPS);
            tokens.add_values(score);
        }
        float m[Q], l[Q];
        tokens.totals(m, l);
        results[warp].put(m, l, tokens.o);
        __syncthreads();
        merge_warps<D, Q>(a, first, n_queries, part, parts, F16_WARPS, [&](int w) -> const WarpResult<D, Q> & { return results[w]; });
        __syncthreads();
    }
}
template <int D, int Q> static void decode_f16(const DecodeArgs &a) {
    launch(decode_f16_kernel<D, Q>, dim3((unsigned)std::min<int64_t>((int64_t)a.b.N * a.kv.Hkv * a.chunks * a.room, 2 * sm_count)), 32 * F16_WARPS, 0, a);
}

// ---- launch -------------------------------------------------------------------------------------------------
static int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
// The most that decode_parts can say, for so many heads or more.
static int most_parts(bool f16, int N, int heads) { return std::clamp((N <= FEW_ROWS ? 1 : 4) * (f16 ? F16_TEAMS : codes_teams(N)) / ((N <= FEW_ROWS ? 1 : N) * heads), 1, MAX_PARTS); }
static int room_of(bool f16, int N, int heads) { return decode_parts(N, heads, f16 ? F16_TEAMS : codes_teams(N)); }
struct Work { int64_t q_scaled, q_code, q_unit, arrived, part_ml, part_o, bytes; };    // offsets
static Work work_of(int64_t N, int Hq, int d, int room) {
    Work w{};
    int64_t at = 0;
    auto take = [&](int64_t bytes) { const int64_t from = at; at += aligned(bytes); return from; };
    const int64_t queries = N * Hq;
    w.q_scaled = take(queries * d * 4), w.q_code = take(queries * d * 2), w.q_unit = take(queries * 8), w.arrived = take(queries * 4);
    w.part_ml = take(queries * room * 8), w.part_o = take(queries * room * d * 4);
    w.bytes = at;
    return w;
}
int64_t attention_decode_work_bytes(const StepShape &shape) {
    int64_t most = 0;    // fewer rows may have more parts in all; a head has at most Hq / QUERIES of the chunks, rounded up
    for (int N = 1; N <= shape.N; N++)
        for (bool f16 : {true, false}) most = std::max(most, work_of(N, shape.Hq, shape.d, most_parts(f16, N, (int)ceil_div(shape.Hq, QUERIES))).bytes);
    return most;
}

static bool serves(const KvView &kv, const Step &step) {
    const bool f16_only = kv.k_format == KvFormat::f16;
    return step.single_rows() && !kv.ablate && (kv.d == 64 || kv.d == 128) && kv.k_format <= KvFormat::nsn4b && kv.v_format <= KvFormat::nsn4b &&
           f16_only == (kv.v_format == KvFormat::f16) && (f16_only || decode_codes_fit());
}
static void decode(float *y, const FreshRows &rows, const f16 *k16, const f16 *v16, const KvView &kv, int layer, const Batch &b, int Hq) {
    const int G = Hq / kv.Hkv, Q = G == 1 ? 1 : QUERIES, chunks = (int)ceil_div(G, Q);
    const int room = std::min(room_of(kv.k_format == KvFormat::f16, b.N, kv.Hkv * chunks), std::max(1, kv.max_blocks));
    const Work w = work_of(b.N, Hq, kv.d, room);
    uint8_t *const work = (uint8_t *)step.work;
    const DecodeArgs a = {y, kv, k16, v16, b, (float *)(work + w.q_scaled), (int8_t *)(work + w.q_code), (float2 *)(work + w.q_unit), (float *)(work + w.part_o),
                          (float2 *)(work + w.part_ml), (int *)(work + w.arrived), layer, Hq, G, chunks, room};
    const dim3 blocks((unsigned)ceil_div((int64_t)b.N * (Hq + (rows.fresh ? kv.Hkv : 0)), ROW_WARPS));
    launch(kv.d == 64 ? decode_rows_kernel<64> : decode_rows_kernel<128>, blocks, 32 * ROW_WARPS, 0, a, rows);
    if (kv.k_format != KvFormat::f16) return decode_codes(a);
    if (Q == 1) return kv.d == 64 ? decode_f16<64, 1>(a) : decode_f16<128, 1>(a);
    kv.d == 64 ? decode_f16<64, QUERIES>(a) : decode_f16<128, QUERIES>(a);
}

bool attention_decode(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    if (!serves(kv, step_of(b))) return false;
    decode(y, {q, nullptr, nullptr, nullptr, nullptr, false}, k16, v16, kv, layer, b, Hq);
    return true;
}

bool attend(float *y, const float *q, const float *k, const float *v, f16 *k16, f16 *v16, const KvView &kv, int layer, const Batch &b, int Hq) {
    const Step &step = step_of(b);
    if (!serves(kv, step)) return false;
    if (const int seals = step.most_seals(kv)) seal_blocks(kv, layer, k16, v16, step, seals);    // of the ring, before the rows go there
    decode(y, {q, k, v, k16, v16, true}, k16, v16, kv, layer, b, Hq);
    return true;
}
}    // namespace cuda
#endif
