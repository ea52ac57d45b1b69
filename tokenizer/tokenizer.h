// tokenizer.h - text <-> token ids.  The two families that LLaMA-type models use, both of them byte-pair encoding:
//
//                   SPM (Llama 1/2, Mistral, TinyLlama, Phi-3)      byte level (GPT-2, Llama 3, Qwen2, SmolLM)
//   normalise       " Hello world" (a space in front)               as it is (Qwen2: Unicode NFC)
//   split           one run, the whole text                         "Hello" " world" (split.h: the rule of the model)
//   first symbols   characters: ' ' 'H' 'e' 'l' 'l' 'o' ...         bytes: 48 65 6c 6c 6f | 20 77 6f ...
//   merge           the pair whose union has the best score,        the pair that comes first in the list of merges,
//                   leftmost first, until no pair is a piece        leftmost first, until no pair is listed
//   left over       a character without a piece becomes its bytes   a byte without a piece is dropped, as the reference
//                   ("<0xC3>" "<0xA9>"), or <unk> if there are none  does (SmolLM lacks 21 that text hardly holds)
//
// Added tokens ("<s>", "<|im_end|>") are cut out before all that: leftmost, longest match; they are never split.
// Encoding costs O(n log n) for any input: a linked list of symbols and a queue of the pairs that may merge.
//
// A piece is stored as the bytes it prints: the SPM space mark U+2581 is a space here, "<0x0A>" a line feed, and the
// letters that byte-level files use for bytes are undone.  Input that is not UTF-8: a byte-level tokenizer keeps the bytes
// as they are; SPM reads each bad byte as U+FFFD, as sentencepiece does.
//
// The JSON text in a model file (tokenizer_to_json): one object, all fields present, no others.
//
//   field            type        meaning and legal values
//   kind             string      "spm" | "byte_level"
//   merge_by         string      "scores" the union with the highest score first (spm) | "ids" the union with the lowest
//                                id first (tiktoken ranks) | "merges" the pair that is listed first
//   split            string      "none" | "gpt2" | "llama3" | "qwen2" | "digits_gpt2" (split.h); spm: only "none"
//   prefix           string      the space in front of a text (spm): "none" | "first" only before the first part |
//                                "every" before every part between added tokens
//   prefix_once      bool        a text that begins with a space gets no second one
//   squeeze_spaces   bool        runs of spaces count as one, none at the ends (spm)
//   nfc              bool        Unicode normalisation form C first (byte_level)
//   ignore_merges    bool        a whole part that is a piece is taken at once, without merging
//   bos              int         id, -1 none
//   eos              [int]       ids, no duplicates
//   add_bos          bool        the model expects bos before a text; needs bos >= 0
//   chat_template    string      Jinja source as the model's makers wrote it, "" none
//   pieces           string      V entries with one space between two: the bytes of id 0, 1, ..., each byte as the letter
//                                that GPT-2 gave it: 21-7e, a1-ac, ae-ff stand for themselves (U+00xx), the other 68 are
//                                U+0100, U+0101, ... in increasing order, so a space is U+0120.  An entry may be empty
//   types            string      V letters: n normal | u unknown | c control | d user-defined | b byte | x unused.
//                                Normal pieces are distinct; unused ones are empty; spm has all 256 byte pieces or none,
//                                and exactly one unknown; byte_level has neither bytes nor unknown
//   scores           string      V finite numbers with one space between two; "" unless merge_by is "scores"
//   merges           string      "left right left right ...": ids; the bytes of left + right are a normal piece; no pair
//                                twice; "" unless merge_by is "merges"
//   added            [array]     [id, text, flags]: text in letters, as in pieces; flags: any of "n" (looked for after
//                                normalisation), "l", "r" (takes the white space on its left, right), each at most once.
//                                Types u, c and d only, distinct texts
//
// The long lists are strings because a general JSON parser takes 0.2 s for 280,000 merges as numbers, 0.02 s so.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>
#include "base.h"

