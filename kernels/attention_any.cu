/* attention_any - attention on the GPU for every head shape and every cache format: the contract is attention.cu's.

   Math      As there, with one difference: a block's plain keys are turned by their full position when they are brought in,
                 q . k_t = (R q) . code_t + q . RoPE_t(plain_t),      sum p_t v_t = R (sum p_t code_t) + sum p_t plain_t
             so queries stay as they are.
   Work      A thread block takes a query tile and one kv head: up to M of the rows x G queries of half a row tile (rows of one slot
             in one block of positions).  Block after block of the cache goes through shared memory as f32 (KV_BLOCK, d), at most
             four times: K plain, K code, V plain, V code; blocks in a scalar format have no plain half.  Warp w owns queries
             w M/8 .. : its lanes hold the scores of tokens lane and lane + 32, then channels of the sums, so softmax never leaves
             the warp.
   Order     Blocks of a segment are added to one triple (m, l, o) in order, segments are merged in order.  A segment is
             max(MIN_SEGMENT, n_blocks / MAX_SEGMENTS) blocks, where n_blocks is what the row sees: a function of the row's
             position alone.  With few rows every segment is a thread block of its own and a second kernel merges; with many one
             thread block does both.  The sums are the same, so a row's bits do not depend on the other rows of the step.
   Cost      f32 multiply-adds from shared memory: about a tenth of what tensor cores do, and K and V pass through shared memory
             twice.  For every shape to be right; shapes that matter have pages of their own.
   Limits    d a multiple of 8, at most 256.  Shared memory 85 KiB at most.
   Tested by tests/test_cuda.cpp, tests/test_cuda_baselines.cpp                                                        */
