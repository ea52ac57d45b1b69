// decode_codes.cuh - what the kernels over codes do alike around a block: a warp's part, its queries, the ring of blocks, tasks in
// turn, its exact tokens, the launch.
#pragma once
#include "decode_shared.cuh"

namespace cuda {

// Arguments come from memory too, a line of 64 bytes when an instruction needs it: here all at once, a line a warp.
__device__ inline void ask_for_arguments(const DecodeArgs &a, uint32_t unused) {
    const uint32_t warp = threadIdx.x / 32;
    if (warp * 64 < sizeof a) store_shared(unused, ((const uint32_t *)&a)[warp * 16]);    // a use, so that it is loaded
}

// ---- a warp's part ------------------------------------------------------------------------------------------
// Part `part` of the cache of row n and kv head h, for query heads from q0 on; the team's warp `rank` has blocks begin, begin + team ...
struct Part {
    int task, n, h, q0, part, parts, slot, pos, n_blocks, coded, begin, count, team, rank, warp, teams;    // teams: of all thread blocks
    Part() = default;
    // Nothing can start before slot and position are there, which takes longer than all else here: meanwhile() is called as soon as they are
    // asked for.
    template <class Meanwhile>
    __device__ Part(const DecodeArgs &a, int task, int queries, int teams, Meanwhile meanwhile) : task(task), warp(threadIdx.x / 32), teams(teams) {
        const KvView &kv = a.kv;
        team = a.team.d, rank = warp - team * a.team(warp);
        const int others = a.heads(task), head = task - others * a.heads.d;
        part = a.rows(others), n = others - part * a.rows.d;    // parts that few rows have come last
        h = a.chunks(head), q0 = (head - h * a.chunks.d) * queries;
        slot = a.b.slot[n], pos = a.b.pos[n];
        meanwhile();
        n_blocks = pos / KV_BLOCK + 1, coded = max(0, min(kv.coded_end_at(pos, a.turn), n_blocks) - kv.sink);
        parts = a.b.N <= FEW_ROWS ? parts_of(coded, BLOCKS_EACH, a.room) : parts_of(coded, 1, a.room);
        const int each = (unsigned)coded / (unsigned)parts, more = coded - each * parts;    // the first ones have one more
        begin = kv.sink + each * part + min(part, more) + rank;
        const int blocks = each + (part < more) - rank;
        count = there() && blocks > 0 ? a.team(blocks + team - 1) : 0;
    }
    __device__ bool there() const { return part < parts; }
    // Its queries, up to Q, and which of all the first one is.
    template <int Q> __device__ int queries(const DecodeArgs &a) const { return min(Q, a.G - q0); }
    __device__ int64_t first_query(const DecodeArgs &a) const { return (int64_t)n * a.Hq + h * a.G + q0; }
    // Groups of exact tokens, and the warp's: every parts * team-th from the first on; last warps have fewer blocks.
    __device__ int exact_groups() const { return (n_blocks - coded - 1) * GROUPS + pos % KV_BLOCK / GROUP + 1; }
    __device__ int first_exact() const { return part + (team - 1 - rank) * parts; }
    // While the warp goes through its blocks every register is needed for them: the rest is in shared memory then.
    __device__ void keep(uint32_t at) const {
        store_shared(at, kept(task, n, h, q0)), store_shared(at + 16, kept(part, parts, slot, pos)), store_shared(at + 32, kept(n_blocks, coded, rank, teams));
    }
    __device__ void fetch(uint32_t at) {
        __syncwarp();
        const int4 a = load_shared<int4>(at), b = load_shared<int4>(at + 16), c = load_shared<int4>(at + 32);
        task = a.x, n = a.y, h = a.z, q0 = a.w, part = b.x, parts = b.y, slot = b.z, pos = b.w, n_blocks = c.x, coded = c.y, rank = c.z, teams = c.w;
    }
    __device__ static Words<4> kept(int a, int b, int c, int d) { return {{(uint32_t)a, (uint32_t)b, (uint32_t)c, (uint32_t)d}}; }
    __device__ void sync() const {    // the team's warps
        if (team == 1) __syncwarp();
        else asm volatile("bar.sync %0, %1;" ::"r"(1 + warp - rank), "r"(32 * team) : "memory");
    }
};

// Group i of the tokens that a row and head see exactly: sinks, then from coded_end on.
struct ExactGroup {
    int block, t0;    // tokens t0 ..
    int64_t rows;     // where in k_exact and v_exact
    __device__ ExactGroup(const DecodeArgs &a, const Part &p, int i) {
        const int e = i / GROUPS;
        block = e < a.kv.sink ? e : e + p.coded, t0 = i % GROUPS * GROUP;
        rows = a.kv.exact_at(a.layer, p.slot, p.h, block * KV_BLOCK + t0);
    }
};
// The warp's first one to L2, a line a lane; few rows: many have enough else to read.
template <int D> __device__ void prefetch_exact(const DecodeArgs &a, const Part &p) {
    if (a.b.N > FEW_ROWS || !p.there() || p.first_exact() >= p.exact_groups()) return;
    const ExactGroup e(a, p, p.first_exact());
    const int line = threadIdx.x % 16 * 64;    // of 64 channels
    if (line < GROUP * D) asm volatile("prefetch.global.L2 [%0];" ::"l"((threadIdx.x % 32 < 16 ? a.kv.k_exact : a.kv.v_exact) + e.rows + line));
}

// The first of a part's queries that a warp prepares, and what turns all of them, on their way: one query is every warp's for itself, of
// more each is a warp's of the team.
template <int D, int Q> struct QueryOnItsWay {
    QueryAngles<D> angles;
    QueryRow<D> row;
    __device__ static int first(const Part &p) { return Q == 1 ? 0 : p.rank; }
    // Behind a head's last query comes that one again.
    __device__ static int64_t query(const DecodeArgs &a, const Part &p, int q) { return p.first_query(a) + min(q, p.queries<Q>(a) - 1); }
    __device__ void load(const DecodeArgs &a, const Part &p) {
        *this = {};    // no part's is alive in the next's
        if (!p.there() || first(p) >= Q) return;
        angles.load(a, p.pos);
        row.load(a, query(a, p, first(p)));
    }
};
// A query, R done, in integers of 16 bits.
template <class S> struct QueryCodes {
    static constexpr int D = S::D, C = D / 32, PAIRS = D / 64;
    int v[C], sum;
    float top;
    __device__ explicit QueryCodes(Floats<C> x) {
        hadamard_lanes(x.x);    // of channels in the order of (lower or upper half, lane, pair)
        top = 1e-30f;
        for (int i = 0; i < C; i++) top = fmaxf(top, fabsf(x.x[i]));
        top = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(top)));    // bits of numbers >= 0 are in their order
        const float inverse = 32512.0f / top;    // 127 * 256: hi fits a byte
        sum = 0;
        for (int i = 0; i < C; i++) sum += v[i] = __float2int_rn(x.x[i] * inverse);
        sum = __reduce_add_sync(~0u, sum);
    }
    // Bytes hi of the lane's channels c .. go to where(c, 0), bytes lo to where(c, 1).
    template <class Where> __device__ void store(Where where) const {
        for (int half = 0; half < 2; half++) {
            int8_t hi[PAIRS], lo[PAIRS];
            for (int i = 0; i < PAIRS; i++) lo[i] = (int8_t)(v[half * PAIRS + i] & 255), hi[i] = (int8_t)((v[half * PAIRS + i] - lo[i]) >> 8);
            const int c = half * D / 2 + PAIRS * (threadIdx.x % 32);
            memcpy(at_address(where(c, 0)), hi, PAIRS), memcpy(at_address(where(c, 1)), lo, PAIRS);
        }
    }
    __device__ float unit() const { return top * (1 / 32512.0f); }
};
// A part's only query: a lane's pairs of it, and column g of a B operand of its integers, channels D/4 t + 4 i ..  Returns (unit, half the
// sum of the integers).
template <class S>
__device__ float2 prepare_query(const Part &p, const QueryOnItsWay<S::D, 1> &own, Floats<S::D / 32> (&query)[1], uint32_t (&bq)[S::D / 16]) {
    constexpr int D = S::D;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t bytes = S::slots(p.warp) + S::SLOT;    // no block has it yet
    own.angles.sum().turn(query[0].x, own.row);
    const QueryCodes<S> codes(query[0]);
    codes.store([&](int c, int lo) { return bytes + lo * D + c; });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        const uint4 v = load_shared<uint4>(bytes + g % 2 * D + D / 4 * t + 16 * i);
        memcpy(bq + 4 * i, &v, 16);
    }
    __syncwarp();
    return make_float2(codes.unit(), 0.5f * codes.sum);
}
// A part's queries to where Layout has them; delta: what units are multiplied by.
template <class S, int Q> __device__ void prepare_queries(const DecodeArgs &a, const Part &p, QueryOnItsWay<S::D, Q> &own, float delta) {
    constexpr int D = S::D, C = D / 32, SETS = S::SETS;
    const int lane = threadIdx.x % 32, first = p.warp - p.rank;
    const uint32_t bytes = S::queries(first), units = bytes + SETS * S::CODES, pairs = units + SETS * S::UNITS;
#pragma unroll 1
    for (int q = p.rank; q < Q; q += p.team) {
        if (q > p.rank) own.row.load(a, own.query(a, p, q));
        Floats<C> x;
        own.angles.sum().turn(x.x, own.row);
        Words<C> w;
        memcpy(&w, &x, sizeof w);
        store_shared(S::numbers(first, q) + 4 * C * lane, w);
        const uint32_t pair = pairs + q / 2 * (4 * D) + q % 2 * 8;    // two pairs of two queries are 16 bytes
        if constexpr (C == 4) store_shared(pair + 16 * lane, Words<2>{{pack(x.x[0], x.x[1]), pack(x.x[2], x.x[3])}});
        else {
            const float lo = __shfl_xor_sync(~0u, x.x[0], 1), hi = __shfl_xor_sync(~0u, x.x[1], 1);
            if (lane % 2 == 0) store_shared(pair + 8 * lane, Words<2>{{pack(x.x[0], lo), pack(x.x[1], hi)}});
        }
        const QueryCodes<S> codes(x);
        codes.store([&](int c, int lo) {    // lane (g, t) reads channels D/4 t + 16 i .. of column g
            const int t = c / (D / 4), at = c % (D / 4), g = q % 4 * 2 + lo;
            return bytes + q / 4 * S::CODES + at / 16 * 512 + 16 * (4 * g + t) + at % 16;
        });
        const float unit = codes.unit() * delta;
        const Words<2> scale = {{__float_as_uint(unit), __float_as_uint(unit * 0.5f * codes.sum)}};
        if (lane < 8) store_shared(units + 8 * SETS * (4 * lane + q % 4) + q / 4 * 8, scale);
    }
    p.sync();
}

