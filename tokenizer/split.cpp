// split.cpp - see split.h.
#include "split.h"
#include "unicode.h"

namespace {
// A place in the text and the character there; past the end, bytes is 0.
struct Cursor {
    std::string_view text;
    size_t at = 0;
    uint32_t c = 0;
    CharClass cls = OTHER;
    int bytes = 0;
    Cursor(std::string_view text, size_t at) : text(text), at(at) { read(); }
    void read() {
        bytes = 0;
        if (at >= text.size()) return;
        c = utf8_read(text, at, &bytes);
        cls = char_class(c);
    }
    void next() { at += bytes, read(); }
    bool is(CharClass x) const { return bytes > 0 && cls == x; }
    bool is_newline() const { return bytes > 0 && (c == '\r' || c == '\n'); }
};
}    // namespace

// \p{L}+, \p{N}+ or [^\s\p{L}\p{N}]+ from here: where it ends.
static Cursor run_end(Cursor p, CharClass cls) {
    while (p.is(cls)) p.next();
    return p;
}

// Bytes of an English contraction at the start of the text, 0 if there is none.
static size_t contraction(std::string_view text, bool any_case) {
    if (text.size() < 2 || text[0] != '\'') return 0;
    const auto letter = [&](size_t i) {
        const char c = i < text.size() ? text[i] : '\0';
        return any_case && c >= 'A' && c <= 'Z' ? (char)(c | 32) : c;
    };
    const char a = letter(1), b = letter(2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    if (any_case && text.substr(1, 2) == "\u017f") return 3;    // the long s is an s in another case
    return 0;
}

// White space from p up to `end`, where the run of white space ends.  \s+(?!\S) leaves the last character to the next part
// unless the text ends here; a run of one is taken by \s+.
static size_t space_end(Cursor p, const Cursor &end, bool text_ends) {
    if (text_ends) return end.at;
    size_t last = p.at;
    int count = 0;
    for (; p.at < end.at; p.next(), count++) last = p.at;
    return count > 1 ? last : end.at;
}

static size_t split_gpt2(std::string_view text, bool digits_alone) {
    if (const size_t n = contraction(text, false)) return n;
    Cursor p(text, 0), word = p;
    if (digits_alone && p.is(NUMBER)) return p.bytes;
    if (p.c == ' ') word.next();    // " ?" in front of letters, numbers or the rest
    if (word.bytes && word.cls != SPACE && !(digits_alone && word.cls == NUMBER)) return run_end(word, word.cls).at;
    const Cursor end = run_end(p, SPACE);
    return space_end(p, end, end.bytes == 0 || (digits_alone && end.is(NUMBER)));    // digits_gpt2 cuts at a number first
}

static size_t split_llama3(std::string_view text, int max_digits) {
    if (const size_t n = contraction(text, true)) return n;
    Cursor p(text, 0), second = p;
    second.next();
    if (p.is(LETTER)) return run_end(p, LETTER).at;
    if (!p.is_newline() && !p.is(NUMBER) && second.is(LETTER)) return run_end(second, LETTER).at;
    if (p.is(NUMBER)) {
        for (int i = 0; i < max_digits && p.is(NUMBER); i++) p.next();
        return p.at;
    }
    const Cursor word = p.c == ' ' ? second : p;
    if (word.is(OTHER)) {
        Cursor end = run_end(word, OTHER);
        while (end.is_newline()) end.next();
        return end.at;
    }
    // White space.  \s*[\r\n]+ reaches up to the last line end of the run.
    Cursor end = p;
    size_t after_newline = 0;
    while (end.is(SPACE)) {
        const bool newline = end.is_newline();
        end.next();
        if (newline) after_newline = end.at;
    }
    return after_newline ? after_newline : space_end(p, end, end.bytes == 0);
}

size_t split_next(SplitRule rule, std::string_view text) {
    switch (rule) {
    case SplitRule::GPT2: return split_gpt2(text, false);
    case SplitRule::DIGITS_GPT2: return split_gpt2(text, true);
    case SplitRule::LLAMA3: return split_llama3(text, 3);
    case SplitRule::QWEN2: return split_llama3(text, 1);
    case SplitRule::NONE: break;
    }
    return text.size();
}

SplitRule split_rule_of_regex(std::string_view regex) {
    static const char tail[] = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
    static const std::string head = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|)";
    if (regex == head + R"(\p{N}{1,3})" + tail) return SplitRule::LLAMA3;
    if (regex == head + R"(\p{N})" + tail) return SplitRule::QWEN2;
    if (regex == R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)") return SplitRule::GPT2;
    return SplitRule::NONE;
}
