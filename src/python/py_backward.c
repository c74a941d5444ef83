/* Backward passes: the gradient of a result on its way through the nodes, and operations that are defined in Python. */
#include "tape.h"

#include <stdlib.h>

#include "../kernels/gradients.h"
#include "arrays.h"

static peftc_node *cast(PyObject *op) { return (peftc_node *)op; }

/* -------------------------------------------------------------------- gradients */

static PyArrayObject *like_node(const peftc_node *node)
{
    npy_intp dims[NPY_MAXDIMS];
    const Py_ssize_t ndim = PyTuple_GET_SIZE(node->shape);
    for (Py_ssize_t d = 0; d < ndim; d++)
        dims[d] = (npy_intp)PyLong_AsSsize_t(PyTuple_GET_ITEM(node->shape, d));
    return (PyArrayObject *)PyArray_SimpleNew((int)ndim, dims, peftc_compute_type(node->compute));
}

/* One reference is the caller's; a view shares its memory. */
static bool is_ours(PyArrayObject *dy)
{
    return Py_REFCNT(dy) == 1 && PyArray_BASE(dy) == NULL && PyArray_ISWRITEABLE(dy);
}

PyArrayObject *peftc_own_gradient(PyArrayObject *dy)
{
    return (PyArrayObject *)(is_ours(dy) ? Py_NewRef(dy) : PyArray_NewCopy(dy, NPY_CORDER));
}

PyArrayObject *peftc_gradient_place(PyArrayObject *dy)
{
    return (PyArrayObject *)(is_ours(dy) ? Py_NewRef(dy)
                                         : PyArray_SimpleNew(PyArray_NDIM(dy), PyArray_DIMS(dy), PyArray_TYPE(dy)));
}

int peftc_node_sum(peftc_node *parent, pc_sum *sum)
{
    *sum = (pc_sum){NULL, false};
    if (parent == NULL)
        return 0;
    PyArrayObject *mine;
    if (parent->grad == NULL) {
        mine = like_node(parent);
    } else {
        mine = peftc_own_gradient(parent->grad);
        sum->filled = true;
    }
    if (mine == NULL)
        return -1;
    Py_XSETREF(parent->grad, mine);
    sum->data = PyArray_DATA(mine);
    return 0;
}

int peftc_node_give(peftc_node *parent, PyArrayObject *gradient)
{
    if (gradient == NULL)
        return -1;
    int status = 0;
    if (parent == NULL) {
        Py_DECREF(gradient);
        return 0;
    }
    if (parent->grad == NULL) {
        parent->grad = gradient;
        return 0;
    }
    pc_sum sum;
    status = peftc_node_sum(parent, &sum);
    if (status == 0) {
        peftc_state *state = peftc_state_of_type(Py_TYPE(parent));
        const void *values = PyArray_DATA(gradient);
        const int64_t n = PyArray_SIZE(gradient);
        Py_BEGIN_ALLOW_THREADS
        pc_add(state->rt, parent->compute, n, values, 1.0, sum.data);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(gradient);
    return status;
}

/* Every node that the gradient of `root` reaches, latest first. */
typedef struct reached {
    peftc_node **nodes; /* new references */
    size_t count, capacity;
} reached;

static int reach(reached *r, peftc_node *node, uint64_t pass)
{
    if (node == NULL || node->visited == pass)
        return 0;
    node->visited = pass;
    if (r->count == r->capacity) {
        size_t capacity = r->capacity != 0 ? 2 * r->capacity : 64;
        peftc_node **nodes = PyMem_Realloc(r->nodes, capacity * sizeof *nodes);
        if (nodes == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        r->nodes = nodes;
        r->capacity = capacity;
    }
    r->nodes[r->count++] = cast(Py_NewRef((PyObject *)node));
    return 0;
}

static int later_first(const void *a, const void *b)
{
    const peftc_node *x = *(peftc_node *const *)a, *y = *(peftc_node *const *)b;
    return x->sequence < y->sequence ? 1 : x->sequence > y->sequence ? -1 : 0;
}

static int refuse_used(const peftc_node *node)
{
    if (!node->used)
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "backward was called a second time for the same forward pass, whose saved results "
                                        "are gone; call the model again first");
    return -1;
}

/* The gradients (a tuple of arrays) start at the roots (a tuple of nodes). */
static int run_pass(peftc_state *state, PyObject *roots, PyObject *gradients)
{
    reached r = {0};
    const uint64_t pass = ++state->next_node;
    int status = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(roots) && status == 0; i++)
        status = reach(&r, cast(PyTuple_GET_ITEM(roots, i)), pass);
    for (size_t i = 0; i < r.count && status == 0; i++) {
        status = refuse_used(r.nodes[i]);
        for (Py_ssize_t p = 0; p < r.nodes[i]->parent_count && status == 0; p++)
            status = reach(&r, r.nodes[i]->parents[p], pass);
    }
    bool started = status == 0;
    if (started)
        qsort(r.nodes, r.count, sizeof *r.nodes, later_first);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(roots) && status == 0; i++)
        status = peftc_node_give(cast(PyTuple_GET_ITEM(roots, i)),
                                 (PyArrayObject *)Py_NewRef(PyTuple_GET_ITEM(gradients, i)));
    for (size_t i = 0; i < r.count && status == 0; i++) {
        peftc_node *node = r.nodes[i];
        PyArrayObject *dy = node->grad;
        node->grad = NULL;
        node->used = true;
        if (dy != NULL)
            status = node->ops->backward(node, dy);
        Py_XDECREF(dy);
        peftc_node_forget(node);
    }
    for (size_t i = 0; i < r.count; i++) {
        if (status != 0 && started) /* some gradients may be there: nobody shall go through here again */
            r.nodes[i]->used = true;
        Py_CLEAR(r.nodes[i]->grad);
        Py_DECREF((PyObject *)r.nodes[i]);
    }
    PyMem_Free(r.nodes);
    return status;
}

