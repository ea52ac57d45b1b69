// needle.h - is a word that the cache holds only as codes still found?
#pragma once
#include "meter.h"
#include "options.h"

// A trial is a stretch of the text of --ppl, -c tokens long, with a sentence that names a king put somewhere inside sealed
// blocks, and the same sentence once more at its end.  What comes next?
//
//   BOS text ... The name of the king was Robert Alice Moore. text ... The name of the king was -> Robert Alice Moore
//                ^ at random; every token is in a sealed block when the question comes
//
// The loss of the name is measured, and whether it is retrieved: whether each of its words, given those before it, is
// likelier than NEEDLE_OTHERS other words drawn at random.  Small models cannot chat, but repeating what stood behind the
// same words is what their induction heads do, and names are what they repeat best: books-46m finds 80% of such words, of
// a pass key of words without capitals 40%.  The same trial with text in the needle's place says what guessing gives.
constexpr int NEEDLE_WORDS = 3, NEEDLE_OTHERS = 9;

struct NeedleTrial {
    std::vector<int> ids;              // -c tokens, the key at the end
    std::vector<int> without;          // the same with text in the needle's place
    int begin = 0, end = 0;            // where the needle stands
    int others[NEEDLE_WORDS][NEEDLE_OTHERS];
};

// The words to draw from: tokens of the shape " Name", 4 to 10 letters.
std::vector<int> needle_words(const Tokenizer &t);

// The same trials for the same text, context and seed.  Needles lie in the blocks [first, coded_end) of kv, in which every
// row of the question reads codes, in every layer.
std::vector<NeedleTrial> make_trials(const Model &m, const std::vector<int> &text, int bos, const KvView &kv, int context, int n, uint64_t seed);

// The mode --ppl FILE --needle.
void needle(const Model &m, const Ops &ops, const Options &o);
