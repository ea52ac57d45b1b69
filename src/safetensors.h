// safetensors.h - the container of model.bin and of Hugging Face checkpoints: a JSON header, then raw tensors.
//
//   offset 0   u64 little-endian   header_bytes
//          8   header_bytes        JSON: {"__metadata__": {string: string}, "name": {"dtype", "shape", "data_offsets"}}
//     8 + header_bytes             data; data_offsets [begin, end) count from here
//
// Opening checks every number against the file before anything is used: header length, JSON, dtype, shape, the product
// shape x size (without overflow), offsets equal to the product, and that the tensors tile the data: no overlap, no
// gap, nothing behind the last one.  A tensor is a view into the mapped file; nothing is read before somebody touches it.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>
#include "base.h"
#include "ops.h"    // DType

struct TensorView {
    std::string name;
    std::string dtype;             // as written in the file: "F32", "F16", "BF16", "I64", ...
    std::vector<int64_t> shape;
    uint64_t begin, bytes;         // begin counts from the start of the data
    const void *data;              // into the mapping; aligned only as the file is
    int64_t elements() const;
};

struct Safetensors {
    std::string path;
    std::map<std::string, std::string> metadata;
    std::map<std::string, TensorView> tensors;
    const uint8_t *map = nullptr;       // the whole file
    uint64_t file_bytes = 0, header_bytes = 0;

    Safetensors() = default;
    Safetensors(Safetensors &&) noexcept;
    Safetensors &operator=(Safetensors &&) noexcept;
    ~Safetensors();
    const TensorView *find(const std::string &name) const;    // null when absent
    uint64_t data_offset() const { return 8 + header_bytes; }
};

// Map and check the file.  Fails with one line naming file, field, expected and found.
Safetensors safetensors_open(const std::string &path);

// Bytes of one element of a dtype by its name in the file; 0 for an unknown name.
int dtype_bytes(const std::string &name);
// "F32", "F16" or "BF16" for a DType and back; false for any other name.  The codes of q8 are "I8", those of q4 "U8": names
// that others use for other things, so there is no way back from them.
const char *dtype_name(DType type);
bool dtype_from_name(const std::string &name, DType *type);
// "f32", "f16", "bf16", "q8" or "q4" as command lines say it, and back; refuses any other.
const char *dtype_option(DType type);
DType parse_dtype(const std::string &name);
// "(4096, 256)", for messages.
std::string shape_text(const std::vector<int64_t> &shape);

// Writes a file in two steps, so that peak memory is one piece of one tensor: the plan (names, dtypes, shapes, metadata)
// gives the header, then the data are appended in that order.  Tensors start on multiples of 64 bytes; where one ends
// elsewhere, a tensor "pad.N" (U8) fills the gap, because the container knows no holes.  Everything goes to
// PATH.tmp.PID, renamed to PATH by finish(); a writer that is destroyed before removes its file.
struct SafetensorsWriter {
    struct Entry { std::string name, dtype; std::vector<int64_t> shape; };
    SafetensorsWriter(const std::string &path, const std::vector<Entry> &plan,
                      const std::map<std::string, std::string> &metadata);
    ~SafetensorsWriter();
    SafetensorsWriter(const SafetensorsWriter &) = delete;
    SafetensorsWriter &operator=(const SafetensorsWriter &) = delete;
    void append(const void *data, uint64_t bytes);    // next bytes of the current tensor; moves on when it is full
    void close();                                     // all tensors written: flush and fsync; temporary can be read now
    void finish();                                    // close(), then rename

    std::string path, temporary;
    std::vector<Entry> plan;                          // the caller's entries and the pads between them
    std::vector<uint64_t> bytes;                      // of every entry
    uint64_t file_bytes = 0;                          // of the whole file
    size_t current = 0;                               // entry being written, and how much of it is
    uint64_t current_bytes = 0;
    FILE *file = nullptr;

  private:
    void write(const void *data, uint64_t bytes);
    void discard();
};

constexpr uint64_t TENSOR_ALIGN = 64;    // a cache line and any vector load; cudaMemcpy and mmap are content with less
constexpr const char *PAD_PREFIX = "pad.";
