// model.cpp - see model.h.
#include "model.h"
#include <algorithm>
#include <cmath>
#include "groups.h"
#include "json.h"

// ---- config ---------------------------------------------------------------------------------------------------------

// The whole-number fields and their largest legal values: several times the largest models known, and small enough that
// sizes in bytes and products of three fields fit in 63 bits.
struct IntField { const char *name; int Config::*field; int max; };
static const IntField INT_FIELDS[] = {
    {"dim",        &Config::dim,        1 << 17}, {"ffn_dim",  &Config::ffn_dim,  1 << 20},
    {"n_layers",   &Config::n_layers,      1024}, {"n_heads",  &Config::n_heads,     4096},
    {"n_kv_heads", &Config::n_kv_heads,    4096}, {"head_dim", &Config::head_dim,     256},
    {"vocab",      &Config::vocab,      1 << 22}, {"max_len",  &Config::max_len,  1 << 26},
};

void config_check(const Config &c, const std::string &where) {
    const char *w = where.c_str();
    for (const IntField &f : INT_FIELDS) {
        const int value = c.*f.field;
        if (value < 1 || value > f.max) fail("%s: %s: expected 1 to %d, found %d", w, f.name, f.max, value);
    }
    if (c.n_heads % c.n_kv_heads != 0) {
        fail("%s: n_kv_heads: expected a divisor of n_heads = %d, found %d", w, c.n_heads, c.n_kv_heads);
    }
    if (c.head_dim % 8 != 0) fail("%s: head_dim: expected a multiple of 8, found %d", w, c.head_dim);
    auto range = [&](const char *name, double x, double min, double max) {
        if (!(x >= min && x <= max)) fail("%s: %s: expected %g to %g, found %g", w, name, min, max, x);
    };
    range("norm_eps", c.norm_eps, 1e-12, 1.0);
    range("rope_theta", c.rope_theta, 1.0, 1e12);
    if (c.rope_factor != 0.0f) {
        range("rope_scaling.factor", c.rope_factor, 1.0, 1e6);
        range("rope_scaling.low_freq_factor", c.rope_low_freq, 1e-3, 1e6);
        range("rope_scaling.high_freq_factor", c.rope_high_freq, 1e-3, 1e6);
        range("rope_scaling.original_len", c.rope_original_len, 1, 1 << 26);
        if (!(c.rope_low_freq < c.rope_high_freq)) {
            fail("%s: rope_scaling: expected low_freq_factor < high_freq_factor, found %g and %g", w, c.rope_low_freq,
                 c.rope_high_freq);
        }
    }
    if (c.bos.size() > 1) fail("%s: bos: expected at most one id, found %zu", w, c.bos.size());
    for (const auto *ids : {&c.bos, &c.eos}) {
        for (const int id : *ids) {
            if (id < 0 || id >= c.vocab) {
                fail("%s: %s: expected ids from 0 to %d, found %d", w, ids == &c.bos ? "bos" : "eos", c.vocab - 1, id);
            }
        }
    }
}

// The shortest decimal that reads back as the same f32: 1e-05 rather than 9.999999747378752e-06.
static double shortest(float x) {
    for (int digits = 6;; digits++) {
        const double value = strtod(strf("%.*g", digits, x).c_str(), nullptr);
        if ((float)value == x || digits == 9) return value;
    }
}

std::string config_to_json(const Config &c) {
    OrderedJson j;
    for (const IntField &f : INT_FIELDS) j[f.name] = c.*f.field;
    j["norm_eps"] = shortest(c.norm_eps);
    j["rope_theta"] = shortest(c.rope_theta);
    j["rope_scaling"] = nullptr;
    if (c.rope_factor != 0.0f) {
        j["rope_scaling"] = {{"factor", shortest(c.rope_factor)},
                             {"low_freq_factor", shortest(c.rope_low_freq)},
                             {"high_freq_factor", shortest(c.rope_high_freq)},
                             {"original_len", c.rope_original_len}};
    }
    j["tied"] = c.tied;
    j["bos"] = c.bos;
    j["eos"] = c.eos;
    j["dialect"] = c.dialect;
    return j.dump();
}

