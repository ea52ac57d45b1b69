/* attention_prefill - attention of many rows at a time on tensor cores: the contract is attention.cu's.

     y_n = sum_t p_t v_t / sum_t p_t,    p_t = 2^(s_t - max s),    s_t = q_n . k_t log2(e) / sqrt(d),    t <= pos_n

   Work      Two kernels take turns over windows of the sequence.  unpack_kernel writes a window's keys (turned by RoPE) and
             values as f16 rows: codes are looked up, rotated back and given their mean once for all rows of the step.
             attention_prefill_kernel then is flash attention over f16: a thread block takes a query tile and one kv head, that is
             16 WARPS of the rows x G queries of a row tile; blocks of 64 tokens pass through shared memory, the next one on
             its way while a block is in work.  A warp owns 16 queries: scores, weights and sums never leave its registers.
   Versions  In coded prefill a block is read as codes by rows far behind it and exactly by its own: such a block is unpacked twice,
             except where codes are f16, too.
   Window    The scratch for unpacked rows has a fixed size, WINDOW_BYTES at most whatever the context, and nothing in it outlives
             the call.  Where the sequence is longer, the state of every query (max, sum of weights, the unfinished y) waits in
             memory for the next window.
   Numbers   q / sqrt(d), k, v and p are rounded to f16, each off by at most 2^-11 of itself; products are exact, sums f32.  The
             weights' sum adds the rounded weights, so their rounding does not shift y.
   Order     Blocks in order, wherever windows begin: a row's bits do not depend on the other rows of the step.
   Cost      2 d multiply-adds a query and token on tensor cores.  The context is unpacked once a step and layer: reads the cache,
             writes 4 d bytes a token and kv head, and every query tile reads them, from L2 mostly.
   Limits    d of 64 or 128, f16 and NSN formats, nothing switched off (ablate), more than FEW_ROWS rows, two of one slot: other steps
             are attention_any.cu's.  A channel of a turned key or an unpacked code beyond 65504 becomes infinite, as f16 does.
   Source    Dao, FlashAttention-2 (arXiv 2307.08691), section 3, for the online softmax.
   Tested by tests/test_cuda_prefill.cpp                                                                             */
#ifdef __CUDACC__
#include <algorithm>
#include "mma.cuh"
namespace cuda {

constexpr int64_t WINDOW_BYTES = 64 << 20;        // of unpacked rows, K and V, both versions
constexpr int WINDOW_BLOCKS = 128;                // where heads are few

static int64_t window_bytes(int Hkv, int d) { return std::min(WINDOW_BYTES, (int64_t)WINDOW_BLOCKS * Hkv * KV_BLOCK * d * 4 * (int64_t)sizeof(f16)); }
static int64_t state_bytes(int64_t N, int Hq) { return ceil_div(N * Hq * (int64_t)sizeof(float2), 256) * 256; }
int64_t attention_prefill_work_bytes(const StepShape &shape) {
    return shape.N <= FEW_ROWS ? 0 : state_bytes(shape.N, shape.Hq) + window_bytes(shape.Hq, shape.d);    // Hkv <= Hq
}

struct PrefillArgs {
    float *y;                      // (N, Hq, d)
    const float *q;                // (N, Hq, d)
    KvView kv;
    const f16 *k16, *v16;          // (N, Hkv, d)
    Batch b;
    const TilePlace *tiles;
    const SlotRows *slots;
    const int *last_pos;
    SealedFormat k_sealed, v_sealed;
    float2 *state;                 // (N, Hq)  max of s, sum of p, between windows
    f16 *k, *v;                    // (versions, n_slots, W, Hkv, KV_BLOCK, d)   0 exact, 1 coded
    int layer, Hq, G;
    int n_tiles, m_tiles;          // row tiles of the step, query tiles of one
    int versions, n_slots;
    int begin, W;                  // the window: blocks begin..begin+W-1 of every slot of the step

