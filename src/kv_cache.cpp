#include "kv_cache.h"
#include <algorithm>
#include <cmath>

KvCache::~KvCache() {
    for (void *p : memory) ops->release(p);
}

static KvView shape_of(const Config &c, const KvOptions &o, int slots, int context) {
    if (o.sink % KV_BLOCK || o.recent % KV_BLOCK || o.sink < 0 || o.recent < 0)
        refuse("--sink %d --recent %d: both must be multiples of %d", o.sink, o.recent, KV_BLOCK);
    KvView v{};
    v.k_format = kv_side_format(o.k_format, true), v.v_format = kv_side_format(o.v_format, false);
    v.k_block_bytes = kv_block_stride(v.k_format, c.head_dim), v.v_block_bytes = kv_block_stride(v.v_format, c.head_dim);
    v.k_beside_bytes = kv_beside_bytes(v.k_format, c.head_dim), v.v_beside_bytes = kv_beside_bytes(v.v_format, c.head_dim);
    v.k_share = kv_share(v.k_format, c.n_layers), v.v_share = kv_share(v.v_format, c.n_layers);
    v.L = c.n_layers, v.B = slots, v.Hkv = c.n_kv_heads, v.d = c.head_dim;
    v.max_blocks = (int)ceil_div(context, KV_BLOCK);
    v.sink = std::min(o.sink / KV_BLOCK, v.max_blocks), v.recent = std::min(o.recent / KV_BLOCK, v.max_blocks);
    if ((int64_t)slots * v.max_blocks > INT32_MAX) refuse("KV cache: %d sequences of %d tokens are more than 2^31 blocks", slots, context);
    // A slot never seals its sinks, its recents or the open block.
    v.n_blocks = slots * std::max(0, v.max_blocks - 1 - v.sink - v.recent);
    v.exact_prefill = o.exact_prefill, v.ablate = o.ablate;
    v.k_exponent = o.k_exponent < 0 ? kv_scale_exponent(o.k_format, true) : o.k_exponent;
    v.v_exponent = o.v_exponent < 0 ? kv_scale_exponent(o.v_format, false) : o.v_exponent;
    return v;
}

struct Sizes { int64_t k_sealed, v_sealed, k_beside, v_beside, exact, table, rope_base, rope_step, codebooks; };
static Sizes sizes_of(const KvView &v) {
    const int64_t blocks = (int64_t)v.L * v.n_blocks * v.Hkv;
    auto beside = [&](KvFormat f, int share, int64_t bytes) {
        return bytes * (f == KvFormat::deco4 ? (int64_t)v.L * v.B : (int64_t)code_layers(share, v.L) * v.n_blocks * v.Hkv);
    };
    return {blocks * v.k_block_bytes,
            blocks * v.v_block_bytes,
            beside(v.k_format, v.k_share, v.k_beside_bytes),
            beside(v.v_format, v.v_share, v.v_beside_bytes),
            (int64_t)v.L * v.B * v.Hkv * v.n_exact() * v.d * (int64_t)sizeof(f16),
            (int64_t)v.B * v.max_blocks * (int64_t)sizeof(int),
            (int64_t)v.max_blocks * v.d * (int64_t)sizeof(float),
            (int64_t)KV_BLOCK * v.d * (int64_t)sizeof(float),
            KV_CODEBOOK_BYTES * ((kv_codebook(v.k_format) != nullptr) + (kv_codebook(v.v_format) != nullptr))};
}

int64_t kv_cache_bytes(const Config &c, const KvOptions &o, int slots, int context) {
    const Sizes s = sizes_of(shape_of(c, o, slots, context));
    return s.k_sealed + s.v_sealed + s.k_beside + s.v_beside + 2 * s.exact + s.table + s.rope_base + 2 * s.rope_step + s.codebooks;
}

double kv_bytes_per_token(const Config &c, const KvOptions &o) {
    double bytes = 0;
    for (bool key : {true, false}) {
        const KvFormat f = kv_side_format(key ? o.k_format : o.v_format, key);
        bytes += (double)c.n_layers * kv_block_bytes(f, c.head_dim);
        if (f != KvFormat::deco4)
            bytes += (double)code_layers(kv_share(f, c.n_layers), c.n_layers) * kv_beside_bytes(f, c.head_dim);    // its matrix is a sequence's
    }
    return bytes * c.n_kv_heads / KV_BLOCK;
}