// Block j of the warp: its keys and its values come as soon as those whose place they take are done with, the mean of its keys before,
// when j / AHEAD * AHEAD starts.
template <class K, class V, class S> struct BlockRing {
    static constexpr int AHEAD = S::MEANS / 2;
    using KB = typename K::Block;
    using VB = typename V::Block;
    static_assert(S::MEAN <= 128, "a word a lane");
    int count, every;                                          // blocks, and from one to the next
    int table, base;                                           // where in the block table and in the table of angles the first one is
    uint32_t k_from, v_from;                                   // of number 0, the lane's bytes, in sixteens: as addresses they would be twice as many registers
    uint32_t slots, means;                                     // the lane's first slots
    int next[AHEAD], after;                                    // numbers in the pool, from the next values to load on; the one behind

    // Asks for the numbers of the first blocks; start, for the blocks.
    __device__ void ask(const DecodeArgs &a, const Part &p) {
        count = p.count, every = p.team, table = p.slot * a.kv.max_blocks + (count > 0 ? p.begin : 0);
        const int last = max(count - 1, 0);
        after = entry_at(a, 0);    // also where there is no block, or `after` would have to be kept from part to part
        for (int i = 0; i < AHEAD; i++) next[i] = entry_at(a, min(i + 1, last));
    }
    __device__ void start(const DecodeArgs &a, const Part &p) {
        base = p.begin * K::d + (S::BY_PART ? 2 * (lane() % (K::d / 4)) : lane());
        k_from = opaque(p.h * (stride<K> / 16) + lane()), v_from = std::is_same_v<K, V> ? k_from : opaque(p.h * (stride<V> / 16) + lane());
        slots = opaque(S::slots(p.warp) + 16 * lane()), means = opaque(S::means(p.warp) + 4 * lane());
        const int number = after;
        for (int i = 0; i < AHEAD; i++) load_mean(a, i, i == 0 ? number : next[i - 1]);
        load_keys(a, 0, number);
        load_values(a, 0, number);
    }
    // Block 1; where a head has one query, when prepare_query is done with its place.
    __device__ void load_second(const DecodeArgs &a) {
        if (count == 0) return;
        release_keys(a, -1);
        release_values(a, -1);
    }
    __device__ uint32_t keys_at(int j) const { return slots - 16 * lane() + j % 2 * S::SLOT; }
    __device__ uint32_t values_at(int j) const { return keys_at(j) + S::SLOT_K; }
    // From the same register: the lane's 16 bytes of token factors, and of the mean scores of blocks behind the first of those done together.
    __device__ uint32_t factors() const { return slots + 2 * S::SLOT; }
    __device__ uint32_t kept() const { return slots - S::Z + 512 * S::SETS; }
    // What is in flight: keys, values, keys, values ...; that these of the block at work are there:
    __device__ void wait_keys() const { wait<3>(); }      // before the next are asked for
    __device__ void wait_values() const { wait<3>(); }    // after release_keys
    __device__ void wait_block() const { wait<2>(); }     // before it
    // All lanes are done with the keys, with the values, of block j.
    __device__ void release_keys(const DecodeArgs &a, int j) {
        after = entry(a, j + 2 + AHEAD);    // half a block before it is needed
        load_mean(a, j + 1 + AHEAD, next[AHEAD - 1]);
        load_keys(a, j + 2, next[0]);
    }
    __device__ void release_values(const DecodeArgs &a, int j) {
        load_values(a, j + 2, next[0]);
        for (int i = 0; i < AHEAD - 1; i++) next[i] = next[i + 1];
        next[AHEAD - 1] = after;
    }
    // Cosines and sines at the start of blocks j .. j + AHEAD-1: the pairs that the lane turns of a mean, N neighbours.  Of twice as many
    // blocks as M, where half the lanes have all pairs of one: lower lanes the even ones, upper lanes the odd ones.
    template <int N, int M> __device__ void load_base(const DecodeArgs &a, Floats<N> (&x)[M][2], int j) const {
        constexpr int EACH = AHEAD / M, LANES = K::d / 2 / N;
        static_assert(N == (S::BY_PART ? 2 : 1) && EACH * LANES == 32);
#pragma unroll
        for (int i = 0; i < M; i++) {
            const float *from = a.kv.rope.base + (base + min(j + EACH * i + lane() / LANES, count - 1) * every * K::d);
            x[i][0] = *(const Floats<N> *)from, x[i][1] = *(const Floats<N> *)(from + K::d / 2);
        }
    }

  private:
    __device__ static int lane() { return threadIdx.x % 32; }
    // Of block `number`, the lane's; `from` as above.
    template <class Format> __device__ static const uint8_t *bytes_of(const uint8_t *blocks, uint32_t from, const DecodeArgs &a, int number) {
        return blocks + (uint64_t)(from + (uint32_t)number * (a.kv.Hkv * (stride<Format> / 16))) * 16;
    }
    __device__ int entry(const DecodeArgs &a, int j) const { return entry_at(a, min(j, count - 1)); }
    __device__ int entry_at(const DecodeArgs &a, int j) const {
        int number;    // asked for here, not where it is needed
        asm volatile("ld.global.s32 %0, [%1];" : "=r"(number) : "l"(a.kv.table + table + j * every));
        return number;
    }
    __device__ void load_mean(const DecodeArgs &a, int j, int number) const {
        const uint8_t *const from = bytes_of<K>(a.k_blocks, k_from, a, number) + ((int)offsetof(KB, mean) - 12 * lane());
        copy_async4(means + j % S::MEANS * S::MEAN, from, j < count && lane() < S::MEAN / 4);
    }
    // `from` and `to` are the lane's.
    template <int BYTES> __device__ static void copy(uint32_t to, const uint8_t *from, bool wanted) {
#pragma unroll
        for (int at = 0; at < BYTES; at += 512) copy_async16(to + at, from + at, wanted && (at + 512 <= BYTES || at + 16 * lane() < BYTES));
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ void load_keys(const DecodeArgs &a, int j, int number) const {
        copy<S::SLOT_K>(slots + j % 2 * S::SLOT, bytes_of<K>(a.k_blocks, k_from, a, number), j < count);
    }
    __device__ void load_values(const DecodeArgs &a, int j, int number) const {
        copy<S::SLOT_V>(slots + j % 2 * S::SLOT + S::SLOT_K, bytes_of<V>(a.v_blocks, v_from, a, number), j < count);
    }
    template <int IN_FLIGHT> __device__ static void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(IN_FLIGHT) : "memory");
        __syncwarp();
    }
};

