// checkpoint.cpp - see checkpoint.h: reading by position, writing model.bin, convert.
#include "checkpoint.h"
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <fcntl.h>
#include <memory>
#include <sys/stat.h>
#include <unistd.h>

// ---- files ----------------------------------------------------------------------------------------------------------

InputFile::InputFile(const std::string &path) : path(path) {
    struct stat info;
    if (stat(path.c_str(), &info) != 0) fail("%s: %s", path.c_str(), strerror(errno));
    if (!S_ISREG(info.st_mode)) fail("%s: expected a regular file", path.c_str());
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("%s: %s", path.c_str(), strerror(errno));
    bytes = info.st_size;
}

InputFile::~InputFile() { if (fd >= 0) close(fd); }

void InputFile::read(void *data, uint64_t n, uint64_t offset) const {
    uint64_t done = 0;
    while (done < n) {
        const ssize_t got = pread(fd, (char *)data + done, n - done, offset + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) fail("%s: cannot read: %s", path.c_str(), strerror(errno));
        if (got == 0) {
            fail("%s: truncated: expected %llu bytes at byte %llu, found %llu", path.c_str(), (unsigned long long)n,
                 (unsigned long long)offset, (unsigned long long)done);
        }
        done += got;
    }
}

std::string read_text(const std::string &path, uint64_t max_bytes) {
    const InputFile file(path);
    if (file.bytes > max_bytes) {
        fail("%s: expected at most %llu bytes, found %llu", path.c_str(), (unsigned long long)max_bytes,
             (unsigned long long)file.bytes);
    }
    std::string text(file.bytes, '\0');
    file.read(&text[0], file.bytes, 0);
    return text;
}

bool path_exists(const std::string &path) { return access(path.c_str(), F_OK) == 0; }

DType parse_dtype(const std::string &name) {
    if (name == "f32") return DType::f32;
    if (name == "f16") return DType::f16;
    if (name == "bf16") return DType::bf16;
    refuse("dtype: expected f32, f16 or bf16, found '%s'", name.c_str());
}

// ---- writing model.bin ----------------------------------------------------------------------------------------------

// FNV-1a in words of 8 bytes, the last one filled up with zeros.  It guards against a writer or a disk that goes wrong,
// not against an enemy.  Both passes cut a tensor into the same pieces.
static uint64_t checksum(uint64_t hash, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const char *)data + i, std::min<size_t>(8, bytes - i));
        hash = (hash ^ word) * 0x100000001b3;
        hash ^= hash >> 32;
    }
    return hash;
}

// n values from f32 to `type`, to nearest even.
static void round_values(void *out, DType type, const float *in, int64_t n) {
    if (type == DType::f32) memcpy(out, in, n * 4);
    else if (type == DType::f16) for (int64_t i = 0; i < n; i++) ((f16 *)out)[i] = to_f16(in[i]);
    else for (int64_t i = 0; i < n; i++) ((bf16 *)out)[i] = to_bf16(in[i]);
}

static int64_t row_length(const TensorSpec &spec) { return spec.shape.back(); }
static int64_t row_count(const TensorSpec &spec) { return spec.is_norm ? 1 : spec.shape[0]; }
static int64_t piece_rows(const TensorSpec &spec) { return std::max<int64_t>(1, PIECE / row_length(spec)); }

