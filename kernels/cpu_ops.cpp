// cpu_ops.cpp - the CPU's value of the op table.
#include <cstdlib>
#include <cstring>
#include "ops.h"

static void *cpu_alloc(size_t bytes) {
    void *p = aligned_alloc(64, ceil_div(bytes > 0 ? bytes : 1, 64) * 64);
    if (!p) fail("memory: %zu bytes could not be allocated; a smaller -c or -b needs less", bytes);
    return p;
}
static void cpu_copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

const Ops cpu_ops = {
    "cpu",       cpu_alloc,   free,      cpu_copy,      cpu_copy,       cpu::embed,   cpu::gather, cpu::rmsnorm,
    cpu::matmul, cpu::rope,   cpu::kv_write, cpu::attention, cpu::kv_keep, cpu::swiglu, cpu::add,
};
