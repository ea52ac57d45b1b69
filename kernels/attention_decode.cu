/* attention_decode - attention of steps with one row a slot; the contract is attention.cu's.

   Math      q . k_t = (R q) . code_t + q . RoPE_t(plain_t),   sum p_t v_t = R (sum p_t code_t) + sum p_t plain_t
   Kernels   f16     both sides fp16: this page
             codes   both sides NSN: decode_codes.cu, and decode_codes_mha.cu for heads with one query
             One launch a layer: who needs a query turns and scales it (QueryTurn), who needs the row's own key and value rounds
             them and puts them into the ring (own_row).  The first sealed blocks are asked for before the kernel before is done.
             Before layer 0 one launch more seals what is due in all layers (kv_seal.cu).
   Work      The cache of a row and kv head is divided into parts; a part is a thread block's, and a team's of its warps in
             decode_codes (codes_shares).  A part leaves a triple (m, l, o), the last to arrive merges them in order.
             f16: units are 8 tokens; 8 warps take turns.  The keys of a warp's next tokens are on their way while it adds up the
             values of these.  Its first keys, values and angles are there before q is.
             Tried: a kernel of its own that turns and rounds queries (16.1 us for 13.8: 32 heads, 4,096 tokens); wo prefetched to L2 beside
             it (33 MB, cp.async.bulk.prefetch): Llama-3-8B at depth 0 decodes 175 tok/s in f16 for 179; 28 or 44 KB more of shared memory,
             so that few thread blocks spread over the multiprocessors: Llama-3.2-1B 994 for 1,008.
             The next kernel may start before this one has what it waits for: 961 tok/s for 926 (f16; not with codes and more than
             FEW_ROWS rows: 32 sequences at 4,096 tokens 4,153 for 4,178).
   Order     Of a row: a function of its length and of the cache's shape; for more than FEW_ROWS rows also of the number of rows,
             because so many fill the GPU with longer parts.  Steps with more rows a slot add up in other orders.
   Limits    d 64 or 128; K and V both f16 or both NSN; no --ablate.  Everything else is attention_any.cu's.
   Tested by tests/test_cuda_decode.cpp                       Timed by tests/bench_decode.cu                             */
