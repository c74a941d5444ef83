/* Kernels on torch tensors, for the layers of the torch host.
 *
 * Every function here answers True when it has done the work and False, with nothing written, when the tensors are not
 * what the kernels take; the caller then uses torch's own operations.  The results are written into tensors that the
 * caller has made.  autograd does not see any of it, and torch's modes are not looked at: both are the caller's.
 */
#include "py_torch_operand.h"

/* Multiply-adds below which a call takes less time than giving up the GIL is worth. */
#define WORTH_RELEASING 65536.0

static bool count_is(const char *name, Py_ssize_t have, Py_ssize_t want)
{
    if (have != want)
        PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments, got %zd", name, want, have);
    return have == want;
}

/* True, False for what a kernel does not take, or an exception. */
static PyObject *answer(peftc_state *state, pc_status status, const pc_error *err)
{
    if (status == PC_OK)
        Py_RETURN_TRUE;
    if (status == PC_ERR_UNSUPPORTED || status == PC_ERR_VALUE)
        Py_RETURN_FALSE;
    return peftc_raise(state, err);
}

/* ------------------------------------------------------------------- forward */

PyDoc_STRVAR(lowrank_forward_doc,
             "lowrank_forward(x, y, out, terms, /)\n--\n\n"
             "out = y + the sum over terms of scaling * (((x @ A.T) * E) @ B.T + bias), on CPU tensors.\n\n"
             "Args:\n"
             "    x: (..., in).\n"
             "    y: (..., out_features), with as many rows as x.\n"
             "    out: like y; y itself, or memory that overlaps with no other argument. Overwritten.\n"
             "    terms: a tuple of tuples (A, B, scaling, E, bias): A (r, in), B (out_features, r), a number,\n"
             "        E (r,) or (r, 1) or None, bias (out_features,) or None.\n\n"
             "All tensors are of one dtype, float32, float64, float16 or bfloat16. Sums are in float32, or float64 for\n"
             "float64, and rounded once.\n\n"
             "Returns True when it is done; False, with nothing written, when a tensor is not one that the kernel takes\n"
             "(device, dtype, strides, shape, a subclass, ...): compute the same with torch then. Raises MemoryError.");

static PyObject *lowrank_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (!count_is("lowrank_forward", nargs, 4))
        return NULL;
    peftc_state *state = peftc_get_state(module);
    pc_dtype dtype = PC_DTYPE_NONE;
    operand x, y, out;
    pc_lowrank_term terms[MOST_TERMS];
    PyObject *tuple = args[3];
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > MOST_TERMS || !operand_take(state, args[0], &dtype, &x) ||
        !operand_take(state, args[1], &dtype, &y))
        Py_RETURN_FALSE;
    if (args[2] == args[1])
        out = y;
    else if (!operand_take(state, args[2], &dtype, &out))
        Py_RETURN_FALSE;
    if (!operands_fit(&x, &y, &out))
        Py_RETURN_FALSE;
    int count = (int)PyTuple_GET_SIZE(tuple);
    for (int t = 0; t < count; t++) {
        PyObject *item = PyTuple_GET_ITEM(tuple, t);
        if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 5 ||
            !operands_term(state, &dtype, &x, &out, PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1),
                             PyTuple_GET_ITEM(item, 3), PyTuple_GET_ITEM(item, 4), &terms[t]) ||
            !operand_number(PyTuple_GET_ITEM(item, 2), &terms[t].scale))
            Py_RETURN_FALSE;
    }
    pc_error err;
    return answer(state, operands_run(state, dtype, &x, &y, &out, terms, count, &err), &err);
}

/* ------------------------------------------------------------------ backward */

PyDoc_STRVAR(lowrank_backward_doc,
             "lowrank_backward(grad, x, A, B, E, scaling, dx, dA, dB, dE, /)\n--\n\n"
             "The derivatives of lowrank_forward for one term without bias.\n\n"
             "Args:\n"
             "    grad: (..., out_features), what comes in for its result.\n"
             "    x, A, B, E, scaling: as they were in the forward call; E may be None.\n"
             "    dx: like x, overwritten with scaling * ((grad @ B) * E) @ A; or None.\n"
             "    dA: (r, in), overwritten with scaling * ((grad @ B) * E).T @ x; or None.\n"
             "    dB: (out_features, r), overwritten with scaling * grad.T @ ((x @ A.T) * E); or None.\n"
             "    dE: (r,) or (r, 1), overwritten with scaling * the sum over rows of (grad @ B) * (x @ A.T); or None.\n\n"
             "dtypes and sums are as in lowrank_forward; x @ A.T is computed again. Nothing that is written may overlap\n"
             "with anything else. The results do not depend on the number of threads.\n\n"
             "Returns True when it is done; False, with nothing written, when a tensor is not one that the kernel takes.\n"
             "Raises MemoryError.");

