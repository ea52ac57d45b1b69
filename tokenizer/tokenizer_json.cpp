// tokenizer_json.cpp - a Tokenizer as the JSON text of a model file; the table of its fields is in tokenizer.h.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <set>
#include "formats.h"
#include "unicode.h"

using nlohmann::json;

// ---------------------------------------------------------------------------------------------------- bytes as letters

static bool is_own_letter(int b) { return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae; }

struct ByteLetters {
    uint16_t letter[256];
    int byte[0x144];    // 256 + 68 letters; -1 none
    ByteLetters() {
        std::fill(byte, byte + 0x144, -1);
        for (int b = 0, next = 0x100; b < 256; b++) {
            letter[b] = (uint16_t)(is_own_letter(b) ? b : next++);
            byte[letter[b]] = b;
        }
    }
};
static const ByteLetters byte_letters;

std::string bytes_to_letters(std::string_view bytes) {
    std::string out;
    for (const char b : bytes) utf8_append(out, byte_letters.letter[(uint8_t)b]);
    return out;
}

bool letters_to_bytes(std::string_view letters, std::string *bytes) {
    bytes->clear();
    for (size_t i = 0; i < letters.size();) {
        int n;
        const uint32_t c = utf8_read(letters, i, &n);
        if (c >= 0x144 || byte_letters.byte[c] < 0) return false;
        *bytes += (char)byte_letters.byte[c];
        i += n;
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------- checked JSON

json parse_json(std::string_view text, const std::string &where) {
    try {
        return json::parse(text.begin(), text.end());
    } catch (const json::parse_error &e) {
        fail("%s: expected JSON, found something else at byte %zu", where.c_str(), e.byte);
    }
}
static void fail_type(const json &v, const char *field, const char *expected, const std::string &where) {
    std::string found = v.is_structured() ? v.type_name() : v.dump(-1, ' ', false, json::error_handler_t::replace);
    if (found.size() > 40) found = found.substr(0, 40) + "...";
    fail("%s: %s: expected %s, found %s", where.c_str(), field, expected, found.c_str());
}
const json &json_field(const json &object, const char *field, const std::string &where) {
    if (!object.is_object()) fail_type(object, "top level", "an object", where);
    const auto it = object.find(field);
    if (it == object.end()) fail("%s: %s: expected this field, found none", where.c_str(), field);
    return *it;
}
std::string json_string(const json &v, const char *field, const std::string &where) {
    if (!v.is_string()) fail_type(v, field, "a string", where);
    return v.get<std::string>();
}
bool json_bool(const json &v, const char *field, const std::string &where) {
    if (!v.is_boolean()) fail_type(v, field, "true or false", where);
    return v.get<bool>();
}
int json_int(const json &v, const char *field, const std::string &where) {
    const bool fits = v.is_number_unsigned() ? v.get<uint64_t>() <= INT32_MAX
                                             : v.is_number_integer() && v.get<int64_t>() >= INT32_MIN && v.get<int64_t>() < 0;
    if (!fits) fail_type(v, field, "an integer of 32 bits", where);
    return v.get<int>();
}
const json &json_array(const json &v, const char *field, const std::string &where) {
    if (!v.is_array()) fail_type(v, field, "an array", where);
    return v;
}

// ---------------------------------------------------------------------------------------------------- names of the enums

// In the order of the enums.
static const char *const MERGE_BY[] = {"scores", "ids", "merges"};
static const char *const SPLITS[] = {"none", "gpt2", "llama3", "qwen2", "digits_gpt2"};
static const char *const PREFIXES[] = {"none", "first", "every"};
static const char TYPE_LETTERS[] = "nucdbx";

template <class Enum, size_t n> static Enum enum_field(const json &j, const char *field, const char *const (&names)[n],
                                                       const std::string &where) {
    const std::string name = json_string(json_field(j, field, where), field, where);
    std::string known;
    for (size_t i = 0; i < n; i++) {
        if (name == names[i]) return (Enum)i;
        known += (i ? ", " : "") + std::string(names[i]);
    }
    fail("%s: %s: expected one of %s, found \"%s\"", where.c_str(), field, known.c_str(), name.c_str());
}

// ---------------------------------------------------------------------------------------------------- writing

std::string tokenizer_to_json(const Tokenizer &t) {
    json j = {{"kind", tokenizer_kind(t)},
              {"merge_by", MERGE_BY[(int)t.merge_by]},
              {"split", SPLITS[(int)t.split]},
              {"prefix", PREFIXES[(int)t.prefix]},
              {"prefix_once", t.prefix_once},
              {"squeeze_spaces", t.squeeze_spaces},
              {"nfc", t.nfc},
              {"ignore_merges", t.ignore_merges},
              {"bos", t.bos},
              {"eos", t.eos},
              {"add_bos", t.add_bos},
              {"chat_template", t.chat_template},
              {"pieces", json::array()},
              {"scores", json::array()},
              {"merges", json::array()},
              {"added", json::array()}};
    for (const std::string &piece : t.pieces) j["pieces"].push_back(bytes_to_letters(piece));
    std::string types;
    for (const TokenType type : t.types) types += TYPE_LETTERS[(int)type];
    j["types"] = types;
    for (const Merge &m : t.merges) j["merges"].push_back(m.left), j["merges"].push_back(m.right);
    for (const AddedToken &a : t.added) {
        const std::string flags = std::string(a.normalized ? "n" : "") + (a.lstrip ? "l" : "") + (a.rstrip ? "r" : "");
        j["added"].push_back({a.id, bytes_to_letters(a.text), flags});
    }
    // Scores are floats: a float fits a double exactly and comes back as the same float.
    if (t.merge_by == MergeBy::SCORES) j["scores"] = t.scores;
    return j.dump(-1, ' ', false, json::error_handler_t::replace);
}

// ---------------------------------------------------------------------------------------------------- reading

static std::string bytes_field(const json &v, const char *field, size_t entry, const std::string &where) {
    std::string bytes;
    if (!v.is_string()) fail_type(v, strf("%s[%zu]", field, entry).c_str(), "a string", where);
    if (!letters_to_bytes(v.get_ref<const std::string &>(), &bytes))
        fail("%s: %s[%zu]: expected byte letters, found \"%s\"", where.c_str(), field, entry, v.get_ref<const std::string &>().c_str());
    return bytes;
}

static AddedToken added_field(const json &v, size_t entry, const std::string &where) {
    if (!v.is_array() || v.size() != 3) fail("%s: added[%zu]: expected [id, text, flags]", where.c_str(), entry);
    AddedToken a;
    a.id = json_int(v[0], "added: id", where);
    a.text = bytes_field(v[1], "added: text", entry, where);
    for (const char flag : json_string(v[2], "added: flags", where)) {
        bool *const known = flag == 'n' ? &a.normalized : flag == 'l' ? &a.lstrip : flag == 'r' ? &a.rstrip : nullptr;
        if (!known || *known) fail("%s: added[%zu]: flags: expected n, l, r, each at most once", where.c_str(), entry);
        *known = true;
    }
    return a;
}

Tokenizer tokenizer_from_json(const std::string &text, const std::string &where) {
    static const std::set<std::string> fields = {"kind", "merge_by", "split", "prefix", "prefix_once", "squeeze_spaces", "nfc",
                                                 "ignore_merges", "bos", "eos", "add_bos", "chat_template", "pieces", "types",
                                                 "scores", "merges", "added"};
    const json j = parse_json(text, where);
    const auto get = [&](const char *field) -> const json & { return json_field(j, field, where); };
    const auto get_bool = [&](const char *field) { return json_bool(get(field), field, where); };
    const auto get_array = [&](const char *field) -> const json & { return json_array(get(field), field, where); };

    Tokenizer t;
    static const char *const KINDS[] = {"spm", "byte_level"};
    t.byte_level = enum_field<bool>(j, "kind", KINDS, where);
    for (const auto &item : j.items())
        if (!fields.count(item.key())) fail("%s: %s: no field of this name is known", where.c_str(), item.key().c_str());
    t.merge_by = enum_field<MergeBy>(j, "merge_by", MERGE_BY, where);
    t.split = enum_field<SplitRule>(j, "split", SPLITS, where);
    t.prefix = enum_field<Prefix>(j, "prefix", PREFIXES, where);
    t.prefix_once = get_bool("prefix_once");
    t.squeeze_spaces = get_bool("squeeze_spaces");
    t.nfc = get_bool("nfc");
    t.ignore_merges = get_bool("ignore_merges");
    t.bos = json_int(get("bos"), "bos", where);
    for (const json &id : get_array("eos")) t.eos.push_back(json_int(id, "eos", where));
    t.add_bos = get_bool("add_bos");
    t.chat_template = json_string(get("chat_template"), "chat_template", where);

    const json &pieces = get_array("pieces"), &merges = get_array("merges"), &scores = get_array("scores");
    if (pieces.size() > INT32_MAX / 2) fail("%s: pieces: %zu are too many", where.c_str(), pieces.size());
    t.pieces.reserve(pieces.size());
    for (const json &piece : pieces) t.pieces.push_back(bytes_field(piece, "pieces", t.pieces.size(), where));
    for (const char letter : json_string(get("types"), "types", where)) {
        const char *const at = letter ? strchr(TYPE_LETTERS, letter) : nullptr;
        if (!at) fail("%s: types: id %zu: expected one of the letters %s", where.c_str(), t.types.size(), TYPE_LETTERS);
        t.types.push_back((TokenType)(at - TYPE_LETTERS));
    }
    t.scores.reserve(scores.size());
    for (const json &score : scores) {
        if (!score.is_number()) fail_type(score, "scores", "a number", where);
        t.scores.push_back(score.get<float>());
    }
    if (merges.size() % 2) fail("%s: merges: expected an even count of ids, found %zu", where.c_str(), merges.size());
    t.merges.reserve(merges.size() / 2);
    for (size_t i = 0; i < merges.size(); i += 2)
        t.merges.push_back({json_int(merges[i], "merges", where), json_int(merges[i + 1], "merges", where), -1});
    const json &added = get_array("added");
    for (size_t i = 0; i < added.size(); i++) t.added.push_back(added_field(added[i], i, where));
    tokenizer_index(t, where);
    return t;
}
