// checkpoint_hf.cpp - Hugging Face folders: config.json, *.safetensors (one file or shards), tokenizer files.
//
// A default that config.json leaves out is the one of transformers' LlamaConfig or MistralConfig.  A field that would
// change what the weights mean is refused by its name; fields that only matter for training are not looked at.
#include "checkpoint.h"
#include <algorithm>
#include <dirent.h>
#include "json.h"

constexpr uint64_t MAX_CONFIG_BYTES = 16 << 20;
constexpr uint64_t MAX_INDEX_BYTES = 64 << 20;

// ---- config.json ----------------------------------------------------------------------------------------------------

// A field may be absent, null, or this.
struct OnlyValue { const char *key; Json value; };

static void refuse_unsupported(const Json &j, const std::string &path) {
    const std::vector<OnlyValue> only = {
        {"attention_bias", false}, {"mlp_bias", false}, {"hidden_act", "silu"}, {"rope_interleaved", false},
        {"partial_rotary_factor", 1}, {"quantization_config", nullptr}, {"num_experts", nullptr},
        {"num_local_experts", nullptr}, {"n_routed_experts", nullptr}};
    for (const OnlyValue &o : only) {
        const auto found = j.find(o.key);
        if (found == j.end() || found->is_null() || *found == o.value) continue;
        refuse("%s: %s: not supported: expected %s, found %s", path.c_str(), o.key,
               o.value.is_null() ? "none" : show_json(o.value).c_str(), show_json(*found).c_str());
    }
}

static std::string read_model_type(const Json &j, const std::string &path) {
    const std::string type = get_string(get_field(j, "model_type", path), "model_type", path);
    if (type != "llama" && type != "mistral") {
        refuse("%s: model_type: not supported: expected llama or mistral, found '%s'", path.c_str(),
               printable(type).c_str());
    }
    if (j.contains("architectures") && !j["architectures"].is_null()) {
        const Json &list = j["architectures"];
        bool known = false;
        for (const char *name : {"LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"}) {
            known |= list == Json::array({name});
        }
        if (!known) {
            refuse("%s: architectures: not supported: expected LlamaForCausalLM or MistralForCausalLM, found %s",
                   path.c_str(), show_json(list).c_str());
        }
    }
    return type;
}

// rope_theta and rope_scaling; since transformers 5 both are in rope_parameters.
static void read_rope(Config &c, const Json &j, const std::string &path) {
    auto given = [](const Json &o, const char *key) { return o.contains(key) && !o[key].is_null(); };
    const Json *theta = given(j, "rope_theta") ? &j["rope_theta"] : nullptr;
    for (const char *key : {"rope_scaling", "rope_parameters"}) {
        if (!given(j, key)) continue;
        const Json &r = j[key];
        const std::string where = path + ": " + key;
        if (!r.is_object()) fail("%s: expected an object, found %s", where.c_str(), show_json(r).c_str());
        if (given(r, "rope_theta")) theta = &r["rope_theta"];
        const char *type_key = r.contains("rope_type") ? "rope_type" : "type";    // the older name
        const std::string type = get_string(get_field(r, type_key, where), type_key, where);
        if (type == "default" || type == "none") continue;
        if (type != "llama3") {
            refuse("%s: %s: not supported: expected llama3 or default, found '%s'", where.c_str(), type_key,
                   printable(type).c_str());
        }
        auto number = [&](const char *name) { return get_float(get_field(r, name, where), name, 1e-3, 1e6, where); };
        c.rope_factor = number("factor");
        c.rope_low_freq = number("low_freq_factor");
        c.rope_high_freq = number("high_freq_factor");
        const char *original = "original_max_position_embeddings";
        c.rope_original_len = (int)get_int(get_field(r, original, where), original, 1, 1 << 26, where);
    }
    if (theta) c.rope_theta = get_float(*theta, "rope_theta", 1, 1e12, path);
}

// Adds the ids of `key`, a number or a list of them, to ids.
static void add_ids(std::vector<int> &ids, const Json &j, const char *key, int vocab, const std::string &path) {
    if (!j.contains(key) || j[key].is_null()) return;
    const Json list = j[key].is_array() ? j[key] : Json::array({j[key]});
    for (const Json &value : list) {
        const int id = (int)get_int(value, key, 0, vocab - 1, path);
        if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
    }
}

