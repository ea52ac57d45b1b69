// ops.h - everything the forward pass asks of a backend: one table of functions, two values (cpu_ops, cuda_ops()).
//
// Legend, used at every pointer: N rows, B slots, Hq query heads, Hkv kv heads, G = Hq/Hkv, d head dimension (always
// innermost), D model dimension, F feed-forward dimension, V vocabulary, L layers, T positions.
// Activations are f32, row-major.  An output never overlaps an input unless the comment says "in place".
//
// Row n's result never depends on the other rows of the step, on their number or on the thread count: every backend adds
// up in an order that is fixed by the shapes of one row and of the cache.  Exceptions, on CUDA: matmul has an order
// for up to 4 rows, one for up to 32 and cuBLAS's beyond, which depends on their number (matmul.cu); with more than 8 rows decode attention
// takes longer segments (attention_decode.cu), and prefill attention has an order of its own, the same for any such step (attention_prefill.cu).
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include "base.h"

enum class DType : uint8_t { f32, f16, bf16, q8, q4 };    // q8 and q4: groups.h
inline int dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }    // bytes of a number in f32, f16 or bf16

// A weight matrix W (out, in), row-major; the shape is the caller's.
struct Matrix {
    const void *data = nullptr;
    DType type = DType::f32;
    const f16 *scale = nullptr;    // (out, in/32), of q8 and q4
};

// What rmsnorm divides and multiplies by.
struct Norm {
    const float *weight = nullptr;    // (in)
    float eps = 0;
};

// The new tokens of one step.  Decode is one row per sequence; prefill is many rows of one; a perplexity batch is many of
// many.  The rows of one slot stand together, in increasing pos, without gaps.
struct Batch {
    int N;                 // rows
    const int *token;      // (N)
    const int *slot;       // (N)  which sequence of the KV cache
    const int *pos;        // (N)  position in that sequence
    const int *first;      // (N)  the first row of the same slot in this step
    int n_out;             // rows whose logits are wanted
    const int *out;        // (n_out)
};

// Cosines and sines of RoPE in two tables, computed in double: angle(64 b + r, j) = base[b][j] + step[r][j], so no kernel
// ever calls sin or cos and every backend turns by the same numbers.
struct RopeTable {
    const float *base;     // (T/64, 2, d/2)   cosines, then sines, of 64 b freq[j]
    const float *step;     // (64, 2, d/2)     of r freq[j]
    const float *step_turned;    // (2, d/2, 64)  the same, token by token
};

struct KvView;             // kv_block.h

// The largest step that will come.
struct StepShape {
    int N, Hq, d;
    int widest;            // the longest row that matmul reads: max of D, F and Hq d
};

struct Ops {
    const char *name;
    void *(*alloc)   (size_t bytes);                                // 64-byte aligned; fails with the size when there is too little
    void  (*release) (void *p);
    void  (*upload)  (void *to, const void *host, size_t bytes);
    void  (*download)(void *host, const void *from, size_t bytes);  // waits for all earlier work
    int64_t (*available)();                                         // bytes that alloc could still give; -1 when nobody says
    // n weights in bf16, where they lie, become f16 if that is better for this backend and all of them fit; says whether.
    bool    (*bf16_to_f16)(void *w, int64_t n);
    double  (*read_gb_s)(const void *p, int64_t bytes, int times);  // how fast p is read, GB/s: the best of `times` passes

    // A step begins: its rows move to where the ops below read them, until the next step begins.  scratch has
    // scratch_bytes(shape) bytes, for whatever ops of steps up to that shape need beside their arguments.
    int64_t (*scratch_bytes)(const StepShape &shape);
    Batch   (*begin)(const Batch &host, void *scratch);
    // True: this step, of these weights and this cache, is done; a backend may record the ops of a step and repeat them.
    // False: the caller calls the ops, then end.
    bool    (*replay)(const void *weights, const KvView &kv);
    void    (*end)();

