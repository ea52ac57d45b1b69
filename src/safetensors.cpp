// safetensors.cpp - see safetensors.h.  The reader trusts nothing; the writer leaves a whole file or none.
#include "safetensors.h"
#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <utility>
#include "json.h"

// The limit of the reference implementation; a header needs kilobytes for tensors, megabytes for a tokenizer.
constexpr uint64_t MAX_HEADER_BYTES = 100'000'000;

// ---- names and shapes -----------------------------------------------------------------------------------------------

int dtype_bytes(const std::string &name) {
    static const std::map<std::string, int> sizes = {
        {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2}, {"BF16", 2},
        {"I16", 2}, {"U16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    const auto found = sizes.find(name);
    return found == sizes.end() ? 0 : found->second;
}

const char *dtype_name(DType type) {
    switch (type) {
    case DType::f32: return "F32";
    case DType::f16: return "F16";
    case DType::bf16: return "BF16";
    case DType::q8: return "I8";
    case DType::q4: return "U8";
    }
    return "";
}

bool dtype_from_name(const std::string &name, DType *type) {
    for (const DType t : {DType::f32, DType::f16, DType::bf16}) {
        if (name == dtype_name(t)) { *type = t; return true; }
    }
    return false;
}

static constexpr std::pair<const char *, DType> OPTION_NAMES[] = {
    {"f32", DType::f32}, {"f16", DType::f16}, {"bf16", DType::bf16}, {"q8", DType::q8}, {"q4", DType::q4}};
const char *dtype_option(DType type) {
    for (const auto &n : OPTION_NAMES) if (type == n.second) return n.first;
    return "";
}
DType parse_dtype(const std::string &name) {
    for (const auto &n : OPTION_NAMES) if (name == n.first) return n.second;
    refuse("--dtype '%s': expected f32, f16, bf16, q8 or q4", printable(name).c_str());
}

std::string shape_text(const std::vector<int64_t> &shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) text += strf(i ? ", %lld" : "%lld", (long long)shape[i]);
    return text + ")";
}

int64_t TensorView::elements() const {
    int64_t n = 1;
    for (const int64_t s : shape) n *= s;    // cannot overflow: checked when the file was opened
    return n;
}

// ---- reading --------------------------------------------------------------------------------------------------------

Safetensors::Safetensors(Safetensors &&other) noexcept { *this = std::move(other); }

Safetensors &Safetensors::operator=(Safetensors &&other) noexcept {
    std::swap(path, other.path);
    std::swap(metadata, other.metadata);
    std::swap(tensors, other.tensors);
    std::swap(map, other.map);
    std::swap(file_bytes, other.file_bytes);
    std::swap(header_bytes, other.header_bytes);
    return *this;
}

Safetensors::~Safetensors() { if (map) munmap((void *)map, file_bytes); }

const TensorView *Safetensors::find(const std::string &name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : &found->second;
}

static void map_file(Safetensors &file) {
    const char *path = file.path.c_str();
    struct stat info;
    if (stat(path, &info) != 0) fail("%s: %s", path, strerror(errno));    // before open(), which would wait on a pipe
    if (S_ISDIR(info.st_mode)) fail("%s: expected a file, found a folder", path);
    if (!S_ISREG(info.st_mode)) fail("%s: not a regular file, cannot be mapped", path);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("%s: %s", path, strerror(errno));
    if (fstat(fd, &info) != 0 || info.st_size < 8) {
        close(fd);
        fail("%s: not a safetensors file: expected at least 8 bytes, found %lld", path, (long long)info.st_size);
    }
    void *map = mmap(nullptr, info.st_size, PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    close(fd);    // the mapping keeps the file
    if (map == MAP_FAILED) fail("%s: cannot map %lld bytes: %s", path, (long long)info.st_size, strerror(error));
    file.map = (const uint8_t *)map;
    file.file_bytes = info.st_size;
}

// One entry of the header: {"dtype": string, "shape": [n, ...], "data_offsets": [begin, end]}.
static TensorView read_entry(const Safetensors &file, const std::string &name, const Json &entry) {
    const std::string where = file.path + ": tensor '" + printable(name) + "'";
    if (!entry.is_object()) fail("%s: expected an object, found %s", where.c_str(), show_json(entry).c_str());
    TensorView t;
    t.name = name;
    t.dtype = printable(get_string(get_field(entry, "dtype", where), "dtype", where));

    const Json &shape = get_field(entry, "shape", where);
    if (!shape.is_array() || shape.size() > 8) {
        fail("%s: shape: expected a list of at most 8, found %s", where.c_str(), show_json(shape).c_str());
    }
    int64_t elements = 1;
    for (const Json &n : shape) {
        t.shape.push_back(get_int(n, "shape", 0, INT64_MAX, where));
        if (__builtin_mul_overflow(elements, t.shape.back(), &elements)) {
            fail("%s: shape: %s elements are more than 64 bits can count", where.c_str(), shape_text(t.shape).c_str());
        }
    }
    const uint64_t data_bytes = file.file_bytes - file.data_offset();
    const Json &offsets = get_field(entry, "data_offsets", where);
    if (!offsets.is_array() || offsets.size() != 2) {
        fail("%s: data_offsets: expected [begin, end], found %s", where.c_str(), show_json(offsets).c_str());
    }
    const uint64_t begin = get_int(offsets[0], "data_offsets", 0, INT64_MAX, where);
    const uint64_t end = get_int(offsets[1], "data_offsets", 0, INT64_MAX, where);
    if (begin > end || end > data_bytes) {
        fail("%s: data_offsets: expected begin <= end <= %llu (the data in this file), found [%llu, %llu]%s",
             where.c_str(), (unsigned long long)data_bytes, (unsigned long long)begin, (unsigned long long)end,
             end > data_bytes ? "; is the file truncated?" : "");
    }
    t.begin = begin;
    t.bytes = end - begin;
    t.data = file.map + file.data_offset() + begin;
    // A dtype we do not know stays a name here; whoever wants that tensor refuses it.
    const int64_t size = dtype_bytes(t.dtype);
    int64_t product;
    if (size && (__builtin_mul_overflow(elements, size, &product) || (uint64_t)product != t.bytes)) {
        fail("%s: expected %s of %s in data_offsets, found %llu bytes", where.c_str(), shape_text(t.shape).c_str(),
             t.dtype.c_str(), (unsigned long long)t.bytes);
    }
    return t;
}

// Sorted by offset, every tensor begins where the one before ends, and the last ends with the file.
static void check_tiling(const Safetensors &file) {
    std::vector<const TensorView *> order;
    for (const auto &t : file.tensors) order.push_back(&t.second);
    std::sort(order.begin(), order.end(), [](const TensorView *a, const TensorView *b) {
        return std::make_pair(a->begin, a->bytes) < std::make_pair(b->begin, b->bytes);
    });
    uint64_t position = 0;
    for (const TensorView *t : order) {
        if (t->begin != position) {
            fail("%s: tensor '%s': data_offsets: expected to begin at %llu, where the one before ends, found %llu (%s)",
                 file.path.c_str(), printable(t->name).c_str(), (unsigned long long)position,
                 (unsigned long long)t->begin, t->begin < position ? "overlap" : "gap");
        }
        position += t->bytes;
    }
    const uint64_t data_bytes = file.file_bytes - file.data_offset();
    if (position != data_bytes) {
        fail("%s: expected %llu bytes of data, the sum of all tensors, found %llu", file.path.c_str(),
             (unsigned long long)position, (unsigned long long)data_bytes);
    }
}

Safetensors safetensors_open(const std::string &path) {
    Safetensors file;
    file.path = path;
    map_file(file);
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | file.map[i];
    const uint64_t limit = std::min(file.file_bytes - 8, MAX_HEADER_BYTES);
    if (header_bytes < 2 || header_bytes > limit) {
        fail("%s: not a safetensors file, or truncated: header_bytes: expected 2 to %llu, found %llu", path.c_str(),
             (unsigned long long)limit, (unsigned long long)header_bytes);
    }
    file.header_bytes = header_bytes;
    // {"name": {"shape": [...]}} is three deep; nothing in the container is deeper.
    const Json header = parse_strict_json((const char *)file.map + 8, header_bytes, path + ": header", 3);
    if (!header.is_object()) fail("%s: header: expected an object, found %s", path.c_str(), show_json(header).c_str());
    for (const auto &entry : header.items()) {
        if (entry.key() != "__metadata__") {
            file.tensors[entry.key()] = read_entry(file, entry.key(), entry.value());
            continue;
        }
        const std::string where = path + ": __metadata__";
        if (!entry.value().is_object()) {
            fail("%s: expected an object, found %s", where.c_str(), show_json(entry.value()).c_str());
        }
        for (const auto &m : entry.value().items()) {
            file.metadata[m.key()] = get_string(m.value(), printable(m.key()).c_str(), where);
        }
    }
    check_tiling(file);
    return file;
}

// ---- writing --------------------------------------------------------------------------------------------------------

static void check_target(const std::string &path, uint64_t file_bytes) {
    struct stat info;
    if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
        refuse("%s: cannot be written: it exists and is not a regular file", path.c_str());
    }
    const size_t slash = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    struct statvfs disk;
    if (statvfs(folder.c_str(), &disk) != 0) fail("%s: %s", folder.c_str(), strerror(errno));
    const double free_bytes = (double)disk.f_bavail * disk.f_frsize;
    if (free_bytes < file_bytes) {
        fail("%s: needs %.1f GiB, the disk has %.1f GiB left", path.c_str(), file_bytes / 0x1p30, free_bytes / 0x1p30);
    }
}

SafetensorsWriter::SafetensorsWriter(const std::string &path, const std::vector<Entry> &wanted,
                                     const std::map<std::string, std::string> &metadata)
    : path(path), temporary(path + strf(".tmp.%d", (int)getpid())) {
    OrderedJson header;
    for (const auto &m : metadata) header["__metadata__"][m.first] = m.second;
    uint64_t position = 0;
    auto add = [&](const Entry &e, uint64_t size) {
        header[e.name] = {{"dtype", e.dtype}, {"shape", e.shape}, {"data_offsets", {position, position + size}}};
        plan.push_back(e);
        bytes.push_back(size);
        position += size;
    };
    for (const Entry &e : wanted) {
        if (const int64_t pad = -(int64_t)position & (TENSOR_ALIGN - 1)) {
            add({PAD_PREFIX + std::to_string(plan.size()), "U8", {pad}}, pad);
        }
        uint64_t size = dtype_bytes(e.dtype);
        for (const int64_t n : e.shape) size *= n;
        add(e, size);
    }
    // Invalid UTF-8 in the metadata would make a header that no reader takes; dump() throws on it.
    std::string text;
    try {
        text = header.dump();
    } catch (const OrderedJson::exception &) {
        fail("%s: a string for the header is not UTF-8", path.c_str());
    }
    text.resize(ceil_div(8 + text.size(), TENSOR_ALIGN) * TENSOR_ALIGN - 8, ' ');
    if (text.size() > MAX_HEADER_BYTES) fail("%s: the header would have %zu bytes", path.c_str(), text.size());
    file_bytes = 8 + text.size() + position;
    check_target(path, file_bytes);

    file = fopen(temporary.c_str(), "wbx");    // x: never somebody else's file
    if (!file) fail("%s: %s", temporary.c_str(), strerror(errno));
    try {
        uint8_t length[8];
        for (int i = 0; i < 8; i++) length[i] = (uint64_t)text.size() >> 8 * i & 255;
        write(length, 8);
        write(text.data(), text.size());
    } catch (...) {
        discard();    // the destructor does not run for a writer that was never made
        throw;
    }
}

SafetensorsWriter::~SafetensorsWriter() { discard(); }

void SafetensorsWriter::discard() {
    if (file) fclose(file);
    file = nullptr;
    if (!temporary.empty()) unlink(temporary.c_str());
    temporary.clear();
}

void SafetensorsWriter::write(const void *data, uint64_t n) {
    if (fwrite(data, 1, n, file) != n) fail("%s: cannot write: %s", path.c_str(), strerror(errno));
}

void SafetensorsWriter::append(const void *data, uint64_t n) {
    if (current == plan.size() || n > bytes[current] - current_bytes) {
        fail("%s: more data than planned for tensor %zu", path.c_str(), current);
    }
    write(data, n);
    current_bytes += n;
    while (current < plan.size() && current_bytes == bytes[current]) {
        current++;
        current_bytes = 0;
        if (current < plan.size() && plan[current].name.compare(0, strlen(PAD_PREFIX), PAD_PREFIX) == 0) {
            const char zeros[TENSOR_ALIGN] = {};
            write(zeros, bytes[current]);
            current_bytes = bytes[current];
        }
    }
}

void SafetensorsWriter::close() {
    if (current != plan.size()) fail("%s: %zu of %zu tensors written", path.c_str(), current, plan.size());
    const bool flushed = fflush(file) == 0 && fsync(fileno(file)) == 0;
    const int error = errno;
    const bool closed = fclose(file) == 0;
    file = nullptr;
    if (!flushed || !closed) fail("%s: cannot write: %s", path.c_str(), strerror(flushed ? errno : error));
}

void SafetensorsWriter::finish() {
    if (file) close();
    if (rename(temporary.c_str(), path.c_str()) != 0) {
        fail("%s: cannot rename to it: %s", path.c_str(), strerror(errno));
    }
    temporary.clear();
}
