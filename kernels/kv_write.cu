/* kv_write, kv_keep - this step's keys and values enter the cache; blocks that fall behind are sealed.

   kv_write  k16, v16 (N,Hkv,d) f16 <- k, v (N,Hkv,d) f32, rounded; then for every slot of the step with positions
             p0..p1 the blocks [sealed_end(p0 - 1), sealed_end(p1)) are sealed: their 64 rows are gathered from the ring
             (t < p0) and from this step's rows, and encoded.
   kv_keep   rows that stay exact (sinks, and t >= 64 coded_end(p1, layer)) go to the ring.  After attention, because a row of this
             step may still need what they replace.

   A step of one row seals at most one block per head, and only in the layers whose turn it is (kv_block.h: when is a block sealed?).

   Cost      per token, layer and kv head: 2 x 6 d bytes to round, 2 x 2 d to keep; sealing is seal() once per 64 tokens.
   Tested by tests/test_kv.cpp                                                                                      */
#include <algorithm>
#include <vector>
#include "kv_block.h"

#ifndef __CUDACC__
#include "scalar_seal.h"

// ---- names and sizes ----------------------------------------------------------------------------------
static const char *const format_names[] = {"f16", "nsn1", "nsn2", "nsn2b", "nsn4b", "kivi2", "q8", "q4", "tq2", "nqkv", "deco4", "xquant"};
static_assert(sizeof format_names / sizeof *format_names == (size_t)KvFormat::count, "one name a format");

const char *kv_format_name(KvFormat f) {
    return format_names[(int)(f == KvFormat::kivi2_values ? KvFormat::kivi2 : f == KvFormat::xquant_values ? KvFormat::xquant : f)];
}

KvFormat kv_format_from_name(const std::string &name) {
    std::string known;
    for (int f = 0; f < (int)KvFormat::count; f++) {
        if (name == format_names[f]) return (KvFormat)f;
        known += std::string(" ") + format_names[f];
    }
    refuse("KV format '%s': unknown; there are%s", name.c_str(), known.c_str());
}

int64_t kv_block_bytes(KvFormat f, int d) {
    return with_format(f, d, [](auto format) { return (int64_t)sizeof(typename decltype(format)::Block); });
}
int64_t kv_block_stride(KvFormat f, int d) { return kv_is_scalar(f) ? kv_block_bytes(f, d) : kv_aligned(kv_block_bytes(f, d)); }

const int8_t *kv_codebook(KvFormat f) {
    switch (f) {
    case KvFormat::nsn1: return NSN1_INDEX[0];
    case KvFormat::nsn2: return NSN2_INDEX[0];
    case KvFormat::nsn2b: return NSN2B_INDEX[0];
    case KvFormat::nsn4b: return NSN4B_INDEX[0];
    default: return nullptr;
    }
}

int64_t kv_beside_bytes(KvFormat f, int d) {
    switch (f) {
    case KvFormat::deco4: return (int64_t)basis_width(d) * basis_width(d) * (int64_t)sizeof(f16);
    case KvFormat::xquant: return KV_BLOCK * d * 2 / 8;
    case KvFormat::xquant_values: return KV_BLOCK * d * 1 / 8;
    default: return 0;
    }
}
int kv_share(KvFormat f, int L) { return f == KvFormat::xquant_values ? L / 4 * 2 : L + L % 2; }

float kv_scale_exponent(KvFormat, bool) { return 1.0f; }

