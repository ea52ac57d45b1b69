/* attention - every row against the cached tokens of its sequence.

   y[n,h,:] = sum_t p[t] v_t,    p = softmax_t( q[n,h,:] . k_t / sqrt(d) ),    t = 0..pos[n]

   y, q      (N,Hq,d) f32, q after RoPE at its own position;  k16, v16 (N,Hkv,d) f16, this step's rows (kv_block.h)

   Math      k_t = R code_t + RoPE_t(plain_t), v_t = R code_t + plain_t.  Rows are never rebuilt: R is symmetric and both
             rotations move to the other side,
                 q . k_t      = (R q) . code_t + (RoPE_-t q) . plain_t
                 sum p_t v_t  = R (sum p_t code_t) + sum p_t plain_t
             so R touches q once and the result once.  RoPE_-t is split: q is turned back to the block's first token once per
             block, and plain_t forward by t mod 64, whose cosines are one small table for all blocks.
             Softmax over a set of tokens is a triple (m, l, o): largest score, sum e^(s-m), sum e^(s-m) v.  Triples of
             disjoint sets merge: m = max(ma, mb), l = la e^(ma-m) + lb e^(mb-m), o likewise.
   Order     The blocks of SEGMENT x 64 tokens are added to one triple in order, then segments in order.  That order is the
             same for one row and for many, and for any number of threads.
   Work      A task is up to ROW_TILE rows of one block of positions (so they agree on what is coded) and one kv head.  A
             cached block is widened to a tile of f32 once for all their G queries (attention_tile.h); NSN codes are not widened
             but multiplied as integers (attention_codes.h).  When there are fewer tasks than threads can use, the segments
             of a task run in parallel.
   Cost      4 d flops a token and query head, plus 6 d a token and kv head for turning and widening.
   Limits    d a multiple of 8, at most 256; Hq a multiple of Hkv.
   Tested by tests/test_attention.cpp                                                                               */
#include <algorithm>
#include <cmath>
#include <vector>
#include "hadamard.h"
#include "kv_block.h"

#ifndef __CUDACC__
#include <omp.h>
#include "attention_codes.h"
#include "attention_tile.h"
#include "dot.h"

