/* Singular value and QR decomposition through LAPACK.
 *
 * LAPACK is column-major.  A row-major matrix could be handed over as its own transpose without a copy, but the
 * signs of the factors would then be those of the transpose's decomposition; callers (OLoRA, PiSSA) compare with
 * what others compute from the matrix itself, so it is transposed here, which costs little beside the factorisation.
 */
#include <stddef.h>
#include <string.h>

#include "../core/memory.h"
#include "kernels.h"
#include "openblas.h"

/* b (n,m) = aᵀ, a (m,n), both row-major, in tiles that stay in the first-level cache. */
static void transpose(pc_dtype dt, int64_t m, int64_t n, const void *a, void *b)
{
    enum { TILE = 32 };
    for (int64_t i0 = 0; i0 < m; i0 += TILE)
        for (int64_t j0 = 0; j0 < n; j0 += TILE) {
            int64_t i1 = m - i0 < TILE ? m : i0 + TILE;
            int64_t j1 = n - j0 < TILE ? n : j0 + TILE;
            if (dt == PC_F64) {
                for (int64_t i = i0; i < i1; i++)
                    for (int64_t j = j0; j < j1; j++)
                        ((double *)b)[j * m + i] = ((const double *)a)[i * n + j];
            } else {
                for (int64_t i = i0; i < i1; i++)
                    for (int64_t j = j0; j < j1; j++)
                        ((float *)b)[j * m + i] = ((const float *)a)[i * n + j];
            }
        }
}

static pc_status check_extents(const char *what, pc_dtype dt, int64_t m, int64_t n, pc_error *err)
{
    if (dt != PC_F32 && dt != PC_F64)
        return pc_fail(err, PC_ERR_TYPE, "%s works in F32 or F64, not %s", what, pc_dtype_get(dt)->name);
    if (m > INT32_MAX || n > INT32_MAX)
        return pc_fail(err, PC_ERR_VALUE, "%s of a (%lld, %lld) matrix: LAPACK takes extents up to %ld", what,
                       (long long)m, (long long)n, (long)INT32_MAX);
    return PC_OK;
}

/* Bytes of rows × cols elements, or 0 when that overflows. */
static size_t matrix_bytes(pc_dtype dt, int64_t rows, int64_t cols)
{
    size_t bytes;
    if (!pc_mul_size((size_t)rows, (size_t)cols, &bytes) || !pc_mul_size(bytes, pc_dtype_size(dt), &bytes))
        return 0;
    return bytes;
}

/* LAPACK answers a workspace query in the element type; round up what float could not hold exactly. */
static int32_t workspace(double asked)
{
    asked *= 1.0 + 1e-6;
    if (!(asked >= 1.0))
        return 1;
    return asked >= (double)INT32_MAX ? INT32_MAX : (int32_t)asked + 1;
}

static int32_t gesdd(pc_dtype dt, int32_t m, int32_t n, void *a, void *s, void *u, void *vt, int32_t q, void *work,
                     int32_t lwork, int32_t *iwork)
{
    int32_t info = 0;
    if (dt == PC_F64)
        PC_BLAS(dgesdd_)("S", &m, &n, a, &m, s, u, &m, vt, &q, work, &lwork, iwork, &info, 1);
    else
        PC_BLAS(sgesdd_)("S", &m, &n, a, &m, s, u, &m, vt, &q, work, &lwork, iwork, &info, 1);
    return info;
}

