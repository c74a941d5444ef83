/* Low-rank products on a model's own memory: how they are shared out among threads, and f64. */
#include "lowrank.h"

#include <string.h>

#include "../core/memory.h"
#include "table.h"

/* Multiply-adds that make a piece of work worth another thread. */
#define GRAIN ((int64_t)1 << 19)
/* Rows of a piece come in multiples of this: tiles and panels want company. */
#define UNIT 16
/* From so many rows on weights are packed in panels. */
#define PACK_ROWS 32
/* Columns of a piece, likewise: whole panels of every instruction set. */
#define COLUMN_UNIT 48

static int64_t pieces_of(int64_t n, int64_t unit) { return n / unit + (n % unit != 0); }

/* How many items of `work` multiply-adds make a piece. */
static int64_t grain_of(double work) { return work >= (double)GRAIN ? 1 : (int64_t)((double)GRAIN / (work + 1.0)); }

static void rows_range(void *ctx, int64_t begin, int64_t end)
{
    const pc_lowrank_job *job = ctx;
    pc_kernels()->lowrank(job, begin * UNIT, pc_min(job->rows, end * UNIT));
}

typedef struct pack_work {
    const pc_lowrank_job *job;
    int64_t panels_a; /* those of b follow */
    float *a, *b;
} pack_work;

static void pack_range(void *ctx, int64_t begin, int64_t end)
{
    const pack_work *w = ctx;
    if (begin < w->panels_a)
        pc_kernels()->pack_lowrank(w->job, false, begin, pc_min(end, w->panels_a), w->a);
    if (end > w->panels_a)
        pc_kernels()->pack_lowrank(w->job, true, pc_max(begin, w->panels_a) - w->panels_a, end - w->panels_a, w->b);
}

/* Run the job; only packing needs memory, and without it the job runs all the same. */
static void run_rows(pc_runtime *rt, pc_lowrank_job *job)
{
    const pc_kernel_table *table = pc_kernels();
    bool down = job->given == NULL, up = job->out != NULL;
    int64_t lanes = table->lanes, widest = lanes * table->max_vectors, ranks = job->ranks;
    void *room = NULL;
    if (job->rows >= PACK_ROWS && ranks > 0) {
        int64_t panels_a = down ? pieces_of(ranks, widest) : 0, panels_b = up ? pieces_of(job->n, widest) : 0;
        size_t floats_a, floats_b, bytes;
        if (pc_mul_size((size_t)(down ? pieces_of(ranks, lanes) * lanes : 0), (size_t)job->k, &floats_a) &&
            pc_mul_size((size_t)(up ? pieces_of(job->n, lanes) * lanes : 0), (size_t)ranks + 1, &floats_b) &&
            pc_add_size(floats_a, floats_b, &bytes) && pc_mul_size(bytes, sizeof(float), &bytes) &&
            pc_add_size(bytes, PC_ALIGNMENT, &bytes))
            room = pc_malloc(bytes);
        if (room != NULL) {
            float *a = (float *)(void *)pc_align_up((uintptr_t)room);
            pack_work pack = {.job = job, .panels_a = panels_a, .a = a, .b = a + floats_a};
            pc_parallel_for(rt, panels_a + panels_b, grain_of(8.0 * (double)widest * (double)ranks), pack_range, &pack);
            job->packed_a = down ? pack.a : NULL;
            job->packed_b = up ? pack.b : NULL;
        }
    }
    double work = (double)UNIT * (double)((down ? job->k : 0) + (up ? job->n : 0)) * (double)ranks;
    if (job->rows < 2 * UNIT) /* one piece: no detour */
        table->lowrank(job, 0, job->rows);
    else
        pc_parallel_for(rt, pieces_of(job->rows, UNIT), grain_of(work), rows_range, job);
    job->packed_a = job->packed_b = NULL;
    pc_free(room);
}

static void columns_range(void *ctx, int64_t begin, int64_t end)
{
    const pc_outer_job *job = ctx;
    pc_kernels()->outer(job, begin * COLUMN_UNIT, pc_min(job->n, end * COLUMN_UNIT));
}

static void run_columns(pc_runtime *rt, pc_outer_job *job)
{
    double work = (double)COLUMN_UNIT * (double)job->m * (double)job->r;
    pc_parallel_for(rt, pieces_of(job->n, COLUMN_UNIT), grain_of(work), columns_range, job);
}

/* count elements of `size` bytes, or NULL with the error set. */
static void *scratch(int64_t rows, int64_t cols, size_t size, pc_error *err)
{
    size_t bytes;
    void *room = NULL;
    if (pc_mul_size((size_t)rows, (size_t)cols, &bytes) && pc_mul_size(bytes, size, &bytes))
        room = pc_malloc(bytes);
    if (room == NULL)
        pc_fail_nomem(err, "the scratch of a low-rank product");
    return room;
}

/* ----------------------------------------------------------------------- f64 */