#ifdef __CUDACC__
#include <algorithm>
#include "attention_decode.cuh"
namespace cuda {

// ---- f16 ----------------------------------------------------------------------------------------------------
constexpr int F16_WARPS = 8, F16_TEAMS = 2 * GPU_SMS;    // thread blocks at work at once
// A warp's in shared memory: angles of its tokens of a block, then what it adds up to.
template <int D, int Q> union F16Warp {
    float angles[GROUP][D];
    WarpResult<D, Q> result;
};
template <int D, int Q> __global__ void __launch_bounds__(32 * F16_WARPS, 2) decode_f16_kernel(DecodeArgs a) {
    constexpr int PAIRS = D / 64;
    static_assert(F16_WARPS == GROUPS, "a warp's tokens are the same ones of each block");
    __shared__ F16Warp<D, Q> warps[F16_WARPS];
    __shared__ float scaled[Q][D];
    __shared__ f16 own_rows_here[2 * D];
    const KvView &kv = a.kv;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tasks = a.b.N * a.heads.d * a.reach;
    let_next_start();
    bool waited = false;
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int others = a.heads(task), head = task - others * a.heads.d, part = a.rows(others);    // parts that few rows have come last
        const int n = others - part * a.rows.d, h = a.chunks(head), q0 = (head - h * a.chunks.d) * Q, n_queries = min(Q, a.G - q0);
        const int slot = a.b.slot[n], pos = a.b.pos[n], units = pos / GROUP + 1, parts = parts_of(units, F16_WARPS, a.room);
        if (part >= parts) continue;
        const int each = (unsigned)units / (unsigned)parts, more = units - each * parts;    // the first ones have one more
        const int begin = each * part + min(part, more), end = begin + each + (part < more), coded_end = kv.coded_end_at(pos, a.turn);
        const int64_t first = (int64_t)n * a.Hq + h * a.G + q0;
        int g = begin + warp;
        const int t0 = g % GROUPS * GROUP;
        // What earlier steps wrote, and angles, before the kernel that makes q is done.
        ExactTokens<D, Q> tokens;
        auto own_of = [&](int g) { return pos - g / GROUPS * KV_BLOCK; };
        auto rows_of = [&](bool key, int g) -> const f16 * {
            const int i = g / GROUPS;
            if (i >= kv.sink && i < coded_end) return (const f16 *)(key ? kv.k_sealed : kv.v_sealed) + (kv.sealed_at(a.layer, slot, h, i) * KV_BLOCK + t0) * D;
            return (key ? kv.k_exact : kv.v_exact) + kv.exact_at(a.layer, slot, h, g * GROUP);
        };
        auto load_keys = [&](int g) {
            tokens.load_base(kv.rope.base + (int64_t)(g / GROUPS) * D);
            tokens.load_earlier_keys(rows_of(true, g), t0, own_of(g));
        };
        auto load_values = [&](int g) { tokens.load_earlier_values(rows_of(false, g), t0, own_of(g)); };
        if (g < end) {
            load_keys(g), load_values(g);
            for (int i = 4 * lane; i < GROUP * D; i += 128) *(float4 *)(&warps[warp].angles[0][0] + i) = *(const float4 *)(kv.rope.step + t0 * D + i);
        }
        QueryAngles<D> angles;
        angles.load(a, pos);
        const QueryTurn<D> turn = angles.sum();
        if (!waited) wait_for_inputs(), waited = true;    // positions are there before the step's first kernel
        const bool mine = end == units && (end - 1 - begin) % F16_WARPS == warp;
        const OwnRow own_rows = own_row<D>(a, n, slot, h, pos, mine, own_rows_here);
        // in shared memory in any case: pointers to one or the other would take registers that the loop has not got
        for (int c = lane; mine && !a.fresh() && c < D; c += 32) own_rows_here[c] = own_rows.k[c], own_rows_here[D + c] = own_rows.v[c];
        for (int q = warp; q < Q; q += F16_WARPS) {
            float x[D / 32] = {};
            QueryRow<D> row;
            if (q < n_queries) row.load(a, first + q), turn.turn(x, row);
            for (int p = 0; p < PAIRS; p++) scaled[q][PAIRS * lane + p] = x[p], scaled[q][D / 2 + PAIRS * lane + p] = x[PAIRS + p];
        }
        __syncthreads();
        while (g < end) {
            const int own = own_of(g);
            if (mine) tokens.load_own(own_rows_here, own_rows_here + D, t0, own);
            tokens.turn_queries([&](int q, int p) { return scaled[q][(p < PAIRS ? p : D / 2 - PAIRS + p) + PAIRS * lane]; });
            const float score = tokens.scores(warps[warp].angles[0], t0, own);
            g += F16_WARPS;
            if (g < end) load_keys(g);
            tokens.add_values(score);
            if (g < end) load_values(g);
        }
        const float l = tokens.total();
        __syncwarp();    // all have read the angles
        warps[warp].result.put(tokens.o, tokens.m, l);
        __syncthreads();
        merge_warps<D, Q, false>(a, first, n_queries, part, parts, warp, F16_WARPS, [&](int w) -> const WarpResult<D, Q> & { return warps[w].result; });
        __syncthreads();
    }
}
template <int D, int Q> static void decode_f16(const DecodeArgs &a) {
    launch(decode_f16_kernel<D, Q>, dim3((unsigned)std::min<int64_t>((int64_t)a.b.N * a.kv.Hkv * a.chunks.d * a.reach, 2 * sm_count)), 32 * F16_WARPS, 0, a);
}

// ---- launch -------------------------------------------------------------------------------------------------
static int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }
// Of fp16 rows: as many parts as keep most thread blocks busy in the last of up to four rounds.
static int f16_parts(int rows, int heads) {
    if (rows <= FEW_ROWS) return parts_of_few(heads, F16_TEAMS);
    const double tasks = (double)rows * heads;
    int best = 1;
    double best_busy = 0;    // share of the time
    for (int rounds = 1; rounds <= 4; rounds++) {
        const int parts = std::clamp((int)(rounds * F16_TEAMS / tasks), 1, MAX_PARTS);
        const double busy = tasks * parts / F16_TEAMS / std::ceil(tasks * parts / F16_TEAMS);
        if (busy > 1.03 * best_busy) best = parts, best_busy = busy;
    }
    return best;
}
// More than any function of parts says, for so many heads or more.
static int most_parts(int N, int heads) { return N <= FEW_ROWS ? parts_of_few(heads, F16_TEAMS) : std::clamp(MOST_TASKS / (N * heads), 1, MAX_PARTS); }
struct Work { int64_t part_ml, part_o, bytes; };    // offsets
static Work work_of(int64_t N, int Hq, int d, int room) {
    const int64_t queries = N * Hq, ml_bytes = aligned(queries * room * 8);
    return {0, ml_bytes, ml_bytes + aligned(queries * room * d * 4)};
}
int64_t attention_decode_work_bytes(const StepShape &shape) {
    int64_t most = 0;    // fewer rows may have more parts in all; a head has at least Hq / (2 QUERIES) of the chunks
    for (int N = 1; N <= shape.N; N++) most = std::max(most, work_of(N, shape.Hq, shape.d, most_parts(N, (int)ceil_div(shape.Hq, 2 * QUERIES))).bytes);
    return most;
}

