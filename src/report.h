// report.h - figures about a run: memory before it starts, bytes that must move, the machine's own speed.
#pragma once
#include <chrono>
#include <cstdint>
#include "device.h"
#include "forward.h"

inline double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Fails when the device has less memory available than cache and activations will take, and says what would fit.
// Otherwise tells stderr what is about to be allocated, unless quiet.  `against` is a second cache of the same shape.
void announce_memory(const Model &m, const Ops &ops, const KvOptions &kv, int slots, int context, int rows, int rows_out, bool quiet,
                     const KvOptions *against = nullptr);

// A format pair as figures name it, "nsn2/f16", keys first; and its bits a value.
std::string kv_pair_name(const KvOptions &kv);
double kv_pair_bits(const KvOptions &kv, const Config &c);

// Bytes a decode step of `slots` sequences at position pos must read: weights once, the cache of every sequence.
int64_t step_bytes(const Model &m, const KvView &kv, int slots, int pos);

// Seconds since the program started.
double seconds_running();

// The closing line of a run, on stderr: one JSON object, the figures a script wants.
struct Closing {
    int prompt_tokens = 0, tokens = 0;
    const char *stop = "";                        // "eos", "length", "context"
    double prefill_s = 0, decode_s = 0, first_token_s = 0;
    int decode_steps = 0;
    int64_t decode_bytes = 0;                     // that the decode steps had to read
    uint64_t logits_hash = 0;
};
void print_closing(const Closing &r, const Model &m, const KvCache &cache, const Activations &a);

// FNV-1a 64 of the bytes: one number that says whether two runs computed the same.
uint64_t hash_bytes(const void *data, size_t n);
