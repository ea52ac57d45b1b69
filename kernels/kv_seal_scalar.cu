/* kv_seal_scalar - blocks of 64 rows into the scalar formats on the GPU: the contract is kv_write.cu's, the method
   scalar_seal.h's, whose small functions (a group's scale, a code, deco4's matrix) both sides call.

   Work      One thread block for each block, kv head, and K or V, the rows in shared memory as f64: a thread a pair of channels for
             RoPE, a warp a row for the Hadamard product, a thread 8 or 16 channels for deco4's product, a thread a group for the
             scales, a thread a byte for the codes.
             deco4's matrix comes before, from the first sealed block of a sequence: one thread block for each slot and side, a
             thread an entry of X^T X, the rotations by one thread: 16 x 16 numbers, once a sequence and layer.
   Agrees    with the reference in every sum's order; a multiply-add may round once there and twice here, in f64.
   Cost      f64 throughout, and threads idle where groups are few: yardsticks need no more.  `run --ppl -d cuda` on an H100, 16 windows
             of 4,096, 12 layers, 2 kv heads x 128: 4.4 to 4.8 s in all for kivi2, q8, tq2, nqkv, deco4 and xquant, 4.7 s for nsn2b.
   Limits    Shared memory 512 d bytes: 128 KiB at d = 256, which some devices refuse.
   Tested by tests/test_cuda_baselines.cpp                                                                           */
