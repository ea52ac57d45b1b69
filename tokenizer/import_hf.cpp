// import_hf.cpp - readers of Hugging Face folders: tokenizer.json, or vocab.json + merges.txt, and the configs beside them.
#include <algorithm>
#include <unordered_map>
#include "formats.h"
#include "split.h"

using nlohmann::json;
using namespace formats;

static const json *find(const json &object, const char *field) {    // null when absent or JSON null
    const auto it = object.is_object() ? object.find(field) : object.end();
    return it == object.end() || it->is_null() ? nullptr : &*it;
}
static bool flag(const json &object, const char *field, bool fallback, const std::string &where) {
    const json *v = find(object, field);
    return v ? json_bool(*v, field, where) : fallback;
}

// ------------------------------------------------------------------------------------------- vocabulary and merges

using Names = std::unordered_map<std::string, int>;    // id by the name in the file

// {"letters": id, ...}; ids in `skip` are added tokens, whose names are not byte letters.
static Names read_vocabulary(Tokenizer &t, const json &vocab, const std::vector<int> &skip, bool byte_names,
                             const std::string &where) {
    Names names;
    if (!vocab.is_object() || vocab.empty()) fail("%s: vocab: expected an object {piece: id}", where.c_str());
    for (const auto &item : vocab.items()) {
        const int id = json_int(item.value(), "vocab: id", where);
        if (id < 0 || id > (int)vocab.size() + 65536)
            fail("%s: vocab: \"%s\": expected an id in [0, %zu], found %d", where.c_str(), shown(item.key()).c_str(),
                 vocab.size() + 65536, id);
        if (id >= tokenizer_vocab(t)) t.pieces.resize(id + 1), t.types.resize(id + 1, TokenType::UNUSED);
        if (!t.pieces[id].empty()) fail("%s: vocab: id %d is given twice", where.c_str(), id);
        t.types[id] = TokenType::NORMAL;
        const int byte = byte_names ? byte_of_name(item.key()) : -1;
        if (std::find(skip.begin(), skip.end(), id) != skip.end()) {
            t.pieces[id] = item.key();
        } else if (byte >= 0) {
            t.types[id] = TokenType::BYTE;
            t.pieces[id] = std::string(1, (char)byte);
        } else if (!t.byte_level) {
            t.pieces[id] = spaces_of_marks(item.key());
        } else if (!letters_to_bytes(item.key(), &t.pieces[id])) {
            fail("%s: vocab: \"%s\": expected byte letters", where.c_str(), shown(item.key()).c_str());
        }
        names[item.key()] = id;
    }
    return names;
}

static void add_merge(Tokenizer &t, const Names &names, const std::string &left, const std::string &right,
                      const std::string &where) {
    const auto a = names.find(left), b = names.find(right);
    if (a == names.end() || b == names.end())
        fail("%s: merges: entry %zu: \"%s\" is not in the vocabulary", where.c_str(), t.merges.size(),
             shown(a == names.end() ? left : right).c_str());
    t.merges.push_back({a->second, b->second, -1});
}

static void add_merge_line(Tokenizer &t, const Names &names, const std::string &line, const std::string &where) {
    const size_t space = line.find(' ');
    if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
        fail("%s: merges: entry %zu: expected two pieces, found \"%s\"", where.c_str(), t.merges.size(),
             shown(line).c_str());
    add_merge(t, names, line.substr(0, space), line.substr(space + 1), where);
}

static TokenType token_type(const json &added, const std::string &where) {
    return flag(added, "special", false, where) ? TokenType::CONTROL : TokenType::USER;
}

static void add_added_token(Tokenizer &t, const json &v, int id, TokenType type, const std::string &where) {
    AddedToken a;
    a.id = id;
    a.text = json_string(json_field(v, "content", where), "added_tokens: content", where);
    a.normalized = flag(v, "normalized", false, where);
    a.lstrip = flag(v, "lstrip", false, where);
    a.rstrip = flag(v, "rstrip", false, where);
    if (flag(v, "single_word", false, where))
        refuse("%s: added token \"%s\": single_word is not supported", where.c_str(), shown(a.text).c_str());
    add_token(t, a, type, where);
}

// ---------------------------------------------------------------------------------------------------- tokenizer.json

// A normalizer or pre_tokenizer as the list of its steps.
static std::vector<json> steps_of(const json &j, const char *field, const char *list, const std::string &where) {
    std::vector<json> steps;
    const json *v = find(j, field);
    if (!v) return steps;
    if (json_string(json_field(*v, "type", where), "type", where) != "Sequence") return {*v};
    for (const json &step : json_array(json_field(*v, list, where), list, where)) steps.push_back(step);
    return steps;
}

static bool is_string(const json *v, const char *expected) { return v && v->is_string() && *v == expected; }

