/* Products with a stored weight: linear layers and low-rank updates.
 *
 * f32 activations run on kernels of our own (simd_products.h), in one of three ways.  Few rows: dots, which read the
 * weight where it lies.  More: x is transposed into panels and the weight still read where it lies, f16 and bf16
 * widened a strip at a time.  From PC_MANY_ROWS on: the weight is packed (linear_many.c).  f64 goes through OpenBLAS.
 *
 * Measured on one AVX-512 core (Sapphire Rapids, shared with other work; best of 40 alternating runs of CPU time),
 * GFLOP/s.  (n, k) = (1536, 384): dots of 4 × 4 reach 53 at 4 rows and 75 at 8, panels of x 29 and 49; from 16 rows on
 * panels win (94 against 80), so half a vector of rows is where they cross.  Panels of x against a packed weight:
 *
 *     (n, k)         64 rows     192         256         1024
 *     384,  384      92, 84      108, 103    105, 107    98,  113
 *     1536, 384      100, 81     146, 131    142, 134    113, 132
 *     384,  1536     122, 107    104, 104    135, 140    113, 135
 *     4096, 4096     102, 79     124, 105    129, 121    126, 132
 */
#include <string.h>

#include "../core/memory.h"
#include "linear.h"

/* Largest copy of x in panels, in floats; more rows go in several rounds. */
#define SLAB_FLOATS ((int64_t)8 << 20)
/* Part of it that a thread works on at a time: it should stay in a second-level cache beside the weights. */
#define BLOCK_FLOATS ((int64_t)192 << 10)
/* Depth that the panel kernels take in one pass (DEPTH in simd_products.h). */
#define PASS_DEPTH 1024
/* Multiply-adds that make a piece of work worth another thread. */
#define GRAIN ((int64_t)96 << 10)
/* Up to so many columns dots beat transposing x. */
#define DOT_COLUMNS 16

void pc_panels_plan(pc_panels *p, const pc_kernel_table *table, int64_t rows, int64_t k)
{
    int64_t vectors = (rows + table->lanes - 1) / table->lanes;
    p->rows = rows;
    p->k = k;
    p->lanes = table->lanes;
    p->count = (vectors + table->max_vectors - 1) / table->max_vectors;
    p->vectors = vectors / p->count;
    p->extra = vectors % p->count;
}

/* `count` floats aligned for vectors, in a block that *base keeps for pc_free; NULL when it cannot be had. */
static float *scratch_floats(int64_t count, void **base)
{
    size_t bytes;
    *base = NULL;
    if (count < 0 || !pc_mul_size((size_t)count, sizeof(float), &bytes) || !pc_add_size(bytes, PC_ALIGNMENT, &bytes))
        return NULL;
    *base = pc_malloc(bytes);
    return *base != NULL ? (float *)(((uintptr_t)*base + PC_ALIGNMENT - 1) & ~(uintptr_t)(PC_ALIGNMENT - 1)) : NULL;
}

/* How many items of `work` multiply-adds make a piece. */
static int64_t grain_of(int64_t work) { return pc_max(1, GRAIN / pc_max(work, 1)); }

/* ------------------------------------------------------------ f32, w (n, k) */

typedef struct panel_work {
    const pc_kernel_table *table;
    const pc_linear_job *job;
    int64_t strips, block; /* panels in a block */
} panel_work;

static void pack_range(void *ctx, int64_t begin, int64_t end)
{
    const panel_work *w = ctx;
    w->table->pack(w->job->panels, w->job->x, begin, end);
}

static void strip_range(void *ctx, int64_t begin, int64_t end)
{
    const panel_work *w = ctx;
    while (begin < end) { /* the range may cross from one block of rows into the next */
        int64_t block = begin / w->strips, strip = begin % w->strips;
        int64_t stop = pc_min(w->strips, strip + (end - begin));
        w->table->linear(w->job, block * w->block, pc_min(w->job->panels->count, (block + 1) * w->block), strip, stop);
        begin += stop - strip;
    }
}

static void dot_range(void *ctx, int64_t begin, int64_t end)
{
    const panel_work *w = ctx;
    w->table->dot(w->job, 4 * begin, pc_min(w->job->n, 4 * end));
}

static bool wants_dots(const pc_kernel_table *table, const pc_linear_job *job)
{
    if (job->wdt == PC_F64)
        return false;
    return job->m <= table->lanes / 2 || job->n <= DOT_COLUMNS || job->k == 0;
}