/* A gradient as an array of its own for a root; NULL with an exception. */
static PyArrayObject *take_gradient(const peftc_node *root, PyObject *obj)
{
    PyArrayObject *gradient = (PyArrayObject *)PyArray_FROM_OTF(
        obj, peftc_compute_type(root->compute),
        NPY_ARRAY_CARRAY | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSUREARRAY | NPY_ARRAY_ENSURECOPY);
    if (gradient == NULL)
        return NULL;
    PyObject *shape = PyArray_IntTupleFromIntp(PyArray_NDIM(gradient), PyArray_DIMS(gradient));
    int same = shape != NULL ? PyObject_RichCompareBool(shape, root->shape, Py_EQ) : -1;
    if (same == 0)
        PyErr_Format(PyExc_ValueError, "the gradient has shape %R and the result that it is the gradient of %R", shape,
                     root->shape);
    int64_t bad = same > 0 ? pc_first_not_finite(root->compute, PyArray_DATA(gradient), PyArray_SIZE(gradient)) : -1;
    if (bad >= 0)
        PyErr_Format(PyExc_FloatingPointError,
                     "the gradient of the loss is NaN or infinite (element %lld of shape %R): nothing was changed; look at the "
                     "loss, the learning rate and the data of this batch",
                     (long long)bad, root->shape);
    Py_XDECREF(shape);
    if (same <= 0 || bad >= 0)
        Py_CLEAR(gradient);
    return gradient;
}

static PyObject *backward(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *roots, *values;
    if (!PyArg_ParseTuple(args, "O!O!:backward", &PyTuple_Type, &roots, &PyTuple_Type, &values))
        return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(roots);
    if (PyTuple_GET_SIZE(values) != count)
        return PyErr_Format(PyExc_ValueError, "%zd gradients for %zd results", PyTuple_GET_SIZE(values), count);
    PyObject *gradients = PyTuple_New(count);
    for (Py_ssize_t i = 0; gradients != NULL && i < count; i++) {
        PyObject *root = PyTuple_GET_ITEM(roots, i);
        PyArrayObject *gradient = NULL;
        if (!Py_IS_TYPE(root, state->node_type))
            PyErr_Format(PyExc_TypeError, "expected a node, got %R", root);
        else if (refuse_used(cast(root)) == 0)
            gradient = take_gradient(cast(root), PyTuple_GET_ITEM(values, i));
        if (gradient == NULL)
            Py_CLEAR(gradients);
        else
            PyTuple_SET_ITEM(gradients, i, (PyObject *)gradient);
    }
    int status = gradients != NULL ? run_pass(state, roots, gradients) : -1;
    Py_XDECREF(gradients);
    return status == 0 ? Py_NewRef(Py_None) : NULL;
}

