// meter.h - many sequences through one or two caches in lockstep, over shared weights and activations; what measures a
// cache format (perplexity.h, needle.h) reads the logits here.
#pragma once
#include <functional>
#include "forward.h"

struct Sequence {
    std::vector<int> ids;
    int from;    // predictions of ids[from..] are wanted, from >= 1
};

struct Meter {
    const Model *m = nullptr, *weights[2] = {};    // weights[i]: what cache i is run with, m unless the caller sets another
    const Ops *ops = nullptr;
    int n_caches = 0, slots = 0, rows_each = 0;    // rows of a sequence in a step
    bool exact_prefill = false;
    KvCache cache[2];
    Activations a;
    Rows step;
    std::vector<float> logits[2];                  // (rows_each * slots, V), on the host
    double seconds[2] = {};                        // of the forward passes, until their logits are on the host
    int64_t fed = 0;                               // tokens through each cache
};

// kv: of one cache, or of two.  Sequences of up to `context` tokens, `slots` at once, from == `prompt` at most in those
// with a prompt (see below).  decode: one row of a sequence a step.  Says on stderr what is allocated, unless quiet.
void meter_open(Meter &t, const Model &m, const Ops &ops, const std::vector<KvOptions> &kv, int slots, int context, int prompt,
                bool decode, bool quiet);

// At most t.slots sequences.  visit(s, pos, logits, against) gets every wanted row of sequence s, the one at pos predicting
// ids[pos + 1]; against is null with one cache.  It is called from many threads, throws nothing, and meets a row once.
//
// Coded prefill reads the same bits however rows are cut into steps.  Exact prefill is what a user of --prefill exact gets:
// ids[0..from) are the prompt, one step in which rows see each other exactly; the rows after it read sealed blocks as codes.
using RowVisitor = std::function<void(int s, int pos, const float *logits, const float *against)>;
void meter_run(Meter &t, const std::vector<Sequence> &batch, const RowVisitor &visit);
