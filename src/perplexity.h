// perplexity.h - how well the model predicts a text, and what a cache format costs it.
#pragma once
#include "model.h"
#include "options.h"

// The protocol: the whole file is encoded; windows of c-1 tokens (c without BOS) follow each other, `stride` tokens apart;
// BOS stands before each; of every window the last `stride` tokens are scored (all of the first), each given all before it
// in the window.  PPL = e^(mean nll); its error is PPL times the standard error of the mean.  The result line on stdout
// carries the protocol.
void perplexity(const Model &m, const Ops &ops, const Options &o);
