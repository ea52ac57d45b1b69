// forward.h - one step of the model: rows in, logits out.
#pragma once
#include <vector>
#include "kv_cache.h"
#include "model.h"

// The rows of a step, put together on the host.
struct Rows {
    std::vector<int> token, slot, pos, first, out;
    void clear() {
        for (auto *v : {&token, &slot, &pos, &first, &out}) v->clear();
    }
    // Rows of one slot are added one after the other.
    void add(int token_id, int slot_id, int position, bool want_logits) {
        const int n = (int)token.size();
        first.push_back(n > 0 && slot[n - 1] == slot_id ? first[n - 1] : n);
        token.push_back(token_id), slot.push_back(slot_id), pos.push_back(position);
        if (want_logits) out.push_back(n);
    }
    Batch batch() const { return {(int)token.size(), token.data(), slot.data(), pos.data(), first.data(), (int)out.size(), out.data()}; }
};

// Every buffer of a step, for at most N rows of which n_out give logits.
struct Activations {
    float *x, *xn, *q, *k, *v, *att, *gate, *up;    // (N, D|D|Hq d|Hkv d|Hkv d|Hq d|F|F)
    f16 *k16, *v16;                                     // (N, Hkv, d)
    float *x_out, *logits;                              // (n_out, D), (n_out, V)
    void *scratch;                                      // what the ops need beside that (Ops::scratch_bytes)
    int N = 0, n_out = 0;
    int64_t bytes = 0;
    const Ops *ops = nullptr;
    std::vector<void *> memory;

    Activations() = default;
    Activations(const Activations &) = delete;
    Activations &operator=(const Activations &) = delete;
    ~Activations();
};
int64_t activations_bytes(const Ops &ops, const Config &c, int N, int n_out);
void activations_open(Activations &a, const Ops &ops, const Config &c, int N, int n_out);

// The rows, given on the host, go through the model and into the cache (reserved by the caller); logits (n_out, V) are in
// a.logits.
void forward(const Model &m, const KvView &kv, Activations &a, const Batch &rows, const Ops &op);
