// lookup.cpp - tokenizer_index: build the tables over the fields of a Tokenizer and check what tokenizer.h promises.
#include "lookup.h"
#include <algorithm>
#include <cmath>

// At most half full, so that a search meets an empty slot soon.
static std::vector<int> empty_slots(size_t entries) {
    size_t n = 16;
    while (n < 2 * entries) n *= 2;
    return std::vector<int>(n, -1);
}

static void index_pieces(Tokenizer &t, const char *where) {
    TokenizerIndex &x = t.index;
    x.piece_slots = empty_slots(t.pieces.size());
    x.cut_before_space = true;
    for (int id = 0; id < tokenizer_vocab(t); id++) {
        const std::string &piece = t.pieces[id];
        if (t.types[id] == TokenType::UNKNOWN) {
            if (x.unknown >= 0) fail("%s: types: ids %d and %d are both unknown, expected one", where, x.unknown, id);
            x.unknown = id;
        } else if (t.types[id] == TokenType::BYTE) {
            if (piece.size() != 1) fail("%s: pieces: byte token %d: expected 1 byte, found %zu", where, id, piece.size());
            int &slot = x.byte_id[(uint8_t)piece[0]];
            if (slot >= 0) fail("%s: pieces: ids %d and %d are the same byte token", where, slot, id);
            slot = id;
        } else if (t.types[id] == TokenType::NORMAL) {
            if (piece.empty()) fail("%s: pieces: id %d: expected some bytes, found none", where, id);
            int &slot = find_slot(x.piece_slots, hash_bytes(piece), [&](int other) { return t.pieces[other] == piece; });
            if (slot >= 0) fail("%s: pieces: ids %d and %d are the same piece", where, slot, id);
            slot = id;
            x.longest = std::max(x.longest, piece.size());
            for (size_t i = 1; i < piece.size(); i++)
                if (piece[i] == ' ' && piece[i - 1] != ' ') x.cut_before_space = false;
            if (t.byte_level && piece.size() == 1) x.byte_id[(uint8_t)piece[0]] = id;
        } else if (t.types[id] == TokenType::UNUSED && !piece.empty()) {
            fail("%s: pieces: unused id %d: expected no bytes, found %zu", where, id, piece.size());
        }
    }
    const long bytes = std::count_if(x.byte_id, x.byte_id + 256, [](int id) { return id >= 0; });
    if (t.byte_level && x.unknown >= 0)
        fail("%s: types: id %d is unknown, expected none in a byte_level vocabulary", where, x.unknown);
    if (!t.byte_level && x.unknown < 0) fail("%s: types: expected one unknown token, found none", where);
    if (!t.byte_level && bytes != 0 && bytes != 256)
        fail("%s: types: expected 0 or 256 byte tokens, found %ld", where, bytes);
}

static void index_order(Tokenizer &t, const char *where) {
    TokenizerIndex &x = t.index;
    const int V = tokenizer_vocab(t);
    if (t.merge_by == MergeBy::MERGES) {
        x.merge_slots = empty_slots(t.merges.size());
        std::string both;
        for (int m = 0; m < (int)t.merges.size(); m++) {
            Merge &merge = t.merges[m];
            for (const int id : {merge.left, merge.right})
                if (id < 0 || id >= V) fail("%s: merges: entry %d: expected ids in [0, %d), found %d", where, m, V, id);
            both.assign(t.pieces[merge.left]).append(t.pieces[merge.right]);
            merge.result = find_piece(t, both);
            if (merge.result < 0)
                fail("%s: merges: entry %d: ids %d and %d make no piece", where, m, merge.left, merge.right);
            int &slot = find_slot(x.merge_slots, hash_pair(merge.left, merge.right),
                                  [&](int o) { return t.merges[o].left == merge.left && t.merges[o].right == merge.right; });
            if (slot >= 0) fail("%s: merges: entries %d and %d are the same pair", where, slot, m);
            slot = m;
        }
        return;
    }
    if (!t.merges.empty()) fail("%s: merges: expected none with merge_by scores or ids, found %zu", where, t.merges.size());
    x.rank.resize(V);
    for (int id = 0; id < V; id++) x.rank[id] = id;
    if (t.merge_by == MergeBy::IDS) return;
    if ((int)t.scores.size() != V) fail("%s: scores: expected %d, found %zu", where, V, t.scores.size());
    for (int id = 0; id < V; id++)
        if (!std::isfinite(t.scores[id]))
            fail("%s: scores: id %d: expected a finite number, found %g", where, id, t.scores[id]);
    // Equal scores get equal ranks: then the leftmost pair goes first.
    std::vector<int> order = x.rank;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return t.scores[a] > t.scores[b]; });
    for (int i = 0; i < V; i++)
        x.rank[order[i]] = i > 0 && t.scores[order[i]] == t.scores[order[i - 1]] ? x.rank[order[i - 1]] : i;
}

