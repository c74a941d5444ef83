#include "py_torch_operand.h"

/* Multiply-adds below which a call takes less time than giving up the GIL is worth. */
#define WORTH_RELEASING 65536.0

bool operand_take(peftc_state *state, PyObject *obj, pc_dtype *dtype, operand *out)
{
    peftc_tensor tensor;
    if (!peftc_read_tensor(state, obj, &tensor) || !peftc_tensor_rows(&tensor, &out->rows))
        return false;
    if (*dtype == PC_DTYPE_NONE)
        *dtype = tensor.dtype;
    out->dtype = tensor.dtype;
    out->ndim = tensor.ndim;
    out->packed = out->rows.rows <= 1 || out->rows.stride == out->rows.cols;
    return tensor.dtype == *dtype;
}

bool operand_matrix(peftc_state *state, PyObject *obj, pc_dtype *dtype, operand *out)
{
    return operand_take(state, obj, dtype, out) && out->ndim == 2 && out->packed;
}

bool operand_vector(peftc_state *state, PyObject *obj, pc_dtype *dtype, int64_t n, bool column, void **out,
                        operand *whole)
{
    *out = NULL;
    if (obj == Py_None)
        return true;
    if (!operand_take(state, obj, dtype, whole) || !whole->packed)
        return false;
    *out = whole->rows.data;
    if (whole->ndim == 1)
        return whole->rows.cols == n;
    return column && whole->ndim == 2 && whole->rows.cols == 1 && whole->rows.rows == n;
}

/* Bytes from the first to the last element. */
static size_t span(const operand *x)
{
    if (x->rows.rows == 0 || x->rows.cols == 0)
        return 0;
    return (size_t)((x->rows.rows - 1) * x->rows.stride + x->rows.cols) * pc_dtype_size(x->dtype);
}

bool operands_overlap(const operand *a, const operand *b)
{
    uintptr_t p = (uintptr_t)a->rows.data, q = (uintptr_t)b->rows.data;
    return p < q + span(b) && q < p + span(a);
}

bool operand_writable(const operand *x) { return x->rows.rows <= 1 || x->rows.stride >= x->rows.cols; }

bool operand_same(const operand *a, const operand *b)
{
    return a->rows.data == b->rows.data && (a->rows.rows <= 1 || a->rows.stride == b->rows.stride);
}

bool operand_number(PyObject *obj, double *out)
{
    if (PyFloat_CheckExact(obj)) {
        *out = PyFloat_AS_DOUBLE(obj);
        return true;
    }
    if (!PyFloat_Check(obj) && !PyLong_Check(obj))
        return false;
    *out = PyFloat_AsDouble(obj);
    if (*out == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

bool operands_fit(const operand *x, const operand *y, const operand *out)
{
    return y->rows.rows == x->rows.rows && out->rows.rows == x->rows.rows && out->rows.cols == y->rows.cols &&
           operand_writable(out) && !operands_overlap(out, x) && (!operands_overlap(out, y) || operand_same(out, y));
}

bool operands_term(peftc_state *state, pc_dtype *dtype, const operand *x, const operand *out, PyObject *a, PyObject *b,
                   PyObject *e, PyObject *bias, pc_lowrank_term *term)
{
    operand down, up, other;
    void *factors, *added;
    if (!operand_matrix(state, a, dtype, &down) || !operand_matrix(state, b, dtype, &up) ||
        down.rows.cols != x->rows.cols || up.rows.rows != out->rows.cols || down.rows.rows != up.rows.cols ||
        operands_overlap(out, &down) || operands_overlap(out, &up))
        return false;
    term->r = down.rows.rows;
    if (!operand_vector(state, e, dtype, term->r, true, &factors, &other) ||
        (factors != NULL && operands_overlap(out, &other)) ||
        !operand_vector(state, bias, dtype, out->rows.cols, false, &added, &other) ||
        (added != NULL && operands_overlap(out, &other)))
        return false;
    term->a = down.rows.data;
    term->b = up.rows.data;
    term->e = factors;
    term->bias = added;
    return true;
}

bool operand_hidden(peftc_state *state, PyObject *obj, pc_dtype dtype, int64_t r, int64_t rows, operand *whole,
                    float **out)
{
    pc_dtype wanted = PC_F32;
    *out = NULL;
    if (obj == Py_None)
        return true;
    if (dtype == PC_F64 || !operand_matrix(state, obj, &wanted, whole) || whole->rows.rows != r ||
        whole->rows.cols != rows)
        return false;
    *out = (float *)(void *)whole->rows.data;
    return true;
}

pc_status operands_run(peftc_state *state, pc_dtype dtype, const operand *x, const operand *y, const operand *out,
                       const pc_lowrank_term *terms, int count, float *hidden, pc_error *err)
{
    const int64_t m = x->rows.rows, k = x->rows.cols, n = out->rows.cols;
    double work = (double)m * (double)n;
    for (int t = 0; t < count; t++)
        work += (double)m * (double)(n + k) * (double)terms[t].r;
    pc_runtime *rt = work >= WORTH_RELEASING ? peftc_torch_runtime(state) : NULL;
    PyThreadState *saved = work >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
    pc_status status = pc_lowrank_forward(rt, dtype, m, n, k, x->rows.data, x->rows.stride, y->rows.data,
                                          y->rows.stride, out->rows.data, out->rows.stride, terms, count, hidden, err);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    return status;
}
