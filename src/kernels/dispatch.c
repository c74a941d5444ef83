/* Which implementation runs: decided once, from what the CPU says. */
#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "openblas.h"
#include "table.h"

/* The one global of the kernels: written once (every thread that races would write the same), then only read. */
static _Atomic(const pc_kernel_table *) chosen;

const pc_kernel_table *pc_kernels(void)
{
    const pc_kernel_table *table = atomic_load_explicit(&chosen, memory_order_relaxed);
    return table != NULL ? table : &pc_table_generic;
}

#if defined(__x86_64__)
static bool has_avx2(void)
{
    unsigned a, b, c, d;
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    /* these also ask whether the operating system saves the registers */
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static const pc_kernel_table *best(void)
{
#if defined(__x86_64__)
    if (has_avx512())
        return &pc_table_avx512;
    if (has_avx2())
        return &pc_table_avx2;
#endif
    return &pc_table_generic;
}

void pc_kernels_init(void)
{
    if (atomic_load(&chosen) != NULL)
        return;
    PC_BLAS(openblas_set_num_threads)(1);
    atomic_store(&chosen, best());
}

const char *pc_kernels_isa(void) { return pc_kernels()->name; }
const char *pc_kernels_blas(void) { return PC_BLAS(openblas_get_config)(); }

#ifdef PC_TEST_HOOKS
bool pc_kernels_force_isa(const char *name)
{
    const pc_kernel_table *table = NULL;
    if (strcmp(name, "generic") == 0)
        table = &pc_table_generic;
#if defined(__x86_64__)
    if (strcmp(name, "avx512") == 0 && has_avx512())
        table = &pc_table_avx512;
    if (strcmp(name, "avx2") == 0 && has_avx2())
        table = &pc_table_avx2;
#endif
    if (table != NULL)
        atomic_store(&chosen, table);
    return table != NULL;
}
#endif
