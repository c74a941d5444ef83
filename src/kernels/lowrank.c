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

/* Pack the job's weights where that is worth it; the memory is the caller's to free, NULL if there is none. Without
 * panels the job runs all the same. */
static void *pack_weights(pc_runtime *rt, pc_lowrank_job *job)
{
    const pc_kernel_table *table = pc_kernels();
    bool down = job->given == NULL, up = job->out != NULL;
    int64_t lanes = table->lanes, widest = lanes * table->max_vectors, ranks = job->ranks;
    if (job->rows < PACK_ROWS || ranks <= 0)
        return NULL;
    int64_t panels_a = down ? pieces_of(ranks, widest) : 0, panels_b = up ? pieces_of(job->n, widest) : 0;
    size_t floats_a, floats_b, bytes;
    void *room = NULL;
    if (pc_mul_size((size_t)(down ? pieces_of(ranks, lanes) * lanes : 0), (size_t)job->k, &floats_a) &&
        pc_mul_size((size_t)(up ? pieces_of(job->n, lanes) * lanes : 0), (size_t)ranks + 1, &floats_b) &&
        pc_add_size(floats_a, floats_b, &bytes) && pc_mul_size(bytes, sizeof(float), &bytes) &&
        pc_add_size(bytes, PC_ALIGNMENT, &bytes))
        room = pc_scratch_take(bytes);
    if (room != NULL) {
        float *a = (float *)(void *)pc_align_up((uintptr_t)room);
        pack_work pack = {.job = job, .panels_a = panels_a, .a = a, .b = a + floats_a};
        pc_parallel_for(rt, panels_a + panels_b, grain_of(8.0 * (double)widest * (double)ranks), pack_range, &pack);
        job->packed_a = down ? pack.a : NULL;
        job->packed_b = up ? pack.b : NULL;
    }
    return room;
}

