#include "report.h"
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <cinttypes>
#include <nlohmann/json.hpp>

static const auto program_start = std::chrono::steady_clock::now();
double seconds_running() { return seconds_since(program_start); }

static double mib(int64_t bytes) { return bytes / 1048576.0; }

std::string kv_pair_name(const KvOptions &kv) { return std::string(kv_format_name(kv.k_format)) + "/" + kv_format_name(kv.v_format); }
double kv_pair_bits(const KvOptions &kv, const Config &c) { return 8 * kv_bytes_per_token(c, kv) / (2.0 * c.n_layers * c.n_kv_heads * c.head_dim); }

void announce_memory(const Model &m, const Ops &ops, const KvOptions &kv, int slots, int context, int rows, int rows_out, bool quiet,
                     const KvOptions *against) {
    auto caches_bytes = [&](int tokens) {
        return kv_cache_bytes(m.config, kv, slots, tokens) + (against ? kv_cache_bytes(m.config, *against, slots, tokens) : 0);
    };
    const int64_t caches = caches_bytes(context), activations = activations_bytes(ops, m.config, rows, rows_out);
    const int64_t available = ops.available();
    if (available >= 0 && caches + activations > available) {
        int fits = context;
        while (fits > KV_BLOCK && caches_bytes(fits) + activations > available) fits /= 2;
        fail("memory: %.0f MiB needed (cache %.0f for %d x %d tokens, activations %.0f), %.0f MiB available; -c %d would fit", mib(caches + activations),
             mib(caches), slots, context, mib(activations), mib(available), fits);
    }
    if (quiet) return;
    fprintf(stderr, "memory: weights %.1f MiB (%s)", mib(m.weights_bytes), m.memory ? ops.name : "mapped");
    for (const KvOptions *o : {&kv, against})
        if (o)
            fprintf(stderr, ", cache %.1f MiB (%d x %d tokens, K %s, V %s, %.3f bits a value)", mib(kv_cache_bytes(m.config, *o, slots, context)), slots,
                    context, kv_format_name(o->k_format), kv_format_name(o->v_format), kv_pair_bits(*o, m.config));
    fprintf(stderr, ", activations %.1f MiB\n", mib(activations));
}

int64_t step_bytes(const Model &m, const KvView &kv, int slots, int pos) {
    const int sealed = kv.coded_end(pos) - kv.sink, exact = pos + 1 - sealed * KV_BLOCK;
    const int64_t heads = (int64_t)kv.L * kv.Hkv;
    return m.step_bytes + slots * heads * (sealed * (kv.k_block_bytes + kv.v_block_bytes + kv.k_beside_bytes + kv.v_beside_bytes) + (int64_t)exact * kv.d * 2 * (int64_t)sizeof(f16));
}

uint64_t hash_bytes(const void *data, size_t n) {
    uint64_t h = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
    return h;
}

// As many digits as a reader uses: 1234.5, 12.345, 0.012345.
static double rounded(double x) { return atof(strf("%.5g", x).c_str()); }

void print_closing(const Closing &r, const Model &m, const KvCache &cache, const Activations &a) {
    // The roofline of this very model: its weights read, nothing else done.
    const WeightsRange weights = model_weights(m);
    const double bandwidth = a.ops->read_gb_s(weights.data, weights.bytes, 2);
    const double gb_s = r.decode_s > 0 ? r.decode_bytes / r.decode_s / 1e9 : 0;
    const Config &c = m.config;
    const KvOptions kv = {cache.view.k_format, cache.view.v_format};
    const nlohmann::ordered_json line = {
        {"prompt_tokens", r.prompt_tokens},
        {"tokens", r.tokens},
        {"stop", r.stop},
        {"first_token_s", rounded(r.first_token_s)},
        {"prefill_tok_s", rounded(r.prefill_s > 0 ? r.prompt_tokens / r.prefill_s : 0)},
        {"decode_tok_s", rounded(r.decode_s > 0 ? r.decode_steps / r.decode_s : 0)},
        {"gb_s", rounded(gb_s)},
        {"read_gb_s", rounded(bandwidth)},
        {"share", rounded(gb_s / bandwidth)},
        {"kv", kv_pair_name(kv)},
        {"kv_bytes_per_token", rounded(kv_bytes_per_token(c, kv))},
        {"weights_bytes", m.weights_bytes},
        {"activations_bytes", a.bytes},
        {"cache_bytes", cache.bytes},
        {"logits_hash", strf("%016" PRIx64, r.logits_hash)},
    };
    fprintf(stderr, "%s\n", line.dump().c_str());
}