static void check_keys(const Json &object, const std::vector<std::string> &known, const std::string &where) {
    if (!object.is_object()) fail("%s: expected an object, found %s", where.c_str(), show_json(object).c_str());
    for (const auto &item : object.items()) {
        // A field we do not know could change what the weights mean.
        if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
            fail("%s: unknown field '%s'", where.c_str(), printable(item.key()).c_str());
        }
    }
    for (const std::string &key : known) get_field(object, key.c_str(), where);
}

static std::vector<int> read_ids(const Json &list, const char *key, const std::string &where) {
    if (!list.is_array()) fail("%s: %s: expected a list, found %s", where.c_str(), key, show_json(list).c_str());
    std::vector<int> ids;
    for (const Json &id : list) ids.push_back((int)get_int(id, key, 0, INT32_MAX, where));
    return ids;
}

Config config_from_json(const std::string &text, const std::string &where) {
    const Json j = parse_strict_json(text.data(), text.size(), where);
    std::vector<std::string> known = {"norm_eps", "rope_theta", "rope_scaling", "tied", "bos", "eos", "dialect"};
    for (const IntField &f : INT_FIELDS) known.push_back(f.name);
    check_keys(j, known, where);

    Config c;
    for (const IntField &f : INT_FIELDS) c.*f.field = (int)get_int(j[f.name], f.name, 1, f.max, where);
    c.norm_eps = get_float(j["norm_eps"], "norm_eps", 0, 1, where);
    c.rope_theta = get_float(j["rope_theta"], "rope_theta", 1, 1e12, where);
    if (const Json &r = j["rope_scaling"]; !r.is_null()) {
        const std::string in = where + ": rope_scaling";
        check_keys(r, {"factor", "low_freq_factor", "high_freq_factor", "original_len"}, in);
        c.rope_factor = get_float(r["factor"], "factor", 1, 1e6, in);
        c.rope_low_freq = get_float(r["low_freq_factor"], "low_freq_factor", 0, 1e6, in);
        c.rope_high_freq = get_float(r["high_freq_factor"], "high_freq_factor", 0, 1e6, in);
        c.rope_original_len = (int)get_int(r["original_len"], "original_len", 1, 1 << 26, in);
    }
    c.tied = get_bool(j["tied"], "tied", where);
    c.bos = read_ids(j["bos"], "bos", where);
    c.eos = read_ids(j["eos"], "eos", where);
    c.dialect = get_string(j["dialect"], "dialect", where);
    config_check(c, where);
    return c;
}

std::vector<double> rope_frequencies(const Config &c) {
    std::vector<double> freq(c.head_dim / 2);
    for (int j = 0; j < c.head_dim / 2; j++) {
        double f = std::pow((double)c.rope_theta, -2.0 * j / c.head_dim);
        if (c.rope_factor != 0.0f) {
            // Turns within the original context decide: many stay as they are, few are slowed by factor, and in between
            // the two blend linearly.
            const double turns = c.rope_original_len * f / (2.0 * M_PI);
            const double keep = (turns - c.rope_low_freq) / ((double)c.rope_high_freq - c.rope_low_freq);
            const double k = std::min(1.0, std::max(0.0, keep));
            f = (1.0 - k) * f / c.rope_factor + k * f;
        }
        freq[j] = f;
    }
    return freq;
}

// ---- tensors --------------------------------------------------------------------------------------------------------

std::vector<TensorSpec> config_tensors(const Config &c) {
    const int64_t D = c.dim, F = c.ffn_dim, V = c.vocab, q = (int64_t)c.n_heads * c.head_dim,
                  kv = (int64_t)c.n_kv_heads * c.head_dim;
    std::vector<TensorSpec> specs = {{"embed", {V, D}, false}};
    for (int l = 0; l < c.n_layers; l++) {
        const std::string layer = "layers." + std::to_string(l) + ".";
        specs.push_back({layer + "attn_norm", {D}, true});
        specs.push_back({layer + "wq", {q, D}, false});
        specs.push_back({layer + "wk", {kv, D}, false});
        specs.push_back({layer + "wv", {kv, D}, false});
        specs.push_back({layer + "wo", {D, q}, false});
        specs.push_back({layer + "ffn_norm", {D}, true});
        specs.push_back({layer + "w_gate", {F, D}, false});
        specs.push_back({layer + "w_up", {F, D}, false});
        specs.push_back({layer + "w_down", {D, F}, false});
    }
    specs.push_back({"out_norm", {D}, true});
    if (!c.tied) specs.push_back({"unembed", {V, D}, false});
    return specs;
}

