/* AdaLora's importance, budget and orthogonality (methods/adalora_budget.c) on NumPy arrays. */
#include "binding.h"

#include "../core/memory.h"
#include "../methods/adalora_budget.h"
#include "arrays.h"

/* Elements below which a call takes less time than giving up the GIL is worth. */
#define WORTH_RELEASING 4096

/* A float32 or float64 array without gaps. *dtype is that of all others of the call; the first one sets it. */
static int take(PyObject *obj, const char *what, bool written, pc_dtype *dtype, PyArrayObject **out)
{
    PyArrayObject *array = (PyArrayObject *)obj;
    const int flags = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED | (written ? NPY_ARRAY_WRITEABLE : 0);
    if (!PyArray_Check(obj) || !PyArray_CHKFLAGS(array, flags)) {
        PyErr_Format(PyExc_TypeError, "%s must be %san aligned, C-contiguous array, not %S", what,
                     written ? "writable and " : "", (PyObject *)Py_TYPE(obj));
        return -1;
    }
    const pc_dtype have = peftc_dtype_of(PyArray_DESCR(array));
    if ((have != PC_F32 && have != PC_F64) || (*dtype != PC_DTYPE_NONE && have != *dtype)) {
        PyErr_Format(PyExc_TypeError, "%s is an array of %S; float32 or float64 is needed, the same for all", what,
                     (PyObject *)PyArray_DESCR(array));
        return -1;
    }
    *dtype = have;
    *out = array;
    return 0;
}

static int same_size(PyArrayObject *array, const char *what, npy_intp size)
{
    if (PyArray_SIZE(array) == size)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s has %zd elements where %zd are needed", what, (Py_ssize_t)PyArray_SIZE(array),
                 (Py_ssize_t)size);
    return -1;
}

PyDoc_STRVAR(update_doc,
             "adalora_update(tensors, beta1, beta2, /)\n--\n\n"
             "Let the averages of sensitivity and uncertainty take in the gradients of a step.\n\n"
             "Args:\n"
             "    tensors: a list of tuples (parameter, grad or None, sensitivity, uncertainty), each four of one shape and\n"
             "        dtype, float32 or float64; the last two are written. None is a gradient of zeros.\n"
             "    beta1, beta2: how slowly the averages of sensitivity and of uncertainty move.\n\n"
             "Returns None, or the index of the first tensor whose product with its gradient is not finite; then nothing\n"
             "is written. Raises TypeError and ValueError for arrays of other kinds.");

typedef struct entry {
    PyArrayObject *parameter, *grad, *sensitivity, *uncertainty;
    pc_dtype dtype;
} entry;

static int take_entry(PyObject *item, entry *out)
{
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 4) {
        PyErr_SetString(PyExc_TypeError, "tensors must be tuples (parameter, grad, sensitivity, uncertainty)");
        return -1;
    }
    PyObject *grad = PyTuple_GET_ITEM(item, 1);
    *out = (entry){.dtype = PC_DTYPE_NONE};
    if (take(PyTuple_GET_ITEM(item, 0), "a parameter", false, &out->dtype, &out->parameter) < 0 ||
        (grad != Py_None && take(grad, "a gradient", false, &out->dtype, &out->grad) < 0) ||
        take(PyTuple_GET_ITEM(item, 2), "an average", true, &out->dtype, &out->sensitivity) < 0 ||
        take(PyTuple_GET_ITEM(item, 3), "an average", true, &out->dtype, &out->uncertainty) < 0)
        return -1;
    const npy_intp n = PyArray_SIZE(out->parameter);
    if ((out->grad != NULL && same_size(out->grad, "a gradient", n) < 0) ||
        same_size(out->sensitivity, "an average", n) < 0 || same_size(out->uncertainty, "an average", n) < 0)
        return -1;
    return 0;
}

