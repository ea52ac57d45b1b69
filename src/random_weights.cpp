#include "random_weights.h"
#include <algorithm>
#include <cmath>
#include <map>
#include "report.h"

// Elements of the buffer that is uploaded again and again: 64 MiB of 16-bit numbers, less a little, so that no two layers
// begin at the same place of it.
constexpr int64_t BUFFER_ELEMENTS = ((int64_t)32 << 20) - 12345;

Model random_weights(const Config &c, DType type, const Ops &ops) {
    Model m;
    m.config = c;
    const std::vector<TensorSpec> specs = config_tensors(c);
    auto tensor_bytes = [&](const TensorSpec &s) {
        int64_t bytes = s.is_norm ? sizeof(float) : dtype_size(type);
        for (int64_t n : s.shape) bytes *= n;
        return bytes;
    };
    auto padded = [](int64_t bytes) { return ceil_div(bytes, TENSOR_ALIGN) * (int64_t)TENSOR_ALIGN; };
    int64_t all = 0;
    for (const TensorSpec &s : specs) all += padded(tensor_bytes(s)), m.weights_bytes += tensor_bytes(s);
    check_weights_fit(all, ops);
    m.memory = std::shared_ptr<void>(ops.alloc(all), ops.release);
    uint8_t *const to = (uint8_t *)m.memory.get();

    std::vector<uint8_t> numbers(BUFFER_ELEMENTS * dtype_size(type));
    const float scale = (float)(1.0 / (NEAR_NORMAL_DEVIATION * std::sqrt((double)c.dim)));
#pragma omp parallel for
    for (int64_t i = 0; i < BUFFER_ELEMENTS; i++) {
        const float w = near_normal(0, (uint64_t)i) * scale;
        if (type == DType::f32) ((float *)numbers.data())[i] = w;
        if (type == DType::f16) ((f16 *)numbers.data())[i] = to_f16(w);
        if (type == DType::bf16) ((bf16 *)numbers.data())[i] = to_bf16(w);
    }
    for (int64_t at = 0; at < all; at += (int64_t)numbers.size()) ops.upload(to + at, numbers.data(), std::min<int64_t>(numbers.size(), all - at));
    if (type == DType::bf16 && ops.bf16_to_f16(to, all / 2)) type = DType::f16;    // as model_upload does

    const std::vector<float> ones(c.dim, 1.0f);
    std::map<std::string, Matrix> found;
    int64_t at = 0;
    for (const TensorSpec &s : specs) {
        found[s.name] = {to + at, s.is_norm ? DType::f32 : type};
        if (s.is_norm) ops.upload(to + at, ones.data(), tensor_bytes(s));
        at += padded(tensor_bytes(s));
    }
    for (int l = 0; l < c.n_layers; l++) {
        const std::string n = "layers." + std::to_string(l) + ".";
        m.layers.push_back({(const float *)found[n + "attn_norm"].data, (const float *)found[n + "ffn_norm"].data, found[n + "wq"], found[n + "wk"],
                            found[n + "wv"], found[n + "wo"], found[n + "w_gate"], found[n + "w_up"], found[n + "w_down"]});
    }
    m.embed = found["embed"];
    m.unembed = c.tied ? m.embed : found["unembed"];
    m.out_norm = (const float *)found["out_norm"].data;
    m.step_bytes = m.weights_bytes - (c.tied ? 0 : tensor_bytes(specs[0]));    // of which embed is the first
    // Stands for the file that is not there: its name in messages, and the size of its data.
    m.file = std::make_shared<Safetensors>();
    m.file->path = c.dialect;
    m.file->file_bytes = m.file->data_offset() + (uint64_t)all;
    return m;
}
