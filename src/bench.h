// bench.h - how fast, and how far from what the machine allows.
#pragma once
#include "model.h"
#include "options.h"

// Measures read bandwidth, then for every pair of formats (o.kvs) and number of sequences (o.batches) one cache, filled from
// depth to depth (o.depths), and at each depth
//
//   prefill   tokens a second of the last o.bench_prompt tokens before that depth; of an empty cache where the depth is less
//   decode    tokens a second of o.bench_tokens steps of one token a sequence: all of their time, each until its logits
//             can be read
//   bytes     that a step must read: weights, codes with their metadata, blocks that are fp16; GB/s and its share of the
//             bandwidth; limit: tokens a second if those bytes were all the time a step takes
//   seal      of a cache with codes: how much longer a step takes in which layers of every sequence seal a block, up to SEAL_STEPS of
//             KV_BLOCK steps; median over median, minus 1.  The first two such steps are left out: a GPU runs the first step of a
//             kind, records the second and replays the others; so it takes three, and one that does not seal.  On a GPU a kind
//             ends where the depth passes a power of two: depths like 4096 tell, depth 0 does not
//   memory    announced (weights unless mapped, cache, activations) and taken, since memory_before was read
//             (memory_taken in report.h)
//
// A number of sequences may be LARGEST_BATCH: at each depth as many as fit.  What is not measured is prefilled once and copied
// to the other sequences, which have the same tokens.
// Depths that do not fit in memory are left out with one line on stderr each; fails when none fits.
void bench(const Model &m, const Ops &ops, const Options &o, int64_t memory_before);

// The most sequences of that depth whose memory fits, with 2% to spare; 0 if none does.
int largest_batch(const Model &m, const Ops &ops, const Options &o, const KvOptions &kv, int depth);