/* job->bias is in f32; everything else as given. */
static pc_status linear_f32(pc_runtime *rt, pc_linear_job *job, pc_error *err)
{
    const pc_kernel_table *table = pc_kernels();
    panel_work work = {.table = table, .job = job};
    if (wants_dots(table, job)) {
        pc_parallel_for(rt, (job->n + 3) / 4, grain_of(4 * job->m * job->k), dot_range, &work);
        return PC_OK;
    }
    if (job->m >= PC_MANY_ROWS)
        return pc_linear_many(rt, job, err);
    int64_t rows = job->m, widest = (int64_t)table->lanes * table->max_vectors;
    int64_t slab = pc_max(widest, SLAB_FLOATS / pc_max(job->k, 1) / widest * widest);
    int64_t depth = pc_min(job->k, PASS_DEPTH);
    void *base;
    int64_t padded = (pc_min(rows, slab) + table->lanes - 1) / table->lanes * table->lanes;
    int64_t count;
    float *data = __builtin_mul_overflow(padded, job->k, &count) ? NULL : scratch_floats(count, &base);
    if (data == NULL)
        return pc_fail_nomem(err, "the scratch of a linear layer");
    pc_panels panels = {.data = data};
    job->panels = &panels;
    work.strips = (job->n + table->lanes - 1) / table->lanes;
    for (int64_t done = 0; done < rows; done += slab) {
        job->m = pc_min(slab, rows - done);
        pc_panels_plan(&panels, table, job->m, job->k);
        work.block = pc_max(1, BLOCK_FLOATS / (pc_max(depth, 1) * panels.vectors * panels.lanes));
        pc_parallel_for(rt, panels.count, grain_of(8 * widest * job->k), pack_range, &work);
        int64_t blocks = (panels.count + work.block - 1) / work.block;
        pc_parallel_for(rt, blocks * work.strips,
                        grain_of(pc_min(job->m, work.block * widest) * table->lanes * job->k), strip_range, &work);
        job->x += job->m * job->k;
        job->y += job->m * job->n;
    }
    pc_free(base);
    return PC_OK;
}

/* ------------------------------------------------------- f32, rows times b */

typedef struct product_work {
    const pc_kernel_table *table;
    const pc_product_job *job;
    int64_t rows; /* in a block */
    int64_t panels;
} product_work;

static void product_range(void *ctx, int64_t begin, int64_t end)
{
    const product_work *w = ctx;
    int64_t width = (int64_t)w->table->lanes * w->table->max_vectors;
    while (begin < end) {
        int64_t block = begin / w->panels, panel = begin % w->panels;
        int64_t stop = pc_min(w->panels, panel + (end - begin));
        w->table->product(w->job, block * w->rows, pc_min(w->job->m, (block + 1) * w->rows), panel * width,
                          pc_min(w->job->n, stop * width));
        begin += stop - panel;
    }
}

static void product_f32(pc_runtime *rt, const pc_product_job *job)
{
    product_work work = {.table = pc_kernels(), .job = job};
    int64_t width = (int64_t)work.table->lanes * work.table->max_vectors;
    work.panels = (job->n + width - 1) / width;
    /* Each block of rows builds its panels again: split rows only where columns are too few to share out. */
    work.rows = work.panels >= 8 ? job->m : pc_max(64, (job->m / 8 + 15) / 16 * 16);
    int64_t blocks = (job->m + work.rows - 1) / work.rows;
    pc_parallel_for(rt, blocks * work.panels, grain_of(pc_min(work.rows, job->m) * width * job->k), product_range,
                    &work);
}

/* ----------------------------------------------------------------- f64 path */

typedef struct finish_work {
    pc_dtype dt;
    int64_t n;
    const void *bias;
    pc_activation_fn act;
    void *y;
} finish_work;

static void finish_range(void *ctx, int64_t begin, int64_t end)
{
    const finish_work *w = ctx;
    for (int64_t i = begin; i < end; i++)
        pc_rows(w->dt)->finish(w->act, w->n, w->bias, pc_at_mut(w->dt, w->y, i * w->n));
}

/* Elements of a weight that are widened at once. */
#define SLAB_DOUBLES ((int64_t)512 << 10)

static pc_status linear_f64(pc_runtime *rt, bool by_rows, int64_t m, int64_t n, int64_t k, const double *x,
                            pc_dtype wdt, const void *w, double *y, pc_error *err)
{
    if (wdt == PC_F64)
        return pc_gemm(rt, PC_F64, false, by_rows, m, n, k, 1.0, x, k, w, by_rows ? k : n, 0.0, y, n, err);
    int64_t length = by_rows ? k : n, count = by_rows ? n : k; /* of the weight's rows as stored */
    int64_t step = pc_min(count, pc_max(1, SLAB_DOUBLES / pc_max(length, 1)));
    size_t bytes;
    double *wide = NULL;
    if (pc_mul_size((size_t)pc_max(step, 1), (size_t)length, &bytes) && pc_mul_size(bytes, sizeof *wide, &bytes))
        wide = pc_malloc(bytes);
    if (wide == NULL)
        return pc_fail_nomem(err, "the scratch of a linear layer");
    pc_status status = PC_OK;
    for (int64_t at = 0; status == PC_OK && (at < count || at == 0); at += pc_max(step, 1)) {
        int64_t part = pc_min(step, count - at);
        pc_convert(rt, PC_F64, wide, wdt, pc_at(wdt, w, at * length), part * length);
        status = by_rows ? pc_gemm(rt, PC_F64, false, true, m, part, k, 1.0, x, k, wide, k, 0.0, y + at, n, err)
                         : pc_gemm(rt, PC_F64, false, false, m, n, part, 1.0, x + at, k, wide, n, at > 0 ? 1.0 : 0.0, y,
                                   n, err);
    }
    pc_free(wide);
    return status;
}

