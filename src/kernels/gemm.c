/* General matrix product: OpenBLAS, one thread per call, on slices of the result that our own threads share out. */
#include <string.h>

#include "openblas.h"
#include "table.h"

/* OpenBLAS counts in 32 bits. */
#define LARGEST ((int64_t)1 << 30)
/* Multiply-adds below which one thread does it all. */
#define SMALL ((int64_t)1 << 18)
/* Rows or columns of a slice come in multiples of this, so that OpenBLAS's own tiles stay whole. */
#define UNIT 16

typedef struct gemm_job {
    pc_dtype dt;
    bool trans_a, trans_b, by_columns;
    int64_t m, n, k, lda, ldb, ldc, slice;
    double alpha, beta;
    const void *a, *b;
    void *c;
} gemm_job;

static void gemm_slice(const gemm_job *j, int64_t row, int64_t rows, int64_t col, int64_t cols)
{
    int ta = j->trans_a ? PC_BLAS_TRANS : PC_BLAS_NO_TRANS, tb = j->trans_b ? PC_BLAS_TRANS : PC_BLAS_NO_TRANS;
    for (int64_t k0 = 0; k0 < j->k; k0 += LARGEST) {
        int64_t depth = pc_min(LARGEST, j->k - k0);
        double beta = k0 == 0 ? j->beta : 1.0;
        const void *a = pc_at(j->dt, j->a, j->trans_a ? k0 * j->lda + row : row * j->lda + k0);
        const void *b = pc_at(j->dt, j->b, j->trans_b ? col * j->ldb + k0 : k0 * j->ldb + col);
        void *c = pc_at_mut(j->dt, j->c, row * j->ldc + col);
        if (j->dt == PC_F64)
            PC_BLAS(cblas_dgemm)(PC_BLAS_ROW_MAJOR, ta, tb, (int32_t)rows, (int32_t)cols, (int32_t)depth, j->alpha, a,
                                 (int32_t)j->lda, b, (int32_t)j->ldb, beta, c, (int32_t)j->ldc);
        else
            PC_BLAS(cblas_sgemm)(PC_BLAS_ROW_MAJOR, ta, tb, (int32_t)rows, (int32_t)cols, (int32_t)depth,
                                 (float)j->alpha, a, (int32_t)j->lda, b, (int32_t)j->ldb, (float)beta, c,
                                 (int32_t)j->ldc);
    }
}

static void gemm_range(void *ctx, int64_t begin, int64_t end)
{
    const gemm_job *j = ctx;
    int64_t extent = j->by_columns ? j->n : j->m;
    int64_t from = begin * j->slice, to = pc_min(extent, end * j->slice);
    for (; from < to; from += LARGEST) {
        int64_t part = pc_min(LARGEST, to - from), other = j->by_columns ? j->m : j->n;
        for (int64_t at = 0; at < other; at += LARGEST) {
            int64_t across = pc_min(LARGEST, other - at);
            if (j->by_columns)
                gemm_slice(j, at, across, from, part);
            else
                gemm_slice(j, from, part, at, across);
        }
    }
}

/* c = beta · c, without reading it when beta is 0. */
static void scale_rows(pc_dtype dt, int64_t m, int64_t n, double beta, void *c, int64_t ldc)
{
    for (int64_t i = 0; i < m && beta != 1.0; i++) {
        void *row = pc_at_mut(dt, c, i * ldc);
        if (beta == 0.0)
            memset(row, 0, (size_t)n * pc_dtype_size(dt));
        else
            pc_rows(dt)->scale(n, row, beta, row);
    }
}

pc_status pc_gemm(pc_runtime *rt, pc_dtype dt, bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k,
                  double alpha, const void *a, int64_t lda, const void *b, int64_t ldb, double beta, void *c,
                  int64_t ldc, pc_error *err)
{
    if (m <= 0 || n <= 0)
        return PC_OK;
    if (k <= 0 || alpha == 0.0) {
        scale_rows(dt, m, n, beta, c, ldc);
        return PC_OK;
    }
    /* A single row may come with any stride; OpenBLAS checks it all the same. */
    lda = pc_max(lda, trans_a ? m : k);
    ldb = pc_max(ldb, trans_b ? k : n);
    ldc = pc_max(ldc, n);
    if (lda > INT32_MAX || ldb > INT32_MAX || ldc > INT32_MAX)
        return pc_fail(err, PC_ERR_VALUE,
                       "matrix product (%lld, %lld) x (%lld, %lld): rows longer than %ld elements are not supported",
                       (long long)m, (long long)k, (long long)k, (long long)n, (long)INT32_MAX);
    gemm_job j = {dt, trans_a, trans_b, n > m, m, n, k, lda, ldb, ldc, 0, alpha, beta, a, b, c};
    int64_t extent = j.by_columns ? n : m, threads = rt != NULL ? pc_runtime_threads(rt) : 1;
    if ((double)m * (double)n * (double)k < (double)SMALL)
        threads = 1;
    /* as many slices as threads: each one packs the other operand anew */
    j.slice = pc_max(UNIT, ((extent + threads - 1) / threads + UNIT - 1) / UNIT * UNIT);
    if (threads == 1)
        gemm_range(&j, 0, (extent + j.slice - 1) / j.slice);
    else
        pc_parallel_for(rt, (extent + j.slice - 1) / j.slice, 1, gemm_range, &j);
    return PC_OK;
}