static void run_rows(pc_runtime *rt, pc_lowrank_job *job)
{
    bool down = job->given == NULL, up = job->out != NULL;
    void *room = pack_weights(rt, job);
    double work = (double)UNIT * (double)((down ? job->k : 0) + (up ? job->n : 0)) * (double)job->ranks;
    if (job->rows < 2 * UNIT) /* one piece: no detour */
        pc_kernels()->lowrank(job, 0, job->rows);
    else
        pc_parallel_for(rt, pieces_of(job->rows, UNIT), grain_of(work), rows_range, job);
    job->packed_a = job->packed_b = NULL;
    pc_scratch_leave(room);
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

/* The gradients of one term, every row taken in hand once: for small weights, of which each chunk of rows can have sums
 * of its own. Chunks depend on the number of rows alone, so that the sums do not depend on that of threads. */
#define CHUNK_ROWS 64
#define FEW_CHUNKS 8
#define MOST_CHUNKS 16
#define MANY_ROWS 4096
#define CHUNK_FLOATS 65536
/* Rows that stay in the second-level cache from one product to the next. */
#define TOGETHER 64

typedef struct chunks_work {
    const pc_lowrank_job *back, *low; /* u and dx; h, or NULL when there is nothing to compute */
    const pc_outer_job *da, *db;      /* each NULL when not wanted */
    float *parts;                     /* of every chunk: sums for da, then for db */
    int64_t rows, each, ld_a, ld_b, stride;
} chunks_work;

static void chunk_range(void *ctx, int64_t begin, int64_t end)
{
    const chunks_work *w = ctx;
    const pc_kernel_table *table = pc_kernels();
    for (int64_t chunk = begin; chunk < end; chunk++) {
        float *for_a = w->parts + chunk * w->stride, *for_b = for_a + (w->da != NULL ? w->da->r * w->ld_a : 0);
        int64_t first = chunk * w->each, last = pc_min(w->rows, first + w->each);
        for (int64_t row = first; row < last; row += TOGETHER) {
            int64_t until = pc_min(last, row + TOGETHER);
            if (w->back != NULL)
                table->lowrank(w->back, row, until);
            if (w->low != NULL)
                table->lowrank(w->low, row, until);
            if (w->da != NULL)
                table->outer_rows(w->da, row, until - row, for_a, w->ld_a, row > first);
            if (w->db != NULL)
                table->outer_rows(w->db, row, until - row, for_b, w->ld_b, row > first);
        }
    }
}

typedef struct join_work {
    const pc_outer_job *job;
    const float *parts;
    int64_t count, stride, ld;
} join_work;

static void join_range(void *ctx, int64_t begin, int64_t end)
{
    const join_work *w = ctx;
    pc_kernels()->outer_join(w->job, w->parts, w->count, w->stride, w->ld, begin * COLUMN_UNIT,
                             pc_min(w->job->n, end * COLUMN_UNIT));
}

/* false, with nothing done, where the weights are too large for this or there is no memory. */
static bool run_chunks(pc_runtime *rt, pc_lowrank_job *back, pc_lowrank_job *low, const pc_outer_job *da,
                       const pc_outer_job *db, int64_t rows, int64_t ranks)
{
    int64_t widest = pc_kernels()->lanes * pc_kernels()->max_vectors;
    chunks_work w = {.back = back, .low = low, .da = da, .db = db, .rows = rows};
    w.ld_a = da != NULL ? pieces_of(da->n, widest) * widest : 0;
    w.ld_b = db != NULL ? pieces_of(db->n, widest) * widest : 0;
    if (rows == 0 || ranks == 0 || (w.ld_a + w.ld_b) > CHUNK_FLOATS / ranks)
        return false;
    w.stride = ranks * (w.ld_a + w.ld_b);
    int64_t chunks = rows < MANY_ROWS ? FEW_CHUNKS : MOST_CHUNKS; /* joining their sums takes time, too */
    w.each = pc_max(CHUNK_ROWS, pieces_of(pieces_of(rows, chunks), UNIT) * UNIT);
    int64_t count = pieces_of(rows, w.each);
    w.parts = pc_scratch_take((size_t)(count * w.stride) * sizeof *w.parts);
    if (w.parts == NULL)
        return false;
    void *packed = back != NULL ? pack_weights(rt, back) : NULL, *more = low != NULL ? pack_weights(rt, low) : NULL;
    double work = 2.0 * (double)w.each * (double)w.stride;
    if (count == 1)
        chunk_range(&w, 0, 1);
    else
        pc_parallel_for(rt, count, grain_of(work), chunk_range, &w);
    pc_scratch_leave(packed);
    pc_scratch_leave(more);
    const pc_outer_job *all[] = {da, db};
    for (int i = 0; i < 2; i++) {
        if (all[i] == NULL)
            continue;
        join_work join = {.job = all[i], .parts = w.parts, .count = count, .stride = w.stride, .ld = w.ld_a};
        if (i == 1) {
            join.parts += da != NULL ? ranks * w.ld_a : 0;
            join.ld = w.ld_b;
        }
        pc_parallel_for(rt, pieces_of(all[i]->n, COLUMN_UNIT), grain_of((double)(count * ranks * COLUMN_UNIT)), join_range,
                        &join);
    }
    pc_scratch_leave(w.parts);
    return true;
}

/* count elements of `size` bytes, or NULL with the error set. */
static void *scratch(int64_t rows, int64_t cols, size_t size, pc_error *err)
{
    size_t bytes;
    void *room = NULL;
    if (pc_mul_size((size_t)rows, (size_t)cols, &bytes) && pc_mul_size(bytes, size, &bytes))
        room = pc_scratch_take(bytes);
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
    pc_scratch_leave(h);
    return status;
}

static pc_status backward_f64(pc_runtime *rt, int64_t m, int64_t n, int64_t k, const double *grad, int64_t ldg,
                              const double *x, int64_t ldx, const pc_lowrank_term *term, const double *base,
                              int64_t ldbase, double *dx, int64_t lddx, double *da, double *db, double *de, double *u,
                              double *h, pc_error *err)
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
    for (int64_t i = 0; i < m && status == PC_OK && base != NULL && base != dx; i++)
        memcpy(dx + i * lddx, base + i * ldbase, (size_t)k * sizeof *dx);
    if (status == PC_OK && dx != NULL)
        status = pc_gemm(rt, PC_F64, false, false, m, k, r, scale, u, r, term->a, k, base != NULL ? 1.0 : 0.0, dx, lddx,
                         err);
    if (status == PC_OK && da != NULL)
        status = pc_gemm(rt, PC_F64, true, false, r, k, m, scale, u, r, x, ldx, 0.0, da, k, err);
    if (status == PC_OK && db != NULL)
        status = pc_gemm(rt, PC_F64, true, false, n, r, m, scale, grad, ldg, h, r, 0.0, db, r, err);
    return status;
}

/* -------------------------------------------------------------------- public */

