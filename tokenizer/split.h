// split.h - the rule that cuts a text into parts before byte-level merging; no merge crosses a cut.
//
// The rules are given by their makers as regular expressions (Unicode classes; \s is white space, (?!\S) "no other
// character follows"):
//
//   gpt2          's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   digits_gpt2   each \p{N} alone, gpt2 on what lies between (SmolLM)
//   llama3        (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
//                 |\s+(?!\S)|\s+
//   qwen2         llama3 with \p{N} in place of \p{N}{1,3}
//
//   text      "I'll  pay 1234\n\n now"
//   gpt2      I | 'll | ␣ | ␣pay | ␣1234 | \n\n | ␣now       the last of a run of spaces goes with the word
//   llama3    I | 'll | ␣ | ␣pay | ␣ | 123 | 4 | \n\n | ␣now
//
// Here they are written out over code points: linear time, no backtracking.  A byte that is not UTF-8 counts as one
// character of no class.
#pragma once
#include <string_view>
#include "tokenizer.h"

// Bytes of the first part of a text that is not empty.
size_t split_next(SplitRule rule, std::string_view text);

// The regular expression of a rule as tokenizer files spell it; NONE if it is not one of ours.
SplitRule split_rule_of_regex(std::string_view regex);
