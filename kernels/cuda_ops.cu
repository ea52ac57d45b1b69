/* cuda_ops - the GPU's value of the op table: the device, its memory, the rows of a step.

   Device    The first one that CUDA lists (CUDA_VISIBLE_DEVICES chooses).  cuda_ops() gives null and the reason when this
             program was built without CUDA, when the driver finds no device, or when the device cannot run our kernels.
   Memory    alloc takes from the device and says what was asked, free and there in all when it fails.
   A step    begin() copies the row arrays to the scratch, with what the kernels would otherwise have to search for: the rows of
             each slot, and where row tiles are (TilePlace: up to KV_BLOCK rows of one slot in one stretch of positions).
   Scratch   [ (token slot pos first last_pos out) | slots | tiles | rows16 | work ]   int32 arrays of N each, slots and tiles 2 N;
             rows16 is what an op leaves for the next (rows16.cuh), work what one op needs while it runs: attention's partial results, or matmul's 16-bit activations.
   Graphs    Decode steps are recorded once and replayed, see replay().
   Tested by tests/test_cuda.cpp                                                                                     */
#include <string>
#include <vector>
#include "ops.h"

#ifndef __CUDACC__
#if !WITH_CUDA
const Ops *cuda_ops(std::string *why_not) {
    *why_not = "this program was built without CUDA (make CUDA=1 needs nvcc)";
    return nullptr;
}
#endif
#else
#include <algorithm>
#include "ring.cuh"
#include "rows16.cuh"

namespace cuda {

cudaStream_t stream;
bool starts_early;
int sm_count;
int most_shared;
int64_t launches;
Step step;

static void forget_steps();

CUtensorMap map_boxes(const void *data, int64_t pitch, int64_t rows, int bytes, int box_rows, int at_once) {
    static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000, cudaEnableDefault, &found));
#else
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)&encode, cudaEnableDefault, &found));
#endif
        if (!encode) fail("GPU: the driver has no cuTensorMapEncodeTiled: too old");
    }
    const bool one = at_once == 1;
    const cuuint64_t size[3] = {(cuuint64_t)(one ? pitch : bytes), (cuuint64_t)rows, (cuuint64_t)(pitch / bytes)}, pitches[2] = {(cuuint64_t)pitch, (cuuint64_t)bytes};
    const cuuint32_t box[3] = {(cuuint32_t)bytes, (cuuint32_t)box_rows, (cuuint32_t)at_once}, stride[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, one ? 2 : 3, (void *)data, size, pitches, box, stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) fail("GPU: %lld rows of %lld bytes have no tensor map: error %d", (long long)rows, (long long)pitch, (int)error);
    return map;
}

// ---- memory ---------------------------------------------------------------------------------------------
static int64_t available() {
    size_t free, total;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return (int64_t)free;
}

static void *alloc(size_t bytes) {
    forget_steps();
    void *p = nullptr;
    const cudaError_t error = cudaMalloc(&p, std::max<size_t>(bytes, 1));
    if (error == cudaSuccess) return p;
    cudaGetLastError();    // the next check shall not see this one
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    fail("GPU memory: %.1f MiB could not be allocated (%s): %.1f MiB of %.1f are free; a smaller -c or -b needs less", bytes / 1048576.0,
         cudaGetErrorString(error), free / 1048576.0, total / 1048576.0);
}

// Waits for the work before it; a destructor may call it, so it never throws.
static void release(void *p) {
    forget_steps();
    cudaFree(p);
}

static void upload(void *to, const void *host, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream));
    launches++;
}

static void download(void *host, const void *from, size_t bytes) {
    CUDA_CHECK(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
}

// ---- weights ----------------------------------------------------------------------------------------------
// f16 has three bits more than bf16 and a smaller range: 65,504 to 2^-24.  A weight of 2^-14 or more becomes the same number,
// a smaller one is rounded to a multiple of 2^-24.  Then activations can be f16 too, and many rows are one product of tensor
// cores instead of two (matmul.cu).
__global__ void fits_f16_kernel(const bf16 *w, int64_t n, int *too_large) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x)
        if (!(fabsf(to_f32(w[i])) < 65520.0f)) *too_large = 1;
}
__global__ void bf16_to_f16_kernel(uint16_t *w, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) w[i] = to_f16(to_f32(bf16{w[i]})).bits;
}

