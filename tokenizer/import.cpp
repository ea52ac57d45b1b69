// import.cpp - readers of tokenizer files that stand alone: sentencepiece, llama2.c, tiktoken.  import_hf.cpp reads those of
// Hugging Face.  Each opens with the layout it reads.
#include <sys/stat.h>
#include <algorithm>
#include <fstream>
#include "formats.h"

using namespace formats;

bool formats::file_exists(const std::string &path) {
    struct stat s;
    return stat(path.c_str(), &s) == 0;
}

std::string formats::read_file(const std::string &path) {
    struct stat s;
    if (stat(path.c_str(), &s) != 0 || !S_ISREG(s.st_mode)) fail("%s: expected a file", path.c_str());
    constexpr long limit = 256L << 20;    // the largest we know have 20 MB; somebody names a checkpoint by mistake
    if (s.st_size > limit) refuse("%s: %lld bytes are too many for a tokenizer", path.c_str(), (long long)s.st_size);
    std::string bytes((size_t)s.st_size, '\0');
    if (!std::ifstream(path, std::ios::binary).read(&bytes[0], s.st_size)) fail("%s: cannot read this file", path.c_str());
    return bytes;
}

// Give an id its added token; a later name replaces an earlier one (Llama 3.1 renames tokens that Llama 3 reserved).  Ids
// may leave a gap, which becomes unused; a wild id is an error, not an allocation.
void formats::add_token(Tokenizer &t, const AddedToken &token, TokenType type, const std::string &where) {
    if (token.id < 0 || token.id > tokenizer_vocab(t) + 65536)
        fail("%s: added token \"%s\": expected an id in [0, %d], found %d", where.c_str(), shown(token.text).c_str(),
             tokenizer_vocab(t) + 65536, token.id);
    const auto known = std::find_if(t.added.begin(), t.added.end(), [&](const AddedToken &a) { return a.id == token.id; });
    if (known != t.added.end() && t.pieces[token.id] == token.text) return;
    if (known != t.added.end()) t.added.erase(known);
    if (token.id >= tokenizer_vocab(t)) {
        t.pieces.resize(token.id + 1);
        t.types.resize(token.id + 1, TokenType::UNUSED);
        if (t.merge_by == MergeBy::SCORES) t.scores.resize(token.id + 1, 0.0f);
    }
    t.pieces[token.id] = token.text;
    t.types[token.id] = type;
    t.added.push_back(token);
}

int formats::byte_of_name(const std::string &name) {
    unsigned b = 256;
    return sscanf(name.c_str(), "<0x%2X>", &b) == 1 && b < 256 && name == strf("<0x%02X>", b) ? (int)b : -1;
}

std::string formats::spaces_of_marks(std::string_view piece) {
    std::string out;
    for (size_t i = 0; i < piece.size(); i++) {
        if (piece.substr(i, 3) == "\u2581") out += ' ', i += 2;
        else out += piece[i];
    }
    return out;
}

// ---------------------------------------------------------------------------------------------------- sentencepiece
//
//   A protobuf message is a row of fields: varint (number << 3 | wire), then by wire: 0 varint, 1 eight bytes, 2 varint
//   length and that many bytes, 5 four bytes.  A varint has 7 bits a byte, lowest first, the top bit says "more".
//
//   ModelProto   1 piece (repeated) { 1 bytes, 2 score f32, 3 type }    2 trainer    3 normalizer    5 denormalizer
//   trainer      3 model_type    24 whitespace as suffix    35 byte_fallback    41 bos_id    42 eos_id
//   normalizer   1 name    2 character map    3 add_dummy_prefix    4 remove_extra_whitespaces    5 escape_whitespaces
//   A field that is absent has the default given below.

struct ProtoReader {
    std::string_view rest;
    const char *where;
    int field = 0, wire = 0;
    uint64_t number = 0;            // wires 0 and 5
    std::string_view bytes = {};    // wire 2
};

static uint64_t read_varint(ProtoReader &r) {
    uint64_t v = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (r.rest.empty()) break;
        const uint8_t b = r.rest[0];
        r.rest.remove_prefix(1);
        v |= (uint64_t)(b & 127) << shift;
        if (b < 128) return v;
    }
    fail("%s: sentencepiece model: the file ends inside a number", r.where);
}