#ifdef __CUDACC__
#include <algorithm>
#include "cuda.cuh"
namespace cuda {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int MIN_SEGMENT = 4;       // blocks: 256 tokens
constexpr int MAX_SEGMENTS = 64;     // of a row; bounds the scratch at any context
constexpr int SPLIT_ROWS = 16;       // steps of up to so many rows give every segment a thread block
constexpr int PAD = 4;               // floats behind a row of shared memory, so that rows start in different banks

HD int segment_blocks(int n_blocks) {
    const int even = (n_blocks + MAX_SEGMENTS - 1) / MAX_SEGMENTS;
    return even > MIN_SEGMENT ? even : MIN_SEGMENT;
}

struct Args {
    float *y;
    const float *q;
    KvView kv;
    const f16 *k16, *v16;
    Batch b;
    const TilePlace *tiles;
    const int *last_pos;
    SealedFormat k_sealed, v_sealed;
    float *part_o;     // (N, Hq, MAX_SEGMENTS, 2, d)  plain half, code half
    float2 *part_ml;   // (N, Hq, MAX_SEGMENTS)        m, l
    int layer, Hq, G, M_tiles;
    int halves;        // of a row tile: 1 where it is one row
    bool split;
};
// Half 0 or 1 of a tile: its rows in the block of positions that it begins in, those in the next.
__device__ inline RowTile half_of(RowTile tile, int half, const int *pos) {
    const int first = min(tile.rows, KV_BLOCK - pos[tile.row] % KV_BLOCK);
    return half ? RowTile{tile.row + first, tile.rows - first} : RowTile{tile.row, first};
}

// ---- a block of the cache as f32 in shared memory -------------------------------------------------------
// tile (KV_BLOCK, stride) <- the code or the plain half of a sealed block: Format::load_code and load_plain for a head
// dimension known at run time.
// Tried: those two themselves, for every format and head dimension: the same numbers, minutes of nvcc.
__device__ inline void stage_nsn(float *tile, int stride, const NsnFields &b, float delta, const int8_t *codebook, int d) {
    for (int i = threadIdx.x; i < KV_BLOCK * d; i += THREADS) {
        const int t = i / d, c = i % d, C = b.channels;
        const float s = b.s1->at(t) * b.s2(t) * delta, w = s * (codebook[b.code[t * (d / C) + c / C] * C + c % C] + 0.5f);
        tile[t * stride + c] = b.sign && is_negative(b.sign + t * (d / 8), d, c) ? -w : w;
    }
}
__device__ inline void stage_scalars(float *tile, int stride, const ScalarFields &b, int d) {
    for (int i = threadIdx.x; i < KV_BLOCK * d; i += THREADS) tile[i / d * stride + i % d] = b.value(i / d, i % d);
    if (!b.basis) return;
    __syncthreads();
    const int w = basis_width(d), across = d / w;
    for (int i = threadIdx.x; i < KV_BLOCK * across; i += THREADS) {    // w channels a thread: U times the matrix, as ScalarFields::at
        float u[16], *x = tile + i / across * stride + i % across * w;
#pragma unroll
        for (int k = 0; k < 16; k++) u[k] = k < w ? x[k] : 0.0f;
        for (int c = 0; c < w; c++) {
            float sum = 0;
#pragma unroll
            for (int k = 0; k < 16; k++)
                if (k < w) sum = fmaf(u[k], to_f32(b.basis[k * w + c]), sum);
            x[c] = sum;
        }
    }
}
// beside: what KvView::beside has for the block.
__device__ inline void stage_code(float *tile, int stride, const SealedFormat &f, bool scalar, uint8_t *block, int8_t *beside, int d) {
    if (scalar) stage_scalars(tile, stride, f.scalar_fields(block, beside), d);
    else stage_nsn(tile, stride, f.fields(block), f.delta, beside, d);
}
__device__ inline void stage_plain(float *tile, int stride, const SealedFormat &f, uint8_t *block, int d) {
    const NsnFields b = f.fields(block);
    for (int i = threadIdx.x; i < KV_BLOCK * d; i += THREADS) tile[i / d * stride + i % d] = b.s1->at(i / d) * b.mean_at(i % d);
}

// n rows of f16, row t at row_at(t), the rest zero.
template <class RowAt> __device__ inline void stage_rows(float *tile, int stride, int n, RowAt row_at, int d) {
    const int chunks = d / 8;
    for (int i = threadIdx.x; i < KV_BLOCK * chunks; i += THREADS) {
        const int t = i / chunks, c = i % chunks * 8;
        float x[8] = {};
        if (t < n) {
            const uint4 raw = *(const uint4 *)(row_at(t) + c);
            f16 h[8];
            memcpy(h, &raw, 16);
            for (int j = 0; j < 8; j++) x[j] = to_f32(h[j]);
        }
        for (int j = 0; j < 8; j += 4) *(float4 *)(tile + t * stride + c + j) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
    }
}

// Rows of keys turned by their positions; the block starts at pos0.
__device__ inline void turn_rows(float *tile, int stride, RopeTable rope, int pos0, int d) {
    const int half = d / 2;
    for (int i = threadIdx.x; i < KV_BLOCK * half; i += THREADS) {
        const int t = i / half, j = i % half;
        float c, s, *x = tile + t * stride + j;
        rope_angle(c, s, rope, pos0 + t, j, d);
        const float lo = x[0], hi = x[half];
        x[0] = fmaf(lo, c, -(hi * s));
        x[half] = fmaf(lo, s, hi * c);
    }
}

// ---- the kernel -------------------------------------------------------------------------------------------
// The triples of a warp's R queries.  o[0] plain, o[1] code; entry (k, i) is channel k 128 + lane W + i of W = min(4, DMAX/32).
template <int R, int C> struct Triples {
    float m[R], l[R], o[2][R][C];
    __device__ void clear() {
        for (int r = 0; r < R; r++) {
            m[r] = -INFINITY, l[r] = 0.0f;
            for (int c = 0; c < C; c++) o[0][r][c] = o[1][r][c] = 0.0f;
        }
    }
};
// Weights of two triples that merge, into the first's m and l.  Written with fmaf, like everything that two kernels must
// compute alike.
__device__ inline void merge_weights(float &a, float &b, float &m, float &l, float m2, float l2) {
    const float top = fmaxf(m, m2);
    a = m == -INFINITY ? 0.0f : expf(m - top), b = m2 == -INFINITY ? 0.0f : expf(m2 - top);
    m = top;
    l = fmaf(l2, b, l * a);
}

template <int DMAX, int M>
__global__ void __launch_bounds__(THREADS) attention_any_kernel(Args a) {
    constexpr int R = M / WARPS, STRIDE = DMAX + PAD, C = DMAX / 32, W = C < 4 ? C : 4;
    const KvView &kv = a.kv;
    const int d = kv.d, G = a.G, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const RowTile whole = a.tiles[blockIdx.x / a.halves].rows(kv, a.layer, a.b.pos, a.last_pos);
    if (whole.rows == 0) return;
    const RowTile tile = half_of(whole, blockIdx.x % a.halves, a.b.pos);
    const int h = blockIdx.y / a.M_tiles, m0 = blockIdx.y % a.M_tiles * M, n_queries = min(M, tile.rows * G - m0);
    if (n_queries <= 0) return;
    const int slot = a.b.slot[tile.row], row0 = a.b.first[tile.row], step_pos = a.b.pos[row0], pos = a.b.pos[tile.row];
    const int coded_end = kv.coded_end(kv.exact_prefill ? step_pos : pos, a.layer);
    const int n_blocks = pos / KV_BLOCK + 1, segment = segment_blocks(n_blocks);
    const int begin = a.split ? blockIdx.z * segment : 0, end = a.split ? min(begin + segment, n_blocks) : n_blocks;
    if (begin >= end) return;
    // scalar formats have no plain half, and not all of them rotate
    const bool k_scalar = kv_is_scalar(kv.k_format), v_scalar = kv_is_scalar(kv.v_format), has_hadamard = !(kv.ablate & NO_HADAMARD);
    const bool k_rotated = has_hadamard && (!k_scalar || a.k_sealed.scalar_at_origin.rotated);
    const bool v_rotated = has_hadamard && (!v_scalar || a.v_sealed.scalar_at_origin.rotated);

    extern __shared__ float shared[];
    float *x = shared;                          // (KV_BLOCK, STRIDE) the block's half in work
    float *q = x + KV_BLOCK * STRIDE;           // (M, STRIDE)        queries / sqrt(d)
    float *Rq = q + M * STRIDE;                 // (M, STRIDE)        R times them
    float *p = Rq + M * STRIDE;                 // (M, KV_BLOCK)      weights, then anything of a warp's own
    for (int i = threadIdx.x; i < KV_BLOCK * STRIDE; i += THREADS) x[i] = 0.0f;    // channels beyond d stay zero
    for (int i = threadIdx.x; i < M * STRIDE; i += THREADS) {
        const int m = i / STRIDE, c = i % STRIDE, row = tile.row + (m0 + m) / G, g = (m0 + m) % G;
        q[i] = Rq[i] = m < n_queries && c < d ? a.q[((int64_t)row * a.Hq + h * G + g) * d + c] / sqrtf((float)d) : 0.0f;
    }
    __syncthreads();
    int seen[R];                                // tokens that the query's row sees
    for (int r = 0; r < R; r++) {
        const int m = warp * R + r;
        hadamard_warp(Rq + m * STRIDE, d);
        seen[r] = a.b.pos[tile.row + (m < n_queries ? (m0 + m) / G : 0)] + 1;
    }

    Triples<R, C> total, part;
    total.clear(), part.clear();
    float s[R][2];
    // s += q . x over all channels
    auto add_scores = [&](const float *queries) {
        for (int c = 0; c < DMAX; c += 4) {
            const float4 x0 = *(const float4 *)(x + lane * STRIDE + c), x1 = *(const float4 *)(x + (lane + 32) * STRIDE + c);
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float4 y = *(const float4 *)(queries + (warp * R + r) * STRIDE + c);
                s[r][0] = fmaf(y.w, x0.w, fmaf(y.z, x0.z, fmaf(y.y, x0.y, fmaf(y.x, x0.x, s[r][0]))));
                s[r][1] = fmaf(y.w, x1.w, fmaf(y.z, x1.z, fmaf(y.y, x1.y, fmaf(y.x, x1.x, s[r][1]))));
            }
        }
    };
    // o += p x over all tokens
    auto add_values = [&](float (&o)[R][C]) {
        for (int t = 0; t < KV_BLOCK; t += 4) {
            float4 weight[R];
#pragma unroll
            for (int r = 0; r < R; r++) weight[r] = *(const float4 *)(p + (warp * R + r) * KV_BLOCK + t);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float v[C];
#pragma unroll
                for (int c = 0; c < C; c++) v[c] = x[(t + j) * STRIDE + c / W * 32 * W + lane * W + c % W];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float w = j == 0 ? weight[r].x : j == 1 ? weight[r].y : j == 2 ? weight[r].z : weight[r].w;
#pragma unroll
                    for (int c = 0; c < C; c++) o[r][c] = fmaf(w, v[c], o[r][c]);
                }
            }
        }
    };
    // The fp16 rows of block i that the tile's last row sees.
    auto stage_f16 = [&](int i, bool sealed, const uint8_t *block, const f16 *ring, const f16 *fresh) {
        stage_rows(x, STRIDE, min(KV_BLOCK, pos + tile.rows - i * KV_BLOCK), [&](int t) {
            const int at = i * KV_BLOCK + t;
            return sealed          ? (const f16 *)block + t * d
                   : at < step_pos ? ring + kv.exact_at(a.layer, slot, h, at)
                                   : fresh + ((int64_t)(row0 + at - step_pos) * kv.Hkv + h) * d;
        }, d);
    };

    for (int i = begin; i < end; i++) {
        const bool sealed = i >= kv.sink && i < coded_end;
        const bool k_coded = sealed && kv.k_format != KvFormat::f16, v_coded = sealed && kv.v_format != KvFormat::f16;
        uint8_t *k_block = sealed ? kv.k_block(a.layer, slot, h, i) : nullptr, *v_block = sealed ? kv.v_block(a.layer, slot, h, i) : nullptr;
        // scores
        for (int r = 0; r < R; r++) s[r][0] = s[r][1] = 0.0f;
        __syncthreads();
        if (!(k_coded && k_scalar)) {
            if (k_coded) stage_plain(x, STRIDE, a.k_sealed, k_block, d);
            else stage_f16(i, sealed, k_block, kv.k_exact, a.k16);
            __syncthreads();
            if (!(k_coded && kv.ablate & NO_PRE_ROPE)) turn_rows(x, STRIDE, kv.rope, i * KV_BLOCK, d);
            __syncthreads();
            add_scores(q);
        }
        if (k_coded) {
            __syncthreads();
            stage_code(x, STRIDE, a.k_sealed, k_scalar, k_block, kv.beside(true, a.layer, slot, h, i), d);
            __syncthreads();
            add_scores(k_rotated ? Rq : q);
        }
        // softmax: the block into the triples' m and l; scores become weights
#pragma unroll
        for (int r = 0; r < R; r++) {
            const int left = seen[r] - i * KV_BLOCK;
            if (lane >= left) s[r][0] = -INFINITY;
            if (lane + 32 >= left) s[r][1] = -INFINITY;
            const float top = fmaxf(part.m[r], warp_max(fmaxf(s[r][0], s[r][1])));
            const float p0 = expf(s[r][0] - top), p1 = expf(s[r][1] - top), old = expf(part.m[r] - top);
            part.m[r] = top;
            part.l[r] = fmaf(part.l[r], old, warp_sum(p0 + p1));
            p[(warp * R + r) * KV_BLOCK + lane] = p0;
            p[(warp * R + r) * KV_BLOCK + lane + 32] = p1;
            for (int c = 0; c < C; c++) part.o[0][r][c] *= old, part.o[1][r][c] *= old;
        }
        // values
        __syncthreads();
        if (!(v_coded && v_scalar)) {
            if (v_coded) stage_plain(x, STRIDE, a.v_sealed, v_block, d);
            else stage_f16(i, sealed, v_block, kv.v_exact, a.v16);
            __syncthreads();
            add_values(part.o[0]);
        }
        if (v_coded) {
            __syncthreads();
            stage_code(x, STRIDE, a.v_sealed, v_scalar, v_block, kv.beside(false, a.layer, slot, h, i), d);
            __syncthreads();
            if (v_rotated) add_values(part.o[1]);
            else add_values(part.o[0]);
        }
        // the segment ends
        if (!a.split && ((i + 1) % segment == 0 || i + 1 == end)) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                float wa, wb;
                merge_weights(wa, wb, total.m[r], total.l[r], part.m[r], part.l[r]);
                for (int c = 0; c < C; c++) {
                    total.o[0][r][c] = fmaf(part.o[0][r][c], wb, total.o[0][r][c] * wa);
                    total.o[1][r][c] = fmaf(part.o[1][r][c], wb, total.o[1][r][c] * wa);
                }
            }
            part.clear();
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; r++) {
        const int m = warp * R + r;
        if (m >= n_queries) break;
        const int64_t query = (int64_t)(tile.row + (m0 + m) / G) * a.Hq + h * G + (m0 + m) % G;
        if (a.split) {
            const int64_t at = query * MAX_SEGMENTS + blockIdx.z;
            if (lane == 0) a.part_ml[at] = make_float2(part.m[r], part.l[r]);
            for (int half = 0; half < 2; half++)
                for (int c = 0; c < C; c++) {
                    const int channel = c / W * 32 * W + lane * W + c % W;
                    if (channel < d) a.part_o[(at * 2 + half) * d + channel] = part.o[half][r][c];
                }
        } else {
            float *code = Rq + m * STRIDE;    // the query is done with
            for (int c = 0; c < C; c++) code[c / W * 32 * W + lane * W + c % W] = total.o[1][r][c];
            hadamard_warp(code, d);
            for (int c = 0; c < C; c++) {
                const int channel = c / W * 32 * W + lane * W + c % W;
                if (channel < d) a.y[query * d + channel] = (code[channel] + total.o[0][r][c]) / total.l[r];
            }
        }
    }
}