pc_status pc_svd(pc_dtype dt, int64_t m, int64_t n, void *a, void *u, void *s, void *vt, pc_error *err)
{
    pc_status status = check_extents("SVD", dt, m, n, err);
    if (status != PC_OK || m <= 0 || n <= 0)
        return status;
    int32_t rows = (int32_t)m, cols = (int32_t)n, q = rows < cols ? rows : cols;
    size_t size = pc_dtype_size(dt);
    size_t bytes_a = matrix_bytes(dt, m, n), bytes_u = matrix_bytes(dt, m, q), bytes_vt = matrix_bytes(dt, q, n);
    if (bytes_a == 0 || bytes_u == 0 || bytes_vt == 0)
        return pc_fail_nomem(err, "the matrix of an SVD");
    double query = 0.0;
    int32_t *iwork = pc_malloc((size_t)q * 8 * sizeof *iwork);
    /* column-major copies: a, then u; vt is q × n in either order and needs its own */
    char *copy = pc_malloc(bytes_a + bytes_u + bytes_vt);
    void *work = NULL;
    if (iwork == NULL || copy == NULL)
        goto no_memory;
    transpose(dt, m, n, a, copy);
    gesdd(dt, rows, cols, copy, s, copy + bytes_a, copy + bytes_a + bytes_u, q, &query, -1, iwork);
    int32_t lwork = workspace(pc_get_double(dt, &query, 0));
    work = pc_malloc((size_t)lwork * size);
    if (work == NULL)
        goto no_memory;
    int32_t info = gesdd(dt, rows, cols, copy, s, copy + bytes_a, copy + bytes_a + bytes_u, q, work, lwork, iwork);
    transpose(dt, q, m, copy + bytes_a, u);
    transpose(dt, n, q, copy + bytes_a + bytes_u, vt);
    pc_free(work);
    pc_free(copy);
    pc_free(iwork);
    if (info < 0)
        return pc_fail(err, PC_ERR_VALUE, "SVD of a (%lld, %lld) matrix that holds NaN or infinity", (long long)m,
                       (long long)n);
    if (info > 0)
        return pc_fail(err, PC_ERR_RUNTIME, "SVD of a (%lld, %lld) matrix did not converge", (long long)m,
                       (long long)n);
    return PC_OK;
no_memory:
    pc_free(copy);
    pc_free(iwork);
    return pc_fail_nomem(err, "the workspace of an SVD");
}

static void geqrf(pc_dtype dt, int32_t m, int32_t n, void *a, void *tau, void *work, int32_t lwork)
{
    int32_t info = 0; /* only reports illegal arguments */
    if (dt == PC_F64)
        PC_BLAS(dgeqrf_)(&m, &n, a, &m, tau, work, &lwork, &info);
    else
        PC_BLAS(sgeqrf_)(&m, &n, a, &m, tau, work, &lwork, &info);
}

static void orgqr(pc_dtype dt, int32_t m, int32_t n, int32_t k, void *a, const void *tau, void *work, int32_t lwork)
{
    int32_t info = 0;
    if (dt == PC_F64)
        PC_BLAS(dorgqr_)(&m, &n, &k, a, &m, tau, work, &lwork, &info);
    else
        PC_BLAS(sorgqr_)(&m, &n, &k, a, &m, tau, work, &lwork, &info);
}

pc_status pc_qr(pc_dtype dt, int64_t m, int64_t n, void *a, void *q, void *r, pc_error *err)
{
    pc_status status = check_extents("QR", dt, m, n, err);
    if (status != PC_OK || m <= 0 || n <= 0)
        return status;
    int32_t rows = (int32_t)m, cols = (int32_t)n, p = rows < cols ? rows : cols;
    size_t size = pc_dtype_size(dt), bytes_a = matrix_bytes(dt, m, n), bytes_tau = (size_t)p * size;
    if (bytes_a == 0)
        return pc_fail_nomem(err, "the matrix of a QR decomposition");
    double query = 0.0;
    char *copy = pc_malloc(bytes_a + bytes_tau);
    if (copy == NULL)
        return pc_fail_nomem(err, "the workspace of a QR decomposition");
    char *tau = copy + bytes_a;
    geqrf(dt, rows, cols, copy, tau, &query, -1);
    int32_t lwork = workspace(pc_get_double(dt, &query, 0));
    orgqr(dt, rows, p, p, copy, tau, &query, -1);
    int32_t lwork2 = workspace(pc_get_double(dt, &query, 0));
    if (lwork2 > lwork)
        lwork = lwork2;
    void *work = pc_malloc((size_t)lwork * size);
    if (work == NULL) {
        pc_free(copy);
        return pc_fail_nomem(err, "the workspace of a QR decomposition");
    }
    transpose(dt, m, n, a, copy);
    geqrf(dt, rows, cols, copy, tau, work, lwork);
    for (int64_t i = 0; i < p; i++) { /* the upper triangle, then what orgqr overwrites */
        memset((char *)r + (size_t)(i * n) * size, 0, (size_t)i * size);
        for (int64_t j = i; j < n; j++)
            memcpy((char *)r + (size_t)(i * n + j) * size, copy + (size_t)(j * m + i) * size, size);
    }
    orgqr(dt, rows, p, p, copy, tau, work, lwork);
    transpose(dt, p, m, copy, q);
    pc_free(work);
    pc_free(copy);
    return PC_OK;
}
