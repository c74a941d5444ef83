/* torch tensors as operands of the low-rank kernels. */
#ifndef PEFTC_PYTHON_PY_TORCH_OPERAND_H
#define PEFTC_PYTHON_PY_TORCH_OPERAND_H

#include "dlpack.h"

#include "../kernels/lowrank.h"

/* More adapters at once than this are left to torch. */
#define MOST_TERMS 32

typedef struct operand {
    peftc_rows rows;
    pc_dtype dtype;
    int ndim;
    bool packed;
} operand;

/* All of these are false, without an exception, for what the kernels do not take. */

/* One tensor, and that its dtype is *dtype; the first one sets it. */
bool operand_take(peftc_state *state, PyObject *obj, pc_dtype *dtype, operand *out);
bool operand_matrix(peftc_state *state, PyObject *obj, pc_dtype *dtype, operand *out);
/* A vector of n elements, or None: *out is NULL. (n, 1) is a vector, too, where it may be a column. */
bool operand_vector(peftc_state *state, PyObject *obj, pc_dtype *dtype, int64_t n, bool column, void **out,
                    operand *whole);
bool operand_number(PyObject *obj, double *out);

bool operands_overlap(const operand *a, const operand *b);
bool operand_same(const operand *a, const operand *b); /* the very same memory */
/* Rows of an output must not share memory with each other. */
bool operand_writable(const operand *x);

/* Can out = y + … of rows x be computed: as many rows, and out apart from x, and y itself or apart from it? */
bool operands_fit(const operand *x, const operand *y, const operand *out);
/* One term of the sum, but for its scale: A (r, in), B (out, r), E (r) or None, bias (out) or None, apart from `out`. */
bool operands_term(peftc_state *state, pc_dtype *dtype, const operand *x, const operand *out, PyObject *a, PyObject *b,
                   PyObject *e, PyObject *bias, pc_lowrank_term *term);
/* What the forward pass leaves for the backward pass: (r, rows of x) in float32, next to each other; None, or a dtype
 * whose kernels take none (float64): *out is NULL. */
bool operand_hidden(peftc_state *state, PyObject *obj, pc_dtype dtype, int64_t r, int64_t rows, operand *whole,
                    float **out);
/* out = y + the sum of the terms, and what `hidden` (may be NULL) is of them; gives up the GIL where that is worth it. */
pc_status operands_run(peftc_state *state, pc_dtype dtype, const operand *x, const operand *y, const operand *out,
                       const pc_lowrank_term *terms, int count, float *hidden, pc_error *err);

#endif