// ---- reference ----------------------------------------------------------------------------------------
// Rebuild every row in f64, then attention as in the formula.
namespace reference {

// Row t of one head as the formula says; key: with RoPE.
static void rebuild(double *x, KvFormat format, const uint8_t *block, const int8_t *beside, const KvView &kv, int d, int t, bool key) {
    double plain[MAX_HEAD_DIM];
    const bool coded = format != KvFormat::f16;
    bool rotated = false;
    for (int c = 0; c < d; c++)    // one channel a dispatch: the compiler makes this for every format and head dimension
        with_format(format, d, [&](auto f) {
            using Format = decltype(f);
            const auto &b = *(const typename Format::Block *)block;
            float a[1];
            Format::load_code(a, b, beside, t % KV_BLOCK, c), x[c] = a[0];
            Format::load_plain(a, b, t % KV_BLOCK, c), plain[c] = a[0];
            rotated = Format::rotated;
        });
    if (rotated && !(kv.ablate & NO_HADAMARD)) {
        const int p = d & -d;    // R by its definition: entry (r, c) of H is -1 to the number of common bits
        double y[MAX_HEAD_DIM] = {};
        for (int r = 0; r < d; r++)
            for (int c = r / p * p; c < r / p * p + p; c++) y[r] += (__builtin_popcount(r & c & (p - 1)) % 2 ? -x[c] : x[c]) / std::sqrt(p);
        std::copy(y, y + d, x);
    }
    for (int j = 0; j < d / 2; j++) {
        float c = 1, s = 0;
        if (key && !(coded && kv.ablate & NO_PRE_ROPE)) rope_angle(c, s, kv.rope, t, j, d);
        x[j] += plain[j] * c - plain[j + d / 2] * s;
        x[j + d / 2] += plain[j] * s + plain[j + d / 2] * c;
    }
}

void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    const int d = kv.d, G = Hq / kv.Hkv;
#pragma omp parallel for schedule(dynamic)    // tests wait for it
    for (int n = 0; n < b.N; n++)
        for (int hq = 0; hq < Hq; hq++) {
            std::vector<double> p, x(d), out(d);
            const int h = hq / G, slot = b.slot[n], pos0 = b.pos[b.first[n]];
            const int end = kv.coded_end(kv.exact_prefill ? pos0 : b.pos[n], layer);
            const float *qn = q + ((int64_t)n * Hq + hq) * d;
            auto row = [&](int t, bool key) {
                const int i = t / KV_BLOCK;
                if (i >= kv.sink && i < end)
                    return rebuild(x.data(), key ? kv.k_format : kv.v_format, key ? kv.k_block(layer, slot, h, i) : kv.v_block(layer, slot, h, i),
                                   kv.beside(key, layer, slot, h, i), kv, d, t, key);
                const f16 *from = t >= pos0 ? (key ? k16 : v16) + ((int64_t)(b.first[n] + t - pos0) * kv.Hkv + h) * d
                                            : (key ? kv.k_exact : kv.v_exact) + kv.exact_at(layer, slot, h, t);
                f16 one[KV_BLOCK * MAX_HEAD_DIM];    // an f16 block that holds this row alone
                memcpy(one + t % KV_BLOCK * d, from, d * sizeof(f16));
                rebuild(x.data(), KvFormat::f16, (const uint8_t *)one, nullptr, kv, d, t, key);
            };
            p.assign(b.pos[n] + 1, 0.0);
            for (int t = 0; t <= b.pos[n]; t++) {
                row(t, true);
                for (int c = 0; c < d; c++) p[t] += qn[c] * x[c] / std::sqrt(d);
            }
            const double max = *std::max_element(p.begin(), p.end());
            double sum = 0;
            for (double &e : p) sum += e = std::exp(e - max);
            std::fill(out.begin(), out.end(), 0.0);
            for (int t = 0; t <= b.pos[n]; t++) {
                row(t, false);
                for (int c = 0; c < d; c++) out[c] += p[t] / sum * x[c];
            }
            for (int c = 0; c < d; c++) y[((int64_t)n * Hq + hq) * d + c] = (float)out[c];
        }
}
}    // namespace reference