// The tasks of a team, one after the other.
template <class K, class V, class S, int Q> struct Turns {
    Part p;
    BlockRing<K, V, S> ring;
    QueryOnItsWay<S::D, Q> query;
    __device__ static int tasks(const DecodeArgs &a) { return a.b.N * a.kv.Hkv * a.chunks.d * a.reach; }
    // Tables, first blocks and queries; false: there is nothing to do for this thread block.  Positions and block tables are there before the
    // step's first kernel, so are the blocks that it reads as codes.  What is asked for is stored or needed while the next is on its way:
    // slot and position, tables, block numbers, blocks, queries.
    __device__ bool start(const DecodeArgs &a) {
        Tables<K, V, S> tables;
        p = Part(a, blockIdx.x + gridDim.x * a.team(threadIdx.x / 32), Q, gridDim.x * a.team(S::WARPS), [&] { tables.load(a.kv); });
        const bool one_task = p.teams == tasks(a) && a.team.d == S::WARPS;
        if (one_task && !p.there()) return false;
        ring.ask(a, p);
        tables.store();
        ring.start(a, p);
        prefetch_exact<S::D>(a, p);
        wait_for_inputs();
        query.load(a, p);
        __syncthreads();
        return true;
    }
    __device__ bool go_on(const DecodeArgs &a) {    // false: that was the last
        if ((p.task += p.teams) >= tasks(a)) return false;
        p = Part(a, p.task, Q, p.teams, [] {});
        ring.ask(a, p);
        query.load(a, p);
        ring.start(a, p);
        return true;
    }
};