/* -------------------------------------------------------------------- public */

static pc_status linear(pc_runtime *rt, pc_dtype dt, bool by_rows, int64_t m, int64_t n, int64_t k, const void *x,
                        pc_dtype wdt, const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err)
{
    if (m <= 0 || n <= 0)
        return PC_OK;
    void *wide_bias = NULL;
    if (bias != NULL && wdt != dt) {
        wide_bias = pc_malloc((size_t)n * pc_dtype_size(dt));
        if (wide_bias == NULL)
            return pc_fail_nomem(err, "the bias of a linear layer");
        pc_widen_to(dt, wide_bias, wdt, bias, n);
        bias = wide_bias;
    }
    pc_status status = PC_OK;
    if (dt == PC_F64) {
        status = linear_f64(rt, by_rows, m, n, k, x, wdt, w, y, err);
        finish_work f = {dt, n, bias, act, y};
        if (status == PC_OK && (bias != NULL || act != PC_ACT_NONE))
            pc_parallel_for(rt, m, pc_max(1, 2048 / n), finish_range, &f);
    } else if (by_rows) {
        pc_linear_job job = {.m = m, .n = n, .k = k, .x = x, .wdt = wdt, .w = w, .bias = bias, .act = act, .y = y};
        status = linear_f32(rt, &job, err);
    } else {
        pc_product_job job = {.m = m, .n = n, .k = k, .a = x, .lda = k, .bdt = wdt, .b = w, .ldc = n, .c = y};
        job.bias = bias;
        job.act = act;
        product_f32(rt, &job);
    }
    pc_free(wide_bias);
    return status;
}

pc_status pc_linear(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, pc_dtype wdt,
                    const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err)
{
    return linear(rt, dt, true, m, n, k, x, wdt, w, bias, act, y, err);
}

pc_status pc_linear_t(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, pc_dtype wdt,
                      const void *w, const void *bias, pc_activation_fn act, void *y, pc_error *err)
{
    return linear(rt, dt, false, m, n, k, x, wdt, w, bias, act, y, err);
}

pc_status pc_lowrank_add(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, int64_t r, const void *x,
                         pc_dtype adt, const void *a, const void *e, pc_dtype bdt, const void *b, double scale,
                         void *y, pc_error *err)
{
    if (m <= 0 || n <= 0 || r <= 0)
        return PC_OK;
    /* one piece of scratch: x · aᵀ, and for f64 a widened b */
    size_t size = pc_dtype_size(dt), t_count, b_count = 0, bytes;
    bool widen_b = dt == PC_F64 && bdt != PC_F64;
    char *t = NULL;
    if (pc_mul_size((size_t)m, (size_t)r, &t_count) && (!widen_b || pc_mul_size((size_t)n, (size_t)r, &b_count)) &&
        pc_add_size(t_count, b_count, &bytes) && pc_mul_size(bytes, size, &bytes))
        t = pc_malloc(bytes);
    if (t == NULL)
        return pc_fail_nomem(err, "the scratch of a low-rank product");
    pc_status status = linear(rt, dt, true, m, r, k, x, adt, a, NULL, PC_ACT_NONE, t, err);
    if (status == PC_OK && e != NULL)
        pc_scale_columns(rt, dt, m, r, t, adt, e, t);
    if (status == PC_OK && dt == PC_F64) {
        if (widen_b) {
            pc_convert(rt, dt, t + t_count * size, bdt, b, n * r);
            b = t + t_count * size;
        }
        status = pc_gemm(rt, dt, false, true, m, n, r, scale, t, r, b, r, 1.0, y, n, err);
    } else if (status == PC_OK) {
        pc_rows(dt)->scale(m * r, t, scale, t);
        pc_product_job job = {.m = m, .n = n, .k = r, .a = (const float *)(const void *)t, .lda = r, .bdt = bdt};
        job.b = b;
        job.b_rows = true;
        job.accumulate = true;
        job.c = y;
        job.ldc = n;
        product_f32(rt, &job);
    }
    pc_free(t);
    return status;
}