pc_status pc_lowrank_forward(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, int64_t k, const void *x, int64_t ldx,
                             const void *y, int64_t ldy, void *out, int64_t ldo, const pc_lowrank_term *terms,
                             int count, float *hidden, pc_error *err)
{
    int64_t ranks = 0, widest = 0;
    for (int t = 0; t < count; t++) {
        ranks = terms[t].r > PC_LOWRANK_MOST ? terms[t].r : ranks + terms[t].r;
        widest = pc_max(widest, terms[t].r);
        if (ranks > PC_LOWRANK_MOST)
            return pc_fail(err, PC_ERR_UNSUPPORTED, "low-rank product: the ranks add up to more than %d",
                           PC_LOWRANK_MOST);
    }
    if (m <= 0 || (n <= 0 && hidden == NULL))
        return PC_OK;
    if (dt == PC_F64)
        return forward_f64(rt, m, n, k, x, ldx, y, ldy, out, ldo, terms, count, widest, err);
    pc_lowrank_job job = {.dt = dt, .k = k, .n = n, .x = x, .ldx = ldx, .y = y, .ldy = ldy, .out = out, .ldo = ldo};
    job.count = count;
    job.ranks = (int)ranks;
    job.terms = terms;
    job.keep = hidden;
    job.out = n > 0 ? out : NULL;
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
                              int64_t ldg, const void *x, int64_t ldx, const pc_lowrank_term *term,
                              const float *hidden, const void *base, int64_t ldbase, void *dx, int64_t lddx, void *da,
                              void *db, void *de, pc_error *err)
{
    int64_t r = term->r;
    if (r > PC_LOWRANK_MOST)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "low-rank product: a rank of more than %d", PC_LOWRANK_MOST);
    bool computed = hidden == NULL && (db != NULL || de != NULL), kept = da != NULL || de != NULL;
    size_t size = dt == PC_F64 ? sizeof(double) : sizeof(float);
    void *u = NULL, *h = NULL;
    if (((kept || dt == PC_F64) && (u = scratch(m, r, size, err)) == NULL) ||
        (computed && (h = scratch(m, r, size, err)) == NULL)) {
        pc_scratch_leave(u);
        return PC_ERR_NOMEM;
    }
    pc_status status = PC_OK;
    if (dt == PC_F64) {
        status = backward_f64(rt, m, n, k, grad, ldg, x, ldx, term, base, ldbase, dx, lddx, da, db, de, u, h, err);
    } else {
        pc_lowrank_term back = *term, only = *term;
        back.a = term->b;
        back.b = term->a;
        back.bias = NULL;
        pc_lowrank_job job = {.dt = dt, .k = n, .n = k, .x = grad, .ldx = ldg, .out = dx, .ldo = lddx, .count = 1};
        job.y = base;
        job.ldy = ldbase;
        job.ranks = (int)r;
        job.terms = &back;
        job.swapped = true;
        job.keep = u;
        job.rows = m;
        pc_lowrank_job low = {.dt = dt, .k = k, .n = n, .x = x, .ldx = ldx, .count = 1, .ranks = (int)r};
        low.terms = &only;
        low.keep = h;
        low.rows = m;
        pc_outer_job for_a = {.dt = dt, .m = m, .n = k, .r = r, .h = u, .x = x, .ldx = ldx, .e = term->e, .c = da};
        for_a.scale = term->scale;
        pc_outer_job for_b = for_a;
        for_b.n = n;
        for_b.h = computed ? h : hidden;
        for_b.x = grad;
        for_b.ldx = ldg;
        for_b.c = db;
        for_b.transposed = true;
        pc_lowrank_job *back_job = dx != NULL || kept ? &job : NULL, *low_job = computed ? &low : NULL;
        const pc_outer_job *a_job = da != NULL ? &for_a : NULL, *b_job = db != NULL ? &for_b : NULL;
        if ((a_job == NULL && b_job == NULL) || !run_chunks(rt, back_job, low_job, a_job, b_job, m, r)) {
            if (back_job != NULL)
                run_rows(rt, back_job);
            if (low_job != NULL)
                run_rows(rt, low_job);
            if (a_job != NULL)
                run_columns(rt, &for_a);
            if (b_job != NULL)
                run_columns(rt, &for_b);
        }
        if (de != NULL)
            rank_sums(dt, m, r, u, computed ? h : hidden, term->scale, de);
    }
    pc_scratch_leave(u);
    pc_scratch_leave(h);
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
    pc_scratch_leave(b);
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