#ifdef __CUDACC__
#include "cuda.cuh"
#include "scalar_seal.h"
namespace cuda {

constexpr int THREADS = 256;
static_assert(THREADS >= 16 * 16, "a thread an entry of deco4's matrix");

struct ScalarSealArgs {
    KvView kv;
    const f16 *k16, *v16;    // (N, Hkv, d)
    Batch b;
    const SlotRows *slots;
    const int *last_pos;
    SealedFormat k, v;
    int layer;
};

// What the blocks of one slot and side have in common.
struct SealSide {
    bool key;
    SlotRows rows;
    int slot, p0, begin, end;    // blocks begin..end-1 are sealed, the step's first row is at p0
    __device__ SealSide(const ScalarSealArgs &a, int z) : key(z % 2 == 0), rows(a.slots[z / 2]) {
        slot = a.b.slot[rows.row], p0 = a.b.pos[rows.row];
        begin = a.kv.sealed_end(p0 - 1, a.layer), end = a.kv.sealed_end(a.last_pos[rows.row], a.layer);
    }
    __device__ KvFormat format(const KvView &kv) const { return key ? kv.k_format : kv.v_format; }
};

// x (KV_BLOCK, d) <- rows of block i from the ring and from this step, keys after RoPE.  The whole thread block calls it.
// False: something in it is not finite.
__device__ static bool widen_rows(double *x, const ScalarSealArgs &a, const SealSide &s, int h, int i) {
    const KvView &kv = a.kv;
    const int d = kv.d, half = d / 2, pos0 = i * KV_BLOCK;
    const f16 *ring = s.key ? kv.k_exact : kv.v_exact, *fresh = s.key ? a.k16 : a.v16;
    bool finite = true;
    __syncthreads();
    for (int n = threadIdx.x; n < KV_BLOCK * d; n += THREADS) {
        const int pos = pos0 + n / d, c = n % d;
        x[n] = to_f32(pos < s.p0 ? ring[kv.exact_at(a.layer, s.slot, h, pos) + c] : fresh[((int64_t)(s.rows.row + pos - s.p0) * kv.Hkv + h) * d + c]);
        finite = finite && isfinite(x[n]);
    }
    finite = __syncthreads_and(finite);
    for (int n = threadIdx.x; n < KV_BLOCK * half && s.key; n += THREADS) {
        const int t = n / half, j = n % half;
        double cosine, sine;
        rope_angle(cosine, sine, kv.rope, pos0 + t, j, d);
        const double lo = x[t * d + j], hi = x[t * d + j + half];
        x[t * d + j] = lo * cosine - hi * sine;
        x[t * d + j + half] = lo * sine + hi * cosine;
    }
    __syncthreads();
    return finite;
}

// deco4's matrix of a slot and side, where this step seals its first block.
__global__ void __launch_bounds__(THREADS) learn_basis_kernel(ScalarSealArgs a) {
    extern __shared__ double x[];    // (KV_BLOCK, d)
    __shared__ double gram[256], v[256];
    const KvView &kv = a.kv;
    const SealSide s(a, blockIdx.x);
    if (s.format(kv) != KvFormat::deco4 || s.begin != kv.sink || s.begin >= s.end) return;
    f16 *basis = (f16 *)kv.beside(s.key, a.layer, s.slot, 0, s.begin);
    const int d = kv.d, w = basis_width(d), n = kv.Hkv * KV_BLOCK * d / w, entry = threadIdx.x;
    bool finite = true;
    double sum = 0;
    for (int h = 0; h < kv.Hkv; h++) {
        finite = widen_rows(x, a, s, h, s.begin) && finite;
        for (int r = 0; r < KV_BLOCK * d && entry < w * w; r += w) sum += x[r + entry / w] * x[r + entry % w] / n;
    }
    gram[entry] = sum;
    __syncthreads();
    if (!finite && entry < w * w) basis[entry] = kept(NAN);
    if (finite && entry == 0) keep_basis(basis, gram, v, w);
}

__global__ void __launch_bounds__(THREADS) seal_scalar_kernel(ScalarSealArgs a) {
    extern __shared__ double x[];    // (KV_BLOCK, d)
    __shared__ double m[256], inverse[16];
    const KvView &kv = a.kv;
    const SealSide s(a, blockIdx.z);
    const int d = kv.d, h = blockIdx.y, i = s.begin + blockIdx.x, thread = threadIdx.x;
    if (!kv_is_scalar(s.format(kv)) || i >= s.end) return;
    uint8_t *block = s.key ? kv.k_block(a.layer, s.slot, h, i) : kv.v_block(a.layer, s.slot, h, i);
    const ScalarFields f = (s.key ? a.k : a.v).scalar_fields(block, kv.beside(s.key, a.layer, s.slot, h, i));
    const bool shares = a.layer >= (s.key ? kv.k_share : kv.v_share) && a.layer % 2;    // the codes are the layer below's
    const int groups = KV_BLOCK / f.tokens * f.groups_across(), code_bytes = shares ? 0 : KV_BLOCK * d * f.bits / 8, in_a_byte = 8 / f.bits;

    // 1
    if (!widen_rows(x, a, s, h, i)) {
        for (int n = thread; n < code_bytes; n += THREADS) f.code[n] = 0;
        for (int g = thread; g < groups; g += THREADS) {
            f.scale[g] = kept(NAN);
            if (f.zero) f.zero[g] = f16{0};
        }
        return;
    }
    if (f.rotated && !(kv.ablate & NO_HADAMARD))
        for (int t = thread / 32; t < KV_BLOCK; t += THREADS / 32) hadamard_warp(x + t * d, d);
    if (f.basis) {
        const int w = basis_width(d);
        if (thread < w * w) m[thread] = to_f32(f.basis[thread]);
        if (thread < w) inverse[thread] = inverse_square(f.basis + thread * w, w);
        __syncthreads();
        for (int r = thread; r < KV_BLOCK * d / w; r += THREADS) whiten(x + r * w, m, inverse, w);
    }
    __syncthreads();
    // 2 to 4
    for (int g = thread; g < groups; g += THREADS) keep_scale(f, x, g);
    __syncthreads();
    for (int n = thread; n < code_bytes; n += THREADS) {
        int byte = 0;
        for (int j = 0; j < in_a_byte; j++) {
            const int value = n * in_a_byte + j, g = f.group(value / d, value % d);
            const double scale = kept_scale(f, g);
            if (scale != 0) byte |= scalar_code(f.rule, f.bits, (x[value] - kept_zero(f, g)) / scale) << j * f.bits;
        }
        f.code[n] = (uint8_t)byte;
    }
    __syncthreads();
    for (int g = thread; g < groups && f.rule == ScalarRule::calibrated; g += THREADS) calibrate_scale(f, g);
}

void seal_scalar_blocks(const KvView &kv, int layer, const f16 *k16, const f16 *v16, const Step &step, int n) {
    if (!kv_is_scalar(kv.k_format) && !kv_is_scalar(kv.v_format)) return;
    const int bytes = KV_BLOCK * kv.d * (int)sizeof(double), sides = 2 * (int)step.slots.size();
    CUDA_CHECK(cudaFuncSetAttribute(learn_basis_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    CUDA_CHECK(cudaFuncSetAttribute(seal_scalar_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const SealedFormat k = sealed_format(kv.k_format, kv.d), v = sealed_format(kv.v_format, kv.d);
    const ScalarSealArgs a = {kv, k16, v16, step.on_device, step.on_slots, step.on_last_pos, k, v, layer};
    if (kv.k_format == KvFormat::deco4 || kv.v_format == KvFormat::deco4) {
        learn_basis_kernel<<<sides, THREADS, bytes, stream>>>(a);
        CUDA_CHECK(cudaGetLastError());
    }
    seal_scalar_kernel<<<dim3(n, kv.Hkv, sides), THREADS, bytes, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}
}    // namespace cuda
#endif
