// checkpoint_llama2c.cpp - the checkpoints of llama2.c: raw f32 behind a small header.
//
//   legacy     int32 dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab, max_len; vocab < 0: untied
//              embed, attn_norm*, wq*, wk*, wv*, wo*, ffn_norm*, w_gate*, w_down*, w_up*, out_norm,
//              cos and sin of RoPE (max_len, head_dim/2) each, which we compute ourselves, unembed if untied
//   version 1  u32 "ak42", int32 1, the same seven int32, u8 tied, zeros up to byte 256
//              attn_norm*, ffn_norm*, out_norm, embed, wq*, wk*, wv*, wo*, w_gate*, w_down*, w_up*, unembed if untied
//   version 2  int8, refused
//
// * stands for that tensor of every layer in turn.  The size of the file follows from the header and is checked.
#include "checkpoint.h"

constexpr uint32_t MAGIC = 0x616b3432;    // "ak42"

// What else people hand over; a hint is worth more than the sizes that do not fit.
static void refuse_others(const InputFile &file, const char *head) {
    const char *path = file.path.c_str();
    if (!memcmp(head, "GGUF", 4)) refuse("%s: GGUF is not supported; convert the original Hugging Face folder", path);
    if (!memcmp(head, "PK\3\4", 4)) {
        refuse("%s: a PyTorch checkpoint is not supported; save it as safetensors and give the folder", path);
    }
    if (head[8] == '{') refuse("%s: a single safetensors file; give the folder that holds it and config.json", path);
}

Checkpoint open_llama2c(const std::string &path, const std::string &tokenizer) {
    const InputFile file(path);
    char head[256] = {};
    file.read(head, std::min<uint64_t>(file.bytes, sizeof head), 0);
    if (file.bytes < 28) {
        fail("%s: expected a llama2.c checkpoint, found %llu bytes", path.c_str(), (unsigned long long)file.bytes);
    }
    refuse_others(file, head);

    int32_t word[9];
    memcpy(word, head, sizeof word);
    const bool legacy = (uint32_t)word[0] != MAGIC;
    if (!legacy && word[1] != 1) {
        refuse("%s: llama2.c version: expected legacy or 1, found %d%s", path.c_str(), word[1],
               word[1] == 2 ? " (int8); export the model as version 1" : "");
    }
    const int32_t *field = legacy ? word : word + 2;
    const uint8_t shared = head[36];
    if (!legacy && shared > 1) fail("%s: shared_classifier: expected 0 or 1, found %d", path.c_str(), shared);

    Checkpoint checkpoint;
    Config &c = checkpoint.config;
    c.dialect = legacy ? "llama2.c legacy" : "llama2.c version 1";
    c.dim = field[0], c.ffn_dim = field[1], c.n_layers = field[2], c.n_heads = field[3], c.n_kv_heads = field[4];
    c.tied = legacy ? field[5] > 0 : shared == 1;
    c.vocab = legacy && field[5] < 0 && field[5] != INT32_MIN ? -field[5] : field[5];
    c.max_len = field[6];
    if (c.n_heads < 1 || c.dim % c.n_heads != 0) {
        fail("%s: not a llama2.c checkpoint: expected n_heads to divide dim, found dim %d, n_heads %d", path.c_str(),
             c.dim, c.n_heads);
    }
    c.head_dim = c.dim / c.n_heads;
    config_check(c, path);

    std::map<std::string, TensorSpec> specs;
    for (const TensorSpec &spec : config_tensors(c)) specs[spec.name] = spec;
    uint64_t offset = legacy ? 28 : 256;
    auto take = [&](const std::string &name) {
        SourceTensor s;
        s.file = path;
        s.offset = offset;
        const std::string last = name.substr(name.rfind('.') + 1);
        s.interleaved_d = last == "wq" || last == "wk" ? c.head_dim : 0;
        checkpoint.tensors[name] = s;
        uint64_t bytes = 4;
        for (const int64_t n : specs.at(name).shape) bytes *= n;
        offset += bytes;
    };
    auto take_layers = [&](const char *name) {
        for (int l = 0; l < c.n_layers; l++) take("layers." + std::to_string(l) + "." + name);
    };
    const std::vector<const char *> attention = {"wq", "wk", "wv", "wo"}, ffn = {"w_gate", "w_down", "w_up"};
    if (legacy) {
        take("embed");
        take_layers("attn_norm");
        for (const char *name : attention) take_layers(name);
        take_layers("ffn_norm");
        for (const char *name : ffn) take_layers(name);
        take("out_norm");
        offset += 4ull * c.max_len * c.head_dim;
    } else {
        take_layers("attn_norm");
        take_layers("ffn_norm");
        take("out_norm");
        take("embed");
        for (const char *name : attention) take_layers(name);
        for (const char *name : ffn) take_layers(name);
    }
    if (!c.tied) take("unembed");
    if (offset != file.bytes) {
        fail("%s: a llama2.c checkpoint (%s) of dim %d, ffn_dim %d, %d layers, %d heads, %d kv heads, vocab %d, "
             "max_len %d has %llu bytes, found %llu", path.c_str(), legacy ? "legacy" : "version 1", c.dim, c.ffn_dim,
             c.n_layers, c.n_heads, c.n_kv_heads, c.vocab, c.max_len, (unsigned long long)offset,
             (unsigned long long)file.bytes);
    }

    const size_t slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "" : path.substr(0, slash + 1);
    std::string from = tokenizer;
    for (const char *name : {"tokenizer.model", "tokenizer.bin"}) {
        if (from.empty() && path_exists(folder + name)) from = folder + name;
    }
    if (from.empty()) {
        fail("%s: no tokenizer.model or tokenizer.bin beside it; name one with --tokenizer FILE", path.c_str());
    }
    checkpoint.tokenizer = tokenizer_import(from);
    return checkpoint;
}
