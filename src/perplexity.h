// perplexity.h - how well the model predicts a text, and what a cache format costs it.
#pragma once
#include "meter.h"
#include "options.h"
#include "score.h"

// The protocol: the whole file is encoded; windows of c-1 tokens (c without BOS) follow each other, `stride` tokens apart;
// BOS stands before each; of every window the last `stride` tokens are scored (all of the first), each given all before it
// in the window.  PPL = e^(mean nll).  With --prefill exact the head of a window, which is not scored, is its prompt.  The
// result line on stdout carries the protocol.
struct Protocol {
    std::vector<int> ids;             // of the text
    int bos = -1;                     // -1: none before a window
    int context = 0, stride = 0;
    std::vector<Window> windows;
    int longest = 0, prompt = 0;      // tokens of the longest window and of the longest head that is not scored
};
Protocol make_protocol(const Model &m, const Options &o);

// Scores of the protocol's tokens in the order of the text, whatever t.slots is.  `quiet` or not, NaN logits are an error.
std::vector<Score> score_text(Meter &t, const Protocol &p, bool quiet);

// The mode --ppl.  `against`: weights of --against-model, null without; refuses another shape or tokenizer.
void perplexity(const Model &m, const Model *against, const Ops &ops, const Options &o);

constexpr double DECODE_TOLERANCE = 1e-3;    // nats a token between decoding and coded prefill: the promise of --decode

// What --ppl and --needle share: one cache, or that of --against as well; how a run reads, for its result line.
std::vector<KvOptions> caches_of(const Options &o);
std::string ablation_text(unsigned ablate);    // "", or "first-norm,shift"
int bos_of(const Model &m, const Options &o);