DType stored_type(const TensorSpec &spec, DType type) {
    if (spec.is_norm) return DType::f32;
    if (is_grouped(type) && spec.shape.back() % GROUP != 0) return DType::bf16;
    return type == DType::q4 && (spec.name == "embed" || spec.name == "unembed") ? DType::q8 : type;
}

std::vector<StoredTensor> stored_tensors(const TensorSpec &spec, DType type) {
    std::vector<StoredTensor> stored = {{spec.name, dtype_name(type), spec.shape}};
    if (type == DType::q4) stored[0].shape.back() /= 2;
    if (is_grouped(type)) stored.push_back({spec.name + ".scale", "F16", {spec.shape[0], spec.shape.back() / GROUP}});
    return stored;
}

// All exponent bits set is NaN or infinity in all three formats.  Whole blocks are judged first: that vectorises.
template <class Word>
static int64_t find_exponent(const Word *data, int64_t n, Word exponent) {
    for (int64_t begin = 0; begin < n; begin += 4096) {
        const int64_t end = std::min<int64_t>(n, begin + 4096);
        int bad = 0;
        for (int64_t i = begin; i < end; i++) bad |= (data[i] & exponent) == exponent;
        for (int64_t i = begin; bad && i < end; i++) if ((data[i] & exponent) == exponent) return i;
    }
    return -1;
}

int64_t find_nonfinite(const void *data, DType type, int64_t n) {
    if (type == DType::f32) return find_exponent<uint32_t>((const uint32_t *)data, n, 0x7f800000);
    return find_exponent<uint16_t>((const uint16_t *)data, n, type == DType::f16 ? 0x7c00 : 0x7f80);
}
int64_t find_nonfinite(const Matrix &m, int64_t n) {
    if (!is_grouped(m.type)) return find_nonfinite(m.data, m.type, n);
    const int64_t bad = find_nonfinite(m.scale, DType::f16, n / GROUP);
    return bad < 0 ? -1 : bad * GROUP;
}

// One entry of the file, checked against what it must be.
static const TensorView &get_stored(const Safetensors &file, const StoredTensor &want) {
    const char *path = file.path.c_str(), *name = want.name.c_str();
    const TensorView *t = file.find(want.name);
    if (!t) fail("%s: tensor '%s': missing", path, name);
    if (t->dtype != want.dtype) fail("%s: tensor '%s': dtype: expected %s, found %s", path, name, want.dtype, t->dtype.c_str());
    if (t->shape != want.shape) {
        fail("%s: tensor '%s': shape: expected %s, found %s", path, name, shape_text(want.shape).c_str(),
             shape_text(t->shape).c_str());
    }
    if ((file.data_offset() + t->begin) % TENSOR_ALIGN != 0) {
        fail("%s: tensor '%s': expected to start on a multiple of %d bytes, found byte %llu", path, name,
             (int)TENSOR_ALIGN, (unsigned long long)(file.data_offset() + t->begin));
    }
    return *t;
}