static bool bf16_to_f16(void *w, int64_t n) {
    int *const on_device = (int *)alloc(sizeof(int)), blocks = (int)std::min<int64_t>(ceil_div(n, 256), 4096);
    int too_large = 0;
    upload(on_device, &too_large, sizeof too_large);
    fits_f16_kernel<<<blocks, 256, 0, stream>>>((const bf16 *)w, n, on_device);
    CUDA_CHECK(cudaGetLastError());
    download(&too_large, on_device, sizeof too_large);
    release(on_device);
    if (too_large) return false;
    bf16_to_f16_kernel<<<blocks, 256, 0, stream>>>((uint16_t *)w, n);
    CUDA_CHECK(cudaGetLastError());
    return true;
}

// ---- read bandwidth -------------------------------------------------------------------------------------
// The xor of everything, so that no load can be left out; 4 x 16 bytes in flight a thread.
__global__ void __launch_bounds__(512) read_kernel(const uint4 *p, int64_t n, unsigned *sum) {
    const int64_t stride = (int64_t)gridDim.x * blockDim.x;
    unsigned x = 0;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < n; i += 4 * stride) {
        uint4 v[4];
        for (int j = 0; j < 4; j++) v[j] = __ldcs(p + i + j * stride);
        for (int j = 0; j < 4; j++) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < n; i += stride) x ^= p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
    for (int o = 16; o > 0; o /= 2) x ^= __shfl_xor_sync(~0u, x, o);
    if (threadIdx.x % 32 == 0) atomicXor(sum, x);    // any order gives the same
}

static double read_gb_s(const void *p, int64_t bytes, int times) {
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    unsigned *sum = (unsigned *)alloc(sizeof *sum);
    CUDA_CHECK(cudaMemsetAsync(sum, 0, sizeof *sum, stream));
    double best = 0;
    for (int i = 0; i < times + 1; i++) {    // the first is not timed: it loads the kernel
        CUDA_CHECK(cudaEventRecord(start, stream));
        read_kernel<<<2 * sm_count, 512, 0, stream>>>((const uint4 *)p, bytes / 16, sum);
        CUDA_CHECK(cudaGetLastError());
        CUDA_CHECK(cudaEventRecord(stop, stream));
        CUDA_CHECK(cudaEventSynchronize(stop));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
        if (i > 0) best = std::max(best, bytes / 16 * 16 / (ms * 1e6));
    }
    release(sum);
    cudaEventDestroy(start), cudaEventDestroy(stop);
    return best;
}

// ---- recorded steps -----------------------------------------------------------------------------------------
// A decode step launches the same kernels with the same arguments each time: what changes (tokens, positions, block tables)
// lies in device memory.  The first step of a kind is run, the second recorded as a CUDA graph, the others replay it: one
// launch instead of some ten a layer.  Pointers stay right because whoever allocates or releases makes us forget.
struct StepKind {
    const void *weights;
    KvView kv;
    const int *rows;       // where the row arrays are
    int N, n_out, reach;
    bool seals;
};
struct RecordedStep {
    StepKind kind;
    cudaGraphExec_t graph;    // null: seen once
};
constexpr size_t MOST_KINDS = 64;
static std::vector<RecordedStep> recorded;
static bool recording;

static void forget_steps() {
    for (RecordedStep &r : recorded)
        if (r.graph) cudaGraphExecDestroy(r.graph);
    recorded.clear();
}
static void abandon_recording() {
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    recording = false;
}

static bool replay(const void *weights, const KvView &kv) {
    if (!step.single_rows() || step.pos.empty()) return false;
    StepKind kind;
    memset((void *)&kind, 0, sizeof kind);    // with what is between the members: kinds are compared as bytes
    memcpy((void *)&kind.kv, &kv, sizeof kv);
    kind.weights = weights, kind.rows = step.on_device.token, kind.N = step.on_device.N, kind.n_out = step.on_device.n_out;
    kind.reach = step.reach(), kind.seals = step.most_seals(kv) > 0;
    for (RecordedStep &r : recorded)
        if (memcmp(&r.kind, &kind, sizeof kind) == 0) {
            if (r.graph) CUDA_CHECK(cudaGraphLaunch(r.graph, stream));
            else {
                std::swap(r, recorded.back());    // where end() looks for it
                CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
                recording = true;
            }
            return !recording;
        }
    if (recorded.size() == MOST_KINDS) forget_steps();
    recorded.push_back({kind, nullptr});
    return false;
}
static void end() {
    if (!recording) return;
    recording = false;
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&recorded.back().graph, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaGraphLaunch(recorded.back().graph, stream));
}

