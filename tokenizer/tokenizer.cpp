// tokenizer.cpp - encoding and decoding, see tokenizer.h.  Reading order: cutting out added tokens, normalising, merging,
// encoding, decoding.
#include "tokenizer.h"
#include <algorithm>
#include "lookup.h"
#include "split.h"
#include "unicode.h"

int tokenizer_vocab(const Tokenizer &t) { return (int)t.pieces.size(); }
const char *tokenizer_kind(const Tokenizer &t) { return t.byte_level ? "byte_level" : "spm"; }
int tokenizer_find(const Tokenizer &t, std::string_view text) {
    for (const AddedToken &a : t.added)
        if (t.pieces[a.id] == text) return a.id;
    return -1;
}

// ---------------------------------------------------------------------------------------- added tokens, normalising

namespace {
struct Part {
    std::string_view text;
    int id;    // of an added token, -1: text to encode
};
}    // namespace

// The longest added text at the start of s: a binary search that narrows the sorted list byte by byte.  -1 none.
static int match_added(const Tokenizer &t, const std::vector<int> &list, std::string_view s) {
    auto first = list.begin(), last = list.end();
    int found = -1;
    for (size_t n = 0; n < s.size() && first != last; n++) {
        const auto byte_at = [&](int i) { return n < t.added[i].text.size() ? (uint8_t)t.added[i].text[n] : -1; };
        const int byte = (uint8_t)s[n];
        first = std::lower_bound(first, last, byte, [&](int i, int b) { return byte_at(i) < b; });
        last = std::upper_bound(first, last, byte, [&](int b, int i) { return b < byte_at(i); });
        if (first != last && t.added[*first].text.size() == n + 1) found = *first;    // the shortest sorts first
    }
    return found;
}

static size_t spaces_before(std::string_view s) {    // bytes of white space at the end of s
    size_t n = 0;
    for (size_t i = s.size(); i > 0;) {
        size_t start = i - 1;
        while (start > 0 && i - start < 4 && ((uint8_t)s[start] & 0xc0) == 0x80) start--;
        int bytes;
        if (char_class(utf8_read(s, start, &bytes)) != SPACE || start + bytes != i) break;
        n += bytes, i = start;
    }
    return n;
}
static size_t spaces_after(std::string_view s) {    // bytes of white space at the start of s
    size_t n = 0;
    for (int bytes; n < s.size() && char_class(utf8_read(s, n, &bytes)) == SPACE;) n += bytes;
    return n;
}

// Leftmost, longest match first.  Control tokens are text unless parse_special, but what they cover stays whole.
static std::vector<Part> cut_added(const Tokenizer &t, const std::vector<int> &list, std::string_view text,
                                   bool parse_special) {
    std::vector<Part> parts;
    size_t done = 0;
    for (size_t i = 0; i < text.size() && !list.empty();) {
        const int found = match_added(t, list, text.substr(i));
        if (found < 0) {
            i++;
            continue;
        }
        const AddedToken &a = t.added[found];
        size_t begin = i, end = i + a.text.size();
        i = end;
        if (t.types[a.id] != TokenType::USER && !parse_special) continue;
        if (a.lstrip) begin -= std::min(begin - done, spaces_before(text.substr(done, begin - done)));
        if (a.rstrip) end += spaces_after(text.substr(end));
        if (begin > done) parts.push_back({text.substr(done, begin - done), -1});
        parts.push_back({text.substr(begin, end - begin), a.id});
        done = i = end;
    }
    if (done < text.size()) parts.push_back({text.substr(done), -1});
    return parts;
}

static std::string normalize_spm(const Tokenizer &t, std::string_view text, bool is_first) {
    std::string out;
    out.reserve(text.size() + 1);
    if (t.squeeze_spaces) text.remove_prefix(std::min(text.size(), text.find_first_not_of(' ')));
    if (text.empty()) return out;
    const bool starts_with_space = text[0] == ' ' || text.substr(0, 3) == "\u2581";
    const bool prefix = t.prefix == Prefix::EVERY || (t.prefix == Prefix::FIRST && is_first);
    if (prefix && !(t.prefix_once && starts_with_space)) out = " ";
    for (size_t i = 0; i < text.size();) {
        int bytes;
        const uint32_t c = utf8_read(text, i, &bytes);
        if (c == 0x2581) out += ' ';    // the space mark itself cannot be told from a space
        else if (c >= BAD_BYTE) out += "\ufffd";
        else if (!(c == ' ' && t.squeeze_spaces && i > 0 && text[i - 1] == ' ')) out.append(text, i, bytes);
        i += bytes;
    }
    while (t.squeeze_spaces && !out.empty() && out.back() == ' ') out.pop_back();
    return out;
}

