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

// ---- memory -----------------------------------------------------------------------------------------------
MemoryNeed memory_need(const Model &m, const Ops &ops, const MemoryPlan &p) {
    const int64_t second = p.against ? kv_cache_bytes(m.config, *p.against, p.slots, p.context) : 0;
    return {kv_cache_bytes(m.config, p.kv, p.slots, p.context) + second, activations_bytes(ops, m.config, p.rows, p.rows_out)};
}

// The largest n in [1, end) for which fits(n), 0 if there is none; fits(n) implies fits(n - 1).
template <class Fits> static int largest(int end, Fits fits) {
    int low = 0;
    while (end - low > 1) {
        const int middle = low + (end - low) / 2;
        (fits(middle) ? low : end) = middle;
    }
    return low;
}

static std::string sizes_text(const MemoryPlan &p) { return strf("%d x %d tokens", p.slots, p.context); }

std::string memory_problem(const Model &m, const Ops &ops, const MemoryPlan &plan) {
    const MemoryNeed need = memory_need(m, ops, plan);
    const int64_t available = ops.available();
    if (available < 0 || need.total() <= available) return "";

    auto fits = [&](const MemoryPlan &p) { return memory_need(m, ops, p).total() <= available; };
    MemoryPlan shorter = plan, fewer = plan, smaller = plan;
    const int blocks = largest((int)ceil_div(plan.context, KV_BLOCK), [&](int n) { return shorter.context = n * KV_BLOCK, fits(shorter); });
    const int slots = largest(plan.slots, [&](int n) {
        fewer.slots = n, fewer.rows_out = (int)ceil_div((int64_t)plan.rows_out * n, plan.slots);
        return fits(fewer);
    });
    std::string formats;
    for (int f = 0; f < (int)KvFormat::count; f++) {
        smaller.kv.k_format = smaller.kv.v_format = (KvFormat)f;
        if (fits(smaller)) formats += (formats.empty() ? "" : "|") + std::string(kv_format_name((KvFormat)f));
    }
    std::vector<std::string> advice;
    if (blocks > 0) advice.push_back(strf("up to %d tokens a sequence", blocks * KV_BLOCK));
    if (slots > 0) advice.push_back(strf("up to %d sequence%s at once", slots, slots > 1 ? "s" : ""));
    if (!formats.empty()) advice.push_back("--kv " + formats);
    std::string line = strf("memory: %.1f MiB needed beside weights of %.1f MiB, %.1f MiB available (%s): cache %.1f MiB (%s, %s), activations %.1f MiB; ",
                            mib(need.total()), mib(m.weights_bytes), mib(available), ops.name, mib(need.cache), sizes_text(plan).c_str(),
                            kv_pair_name(plan.kv).c_str(), mib(need.activations));
    if (advice.empty()) return line + "nothing shorter or smaller fits";
    line += "would fit: ";
    for (size_t i = 0; i < advice.size(); i++) line += (i ? ", or " : "") + advice[i];
    return line;
}

void announce_memory(const Model &m, const Ops &ops, const MemoryPlan &plan, bool quiet) {
    const std::string problem = memory_problem(m, ops, plan);
    if (!problem.empty()) fail("%s", problem.c_str());
    if (quiet) return;
    fprintf(stderr, "memory: weights %.1f MiB (%s)", mib(m.weights_bytes), m.memory ? ops.name : "mapped");
    for (const KvOptions *o : {&plan.kv, plan.against})
        if (o)
            fprintf(stderr, ", cache %.1f MiB (%s, K %s, V %s, %.3f bits a value)", mib(kv_cache_bytes(m.config, *o, plan.slots, plan.context)),
                    sizes_text(plan).c_str(), kv_format_name(o->k_format), kv_format_name(o->v_format), kv_pair_bits(*o, m.config));
    fprintf(stderr, ", activations %.1f MiB\n", mib(activations_bytes(ops, m.config, plan.rows, plan.rows_out)));
}

void check_weights_fit(int64_t weights_bytes, const Ops &ops) {
    const int64_t available = ops.available();
    if (available >= 0 && weights_bytes > available)
        fail("memory: %.1f MiB needed for the weights alone, %.1f MiB available (%s); would fit: a smaller model, or this one in fewer bits (--dtype q8|q4)",
             mib(weights_bytes), mib(available), ops.name);
}

int64_t memory_taken(const Ops &ops) {
    if (strcmp(ops.name, cpu_ops.name) != 0) return -ops.available();
    FILE *f = fopen("/proc/self/status", "r");
    if (!f) return 0;
    char line[128];
    long long kib = 0;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "RssAnon: %lld kB", &kib) == 1) break;
    fclose(f);
    return kib * 1024;
}

CacheBytes cache_bytes_read(const KvView &kv, int pos) {
    int64_t sealed = 0;    // blocks of all layers
    for (int layer = 0; layer < kv.L; layer++) sealed += kv.coded_end(pos, layer) - kv.sink;
    const int64_t exact = (int64_t)kv.L * (pos + 1) - sealed * KV_BLOCK;    // tokens
    return {kv.Hkv * sealed * (kv.k_block_bytes + kv.v_block_bytes + kv.k_beside_bytes + kv.v_beside_bytes), kv.Hkv * exact * kv.d * 2 * (int64_t)sizeof(f16)};
}

// ---- the closing line ---------------------------------------------------------------------------------------
uint64_t hash_bytes(const void *data, size_t n) {
    uint64_t h = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
    return h;
}

std::string hash_text(uint64_t hash) { return strf("%016" PRIx64, hash); }

// As many digits as a reader uses: 1234.5, 12.345, 0.012345.
static double rounded(double x) { return atof(strf("%.5g", x).c_str()); }

void print_closing(const Closing &r, const Model &m, const KvCache &cache, const Activations &a) {
    // The roofline of this very model: its weights read, nothing else done.
    const WeightsRange weights = model_weights(m);
    const double bandwidth = a.ops->read_gb_s(weights.data, weights.bytes, 2);
    const double gb_s = r.decode_s > 0 ? r.decode_bytes / r.decode_s / 1e9 : 0;
    const Config &c = m.config;
    const KvOptions kv = {cache.view.k_format, cache.view.v_format};
    nlohmann::ordered_json line = {{"prompt_tokens", r.prompt_tokens}, {"tokens", r.tokens}};
    if (r.many) {
        const double seconds = r.prefill_s + r.decode_s;
        line["prompts"] = r.prompts, line["batch"] = r.slots, line["stops"] = r.stops;
        line["seconds"] = rounded(seconds), line["tok_s"] = rounded(seconds > 0 ? r.tokens / seconds : 0);
    }
    else line["stop"] = r.stops.begin()->first;
    line.update({
        {"first_token_s", rounded(r.first_token_s)},
        {"prefill_tok_s", rounded(r.prefill_s > 0 ? r.prompt_tokens / r.prefill_s : 0)},
        {"decode_tok_s", rounded(r.decode_s > 0 ? r.decode_rows / r.decode_s : 0)},
        {"gb_s", rounded(gb_s)},
        {"read_gb_s", rounded(bandwidth)},
        {"share", rounded(gb_s / bandwidth)},
        {"kv", kv_pair_name(kv)},
        {"kv_bytes_per_token", rounded(kv_bytes_per_token(c, kv))},
        {"weights_bytes", m.weights_bytes},
        {"activations_bytes", a.bytes},
        {"cache_bytes", cache.bytes},
        {"logits_hash", hash_text(r.logits_hash)},
    });
    fprintf(stderr, "%s\n", line.dump().c_str());
}
