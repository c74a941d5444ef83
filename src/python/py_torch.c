/* Kernels on torch tensors, for the layers of the torch host.
 *
 * Every function here answers True when it has done the work and False, with nothing written, when the tensors are not
 * what the kernels take; the caller then uses torch's own operations.  The results are written into tensors that the
 * caller has made.  autograd does not see any of it, and torch's modes are not looked at: both are the caller's.
 */
#include "py_torch_kernels.h"

#include "py_torch_operand.h"

#include "../kernels/mersenne.h"

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
             "lowrank_forward(x, y, out, terms, hidden=None, /)\n--\n\n"
             "out = y + the sum over terms of scaling * (((x @ A.T) * E) @ B.T + bias), on CPU tensors.\n\n"
             "Args:\n"
             "    x: (..., in).\n"
             "    y: (..., out_features), with as many rows as x.\n"
             "    out: like y; y itself, or memory that overlaps with no other argument. Overwritten.\n"
             "    terms: a tuple of tuples (A, B, scaling, E, bias): A (r, in), B (out_features, r), a number,\n"
             "        E (r,) or (r, 1) or None, bias (out_features,) or None.\n"
             "    hidden: of one term, (r, rows of x) in float32, overwritten with (x @ A.T).T; or None.\n\n"
             "All other tensors are of one dtype, float32, float64, float16 or bfloat16. Sums are in float32, or float64 for\n"
             "float64, and rounded once.\n\n"
             "Returns True when it is done; False, with nothing written, when a tensor is not one that the kernel takes\n"
             "(device, dtype, strides, shape, a subclass, ...): compute the same with torch then. Raises MemoryError.");

PyObject *peftc_lowrank_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 5 && !count_is("lowrank_forward", nargs, 4))
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
    operand kept;
    float *hidden = NULL;
    if (nargs == 5 && (count != 1 || !operand_hidden(state, args[4], dtype, terms[0].r, x.rows.rows, &kept, &hidden) ||
                       (hidden != NULL && (operands_overlap(&kept, &x) || operands_overlap(&kept, &y) ||
                                           operands_overlap(&kept, &out)))))
        Py_RETURN_FALSE;
    pc_error err;
    return answer(state, operands_run(state, dtype, &x, &y, &out, terms, count, hidden, &err), &err);
}

/* ------------------------------------------------------------------ backward */

PyDoc_STRVAR(lowrank_backward_doc,
             "lowrank_backward(grad, x, A, B, E, scaling, hidden, base, dx, dA, dB, dE, /)\n--\n\n"
             "The derivatives of lowrank_forward for one term without bias.\n\n"
             "Args:\n"
             "    grad: (..., out_features), what comes in for its result.\n"
             "    x, A, B, E, scaling: as they were in the forward call; E may be None.\n"
             "    hidden: as the forward call left it; or None, then x @ A.T is computed again.\n"
             "    base: like x, what else the gradient of x consists of, or None.\n"
             "    dx: like x, overwritten with base + scaling * ((grad @ B) * E) @ A; or None. It may be `base` itself.\n"
             "    dA: (r, in), overwritten with scaling * ((grad @ B) * E).T @ x; or None.\n"
             "    dB: (out_features, r), overwritten with scaling * grad.T @ ((x @ A.T) * E); or None.\n"
             "    dE: (r,) or (r, 1), overwritten with scaling * the sum over rows of (grad @ B) * (x @ A.T); or None.\n\n"
             "dtypes and sums are as in lowrank_forward. Nothing that is written may overlap with anything else. The results do not depend on the number of threads.\n\n"
             "Returns True when it is done; False, with nothing written, when a tensor is not one that the kernel takes.\n"
             "Raises MemoryError.");

