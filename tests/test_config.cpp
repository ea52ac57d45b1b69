// test_config.cpp - config.json of Hugging Face: what is read, with which defaults, and what is refused by name; the
// config in model.bin; the frequencies of RoPE.
#include <cmath>
#include <doctest/doctest.h>
#include "temp_files.h"

// As transformers writes it for Llama 3.2 1B, shortened.
static const char *LLAMA32_1B = R"({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
    "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
    "vocab_size": 128256})";

static Config read_text_config(const std::string &text) {
    const TempFolder folder("config");
    write_file(folder.path + "config.json", text);
    return read_hf_config(folder.path + "config.json");
}

TEST_CASE("config: Llama 3.2 1B, field by field") {
    const Config c = read_text_config(LLAMA32_1B);
    CHECK(c.dim == 2048);
    CHECK(c.ffn_dim == 8192);
    CHECK(c.n_layers == 16);
    CHECK(c.n_heads == 32);
    CHECK(c.n_kv_heads == 8);
    CHECK(c.head_dim == 64);
    CHECK(c.vocab == 128256);
    CHECK(c.max_len == 131072);
    CHECK(c.norm_eps == 1e-5f);
    CHECK(c.rope_theta == 500000.0f);
    CHECK(c.rope_factor == 32.0f);
    CHECK(c.rope_low_freq == 1.0f);
    CHECK(c.rope_high_freq == 4.0f);
    CHECK(c.rope_original_len == 8192);
    CHECK(c.tied);
    CHECK(c.bos == std::vector<int>{128000});
    CHECK(c.eos == std::vector<int>{128001, 128008, 128009});
}

TEST_CASE("config: what config.json may leave out or write differently") {
    Json j = Json::parse(LLAMA32_1B);
    for (const char *key : {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "hidden_act",
                            "tie_word_embeddings", "bos_token_id", "eos_token_id", "max_position_embeddings",
                            "architectures", "attention_bias", "mlp_bias"}) j.erase(key);
    Config c = read_text_config(j.dump());
    CHECK(c.n_kv_heads == 32);
    CHECK(c.head_dim == 64);
    CHECK(c.norm_eps == 1e-6f);
    CHECK(c.rope_theta == 10000.0f);
    CHECK(c.rope_factor == 0.0f);
    CHECK(!c.tied);
    CHECK(c.bos.empty());
    CHECK(c.eos.empty());
    CHECK(c.max_len == 2048);

    j["head_dim"] = nullptr, j["rope_scaling"] = nullptr, j["bos_token_id"] = nullptr, j["eos_token_id"] = 7;
    j["sliding_window"] = nullptr, j["quantization_config"] = nullptr;
    c = read_text_config(j.dump());
    CHECK(c.head_dim == 64);
    CHECK(c.eos == std::vector<int>{7});

    j["head_dim"] = 128;    // apart from dim / heads
    j["rope_theta"] = 500000;
    j["rope_scaling"] = {{"type", "default"}};
    c = read_text_config(j.dump());
    CHECK(c.head_dim == 128);
    CHECK(c.rope_theta == 500000.0f);
    CHECK(c.rope_factor == 0.0f);

    j.erase("rope_theta"), j.erase("rope_scaling");    // transformers 5
    j["rope_parameters"] = {{"rope_type", "llama3"}, {"rope_theta", 250000.0}, {"factor", 8.0}, {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 4096}};
    c = read_text_config(j.dump());
    CHECK(c.rope_theta == 250000.0f);
    CHECK(c.rope_factor == 8.0f);
    CHECK(c.rope_original_len == 4096);

    j["model_type"] = "mistral", j["architectures"] = {"MistralForCausalLM"};
    CHECK(read_text_config(j.dump()).dialect == "mistral");
    j["sliding_window"] = 2048, j["max_position_embeddings"] = 2048;    // a window that hides nothing
    CHECK(read_text_config(j.dump()).max_len == 2048);
}

