/* Rows times a vector: how they are shared out among threads, and 16 bits. */
#include "scale.h"

#include <string.h>

#include "../core/memory.h"
#include "table.h"

/* Elements that make a piece of work worth another thread. */
#define GRAIN 32768
/* Rows of gradients that are added up before they go to memory, as `scale_back` takes them. */
#define TOGETHER 4
/* Pieces with sums of their own. Their number depends on that of rows alone, and so do the sums. */
#define MOST_PIECES 16
#define PIECE_ROWS 16
/* Columns that are widened on the stack. */
#define WIDTH 512

typedef union numbers {
    float f32[WIDTH];
    double f64[WIDTH];
} numbers;

typedef struct scale_job {
    pc_dtype dt, vdt, compute;
    int64_t n, rows, each; /* rows of a piece */
    const void *v, *grad, *x;
    int64_t ldg, ldx, ldy;
    void *y;
    char *sums; /* (pieces, n) of the compute dtype, or NULL */
} scale_job;

/* Elements [at, at + n) in the compute dtype: where they are, or widened into `room`. */
static const void *wide(pc_dtype compute, pc_dtype dt, const void *from, int64_t at, int64_t n, void *room)
{
    if (dt == compute)
        return pc_at(dt, from, at);
    pc_widen_to(compute, room, dt, pc_at(dt, from, at), n);
    return room;
}

static int64_t width_of(const scale_job *j) { return j->dt == j->compute && j->vdt == j->compute ? j->n : WIDTH; }

/* Columns before the next line of the cache, of a row that is written: stores that touch two lines take twice the time. */
static int64_t ahead_of_line(pc_dtype dt, const void *y, int64_t cols)
{
    return pc_min(cols, (int64_t)((0 - (uintptr_t)y) % PC_ALIGNMENT / pc_dtype_size(dt)));
}

static void forward_range(void *ctx, int64_t begin, int64_t end)
{
    const scale_job *j = ctx;
    numbers for_v, for_x;
    int64_t step = width_of(j);
    for (int64_t col = 0; col < j->n; col += step) {
        int64_t cols = pc_min(step, j->n - col);
        const void *v = wide(j->compute, j->vdt, j->v, col, cols, &for_v);
        for (int64_t i = begin; i < end; i++) {
            const void *x = wide(j->compute, j->dt, j->x, i * j->ldx + col, cols, &for_x);
            void *y = pc_at_mut(j->dt, j->y, i * j->ldy + col);
            if (j->dt == j->compute) {
                int64_t head = ahead_of_line(j->dt, y, cols);
                pc_rows(j->dt)->multiply(head, x, v, y);
                pc_rows(j->dt)->multiply(cols - head, pc_at(j->dt, x, head), pc_at(j->dt, v, head), pc_at_mut(j->dt, y, head));
            } else {
                pc_rows(PC_F32)->multiply(cols, x, v, &for_x);
                pc_kernels()->narrow(j->dt, for_x.f32, cols, y);
            }
        }
    }
}

void pc_rows_scale(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *x, int64_t ldx, pc_dtype vdt,
                   const void *v, void *y, int64_t ldy)
{
    scale_job j = {.dt = dt, .vdt = vdt, .n = n, .v = v, .x = x, .ldx = ldx, .y = y, .ldy = ldy};
    j.compute = dt == PC_F64 ? PC_F64 : PC_F32;
    if (n > 0)
        pc_parallel_for(rt, m, pc_max(1, GRAIN / n), forward_range, &j);
}