enum class TokenType : uint8_t { NORMAL, UNKNOWN, CONTROL, USER, BYTE, UNUSED };
enum class MergeBy : uint8_t { SCORES, IDS, MERGES };
enum class SplitRule : uint8_t { NONE, GPT2, LLAMA3, QWEN2, DIGITS_GPT2 };
enum class Prefix : uint8_t { NONE, FIRST, EVERY };

struct Merge { int left, right, result; };

struct AddedToken {
    int id;
    std::string text;           // the bytes to look for
    bool normalized = false;    // in the normalised text; else in the text as it was given
    bool lstrip = false, rstrip = false;
};

// Lookup tables over the fields of a Tokenizer; built by tokenizer_index, never stored.
struct TokenizerIndex {
    std::vector<int> piece_slots, merge_slots;    // open addressing, a power of two; -1 is empty
    std::vector<int> rank;                        // of a piece, 0 merges first (merge_by scores, ids)
    int byte_id[256];                             // -1 none
    int unknown = -1;
    size_t longest = 0;                              // bytes of the longest normal piece
    bool cut_before_space = false;                   // no piece holds a space after another character
    std::vector<int> added_raw, added_normalized;    // indices into added, sorted by text
};

struct Tokenizer {
    bool byte_level = false;
    MergeBy merge_by = MergeBy::SCORES;
    SplitRule split = SplitRule::NONE;
    Prefix prefix = Prefix::NONE;
    bool prefix_once = false, squeeze_spaces = false, nfc = false, ignore_merges = false;
    int bos = -1;
    std::vector<int> eos;
    bool add_bos = false;
    std::string chat_template;
    std::vector<std::string> pieces;    // (V)
    std::vector<TokenType> types;       // (V)
    std::vector<float> scores;          // (V) or empty
    std::vector<Merge> merges;          // first merges first
    std::vector<AddedToken> added;
    TokenizerIndex index;
};

// Read the files of others: a file (sentencepiece tokenizer.model, tiktoken ranks, tokenizer.json, llama2.c
// tokenizer.bin; told apart by content) or a folder that holds tokenizer.json, tokenizer.model or vocab.json + merges.txt,
// with bos, eos, add_bos and chat_template from the *_config.json files beside them.  What cannot be done exactly is refused
// by name.  A tokenizer.json alone does not tell eos: name its folder.
Tokenizer tokenizer_import(const std::string &path);

// The form kept in a model file, see the table above.  Reading checks every field; `where` names the file in errors.
std::string tokenizer_to_json(const Tokenizer &t);
Tokenizer tokenizer_from_json(const std::string &json, const std::string &where);

int tokenizer_vocab(const Tokenizer &t);
const char *tokenizer_kind(const Tokenizer &t);    // "spm" or "byte_level"

// Ids of a text, without bos: the caller puts t.bos first when t.add_bos.  parse_special: control tokens written out in the
// text ("<|im_start|>") become their ids; user-defined tokens always do.
std::vector<int> tokenizer_encode(const Tokenizer &t, std::string_view text, bool parse_special);

// Id of an added token by its text, -1 if there is none.
int tokenizer_find(const Tokenizer &t, std::string_view text);

// The bytes of one token, control tokens with their text; "" for an id that the vocabulary does not name (models pad it).
std::string tokenizer_piece(const Tokenizer &t, int id);

// Text from ids one at a time, whole UTF-8 characters only: bytes wait until their character is complete.  A byte that can
// no longer become part of a character is given out as U+FFFD.  Control tokens print nothing unless show_control.
// at_start: the next piece opens a text, so the space that encoding put in front of it is dropped (so it is after bos).
struct Decoder {
    const Tokenizer *tokenizer;
    bool at_start = true, show_control = false;
    std::string pending = {};    // the bytes of an incomplete character, at most 3
};
std::string decoder_next(Decoder &d, int id);
std::string decoder_flush(Decoder &d);    // at the end: what is still pending, as U+FFFD

std::string tokenizer_decode(const Tokenizer &t, const std::vector<int> &ids);    // all of it, from the start

// Build t.index and check what the table above promises; import and from_json call it.
void tokenizer_index(Tokenizer &t, const std::string &where);