/* h (m,r) = scale · (x · aᵀ) ⊙ e */
static pc_status hidden_f64(pc_runtime *rt, int64_t m, int64_t k, const double *x, int64_t ldx,
                            const pc_lowrank_term *term, bool swapped, const double *a, double scale, const double *e,
                            double *h, pc_error *err)
{
    int64_t r = term->r;
    pc_status status = pc_gemm(rt, PC_F64, false, !swapped, m, r, k, scale, x, ldx, a, swapped ? r : k, 0.0, h, r, err);
    if (status == PC_OK && e != NULL)
        pc_scale_columns(rt, PC_F64, m, r, h, PC_F64, e, h);
    return status;
}

static pc_status forward_f64(pc_runtime *rt, int64_t m, int64_t n, int64_t k, const double *x, int64_t ldx,
                             const double *y, int64_t ldy, double *out, int64_t ldo, const pc_lowrank_term *terms,
                             int count, int64_t ranks, pc_error *err)
{
    double *h = scratch(m, ranks, sizeof *h, err); /* nothing is written before it is sure that all can be */
    if (h == NULL)
        return PC_ERR_NOMEM;
    if (out != y)
        for (int64_t i = 0; i < m; i++)
            memcpy(out + i * ldo, y + i * ldy, (size_t)n * sizeof *y);
    pc_status status = PC_OK;
    for (int t = 0; t < count && status == PC_OK; t++) {
        const pc_lowrank_term *term = &terms[t];
        status = hidden_f64(rt, m, k, x, ldx, term, false, term->a, term->scale, term->e, h, err);
        if (status == PC_OK)
            status = pc_gemm(rt, PC_F64, false, true, m, n, term->r, 1.0, h, term->r, term->b, term->r, 1.0, out, ldo,
                             err);
        for (int64_t i = 0; i < m && term->bias != NULL; i++)
            pc_rows_f64.axpy(n, term->scale, term->bias, out + i * ldo);
    }
    pc_free(h);
    return status;
}

static pc_status backward_f64(pc_runtime *rt, int64_t m, int64_t n, int64_t k, const double *grad, int64_t ldg,
                              const double *x, int64_t ldx, const pc_lowrank_term *term, double *dx, int64_t lddx,
                              double *da, double *db, double *de, double *u, double *h, pc_error *err)
{
    int64_t r = term->r;
    double scale = term->scale;
    pc_status status = hidden_f64(rt, m, n, grad, ldg, term, true, term->b, 1.0, NULL, u, err);
    if (status == PC_OK && h != NULL)
        status = hidden_f64(rt, m, k, x, ldx, term, false, term->a, 1.0, NULL, h, err);
    if (status == PC_OK && de != NULL)
        for (int64_t p = 0; p < r; p++) {
            de[p] = 0.0;
            for (int64_t i = 0; i < m; i++)
                de[p] += scale * u[i * r + p] * h[i * r + p];
        }
    if (status == PC_OK && term->e != NULL) {
        pc_scale_columns(rt, PC_F64, m, r, u, PC_F64, term->e, u);
        if (h != NULL)
            pc_scale_columns(rt, PC_F64, m, r, h, PC_F64, term->e, h);
    }
    if (status == PC_OK && dx != NULL)
        status = pc_gemm(rt, PC_F64, false, false, m, k, r, scale, u, r, term->a, k, 0.0, dx, lddx, err);
    if (status == PC_OK && da != NULL)
        status = pc_gemm(rt, PC_F64, true, false, r, k, m, scale, u, r, x, ldx, 0.0, da, k, err);
    if (status == PC_OK && db != NULL)
        status = pc_gemm(rt, PC_F64, true, false, n, r, m, scale, grad, ldg, h, r, 0.0, db, r, err);
    return status;
}

/* -------------------------------------------------------------------- public */

pc_status pc_lowrank_forward(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, int64_t ldx,
                             const void *y, int64_t ldy, void *out, int64_t ldo, const pc_lowrank_term *terms,
                             int count, pc_error *err)
{
    int64_t ranks = 0, widest = 0;
    for (int t = 0; t < count; t++) {
        ranks = terms[t].r > PC_LOWRANK_MOST ? terms[t].r : ranks + terms[t].r;
        widest = pc_max(widest, terms[t].r);
        if (ranks > PC_LOWRANK_MOST)
            return pc_fail(err, PC_ERR_UNSUPPORTED, "low-rank product: the ranks add up to more than %d",
                           PC_LOWRANK_MOST);
    }
    if (m <= 0 || n <= 0)
        return PC_OK;
    if (dt == PC_F64)
        return forward_f64(rt, m, n, k, x, ldx, y, ldy, out, ldo, terms, count, widest, err);
    pc_lowrank_job job = {.dt = dt, .k = k, .n = n, .x = x, .ldx = ldx, .y = y, .ldy = ldy, .out = out, .ldo = ldo};
    job.count = count;
    job.ranks = (int)ranks;
    job.terms = terms;
    job.rows = m;
    run_rows(rt, &job);
    return PC_OK;
}