Matrix model_tensor(const Safetensors &file, const TensorSpec &spec) {
    const char *path = file.path.c_str(), *name = spec.name.c_str();
    const TensorView *t = file.find(spec.name);
    if (!t) fail("%s: tensor '%s': missing", path, name);
    Matrix m;
    bool known = false;
    for (const DType type : {DType::f32, DType::f16, DType::bf16, DType::q8, DType::q4})
        if (t->dtype == dtype_name(type)) m.type = type, known = true;
    if (!known || (spec.is_norm && m.type != DType::f32)) {
        fail("%s: tensor '%s': dtype: expected %s, found %s", path, name,
             spec.is_norm ? "F32" : "F32, F16, BF16, I8 (q8) or U8 (q4)", t->dtype.c_str());
    }
    if (is_grouped(m.type) && spec.shape.back() % GROUP != 0) {
        fail("%s: tensor '%s': dtype: %s is for rows of a multiple of %d, found rows of %lld", path, name,
             t->dtype.c_str(), GROUP, (long long)spec.shape.back());
    }
    const std::vector<StoredTensor> stored = stored_tensors(spec, m.type);
    m.data = get_stored(file, stored[0]).data;
    if (stored.size() > 1) m.scale = (const f16 *)get_stored(file, stored[1]).data;
    if (spec.is_norm) {
        const int64_t bad = find_nonfinite(m, t->elements());
        if (bad >= 0) {
            fail("%s: tensor '%s': element %lld: expected a finite number, found %g", path, name, (long long)bad,
                 ((const float *)m.data)[bad]);
        }
    }
    return m;
}

static const std::string &get_metadata(const Safetensors &file, const char *key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) {
        fail("%s: __metadata__: %s: missing; not a model.bin (build/convert makes one from a checkpoint)",
             file.path.c_str(), key);
    }
    return found->second;
}

static bool is_pad(const TensorView &t) {
    return t.name.compare(0, strlen(PAD_PREFIX), PAD_PREFIX) == 0 && t.dtype == "U8" && t.bytes < TENSOR_ALIGN;
}

Model model_open(const std::string &path) {
    Model m;
    m.file = std::make_shared<Safetensors>(safetensors_open(path));
    const Safetensors &file = *m.file;
    const std::string &version = get_metadata(file, "format_version");
    if (version != std::to_string(MODEL_FORMAT_VERSION)) {
        refuse("%s: format_version: expected %d, found %s; convert the checkpoint again", path.c_str(),
               MODEL_FORMAT_VERSION, printable(version).c_str());
    }
    m.config = config_from_json(get_metadata(file, "config"), path + ": config");
    const Config &c = m.config;
    m.tokenizer = tokenizer_from_json(get_metadata(file, "tokenizer"), path + ": tokenizer");
    if (tokenizer_vocab(m.tokenizer) > c.vocab) {    // fewer is fine: rows are padded for the hardware's sake
        fail("%s: tokenizer: expected at most vocab = %d tokens, found %d", path.c_str(), c.vocab,
             tokenizer_vocab(m.tokenizer));
    }

    std::map<std::string, Matrix> found;
    std::map<std::string, int64_t> bytes;    // of a matrix or norm; of its scales, counted with it, 0
    for (const TensorSpec &spec : config_tensors(c)) {
        found[spec.name] = model_tensor(file, spec);
        for (const StoredTensor &t : stored_tensors(spec, found[spec.name].type)) {
            bytes[t.name] = 0;
            bytes[spec.name] += file.find(t.name)->bytes;
        }
        m.weights_bytes += bytes[spec.name];
    }
    for (const auto &t : file.tensors) {
        if (!bytes.count(t.first) && !is_pad(t.second)) {
            fail("%s: tensor '%s': not expected in this model", path.c_str(), printable(t.first).c_str());
        }
    }
    model_point_at(m, found);
    m.step_bytes = m.weights_bytes - (c.tied ? 0 : bytes["embed"]);
    return m;
}

void model_point_at(Model &m, const std::map<std::string, Matrix> &tensors) {
    auto norm = [&](const std::string &name) { return (const float *)tensors.at(name).data; };
    for (int l = 0; l < m.config.n_layers; l++) {
        const std::string n = "layers." + std::to_string(l) + ".";
        auto matrix = [&](const char *name) { return tensors.at(n + name); };
        m.layers.push_back({norm(n + "attn_norm"), norm(n + "ffn_norm"), matrix("wq"), matrix("wk"), matrix("wv"), matrix("wo"), matrix("w_gate"), matrix("w_up"), matrix("w_down")});
    }
    m.embed = tensors.at("embed");
    m.unembed = m.config.tied ? m.embed : tensors.at("unembed");
    m.out_norm = norm("out_norm");
}
