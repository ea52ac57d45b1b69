// tokenizer_json.cpp - a Tokenizer as the JSON text of a model file; the table of its fields is in tokenizer.h.
#include <algorithm>
#include <charconv>
#include <set>
#include "formats.h"
#include "unicode.h"

using nlohmann::json;
using namespace formats;

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

std::string formats::bytes_to_letters(std::string_view bytes) {
    std::string out;
    for (const char b : bytes) utf8_append(out, byte_letters.letter[(uint8_t)b]);
    return out;
}

bool formats::letters_to_bytes(std::string_view letters, std::string *bytes) {
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

// Nesting of a JSON text.  Real files reach 10; printing and copying a value that the parser accepts is recursive.
static int json_depth(std::string_view text) {
    int depth = 0, deepest = 0;
    bool in_string = false;
    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (c == '"') in_string = !in_string;
        else if (in_string) i += c == '\\';
        else if (c == '[' || c == '{') deepest = std::max(deepest, ++depth);
        else if (c == ']' || c == '}') depth--;
    }
    return deepest;
}

json formats::parse_json(std::string_view text, const std::string &where) {
    const int depth = json_depth(text);
    if (depth > 100) fail("%s: expected JSON of at most 100 levels, found %d", where.c_str(), depth);
    try {
        return json::parse(text.begin(), text.end());
    } catch (const json::parse_error &e) {
        fail("%s: expected JSON, found something else at byte %zu", where.c_str(), e.byte);
    }
}
std::string formats::shown(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size() && i < 60; i++) out += (uint8_t)text[i] < 0x20 || text[i] == 0x7f ? '?' : text[i];
    return text.size() > 60 ? out + "..." : out;
}

static void fail_type(const json &v, const char *field, const char *expected, const std::string &where) {
    const std::string found = v.is_structured() ? v.type_name() : v.dump(-1, ' ', false, json::error_handler_t::replace);
    fail("%s: %s: expected %s, found %s", where.c_str(), field, expected, shown(found).c_str());
}
const json &formats::json_field(const json &object, const char *field, const std::string &where) {
    if (!object.is_object()) fail_type(object, "top level", "an object", where);
    const auto it = object.find(field);
    if (it == object.end()) fail("%s: %s: expected this field, found none", where.c_str(), field);
    return *it;
}
std::string formats::json_string(const json &v, const char *field, const std::string &where) {
    if (!v.is_string()) fail_type(v, field, "a string", where);
    return v.get<std::string>();
}
bool formats::json_bool(const json &v, const char *field, const std::string &where) {
    if (!v.is_boolean()) fail_type(v, field, "true or false", where);
    return v.get<bool>();
}
int formats::json_int(const json &v, const char *field, const std::string &where) {
    const bool small = v.is_number_unsigned() && v.get<uint64_t>() <= INT32_MAX;
    const bool negative = v.is_number_integer() && !v.is_number_unsigned() && v.get<int64_t>() >= INT32_MIN;
    if (!small && !negative) fail_type(v, field, "an integer of 32 bits", where);
    return v.get<int>();
}
const json &formats::json_array(const json &v, const char *field, const std::string &where) {
    if (!v.is_array()) fail_type(v, field, "an array", where);
    return v;
}

// ---------------------------------------------------------------------------------------------------- names of the enums

// In the order of the enums.
static const char *const MERGE_BY[] = {"scores", "ids", "merges"};
static const char *const SPLITS[] = {"none", "gpt2", "llama3", "qwen2", "digits_gpt2"};
static const char *const PREFIXES[] = {"none", "first", "every"};
static const char TYPE_LETTERS[] = "nucdbx";

template <class Enum, size_t n>
static Enum enum_field(const json &j, const char *field, const char *const (&names)[n], const std::string &where) {
    const std::string name = json_string(json_field(j, field, where), field, where);
    std::string known;
    for (size_t i = 0; i < n; i++) {
        if (name == names[i]) return (Enum)i;
        known += (i ? ", " : "") + std::string(names[i]);
    }
    fail("%s: %s: expected one of %s, found \"%s\"", where.c_str(), field, known.c_str(), shown(name).c_str());
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
              {"added", json::array()}};
    std::string pieces, types, scores, merges;    // long lists are one string each, entries with a space between them
    for (const std::string &piece : t.pieces) pieces += bytes_to_letters(piece) + ' ';
    for (const TokenType type : t.types) types += TYPE_LETTERS[(int)type];
    if (t.merge_by == MergeBy::SCORES)
        for (const float score : t.scores) scores += strf("%.9g ", score);    // 9 digits give the same float back
    for (const Merge &m : t.merges) merges += strf("%d %d ", m.left, m.right);
    for (std::string *list : {&pieces, &scores, &merges})
        if (!list->empty()) list->pop_back();
    j["pieces"] = pieces, j["types"] = types, j["scores"] = scores, j["merges"] = merges;
    for (const AddedToken &a : t.added) {
        const std::string flags = std::string(a.normalized ? "n" : "") + (a.lstrip ? "l" : "") + (a.rstrip ? "r" : "");
        j["added"].push_back({a.id, bytes_to_letters(a.text), flags});
    }
    return j.dump(-1, ' ', false, json::error_handler_t::replace);
}