// ---- reference: the CPU backend -----------------------------------------------------------------------
namespace cpu {

// One block: rows (KV_BLOCK, d) f16, keys before RoPE.
template <int D> static void seal(F16<D>, typename F16<D>::Block &block, const f16 *rows, const SealPlace &) { memcpy(block.x, rows, sizeof block.x); }
template <class Nsn> static void seal(Nsn nsn, typename Nsn::Block &block, const f16 *rows, const SealPlace &place) {
    memset((void *)&block, 0, sizeof block);
    nsn_seal(nsn_fields(nsn, block), rows, place);
}
template <int D, class Kind> static void seal(Scalars<D, Kind> format, typename Scalars<D, Kind>::Block &block, const f16 *rows, const SealPlace &place) {
    memset((void *)&block, 0, sizeof block);
    scalar_seal(format.fields(block, place.beside), rows, place);
}

void seal_block(KvFormat format, int d, uint8_t *block, const f16 *rows, const SealPlace &place) {
    with_format(format, d, [&](auto f) { seal(f, *(typename decltype(f)::Block *)block, rows, place); });
}

static int last_row(const Batch &b, int n) {    // of the slot whose first row is n
    int last = n;
    while (last + 1 < b.N && b.first[last + 1] == n) last++;
    return last;
}

void kv_write(const KvView &kv, int layer, f16 *k16, f16 *v16, const float *k, const float *v, const Batch &b) {
    const int d = kv.d, Hkv = kv.Hkv;
    const int64_t values = (int64_t)b.N * Hkv * d;
#pragma omp parallel for if (values > 16384)
    for (int64_t i = 0; i < values; i++) {
        k16[i] = to_f16(k[i]);
        v16[i] = to_f16(v[i]);
    }
    for (int n = 0; n < b.N; n = last_row(b, n) + 1) {
        const int slot = b.slot[n], p0 = b.pos[n], p1 = b.pos[last_row(b, n)];
        const int begin = kv.sealed_end(p0 - 1, layer), end = kv.sealed_end(p1, layer);
        auto gather = [&](f16 *x, bool key, int h, int i) {    // block i as rows (KV_BLOCK, d)
            for (int t = i * KV_BLOCK; t < (i + 1) * KV_BLOCK; t++) {
                const int64_t ring = kv.exact_at(layer, slot, h, t);
                const int64_t row = ((int64_t)(n + t - p0) * Hkv + h) * d;
                memcpy(x + (t % KV_BLOCK) * d, t < p0 ? (key ? kv.k_exact : kv.v_exact) + ring : (key ? k16 : v16) + row, d * sizeof(f16));
            }
        };
        auto place = [&](bool key, int h, int i) {
            const bool shares = layer >= (key ? kv.k_share : kv.v_share) && layer % 2;
            return SealPlace{key, i * KV_BLOCK, kv.rope, kv.ablate, key ? kv.k_exponent : kv.v_exponent, kv.beside(key, layer, slot, h, i), shares};
        };
        for (bool key : {true, false})
            if ((key ? kv.k_format : kv.v_format) == KvFormat::deco4 && begin == kv.sink && end > begin) {
                std::vector<f16> x((size_t)Hkv * KV_BLOCK * d);    // once a sequence
                for (int h = 0; h < Hkv; h++) gather(&x[(size_t)h * KV_BLOCK * d], key, h, begin);
                learn_basis((f16 *)kv.beside(key, layer, slot, 0, begin), x.data(), Hkv, d, place(key, 0, begin));
            }
#pragma omp parallel for collapse(2) if (end > begin)
        for (int i = begin; i < end; i++)
            for (int h = 0; h < Hkv; h++) {
                f16 x[KV_BLOCK * MAX_HEAD_DIM];
                for (bool key : {true, false}) {
                    uint8_t *const block = key ? kv.k_block(layer, slot, h, i) : kv.v_block(layer, slot, h, i);
                    memset(block, 0, key ? kv.k_block_bytes : kv.v_block_bytes);
                    gather(x, key, h, i);
                    seal_block(key ? kv.k_format : kv.v_format, d, block, x, place(key, h, i));
                }
            }
    }
}

void kv_keep(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b) {
    const int d = kv.d, Hkv = kv.Hkv;
    for (int n = 0, last = 0; n < b.N; n++) {
        if (b.first[n] == n) last = last_row(b, n);
        const int i = b.pos[n] / KV_BLOCK;
        if (i >= kv.sink && i < kv.coded_end(b.pos[last], layer)) continue;
        for (int h = 0; h < Hkv; h++) {
            const int64_t ring = kv.exact_at(layer, b.slot[n], h, b.pos[n]);
            const int64_t row = ((int64_t)n * Hkv + h) * d;
            memcpy(kv.k_exact + ring, k16 + row, d * sizeof(f16));
            memcpy(kv.v_exact + ring, v16 + row, d * sizeof(f16));
        }
    }
}
}    // namespace cpu

// ---- CUDA: one thread an element; kv_seal.cu seals ------------------------------------------------------
// Where every slot has one row, that row replaces nothing that sealing or attention reads: what it takes the place of in the
// ring, row pos - ring(), was sealed by an earlier step.  Such steps keep their rows at once, in kv_write.
#else
#include "cuda.cuh"
namespace cuda {

__global__ void round_kernel(KvView kv, int layer, f16 *k16, f16 *v16, const float *k, const float *v, Batch b, bool keep) {
    const int64_t row = kv.Hkv * kv.d, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_inputs();
    if (i >= b.N * row) return;
    const f16 key = to_f16(k[i]), value = to_f16(v[i]);
    k16[i] = key, v16[i] = value;
    if (!keep) return;
    const int n = (int)(i / row), h = (int)(i % row) / kv.d;
    const int64_t ring = kv.exact_at(layer, b.slot[n], h, b.pos[n]) + i % kv.d;
    kv.k_exact[ring] = key, kv.v_exact[ring] = value;
}

void kv_write(const KvView &kv, int layer, f16 *k16, f16 *v16, const float *k, const float *v, const Batch &b) {
    const Step &step = step_of(b);
    const dim3 blocks(ceil_div((int64_t)b.N * kv.Hkv * kv.d, 256));
    const int seals = step.most_seals(kv);
    launch(round_kernel, blocks, 256, 0, kv, layer, k16, v16, k, v, b, step.single_rows());
    if (seals > 0) seal_blocks(kv, layer, k16, v16, step, seals);
}

// One thread block a row.
__global__ void keep_kernel(KvView kv, int layer, const f16 *k16, const f16 *v16, Batch b, const int *last_pos) {
    const int n = blockIdx.x, d = kv.d, i = b.pos[n] / KV_BLOCK;
    wait_for_inputs();
    if (i >= kv.sink && i < kv.coded_end(last_pos[n], layer)) return;
    for (int c = threadIdx.x; c < kv.Hkv * d; c += blockDim.x) {
        const int64_t ring = kv.exact_at(layer, b.slot[n], c / d, b.pos[n]) + c % d;
        const int64_t row = (int64_t)n * kv.Hkv * d + c;
        kv.k_exact[ring] = k16[row];
        kv.v_exact[ring] = v16[row];
    }
}

void kv_keep(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b) {
    const Step &step = step_of(b);
    if (!step.single_rows()) launch(keep_kernel, dim3(b.N), 256, 0, kv, layer, k16, v16, b, step.on_last_pos);
}
}    // namespace cuda
#endif
