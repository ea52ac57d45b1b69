#include "device.h"
#include <algorithm>

constexpr int64_t PIECE = (int64_t)64 << 20;    // of an upload: what the page cache must hold at once

const Ops *device_open(const std::string &name) {
    if (name == "cpu") return &cpu_ops;
    if (name != "cuda") refuse("-d '%s': expected cpu or cuda", name.c_str());
    std::string why_not;
    const Ops *ops = cuda_ops(&why_not);
    if (!ops) refuse("-d cuda: %s; -d cpu works", why_not.c_str());
    return ops;
}

WeightsRange model_weights(const Model &m) {
    const int64_t offset = (int64_t)m.file->data_offset(), bytes = (int64_t)m.file->file_bytes - offset;
    return {m.memory ? m.memory.get() : m.file->map + offset, bytes};
}

void model_upload(Model &m, const Ops &ops) {
    if (&ops == &cpu_ops) return;
    const WeightsRange host = model_weights(m);
    const uint8_t *from = (const uint8_t *)host.data;
    m.memory = std::shared_ptr<void>(ops.alloc(host.bytes), ops.release);
    uint8_t *to = (uint8_t *)m.memory.get();
    for (int64_t at = 0; at < host.bytes; at += PIECE) ops.upload(to + at, from + at, std::min(PIECE, host.bytes - at));

    const Config &c = m.config;
    auto move = [&](auto &p) { p = (std::decay_t<decltype(p)>)(to + ((const uint8_t *)p - from)); };
    auto move_matrix = [&](Matrix &w, int64_t rows, int64_t columns) {
        move(w.data);
        if (w.scale) move(w.scale);
        if (w.type == DType::bf16 && ops.bf16_to_f16(const_cast<void *>(w.data), rows * columns)) w.type = DType::f16;
    };
    const bool tied = m.unembed.data == m.embed.data;
    move_matrix(m.embed, c.vocab, c.dim);
    if (tied) m.unembed = m.embed;
    else move_matrix(m.unembed, c.vocab, c.dim);
    move(m.out_norm);
    const int64_t q = (int64_t)c.n_heads * c.head_dim, kv = (int64_t)c.n_kv_heads * c.head_dim;
    for (LayerWeights &l : m.layers) {
        move_matrix(l.wq, q, c.dim), move_matrix(l.wk, kv, c.dim), move_matrix(l.wv, kv, c.dim), move_matrix(l.wo, c.dim, q);
        move_matrix(l.w_gate, c.ffn_dim, c.dim), move_matrix(l.w_up, c.ffn_dim, c.dim), move_matrix(l.w_down, c.dim, c.ffn_dim);
        move(l.attn_norm), move(l.ffn_norm);
    }
}
