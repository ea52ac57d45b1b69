// kv_cache.h - owns the cache's memory; kv_block.h says what is in it.
#pragma once
#include <vector>
#include "kv_block.h"
#include "model.h"

struct KvOptions {
    KvFormat k_format = KvFormat::f16, v_format = KvFormat::f16;
    int sink = 0, recent = 0;        // tokens, multiples of KV_BLOCK
    bool exact_prefill = false;
    unsigned ablate = 0;             // KvAblate, for study
    float k_exponent = -1, v_exponent = -1;    // of the scale correction; -1: the format's own
};

struct KvCache {
    KvView view{};
    const Ops *ops = nullptr;
    int context = 0;                 // tokens a slot can hold
    int64_t bytes = 0;               // of everything below: blocks, exact rows, block tables, RoPE tables
    std::vector<int> table;          // (B, max_blocks), as uploaded to view.table
    std::vector<int> owned;          // (B) blocks of the slot
    std::vector<int> free_blocks;    // of the pool
    std::vector<void *> memory;      // what ops->alloc gave

    KvCache() = default;
    KvCache(const KvCache &) = delete;
    KvCache &operator=(const KvCache &) = delete;
    ~KvCache();
};

// Bytes that a cache of `slots` sequences of `context` tokens takes, before it is made; and a sealed token's share over
// all layers and heads, K and V.
int64_t kv_cache_bytes(const Config &c, const KvOptions &o, int slots, int context);
double kv_bytes_per_token(const Config &c, const KvOptions &o);

// All memory at once, for `slots` sequences of up to `context` tokens.  Nothing is allocated later.
void kv_cache_open(KvCache &cache, const Ops &ops, const Config &c, const KvOptions &o, int slots, int context);

// Blocks for positions below len; called before the step that writes them.
void kv_cache_reserve(KvCache &cache, int slot, int len);

// Slot 0 holds len tokens; every other slot gets what the same tokens would leave there.
void kv_cache_repeat(KvCache &cache, int len);

// The slot is empty again and its blocks return to the pool.
void kv_cache_clear(KvCache &cache, int slot);
