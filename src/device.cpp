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

    auto move = [&](auto &p) { p = (std::decay_t<decltype(p)>)(to + ((const uint8_t *)p - from)); };
    for (Matrix *w : {&m.embed, &m.unembed}) move(w->data);
    move(m.out_norm);
    for (LayerWeights &l : m.layers) {
        for (Matrix *w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down}) move(w->data);
        move(l.attn_norm), move(l.ffn_norm);
    }
}