TEST_CASE("config: refused by name") {
    struct Case { const char *key; Json value; const char *part; int code; };
    const Json gone(Json::value_t::discarded), yarn = {{"rope_type", "yarn"}, {"factor", 4.0}};
    const Case cases[] = {
        {"model_type",      "qwen2",    "model_type: not supported: expected llama or mistral, found 'qwen2'", 2},
        {"model_type",      "mixtral",  "found 'mixtral'", 2},
        {"model_type",      gone,       "model_type: missing", 1},
        {"model_type",      7,          "model_type: expected a string, found 7", 1},
        {"architectures",   {"LlamaForSequenceClassification"}, "architectures: not supported", 2},
        {"architectures",   "LlamaForCausalLM", "architectures: not supported", 2},
        {"attention_bias",  true,       "attention_bias: not supported: expected false, found true", 2},
        {"mlp_bias",        true,       "mlp_bias: not supported", 2},
        {"hidden_act",      "gelu",     "hidden_act: not supported: expected \"silu\", found \"gelu\"", 2},
        {"quantization_config", {{"bits", 4}}, "quantization_config: not supported: expected none", 2},
        {"num_local_experts", 8,        "num_local_experts: not supported", 2},
        {"num_experts",     64,         "num_experts: not supported", 2},
        {"n_routed_experts", 64,        "n_routed_experts: not supported", 2},
        {"rope_interleaved", true,      "rope_interleaved: not supported", 2},
        {"partial_rotary_factor", 0.5,  "partial_rotary_factor: not supported: expected 1, found 0.5", 2},
        {"sliding_window",  4096,       "sliding_window: not supported: expected null or at least max_position_embeddings = 131072, found 4096", 2},
        {"rope_scaling",    yarn,       "rope_scaling: rope_type: not supported: expected llama3 or default, found 'yarn'", 2},
        {"rope_scaling",    {{"type", "linear"}, {"factor", 2.0}}, "type: not supported: expected llama3 or default, found 'linear'", 2},
        {"rope_scaling",    {{"factor", 2.0}}, "type: missing", 1},
        {"rope_scaling",    "llama3",   "rope_scaling: expected an object", 1},
        {"rope_scaling",    {{"rope_type", "llama3"}}, "rope_scaling: factor: missing", 1},
        {"rope_scaling",    {{"rope_type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4},
                             {"original_max_position_embeddings", 8192}}, "low_freq_factor < high_freq_factor", 1},
        {"hidden_size",     gone,       "hidden_size: missing", 1},
        {"hidden_size",     0,          "hidden_size: expected a whole number from 1", 1},
        {"hidden_size",     -1,         "found -1", 1},
        {"hidden_size",     2048.5,     "found 2048.5", 1},
        {"hidden_size",     1 << 20,    "dim: expected 1 to 131072", 1},
        {"hidden_size",     99999999999, "found 99999999999", 1},
        {"num_hidden_layers", 1025,     "n_layers: expected 1 to 1024", 1},
        {"num_attention_heads", 33,     "n_kv_heads: expected a divisor of n_heads = 33, found 8", 1},
        {"num_key_value_heads", 0,      "num_key_value_heads", 1},
        {"num_key_value_heads", 5,      "n_kv_heads: expected a divisor of n_heads = 32, found 5", 1},
        {"head_dim",        7,          "head_dim: expected a multiple of 8, found 7", 1},
        {"head_dim",        512,        "head_dim: expected 1 to 256, found 512", 1},
        {"vocab_size",      "128256",   "vocab_size", 1},
        {"vocab_size",      1 << 30,    "vocab: expected 1 to", 1},
        {"rms_norm_eps",    0,          "norm_eps", 1},
        {"rms_norm_eps",    -1e-5,      "rms_norm_eps", 1},
        {"rope_theta",      -1,         "rope_theta", 1},
        {"tie_word_embeddings", 1,      "tie_word_embeddings: expected true or false, found 1", 1},
        {"eos_token_id",    -1,         "eos_token_id", 1},
        {"eos_token_id",    {1, 128256}, "eos_token_id: expected a whole number from 0 to 128255, found 128256", 1},
        {"bos_token_id",    {1, 2},     "bos: expected at most one id, found 2", 1},
    };
    for (const Case &k : cases) {
        INFO(k.key, " ", k.value.dump());
        Json j = Json::parse(LLAMA32_1B);
        if (k.value.is_discarded()) j.erase(k.key); else j[k.key] = k.value;
        const Outcome o = outcome_of([&] { read_text_config(j.dump()); });
        INFO(o.line);
        CHECK(o.code == k.code);
        CHECK(contains(o.line, k.part));
        CHECK(contains(o.line, "config.json"));
    }
    for (const char *text : {"", "[]", "{", "{\"model_type\":\"llama\",\"model_type\":\"qwen2\"}"}) {
        CHECK(outcome_of([&] { read_text_config(text); }).code == 1);
    }
    Json mistral = Json::parse(LLAMA32_1B);    // MistralConfig has a window unless it is told otherwise
    mistral["model_type"] = "mistral";
    CHECK(contains(outcome_of([&] { read_text_config(mistral.dump()); }).line, "sliding_window"));
}

TEST_CASE("config: there and back through model.bin's JSON") {
    Config c = read_text_config(LLAMA32_1B);
    c.norm_eps = std::nextafter(1e-5f, 1.0f);
    c.rope_theta = 1234567.125f;
    const std::string text = config_to_json(c);
    const Config r = config_from_json(text, "x");
    CHECK(config_to_json(r) == text);
    CHECK(r.norm_eps == c.norm_eps);
    CHECK(r.rope_theta == c.rope_theta);
    CHECK(r.rope_factor == c.rope_factor);
    CHECK(r.eos == c.eos);
    CHECK(contains(config_to_json(tiny_config()), "\"norm_eps\":1e-05,"));
    CHECK(contains(config_to_json(tiny_config()), "\"rope_scaling\":null"));
}

TEST_CASE("rope: frequencies, plain and with llama3 scaling") {
    Config c;
    c.head_dim = 8;
    const std::vector<double> plain = rope_frequencies(c);
    REQUIRE(plain.size() == 4);
    const double expected[] = {1.0, 0.1, 0.01, 0.001};    // 10000^(-2j/8)
    for (int j = 0; j < 4; j++) CHECK(std::fabs(plain[j] - expected[j]) < 1e-15);

    // By wavelengths, as Meta's code has it: short waves stay, long ones are stretched, those between blend.
    c = read_text_config(LLAMA32_1B);
    const std::vector<double> scaled = rope_frequencies(c);
    const double old_len = 8192, low_wave = old_len / 1.0, high_wave = old_len / 4.0;
    int kept = 0, blended = 0, stretched = 0;
    for (int j = 0; j < 32; j++) {
        const double f = std::pow(500000.0, -j / 32.0), wave = 2 * M_PI / f;
        double want = f;
        if (wave > low_wave) want = f / 32.0, stretched++;
        else if (wave >= high_wave) {
            const double smooth = (old_len / wave - 1.0) / (4.0 - 1.0);
            want = (1 - smooth) * f / 32.0 + smooth * f, blended++;
        } else kept++;
        CHECK(std::fabs(scaled[j] - want) < 1e-12 * f);
    }
    CHECK(kept > 0);
    CHECK(blended > 0);
    CHECK(stretched > 0);
}