// One warp a query merges its segments, in order.
__global__ void __launch_bounds__(32) attention_merge_kernel(float *y, const float *part_o, const float2 *part_ml, const int *pos, int Hq, int d) {
    constexpr int C = MAX_HEAD_DIM / 32;
    const int64_t query = (int64_t)blockIdx.y * Hq + blockIdx.x;
    const int n_blocks = pos[blockIdx.y] / KV_BLOCK + 1, segment = segment_blocks(n_blocks), S = (n_blocks + segment - 1) / segment, lane = threadIdx.x;
    float m = -INFINITY, l = 0.0f, o[2][C] = {};
    for (int i = 0; i < S; i++) {
        const int64_t at = query * MAX_SEGMENTS + i;
        const float2 ml = part_ml[at];
        float wa, wb;
        merge_weights(wa, wb, m, l, ml.x, ml.y);
#pragma unroll
        for (int c = 0; c < C; c++)
            if (c * 32 + lane < d)
                for (int half = 0; half < 2; half++) o[half][c] = fmaf(part_o[(at * 2 + half) * d + c * 32 + lane], wb, o[half][c] * wa);
    }
    __shared__ float code[MAX_HEAD_DIM];
    for (int c = 0; c < C; c++) code[c * 32 + lane] = o[1][c];
    hadamard_warp(code, d);
    for (int c = 0; c < C; c++)
        if (c * 32 + lane < d) y[query * d + c * 32 + lane] = (code[c * 32 + lane] + o[0][c]) / l;
}

