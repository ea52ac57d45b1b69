#include "forward.h"
#include <algorithm>

void forward(const Model &m, const KvView &kv, Activations &a, const Batch &rows, const Ops &op) {
    const Config &c = m.config;
    const Batch b = op.begin(rows, a.scratch);
    const int N = b.N, D = c.dim, F = c.ffn_dim, d = c.head_dim, Hq = c.n_heads, Hkv = c.n_kv_heads;

    if (op.replay(m.layers.data(), kv)) return;

    op.embed(a.x, m.embed, b, D);
    for (int l = 0; l < c.n_layers; l++) {
        const LayerWeights &w = m.layers[l];

        // attention: x += Wo attend(Wq n, Wk n, Wv n),  n = rmsnorm(x)
        op.qkv(a.q, a.k, a.v, a.xn, a.x, {w.attn_norm, c.norm_eps}, w.wq, w.wk, w.wv, N, D, Hq * d, Hkv * d);
        if (!op.attend(a.att, a.q, a.k, a.v, a.k16, a.v16, kv, l, b, Hq)) {
            op.rope(a.q, b, kv.rope, Hq, d);    // queries only: the cache keeps keys before RoPE (kv_block.h)
            op.kv_write(kv, l, a.k16, a.v16, a.k, a.v, b);
            op.attention(a.att, a.q, kv, l, a.k16, a.v16, b, Hq);
            op.kv_keep(kv, l, a.k16, a.v16, b);
        }
        op.matmul_add(a.x, a.att, w.wo, N, Hq * d, D, {w.ffn_norm, c.norm_eps});

        // feed-forward: x += Wdown (silu(Wgate n) * (Wup n)),  n = rmsnorm(x)
        op.gated(a.gate, a.up, a.xn, a.x, {w.ffn_norm, c.norm_eps}, w.w_gate, w.w_up, N, D, F);
        op.matmul_add(a.x, a.gate, w.w_down, N, F, D, {l + 1 < c.n_layers ? m.layers[l + 1].attn_norm : m.out_norm, c.norm_eps});
    }
    if (b.n_out > 0) {
        const bool all = b.n_out == N;    // b.out names rows once and in order
        if (!all) op.gather(a.x_out, a.x, b.out, b.n_out, D);
        op.unembed(a.logits, a.xn, all ? a.x : a.x_out, {m.out_norm, c.norm_eps}, m.unembed, b.n_out, D, c.vocab);
    }
    op.end();
}

// ---- memory -----------------------------------------------------------------------------------------------
struct Piece { void **to; int64_t bytes; };

static std::vector<Piece> pieces_of(Activations &a, const Ops &ops, const Config &c, int64_t N, int64_t n_out) {
    const int64_t q = (int64_t)c.n_heads * c.head_dim, kv = (int64_t)c.n_kv_heads * c.head_dim, f = sizeof(float);
    const StepShape shape = {(int)N, c.n_heads, c.head_dim, (int)std::max<int64_t>({c.dim, c.ffn_dim, q})};
    return {{(void **)&a.x, N * c.dim * f},      {(void **)&a.xn, N * c.dim * f},    {(void **)&a.q, N * q * f},
            {(void **)&a.k, N * kv * f},         {(void **)&a.v, N * kv * f},        {(void **)&a.att, N * q * f},
            {(void **)&a.gate, N * c.ffn_dim * f}, {(void **)&a.up, N * c.ffn_dim * f},
            {(void **)&a.k16, N * kv * 2},       {(void **)&a.v16, N * kv * 2},      {(void **)&a.x_out, n_out * c.dim * f},
            {(void **)&a.logits, n_out * c.vocab * f}, {&a.scratch, ops.scratch_bytes(shape)}};
}

int64_t activations_bytes(const Ops &ops, const Config &c, int N, int n_out) {
    Activations a;
    int64_t bytes = 0;
    for (const Piece &p : pieces_of(a, ops, c, N, n_out)) bytes += p.bytes;
    return bytes;
}

void activations_open(Activations &a, const Ops &ops, const Config &c, int N, int n_out) {
    a.ops = &ops, a.N = N, a.n_out = n_out;
    for (const Piece &p : pieces_of(a, ops, c, N, n_out)) {
        *p.to = ops.alloc(p.bytes);
        a.memory.push_back(*p.to);
        a.bytes += p.bytes;
    }
}

Activations::~Activations() {
    for (void *p : memory) ops->release(p);
}