static std::string_view read_bytes(ProtoReader &r, uint64_t n) {
    if (n > r.rest.size())
        fail("%s: sentencepiece model: field %d: expected %llu bytes, found %zu", r.where, r.field, (unsigned long long)n,
             r.rest.size());
    const std::string_view bytes = r.rest.substr(0, n);
    r.rest.remove_prefix(n);
    return bytes;
}

static bool next_field(ProtoReader &r) {
    if (r.rest.empty()) return false;
    const uint64_t tag = read_varint(r);
    r.field = (int)(tag >> 3 & 0x1fffffff), r.wire = tag & 7;
    if (r.wire == 0) r.number = read_varint(r);
    else if (r.wire == 1) read_bytes(r, 8);
    else if (r.wire == 2) r.bytes = read_bytes(r, read_varint(r));
    else if (r.wire == 5) {
        const std::string_view b = read_bytes(r, 4);
        r.number = (uint8_t)b[0] | (uint8_t)b[1] << 8 | (uint8_t)b[2] << 16 | (uint32_t)(uint8_t)b[3] << 24;
    } else fail("%s: sentencepiece model: field %d: expected wire type 0, 1, 2 or 5, found %d", r.where, r.field, r.wire);
    return true;
}

static void add_sentencepiece(Tokenizer &t, std::string_view message, const char *where) {
    enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };
    std::string name;
    float score = 0;
    uint64_t type = NORMAL;
    for (ProtoReader r{message, where}; next_field(r);) {
        if (r.field == 1 && r.wire == 2) name = r.bytes;
        else if (r.field == 2 && r.wire == 5) score = bits_to_f32((uint32_t)r.number);
        else if (r.field == 3 && r.wire == 0) type = r.number;
    }
    const int id = tokenizer_vocab(t), byte = byte_of_name(name);
    t.scores.push_back(score);
    t.pieces.push_back(spaces_of_marks(name));
    t.types.push_back(TokenType::NORMAL);
    if (type == NORMAL) return;
    if (type == BYTE) {
        if (byte < 0)
            fail("%s: piece %d: expected a byte from <0x00> to <0xFF>, found \"%s\"", where, id, shown(name).c_str());
        t.types[id] = TokenType::BYTE;
        t.pieces[id] = std::string(1, (char)byte);
    } else if (type == UNKNOWN || type == CONTROL) {
        add_token(t, {id, name}, type == UNKNOWN ? TokenType::UNKNOWN : TokenType::CONTROL, where);
    } else if (type == USER_DEFINED) {
        add_token(t, {id, t.pieces[id], true}, TokenType::USER, where);    // found after spaces became marks
    } else if (type == UNUSED) {
        refuse("%s: piece %d: unused pieces are not supported", where, id);
    } else {
        fail("%s: piece %d: expected a type from 1 to 6, found %llu", where, id, (unsigned long long)type);
    }
}

static Tokenizer import_sentencepiece(std::string_view file, const char *where) {
    Tokenizer t;
    std::string_view trainer, normalizer, denormalizer;
    for (ProtoReader r{file, where}; next_field(r);) {
        if (r.field == 1 && r.wire == 2) add_sentencepiece(t, r.bytes, where);
        else if (r.field == 2 && r.wire == 2) trainer = r.bytes;
        else if (r.field == 3 && r.wire == 2) normalizer = r.bytes;
        else if (r.field == 5 && r.wire == 2) denormalizer = r.bytes;
    }
    uint64_t model_type = 1, byte_fallback = 0, suffix = 0;
    int64_t bos = 1, eos = 2;
    for (ProtoReader r{trainer, where}; next_field(r);) {
        if (r.wire != 0) continue;
        if (r.field == 3) model_type = r.number;
        else if (r.field == 24) suffix = r.number;
        else if (r.field == 35) byte_fallback = r.number;
        else if (r.field == 41) bos = (int64_t)r.number;
        else if (r.field == 42) eos = (int64_t)r.number;
    }
    static const char *const models[] = {"?", "Unigram", "BPE", "Word", "Char"};
    if (model_type != 2)
        refuse("%s: sentencepiece model type %s: only BPE is supported", where, models[model_type < 5 ? model_type : 0]);
    if (suffix) refuse("%s: sentencepiece option treat_whitespace_as_suffix is not supported", where);
    std::string name = "unnamed";
    bool has_map = false, add_prefix = true, escape = true;
    t.squeeze_spaces = true;
    for (ProtoReader r{normalizer, where}; next_field(r);) {
        if (r.field == 1 && r.wire == 2) name = r.bytes;
        else if (r.field == 2 && r.wire == 2) has_map = !r.bytes.empty();
        else if (r.field == 3 && r.wire == 0) add_prefix = r.number;
        else if (r.field == 4 && r.wire == 0) t.squeeze_spaces = r.number;
        else if (r.field == 5 && r.wire == 0) escape = r.number;
    }
    if (has_map) refuse("%s: sentencepiece normaliser %s: only identity is supported", where, shown(name).c_str());
    for (ProtoReader r{denormalizer, where}; next_field(r);)
        if (r.field == 2 && !r.bytes.empty()) refuse("%s: sentencepiece denormaliser is not supported", where);
    if (!escape) refuse("%s: sentencepiece option escape_whitespaces off is not supported", where);

    const int V = tokenizer_vocab(t);
    if (bos >= V || eos >= V) fail("%s: bos, eos: expected ids below %d, found %d and %d", where, V, (int)bos, (int)eos);
    t.prefix = add_prefix ? Prefix::EVERY : Prefix::NONE;
    t.bos = bos < 0 ? -1 : (int)bos;
    if (eos >= 0) t.eos = {(int)eos};
    t.add_bos = t.bos >= 0;
    tokenizer_index(t, where);
    if (byte_fallback && t.index.byte_id[0] < 0) fail("%s: byte_fallback: expected 256 byte pieces, found none", where);
    return t;
}