// Where a warp's sums of codewords go, and what a team merges.
template <class S, int Q> __device__ WarpResult<S::D, Q, true> &warp_result(int warp) { return *(WarpResult<S::D, Q, true> *)at_address(S::warp_at(warp)); }
// Exact tokens of the part, then all together.  query(q): the lane's pairs.  Lane q has m and l of the codes of a set's query q, or all lanes
// have one query's; plain[q][c]: their sum of means for channel D/32 lane + c; their sums of codewords lie in the warp's result.
template <class S, int Q, class Query>
__device__ void finish_warp(const DecodeArgs &a, const Part &p, Query query, const float (&m)[S::SETS], const float (&l)[S::SETS],
                            const float (&plain)[Q][S::D / 32]) {
    constexpr int D = S::D, C = D / 32, SET = Q / S::SETS;
    const KvView &kv = a.kv;
    const int n_queries = p.queries<Q>(a);
    const int64_t first = p.first_query(a);
    ExactTokens<D, SET> sets[S::SETS];
    const int groups = p.exact_groups();
#pragma unroll 1
    for (int i = p.first_exact(); i < groups; i += p.parts * p.team) {
        const ExactGroup e(a, p, i);
        const int own = p.pos - e.block * KV_BLOCK;
        const OwnRow own_rows = own_row<D>(a, p.n, p.slot, p.h, p.pos, i == groups - 1, (f16 *)at_address(S::warp_at(p.warp)));
        auto &tokens = sets[0];
        tokens.load_keys(kv.k_exact + e.rows, own_rows.k, e.t0, own);
        tokens.load_values(kv.v_exact + e.rows, own_rows.v, e.t0, own);
        tokens.load_base(kv.rope.base + (int64_t)e.block * D);
#pragma unroll
        for (int s = 0; s < S::SETS; s++) {
            if (s > 0) sets[s].see(tokens);
            Floats<C> x[SET];
            for (int q = 0; q < SET; q++) x[q] = query(SET * s + q);
            sets[s].turn_queries([&](int q, int i) { return x[q].x[i]; });
            sets[s].add_values(sets[s].scores(kv.rope.step + e.t0 * D, e.t0, own));
        }
    }
    auto &result = warp_result<S, Q>(p.warp);
#pragma unroll
    for (int s = 0; s < S::SETS; s++) {
        auto &tokens = sets[s];
        const float both = fmaxf(tokens.m, m[s]), exact_weight = merge_weight(tokens.m, both), coded_weight = merge_weight(m[s], both);
        const float l_both = tokens.total() * exact_weight + l[s] * coded_weight;
#pragma unroll
        for (int q = 0; q < SET; q++) {
            const float exact_of = __shfl_sync(~0u, exact_weight, q), coded_of = __shfl_sync(~0u, coded_weight, q);
            for (int c = 0; c < C; c++) tokens.o[q][c] = tokens.o[q][c] * exact_of + plain[SET * s + q][c] * coded_of;
        }
        result.put(tokens.o, both, l_both, SET * s);
        if (threadIdx.x % 32 < SET) result.m[1][SET * s + threadIdx.x % 32] = m[s];
    }
    p.sync();
    merge_warps<D, Q, true>(a, first, n_queries, p.part, p.parts, p.rank, p.team,
                            [&](int w) -> const auto & { return warp_result<S, Q>(p.warp - p.rank + w); });
    p.sync();
}