static Json read_json(const std::string &path, uint64_t max_bytes) {
    const std::string text = read_text(path, max_bytes);
    Json j = parse_strict_json(text.data(), text.size(), path);
    if (!j.is_object()) fail("%s: expected an object, found %s", path.c_str(), show_json(j).c_str());
    return j;
}

Config read_hf_config(const std::string &path) {
    const Json j = read_json(path, MAX_CONFIG_BYTES);
    Config c;
    c.dialect = read_model_type(j, path);
    refuse_unsupported(j, path);
    auto number = [&](const char *key, int absent) {
        if (absent && (!j.contains(key) || j[key].is_null())) return absent;
        return (int)get_int(get_field(j, key, path), key, 1, INT32_MAX, path);
    };
    const bool mistral = c.dialect == "mistral";
    c.dim = number("hidden_size", 0);
    c.ffn_dim = number("intermediate_size", 0);
    c.n_layers = number("num_hidden_layers", 0);
    c.n_heads = number("num_attention_heads", 0);
    c.n_kv_heads = number("num_key_value_heads", mistral ? 8 : c.n_heads);
    c.vocab = number("vocab_size", 0);
    c.max_len = number("max_position_embeddings", mistral ? 131072 : 2048);
    if (!j.contains("head_dim") && c.dim % c.n_heads != 0) {
        fail("%s: num_attention_heads: expected a divisor of hidden_size = %d, found %d", path.c_str(), c.dim,
             c.n_heads);
    }
    c.head_dim = number("head_dim", std::max(1, c.dim / c.n_heads));
    c.norm_eps = 1e-6f;
    if (j.contains("rms_norm_eps")) c.norm_eps = get_float(j["rms_norm_eps"], "rms_norm_eps", 0, 1, path);
    const char *tied = "tie_word_embeddings";
    if (j.contains(tied)) c.tied = get_bool(j[tied], tied, path);
    read_rope(c, j, path);

    const bool no_window = j.contains("sliding_window") ? j["sliding_window"].is_null() : !mistral;
    if (!no_window) {
        const int window = number("sliding_window", 4096);    // MistralConfig's default
        if (window < c.max_len) {
            refuse("%s: sliding_window: not supported: expected null or at least max_position_embeddings = %d, found %d",
                   path.c_str(), c.max_len, window);
        }
    }
    add_ids(c.bos, j, "bos_token_id", c.vocab, path);
    add_ids(c.eos, j, "eos_token_id", c.vocab, path);
    config_check(c, path);
    return c;
}

// ---- weights --------------------------------------------------------------------------------------------------------

static std::string hf_name(const std::string &name) {
    static const std::map<std::string, std::string> names = {
        {"embed", "model.embed_tokens"}, {"out_norm", "model.norm"}, {"unembed", "lm_head"},
        {"attn_norm", "input_layernorm"}, {"ffn_norm", "post_attention_layernorm"},
        {"wq", "self_attn.q_proj"}, {"wk", "self_attn.k_proj"}, {"wv", "self_attn.v_proj"}, {"wo", "self_attn.o_proj"},
        {"w_gate", "mlp.gate_proj"}, {"w_up", "mlp.up_proj"}, {"w_down", "mlp.down_proj"}};
    const size_t dot = name.rfind('.') + 1;    // npos + 1 is 0
    return (dot ? "model." + name.substr(0, dot) : "") + names.at(name.substr(dot)) + ".weight";
}

// The weight files of a folder, in the order in which transformers looks for them.
static std::vector<std::string> find_weight_files(const std::string &folder) {
    if (path_exists(folder + "model.safetensors")) return {folder + "model.safetensors"};
    std::vector<std::string> files;
    const std::string index = folder + "model.safetensors.index.json";
    if (path_exists(index)) {
        const Json j = read_json(index, MAX_INDEX_BYTES);
        const Json &map = get_field(j, "weight_map", index);
        if (!map.is_object()) {
            fail("%s: weight_map: expected an object, found %s", index.c_str(), show_json(map).c_str());
        }
        for (const auto &entry : map.items()) {
            const std::string tensor = printable(entry.key());
            const std::string &shard = get_string(entry.value(), tensor.c_str(), index);
            // A name that leads out of the folder is no shard.
            if (shard.empty() || shard.find('/') != std::string::npos || shard.find('\0') != std::string::npos) {
                fail("%s: %s: expected a file name, found '%s'", index.c_str(), tensor.c_str(),
                     printable(shard).c_str());
            }
            if (!path_exists(folder + shard)) {
                fail("%s: the shard '%s' of tensor '%s' is missing", index.c_str(), printable(shard).c_str(),
                     tensor.c_str());
            }
            files.push_back(folder + shard);
        }
    } else if (DIR *dir = opendir(folder.c_str())) {
        bool pytorch = false;
        auto ends = [](const std::string &s, const std::string &end) {
            return s.size() > end.size() && s.compare(s.size() - end.size(), end.size(), end) == 0;
        };
        while (const dirent *entry = readdir(dir)) {
            if (ends(entry->d_name, ".safetensors")) files.push_back(folder + entry->d_name);
            pytorch |= !strncmp(entry->d_name, "pytorch_model", 13) || ends(entry->d_name, ".pth");
        }
        closedir(dir);
        if (files.empty() && pytorch) {
            refuse("%s: PyTorch checkpoints are not supported; save the model as safetensors", folder.c_str());
        }
    }
    if (files.empty()) fail("%s: no *.safetensors in this folder", folder.c_str());
    std::sort(files.begin(), files.end());
    files.erase(std::unique(files.begin(), files.end()), files.end());
    return files;
}