// ---------------------------------------------------------------------------------------------------- merging

// A text while it is merged: a doubly linked list of symbols, and a queue of the pairs that may merge.
namespace {
struct Symbol {
    int id;                  // -1: a character that is no piece
    uint32_t begin, size;    // bytes of the text; size 0: merged away
    int prev, next;          // -1 none
};
struct Candidate {
    uint64_t key;     // rank << 32 | left: the lowest rank first, then the leftmost
    uint32_t size;    // of both symbols together; only ever grows, so a stale candidate has another size
    int id;           // of the union
    bool operator<(const Candidate &o) const { return key > o.key; }    // std heaps keep the largest on top
};
struct Merger {
    const Tokenizer &t;
    std::string_view text;
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
};
}    // namespace

static void add_symbol(Merger &m, int id, size_t begin, size_t size) {
    const int i = (int)m.symbols.size();
    if (i > 0) m.symbols[i - 1].next = i;
    m.symbols.push_back({id, (uint32_t)begin, (uint32_t)size, i - 1, -1});
}

static void add_candidate(Merger &m, int left) {
    if (left < 0 || m.symbols[left].next < 0) return;
    const Symbol &a = m.symbols[left], &b = m.symbols[a.next];
    const uint32_t size = a.size + b.size;
    uint64_t rank;
    int id;
    if (m.t.merge_by == MergeBy::MERGES) {
        const int merge = a.id < 0 || b.id < 0 ? -1 : find_merge(m.t, a.id, b.id);
        if (merge < 0) return;
        rank = merge, id = m.t.merges[merge].result;
    } else {
        if (size > m.t.index.longest || (id = find_piece(m.t, m.text.substr(a.begin, size))) < 0) return;
        rank = m.t.index.rank[id];
    }
    m.heap.push_back({rank << 32 | (uint32_t)left, size, id});
}

// O(n log n): every symbol is merged away once, and each merge makes at most two candidates.
static void merge_symbols(Merger &m) {
    m.heap.clear();
    for (int i = 0; i < (int)m.symbols.size(); i++) add_candidate(m, i);
    std::make_heap(m.heap.begin(), m.heap.end());
    auto add = [&](int left) {
        const size_t before = m.heap.size();
        add_candidate(m, left);
        if (m.heap.size() > before) std::push_heap(m.heap.begin(), m.heap.end());
    };
    while (!m.heap.empty()) {
        const Candidate best = m.heap.front();
        std::pop_heap(m.heap.begin(), m.heap.end());
        m.heap.pop_back();
        const int left = (int)(best.key & 0xffffffff);
        Symbol &a = m.symbols[left];
        if (a.size == 0 || a.next < 0 || a.size + m.symbols[a.next].size != best.size) continue;
        Symbol &b = m.symbols[a.next];
        a.id = best.id, a.size = best.size, a.next = b.next;
        b.size = 0;
        if (a.next >= 0) m.symbols[a.next].prev = left;
        add(a.prev);
        add(left);
    }
}

// ---------------------------------------------------------------------------------------------------- encoding

// One part of byte-level text.  A byte without a piece is dropped, as the reference implementations do.
static void encode_bytes(Merger &m, std::string_view part, std::vector<int> &out) {
    const Tokenizer &t = m.t;
    const int whole = t.ignore_merges ? find_piece(t, part) : -1;
    if (whole >= 0) return out.push_back(whole);
    m.text = part;
    m.symbols.clear();
    for (size_t i = 0; i < part.size(); i++) {
        const int id = t.index.byte_id[(uint8_t)part[i]];
        if (id >= 0) add_symbol(m, id, i, 1);
    }
    merge_symbols(m);
    for (int i = m.symbols.empty() ? -1 : 0; i >= 0; i = m.symbols[i].next) out.push_back(m.symbols[i].id);
}

