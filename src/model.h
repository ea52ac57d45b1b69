// model.h - what a checkpoint is: its Config, its tensors, its tokenizer; opened from model.bin (tools/FORMAT.md).
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>
#include "ops.h"
#include "safetensors.h"
#include "tokenizer.h"

struct Config {
    int dim = 0, ffn_dim = 0, n_layers = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, vocab = 0;
    int max_len = 0;                   // positions the model was trained for
    float norm_eps = 1e-5f;
    float rope_theta = 10000.0f;
    // rope_scaling "llama3" (Llama 3.1): factor 0 means none
    float rope_factor = 0.0f, rope_low_freq = 1.0f, rope_high_freq = 4.0f;
    int rope_original_len = 8192;
    bool tied = false;                 // unembed is embed
    std::vector<int> bos, eos;         // ids: bos has at most one; generation stops at any of eos
    std::string dialect;               // where it came from, for show: "llama", "mistral", "llama2.c", ...
};

// Fails unless every field is in its range and the fields fit each other.  The ranges keep every product of sizes far
// from 2^63.  `where` names the file in errors, here and below.
void config_check(const Config &c, const std::string &where);

// One tensor a model.bin must hold.  Names: embed, layers.N.attn_norm|wq|wk|wv|wo|ffn_norm|w_gate|w_up|w_down, out_norm,
// unembed (absent when tied).  Matrices are (out, in), row-major, in any DType; norms are (dim) f32.
// Heads use the half layout: RoPE turns channels j and j + head_dim/2 together.
struct TensorSpec { std::string name; std::vector<int64_t> shape; bool is_norm; };
std::vector<TensorSpec> config_tensors(const Config &c);

// How a model of `type` stores that tensor: norms in f32; rows that are no whole groups (groups.h) in bf16;
// embed and unembed of q4 in q8: they are a small part of a large model, and the KL of books-46m halves.
DType stored_type(const TensorSpec &spec, DType type);
// The entries of the file that hold a matrix or norm of `type`: one, and for q8 and q4 another, NAME.scale.
struct StoredTensor { std::string name; const char *dtype; std::vector<int64_t> shape; };
std::vector<StoredTensor> stored_tensors(const TensorSpec &spec, DType type);

// Config <-> the JSON text in the metadata.  Reading checks every field: present, a number of the right kind, in range,
// consistent with the others, and known.
std::string config_to_json(const Config &c);
Config config_from_json(const std::string &json, const std::string &where);

// RoPE frequencies in radians a token, (head_dim/2), in double: theta^(-2j/d), then the llama3 scaling if any.
std::vector<double> rope_frequencies(const Config &c);

constexpr int MODEL_FORMAT_VERSION = 1;

struct LayerWeights {
    const float *attn_norm, *ffn_norm;                    // (D)
    Matrix wq, wk, wv, wo, w_gate, w_up, w_down;          // (out, in)
};

struct Model {
    Config config;
    Tokenizer tokenizer;
    Matrix embed, unembed;                                // (V, D), the same one when tied
    const float *out_norm = nullptr;                      // (D)
    std::vector<LayerWeights> layers;
    int64_t weights_bytes = 0;                            // of all tensors
    int64_t step_bytes = 0;                               // read by one decode step: everything but an untied embed
    std::shared_ptr<Safetensors> file;                    // keeps the mapping alive
    std::shared_ptr<void> memory;                         // the weights on another device (device.h); null: in the mapping
};

// Map model.bin, check every tensor of config_tensors() for presence, dtype and shape (nothing more may be there), and
// point the weights at the mapping.  Norms are small and are checked for NaN and infinity; matrices are not read
// (build/show does that).  Fails with file, tensor, expected, found.
Model model_open(const std::string &path);
// Layers, embed, unembed and out_norm of m are those of `tensors`, by the names of config_tensors().
void model_point_at(Model &m, const std::map<std::string, Matrix> &tensors);

// The matrix or norm of one spec in an open file, checked like model_open does.
Matrix model_tensor(const Safetensors &file, const TensorSpec &spec);

// The first of n values (f32, f16, bf16) that is NaN or infinite, -1 if all are finite.
int64_t find_nonfinite(const void *data, DType type, int64_t n);
// The same of n weights: of q8 and q4, the first of those that share such a scale.
int64_t find_nonfinite(const Matrix &m, int64_t n);