    void (*embed)    (float *x, Matrix table, const Batch &b, int D);                        // x[n,:] = table[token[n],:]
    void (*gather)   (float *y, const float *x, const int *row, int n_rows, int D);          // y[i,:] = x[row[i],:]
    void (*rmsnorm)  (float *y, const float *x, const float *w, float eps, int N, int D);    // y = w * x / rms(x)
    void (*matmul)   (float *y, const float *x, Matrix W, int N, int in, int out);           // y (N,out) = x (N,in) W^T
    void (*matmul_add)(float *y, const float *x, Matrix W, int N, int in, int out, Norm next);    // y += x W^T; next: the norm of y that comes next, or {}
    // Products of n = rmsnorm(x), so that a backend may do all of it together; xn (N,in) is room for n:  y (N,out);  q (N,q_out),
    // k, v (N,kv_out);  gate (N,out) = silu(n Wgate^T) * (n Wup^T), up (N,out) is room for the second product.
    void (*unembed)  (float *y, float *xn, const float *x, Norm norm, Matrix W, int N, int in, int out);
    void (*qkv)      (float *q, float *k, float *v, float *xn, const float *x, Norm norm, Matrix Wq, Matrix Wk, Matrix Wv, int N, int in, int q_out, int kv_out);
    void (*gated)    (float *gate, float *up, float *xn, const float *x, Norm norm, Matrix Wgate, Matrix Wup, int N, int in, int out);
    void (*rope)     (float *q, const Batch &b, RopeTable table, int H, int d);              // q (N,H,d) turned by pos[n], in place
    // The cache (kv_block.h says which tokens a row sees).  k, v (N,Hkv,d): this step's rows, keys before RoPE; k16, v16
    // the same rounded to fp16, which is what everybody reads.
    // Calls a layer: rope, then these three in this order.  Or attend, which is all four where a backend does them together and
    // k16, v16 are room for it; false: not for such a step, and nothing is done.  With layer 0 it may seal for all layers.
    bool (*attend)   (float *y, const float *q, const float *k, const float *v, f16 *k16, f16 *v16, const KvView &kv, int layer, const Batch &b, int Hq);
    void (*kv_write) (const KvView &kv, int layer, f16 *k16, f16 *v16, const float *k, const float *v, const Batch &b);
    void (*attention)(float *y, const float *q, const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b, int Hq);
    void (*kv_keep)  (const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Batch &b);
};

extern const Ops cpu_ops;
const Ops *cuda_ops(std::string *why_not);    // null, and why: built without CUDA, or no usable device

// What every page defines, once per backend.
template <class Pointer> using OpFunction = std::remove_pointer_t<Pointer>;
#define DECLARE_OPS(backend)                                                                                                      \
    namespace backend {                                                                                                           \
    OpFunction<decltype(Ops::embed)> embed;                                                                                       \
    OpFunction<decltype(Ops::gather)> gather;                                                                                     \
    OpFunction<decltype(Ops::rmsnorm)> rmsnorm;                                                                                   \
    OpFunction<decltype(Ops::matmul)> matmul;                                                                                     \
    OpFunction<decltype(Ops::matmul_add)> matmul_add;                                                                             \
    OpFunction<decltype(Ops::unembed)> unembed;                                                                                    \
    OpFunction<decltype(Ops::qkv)> qkv;                                                                                           \
    OpFunction<decltype(Ops::gated)> gated;                                                                                       \
    void swiglu(float *gate, const float *up, int64_t n);    /* what gated is made of: swiglu.cu */                               \
    OpFunction<decltype(Ops::rope)> rope;                                                                                         \
    OpFunction<decltype(Ops::kv_write)> kv_write;                                                                                 \
    OpFunction<decltype(Ops::attention)> attention;                                                                               \
    OpFunction<decltype(Ops::kv_keep)> kv_keep;                                                                                   \
    }
DECLARE_OPS(cpu)
DECLARE_OPS(cuda)