// ---- the CPU backend ----------------------------------------------------------------------------------
namespace cpu {

constexpr int ROW_TILE = 16;    // rows of a task: G = 4 gives 64 queries for every block that is widened
constexpr int64_t SMALL = 1 << 16;    // multiply-adds below which waking the other threads costs more than it saves
constexpr int SEGMENT = 16;     // blocks, 1,024 tokens: long enough that the merge does not show

// The triples of M queries: m, l (M), o (M, 2, stride) for the code and the plain half.
struct Triples {
    std::vector<float> m, l, o;
    void clear(int M, int stride) {
        m.assign(M, -INFINITY);
        l.assign(M, 0.0f);
        o.assign((size_t)M * 2 * stride, 0.0f);
    }
    void merge(int i, float m2, float l2, const float *o2, int n) {
        const float top = std::max(m[i], m2);
        if (top == -INFINITY) return;    // both empty
        const float a = expf(m[i] - top), b = expf(m2 - top);
        m[i] = top;
        l[i] = l[i] * a + l2 * b;
        float *oi = &o[(size_t)i * n];
        for (int c = 0; c < n; c++) oi[c] = oi[c] * a + o2[c] * b;
    }
};

// What one thread needs beside the result; grows to the largest shape once.
struct Scratch {
    Tile k, v;
    std::vector<float> q, Rq, q_block, score, score2;    // queries (M, stride) three ways; scores (M, KV_BLOCK)
    int64_t loaded = -1;    // which task's queries these are
    CodeScratch codes;
    Triples total, part;
};

struct Task {
    SlotStep step;
    int row, rows, h;     // rows row..row+rows-1 of the step, kv head h
    int coded_end;        // for all of them
    int n_blocks;         // that the last row sees
};

// y[m,:] += sum_t p[m,t] x[t,:]; x (n, stride), rows of p and y p_stride and y_stride apart.
static void add_weighted(float *y, const float *p, const float *x, int M, int n, int stride, int y_stride, int p_stride = KV_BLOCK) {
    constexpr int R = DOT_ROWS, C = 16 / (DOT_ROWS * PARTS) ? 16 / (DOT_ROWS * PARTS) : 1;    // as many sums as registers hold
    for (int c = 0; c < stride; c += C * LANES) {
        const int chunks = std::min(C, (stride - c) / LANES);
        for (int m = 0; m < M; m += R) {
            const int rows = std::min(R, M - m);
            f32x16 sum[R][C];
            auto go = [&](auto whole) {
                for (int r = 0; r < (whole ? R : rows); r++)
                    for (int i = 0; i < (whole ? C : chunks); i++) sum[r][i] = load16(y + (int64_t)(m + r) * y_stride + c + i * LANES);
                for (int t = 0; t < n; t++)
                    for (int i = 0; i < (whole ? C : chunks); i++) {
                        const f32x16 xt = load16(x + (int64_t)t * stride + c + i * LANES);
                        for (int r = 0; r < (whole ? R : rows); r++) add_product(sum[r][i], xt, splat16(p[(m + r) * p_stride + t]));
                    }
                for (int r = 0; r < (whole ? R : rows); r++)
                    for (int i = 0; i < (whole ? C : chunks); i++) store16(y + (int64_t)(m + r) * y_stride + c + i * LANES, sum[r][i]);
            };
            if (rows == R && chunks == C) go(std::true_type()); else go(std::false_type());
        }
    }
}

static void prefetch(const void *p, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch((const char *)p + at);
}

// The integer kernels' channels a byte for one side of the cache, 0 where tiles are widened instead.
static int fast_channels(const KvView &kv, bool key) { return kv.ablate ? 0 : code_channels(key ? kv.k_format : kv.v_format, kv.d); }

// The blocks [begin, end) into the triples of the task's queries, in order.
static void attend(Triples &to, Scratch &s, const Task &task, int begin, int end, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b,
                   int G) {
    const int d = kv.d, stride = (int)ceil_div(d, LANES) * LANES, M = task.rows * G;
    const SlotStep &step = task.step;
    for (int i = begin; i < end; i++) {
        const int last = b.pos[task.row + task.rows - 1] - i * KV_BLOCK;
        const int n = std::min(KV_BLOCK, last + 1);    // tokens that the last row sees
        const bool sealed = i >= kv.sink && i < task.coded_end;
        const int k_fast = sealed ? fast_channels(kv, true) : 0, v_fast = sealed ? fast_channels(kv, false) : 0;
        if (sealed) {
            if (!k_fast)
                load_sealed(s.k, kv.k_format, kv.k_block(layer, step.slot, task.h, i), kv.beside(true, layer, step.slot, task.h, i), kv.ablate, d, stride);
            if (!v_fast)
                load_sealed(s.v, kv.v_format, kv.v_block(layer, step.slot, task.h, i), kv.beside(false, layer, step.slot, task.h, i), kv.ablate, d, stride);
        } else {
            load_exact(s.k, kv, layer, step, task.h, i, n, stride, kv.k_exact, k16);
            load_exact(s.v, kv, layer, step, task.h, i, n, stride, kv.v_exact, v16);
        }
        if (sealed && i + 1 < task.coded_end) {    // the next one's bytes: blocks of a sequence lie apart, so nothing else asks for them
            prefetch(kv.rope.base + (int64_t)(i + 1) * d, d * sizeof(float));
            if (k_fast) prefetch(kv.k_block(layer, step.slot, task.h, i + 1), kv.k_block_bytes);
            if (v_fast) prefetch(kv.v_block(layer, step.slot, task.h, i + 1), kv.v_block_bytes);
        }
        // scores
        if (k_fast) code_scores(s.score.data(), s.codes, s.q.data(), M, stride, kv.k_format, d, kv.k_block(layer, step.slot, task.h, i), kv.rope, i);
        else if (s.k.has_plain && !s.k.turned)
            dot_rows(s.score.data(), s.q.data(), s.k.plain.data(), M, n, stride, KV_BLOCK, stride, stride);
        else if (s.k.has_plain) {
            turn_keys(s.k.plain.data(), kv.rope, n, d, stride);
            turn_back(s.q_block.data(), s.q.data(), kv.rope, i, M, d, stride);
            dot_rows(s.score.data(), s.q_block.data(), s.k.plain.data(), M, n, stride, KV_BLOCK, stride, stride);
        }
        if (!k_fast && s.k.has_code) {
            float *score = s.k.has_plain ? s.score2.data() : s.score.data();
            dot_rows(score, s.k.rotated ? s.Rq.data() : s.q.data(), s.k.code.data(), M, n, stride, KV_BLOCK, stride, stride);
            if (s.k.has_plain)
                for (int m = 0; m < M * KV_BLOCK; m++) s.score[m] += s.score2[m];
        }
        // softmax: scores become weights, triples are rescaled
        for (int m = 0; m < M; m++) {
            float *p = &s.score[m * KV_BLOCK];
            const int seen = std::min(KV_BLOCK, b.pos[task.row + m / G] - i * KV_BLOCK + 1);
            for (int t = std::max(seen, 0); t < KV_BLOCK; t++) p[t] = -INFINITY;
            if (seen <= 0) {    // a row at an earlier position than this block
                std::fill(p, p + KV_BLOCK, 0.0f);
                continue;
            }
            f32x16 largest = splat16(to.m[m]), sum = splat16(0.0f);
            for (int t = 0; t < KV_BLOCK; t += LANES) largest = max16(largest, load16(p + t));
            const float top = largest16(largest), a = top == to.m[m] && top > -INFINITY ? 1.0f : expf(to.m[m] - top);
            for (int t = 0; t < KV_BLOCK; t += LANES) {
                const f32x16 e = exp16(load16(p + t) + splat16(-top));
                store16(p + t, e);
                sum = sum + e;
            }
            to.m[m] = top;
            to.l[m] = to.l[m] * a + sum16(sum);
            if (a != 1.0f)
                for (int c = 0; c < 2 * stride; c++) to.o[(size_t)m * 2 * stride + c] *= a;
        }
        // values
        if (v_fast) {
            code_sums(to.o.data(), s.codes, s.score.data(), M, stride, kv.v_format, d, kv.v_block(layer, step.slot, task.h, i));
            continue;
        }
        if (s.v.has_code && s.v.rotated) add_weighted(to.o.data(), s.score.data(), s.v.code.data(), M, n, stride, 2 * stride);
        if (s.v.has_code && !s.v.rotated) add_weighted(to.o.data() + stride, s.score.data(), s.v.code.data(), M, n, stride, 2 * stride);
        if (s.v.has_plain) add_weighted(to.o.data() + stride, s.score.data(), s.v.plain.data(), M, n, stride, 2 * stride);
    }
}

// Queries of the task, scaled by 1/sqrt(d), and R times them.
static void load_queries(Scratch &s, const Task &task, int64_t id, const float *q, const KvView &kv, int Hq, int G, int d) {
    const int stride = (int)ceil_div(d, LANES) * LANES, M = task.rows * G;
    if (s.loaded == id) return;    // another segment of the same task
    s.loaded = id;
    for (auto *x : {&s.q, &s.Rq, &s.q_block}) x->assign((size_t)M * stride, 0.0f);
    for (auto *x : {&s.score, &s.score2}) x->resize((size_t)M * KV_BLOCK);
    for (auto *x : {&s.k.code, &s.k.plain, &s.v.code, &s.v.plain}) {
        if (stride > d) x->assign((size_t)KV_BLOCK * stride, 0.0f);    // what is behind a row has to be zero
        x->resize((size_t)KV_BLOCK * stride);
    }
    for (int m = 0; m < M; m++) {
        const float *from = q + ((int64_t)(task.row + m / G) * Hq + task.h * G + m % G) * d;
        for (int c = 0; c < d; c++) s.q[m * stride + c] = s.Rq[m * stride + c] = from[c] / sqrtf((float)d);
        hadamard(&s.Rq[m * stride], d);
    }
    const int k_fast = fast_channels(kv, true);
    if (k_fast || fast_channels(kv, false)) code_queries(s.codes, s.Rq.data(), M, d, std::max(1, k_fast), stride);
}

static void store_result(float *y, Triples &total, const Task &task, const KvView &kv, int Hq, int G, int d) {
    const int stride = (int)ceil_div(d, LANES) * LANES;
    for (int m = 0; m < task.rows * G; m++) {
        float *code = &total.o[(size_t)m * 2 * stride], *plain = code + stride;
        if (const int C = fast_channels(kv, false)) codes_in_order(code, d, C);
        hadamard(code, d);
        float *to = y + ((int64_t)(task.row + m / G) * Hq + task.h * G + m % G) * d;
        for (int c = 0; c < d; c++) to[c] = (code[c] + plain[c]) / total.l[m];
    }
}

void attention(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq) {
    const int d = kv.d, G = Hq / kv.Hkv, stride = (int)ceil_div(d, LANES) * LANES;
    static std::vector<Task> tasks;        // kept between calls: nothing is allocated per token
    static std::vector<Triples> parts;
    tasks.clear();
    int64_t segments = 0;
    for (int n = 0, rows; n < b.N; n += rows) {
        const SlotStep step = {b.slot[n], b.first[n], b.pos[b.first[n]]};
        rows = 1;
        while (rows < ROW_TILE && n + rows < b.N && b.first[n + rows] == step.row0 && kv.stretch(b.pos[n + rows], layer) == kv.stretch(b.pos[n], layer)) rows++;
        const int end = kv.coded_end(kv.exact_prefill ? step.pos0 : b.pos[n], layer), n_blocks = b.pos[n + rows - 1] / KV_BLOCK + 1;
        for (int h = 0; h < kv.Hkv; h++) tasks.push_back({step, n, rows, h, end, n_blocks});
        segments = std::max(segments, ceil_div(n_blocks, SEGMENT));
    }
    const int n_tasks = (int)tasks.size();
    static int64_t ids = 0;
    const int64_t first_id = ids;    // of this call's tasks
    ids += n_tasks;
    auto range = [&](const Task &t, int s) { return std::make_pair(s * SEGMENT, std::min((s + 1) * SEGMENT, t.n_blocks)); };

    int64_t work = 0;    // key values read by all queries
    for (const Task &t : tasks) work += (int64_t)t.rows * G * t.n_blocks * KV_BLOCK * d;
    if (n_tasks >= 2 * omp_get_max_threads() || segments == 1) {
#pragma omp parallel for schedule(dynamic) if (work > SMALL)
        for (int i = 0; i < n_tasks; i++) {
            static thread_local Scratch s;
            const Task &task = tasks[n_tasks - 1 - i];    // the longest first
            load_queries(s, task, first_id + n_tasks - 1 - i, q, kv, Hq, G, d);
            for (int seg = 0; seg < ceil_div(task.n_blocks, SEGMENT); seg++) {
                Triples &to = seg == 0 ? s.total : s.part;
                to.clear(task.rows * G, stride);
                attend(to, s, task, range(task, seg).first, range(task, seg).second, kv, layer, k16, v16, b, G);
                if (seg > 0)
                    for (int m = 0; m < task.rows * G; m++) s.total.merge(m, s.part.m[m], s.part.l[m], &s.part.o[(size_t)m * 2 * stride], 2 * stride);
            }
            store_result(y, s.total, task, kv, Hq, G, d);
        }
        return;
    }
    if ((int64_t)parts.size() < n_tasks * segments) parts.resize(n_tasks * segments);
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int i = 0; i < n_tasks; i++)
        for (int seg = 0; seg < segments; seg++) {
            static thread_local Scratch s;
            const Task &task = tasks[i];
            if (seg >= ceil_div(task.n_blocks, SEGMENT)) continue;
            load_queries(s, task, first_id + i, q, kv, Hq, G, d);
            Triples &to = parts[i * segments + seg];
            to.clear(task.rows * G, stride);
            attend(to, s, task, range(task, seg).first, range(task, seg).second, kv, layer, k16, v16, b, G);
        }
    for (int i = 0; i < n_tasks; i++) {
        const Task &task = tasks[i];
        Triples &total = parts[i * segments];
        for (int seg = 1; seg < ceil_div(task.n_blocks, SEGMENT); seg++) {
            const Triples &part = parts[i * segments + seg];
            for (int m = 0; m < task.rows * G; m++) total.merge(m, part.m[m], part.l[m], &part.o[(size_t)m * 2 * stride], 2 * stride);
        }
        store_result(y, total, task, kv, Hq, G, d);
    }
}
}    // namespace cpu
#endif
