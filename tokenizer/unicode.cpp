// unicode.cpp - see unicode.h.
#include "unicode.h"
#include <algorithm>
#include <iterator>
#include <vector>

struct CodeRange {
    uint32_t first, last;
};
struct CombiningRange {
    uint32_t first, last;
    int order;
};
struct Decomposition {
    uint32_t c, a, b;
};
struct Composition {
    uint32_t a, b, c;
};
#include "unicode.inc"

int utf8_length(std::string_view s) {
    const uint8_t lead = s[0];
    if (lead < 0x80) return 1;
    const int n = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4) return -1;
    // The second byte alone tells overlong forms, surrogates and code points beyond the last one.
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < n; i++, low = 0x80, high = 0xbf) {
        if (i >= (int)s.size()) return 0;
        const uint8_t b = s[i];
        if (b < low || b > high) return -1;
    }
    return n;
}

uint32_t utf8_read(std::string_view s, size_t at, int *bytes) {
    const uint8_t *p = (const uint8_t *)s.data() + at;
    const int n = utf8_length(s.substr(at, 4));
    *bytes = n > 0 ? n : 1;
    if (n == 1) return p[0];
    if (n == 2) return (p[0] & 31u) << 6 | (p[1] & 63u);
    if (n == 3) return (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u);
    if (n == 4) return (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
    return BAD_BYTE + p[0];
}

void utf8_append(std::string &out, uint32_t c) {
    if (c >= BAD_BYTE) {
        out += (char)(c - BAD_BYTE);
    } else if (c < 0x80) {
        out += (char)c;
    } else {    // the lead byte tells the length, then six bits a byte
        const int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4, lead = n == 2 ? 0xc0 : n == 3 ? 0xe0 : 0xf0;
        out += (char)(lead | c >> 6 * (n - 1));
        for (int i = n - 2; i >= 0; i--) out += (char)(0x80 | (c >> 6 * i & 63));
    }
}

// The row of a sorted table of ranges that holds c, or null.
template <class Row, size_t n> static const Row *find_range(const Row (&rows)[n], uint32_t c) {
    const Row *r = std::upper_bound(rows, rows + n, c, [](uint32_t c, const Row &row) { return c < row.first; });
    return r != rows && c <= r[-1].last ? r - 1 : nullptr;
}

CharClass char_class(uint32_t c) {
    if (c < 0x80) {
        if ((c | 32) >= 'a' && (c | 32) <= 'z') return LETTER;
        if (c >= '0' && c <= '9') return NUMBER;
        return c == ' ' || (c >= 9 && c <= 13) ? SPACE : OTHER;
    }
    if (c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
        c == 0x205f || c == 0x3000)
        return SPACE;
    return find_range(LETTERS, c) ? LETTER : find_range(NUMBERS, c) ? NUMBER : OTHER;
}

// Hangul syllables are arithmetic: S + (lead * 21 + vowel) * 28 + tail.
constexpr uint32_t HANGUL_S = 0xac00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11a7;
constexpr uint32_t HANGUL_LS = 19, HANGUL_VS = 21, HANGUL_TS = 28, HANGUL_ALL = HANGUL_LS * HANGUL_VS * HANGUL_TS;

static int combining_order(uint32_t c) {
    const CombiningRange *r = c < 0x300 ? nullptr : find_range(COMBINING, c);
    return r ? r->order : 0;
}

static void append_decomposed(std::vector<uint32_t> &out, uint32_t c) {
    if (c - HANGUL_S < HANGUL_ALL) {
        const uint32_t s = c - HANGUL_S, tail = s % HANGUL_TS;
        out.push_back(HANGUL_L + s / (HANGUL_VS * HANGUL_TS));
        out.push_back(HANGUL_V + s / HANGUL_TS % HANGUL_VS);
        if (tail) out.push_back(HANGUL_T + tail);
        return;
    }
    const Decomposition *d = std::lower_bound(std::begin(DECOMPOSITIONS), std::end(DECOMPOSITIONS), c,
                                              [](const Decomposition &d, uint32_t c) { return d.c < c; });
    if (c < 0xc0 || d == std::end(DECOMPOSITIONS) || d->c != c) return out.push_back(c);
    append_decomposed(out, d->a);    // at most four steps deep: the first part may decompose again
    if (d->b) out.push_back(d->b);
}

// The character that a and b make, 0 if none.
static uint32_t compose_pair(uint32_t a, uint32_t b) {
    if (a - HANGUL_L < HANGUL_LS && b - HANGUL_V < HANGUL_VS)
        return HANGUL_S + ((a - HANGUL_L) * HANGUL_VS + (b - HANGUL_V)) * HANGUL_TS;
    if (a - HANGUL_S < HANGUL_ALL && (a - HANGUL_S) % HANGUL_TS == 0 && b - HANGUL_T - 1 < HANGUL_TS - 1)
        return a + (b - HANGUL_T);
    const uint64_t key = (uint64_t)a << 32 | b;
    const auto before = [](const Composition &c, uint64_t key) { return ((uint64_t)c.a << 32 | c.b) < key; };
    const Composition *c = std::lower_bound(std::begin(COMPOSITIONS), std::end(COMPOSITIONS), key, before);
    return c != std::end(COMPOSITIONS) && c->a == a && c->b == b ? c->c : 0;
}

std::string normalize_nfc(std::string_view s) {
    // Nothing below U+0300 (lead byte cc) combines with anything before it, so such a text is already composed.
    if (std::all_of(s.begin(), s.end(), [](char b) { return (uint8_t)b < 0xcc; })) return std::string(s);

    std::vector<uint32_t> chars;
    for (size_t i = 0; i < s.size();) {
        int n;
        append_decomposed(chars, utf8_read(s, i, &n));
        i += n;
    }
    // Canonical order: each run of marks sorted by its combining order, equal ones as they were.
    std::vector<std::pair<int, uint32_t>> run;
    for (size_t i = 0, end; i < chars.size(); i = end) {
        end = i + 1;
        int order = combining_order(chars[i]);
        if (order == 0) continue;
        run.assign(1, {order, chars[i]});
        for (; end < chars.size() && (order = combining_order(chars[end])); end++) run.push_back({order, chars[end]});
        std::stable_sort(run.begin(), run.end(), [](const auto &a, const auto &b) { return a.first < b.first; });
        for (size_t j = 0; j < run.size(); j++) chars[i + j] = run[j].second;
    }
    // Join each character to the last starter (order 0) unless something of the same or a higher order lies between.
    size_t count = 0, starter = (size_t)-1;
    int last_order = -1;    // of what was kept since the starter; -1 nothing
    for (const uint32_t c : chars) {
        const int order = combining_order(c);
        const uint32_t joined = starter != (size_t)-1 && last_order < order ? compose_pair(chars[starter], c) : 0;
        if (joined) {
            chars[starter] = joined;
            continue;
        }
        if (order == 0) starter = count, last_order = -1;
        else last_order = order;
        chars[count++] = c;
    }
    std::string out;
    for (size_t i = 0; i < count; i++) utf8_append(out, chars[i]);
    return out;
}