PyObject *peftc_lowrank_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    enum { GRAD, X, A, B, E, SCALING, HIDDEN, BASE, DX, DA, DB, DE, COUNT };
    if (!count_is("lowrank_backward", nargs, COUNT))
        return NULL;
    peftc_state *state = peftc_get_state(module);
    pc_dtype dtype = PC_DTYPE_NONE;
    operand all[COUNT];
    bool given[COUNT] = {false};
    void *e, *de;
    float *hidden;
    pc_lowrank_term term = {.r = 0};
    if (!operand_take(state, args[GRAD], &dtype, &all[GRAD]) || !operand_take(state, args[X], &dtype, &all[X]) ||
        !operand_matrix(state, args[A], &dtype, &all[A]) || !operand_matrix(state, args[B], &dtype, &all[B]) ||
        !operand_number(args[SCALING], &term.scale))
        Py_RETURN_FALSE;
    int64_t m = all[X].rows.rows, k = all[X].rows.cols, n = all[GRAD].rows.cols, r = all[A].rows.rows;
    if (all[GRAD].rows.rows != m || all[A].rows.cols != k || all[B].rows.rows != n || all[B].rows.cols != r ||
        !operand_vector(state, args[E], &dtype, r, true, &e, &all[E]) ||
        !operand_vector(state, args[DE], &dtype, r, true, &de, &all[DE]) ||
        !operand_hidden(state, args[HIDDEN], dtype, r, m, &all[HIDDEN], &hidden))
        Py_RETURN_FALSE;
    given[GRAD] = given[X] = given[A] = given[B] = true;
    given[E] = e != NULL;
    given[DE] = de != NULL;
    given[HIDDEN] = hidden != NULL;
    for (int i = BASE; i <= DX; i++) {
        given[i] = args[i] != Py_None;
        if (given[i] && (!operand_take(state, args[i], &dtype, &all[i]) || all[i].rows.rows != m ||
                         all[i].rows.cols != k || !operand_writable(&all[i])))
            Py_RETURN_FALSE;
    }
    for (int i = DA; i <= DB; i++) {
        const operand *like = &all[i == DA ? A : B];
        given[i] = args[i] != Py_None;
        if (given[i] && (!operand_matrix(state, args[i], &dtype, &all[i]) || all[i].rows.rows != like->rows.rows ||
                         all[i].rows.cols != like->rows.cols))
            Py_RETURN_FALSE;
    }
    for (int i = DX; i < COUNT; i++)
        for (int j = 0; j < i && given[i]; j++)
            if (given[j] && operands_overlap(&all[i], &all[j]) && !(j == BASE && i == DX && operand_same(&all[i], &all[j])))
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
    status = pc_lowrank_backward(rt, dtype, m, n, k, all[GRAD].rows.data, all[GRAD].rows.stride, all[X].rows.data,
                                 all[X].rows.stride, &term, hidden, given[BASE] ? all[BASE].rows.data : NULL,
                                 given[BASE] ? all[BASE].rows.stride : 0, given[DX] ? all[DX].rows.data : NULL,
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

/* ------------------------------------------------------------------- dropout */

/* What torch.Generator.get_state() has of the CPU's generator, in native byte order. */
typedef struct generator_state {
    uint64_t seed;
    int32_t left; /* words until the next twist, and one */
    int32_t seeded;
    uint64_t next; /* index of the word to give out next */
    uint64_t words[PC_MERSENNE_WORDS];
    char normal[40]; /* not touched */
} generator_state;

PyDoc_STRVAR(dropout_noise_doc,
             "dropout_noise(state, keep, value, out, /)\n--\n\n"
             "What out.bernoulli_(keep) gives with a generator of torch's CPU in that state, times value.\n\n"
             "Args:\n"
             "    state: a uint8 array, the generator's state. It is moved on as torch would.\n"
             "    keep: the probability of a number that is not 0.\n"
             "    value: that number.\n"
             "    out: a contiguous tensor on the CPU. Overwritten.\n\n"
             "Returns True when it is done; False, with nothing written, for a state or a tensor of another form.");

static PyObject *dropout_noise(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (!count_is("dropout_noise", nargs, 4))
        return NULL;
    peftc_state *state = peftc_get_state(module);
    peftc_tensor out;
    double keep, value;
    PyArrayObject *array = (PyArrayObject *)args[0];
    generator_state raw;
    if (!PyArray_Check(args[0]) || PyArray_TYPE(array) != NPY_UINT8 || !PyArray_ISCARRAY(array) ||
        PyArray_SIZE(array) != (npy_intp)sizeof raw || !operand_number(args[1], &keep) ||
        !operand_number(args[2], &value) || !(keep >= 0.0 && keep <= 1.0) || !peftc_read_tensor(state, args[3], &out) ||
        !peftc_tensor_packed(&out))
        Py_RETURN_FALSE;
    memcpy(&raw, PyArray_DATA(array), sizeof raw);
    /* Freshly seeded, it has a twist before it. */
    int used = raw.left == 1 ? PC_MERSENNE_WORDS : (int)raw.next;
    if (raw.left < 1 || raw.left > PC_MERSENNE_WORDS || raw.next > PC_MERSENNE_WORDS ||
        (raw.left > 1 && raw.left + (int)raw.next != PC_MERSENNE_WORDS + 1))
        Py_RETURN_FALSE;
    int64_t count = 1;
    for (int i = 0; i < out.ndim; i++)
        count *= out.shape[i];
    pc_mersenne m = {.used = used};
    for (int i = 0; i < PC_MERSENNE_WORDS; i++)
        m.words[i] = (uint32_t)raw.words[i];
    if (count == 0)
        Py_RETURN_TRUE;
    /* The GIL is kept: between reading the generator's state and putting it back, no other Python thread may draw. */
    pc_mersenne_keep(&m, out.dtype, count, keep, value, out.data);
    for (int i = 0; i < PC_MERSENNE_WORDS; i++)
        raw.words[i] = m.words[i];
    raw.next = (uint64_t)m.used;
    raw.left = PC_MERSENNE_WORDS + 1 - m.used;
    memcpy(PyArray_DATA(array), &raw, sizeof raw);
    Py_RETURN_TRUE;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"lowrank_forward", FASTCALL(peftc_lowrank_forward), METH_FASTCALL, lowrank_forward_doc},
    {"lowrank_backward", FASTCALL(peftc_lowrank_backward), METH_FASTCALL, lowrank_backward_doc},
    {"dropout_noise", FASTCALL(dropout_noise), METH_FASTCALL, dropout_noise_doc},
    {"add_lowrank_to_weight", FASTCALL(add_lowrank_to_weight), METH_FASTCALL, add_lowrank_to_weight_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