struct FoundTensor { TensorView view; SourceTensor source; };

// Every tensor of the folder by its name there.
static std::map<std::string, FoundTensor> list_tensors(const std::string &folder) {
    std::map<std::string, FoundTensor> all;
    for (const std::string &path : find_weight_files(folder)) {
        const Safetensors file = safetensors_open(path);
        for (const auto &t : file.tensors) {
            SourceTensor source;
            source.file = path;
            source.offset = file.data_offset() + t.second.begin;
            if (!all.insert({t.first, {t.second, source}}).second) {
                fail("%s: tensor '%s': also in %s", path.c_str(), printable(t.first).c_str(),
                     all[t.first].source.file.c_str());
            }
        }
    }
    return all;
}

// Tensors that we can do without: RoPE tables that old checkpoints carry, and an unembed that a tied model ignores.
static bool is_redundant(const std::string &name, const Config &c) {
    const std::string table = ".self_attn.rotary_emb.inv_freq";
    if (name.size() > table.size() && name.compare(name.size() - table.size(), table.size(), table) == 0) return true;
    return c.tied && name == "lm_head.weight";
}

Checkpoint open_hf(const std::string &source, const std::string &tokenizer) {
    const std::string folder = source.back() == '/' ? source : source + "/";
    Checkpoint checkpoint;
    Config &c = checkpoint.config;
    c = read_hf_config(folder + "config.json");
    const std::string generation = folder + "generation_config.json";
    if (path_exists(generation)) {
        add_ids(c.eos, read_json(generation, MAX_CONFIG_BYTES), "eos_token_id", c.vocab, generation);
    }

    const std::map<std::string, FoundTensor> all = list_tensors(folder);
    std::map<std::string, const TensorSpec *> wanted;
    const std::vector<TensorSpec> specs = config_tensors(c);
    for (const TensorSpec &spec : specs) wanted[hf_name(spec.name)] = &spec;
    for (const auto &t : all) {
        if (wanted.count(t.first) || is_redundant(t.first, c)) continue;
        refuse("%s: tensor '%s': not supported: a LLaMA model of this config has none", t.second.source.file.c_str(),
               printable(t.first).c_str());
    }
    bool first = true;
    for (const TensorSpec &spec : specs) {
        const std::string name = hf_name(spec.name);
        const auto found = all.find(name);
        if (found == all.end()) fail("%s: tensor '%s': missing", folder.c_str(), name.c_str());
        const TensorView &view = found->second.view;
        SourceTensor s = found->second.source;
        if (view.shape != spec.shape) {
            fail("%s: tensor '%s': shape: expected %s, found %s", s.file.c_str(), name.c_str(),
                 shape_text(spec.shape).c_str(), shape_text(view.shape).c_str());
        }
        if (!dtype_from_name(view.dtype, &s.type)) {
            refuse("%s: tensor '%s': dtype: not supported: expected F32, F16 or BF16, found %s", s.file.c_str(),
                   name.c_str(), view.dtype.c_str());
        }
        if (!spec.is_norm) {
            checkpoint.type = first || s.type == checkpoint.type ? s.type : DType::f32;
            first = false;
        }
        checkpoint.tensors[spec.name] = s;
    }
    checkpoint.tokenizer = tokenizer_import(tokenizer.empty() ? folder : tokenizer);
    return checkpoint;
}