    // Element offset of block i, in the window, of the step's slot s.
    __device__ int64_t unpacked_at(bool coded, int s, int i, int h) const {
        return ((int64_t)((coded && versions == 2) * n_slots + s) * W + i - begin) * kv.Hkv * KV_BLOCK * kv.d + (int64_t)h * KV_BLOCK * kv.d;
    }
};

// ---- a window of the cache as rows of f16 -----------------------------------------------------------------
// A warp works on one row: lane L holds channels C L .. C L + C-1.
constexpr int UNPACK_WARPS = 8, UNPACK_THREADS = 32 * UNPACK_WARPS;

// One thread block a block of tokens, kv head, K or V, and version; what no row of the step asks for is left out.
template <int D> __global__ void __launch_bounds__(UNPACK_THREADS) unpack_kernel(PrefillArgs a) {
    constexpr int C = D / 32;
    const KvView &kv = a.kv;
    const int h = blockIdx.y, s = blockIdx.z / 2 / a.versions, i = a.begin + blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool key = blockIdx.z % 2, coded = blockIdx.z / 2 % a.versions;
    const SlotRows rows = a.slots[s];
    const int slot = a.b.slot[rows.row], p0 = a.b.pos[rows.row], last = a.last_pos[rows.row];
    const int first_end = kv.coded_end(p0, a.layer), last_end = kv.coded_end(kv.exact_prefill ? p0 : last, a.layer);    // of the first row, of the last
    if (i > last / KV_BLOCK) return;
    const bool far_behind = i >= kv.sink && i < first_end, sealed = coded || (far_behind && a.versions == 1);
    if (coded ? i < kv.sink || i >= last_end : far_behind && !sealed) return;

    f16 *to = (key ? a.k : a.v) + a.unpacked_at(coded, s, i, h);
    const bool lookup = sealed && (key ? kv.k_format : kv.v_format) != KvFormat::f16;
    uint8_t *block = !sealed ? nullptr : key ? kv.k_block(a.layer, slot, h, i) : kv.v_block(a.layer, slot, h, i);
    const f16 *ring = key ? kv.k_exact : kv.v_exact, *fresh = key ? a.k16 : a.v16;
    const SealedFormat &format = key ? a.k_sealed : a.v_sealed;
    const NsnFields f = format.fields(block);
    const int shift = __ffs(f.channels) - 1;

    __shared__ float mean[D];
    __shared__ int8_t codebook[KV_CODEBOOK_BYTES];
    if (lookup) {
        if (threadIdx.x < D) mean[threadIdx.x] = f.mean_at(threadIdx.x);
        const int8_t *from = key ? kv.k_codebook : kv.v_codebook;
        for (int n = threadIdx.x; n < 256 * f.channels; n += UNPACK_THREADS) codebook[n] = from[n];
        __syncthreads();
    }
    for (int t = warp; t < KV_BLOCK; t += UNPACK_WARPS) {
        const int pos = i * KV_BLOCK + t;
        float x[C], plain[C];
        if (lookup) {    // x + plain = R code + mean
            const float s1 = f.s1->at(t), scale = s1 * f.s2(t) * format.delta;
            for (int c = 0; c < C; c++) {
                const int channel = lane * C + c, code = f.code[t * (D >> shift) + (channel >> shift)];
                x[c] = scale * (codebook[(code << shift) + (channel & (f.channels - 1))] + 0.5f);
                if (f.sign && is_negative(f.sign + t * (D / 8), D, channel)) x[c] = -x[c];
                plain[c] = s1 * mean[channel];
            }
            hadamard_lanes(x);
        } else {
            const bool from_step = !sealed && pos >= p0;
            const f16 *row = from_step ? fresh + ((int64_t)(rows.row + pos - p0) * kv.Hkv + h) * D
                             : sealed  ? (const f16 *)block + t * D
                                       : ring + kv.exact_at(a.layer, slot, h, pos);
            for (int c = 0; c < C; c++) x[c] = 0.0f, plain[c] = pos <= last ? to_f32(row[lane * C + c]) : 0.0f;
        }
        if (key) turn_lanes(plain, kv.rope, pos);
        for (int c = 0; c < C; c += 2) *(unsigned *)(to + t * D + lane * C + c) = pack(x[c] + plain[c], x[c + 1] + plain[c + 1]);
    }
}

// ---- flash attention over the window ------------------------------------------------------------------------
__device__ inline void copy_16_bytes(unsigned to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copies_begin() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ inline void copies_wait() {    // for all but the LEFT newest
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

constexpr int WARPS = 4;    // 16 queries each; registers for three thread blocks a multiprocessor
// Tried: 32 queries a warp, a block in two parts: half the reads of shared memory, but fewer warps, and slower.

// Byte offset of chunk c (8 channels) of row t in a tile (KV_BLOCK, d): chunks of neighbouring rows are in different banks.
template <int D> __device__ inline unsigned chunk_at(int t, int c) { return t * D * 2 + (c ^ t % 8) * 16; }

template <int D> __global__ void __launch_bounds__(32 * WARPS, 3) attention_prefill_kernel(PrefillArgs a) {
    constexpr int TILE_BYTES = KV_BLOCK * D * 2, THREADS = 32 * WARPS;
    const KvView &kv = a.kv;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int m_tile = blockIdx.x % a.m_tiles, h = blockIdx.x / a.m_tiles % kv.Hkv;
    const TilePlace place = a.tiles[a.n_tiles - 1 - blockIdx.x / a.m_tiles / kv.Hkv];    // late rows read most: they begin first
    const RowTile tile = place.rows(kv, a.layer, a.b.pos, a.last_pos);
    if (tile.rows == 0) return;
    const int step_pos = a.b.pos[place.row], pos = a.b.pos[tile.row];
    const int coded_end = kv.coded_end(kv.exact_prefill ? step_pos : pos, a.layer);    // of all its rows, whose own blocks are two at most
    const int own_begin = pos / KV_BLOCK, last = (pos + tile.rows - 1) / KV_BLOCK, end = min(a.begin + a.W, last + 1);
    const int m0 = (m_tile * WARPS + warp) * 16, n_queries = tile.rows * a.G;    // query m is row m / G, head m % G
    if (m_tile * WARPS * 16 >= n_queries || a.begin >= end) return;
    int s_index = 0;
    while (s_index + 1 < a.n_slots && a.slots[s_index + 1].row <= tile.row) s_index++;

    extern __shared__ __align__(128) uint8_t shared[];    // K, V of a block, then of the next one
    const unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    auto fetch = [&](int i) {
        const int64_t from = a.unpacked_at(i >= kv.sink && i < coded_end, s_index, i, h);
        const unsigned to = base + i % 2 * 2 * TILE_BYTES;
#pragma unroll
        for (int n = threadIdx.x; n < KV_BLOCK * D / 8; n += THREADS) {
            const unsigned at = to + chunk_at<D>(n / (D / 8), n % (D / 8));
            copy_16_bytes(at, a.k + from + n * 8);
            copy_16_bytes(at + TILE_BYTES, a.v + from + n * 8);
        }
        copies_begin();
    };
    fetch(a.begin);

    int64_t query[2];    // of rows g and g + 8
    bool real[2];
    int visible[2];      // tokens
    for (int r = 0; r < 2; r++) {
        const int m = m0 + g + 8 * r;
        real[r] = m < n_queries;
        query[r] = (int64_t)(tile.row + m / a.G) * a.Hq + h * a.G + m % a.G;
        visible[r] = pos + m / a.G + 1;
    }
    unsigned q[D / 16][4];
    const float scale = 1.4426950408889634f / sqrtf((float)D);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 x = make_float2(0, 0);
            if (real[n % 2]) x = *(const float2 *)(a.q + query[n % 2] * D + k * 16 + n / 2 * 8 + 2 * j);
            q[k][n] = pack(x.x * scale, x.y * scale);
        }
    float o[D / 8][4] = {}, sum[4] = {}, max[2] = {-INFINITY, -INFINITY};
    if (a.begin > 0)
        for (int r = 0; r < 2; r++)
            if (real[r]) {
                const float2 state = a.state[query[r]];
                max[r] = state.x, sum[2 * r] = state.y;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    const float2 x = *(const float2 *)(a.y + query[r] * D + n * 8 + 2 * j);
                    o[n][2 * r] = x.x, o[n][2 * r + 1] = x.y;
                }
            }

    const int matrix = lane / 8, row = lane % 8;    // of which this lane gives load_matrices the address
    const unsigned ones = pack(1.0f, 1.0f);
    for (int i = a.begin; i < end; i++) {
        if (i + 1 < end) {
            fetch(i + 1);
            copies_wait<1>();
        } else copies_wait<0>();
        __syncthreads();
        const unsigned k_tile = base + i % 2 * 2 * TILE_BYTES, v_tile = k_tile + TILE_BYTES;
        if (m0 < n_queries) {
            // scores
            float s[KV_BLOCK / 8][4] = {};
#pragma unroll
            for (int k = 0; k < D / 16; k++)
#pragma unroll
                for (int n = 0; n < KV_BLOCK / 16; n++) {
                    unsigned b[4];
                    load_matrices(b, k_tile + chunk_at<D>(n * 16 + matrix / 2 * 8 + row, 2 * k + matrix % 2));
                    mma(s[2 * n], q[k], b[0], b[1]);
                    mma(s[2 * n + 1], q[k], b[2], b[3]);
                }
            if (i >= own_begin)
#pragma unroll
                for (int n = 0; n < KV_BLOCK / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (i * KV_BLOCK + n * 8 + 2 * j + e % 2 >= visible[e / 2]) s[n][e] = -INFINITY;
            // softmax
            float old[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top = max[r];
#pragma unroll
                for (int n = 0; n < KV_BLOCK / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
                top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
                old[r] = exp2_fast(max[r] - top);
                max[r] = top;
            }
            if (__any_sync(~0u, old[0] != 1.0f || old[1] != 1.0f)) {    // most blocks bring no new maximum
#pragma unroll
                for (int n = 0; n < D / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) o[n][e] *= old[e / 2];
#pragma unroll
                for (int e = 0; e < 4; e++) sum[e] *= old[e / 2];
            }
            // values
#pragma unroll
            for (int k = 0; k < KV_BLOCK / 16; k++) {
                unsigned p[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const float top = max[n % 2];
                    p[n] = pack(exp2_fast(s[2 * k + n / 2][n % 2 * 2] - top), exp2_fast(s[2 * k + n / 2][n % 2 * 2 + 1] - top));
                }
                mma(sum, p, ones, ones);
#pragma unroll
                for (int n = 0; n < D / 16; n++) {
                    unsigned b[4];
                    load_matrices_turned(b, v_tile + chunk_at<D>(k * 16 + matrix % 2 * 8 + row, 2 * n + matrix / 2));
                    mma(o[2 * n], p, b[0], b[1]);
                    mma(o[2 * n + 1], p, b[2], b[3]);
                }
            }
        }
        __syncthreads();    // the next fetch overwrites this block
    }
    const bool done = end == last + 1;
#pragma unroll
    for (int r = 0; r < 2; r++)
        if (real[r]) {
            const float factor = done ? 1.0f / sum[2 * r] : 1.0f;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *(float2 *)(a.y + query[r] * D + n * 8 + 2 * j) = make_float2(o[n][2 * r] * factor, o[n][2 * r + 1] * factor);
            if (!done && j == 0) a.state[query[r]] = make_float2(max[r], sum[2 * r]);
        }
}

// ---- launch -------------------------------------------------------------------------------------------------
template <int D> static void attend_window(PrefillArgs &a, int tile_rows) {
    constexpr int bytes = 4 * KV_BLOCK * D * 2;
    static const cudaError_t allowed = cudaFuncSetAttribute(attention_prefill_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    CUDA_CHECK(allowed);
    a.m_tiles = (int)ceil_div(tile_rows * a.G, 16 * WARPS);
    attention_prefill_kernel<D><<<a.n_tiles * a.kv.Hkv * a.m_tiles, 32 * WARPS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}

template <int D> static void attend(PrefillArgs &a, int n_blocks, int tile_rows) {
    for (a.begin = 0; a.begin < n_blocks; a.begin += a.W) {
        unpack_kernel<D><<<dim3(std::min(a.W, n_blocks - a.begin), a.kv.Hkv, 2 * a.versions * a.n_slots), UNPACK_THREADS, 0, stream>>>(a);
        CUDA_CHECK(cudaGetLastError());
        attend_window<D>(a, tile_rows);
    }
}

bool attention_prefill(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    const Step &step = step_of(b);
    const int n_slots = (int)step.slots.size(), d = kv.d;
    const int64_t block_bytes = (int64_t)kv.Hkv * KV_BLOCK * d * sizeof(f16), window = window_bytes(kv.Hkv, d);
    const int versions = kv.k_format == KvFormat::f16 && kv.v_format == KvFormat::f16 ? 1 : 2;
    const int W = (int)(window / (2 * versions * block_bytes * n_slots));
    if (b.N <= FEW_ROWS || step.single_rows() || (d != 64 && d != 128) || kv.ablate || W == 0) return false;
    if (kv_is_scalar(kv.k_format) || kv_is_scalar(kv.v_format)) return false;
    int n_blocks = 1;
    for (const SlotRows &s : step.slots) n_blocks = std::max(n_blocks, step.pos[s.row + s.rows - 1] / KV_BLOCK + 1);
    float2 *state = (float2 *)step.work;
    f16 *k = (f16 *)((uint8_t *)step.work + state_bytes(b.N, Hq)), *v = k + window / 2 / sizeof(f16);
    PrefillArgs a = {};
    a.y = y, a.q = q, a.kv = kv, a.k16 = k16, a.v16 = v16, a.b = b;
    a.tiles = step.on_tiles, a.slots = step.on_slots, a.last_pos = step.on_last_pos;
    a.k_sealed = sealed_format(kv.k_format, d), a.v_sealed = sealed_format(kv.v_format, d);
    a.state = state, a.k = k, a.v = v;
    a.layer = layer, a.Hq = Hq, a.G = Hq / kv.Hkv;
    a.n_tiles = (int)step.tiles.size(), a.versions = versions, a.n_slots = n_slots, a.W = std::min(W, n_blocks);
    const int tile_rows = std::min(KV_BLOCK, step.most_rows());
    d == 64 ? attend<64>(a, n_blocks, tile_rows) : attend<128>(a, n_blocks, tile_rows);
    return true;
}
}    // namespace cuda
#endif
