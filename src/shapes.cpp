#include "shapes.h"

bool shape_from_name(const std::string &name, Config *config) {
    Config c;
    c.dialect = "random " + name;
    auto shape = [&](int dim, int ffn_dim, int layers, int heads, int kv_heads, int head_dim, int vocab, int max_len) {
        c.dim = dim, c.ffn_dim = ffn_dim, c.n_layers = layers, c.n_heads = heads, c.n_kv_heads = kv_heads;
        c.head_dim = head_dim, c.vocab = vocab, c.max_len = max_len;
    };
    if (name == "llama-2-7b") {
        shape(4096, 11008, 32, 32, 32, 128, 32000, 4096);
    } else if (name == "llama-3-8b") {
        shape(4096, 14336, 32, 32, 8, 128, 128256, 8192);
        c.rope_theta = 500000.0f;
    } else if (name == "llama-3.2-1b") {
        shape(2048, 8192, 16, 32, 8, 64, 128256, 131072);
        c.rope_theta = 500000.0f;
        c.rope_factor = 32.0f;
        c.tied = true;
    } else {
        return false;
    }
    *config = c;
    return true;
}