// ---- formats ------------------------------------------------------------------------------------------------
// Formats with codewords of `channels` channels.
template <class Format, class = void> constexpr bool is_nsn = false;
template <class Format> constexpr bool is_nsn<Format, decltype((void)Format::channels)> = Format::has_code && Format::has_plain;
// f(K{}, V{}) of the cache's formats.
template <int D, class Function> void with_nsn_at(const KvView &kv, Function f) {
    with_format_at<D>(kv.k_format, [&](auto k) {
        with_format_at<D>(kv.v_format, [&](auto v) {
            using K = decltype(k);
            using V = decltype(v);
            if constexpr (is_nsn<K> && is_nsn<V>) f(K(), V());
        });
    });
}
template <class Function> void with_nsn(const KvView &kv, Function f) { kv.d == 64 ? with_nsn_at<64>(kv, f) : with_nsn_at<128>(kv, f); }
template <class S> void launch_codes(void (*kernel)(DecodeArgs), const DecodeArgs &a) {
    static const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::BYTES);    // S: of one kernel
    CUDA_CHECK(allowed);
    const int64_t tasks = (int64_t)a.b.N * a.kv.Hkv * a.chunks.d * a.reach;
    launch(kernel, dim3((unsigned)std::min<int64_t>(tasks, sm_count)), 32 * S::WARPS, S::BYTES, a);
}
void decode_codes_one(const DecodeArgs &a);    // decode_codes_mha.cu: G = 1
}    // namespace cuda
