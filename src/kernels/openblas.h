/* The few BLAS and LAPACK functions that peftc uses, under the names that scipy-openblas32 gives them.
 * Integers are 32 bits in this build of OpenBLAS. */
#ifndef PEFTC_KERNELS_OPENBLAS_H
#define PEFTC_KERNELS_OPENBLAS_H

#include <stddef.h>
#include <stdint.h>

#ifndef PC_BLAS
#define PC_BLAS(name) scipy_##name
#endif

enum { PC_BLAS_ROW_MAJOR = 101, PC_BLAS_NO_TRANS = 111, PC_BLAS_TRANS = 112 };

void PC_BLAS(cblas_sgemm)(int order, int trans_a, int trans_b, int32_t m, int32_t n, int32_t k, float alpha,
                          const float *a, int32_t lda, const float *b, int32_t ldb, float beta, float *c, int32_t ldc);
void PC_BLAS(cblas_dgemm)(int order, int trans_a, int trans_b, int32_t m, int32_t n, int32_t k, double alpha,
                          const double *a, int32_t lda, const double *b, int32_t ldb, double beta, double *c,
                          int32_t ldc);
void PC_BLAS(openblas_set_num_threads)(int n);
char *PC_BLAS(openblas_get_config)(void);

/* LAPACK, column-major; the last argument is the hidden length of the Fortran character. */
void PC_BLAS(sgesdd_)(const char *jobz, const int32_t *m, const int32_t *n, float *a, const int32_t *lda, float *s,
                      float *u, const int32_t *ldu, float *vt, const int32_t *ldvt, float *work, const int32_t *lwork,
                      int32_t *iwork, int32_t *info, size_t jobz_len);
void PC_BLAS(dgesdd_)(const char *jobz, const int32_t *m, const int32_t *n, double *a, const int32_t *lda, double *s,
                      double *u, const int32_t *ldu, double *vt, const int32_t *ldvt, double *work,
                      const int32_t *lwork, int32_t *iwork, int32_t *info, size_t jobz_len);
void PC_BLAS(sgeqrf_)(const int32_t *m, const int32_t *n, float *a, const int32_t *lda, float *tau, float *work,
                      const int32_t *lwork, int32_t *info);
void PC_BLAS(dgeqrf_)(const int32_t *m, const int32_t *n, double *a, const int32_t *lda, double *tau, double *work,
                      const int32_t *lwork, int32_t *info);
void PC_BLAS(sorgqr_)(const int32_t *m, const int32_t *n, const int32_t *k, float *a, const int32_t *lda,
                      const float *tau, float *work, const int32_t *lwork, int32_t *info);
void PC_BLAS(dorgqr_)(const int32_t *m, const int32_t *n, const int32_t *k, double *a, const int32_t *lda,
                      const double *tau, double *work, const int32_t *lwork, int32_t *info);

#endif
