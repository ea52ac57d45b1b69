// report.h - figures about a run: memory before it starts, bytes that must move, the machine's own speed.
#pragma once
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include "device.h"
#include "forward.h"

inline double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What a mode is about to take: a cache, perhaps a second one of the same shape, and the buffers of a step.
struct MemoryPlan {
    KvOptions kv;
    int slots, context;              // of the cache: sequences, and tokens that each of them can hold
    int rows, rows_out;              // of a step: rows, and those of them that give logits
    const KvOptions *against = nullptr;
};
struct MemoryNeed {
    int64_t cache, activations;      // bytes
    int64_t total() const { return cache + activations; }
};
MemoryNeed memory_need(const Model &m, const Ops &ops, const MemoryPlan &plan);

// "" when the device can give what the plan needs.  Else one line: what is needed for what, what there is, and what would
// fit: the longest context, the most sequences and the formats, each with everything else as planned.
std::string memory_problem(const Model &m, const Ops &ops, const MemoryPlan &plan);

// Rows of a prefill step: a device reads all weights for each, and widens those in codes.  Llama-3-8B, prompts of 4,096 tokens on an H100:
// 512 rows 25,250 tok/s, 14,000 with weights in q4; 1,024 28,500 and 18,240; 2,048 30,180 and 20,840.
constexpr int PREFILL_ROWS = 512, DEVICE_PREFILL_ROWS = 2048;
// plan_of(rows), of those that pay if there is memory for them.
template <class PlanOf> MemoryPlan prefill_plan(const Model &m, const Ops &ops, PlanOf plan_of) {
    if (std::string(ops.name) == cpu_ops.name) return plan_of(PREFILL_ROWS);
    const MemoryPlan plan = plan_of(DEVICE_PREFILL_ROWS);
    return memory_problem(m, ops, plan).empty() ? plan : plan_of(PREFILL_ROWS);
}

// Fails with that line, before anything is allocated.  Otherwise tells stderr what is about to be, unless quiet.
void announce_memory(const Model &m, const Ops &ops, const MemoryPlan &plan, bool quiet);

// The same for weights that are about to move into the memory of the device.
void check_weights_fit(int64_t weights_bytes, const Ops &ops);

// Bytes that were taken between two calls are the difference of what they give: of the device's memory, or on the CPU of
// memory of our own that has been written to (so not the mapped weights).
int64_t memory_taken(const Ops &ops);

// A format pair as figures name it, "nsn2/f16", keys first; and its bits a value.
std::string kv_pair_name(const KvOptions &kv);
double kv_pair_bits(const KvOptions &kv, const Config &c);

// Bytes of its cache that a row at position pos must read: sealed blocks as codes with their metadata, the others as fp16.
// A decode step reads them for every sequence, and the weights once (Model::step_bytes).
struct CacheBytes {
    int64_t coded, exact;
    int64_t total() const { return coded + exact; }
};
CacheBytes cache_bytes_read(const KvView &kv, int pos);

// Seconds since the program started.
double seconds_running();

// The closing line of a run, on stderr: one JSON object, the figures a script wants.
struct Closing {
    bool many = false;                            // --batch: the line also counts prompts
    int prompts = 1, slots = 1;
    int prompt_tokens = 0, tokens = 0;            // of all prompts
    std::map<std::string, int> stops;             // "eos", "length", "context": how many prompts ended so
    double first_token_s = 0;                     // since the program started
    double prefill_s = 0, decode_s = 0;           // of steps with rows of a prompt, and of all others
    int decode_rows = 0;                          // of those others; each makes a token
    int64_t decode_bytes = 0;                     // that they had to read
    uint64_t logits_hash = 0;                     // of the last logits; of many prompts, of their hashes in order
};
void print_closing(const Closing &r, const Model &m, const KvCache &cache, const Activations &a);

// FNV-1a 64 of the bytes: one number that says whether two runs computed the same.
uint64_t hash_bytes(const void *data, size_t n);
std::string hash_text(uint64_t hash);    // 16 hexadecimal digits
