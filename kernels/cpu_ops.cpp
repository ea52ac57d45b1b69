// cpu_ops.cpp - the CPU's value of the op table.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include "ops.h"

static void *cpu_alloc(size_t bytes) {
    void *p = aligned_alloc(64, ceil_div(bytes > 0 ? bytes : 1, 64) * 64);
    if (!p) fail("memory: %zu bytes could not be allocated; a smaller -c or -b needs less", bytes);
    return p;
}
static void cpu_copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

static int64_t cpu_available() {
    FILE *f = fopen("/proc/meminfo", "r");
    if (!f) return -1;
    char line[128];
    long long kib = -1;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lld kB", &kib) == 1) break;
    fclose(f);
    return kib < 0 ? -1 : kib * 1024;
}

// All threads together.
static double cpu_read_gb_s(const void *data, int64_t n, int times) {
    const int64_t words = n / 64 * 8;
    const uint64_t *p = (const uint64_t *)data;
    double best = 0;
    volatile uint64_t keep = 0;    // the sum must be computed
    for (int i = 0; i < times; i++) {
        const auto start = std::chrono::steady_clock::now();
        uint64_t sum = 0;
#pragma omp parallel for reduction(^ : sum) schedule(static)
        for (int64_t w = 0; w < words; w += 8) {
            uint64_t line = 0;
            for (int j = 0; j < 8; j++) line ^= p[w + j];
            sum ^= line;
        }
        keep = keep ^ sum;
        best = std::max(best, words * 8 / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1e9);
    }
    return best;
}

static int64_t cpu_scratch_bytes(const StepShape &) { return 0; }    // the ops keep their own between calls
static Batch cpu_begin(const Batch &host, void *) { return host; }
static bool cpu_replay(const void *, const KvView &) { return false; }
static void cpu_end() {}

static bool cpu_attend(float *, const float *, const float *, const float *, f16 *, f16 *, const KvView &, int, const Batch &, int) { return false; }
static bool cpu_bf16_to_f16(void *, int64_t) { return false; }    // both are widened to f32 anyway

const Ops cpu_ops = {
    "cpu",             cpu_alloc,    free,           cpu_copy,     cpu_copy,        cpu_available, cpu_bf16_to_f16, cpu_read_gb_s,
    cpu_scratch_bytes, cpu_begin,    cpu_replay,     cpu_end,
    cpu::embed,        cpu::gather,  cpu::rmsnorm,   cpu::matmul,  cpu::matmul_add, cpu::unembed,  cpu::qkv,       cpu::gated,
    cpu::rope,         cpu_attend,   cpu::kv_write, cpu::attention, cpu::kv_keep,
};
