// unicode.h - UTF-8, character classes and normalisation form C: what tokenizers need of Unicode 16 and no more.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

// A byte b that belongs to no character travels as the code point BAD_BYTE + b: in no class, and written back as that byte.
constexpr uint32_t BAD_BYTE = 0x110000;

// Bytes of the character at the start of s; 0 when s ends before the character does; -1 when it cannot be one.
// Overlong forms, surrogates and code points above 10ffff are no characters.
int utf8_length(std::string_view s);

// The code point at s[at] and, in *bytes, its length; BAD_BYTE + byte and 1 where there is no whole character.
uint32_t utf8_read(std::string_view s, size_t at, int *bytes);
void utf8_append(std::string &out, uint32_t c);

enum CharClass : uint8_t { OTHER, LETTER, NUMBER, SPACE };    // \p{L}, \p{N}, \s, none of them
CharClass char_class(uint32_t c);

// Canonical composition: "e" + U+0301 becomes U+00E9.  O(n log n) for any input.
std::string normalize_nfc(std::string_view s);