static PyObject *adalora_update(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *tensors;
    double beta1, beta2;
    if (!PyArg_ParseTuple(args, "O!dd:adalora_update", &PyList_Type, &tensors, &beta1, &beta2))
        return NULL;
    const Py_ssize_t count = PyList_GET_SIZE(tensors);
    entry *entries = pc_malloc((size_t)count * sizeof *entries);
    if (entries == NULL)
        return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        if (take_entry(PyList_GET_ITEM(tensors, i), &entries[i]) < 0) {
            pc_free(entries);
            return NULL;
        }
    }
    /* The caller's list holds the arrays; a tuple of ours does while the GIL is given up. */
    PyObject *held = PyList_AsTuple(tensors);
    if (held == NULL) {
        pc_free(entries);
        return NULL;
    }
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count && bad < 0; i++) {
        const entry *t = &entries[i];
        if (!pc_importance_is_finite(state->rt, t->dtype, PyArray_SIZE(t->parameter), PyArray_DATA(t->parameter),
                                     t->grad != NULL ? PyArray_DATA(t->grad) : NULL))
            bad = i;
    }
    for (Py_ssize_t i = 0; i < count && bad < 0; i++) {
        const entry *t = &entries[i];
        pc_importance_update(state->rt, t->dtype, PyArray_SIZE(t->parameter), PyArray_DATA(t->parameter),
                             t->grad != NULL ? PyArray_DATA(t->grad) : NULL, beta1, beta2,
                             PyArray_DATA(t->sensitivity), PyArray_DATA(t->uncertainty));
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(held);
    pc_free(entries);
    if (bad >= 0)
        return PyLong_FromSsize_t(bad);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(scores_doc,
             "adalora_scores(a, b, e, /)\n--\n\n"
             "The score of each triplet of one module.\n\n"
             "Args:\n"
             "    a, b, e: tuples (sensitivity, uncertainty) of lora_A (r, in), lora_B (out, r) and lora_E (r, 1), float32\n"
             "        or float64.\n\n"
             "Returns a float64 array (r,): the score of E plus the means over the row of A and the column of B, where the\n"
             "score of an element is sensitivity * uncertainty.");

static int take_pair(PyObject *pair, pc_dtype *dtype, PyArrayObject **shape, pc_importance *out)
{
    PyArrayObject *sensitivity, *uncertainty;
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        PyErr_SetString(PyExc_TypeError, "averages must be tuples (sensitivity, uncertainty)");
        return -1;
    }
    if (take(PyTuple_GET_ITEM(pair, 0), "an average", false, dtype, &sensitivity) < 0 ||
        take(PyTuple_GET_ITEM(pair, 1), "an average", false, dtype, &uncertainty) < 0 ||
        same_size(uncertainty, "an average", PyArray_SIZE(sensitivity)) < 0)
        return -1;
    if (PyArray_NDIM(sensitivity) != 2) {
        PyErr_SetString(PyExc_ValueError, "averages must have two dimensions");
        return -1;
    }
    *shape = sensitivity;
    *out = (pc_importance){PyArray_DATA(sensitivity), PyArray_DATA(uncertainty)};
    return 0;
}

static PyObject *adalora_scores(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *pairs[3];
    PyArrayObject *shapes[3];
    pc_importance of[3];
    pc_dtype dtype = PC_DTYPE_NONE;
    if (!PyArg_ParseTuple(args, "OOO:adalora_scores", &pairs[0], &pairs[1], &pairs[2]))
        return NULL;
    for (int i = 0; i < 3; i++)
        if (take_pair(pairs[i], &dtype, &shapes[i], &of[i]) < 0)
            return NULL;
    npy_intp r = PyArray_DIM(shapes[0], 0);
    if (PyArray_DIM(shapes[1], 1) != r || PyArray_SIZE(shapes[2]) != r) {
        PyErr_Format(PyExc_ValueError, "lora_A has %zd triplets, lora_B %zd and lora_E %zd", (Py_ssize_t)r,
                     (Py_ssize_t)PyArray_DIM(shapes[1], 1), (Py_ssize_t)PyArray_SIZE(shapes[2]));
        return NULL;
    }
    PyObject *scores = PyArray_SimpleNew(1, &r, NPY_FLOAT64);
    if (scores != NULL)
        pc_triplet_scores(dtype, r, PyArray_DIM(shapes[0], 1), PyArray_DIM(shapes[1], 0), of[0], of[1], of[2],
                          PyArray_DATA((PyArrayObject *)scores));
    return scores;
}