// ---------------------------------------------------------------------------------------------------- reading

// Take the entry up to the next space from the front of a list; *more tells whether one follows.
static std::string_view next_entry(std::string_view &list, bool *more) {
    const size_t space = list.find(' ');
    const std::string_view entry = list.substr(0, space);
    *more = space != std::string_view::npos;
    list.remove_prefix(*more ? space + 1 : list.size());
    return entry;
}

template <class Number>
static std::vector<Number> number_list(const std::string &text, const char *field, const char *expected,
                                       const std::string &where) {
    std::vector<Number> numbers;
    std::string_view list = text;
    for (bool more = !text.empty(); more;) {
        const std::string_view entry = next_entry(list, &more);
        Number v{};
        const auto result = std::from_chars(entry.data(), entry.data() + entry.size(), v);
        if (result.ec != std::errc() || result.ptr != entry.data() + entry.size())
            fail("%s: %s: entry %zu: expected %s, found \"%s\"", where.c_str(), field, numbers.size(), expected,
                 shown(entry).c_str());
        numbers.push_back(v);
    }
    return numbers;
}

static std::string bytes_entry(std::string_view letters, const char *field, size_t entry, const std::string &where) {
    std::string bytes;
    if (!letters_to_bytes(letters, &bytes))
        fail("%s: %s: entry %zu: expected byte letters, found \"%s\"", where.c_str(), field, entry, shown(letters).c_str());
    return bytes;
}

static AddedToken added_entry(const json &v, size_t entry, const std::string &where) {
    if (!v.is_array() || v.size() != 3) fail("%s: added: entry %zu: expected [id, text, flags]", where.c_str(), entry);
    AddedToken a;
    a.id = json_int(v[0], "added: id", where);
    a.text = bytes_entry(json_string(v[1], "added: text", where), "added", entry, where);
    for (const char flag : json_string(v[2], "added: flags", where)) {
        bool *const known = flag == 'n' ? &a.normalized : flag == 'l' ? &a.lstrip : flag == 'r' ? &a.rstrip : nullptr;
        if (!known || *known) fail("%s: added: entry %zu: flags: expected n, l, r, each at most once", where.c_str(), entry);
        *known = true;
    }
    return a;
}

Tokenizer tokenizer_from_json(const std::string &text, const std::string &where) {
    static const std::set<std::string> fields = {
        "kind", "merge_by", "split",         "prefix", "prefix_once", "squeeze_spaces", "nfc",    "ignore_merges", "bos",
        "eos",  "add_bos",  "chat_template", "pieces", "types",       "scores",         "merges", "added"};
    const json j = parse_json(text, where);
    const auto get = [&](const char *field) -> const json & { return json_field(j, field, where); };
    const auto get_bool = [&](const char *field) { return json_bool(get(field), field, where); };
    const auto get_string = [&](const char *field) { return json_string(get(field), field, where); };
    const auto get_array = [&](const char *field) -> const json & { return json_array(get(field), field, where); };

    Tokenizer t;
    static const char *const KINDS[] = {"spm", "byte_level"};
    t.byte_level = enum_field<bool>(j, "kind", KINDS, where);
    for (const auto &item : j.items())
        if (!fields.count(item.key()))
            fail("%s: %s: no field of this name is known", where.c_str(), shown(item.key()).c_str());
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
    t.chat_template = get_string("chat_template");

    const std::string pieces = get_string("pieces");
    std::string_view list = pieces;
    for (bool more = true; more;) t.pieces.push_back(bytes_entry(next_entry(list, &more), "pieces", t.pieces.size(), where));
    for (const char letter : get_string("types")) {
        const char *const at = letter ? strchr(TYPE_LETTERS, letter) : nullptr;
        if (!at) fail("%s: types: id %zu: expected one of the letters %s", where.c_str(), t.types.size(), TYPE_LETTERS);
        t.types.push_back((TokenType)(at - TYPE_LETTERS));
    }
    t.scores = number_list<float>(get_string("scores"), "scores", "a number", where);
    const std::vector<int> ids = number_list<int>(get_string("merges"), "merges", "an id", where);
    if (ids.size() % 2) fail("%s: merges: expected pairs of ids, found %zu ids", where.c_str(), ids.size());
    for (size_t i = 0; i < ids.size(); i += 2) t.merges.push_back({ids[i], ids[i + 1], -1});
    const json &added = get_array("added");
    for (size_t i = 0; i < added.size(); i++) t.added.push_back(added_entry(added[i], i, where));
    tokenizer_index(t, where);
    return t;
}
