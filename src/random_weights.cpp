#include "random_weights.h"
#include <algorithm>
#include <cmath>
#include <map>
#include "groups.h"
#include "report.h"

// Elements of the buffer that is uploaded again and again: 64 MiB of 16-bit numbers, less a little, so that no two layers
// begin at the same place of it.  Whole groups of q8 and q4, a multiple of 64 bytes in every type.
constexpr int64_t BUFFER_ELEMENTS = ((int64_t)32 << 20) - 12288;

struct RandomNumbers {
    std::vector<uint8_t> code;
    std::vector<f16> scale;
};
static RandomNumbers random_numbers(DType type, const std::vector<float> &numbers) {
    const int64_t n = (int64_t)numbers.size();
    RandomNumbers r;
    r.code.resize(code_bytes(type, n));
    r.scale.resize(scale_bytes(type, n) / sizeof(f16));
    if (is_grouped(type)) quantize_groups(r.code.data(), r.scale.data(), type, numbers.data(), n);
    else if (type == DType::f32) memcpy(r.code.data(), numbers.data(), r.code.size());
    else
#pragma omp parallel for
        for (int64_t i = 0; i < n; i++) {
            const uint16_t bits = type == DType::f16 ? to_f16(numbers[i]).bits : to_bf16(numbers[i]).bits;
            memcpy(&r.code[2 * i], &bits, 2);
        }
    return r;
}

Model random_weights(const Config &c, DType type, const Ops &ops) {
    Model m;
    m.config = c;
    const std::vector<TensorSpec> specs = config_tensors(c);
    auto count_of = [](const TensorSpec &s) {
        int64_t n = 1;
        for (int64_t size : s.shape) n *= size;
        return n;
    };
    auto padded = [](int64_t bytes) { return ceil_div(bytes, TENSOR_ALIGN) * (int64_t)TENSOR_ALIGN; };
    int64_t all = 0;
    for (const TensorSpec &s : specs) {
        const DType t = stored_type(s, type);
        all += padded(code_bytes(t, count_of(s))) + padded(scale_bytes(t, count_of(s)));
        m.weights_bytes += code_bytes(t, count_of(s)) + scale_bytes(t, count_of(s));
    }
    check_weights_fit(all, ops);
    m.memory = std::shared_ptr<void>(ops.alloc(all), ops.release);
    uint8_t *const to = (uint8_t *)m.memory.get();

    std::vector<float> numbers(BUFFER_ELEMENTS);
    const float scale = (float)(1.0 / (NEAR_NORMAL_DEVIATION * std::sqrt((double)c.dim)));
#pragma omp parallel for
    for (int64_t i = 0; i < BUFFER_ELEMENTS; i++) numbers[i] = near_normal(0, (uint64_t)i) * scale;
    // The same in the types that these tensors have.
    std::map<DType, RandomNumbers> in_type;
    for (const TensorSpec &s : specs) {
        const DType t = stored_type(s, type);
        if (!s.is_norm && !in_type.count(t)) in_type[t] = random_numbers(t, numbers);
    }
    // Bytes [at, at + n) of the memory, as if the buffer lay there again and again from the start.
    auto fill = [&](int64_t at, int64_t n, const auto &from) {
        const int64_t size = (int64_t)from.size() * sizeof from[0];
        for (const int64_t end = at + n; at < end;) {
            const int64_t skip = at % size, piece = std::min(size - skip, end - at);
            ops.upload(to + at, (const uint8_t *)from.data() + skip, piece);
            at += piece;
        }
    };

    const std::vector<float> ones(c.dim, 1.0f);
    std::map<std::string, Matrix> found;
    int64_t at = 0, embed_bytes = 0;
    for (const TensorSpec &s : specs) {
        Matrix &w = found[s.name] = {to + at, stored_type(s, type)};
        const int64_t n = count_of(s), codes = code_bytes(w.type, n), scales = scale_bytes(w.type, n);
        if (s.is_norm) ops.upload(to + at, ones.data(), codes);
        else fill(at, codes, in_type[w.type].code);
        at += padded(codes);
        if (scales) w.scale = (const f16 *)(to + at), fill(at, scales, in_type[w.type].scale);
        at += padded(scales);
        if (s.name == "embed") embed_bytes = codes + scales;
        if (w.type == DType::bf16 && ops.bf16_to_f16(const_cast<void *>(w.data), n)) w.type = DType::f16;    // as model_upload does
    }
    model_point_at(m, found);
    m.step_bytes = m.weights_bytes - (c.tied ? 0 : embed_bytes);
    // Stands for the file that is not there: its name in messages, and the size of its data.
    m.file = std::make_shared<Safetensors>();
    m.file->path = c.dialect;
    m.file->file_bytes = m.file->data_offset() + (uint64_t)all;
    return m;
}