PyDoc_STRVAR(threshold_doc,
             "adalora_threshold(scores, keep, /)\n--\n\n"
             "The score (a float) that a triplet must exceed to stay when `keep` of them may. scores: float64 (n,).\n\n"
             "Not a number counts as the largest. Ties with the best that goes go too.");

static PyObject *adalora_threshold(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *obj;
    long long keep;
    PyArrayObject *scores;
    pc_dtype dtype = PC_F64;
    if (!PyArg_ParseTuple(args, "OL:adalora_threshold", &obj, &keep) ||
        take(obj, "scores", false, &dtype, &scores) < 0)
        return NULL;
    double threshold;
    pc_error err;
    if (pc_rank_threshold(PyArray_SIZE(scores), PyArray_DATA(scores), keep, &threshold, &err) != PC_OK)
        return peftc_raise(state, &err);
    return PyFloat_FromDouble(threshold);
}

PyDoc_STRVAR(budget_doc,
             "adalora_budget(step, tinit, tfinal, total_step, deltaT, initial, target, /)\n--\n\n"
             "How many triplets may stay at a step, out of `initial` at the start and `target` at the end; and whether it\n"
             "is a step at which the others go. Returns (int, bool).");

static PyObject *adalora_budget(PyObject *module, PyObject *args)
{
    (void)module;
    long long step, tinit, tfinal, total, interval, initial, target;
    if (!PyArg_ParseTuple(args, "LLLLLLL:adalora_budget", &step, &tinit, &tfinal, &total, &interval, &initial, &target))
        return NULL;
    const pc_rank_schedule schedule = {tinit, tfinal, total, interval, initial, target};
    bool allocate;
    long long budget = pc_rank_budget(&schedule, step, &allocate);
    return Py_BuildValue("(LO)", budget, allocate ? Py_True : Py_False);
}

PyDoc_STRVAR(orthogonality_doc,
             "orthogonality(matrix, columns, scale=0.0, grad=None, /)\n--\n\n"
             "The Frobenius norm of G - I, where G is the Gram matrix of the rows (or columns) of a matrix.\n\n"
             "Args:\n"
             "    matrix: (r, n), or with columns=True (n, r); float32 or float64.\n"
             "    grad: like matrix; `scale` times the derivative is added to it.\n\n"
             "Raises MemoryError; TypeError or ValueError for arrays of other kinds.");

static PyObject *orthogonality(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *obj, *into = Py_None;
    PyArrayObject *matrix, *grad = NULL;
    pc_dtype dtype = PC_DTYPE_NONE;
    int columns;
    double scale = 0, norm = 0;
    if (!PyArg_ParseTuple(args, "Op|dO:orthogonality", &obj, &columns, &scale, &into) ||
        take(obj, "a matrix", false, &dtype, &matrix) < 0 ||
        (into != Py_None && take(into, "a gradient", true, &dtype, &grad) < 0) ||
        (grad != NULL && same_size(grad, "a gradient", PyArray_SIZE(matrix)) < 0))
        return NULL;
    if (PyArray_NDIM(matrix) != 2) {
        PyErr_SetString(PyExc_ValueError, "a matrix must have two dimensions");
        return NULL;
    }
    const npy_intp r = PyArray_DIM(matrix, columns ? 1 : 0), n = PyArray_DIM(matrix, columns ? 0 : 1);
    pc_error err;
    PyThreadState *saved = PyArray_SIZE(matrix) >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
    pc_status status = pc_orthogonality(state->rt, dtype, r, n, columns != 0, PyArray_DATA(matrix), scale,
                                        grad != NULL ? PyArray_DATA(grad) : NULL, &norm, &err);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    return status == PC_OK ? PyFloat_FromDouble(norm) : peftc_raise(state, &err);
}

static PyMethodDef functions[] = {
    {"adalora_update", adalora_update, METH_VARARGS, update_doc},
    {"adalora_scores", adalora_scores, METH_VARARGS, scores_doc},
    {"adalora_threshold", adalora_threshold, METH_VARARGS, threshold_doc},
    {"adalora_budget", adalora_budget, METH_VARARGS, budget_doc},
    {"orthogonality", orthogonality, METH_VARARGS, orthogonality_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_adalora(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