/* Columns [col, col + cols) of up to TOGETHER rows. */
static void back_rows(const scale_job *j, int64_t row, int64_t rows, int64_t col, int64_t cols, const void *v, char *sums)
{
    const size_t size = pc_dtype_size(j->compute);
    sums = sums != NULL ? sums + (size_t)col * size : NULL;
    if (j->dt == j->compute) {
        pc_rows(j->compute)->scale_back(cols, rows, pc_at(j->dt, j->grad, row * j->ldg + col), j->ldg,
                                        sums != NULL ? pc_at(j->dt, j->x, row * j->ldx + col) : NULL, j->ldx, v,
                                        j->y != NULL ? pc_at_mut(j->dt, j->y, row * j->ldy + col) : NULL, j->ldy, sums);
        return;
    }
    float g[TOGETHER * WIDTH], x[TOGETHER * WIDTH];
    for (int64_t i = 0; i < rows; i++) {
        pc_widen_to(PC_F32, g + i * WIDTH, j->dt, pc_at(j->dt, j->grad, (row + i) * j->ldg + col), cols);
        if (sums != NULL)
            pc_widen_to(PC_F32, x + i * WIDTH, j->dt, pc_at(j->dt, j->x, (row + i) * j->ldx + col), cols);
    }
    pc_rows(PC_F32)->scale_back(cols, rows, g, WIDTH, sums != NULL ? x : NULL, WIDTH, v, j->y != NULL ? g : NULL, WIDTH,
                                sums);
    for (int64_t i = 0; i < rows && j->y != NULL; i++)
        pc_kernels()->narrow(j->dt, g + i * WIDTH, cols, pc_at_mut(j->dt, j->y, (row + i) * j->ldy + col));
}

static void back_range(void *ctx, int64_t begin, int64_t end)
{
    const scale_job *j = ctx;
    int64_t step = width_of(j);
    numbers room;
    for (int64_t piece = begin; piece < end; piece++) {
        char *sums = j->sums != NULL ? j->sums + (size_t)(piece * j->n) * pc_dtype_size(j->compute) : NULL;
        int64_t last = pc_min(j->rows, (piece + 1) * j->each);
        if (sums != NULL)
            memset(sums, 0, (size_t)j->n * pc_dtype_size(j->compute));
        for (int64_t row = piece * j->each; row < last; row += TOGETHER)
            for (int64_t col = 0; col < j->n; col += step) {
                int64_t cols = pc_min(step, j->n - col);
                const void *v = wide(j->compute, j->vdt, j->v, col, cols, &room);
                back_rows(j, row, pc_min(TOGETHER, last - row), col, cols, v, sums);
            }
    }
}

pc_status pc_rows_scale_back(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *grad, int64_t ldg,
                             const void *x, int64_t ldx, pc_dtype vdt, const void *v, void *dx, int64_t lddx, void *dv,
                             pc_error *err)
{
    scale_job j = {.dt = dt, .vdt = vdt, .n = n, .rows = m, .v = v, .grad = grad, .ldg = ldg, .x = x, .ldx = ldx};
    j.y = dx;
    j.ldy = lddx;
    j.compute = dt == PC_F64 ? PC_F64 : PC_F32;
    int64_t most = m / MOST_PIECES + (m % MOST_PIECES != 0);
    j.each = pc_max(PIECE_ROWS, (most + TOGETHER - 1) / TOGETHER * TOGETHER);
    int64_t pieces = m / j.each + (m % j.each != 0);
    if (dv != NULL) { /* nothing is written before it is sure that all can be */
        size_t count;
        if (pc_mul_size((size_t)pieces, (size_t)n, &count) && pc_mul_size(count, pc_dtype_size(j.compute), &count))
            j.sums = pc_malloc(count > 0 ? count : 1);
        if (j.sums == NULL)
            return pc_fail_nomem(err, "the sums of a gradient");
    }
    if (n > 0 && (dx != NULL || dv != NULL))
        pc_parallel_for(rt, pieces, pc_max(1, GRAIN / pc_max(1, j.each * n)), back_range, &j);
    for (int64_t col = 0; col < n && dv != NULL; col++) {
        double sum = 0.0;
        for (int64_t piece = 0; piece < pieces; piece++)
            sum += pc_get_double(j.compute, j.sums, piece * n + col);
        pc_put_double(vdt, dv, col, sum);
    }
    pc_free(j.sums);
    return PC_OK;
}