/* ------------------------------------------------- operations defined in Python */

/* kept[0] is called with dy and gives a tuple: for each input an array that reaches it, or None. */
static int python_backward(peftc_node *node, PyArrayObject *dy)
{
    PyObject *result = PyObject_CallOneArg(node->kept[0], (PyObject *)dy);
    if (result == NULL)
        return -1;
    int status = 0;
    if (!PyTuple_Check(result) || PyTuple_GET_SIZE(result) != node->parent_count) {
        PyErr_Format(PyExc_TypeError, "the gradient function of a recorded operation must give a tuple of %zd items",
                     node->parent_count);
        status = -1;
    }
    for (Py_ssize_t i = 0; i < node->parent_count && status == 0; i++) {
        peftc_node *parent = node->parents[i];
        PyObject *item = PyTuple_GET_ITEM(result, i);
        if (parent == NULL || item == Py_None)
            continue;
        PyArrayObject *array =
            (PyArrayObject *)PyArray_FROM_OTF(item, peftc_compute_type(parent->compute),
                                              NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSUREARRAY);
        PyObject *shape = array != NULL ? PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_DIMS(array)) : NULL;
        int same = shape != NULL ? PyObject_RichCompareBool(shape, parent->shape, Py_EQ) : -1;
        if (same == 0)
            PyErr_Format(PyExc_ValueError, "a gradient of shape %R for an input of shape %R", shape, parent->shape);
        Py_XDECREF(shape);
        if (same > 0) {
            status = peftc_node_give(parent, array);
        } else {
            Py_XDECREF(array);
            status = -1;
        }
    }
    Py_DECREF(result);
    return status;
}

static const peftc_node_ops python_ops = {"operation", python_backward, NULL};

static PyObject *record(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *inputs, *result, *function;
    if (!PyArg_ParseTuple(args, "O!O!O:record", &PyTuple_Type, &inputs, &PyArray_Type, &result, &function))
        return NULL;
    pc_dtype dtype = peftc_dtype_of(PyArray_DESCR((PyArrayObject *)result));
    const Py_ssize_t count = PyTuple_GET_SIZE(inputs);
    if (!peftc_gradients_on() || !pc_dtype_get(dtype)->is_float)
        return Py_NewRef(result);
    peftc_node **parents = PyMem_Calloc((size_t)count + 1, sizeof *parents);
    if (parents == NULL)
        return PyErr_NoMemory();
    int status = 0;
    bool any = false;
    for (Py_ssize_t i = 0; i < count && status == 0; i++) {
        status = peftc_input_node(state, PyTuple_GET_ITEM(inputs, i), &parents[i]);
        any = any || parents[i] != NULL;
    }
    PyObject *tensor = NULL;
    if (status == 0 && !any) {
        tensor = Py_NewRef(result);
    } else if (status == 0) {
        peftc_node *node = peftc_node_new(state, &python_ops, (PyArrayObject *)result, pc_compute_dtype(dtype), parents,
                                          count, NULL);
        if (node != NULL) {
            peftc_node_keep(node, 0, function);
            tensor = peftc_tensor_new(state, Py_NewRef(result), node);
        }
    }
    for (Py_ssize_t i = 0; i < count; i++)
        Py_XDECREF((PyObject *)parents[i]);
    PyMem_Free(parents);
    return tensor;
}

static PyMethodDef functions[] = {
    {"backward", backward, METH_VARARGS,
     "backward(nodes, gradients, /)\n--\n\nSend the gradients of recorded results (tuples) back to the parameters.\n\n"
     "Raises RuntimeError when it passed already, ValueError for another shape, FloatingPointError for NaN or infinity."},
    {"record", record, METH_VARARGS,
     "record(inputs, result, function, /)\n--\n\nresult as a Tensor that `function` leads back from: it is called with the "
     "gradient of the result and gives a tuple with one gradient (or None) per input. result itself when no input is "
     "recorded."},
    {NULL, NULL, 0, NULL},
};

int peftc_add_backward(PyObject *module) { return PyModule_AddFunctions(module, functions); }
