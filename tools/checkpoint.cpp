// checkpoint.cpp - see checkpoint.h: reading by position, writing model.bin, convert.
#include "checkpoint.h"
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <fcntl.h>
#include <memory>
#include <sys/stat.h>
#include <unistd.h>
#include "groups.h"

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

// n values from f32 to `type`: to nearest even, or as groups.h says.
static void round_values(void *out, f16 *scale, DType type, const float *in, int64_t n) {
    if (is_grouped(type)) quantize_groups(out, scale, type, in, n);
    else if (type == DType::f32) memcpy(out, in, n * 4);
    else if (type == DType::f16) for (int64_t i = 0; i < n; i++) ((f16 *)out)[i] = to_f16(in[i]);
    else for (int64_t i = 0; i < n; i++) ((bf16 *)out)[i] = to_bf16(in[i]);
}

static const char *beyond_range(DType type) {
    return type == DType::f16   ? ", beyond the range of f16 (65504); use --dtype bf16"
           : is_grouped(type)   ? ", beyond the range of a scale (f16); use --dtype bf16"
                                : ", beyond the range of bf16; use --dtype f32";
}

static int64_t row_length(const TensorSpec &spec) { return spec.shape.back(); }
static int64_t row_count(const TensorSpec &spec) { return spec.is_norm ? 1 : spec.shape[0]; }
static int64_t piece_rows(const TensorSpec &spec) { return std::max<int64_t>(1, PIECE / row_length(spec)); }

void model_write(const std::string &path, const Config &config, const Tokenizer &tokenizer, DType type,
                 const ReadRows &read_rows, const Progress &progress) {
    config_check(config, path + ": config");
    const std::vector<TensorSpec> specs = config_tensors(config);
    // What is written, entry by entry, and the checksum of its bytes, taken in pieces of piece_bytes.
    struct Written { std::string name; int64_t bytes, piece_bytes; uint64_t sum; };
    std::vector<Written> entries;
    std::vector<SafetensorsWriter::Entry> plan;
    int64_t buffer = 0, largest = 0;
    uint64_t total = 0, done = 0;
    for (const TensorSpec &spec : specs) {
        const DType t = stored_type(spec, type);
        const int64_t count = row_count(spec) * row_length(spec), piece = piece_rows(spec) * row_length(spec);
        for (const StoredTensor &e : stored_tensors(spec, t)) {
            const bool scales = e.name != spec.name;
            const int64_t bytes = scales ? scale_bytes(t, count) : code_bytes(t, count);
            plan.push_back({e.name, e.dtype, e.shape});
            entries.push_back({e.name, bytes, scales ? bytes : code_bytes(t, piece), 0});
            largest = std::max(largest, entries.back().piece_bytes);
            total += 2 * bytes;    // written, then read
        }
        buffer = std::max(buffer, piece);
    }
    SafetensorsWriter writer(path, plan, {{"format_version", std::to_string(MODEL_FORMAT_VERSION)},
                                          {"config", config_to_json(config)},
                                          {"tokenizer", tokenizer_to_json(tokenizer)}});
    std::vector<float> values(buffer);
    std::vector<uint8_t> rounded(largest);
    std::vector<f16> scales;    // of the whole matrix: they follow its codes
    auto advance = [&](const char *verb, const std::string &name, int64_t bytes) {
        progress(std::string(verb) + " " + name, done += bytes, total);
    };

    size_t entry = 0;
    auto append = [&](const void *data, int64_t bytes) {
        entries[entry].sum = checksum(entries[entry].sum, data, bytes);
        writer.append(data, bytes);
        advance("write", entries[entry].name, bytes);
    };
    for (const TensorSpec &spec : specs) {
        const DType t = stored_type(spec, type);
        const int64_t cols = row_length(spec);
        scales.resize(scale_bytes(t, row_count(spec) * cols) / sizeof(f16));
        for (int64_t first = 0; first < row_count(spec); first += piece_rows(spec)) {
            const int64_t count = std::min(piece_rows(spec), row_count(spec) - first) * cols;
            f16 *const scale = scales.data() + scale_bytes(t, first * cols) / sizeof(f16);
            read_rows(spec, first, count / cols, values.data());
            int64_t bad = find_nonfinite(values.data(), DType::f32, count);
            if (bad < 0) {
                round_values(rounded.data(), scale, t, values.data(), count);
                bad = find_nonfinite({rounded.data(), t, scale}, count);
                if (bad >= 0 && is_grouped(t)) {    // which of the group
                    auto smaller = [](float a, float b) { return std::fabs(a) < std::fabs(b); };
                    bad = std::max_element(&values[bad], &values[bad] + GROUP, smaller) - values.data();
                }
            }
            if (bad >= 0) {
                const float x = values[bad];
                fail("tensor '%s': element %lld is %g%s", spec.name.c_str(), (long long)(first * cols + bad), x,
                     std::isfinite(x) ? beyond_range(t) : ", expected a finite number");
            }
            append(rounded.data(), code_bytes(t, count));
        }
        entry++;
        if (is_grouped(t)) append(scales.data(), scales.size() * sizeof(f16)), entry++;
    }
    writer.close();

    // What a reader will see is compared with what was meant.
    const Model model = model_open(writer.temporary);
    const InputFile file(writer.temporary);
    for (const Written &e : entries) {
        const uint64_t begin = model.file->data_offset() + model.file->find(e.name)->begin;
        uint64_t sum = 0;
        for (int64_t at = 0; at < e.bytes; at += e.piece_bytes) {
            const int64_t n = std::min(e.piece_bytes, e.bytes - at);
            file.read(rounded.data(), n, begin + at);
            sum = checksum(sum, rounded.data(), n);
            advance("verify", e.name, n);
        }
        if (sum != e.sum) {
            fail("%s: tensor '%s': reads back as other bytes than were written; is the disk all right?", path.c_str(),
                 e.name.c_str());
        }
    }
    writer.finish();
}

std::string left_in_bf16(const Config &config, DType type) {
    int n = 0, matrices = 0;
    std::string first;
    for (const TensorSpec &spec : config_tensors(config)) {
        matrices += !spec.is_norm;
        if (is_grouped(type) && !spec.is_norm && !is_grouped(stored_type(spec, type)) && n++ == 0)
            first = strf("%s: rows of %lld", spec.name.c_str(), (long long)row_length(spec));
    }
    return n ? strf("%d of %d matrices stay in bf16: their rows are no multiple of %d (%s)", n, matrices, GROUP, first.c_str())
             : "";
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

std::string convert(const ConvertOptions &options) {
    DType type = options.dtype.empty() ? DType::f32 : parse_dtype(options.dtype);    // before any work
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
    if (options.dtype.empty()) type = checkpoint.type;
    model_write(options.output, c, checkpoint.tokenizer, type, std::ref(reader), options.progress);
    return left_in_bf16(c, type);
}