// Prepend U+2581, Replace " " by U+2581: what sentencepiece does.  NFC: Qwen2.
static bool read_normalizer(Tokenizer &t, const json &j, const std::string &where) {
    bool marks = false;
    for (const json &step : steps_of(j, "normalizer", "normalizers", where)) {
        const std::string type = json_string(json_field(step, "type", where), "normalizer: type", where);
        const json *pattern = find(step, "pattern");
        if (type == "NFC") t.nfc = true;
        else if (type == "Prepend" && is_string(find(step, "prepend"), "\u2581")) t.prefix = Prefix::EVERY;
        else if (type == "Replace" && pattern && is_string(find(*pattern, "String"), " ") &&
                 is_string(find(step, "content"), "\u2581"))
            marks = true;
        else refuse("%s: normalizer is not supported: %s", where.c_str(), shown(step.dump()).c_str());
    }
    return marks;
}

// Sets byte_level and split, or prefix for Metaspace; true when spaces become marks here.
static bool read_pre_tokenizer(Tokenizer &t, const json &j, const std::string &where) {
    const std::vector<json> steps = steps_of(j, "pre_tokenizer", "pretokenizers", where);
    std::string shape;    // one letter a step
    for (const json &step : steps) {
        const std::string type = json_string(json_field(step, "type", where), "pre_tokenizer: type", where);
        const std::string source = step.dump().substr(0, 160);
        const json *pattern = find(step, "pattern"), *regex = pattern ? find(*pattern, "Regex") : nullptr;
        if (type == "ByteLevel" && !flag(step, "add_prefix_space", true, where)) {
            shape += flag(step, "use_regex", true, where) ? 'G' : 'B';
        } else if (type == "Digits" && flag(step, "individual_digits", false, where)) {
            shape += 'D';
        } else if (type == "Split" && regex && is_string(find(step, "behavior"), "Isolated") &&
                   !flag(step, "invert", false, where)) {
            t.split = split_rule_of_regex(json_string(*regex, "Regex", where));
            if (t.split == SplitRule::NONE)
                refuse("%s: pre_tokenizer: this regular expression is not supported: %s", where.c_str(),
                       regex->dump().substr(0, 300).c_str());
            shape += 'S';
        } else if (type == "Metaspace" && is_string(find(step, "replacement"), "\u2581") &&
                   !flag(step, "split", true, where)) {
            const json *scheme = find(step, "prepend_scheme");
            if (is_string(scheme, "first")) t.prefix = Prefix::FIRST;
            else if (is_string(scheme, "always")) t.prefix = Prefix::EVERY;
            else if (!is_string(scheme, "never"))
                refuse("%s: pre_tokenizer is not supported: %s", where.c_str(), source.c_str());
            t.prefix_once = true;
            shape += 'M';
        } else {
            refuse("%s: pre_tokenizer is not supported: %s", where.c_str(), source.c_str());
        }
    }
    t.byte_level = shape == "G" || shape == "DG" || shape == "SB";
    if (shape == "G") t.split = SplitRule::GPT2;
    if (shape == "DG") t.split = SplitRule::DIGITS_GPT2;
    if (!t.byte_level && shape != "" && shape != "M")
        refuse("%s: pre_tokenizer: this sequence of %zu steps is not supported", where.c_str(), steps.size());
    return shape == "M";
}

// A template that puts one token in front of the text names bos.
static void read_post_processor(Tokenizer &t, const json &j, const std::string &where) {
    for (const json &step : steps_of(j, "post_processor", "processors", where)) {
        const std::string type = json_string(json_field(step, "type", where), "post_processor: type", where);
        if (type == "ByteLevel") continue;
        if (type != "TemplateProcessing")
            refuse("%s: post_processor %s is not supported", where.c_str(), shown(type).c_str());
        const json &single = json_array(json_field(step, "single", where), "post_processor: single", where);
        for (size_t i = 0; i < single.size(); i++) {
            const json *special = find(single[i], "SpecialToken");
            if (!special) continue;
            const std::string name = json_string(json_field(*special, "id", where), "post_processor: id", where);
            const int id = tokenizer_find(t, name);
            if (i > 0 || id < 0)
                refuse("%s: post_processor: \"%s\" at place %zu of the template is not supported", where.c_str(),
                       shown(name).c_str(), i);
            t.bos = id, t.add_bos = true;
        }
    }
}

static void refuse_option(const json &model, const char *field, const std::string &where) {
    const json *v = find(model, field);
    if (v && *v != "" && *v != 0) refuse("%s: model: %s %s is not supported", where.c_str(), field, v->dump().c_str());
}

