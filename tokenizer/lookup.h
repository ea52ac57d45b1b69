// lookup.h - the hash tables of a TokenizerIndex: open addressing over ids, so that a Tokenizer can be copied and moved
// as a plain value.  Inside tokenizer/ only.
#pragma once
#include "tokenizer.h"

static inline uint64_t mix(uint64_t h) {
    h = (h ^ h >> 32) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 29;
}
static inline uint64_t hash_bytes(std::string_view s) {
    uint64_t h = 0xcbf29ce484222325u;    // FNV-1a
    for (const char b : s) h = (h ^ (uint8_t)b) * 0x100000001b3u;
    return mix(h);
}
static inline uint64_t hash_pair(int left, int right) { return mix((uint64_t)left << 32 | (uint32_t)right); }

// The slot that holds the entry for which same(entry), or the empty slot where it belongs.
template <class Slots, class Same> static auto &find_slot(Slots &slots, uint64_t hash, Same same) {
    size_t i = hash & (slots.size() - 1);
    while (slots[i] >= 0 && !same(slots[i])) i = (i + 1) & (slots.size() - 1);
    return slots[i];
}

static inline int find_piece(const Tokenizer &t, std::string_view s) {    // a normal piece by its bytes, -1 none
    return find_slot(t.index.piece_slots, hash_bytes(s), [&](int id) { return t.pieces[id] == s; });
}
static inline int find_merge(const Tokenizer &t, int left, int right) {    // index into merges, -1 none
    return find_slot(t.index.merge_slots, hash_pair(left, right),
                     [&](int m) { return t.merges[m].left == left && t.merges[m].right == right; });
}