// ---------------------------------------------------------------------------------------------------- Llama 3's tokens

// The 256 tokens that follow the 128000 ranks of Llama 3.
void formats::add_llama3_tokens(Tokenizer &t, const std::string &where) {
    constexpr int RANKS = 128000;
    std::vector<std::string> names(256);
    names[0] = "<|begin_of_text|>", names[1] = "<|end_of_text|>";
    names[6] = "<|start_header_id|>", names[7] = "<|end_header_id|>", names[9] = "<|eot_id|>";
    for (int i = 0, reserved = 0; i < 256; i++) {
        if (names[i].empty()) names[i] = strf("<|reserved_special_token_%d|>", reserved++);
        add_token(t, {RANKS + i, names[i]}, TokenType::CONTROL, where);
    }
    t.split = SplitRule::LLAMA3;
    t.ignore_merges = true;
    t.bos = RANKS, t.add_bos = true;
    t.eos = {RANKS + 1, RANKS + 9};
}

// ---------------------------------------------------------------------------------------------------- llama2.c
//
//   u32 max_token_length, then for each id: f32 score, i32 length, bytes (U+2581 already a space).  Ids 0 unknown, 1 bos,
//   2 eos, 3-258 the bytes "<0x00>" to "<0xFF>".  Forks for Llama 3 write its ranks in this form, with score = id.

static uint32_t read_u32(std::string_view s, size_t at) {
    uint32_t u;
    memcpy(&u, s.data() + at, 4);    // both are little-endian
    return u;
}

static Tokenizer import_llama2c(std::string_view file, const char *where) {
    Tokenizer t;
    const uint32_t longest = read_u32(file, 0);
    bool ranks = true;
    for (size_t at = 4; at < file.size();) {
        const int id = tokenizer_vocab(t);
        if (file.size() - at < 8)
            fail("%s: token %d: expected 8 bytes of score and length, found %zu", where, id, file.size() - at);
        const float score = bits_to_f32(read_u32(file, at));
        const int32_t size = (int32_t)read_u32(file, at + 4);
        at += 8;
        if (size < 0 || (uint32_t)size > longest || (size_t)size > file.size() - at)
            fail("%s: token %d: expected a length from 0 to %u within the file, found %d", where, id, longest, size);
        t.pieces.emplace_back(file.substr(at, size));
        t.scores.push_back(score);
        ranks = ranks && score == (float)id;
        at += size;
    }
    const int V = tokenizer_vocab(t);
    if (V > 128000 && ranks) {
        t.byte_level = true;
        t.merge_by = MergeBy::IDS;
        t.pieces.resize(128000);    // the names that follow are the ones we know
        t.types.assign(128000, TokenType::NORMAL);
        t.scores.clear();
        add_llama3_tokens(t, where);
    } else {
        if (V < 259) fail("%s: expected at least 259 tokens (unknown, bos, eos, 256 bytes), found %d", where, V);
        t.types.assign(V, TokenType::NORMAL);
        for (int id = 3; id < 259; id++) {
            if (byte_of_name(t.pieces[id]) != id - 3)
                fail("%s: token %d: expected <0x%02X>, found \"%s\"", where, id, id - 3, shown(t.pieces[id]).c_str());
            t.types[id] = TokenType::BYTE;
            t.pieces[id] = std::string(1, (char)(id - 3));
        }
        static const char *const names[] = {"<unk>", "<s>", "</s>"};
        for (int id = 0; id < 3; id++) {
            t.pieces[id] = names[id];    // the exporter puts line feeds around two of them
            add_token(t, {id, names[id]}, id == 0 ? TokenType::UNKNOWN : TokenType::CONTROL, where);
        }
        t.prefix = Prefix::EVERY;
        t.bos = 1, t.eos = {2}, t.add_bos = true;
    }
    tokenizer_index(t, where);
    return t;
}

