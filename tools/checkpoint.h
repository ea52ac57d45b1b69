// checkpoint.h - the checkpoints of others, and how they become model.bin.  convert, random_model and the tests share it.
//
//   checkpoint_open   SRC -> a Checkpoint: config, tokenizer, and for each of our tensors where its bytes are
//   model_write       a config, a tokenizer and a function that gives rows -> model.bin, checked, verified, renamed
//   convert           the two in sequence
//
// Tensors pass through in pieces of about PIECE elements, so memory does not grow with the model.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>
#include "model.h"

constexpr int64_t PIECE = 1 << 20;    // elements: 4 MiB as f32; larger pieces are no faster

// One tensor in a file of others: rows of `cols` elements, one after the other.
struct SourceTensor {
    std::string file;
    uint64_t offset = 0;
    DType type = DType::f32;
    // llama2.c turns channels 2j and 2j+1 of a head together, we turn j and j + d/2.  With d > 0 the rows are
    // in its order, and our row j of a head is its row 2j, our row j + d/2 its row 2j+1.
    int interleaved_d = 0;
};

struct Checkpoint {
    Config config;
    Tokenizer tokenizer;
    std::map<std::string, SourceTensor> tensors;    // by our name: all of config_tensors(config)
    DType type = DType::f32;                        // of its matrices; f32 if they differ
};

// A folder is a Hugging Face checkpoint, a file one of llama2.c.  `tokenizer` is a file or folder, or empty: beside the
// weights.  What cannot be represented exactly is refused by name.
Checkpoint checkpoint_open(const std::string &source, const std::string &tokenizer);
Checkpoint open_hf(const std::string &folder, const std::string &tokenizer);          // checkpoint_hf.cpp
Checkpoint open_llama2c(const std::string &file, const std::string &tokenizer);       // checkpoint_llama2c.cpp

// The shape of a Hugging Face config.json.
Config read_hf_config(const std::string &path);

// A file read by position.  Not a mapping: pages of a mapping would count as our memory, and a file that shrinks
// meanwhile is an error here and a signal there.
struct InputFile {
    std::string path;
    int fd = -1;
    uint64_t bytes = 0;
    explicit InputFile(const std::string &path);
    ~InputFile();
    InputFile(const InputFile &) = delete;
    InputFile &operator=(const InputFile &) = delete;
    void read(void *data, uint64_t n, uint64_t offset) const;
};
std::string read_text(const std::string &path, uint64_t max_bytes);    // a whole small file
bool path_exists(const std::string &path);

// Rows [first, first + n) of a tensor, as f32.  A norm is a single row.
using ReadRows = std::function<void(const TensorSpec &spec, int64_t first, int64_t n, float *rows)>;
// Called after every piece; may throw to stop, then no file is left behind.
using Progress = std::function<void(const std::string &doing, uint64_t done, uint64_t total)>;

// Matrices in `type`, or as stored_type() says.  Refuses NaN, infinity and values beyond the range, by tensor and element.  Before the file gets its name
// it is opened again as a model and every tensor is compared with the checksum taken on the way.
void model_write(const std::string &path, const Config &config, const Tokenizer &tokenizer, DType type,
                 const ReadRows &read_rows, const Progress &progress);

struct ConvertOptions {
    std::string source, output;
    std::string tokenizer;    // empty: beside the weights
    std::string dtype;        // "f32", "f16", "bf16", "q8", "q4"; empty: as in the checkpoint
    Progress progress = [](const std::string &, uint64_t, uint64_t) {};
};
std::string convert(const ConvertOptions &options);    // left_in_bf16() of what it wrote

// A sentence about the matrices that `type` is not for, empty if there are none.
std::string left_in_bf16(const Config &config, DType type);