static void encode_chars(Merger &m, std::string_view part, std::vector<int> &out) {
    const TokenizerIndex &x = m.t.index;
    m.text = part;
    m.symbols.clear();
    for (size_t i = 0; i < part.size();) {
        int bytes;
        utf8_read(part, i, &bytes);
        add_symbol(m, find_piece(m.t, part.substr(i, bytes)), i, bytes);
        i += bytes;
    }
    merge_symbols(m);
    bool after_unknown = false;    // characters without a piece in a row make one unknown token
    for (int i = m.symbols.empty() ? -1 : 0; i >= 0; i = m.symbols[i].next) {
        const Symbol &s = m.symbols[i];
        const bool unknown = s.id < 0 && x.byte_id[0] < 0;
        if (s.id >= 0) out.push_back(s.id);
        else if (!unknown)
            for (uint32_t j = 0; j < s.size; j++) out.push_back(x.byte_id[(uint8_t)part[s.begin + j]]);
        else if (!after_unknown) out.push_back(x.unknown);
        after_unknown = unknown;
    }
}

static void encode_plain(Merger &m, std::string_view text, std::vector<int> &out) {
    while (!text.empty()) {
        size_t n = text.size();
        if (m.t.byte_level) {
            n = split_next(m.t.split, text);
            encode_bytes(m, text.substr(0, n), out);
        } else {
            // Where no piece can hold "x " with x no space, the text falls apart there: short lists merge faster.
            if (m.t.index.cut_before_space)
                for (n = 1; n < text.size() && !(text[n] == ' ' && text[n - 1] != ' ');) n++;
            encode_chars(m, text.substr(0, n), out);
        }
        text.remove_prefix(n);
    }
}

std::vector<int> tokenizer_encode(const Tokenizer &t, std::string_view text, bool parse_special) {
    if (t.index.piece_slots.empty()) fail("tokenizer: no vocabulary was read");
    if (text.size() >= INT32_MAX) fail("text: expected less than 2 GiB, found %zu bytes", text.size());
    Merger m{t, {}, {}, {}};
    std::vector<int> ids;
    for (const Part &raw : cut_added(t, t.index.added_raw, text, parse_special)) {
        if (raw.id >= 0) {
            ids.push_back(raw.id);
            continue;
        }
        std::string owned;
        std::string_view part = raw.text;
        if (!t.byte_level) part = owned = normalize_spm(t, raw.text, raw.text.data() == text.data());
        else if (t.nfc) part = owned = normalize_nfc(raw.text);
        for (const Part &p : cut_added(t, t.index.added_normalized, part, parse_special)) {
            if (p.id >= 0) ids.push_back(p.id);
            else encode_plain(m, p.text, ids);
        }
    }
    return ids;
}

// ---------------------------------------------------------------------------------------------------- decoding

std::string tokenizer_piece(const Tokenizer &t, int id) {
    return id >= 0 && id < tokenizer_vocab(t) ? t.pieces[id] : std::string();
}

// Move whole characters from pending to the result; at the end of the text, all of it.
static std::string take_characters(std::string &pending, bool at_end) {
    std::string out;
    size_t i = 0;
    while (i < pending.size()) {
        const int n = utf8_length(std::string_view(pending).substr(i));
        if (n == 0 && !at_end) break;
        if (n > 0) out.append(pending, i, n);
        else out += "\ufffd";
        i += std::max(n, 1);
    }
    pending.erase(0, i);
    return out;
}

std::string decoder_next(Decoder &d, int id) {
    const Tokenizer &t = *d.tokenizer;
    std::string piece = tokenizer_piece(t, id);
    if (piece.empty()) return "";
    if (t.types[id] == TokenType::CONTROL) {
        if (id == t.bos) d.at_start = true;
        if (!d.show_control) return "";
    } else if (t.types[id] == TokenType::UNKNOWN) {
        piece = " \u2047 ";    // what sentencepiece prints
        d.at_start = false;
    } else if (d.at_start) {
        const bool drop = t.prefix != Prefix::NONE && t.types[id] != TokenType::BYTE && piece[0] == ' ';
        if (drop) piece.erase(0, 1);
        d.at_start = drop && piece.empty() && t.squeeze_spaces;
    }
    d.pending += piece;
    return take_characters(d.pending, false);
}

std::string decoder_flush(Decoder &d) { return take_characters(d.pending, true); }

std::string tokenizer_decode(const Tokenizer &t, const std::vector<int> &ids) {
    Decoder d{&t};
    std::string text;
    for (const int id : ids) text += decoder_next(d, id);
    return text + decoder_flush(d);
}
