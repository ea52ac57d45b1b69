// needle.h - is a word that the cache holds only as codes still found?
#pragma once
#include "meter.h"
#include "options.h"

// A trial is a stretch of the text of --ppl, -c tokens long, with " The pass key is", NEEDLE_WORDS random words of the
// vocabulary and "." put somewhere inside sealed blocks, and " The pass key is" once more at its end.  What comes next?
//
//   BOS text ... | The pass key is silver garden monday . | text ... The pass key is -> silver garden monday
//                  ^ at random, every token in a sealed block by now
//
// The loss of the words is measured, and whether they are retrieved: whether each, given those before it, is likelier than
// NEEDLE_OTHERS other words drawn at random.  Small models cannot chat, but repeating what stood behind the same words is
// what their induction heads do.  The same trial with text in the needle's place says what guessing gives.
constexpr int NEEDLE_WORDS = 3, NEEDLE_OTHERS = 9;

struct NeedleTrial {
    std::vector<int> ids;              // -c tokens, the key at the end
    std::vector<int> without;          // the same with text in the needle's place
    int begin = 0, end = 0;            // where the needle stands
    int others[NEEDLE_WORDS][NEEDLE_OTHERS];
};

// The words to draw from: tokens of the shape " word", 4 to 10 lower-case letters.
std::vector<int> needle_words(const Tokenizer &t);

// The same trials for the same text, context and seed.  Needles lie in the blocks [first, coded_end) of kv, in which every
// row of the question reads codes.
std::vector<NeedleTrial> make_trials(const Model &m, const std::vector<int> &text, int bos, const KvView &kv, int context, int n, uint64_t seed);

// The mode --ppl FILE --needle.
void needle(const Model &m, const Ops &ops, const Options &o);
