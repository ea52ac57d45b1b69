#include "meter.h"
#include <algorithm>
#include "report.h"

constexpr int STEP_ROWS = 512;                         // rows of a step over all sequences
constexpr int64_t LOGITS_BYTES = (int64_t)256 << 20;   // of a step: 512 rows of up to 131,072 logits

void meter_open(Meter &t, const Model &m, const Ops &ops, const std::vector<KvOptions> &kv, int slots, int context, int prompt,
                bool decode, bool quiet) {
    const Config &c = m.config;
    const int step_rows = (int)std::min<int64_t>(STEP_ROWS, LOGITS_BYTES / ((int64_t)c.vocab * sizeof(float)));
    t.m = t.weights[0] = t.weights[1] = &m, t.ops = &ops;
    t.n_caches = (int)kv.size(), t.slots = slots;
    t.exact_prefill = kv[0].exact_prefill;
    t.rows_each = decode ? 1 : std::max(1, std::min(context, step_rows / slots));
    const int rows_out = t.rows_each * slots, rows = std::max(rows_out, t.exact_prefill ? prompt : 0);

    announce_memory(m, ops, {kv[0], slots, context, rows, rows_out, t.n_caches > 1 ? &kv[1] : nullptr}, quiet);
    for (int i = 0; i < t.n_caches; i++) {
        kv_cache_open(t.cache[i], ops, c, kv[i], slots, context);
        t.logits[i].resize((size_t)rows_out * c.vocab);
    }
    activations_open(t.a, ops, c, rows, rows_out);
}

// The rows of t.step through every cache; logits to the host, then to the visitor.
static void run_step(Meter &t, bool exact, const RowVisitor &visit) {
    const Batch b = t.step.batch();
    const int64_t V = t.m->config.vocab;
    for (int i = 0; i < t.n_caches; i++) {
        const auto start = std::chrono::steady_clock::now();
        t.cache[i].view.exact_prefill = exact;
        forward(*t.weights[i], t.cache[i].view, t.a, b, *t.ops);
        float done;    // a step without logits is waited for too: its time belongs to this cache
        if (b.n_out > 0) t.ops->download(t.logits[i].data(), t.a.logits, b.n_out * V * sizeof(float));
        else t.ops->download(&done, t.a.x, sizeof done);
        t.seconds[i] += seconds_since(start);
    }
    t.fed += b.N;
#pragma omp parallel for
    for (int i = 0; i < b.n_out; i++)
        visit(b.slot[b.out[i]], b.pos[b.out[i]], &t.logits[0][i * V], t.n_caches > 1 ? &t.logits[1][i * V] : nullptr);
    t.step.clear();
}

void meter_run(Meter &t, const std::vector<Sequence> &batch, const RowVisitor &visit) {
    const int n = (int)batch.size();
    std::vector<int> done(n, 0);
    auto add_rows = [&](int s, int end) {
        end = std::min(end, (int)batch[s].ids.size() - 1);    // the last token predicts nothing
        if (end <= done[s]) return;
        for (int i = 0; i < t.n_caches; i++) kv_cache_reserve(t.cache[i], s, end);
        for (; done[s] < end; done[s]++) t.step.add(batch[s].ids[done[s]], s, done[s], done[s] + 1 >= batch[s].from);
    };
    for (int s = 0; s < n; s++)
        for (int i = 0; i < t.n_caches; i++) kv_cache_clear(t.cache[i], s);

    t.step.clear();
    for (int s = 0; s < n && t.exact_prefill; s++) {
        add_rows(s, batch[s].from);
        if (!t.step.token.empty()) run_step(t, true, visit);
    }
    for (;;) {
        for (int s = 0; s < n; s++) add_rows(s, done[s] + t.rows_each);
        if (t.step.token.empty()) return;
        run_step(t, false, visit);
    }
}