void kv_cache_open(KvCache &cache, const Ops &ops, const Config &c, const KvOptions &o, int slots, int context) {
    KvView v = shape_of(c, o, slots, context);
    const Sizes s = sizes_of(v);
    cache.ops = &ops;
    cache.context = context;
    auto take = [&](int64_t bytes) {
        void *p = ops.alloc(bytes);
        cache.memory.push_back(p);
        cache.bytes += bytes;
        return p;
    };
    v.k_sealed = (uint8_t *)take(s.k_sealed), v.v_sealed = (uint8_t *)take(s.v_sealed);
    if (s.k_beside) v.k_beside = (uint8_t *)take(s.k_beside);
    if (s.v_beside) v.v_beside = (uint8_t *)take(s.v_beside);
    v.k_exact = (f16 *)take(s.exact), v.v_exact = (f16 *)take(s.exact);

    const std::vector<double> freq = rope_frequencies(c);
    auto angles = [&](int64_t bytes, int rows, int tokens) {
        std::vector<float> t;
        for (int r = 0; r < rows; r++) {
            for (double f : freq) t.push_back((float)std::cos((double)r * tokens * f));
            for (double f : freq) t.push_back((float)std::sin((double)r * tokens * f));
        }
        float *p = (float *)take(bytes);
        ops.upload(p, t.data(), bytes);
        return p;
    };
    v.rope = {angles(s.rope_base, v.max_blocks, KV_BLOCK), angles(s.rope_step, KV_BLOCK, 1), nullptr};
    std::vector<float> step((size_t)KV_BLOCK * v.d), turned(step.size());
    ops.download(step.data(), v.rope.step, s.rope_step);
    for (int t = 0; t < KV_BLOCK; t++)
        for (int i = 0; i < v.d; i++) turned[i * KV_BLOCK + t] = step[t * v.d + i];
    float *step_turned = (float *)take(s.rope_step);
    ops.upload(step_turned, turned.data(), s.rope_step);
    v.rope.step_turned = step_turned;

    auto codebook = [&](KvFormat f) -> const int8_t * {
        if (!kv_codebook(f)) return nullptr;
        void *p = take(KV_CODEBOOK_BYTES);
        ops.upload(p, kv_codebook(f), KV_CODEBOOK_BYTES);
        return (const int8_t *)p;
    };
    v.k_codebook = codebook(o.k_format), v.v_codebook = codebook(o.v_format);

    cache.table.assign((size_t)v.B * v.max_blocks, 0);
    cache.owned.assign(v.B, 0);
    for (int i = v.n_blocks; i > 0; i--) cache.free_blocks.push_back(i - 1);
    int *table = (int *)take(s.table);
    ops.upload(table, cache.table.data(), s.table);
    v.table = table;
    cache.view = v;
}

void kv_cache_reserve(KvCache &cache, int slot, int len) {
    const KvView &v = cache.view;
    if (len > cache.context) fail("KV cache: %d tokens in slot %d, room for %d (-c)", len, slot, cache.context);
    const int end = v.sealed_end(len - 1, 0);    // blocks [sink, end) are sealed by then, by the first layer
    int &owned = cache.owned[slot];
    if (v.sink + owned >= end) return;
    for (; v.sink + owned < end; owned++) {
        cache.table[(size_t)slot * v.max_blocks + v.sink + owned] = cache.free_blocks.back();
        cache.free_blocks.pop_back();
    }
    const size_t row = (size_t)slot * v.max_blocks;
    cache.ops->upload((int *)v.table + row, &cache.table[row], v.max_blocks * sizeof(int));
}

void kv_cache_clear(KvCache &cache, int slot) {
    for (int i = cache.owned[slot]; i > 0; i--)
        cache.free_blocks.push_back(cache.table[(size_t)slot * cache.view.max_blocks + cache.view.sink + i - 1]);
    cache.owned[slot] = 0;
}

void kv_cache_repeat(KvCache &cache, int len) {
    const KvView &v = cache.view;
    if (v.B == 1) return;
    for (int s = 1; s < v.B; s++) kv_cache_clear(cache, s), kv_cache_reserve(cache, s, len);
    std::vector<uint8_t> host;
    auto repeat = [&](void *p, int64_t n, auto at) {    // n bytes that slot s has at offset at(s)
        host.resize(n);
        cache.ops->download(host.data(), (uint8_t *)p + at(0), n);
        for (int s = 1; s < v.B; s++) cache.ops->upload((uint8_t *)p + at(s), host.data(), n);
    };
    const int *const table = cache.table.data();
    auto number = [&](int s, int i) { return table[(size_t)s * v.max_blocks + v.sink + i]; };
    auto repeat_blocks = [&](void *p, int layers, int64_t block_bytes) {
        for (int layer = 0; p && layer < layers; layer++)
            for (int i = 0, n; i < cache.owned[0]; i += n) {
                // neighbours in every slot go together
                for (n = 1; i + n < cache.owned[0]; n++) {
                    bool next = true;
                    for (int s = 0; s < v.B; s++) next = next && number(s, i + n) == number(s, i) + n;
                    if (!next) break;
                }
                auto at = [&](int s) { return ((int64_t)layer * v.n_blocks + number(s, i)) * v.Hkv * block_bytes; };
                repeat(p, n * v.Hkv * block_bytes, at);
            }
    };
    auto repeat_slots = [&](void *p, int64_t slot_bytes) {
        for (int layer = 0; p && layer < v.L; layer++) repeat(p, slot_bytes, [&](int s) { return ((int64_t)layer * v.B + s) * slot_bytes; });
    };
    repeat_blocks(v.k_sealed, v.L, v.k_block_bytes), repeat_blocks(v.v_sealed, v.L, v.v_block_bytes);
    const int64_t exact = (int64_t)v.Hkv * v.n_exact() * v.d * (int64_t)sizeof(f16);
    repeat_slots(v.k_exact, exact), repeat_slots(v.v_exact, exact);
    for (bool key : {true, false}) {
        void *const beside = key ? v.k_beside : v.v_beside;
        const int64_t bytes = key ? v.k_beside_bytes : v.v_beside_bytes;
        if ((key ? v.k_format : v.v_format) == KvFormat::deco4) repeat_slots(beside, bytes);
        else repeat_blocks(beside, code_layers(key ? v.k_share : v.v_share, v.L), bytes);
    }
}