static void index_added(Tokenizer &t, const char *where) {
    for (int i = 0; i < (int)t.added.size(); i++) {
        const AddedToken &a = t.added[i];
        if (a.id < 0 || a.id >= tokenizer_vocab(t))
            fail("%s: added: entry %d: expected an id in [0, %d), found %d", where, i, tokenizer_vocab(t), a.id);
        const TokenType type = t.types[a.id];
        if (type != TokenType::UNKNOWN && type != TokenType::CONTROL && type != TokenType::USER)
            fail("%s: added: id %d: expected type u, c or d", where, a.id);
        if (a.text.empty()) fail("%s: added: id %d: expected a text, found none", where, a.id);
        (a.normalized ? t.index.added_normalized : t.index.added_raw).push_back(i);
    }
    for (std::vector<int> *list : {&t.index.added_raw, &t.index.added_normalized}) {
        std::sort(list->begin(), list->end(), [&](int a, int b) { return t.added[a].text < t.added[b].text; });
        for (size_t i = 1; i < list->size(); i++)
            if (t.added[(*list)[i]].text == t.added[(*list)[i - 1]].text)
                fail("%s: added: ids %d and %d have the same text", where, t.added[(*list)[i - 1]].id,
                     t.added[(*list)[i]].id);
    }
}

void tokenizer_index(Tokenizer &t, const std::string &where_string) {
    const char *where = where_string.c_str();
    const int V = tokenizer_vocab(t);
    t.index = TokenizerIndex();
    std::fill(t.index.byte_id, t.index.byte_id + 256, -1);
    if (V == 0) fail("%s: pieces: expected a vocabulary, found none", where);
    if ((int)t.types.size() != V) fail("%s: types: expected %d letters, found %zu", where, V, t.types.size());
    index_pieces(t, where);
    index_order(t, where);
    index_added(t, where);
    if (t.byte_level && (t.prefix != Prefix::NONE || t.squeeze_spaces))
        fail("%s: prefix, squeeze_spaces: expected none in a byte_level vocabulary", where);
    if (!t.byte_level && (t.split != SplitRule::NONE || t.nfc || t.ignore_merges))
        fail("%s: split, nfc, ignore_merges: expected none in an spm vocabulary", where);
    if (t.bos < -1 || t.bos >= V) fail("%s: bos: expected an id in [-1, %d), found %d", where, V, t.bos);
    if (t.add_bos && t.bos < 0) fail("%s: add_bos: expected false without bos", where);
    for (size_t i = 0; i < t.eos.size(); i++) {
        if (t.eos[i] < 0 || t.eos[i] >= V) fail("%s: eos: expected ids in [0, %d), found %d", where, V, t.eos[i]);
        if (std::count(t.eos.begin(), t.eos.end(), t.eos[i]) > 1) fail("%s: eos: id %d is listed twice", where, t.eos[i]);
    }
}