// ---- launch -----------------------------------------------------------------------------------------------
int64_t attention_work_bytes(const StepShape &shape) {
    const int64_t segments = (int64_t)std::min(shape.N, SPLIT_ROWS) * shape.Hq * MAX_SEGMENTS;
    return std::max<int64_t>(segments * (2 * shape.d * sizeof(float) + sizeof(float2)), attention_prefill_work_bytes(shape));
}

template <int DMAX, int M> static void launch(Args &a, int n_tiles, int tile_rows, int n_segments) {
    constexpr int bytes = (KV_BLOCK * (DMAX + PAD) + 2 * M * (DMAX + PAD) + M * KV_BLOCK) * (int)sizeof(float);
    static const cudaError_t allowed = cudaFuncSetAttribute(attention_any_kernel<DMAX, M>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    CUDA_CHECK(allowed);
    a.M_tiles = (int)ceil_div(tile_rows * a.G, M);
    attention_any_kernel<DMAX, M><<<dim3(n_tiles * a.halves, a.kv.Hkv * a.M_tiles, n_segments), THREADS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}

void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    if (attention_decode(y, q, kv, layer, k16, v16, b, Hq)) return;
    if (attention_prefill(y, q, kv, layer, k16, v16, b, Hq)) return;
    const Step &step = step_of(b);
    const int d = kv.d, n_tiles = (int)step.tiles.size();
    Args a = {y, q, kv, k16, v16, b, step.on_tiles, step.on_last_pos, sealed_format(kv.k_format, d), sealed_format(kv.v_format, d),
              (float *)step.work, nullptr, layer, Hq, Hq / kv.Hkv, 0, 1, b.N <= SPLIT_ROWS};
    // The grid is that of the longest context, whatever the positions: graphs repeat this launch.
    // Thread blocks beyond a row's last segment return at once.
    const int n_segments = a.split ? std::min(MAX_SEGMENTS, (int)ceil_div(kv.max_blocks, MIN_SEGMENT)) : 1;
    const int tile_rows = std::min(KV_BLOCK, step.most_rows());
    if (tile_rows > 1) a.halves = 2;
    if (a.split) a.part_ml = (float2 *)(a.part_o + (int64_t)b.N * Hq * MAX_SEGMENTS * 2 * d);
    const bool few = tile_rows * a.G <= 8;
    if (d > 128) launch<256, 8>(a, n_tiles, tile_rows, n_segments);
    else if (d > 64) few ? launch<128, 8>(a, n_tiles, tile_rows, n_segments) : launch<128, 32>(a, n_tiles, tile_rows, n_segments);
    else few ? launch<64, 8>(a, n_tiles, tile_rows, n_segments) : launch<64, 32>(a, n_tiles, tile_rows, n_segments);
    if (!a.split) return;
    attention_merge_kernel<<<dim3(Hq, b.N), 32, 0, stream>>>(y, a.part_o, a.part_ml, b.pos, Hq, d);
    CUDA_CHECK(cudaGetLastError());
}
}    // namespace cuda
#endif