// ---- a step -----------------------------------------------------------------------------------------------
constexpr int ROW_INTS = 10;    // of a row, in the arrays below

static int64_t rows_bytes(int64_t N) { return ceil_div(N * ROW_INTS * (int64_t)sizeof(int), 256) * 256; }

static int64_t scratch_bytes(const StepShape &shape) {
    return rows_bytes(shape.N) + rows16_bytes(shape.N) + std::max({attention_work_bytes(shape), attention_decode_work_bytes(shape), matmul_work_bytes(shape)});
}

static Batch begin(const Batch &host, void *scratch) {
    const int N = host.N;
    if (recording) abandon_recording();    // an op of the last step failed
    step.pos.assign(host.pos, host.pos + N);
    step.slots.clear(), step.tiles.clear();
    for (int n = 0; n < N; n++) {
        if (host.first[n] == n) step.slots.push_back({n, 0});
        step.slots.back().rows++;
    }
    for (const SlotRows &s : step.slots)
        for (int i = 0; i < most_tiles(s.rows); i++) step.tiles.push_back({s.row, i});
    static std::vector<int> ints;    // kept between steps: nothing is allocated per token
    ints.assign((size_t)N * ROW_INTS, 0);
    int *at = ints.data(), *const to = (int *)scratch;
    auto put = [&](const void *from, int n, int room) {
        memcpy(at, from, n * sizeof(int));
        at += room;
        return to + (at - ints.data()) - room;
    };
    step.on_device = {N, put(host.token, N, N), put(host.slot, N, N), put(host.pos, N, N), put(host.first, N, N), host.n_out, nullptr};
    int *last = at;
    for (const SlotRows &s : step.slots) std::fill(last + s.row, last + s.row + s.rows, host.pos[s.row + s.rows - 1]);
    step.on_last_pos = put(last, N, N);
    step.on_device.out = put(host.out, host.n_out, N);
    step.on_slots = (const SlotRows *)put(step.slots.data(), 2 * (int)step.slots.size(), 2 * N);
    step.on_tiles = (const TilePlace *)put(step.tiles.data(), 2 * (int)step.tiles.size(), 2 * N);
    step.rows16 = (uint8_t *)scratch + rows_bytes(N);
    step.work = (uint8_t *)step.rows16 + rows16_bytes(N);
    upload(scratch, ints.data(), ints.size() * sizeof(int));
    return step.on_device;
}

const Step &step_of(const Batch &b) {
    if (b.pos != step.on_device.pos || b.N != step.on_device.N) fail("cuda: an op was called with rows that begin() did not give");
    return step;
}
}    // namespace cuda

// ---- the table ----------------------------------------------------------------------------------------------
__global__ void nothing_kernel() {}

const Ops *cuda_ops(std::string *why_not) {
    using namespace cuda;
    static const Ops ops = {
        "cuda",        alloc,    release,   upload,  download,   available, bf16_to_f16, read_gb_s,
        scratch_bytes, begin,    replay,    end,
        embed,         gather,   rmsnorm,   matmul,  matmul_add, unembed,   qkv,         gated,
        rope,          attend,   kv_write,  attention, kv_keep,
    };
    if (stream) return &ops;
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        *why_not = strf("no usable device: %s", error != cudaSuccess ? cudaGetErrorString(error) : "the driver lists none");
        return nullptr;
    }
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, nothing_kernel);    // is there machine code for this device?
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) {
        *why_not = strf("%s (compute capability %d.%d): %s", device.name, device.major, device.minor, cudaGetErrorString(error));
        stream = nullptr;
        return nullptr;
    }
    starts_early = device.major >= 9;
    sm_count = device.multiProcessorCount;
    most_shared = (int)device.sharedMemPerBlockOptin;
    return &ops;
}
#endif