/* Σ over rows of u ⊙ h, both (r, m). */
static void rank_sums(pc_dtype dt, int64_t m, int64_t r, const float *u, const float *h, double scale, void *de)
{
    for (int64_t p = 0; p < r; p++) {
        double sum = 0.0;
        for (int64_t i = 0; i < m; i++)
            sum += (double)u[p * m + i] * (double)h[p * m + i];
        pc_put_double(dt, de, p, scale * sum);
    }
}

pc_status pc_lowrank_backward(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *grad,
                              int64_t ldg, const void *x, int64_t ldx, const pc_lowrank_term *term, void *dx,
                              int64_t lddx, void *da, void *db, void *de, pc_error *err)
{
    int64_t r = term->r;
    if (r > PC_LOWRANK_MOST)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "low-rank product: a rank of more than %d", PC_LOWRANK_MOST);
    bool hidden = db != NULL || de != NULL, kept = da != NULL || de != NULL;
    size_t size = dt == PC_F64 ? sizeof(double) : sizeof(float);
    void *u = NULL, *h = NULL;
    if (((kept || dt == PC_F64) && (u = scratch(m, r, size, err)) == NULL) ||
        (hidden && (h = scratch(m, r, size, err)) == NULL)) {
        pc_free(u);
        return PC_ERR_NOMEM;
    }
    pc_status status = PC_OK;
    if (dt == PC_F64) {
        status = backward_f64(rt, m, n, k, grad, ldg, x, ldx, term, dx, lddx, da, db, de, u, h, err);
    } else {
        pc_lowrank_term back = *term, only = *term;
        back.a = term->b;
        back.b = term->a;
        back.bias = NULL;
        pc_lowrank_job job = {.dt = dt, .k = n, .n = k, .x = grad, .ldx = ldg, .out = dx, .ldo = lddx, .count = 1};
        job.ranks = (int)r;
        job.terms = &back;
        job.swapped = true;
        job.keep = u;
        job.rows = m;
        if (dx != NULL || kept)
            run_rows(rt, &job);
        if (hidden) {
            job = (pc_lowrank_job){.dt = dt, .k = k, .n = n, .x = x, .ldx = ldx, .count = 1, .ranks = (int)r};
            job.terms = &only;
            job.keep = h;
            job.rows = m;
            run_rows(rt, &job);
        }
        pc_outer_job outer = {.dt = dt, .m = m, .n = k, .r = r, .h = u, .x = x, .ldx = ldx, .e = term->e, .c = da};
        outer.scale = term->scale;
        if (da != NULL)
            run_columns(rt, &outer);
        outer.n = n;
        outer.h = h;
        outer.x = grad;
        outer.ldx = ldg;
        outer.c = db;
        outer.transposed = true;
        if (db != NULL)
            run_columns(rt, &outer);
        if (de != NULL)
            rank_sums(dt, m, r, u, h, term->scale, de);
    }
    pc_free(u);
    pc_free(h);
    return status;
}

static pc_status to_weight_f64(pc_runtime *rt, int64_t n, int64_t k, const double *w, int64_t ldw, double *out,
                               int64_t ldo, const pc_lowrank_term *term, bool turned, pc_error *err)
{
    int64_t r = term->r, rows = turned ? k : n, cols = turned ? n : k;
    double *b = NULL;
    if (term->e != NULL) {
        b = scratch(n, r, sizeof *b, err);
        if (b == NULL)
            return PC_ERR_NOMEM;
        pc_scale_columns(rt, PC_F64, n, r, term->b, PC_F64, term->e, b);
    }
    if (out != w)
        for (int64_t i = 0; i < rows; i++)
            memcpy(out + i * ldo, w + i * ldw, (size_t)cols * sizeof *w);
    const void *left = b != NULL ? b : term->b;
    pc_status status = turned ? pc_gemm(rt, PC_F64, true, true, k, n, r, term->scale, term->a, k, left, r, 1.0, out,
                                        ldo, err)
                              : pc_gemm(rt, PC_F64, false, false, n, k, r, term->scale, left, r, term->a, k, 1.0, out,
                                        ldo, err);
    pc_free(b);
    return status;
}

pc_status pc_lowrank_to_weight(pc_runtime *rt, pc_dtype dt, int64_t n, int64_t k, const void *w, int64_t ldw, void *out,
                               int64_t ldo, const pc_lowrank_term *term, bool turned, pc_error *err)
{
    if (term->r > PC_LOWRANK_MOST)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "low-rank product: a rank of more than %d", PC_LOWRANK_MOST);
    if (n <= 0 || k <= 0)
        return PC_OK;
    if (dt == PC_F64)
        return to_weight_f64(rt, n, k, w, ldw, out, ldo, term, turned, err);
    pc_lowrank_term right = {.r = term->r, .scale = term->scale, .e = term->e, .b = turned ? term->b : term->a};
    pc_lowrank_job job = {.dt = dt, .n = turned ? n : k, .y = w, .ldy = ldw, .out = out, .ldo = ldo, .count = 1};
    job.ranks = (int)term->r;
    job.terms = &right;
    job.swapped = !turned;
    job.rows = turned ? k : n;
    job.given = turned ? term->a : term->b;
    job.given_turned = turned;
    run_rows(rt, &job);
    return PC_OK;
}