// ---------------------------------------------------------------------------------------------------- tiktoken
//
//   One line a token: its bytes in base64, a space, its rank; the rank is the id.

static int base64_value(char c) {
    static const std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    return c ? (int)alphabet.find(c) : -1;
}

// Bytes of a base64 word, false if it is none.
static bool read_base64(std::string_view word, std::string *bytes) {
    bytes->clear();
    if (word.empty() || word.size() % 4) return false;
    uint32_t bits = 0, count = 0;
    const size_t digits = word.size() - (word.back() == '=') - (word.substr(word.size() - 2) == "==");
    for (size_t i = 0; i < digits; i++) {
        const int v = base64_value(word[i]);
        if (v < 0) return false;
        bits = bits << 6 | (uint32_t)v;
        if ((count += 6) >= 8) *bytes += (char)(bits >> (count -= 8));
    }
    return true;
}

static Tokenizer import_tiktoken(std::string_view file, const char *where) {
    Tokenizer t;
    t.byte_level = true;
    t.merge_by = MergeBy::IDS;
    while (!file.empty()) {
        const std::string_view line = file.substr(0, file.find('\n'));
        file.remove_prefix(std::min(file.size(), line.size() + 1));
        if (line.empty()) continue;
        const int rank = tokenizer_vocab(t);
        const size_t space = std::min(line.find(' '), line.size());
        std::string bytes, digits(line.substr(std::min(space + 1, line.size())));
        if (!digits.empty() && digits.back() == '\r') digits.pop_back();
        if (!read_base64(line.substr(0, space), &bytes)) fail("%s: line %d: expected base64 and a rank", where, rank + 1);
        if (digits != std::to_string(rank))
            fail("%s: line %d: expected rank %d, found \"%s\"", where, rank + 1, rank, shown(digits).c_str());
        t.pieces.push_back(bytes);
        t.types.push_back(TokenType::NORMAL);
    }
    if (tokenizer_vocab(t) != 128000)
        refuse("%s: a rank file of %d tokens: only that of Llama 3 (128000) is supported; such a file does not say how to "
               "split a text, a tokenizer.json does",
               where, tokenizer_vocab(t));
    add_llama3_tokens(t, where);
    tokenizer_index(t, where);
    return t;
}

// ---------------------------------------------------------------------------------------------------- which is it

Tokenizer formats::import_file(const std::string &path) {
    const std::string file = read_file(path);
    const char *where = path.c_str();
    std::string bytes;
    const size_t begin = file.find_first_not_of(" \t\r\n"), space = file.substr(0, 1024).find(' ');
    if (file.size() < 12) fail("%s: expected a tokenizer, found %zu bytes", where, file.size());
    if (begin != std::string::npos && file[begin] == '{') return import_tokenizer_json(file, path);
    if (space != std::string::npos && read_base64(file.substr(0, space), &bytes)) return import_tiktoken(file, where);
    if (file[0] == '\n' && file[2] == '\n') return import_sentencepiece(file, where);    // field 1, and field 1 inside it
    if (file[2] == 0 && file[3] == 0) return import_llama2c(file, where);                // the length of the longest token
    refuse("%s: not a tokenizer that is supported: expected sentencepiece BPE, tokenizer.json, tiktoken ranks or llama2.c",
           where);
}

Tokenizer tokenizer_import(const std::string &path) {
    struct stat s;
    if (stat(path.c_str(), &s) != 0) fail("%s: no such file or folder", path.c_str());
    return S_ISDIR(s.st_mode) ? import_folder(path) : import_file(path);
}