static PyObject *lowrank_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (!count_is("lowrank_backward", nargs, 10))
        return NULL;
    enum { GRAD, X, A, B, E, DX, DA, DB, DE, COUNT };
    peftc_state *state = peftc_get_state(module);
    pc_dtype dtype = PC_DTYPE_NONE;
    operand all[COUNT];
    bool given[COUNT] = {false};
    void *e, *de;
    pc_lowrank_term term = {.r = 0};
    if (!operand_take(state, args[0], &dtype, &all[GRAD]) || !operand_take(state, args[1], &dtype, &all[X]) ||
        !operand_matrix(state, args[2], &dtype, &all[A]) || !operand_matrix(state, args[3], &dtype, &all[B]) ||
        !operand_number(args[5], &term.scale))
        Py_RETURN_FALSE;
    int64_t m = all[X].rows.rows, k = all[X].rows.cols, n = all[GRAD].rows.cols, r = all[A].rows.rows;
    if (all[GRAD].rows.rows != m || all[A].rows.cols != k || all[B].rows.rows != n || all[B].rows.cols != r ||
        !operand_vector(state, args[4], &dtype, r, true, &e, &all[E]) ||
        !operand_vector(state, args[9], &dtype, r, true, &de, &all[DE]))
        Py_RETURN_FALSE;
    given[GRAD] = given[X] = given[A] = given[B] = true;
    given[E] = e != NULL;
    given[DE] = de != NULL;
    if (args[6] != Py_None) {
        given[DX] = true;
        if (!operand_take(state, args[6], &dtype, &all[DX]) || all[DX].rows.rows != m || all[DX].rows.cols != k ||
            !operand_writable(&all[DX]))
            Py_RETURN_FALSE;
    }
    if (args[7] != Py_None) {
        given[DA] = true;
        if (!operand_matrix(state, args[7], &dtype, &all[DA]) || all[DA].rows.rows != r || all[DA].rows.cols != k)
            Py_RETURN_FALSE;
    }
    if (args[8] != Py_None) {
        given[DB] = true;
        if (!operand_matrix(state, args[8], &dtype, &all[DB]) || all[DB].rows.rows != n || all[DB].rows.cols != r)
            Py_RETURN_FALSE;
    }
    for (int i = DX; i < COUNT; i++)
        for (int j = 0; j < i && given[i]; j++)
            if (given[j] && operands_overlap(&all[i], &all[j]))
                Py_RETURN_FALSE;
    term.r = r;
    term.a = all[A].rows.data;
    term.b = all[B].rows.data;
    term.e = e;
    pc_error err;
    pc_status status;
    const bool large = (double)m * (double)(n + k) * (double)r >= WORTH_RELEASING;
    pc_runtime *rt = large ? peftc_torch_runtime(state) : NULL;
    PyThreadState *saved = large ? PyEval_SaveThread() : NULL;
    status = pc_lowrank_backward(rt, dtype, m, n, k, all[GRAD].rows.data, all[GRAD].rows.stride,
                                 all[X].rows.data, all[X].rows.stride, &term, given[DX] ? all[DX].rows.data : NULL,
                                 given[DX] ? all[DX].rows.stride : 0, given[DA] ? all[DA].rows.data : NULL,
                                 given[DB] ? all[DB].rows.data : NULL, de, &err);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    return answer(state, status, &err);
}

/* ------------------------------------------------------------------- merging */

PyDoc_STRVAR(add_lowrank_to_weight_doc,
             "add_lowrank_to_weight(W, A, B, scaling, E, transpose, out, /)\n--\n\n"
             "out = W + scaling * (B * E) @ A, or its transpose: an adapter folded into a weight, in one pass.\n\n"
             "Args:\n"
             "    W: (out_features, in), or (in, out_features) if transpose is true, as Conv1D stores it.\n"
             "    A: (r, in).\n"
             "    B: (out_features, r).\n"
             "    E: (r,) or (r, 1), or None.\n"
             "    out: like W; W itself, or memory that overlaps with no other argument. Overwritten.\n\n"
             "dtypes and sums are as in lowrank_forward.\n\n"
             "Returns True when it is done; False, with nothing written, when a tensor is not one that the kernel takes.\n"
             "Raises MemoryError.");

static PyObject *add_lowrank_to_weight(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (!count_is("add_lowrank_to_weight", nargs, 7))
        return NULL;
    peftc_state *state = peftc_get_state(module);
    pc_dtype dtype = PC_DTYPE_NONE;
    operand w, a, b, e, out;
    pc_lowrank_term term = {.r = 0};
    void *factors;
    int transpose = PyObject_IsTrue(args[5]);
    if (transpose < 0)
        return NULL;
    if (!operand_take(state, args[0], &dtype, &w) || w.ndim != 2 || !operand_matrix(state, args[1], &dtype, &a) ||
        !operand_matrix(state, args[2], &dtype, &b) || !operand_number(args[3], &term.scale))
        Py_RETURN_FALSE;
    if (args[6] == args[0])
        out = w;
    else if (!operand_take(state, args[6], &dtype, &out) || out.ndim != 2)
        Py_RETURN_FALSE;
    int64_t n = b.rows.rows, k = a.rows.cols;
    term.r = a.rows.rows;
    if (b.rows.cols != term.r || w.rows.rows != (transpose ? k : n) || w.rows.cols != (transpose ? n : k) ||
        out.rows.rows != w.rows.rows || out.rows.cols != w.rows.cols || !operand_writable(&out) || operands_overlap(&out, &a) ||
        operands_overlap(&out, &b) || (operands_overlap(&out, &w) && !operand_same(&out, &w)) ||
        !operand_vector(state, args[4], &dtype, term.r, true, &factors, &e) || (factors != NULL && operands_overlap(&out, &e)))
        Py_RETURN_FALSE;
    term.a = a.rows.data;
    term.b = b.rows.data;
    term.e = factors;
    pc_error err;
    pc_status status;
    pc_runtime *rt = peftc_torch_runtime(state);
    Py_BEGIN_ALLOW_THREADS
    status = pc_lowrank_to_weight(rt, dtype, n, k, w.rows.data, w.rows.stride, out.rows.data, out.rows.stride,
                                  &term, transpose != 0, &err);
    Py_END_ALLOW_THREADS
    return answer(state, status, &err);
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"lowrank_forward", FASTCALL(lowrank_forward), METH_FASTCALL, lowrank_forward_doc},
    {"lowrank_backward", FASTCALL(lowrank_backward), METH_FASTCALL, lowrank_backward_doc},
    {"add_lowrank_to_weight", FASTCALL(add_lowrank_to_weight), METH_FASTCALL, add_lowrank_to_weight_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