static bool serves(const KvView &kv, const Step &step, int Hq) {
    const bool f16_only = kv.k_format == KvFormat::f16;
    const int64_t N = step.pos.size();
    if (N * std::max<int64_t>(N, (int64_t)Hq * Hq) > INT32_MAX) return false;    // quotients of tasks: Divider
    return step.single_rows() && !kv.ablate && (kv.d == 64 || kv.d == 128) && kv.k_format <= KvFormat::nsn4b && kv.v_format <= KvFormat::nsn4b &&
           f16_only == (kv.v_format == KvFormat::f16) && (f16_only || decode_codes_fit());
}
__device__ unsigned arrived[MOST_COUNTED];    // 0 between kernels
static void decode(float *y, const float *q, const float *k, const float *v, const f16 *k16, const f16 *v16, const KvView &kv, int layer, const Batch &b, int Hq) {
    static unsigned *const counters = [] {
        void *p;
        CUDA_CHECK(cudaGetSymbolAddress(&p, arrived));
        return (unsigned *)p;
    }();
    const bool f16_only = kv.k_format == KvFormat::f16;
    const int G = Hq / kv.Hkv, Q = queries_of_pass(G, !f16_only), chunks = (int)ceil_div(G, Q), heads = kv.Hkv * chunks;
    Shares shares = f16_only ? Shares{f16_parts(b.N, heads), 0} : codes_shares(kv, b.N, G);
    if ((int64_t)b.N * Hq > MOST_COUNTED) shares.parts = 1;
    const int room = std::min({shares.parts, most_parts(b.N, heads), std::max(1, kv.max_blocks)});
    const int reach = f16_only ? parts_of(step.reach() * GROUPS, F16_WARPS, room) : parts_of(step.reach(), b.N <= FEW_ROWS ? BLOCKS_EACH : 1, room);
    const Work w = work_of(b.N, Hq, kv.d, room);
    const int64_t of_layer = (int64_t)layer * kv.n_blocks * kv.Hkv;
    uint8_t *const work = (uint8_t *)step.work;
    const DecodeArgs a = {y, kv, q, k, v, k16, v16, b, (float *)(work + w.part_o), (float2 *)(work + w.part_ml), counters,
                          kv.k_sealed + of_layer * kv.k_block_bytes, kv.v_sealed + of_layer * kv.v_block_bytes, layer, kv.turn(layer), Hq, G,
                          room, std::min(room, reach), Divider(chunks), Divider(heads), Divider(b.N), Divider(std::max(1, shares.team)), leave_rows(b.N, Hq * kv.d)};
    if (!f16_only) decode_codes(a);
    else if (Q == 1) kv.d == 64 ? decode_f16<64, 1>(a) : decode_f16<128, 1>(a);
    else kv.d == 64 ? decode_f16<64, QUERIES>(a) : decode_f16<128, QUERIES>(a);
    if (a.rows16.x) rows_left(y, nullptr, b.N, Hq * kv.d);
}

bool attention_decode(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    if (!serves(kv, step_of(b), Hq)) return false;
    decode(y, q, nullptr, nullptr, k16, v16, kv, layer, b, Hq);
    return true;
}

bool attend(float *y, const float *q, const float *k, const float *v, f16 *, f16 *, const KvView &kv, int layer, const Batch &b, int Hq) {
    const Step &step = step_of(b);
    if (!serves(kv, step, Hq)) return false;
    if (layer == 0 && step.most_seals(kv)) seal_in_turn(kv, step);    // of every layer, from the ring; later steps read them
    decode(y, q, k, v, nullptr, nullptr, kv, layer, b, Hq);
    return true;
}
}    // namespace cuda
#endif