void model_write(const std::string &path, const Config &config, const Tokenizer &tokenizer, DType type,
                 const ReadRows &read_rows, const Progress &progress) {
    config_check(config, path + ": config");
    const std::vector<TensorSpec> specs = config_tensors(config);
    std::vector<SafetensorsWriter::Entry> plan;
    int64_t buffer = 0;
    uint64_t total = 0, done = 0;
    auto stored = [&](const TensorSpec &spec) { return spec.is_norm ? DType::f32 : type; };
    for (const TensorSpec &spec : specs) {
        plan.push_back({spec.name, dtype_name(stored(spec)), spec.shape});
        buffer = std::max(buffer, piece_rows(spec) * row_length(spec));
        total += 2 * row_count(spec) * row_length(spec) * dtype_size(stored(spec));    // written, then read
    }
    SafetensorsWriter writer(path, plan, {{"format_version", std::to_string(MODEL_FORMAT_VERSION)},
                                          {"config", config_to_json(config)},
                                          {"tokenizer", tokenizer_to_json(tokenizer)}});
    std::vector<float> values(buffer);
    std::vector<uint8_t> rounded(buffer * 4);
    // Calls f(first row, rows) for every piece of a tensor.
    auto for_pieces = [&](const TensorSpec &spec, const char *verb, auto f) {
        for (int64_t first = 0; first < row_count(spec); first += piece_rows(spec)) {
            const int64_t n = std::min(piece_rows(spec), row_count(spec) - first);
            f(first, n);
            done += n * row_length(spec) * dtype_size(stored(spec));
            progress(std::string(verb) + " " + spec.name, done, total);
        }
    };

    std::vector<uint64_t> sums;
    for (const TensorSpec &spec : specs) {
        uint64_t sum = 0;
        for_pieces(spec, "write", [&](int64_t first, int64_t n) {
            const int64_t count = n * row_length(spec);
            read_rows(spec, first, n, values.data());
            round_values(rounded.data(), stored(spec), values.data(), count);
            const int64_t bad = find_nonfinite(rounded.data(), stored(spec), count);
            if (bad >= 0) {
                const float x = values[bad];
                fail("tensor '%s': element %lld is %g%s", spec.name.c_str(),
                     (long long)(first * row_length(spec) + bad), x,
                     !std::isfinite(x) ? ", expected a finite number" :
                     type == DType::f16   ? ", beyond the range of f16 (65504); use --dtype bf16"
                                          : ", beyond the range of bf16; use --dtype f32");
            }
            const uint64_t bytes = count * dtype_size(stored(spec));
            sum = checksum(sum, rounded.data(), bytes);
            writer.append(rounded.data(), bytes);
        });
        sums.push_back(sum);
    }
    writer.close();

    // What a reader will see is compared with what was meant.
    const Model model = model_open(writer.temporary);
    const InputFile file(writer.temporary);
    for (size_t i = 0; i < specs.size(); i++) {
        const uint64_t begin = model.file->data_offset() + model.file->find(specs[i].name)->begin;
        uint64_t sum = 0;
        for_pieces(specs[i], "verify", [&](int64_t first, int64_t n) {
            const uint64_t row = row_length(specs[i]) * dtype_size(stored(specs[i]));
            file.read(rounded.data(), n * row, begin + first * row);
            sum = checksum(sum, rounded.data(), n * row);
        });
        if (sum != sums[i]) {
            fail("%s: tensor '%s': reads back as other bytes than were written; is the disk all right?", path.c_str(),
                 specs[i].name.c_str());
        }
    }
    writer.finish();
}

// ---- convert --------------------------------------------------------------------------------------------------------

// Reads rows of a checkpoint; keeps its files open.
struct SourceReader {
    const Checkpoint &checkpoint;
    std::map<std::string, std::unique_ptr<InputFile>> files;
    std::vector<uint8_t> raw;

    void operator()(const TensorSpec &spec, int64_t first, int64_t n, float *rows) {
        const SourceTensor &s = checkpoint.tensors.at(spec.name);
        std::unique_ptr<InputFile> &file = files[s.file];
        if (!file) file = std::make_unique<InputFile>(s.file);
        const int64_t cols = row_length(spec), row_bytes = cols * dtype_size(s.type), d = s.interleaved_d;
        raw.resize(n * row_bytes);
        if (!d) file->read(raw.data(), n * row_bytes, s.offset + first * row_bytes);
        else for (int64_t i = 0; i < n; i++) {
            const int64_t row = first + i, head = row / d, j = row % d;
            const int64_t theirs = head * d + 2 * (j % (d / 2)) + j / (d / 2);
            file->read(&raw[i * row_bytes], row_bytes, s.offset + theirs * row_bytes);
        }
        for (int64_t i = 0; i < n * cols; i++) {
            rows[i] = s.type == DType::f32   ? ((const float *)raw.data())[i]
                      : s.type == DType::f16 ? to_f32(((const f16 *)raw.data())[i])
                                             : to_f32(((const bf16 *)raw.data())[i]);
        }
    }
};

Checkpoint checkpoint_open(const std::string &source, const std::string &tokenizer) {
    struct stat info;
    if (stat(source.c_str(), &info) != 0) fail("%s: %s", source.c_str(), strerror(errno));
    return S_ISDIR(info.st_mode) ? open_hf(source, tokenizer) : open_llama2c(source, tokenizer);
}

static bool same_file(const std::string &a, const std::string &b) {
    struct stat x, y;
    return stat(a.c_str(), &x) == 0 && stat(b.c_str(), &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

void convert(const ConvertOptions &options) {
    const DType wanted = options.dtype.empty() ? DType::f32 : parse_dtype(options.dtype);    // before any work
    Checkpoint checkpoint = checkpoint_open(options.source, options.tokenizer);
    for (const auto &t : checkpoint.tensors) {
        if (same_file(t.second.file, options.output)) {
            refuse("%s: is the source; name another output", options.output.c_str());
        }
    }
    const int found = tokenizer_vocab(checkpoint.tokenizer);
    if (found > checkpoint.config.vocab) {
        fail("%s: the tokenizer has %d tokens, expected at most vocab = %d", options.source.c_str(), found,
             checkpoint.config.vocab);
    }
    // The checkpoint's word on bos and eos comes before the tokenizer's.
    Config &c = checkpoint.config;
    if (c.bos.empty() && checkpoint.tokenizer.bos >= 0) c.bos = {checkpoint.tokenizer.bos};
    if (c.eos.empty()) c.eos = checkpoint.tokenizer.eos;
    SourceReader reader{checkpoint, {}, {}};
    model_write(options.output, c, checkpoint.tokenizer, options.dtype.empty() ? checkpoint.type : wanted,
                std::ref(reader), options.progress);
}