Tokenizer formats::import_tokenizer_json(std::string_view text, const std::string &where) {
    const json j = parse_json(text, where);
    if (!find(j, "model"))
        refuse("%s: a JSON file without \"model\" is no tokenizer.json; for vocab.json and merges.txt name their folder",
               where.c_str());
    const json &model = json_field(j, "model", where), *type = find(model, "type");
    if (type && !is_string(type, "BPE"))
        refuse("%s: model type %s: only BPE is supported", where.c_str(), shown(type->dump()).c_str());
    for (const char *option : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"})
        refuse_option(model, option, where);

    Tokenizer t;
    t.merge_by = MergeBy::MERGES;
    const bool marks = read_normalizer(t, j, where), metaspace = read_pre_tokenizer(t, j, where);
    if (!t.byte_level && !marks && !metaspace)
        refuse("%s: pre_tokenizer: expected ByteLevel, or spaces made U+2581", where.c_str());
    if (t.byte_level && (marks || t.prefix != Prefix::NONE))
        refuse("%s: normalizer Prepend, Replace before ByteLevel is not supported", where.c_str());
    if (!t.byte_level && t.nfc) refuse("%s: normalizer NFC without ByteLevel is not supported", where.c_str());
    t.ignore_merges = flag(model, "ignore_merges", false, where);

    std::vector<int> added_ids;
    static const json none = json::array();
    const json &added = find(j, "added_tokens") ? json_array(j["added_tokens"], "added_tokens", where) : none;
    for (const json &a : added) added_ids.push_back(json_int(json_field(a, "id", where), "added_tokens: id", where));
    const bool byte_fallback = flag(model, "byte_fallback", false, where);
    const json &vocab = json_field(model, "vocab", where);
    const Names names = read_vocabulary(t, vocab, added_ids, byte_fallback && !t.byte_level, where);

    int unknown_id = -1;
    if (const json *unknown = find(model, "unk_token")) {
        if (t.byte_level) refuse("%s: model: unk_token with ByteLevel is not supported", where.c_str());
        const auto name = names.find(json_string(*unknown, "unk_token", where));
        if (name == names.end())
            fail("%s: unk_token: expected a piece, found %s", where.c_str(), shown(unknown->dump()).c_str());
        t.types[unknown_id = name->second] = TokenType::UNKNOWN;
    }
    if (!t.byte_level && !byte_fallback && !flag(model, "fuse_unk", false, where))
        refuse("%s: model: fuse_unk off without byte_fallback is not supported", where.c_str());
    for (const json &a : added) {
        const int id = json_int(a["id"], "added_tokens: id", where);
        add_added_token(t, a, id, id == unknown_id ? TokenType::UNKNOWN : token_type(a, where), where);
    }
    // A normalised token is looked for as the normaliser writes it; a pre-tokenizer comes later and changes nothing.
    for (AddedToken &a : t.added) {
        if (!a.normalized || t.byte_level) continue;
        if (a.lstrip || a.rstrip)
            refuse("%s: added token \"%s\": normalized with lstrip or rstrip is not supported", where.c_str(),
                   shown(a.text).c_str());
        a.normalized = marks;
        if (marks) a.text = (t.prefix == Prefix::EVERY ? " " : "") + spaces_of_marks(a.text);
    }
    for (const json &m : json_array(json_field(model, "merges", where), "merges", where)) {
        if (m.is_array() && m.size() == 2)
            add_merge(t, names, json_string(m[0], "merges", where), json_string(m[1], "merges", where), where);
        else add_merge_line(t, names, json_string(m, "merges", where), where);
    }
    read_post_processor(t, j, where);
    tokenizer_index(t, where);
    return t;
}

// ---------------------------------------------------------------------------------------------------- folders

// The files do not say how to split a text; the class in tokenizer_config.json or the size of a vocabulary we know does.
static Tokenizer import_pair(const std::string &vocab_path, const std::string &merges_path, const json &config) {
    const json vocab = parse_json(read_file(vocab_path), vocab_path);
    Tokenizer t;
    t.byte_level = true;
    t.merge_by = MergeBy::MERGES;
    const json *end_of_text = find(vocab, "<|endoftext|>"), *name = find(config, "tokenizer_class");
    const int end_id = end_of_text ? json_int(*end_of_text, "<|endoftext|>", vocab_path) : -1;
    const Names names = read_vocabulary(t, vocab, {end_id}, false, vocab_path);
    const int V = tokenizer_vocab(t);
    const bool known_class = name && (is_string(name, "Qwen2Tokenizer") || is_string(name, "GPT2Tokenizer"));
    if (is_string(name, "Qwen2Tokenizer") || (!known_class && V == 151643)) t.split = SplitRule::QWEN2, t.nfc = true;
    else if (is_string(name, "GPT2Tokenizer") || V == 50257) t.split = SplitRule::GPT2;
    else if (V != 128000)
        refuse("%s: %d pieces and no tokenizer_class that is known: only a tokenizer.json says how to split a text",
               vocab_path.c_str(), V);

    const std::string merges = read_file(merges_path);
    for (size_t at = 0, end; at < merges.size(); at = end + 1) {
        end = std::min(merges.find('\n', at), merges.size());
        std::string line = merges.substr(at, end - at);
        if (!line.empty() && line.back() == '\r') line.pop_back();
        if (line.empty() || (at == 0 && line.rfind("#version", 0) == 0)) continue;
        add_merge_line(t, names, line, merges_path);
    }
    if (end_id >= 0) add_token(t, {end_id, "<|endoftext|>"}, TokenType::CONTROL, vocab_path);
    if (V == 50257 && end_id >= 0) t.bos = end_id, t.eos = {end_id};
    if (V == 128000) add_llama3_tokens(t, vocab_path);
    return t;
}

static void add_eos(Tokenizer &t, int id) {
    if (std::find(t.eos.begin(), t.eos.end(), id) == t.eos.end()) t.eos.push_back(id);
}

// "<s>" or {"content": "<s>", ...} -> its id, -1 when absent
static int token_field(const Tokenizer &t, const json &j, const char *field, const std::string &where) {
    const json *v = find(j, field);
    if (v && v->is_object()) v = find(*v, "content");
    if (!v) return -1;
    const std::string text = json_string(*v, field, where);
    const int id = tokenizer_find(t, text);
    if (id < 0) fail("%s: %s: \"%s\" is no added token", where.c_str(), field, shown(text).c_str());
    return id;
}

static void apply_tokenizer_config(Tokenizer &t, const json &config, const std::string &where) {
    if (const json *list = find(config, "added_tokens_decoder")) {
        for (const auto &item : list->items()) {
            char *end;
            const long id = strtol(item.key().c_str(), &end, 10);
            if (*end || item.key().empty() || id < 0 || id > INT32_MAX)
                fail("%s: added_tokens_decoder: expected an id, found \"%s\"", where.c_str(), shown(item.key()).c_str());
            add_added_token(t, item.value(), (int)id, token_type(item.value(), where), where);
        }
    }
    const int bos = token_field(t, config, "bos_token", where), eos = token_field(t, config, "eos_token", where);
    if (bos >= 0) t.bos = bos;
    if (eos >= 0) t.eos = {eos};
    if (const json *add = find(config, "add_bos_token")) t.add_bos = json_bool(*add, "add_bos_token", where) && t.bos >= 0;
    const json *chat = find(config, "chat_template");
    if (chat && chat->is_string()) t.chat_template = chat->get<std::string>();
    if (chat && chat->is_array())    // several by name: the one for plain talk
        for (const json &entry : *chat)
            if (is_string(find(entry, "name"), "default"))
                t.chat_template = json_string(json_field(entry, "template", where), "template", where);
}

// bos_token_id and eos_token_id (one id or a list) of generation_config.json and config.json.
static void apply_model_config(Tokenizer &t, const json &config, const std::string &where) {
    const json *bos = find(config, "bos_token_id"), *eos = find(config, "eos_token_id");
    if (bos && t.bos < 0 && bos->is_number()) t.bos = json_int(*bos, "bos_token_id", where);
    if (!eos) return;
    if (eos->is_array())
        for (const json &id : *eos) add_eos(t, json_int(id, "eos_token_id", where));
    else add_eos(t, json_int(*eos, "eos_token_id", where));
}

Tokenizer formats::import_folder(const std::string &path) {
    const auto in = [&](const char *name) { return path + "/" + name; };
    const auto config = [&](const char *name) {
        return file_exists(in(name)) ? parse_json(read_file(in(name)), in(name)) : json();
    };
    const auto both = [&](const char *a, const char *b) { return file_exists(in(a)) && file_exists(in(b)); };
    const json tokenizer_config = config("tokenizer_config.json");
    Tokenizer t;
    if (file_exists(in("tokenizer.json"))) t = import_file(in("tokenizer.json"));
    else if (file_exists(in("tokenizer.model"))) t = import_file(in("tokenizer.model"));
    else if (both("vocab.json", "merges.txt")) t = import_pair(in("vocab.json"), in("merges.txt"), tokenizer_config);
    else if (both("encoder.json", "vocab.bpe")) t = import_pair(in("encoder.json"), in("vocab.bpe"), tokenizer_config);
    else fail("%s: expected tokenizer.json, tokenizer.model or vocab.json and merges.txt in this folder", path.c_str());
    apply_tokenizer_config(t, config("special_tokens_map.json"), in("special_tokens_map.json"));
    apply_tokenizer_config(t, tokenizer_config, in("tokenizer_config.json"));
    apply_model_config(t, config("generation_config.json"), in("generation_config.json"));
    apply_model_config(t, config("config.json"), in("config.json"));
    if (file_exists(in("chat_template.jinja"))) t.chat_template = read_file(in("chat_template.jinja"));
    tokenizer_index(t, path);
    return t;
}
